"""What a model says to one question, before anybody judges it.

Comes in: nothing. Goes out: the records that language model, cache and judge share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Question:
    """All that is asked of a model about one item."""

    kind: str
    """How it is asked, in the harness's words: ``loglikelihood``, ``loglikelihood_rolling`` or ``generate_until``."""
    requests: tuple[Any, ...]
    """(context, continuation) for each choice; (text,); or one (prompt, generation arguments)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back: generated text, or log-likelihoods of given text."""

    response: str = ""
    loglikelihoods: tuple[float, ...] = ()
    """One for each request, in nats."""
    is_greedy: tuple[bool, ...] = ()
    """Whether greedy decoding would have said the same, for each request."""
    num_prompt_tokens: int = 0
    num_response_tokens: int = 0
    stop_reason: str = "scored"
    """A key of ``items.STOP_REASONS``."""
    prompt_truncated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Answer:
        """The record that ``to_dict`` wrote.

        Raises:
            TypeError: If fields are missing or unknown.
        """
        sequences = {key: tuple(record[key]) for key in ("loglikelihoods", "is_greedy")}
        return cls(**{**record, **sequences})

    def results(self) -> list[Any]:
        """What the harness's tasks expect for each request, in order."""
        if self.stop_reason != "scored":
            return [self.response]
        if not self.is_greedy:
            return list(self.loglikelihoods)
        return list(zip(self.loglikelihoods, self.is_greedy, strict=True))
