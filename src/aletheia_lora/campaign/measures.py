"""What a run of a campaign is judged by: its losses, and the benchmarks that its adapter was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .outcomes import Outcome
from .pairing import Read

NATS, POINTS = "nats per token", "points"
LOSSES = ("heldout_loss", "other_loss")
"""Of every run; each has a value of the base model beside it, ``base_...``."""
MIN_ITEMS = 2


@dataclass(frozen=True)
class Items:
    """Two lists of answers to the same items."""

    values: list[float]
    references: list[float]
    weights: list[float] | None
    groups: list[str] | None
    """Leaf task of each item, where a benchmark has several."""
    binary: bool
    scale: float
    """From a difference of items to one in the measure's unit."""


@dataclass(frozen=True)
class Measure:
    """One number of a run, and of its base model."""

    name: str
    unit: str
    higher_is_better: bool | None
    """None where that was not recorded: then a difference is neither better nor worse."""
    margin: float | None
    """The difference that counts as none, fixed in the spec."""
    kind: str
    """``run`` or ``evaluation``: whose record holds it."""
    read: Read
    base: Read
    """The same number of the base model."""
    factor: float = 1.0
    """From a recorded number to the unit: 100 where shares are recorded and points are shown."""

    def items(self, own: Outcome, other: Outcome, *, base: bool) -> Items | None:
        """The items behind a pair; None where they are not the same ones, or do not give the pair's numbers.

        Args:
            own: The evaluation on one side.
            other: That on the other side.
            base: The other side is the base model of ``other``.
        """
        first, second = _entry(own, self.name), _entry(other, self.name)
        answers = first.get("items") or {}, second.get("base_items" if base else "items") or {}
        weights = first.get("weights")
        same = answers[0].keys() == answers[1].keys() and weights == second.get("weights")
        if len(answers[0]) < MIN_ITEMS or not same or min((weights or {"": 1}).values()) <= 0:
            return None
        scale = 100.0 if self.unit == POINTS else 1.0
        columns = [[finite(found[item], self.factor / scale) for item in answers[0]] for found in answers]
        whole = self.read(own), (self.base if base else self.read)(other)
        weight = None if weights is None else [float(weights[item]) for item in answers[0]]
        numbers = [[value for value in column if value is not None] for column in columns]
        for column, mean in zip(numbers, whole, strict=True):
            if mean is None or len(column) < len(answers[0]) or not _is_mean(column, weight, mean / scale):
                return None
        leaves = [item.rpartition("/")[0] for item in answers[0]]
        right_or_wrong = self.unit == POINTS and set(numbers[0]) | set(numbers[1]) <= {0.0, 1.0}
        groups = leaves if len(set(leaves)) > 1 else None
        return Items(numbers[0], numbers[1], weight, groups, right_or_wrong and weight is None, scale)


def measures(spec: Mapping[str, Any], found: Sequence[Outcome]) -> list[Measure]:
    """Held-out loss, the loss on other text where there is one, and every benchmark that was evaluated."""
    margins = spec["margins"]
    made = []
    for name in LOSSES:
        if name == "heldout_loss" or spec.get("other_text"):
            made.append(Measure(name, NATS, False, margins.get(name), "run", _number(name), _number(f"base_{name}")))
    entries: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        for task, entry in (one.result.get("evaluation") or {}).items() if one.kind == "evaluation" else ():
            entries.setdefault(str(task), []).append(entry)
    for task, own in entries.items():
        unit = str(own[0].get("unit", "of no known unit"))
        factor = 100.0 if unit == POINTS and all(_highest(entry) <= 1 for entry in own) else 1.0
        made.append(
            Measure(
                name=task,
                unit=unit,
                higher_is_better=own[0].get("higher_is_better"),
                margin=None if task in LOSSES else margins.get(task),
                kind="evaluation",
                read=_benchmark(task, "value", factor),
                base=_benchmark(task, "base", factor),
                factor=factor,
            )
        )
    return made


def loss_lowered(one: Outcome) -> float | None:
    """How far a run brought the held-out loss down; None where that is not known."""
    before, after = (_number(key)(one) for key in ("base_heldout_loss", "heldout_loss"))
    return None if before is None or after is None else before - after


def finite(value: Any, factor: float = 1.0) -> float | None:
    """The number; None where it is missing, not finite, or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return factor * float(value)


def _number(key: str) -> Read:
    return lambda one: finite(one.result.get(key))


def _benchmark(task: str, key: str, factor: float) -> Read:
    return lambda one: finite(_entry(one, task).get(key), factor)


def _entry(one: Outcome, task: str) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = (one.result.get("evaluation") or {}).get(task, {})
    return entry


def _highest(entry: Mapping[str, Any]) -> float:
    """The highest score of a benchmark: above 1 they are points already, else shares."""
    scores = [entry.get(key) for key in ("value", "base")]
    scores += [score for key in ("items", "base_items") for score in (entry.get(key) or {}).values()]
    return max((value for score in scores if (value := finite(score)) is not None), default=0.0)


def _is_mean(column: Sequence[float], weights: Sequence[float] | None, mean: float) -> bool:
    weights = [1.0] * len(column) if weights is None else weights
    total = math.fsum(value * weight for value, weight in zip(column, weights, strict=True))
    return math.isclose(total / math.fsum(weights), mean, rel_tol=1e-6, abs_tol=1e-9)
