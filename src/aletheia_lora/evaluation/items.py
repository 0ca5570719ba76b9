"""What a model answered to each question, one JSON object a line.

Comes in: an ItemResult for every item, model and task. Goes out: a file of lines, and the same results read back and
checked. Every number that is shown about an evaluation can be computed from these lines alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import write_bytes
from ..rows import load_rows

BASE = "base"
"""Label of the model without an adapter."""

STOP_REASONS = {
    "stop": "the answer ended at a stop string",
    "eos": "the answer ended with an end-of-text token",
    "length": "the answer was cut at the largest number of new tokens",
    "scored": "nothing was generated: given text was scored",
}


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """One answer of one model to one item of one task.

    Raises:
        DataError: If a score is not a finite number, or the stop reason is unknown.
    """

    label: str
    """``base``, or the adapter's name."""
    adapter_digest: str | None
    """sha256 of the adapter's weights and configuration; None for the base model."""
    task: str
    """The leaf task: ``gsm8k``, or one subject of a group, such as ``mmlu_anatomy``."""
    item_id: str
    """Digest of the item's own columns: the same whatever the prompt, the model or the order."""
    prompt_sha256: str
    """sha256 of everything the model was asked: the prompt, or all (context, continuation) pairs in order."""
    response: str
    """The text that was generated, up to its stop; empty where text was scored."""
    extracted: str
    """What the task read out of the answer: a number, a choice, the program that was run."""
    scores: Mapping[str, float]
    """Metric -> value of this item. A task's number is the mean over its items, save for perplexities, which come from
    the sums of ``loglikelihood`` (nats), ``num_words`` and ``num_bytes``."""
    num_prompt_tokens: int
    """Tokens the model read before it answered; where text was scored, those of all pairs, shared ones once each."""
    num_response_tokens: int
    """Tokens that were generated (the one that ended the answer included) or scored."""
    stop_reason: str
    """A key of ``STOP_REASONS``."""
    prompt_truncated: bool = False
    """Whether the prompt was longer than the model can read, so that its beginning was cut off."""
    choice_loglikelihoods: tuple[float, ...] = ()
    """Log-likelihood of each choice in nats, in the task's order; empty where text was generated."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else a verdict says: the reason a program failed, whether the verdict could be forged."""

    def __post_init__(self) -> None:
        where = f"item {self.item_id} of {self.task} ({self.label})"
        if self.stop_reason not in STOP_REASONS:
            raise DataError(f"{where}: stop_reason={self.stop_reason!r}, expected one of {', '.join(STOP_REASONS)}.")
        for name, value in [*self.scores.items(), *(("choice_loglikelihoods", x) for x in self.choice_loglikelihoods)]:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise DataError(f"{where}: {name} is {value!r}, expected a finite number. The model may be broken.")

    @property
    def key(self) -> tuple[str, str, str]:
        """Label, task and item: what no two results share."""
        return self.label, self.task, self.item_id


FIELDS = tuple(entry.name for entry in dataclasses.fields(ItemResult))


def digest(value: Any) -> str:
    """sha256 in hex of ``value`` as canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def item_id(doc: Mapping[str, Any]) -> str:
    """Name of an item by its content: 16 hex digits over its columns."""
    return digest(dict(doc))[:16]


def write_items(path: Path, items: Iterable[ItemResult]) -> Path:
    """Write one JSON object a line; the file appears whole or not at all.

    Raises:
        OutputError: If the disk is full or the folder cannot be written; an old file stands.
    """
    lines = [json.dumps(dataclasses.asdict(item), ensure_ascii=False, allow_nan=False) for item in items]
    return write_bytes(path, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))


def read_items(path: Path) -> list[ItemResult]:
    """Read and check the lines that ``write_items`` wrote.

    Raises:
        DataError: If the file is missing, a line is no result, or two lines answer for the same item.
    """
    items: dict[tuple[str, str, str], ItemResult] = {}
    for number, row in enumerate(load_rows(path), 1):
        if set(row) != set(FIELDS):
            odd = ", ".join(sorted(set(row) ^ set(FIELDS)))
            raise DataError(f"row {number} of {str(path)!r}: missing or unknown {odd}. Write it with write_items.")
        item = ItemResult(**{**row, "choice_loglikelihoods": tuple(row["choice_loglikelihoods"])})
        if item.key in items:
            raise DataError(f"row {number} of {str(path)!r} repeats {' / '.join(item.key)}: each item counts once.")
        items[item.key] = item
    return list(items.values())
