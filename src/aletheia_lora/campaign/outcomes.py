"""A campaign's folder -> what came of each of its cells, every record read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import AletheiaError
from .records import CellFolder, DamagedError, chosen_rate
from .spec import cells

Rate = tuple[float, list[dict[str, Any]]]
WHOSE = ("model", "task", "method", "match", "seed", "draw")
"""What names a run, and the evaluation of it."""


@dataclass(frozen=True)
class Outcome:
    """One cell as a report sees it."""

    cell: str
    """Name of its folder."""
    content: Mapping[str, Any]
    state: str
    """``invalid`` also where the grid that a run chose from changed, or an evaluation is of no good run."""
    reason: str | None
    attempts: int | None
    result: Mapping[str, Any]
    """What was measured; empty where there is no record."""

    @property
    def kind(self) -> str:
        """``grid``, ``run`` or ``evaluation``."""
        return str(self.content["kind"])

    @property
    def model(self) -> str:
        """Name of the model's entry."""
        return str(self.content["model"]["name"])

    @property
    def task(self) -> str:
        """Name of the task that was trained on."""
        return str(self.content["task"]["name"])

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.content["method"]["name"])

    @property
    def done(self) -> bool:
        """True if it ended, and all checks held."""
        return self.state == "done"

    @property
    def whose(self) -> tuple[Any, ...]:
        """What a run and its evaluation have in common."""
        return self.model, self.task, self.method, *(self.content[key] for key in WHOSE[3:])


def outcomes(folder: Path, spec: Mapping[str, Any]) -> list[Outcome]:
    """What came of every cell of the spec, in its order.

    Raises:
        DamagedError: If a record is not what was written.
    """
    rates: dict[tuple[str, str, str], Rate | None] = {}
    found = [_outcome(CellFolder.of(folder, cell), rates) for cell in cells(spec)]
    runs = {one.whose: one for one in found if one.kind == "run"}
    return [_of_a_good_run(one, runs) if one.kind == "evaluation" else one for one in found]


def _outcome(place: CellFolder, rates: dict[tuple[str, str, str], Rate | None]) -> Outcome:
    record = place.record()
    state, reason = place.state() if record is None else (record["state"], record["reason"])
    result, content = {} if record is None else record["result"], place.cell.content
    if content["kind"] == "run" and state == "done":
        if place.cell.group not in rates:  # runs of a group share their grid
            rates[place.cell.group] = _rate(place)
        if rates[place.cell.group] != (result["learning_rate"], result["grid"]):
            state, reason = "invalid", "its grid of learning rates changed after it ran"
    return Outcome(place.path.name, content, state, reason, None if record is None else record["attempts"], result)


def _rate(place: CellFolder) -> Rate | None:
    """The rate that the grid gives now; None where it gives none."""
    try:
        return chosen_rate(place)
    except DamagedError:
        raise
    except AletheiaError:
        return None


def _of_a_good_run(one: Outcome, runs: Mapping[tuple[Any, ...], Outcome]) -> Outcome:
    run = runs.get(one.whose)
    if not one.done or (run is not None and run.done):
        return one
    return replace(one, state="invalid", reason=f"its run is {'missing' if run is None else run.state}")
