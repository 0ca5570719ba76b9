"""Data sets -> the most tokens whose states a prefix cache will keep, and of these the ones not kept yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.int64]
"""Token ids, (N,)."""


@dataclass(frozen=True, slots=True)
class ExpectedLines:
    """Lines of one data set that a run will meet; a line is one row, or several where they were packed."""

    lines: Sequence[Sequence[Row]]
    num_drawn: int
    """Lines that are drawn from these, repeated ones included."""
    training: bool
    """The mode of the model then: states of train and eval mode are kept apart."""

    def num_tokens(self, held: Callable[[Row], bool] = lambda _row: False) -> int:
        """The most tokens in the lines that are drawn, whichever they are, but for rows that are ``held``."""
        lengths = sorted((sum(len(row) for row in line if not held(row)) for line in self.lines), reverse=True)
        return sum(lengths[: self.num_drawn])


def expected_lines(
    train: Any, evaluated: Any = None, *, num_drawn: int, num_tried: int = 0
) -> list[ExpectedLines] | None:
    """What a run will meet; None where a data set does not tell its rows.

    Args:
        train: Rows with ``input_ids``, and ``seq_lengths`` where a line holds several.
        evaluated: Rows on which the run evaluates, likewise; a mapping of names to them; or None.
        num_drawn: Lines that training draws, epochs after the first included.
        num_tried: Lines of the first training batches that go through the model in eval mode.
    """
    others = [] if evaluated is None else [*evaluated.values()] if isinstance(evaluated, dict) else [evaluated]
    lines = [_lines(data) for data in (train, *others)]
    known = [entry for entry in lines if entry is not None]
    if len(known) < len(lines):
        return None
    return [
        ExpectedLines(known[0], num_drawn, training=True),
        ExpectedLines(known[0], num_tried, training=False),
        *(ExpectedLines(entry, len(entry), training=False) for entry in known[1:]),
    ]


def _lines(data: Any) -> list[list[Row]] | None:
    columns = getattr(data, "column_names", None) or ()
    if not hasattr(data, "__len__") or "input_ids" not in columns:
        return None
    lines = [np.asarray(line, np.int64) for line in data["input_ids"]]
    if "seq_lengths" not in columns:
        return [[line] for line in lines]
    return [np.split(line, np.cumsum(parts)[:-1]) for line, parts in zip(lines, data["seq_lengths"], strict=True)]
