"""A campaign's folder -> what came of each of its cells, every record read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import AletheiaError
from .records import CellFolder, DamagedError, chosen_rate
from .spec import cells

OTHER_RATE = "its grid of learning rates gives another rate now"
NO_RATE = "its grid of learning rates gives no rate now"
OTHER_ADAPTER = "it asked another adapter than its run has now"
AGAIN = "run the campaign with --retry-failed"
WHOSE = ("model", "task", "method", "match", "seed", "draw")
"""What names a run, and the evaluation of it."""


@dataclass(frozen=True)
class Outcome:
    """One cell as a report sees it."""

    cell: str
    """Name of its folder."""
    content: Mapping[str, Any]
    state: str
    """``invalid`` also where the grid gives another rate than a run trained at, or an evaluation is of no good run."""
    reason: str | None
    attempts: int | None
    result: Mapping[str, Any]
    """What was measured; empty where there is no record."""
    overtaken: bool = False
    """It ended well, and what it was made from is another now: only running it again mends that."""

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
    rates: dict[tuple[str, str, str], float | str] = {}
    found = [_outcome(CellFolder.of(folder, cell), rates) for cell in cells(spec)]
    runs = {one.whose: one for one in found if one.kind == "run"}
    return [_of_a_good_run(one, runs) if one.kind == "evaluation" else one for one in found]


def _outcome(place: CellFolder, rates: dict[tuple[str, str, str], float | str]) -> Outcome:
    record = place.record()
    state, reason = place.state() if record is None else (record["state"], record["reason"])
    result, attempts = ({}, None) if record is None else (record["result"], record["attempts"])
    one = Outcome(place.path.name, place.cell.content, state, reason, attempts, result)
    if one.kind != "run" or not one.done:
        return one
    if place.cell.group not in rates:  # runs of a group share their grid
        rates[place.cell.group] = _rate(place)
    rate = rates[place.cell.group]
    if isinstance(rate, str):
        return replace(one, state="invalid", reason=f"{NO_RATE}: {rate}")
    return one if rate == result["learning_rate"] else _overtaken(one, OTHER_RATE)


def _rate(place: CellFolder) -> float | str:
    """The rate that the grid gives now; where it gives none, the reason."""
    try:
        return chosen_rate(place)[0]
    except DamagedError:
        raise
    except AletheiaError as error:
        return str(error)


def _overtaken(one: Outcome, why: str) -> Outcome:
    return replace(one, state="invalid", reason=f"{why}: {AGAIN}", overtaken=True)


def _of_a_good_run(one: Outcome, runs: Mapping[tuple[Any, ...], Outcome]) -> Outcome:
    run = runs.get(one.whose)
    if not one.done:
        return one
    if run is None or not (run.done or run.overtaken):
        return replace(one, state="invalid", reason=f"its run is {'missing' if run is None else run.state}")
    if run.overtaken:
        return _overtaken(one, "its run was overtaken")
    asked, trained = (cell.result.get("adapter_digest") for cell in (one, run))
    return one if asked == trained else _overtaken(one, OTHER_ADAPTER)
