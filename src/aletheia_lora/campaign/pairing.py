"""Outcomes -> numbers of two methods in pairs: the same model, task and seed; whatever is missing is named.

The draws of a random method are averaged within their pair, and a pair that lacks one of them is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ..selection import SCORED
from .outcomes import Outcome

UNIFORM = "uniform"
DATA_FREE_SCORES = ("random", "weight_snr")
MIN_GROUPS = 3
"""Of two groups a t interval is twelve standard errors wide: pairs of fewer stand by themselves."""

Key = tuple[str, str, int]
"""Model, task and seed."""
Side = Mapping[Key, Sequence[Outcome]]
"""The cells of one method, by pair; several where it draws."""
Read = Callable[[Outcome], float | None]
Unlike = Callable[[Outcome, Outcome], str | None]


def role_of(method: Mapping[str, Any]) -> str:
    """``uniform``, ``baseline`` (all layers in another way), ``control`` or ``selected`` (layers by a score)."""
    if method["name"] == UNIFORM:
        return "uniform"
    if method.get("strategy") == "all":
        return "baseline"
    reads = method.get("strategy") in SCORED and method.get("strategy") != "bottom"
    return "selected" if reads and method.get("score") not in DATA_FREE_SCORES else "control"


@dataclass(frozen=True)
class Pairs:
    """Numbers of two sides, pair by pair, and the pairs that should be there and are not."""

    keys: list[Key] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    references: list[float] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def of(self) -> int:
        """How many pairs there should be."""
        return len(self.keys) + len(self.missing)

    @property
    def differences(self) -> list[float]:
        """``values - references``."""
        return [value - reference for value, reference in zip(self.values, self.references, strict=True)]

    @property
    def groups(self) -> list[str] | None:
        """Model and task of each pair; None where there are fewer than three: then each pair stands by itself."""
        names = [f"{model}/{task}" for model, task, _ in self.keys]
        return names if len(set(names)) >= MIN_GROUPS else None

    def of_models(self, models: Collection[str]) -> Pairs:
        """The pairs of some models; what is missing is left to the whole."""
        kept = [index for index, (model, _, _) in enumerate(self.keys) if model in models]
        return Pairs(
            [self.keys[index] for index in kept],
            [self.values[index] for index in kept],
            [self.references[index] for index in kept],
        )


def side(found: Iterable[Outcome], method: str, match: str, kind: str = "run") -> dict[Key, list[Outcome]]:
    """The cells of one method at equal ``steps`` or ``time``."""
    cells: dict[Key, list[Outcome]] = {}
    for one in found:
        if (one.kind, one.method, one.content.get("match")) == (kind, method, match):
            cells.setdefault((one.model, one.task, int(one.content["seed"])), []).append(one)
    return cells


def matched(
    own: Side, other: Side, read: Read, *, read_other: Read | None = None, unlike: Unlike | None = None
) -> Pairs:
    """The numbers of two methods, pair by pair.

    Args:
        own: The cells of the method.
        other: Those of the reference; the same ones where a run is compared with its own base model.
        read: Gives a cell's number; None where it has none.
        read_other: The same for the reference, where it is another number.
        unlike: Says why two cells may not be compared; None where they may.
    """
    pairs, read_other = Pairs(), read_other or read
    for key in dict.fromkeys([*own, *other]):
        first, second = own.get(key, ()), other.get(key, ())
        why = _gap(first, read) or _gap(second, read_other)
        if why is None and unlike is not None:
            why = next((said for one in first for two in second if (said := unlike(one, two))), None)
        if why is not None:
            pairs.missing.append(f"{name_of(key)}: {why}")
            continue
        pairs.keys.append(key)
        pairs.values.append(_mean(first, read))
        pairs.references.append(_mean(second, read_other))
    return pairs


def name_of(key: Key) -> str:
    """A pair in words."""
    model, task, seed = key
    return f"{model}, {task}, seed {seed}"


def _gap(members: Sequence[Outcome], read: Read) -> str | None:
    """Why these cells give no number; None where they do."""
    if not members:
        return "no such cell"
    for one in members:
        name = one.method if len(members) == 1 else f"draw {one.content['draw']} of {one.method}"
        if not one.done:
            return f"{name} is {one.state}"
        if read(one) is None:
            return f"{name} has no such number"
    return None


def _mean(members: Sequence[Outcome], read: Read) -> float:
    return fmean(float(value) for one in members if (value := read(one)) is not None)
