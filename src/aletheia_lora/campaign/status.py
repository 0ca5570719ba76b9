"""A campaign's folder -> how far it is: states of all cells, and the time left, from records and locks alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import ConfigError
from .records import FINAL, STATES, CellFolder, LockedError, locked, read_pinned
from .runner import driver_of
from .spec import Cell, cells


def pinned_spec(folder: Path) -> Mapping[str, Any]:
    """The resolved spec of a campaign that was started.

    Raises:
        ConfigError: If there is none in the folder.
    """
    spec = read_pinned(folder)
    if spec is None:
        raise ConfigError(f"there is no campaign in {str(folder)!r}. Start it with `aletheia campaign run SPEC`.")
    return spec


def status(folder: Path) -> dict[str, Any]:
    """States, running cells with their last news, and the seconds of work left; None where nothing tells."""
    spec = pinned_spec(folder)
    entries = [_entry(CellFolder.of(folder, cell)) for cell in cells(spec)]
    left = [_seconds_left(entry, entries) for entry in entries if entry["state"] not in FINAL]
    known = all(seconds is not None for seconds in left)
    running = [entry for entry in entries if entry["state"] == "running"]
    counts = Counter(entry["state"] for entry in entries)
    return {
        "name": spec["name"],
        "driver": _driver(folder),
        "num_cells": len(entries),
        "states": {state: counts[state] for state in STATES if counts[state]},
        "seconds_left": sum(filter(None, left)) / max(len(running), 1) if known else None,
        "cells": [{key: value for key, value in entry.items() if key != "like"} for entry in entries],
    }


def _entry(place: CellFolder) -> dict[str, Any]:
    state, reason = place.state()
    entry: dict[str, Any] = {"cell": place.path.name, "state": state, "reason": reason, "like": _likeness(place.cell)}
    record = place.record()
    if record is not None:
        entry["seconds"] = record["result"].get("seconds")
    elif state == "running":
        events = place.events()
        started = [event["at"] for event in events if event["kind"] == "attempt_started"]
        if started:
            since = datetime.now(timezone.utc) - datetime.fromisoformat(started[-1])
            entry["running_seconds"] = since.total_seconds()
        entry["news"] = events[-1]["data"].get("line") if events else None
    return entry


def _likeness(cell: Cell) -> list[tuple[Any, ...]]:
    """What cells that take about as long have in common, from close to far."""
    content = cell.content
    far = (content["kind"], content["model"]["name"], content["task"]["name"])
    return [(*far, content["method"]["name"], content.get("match")), far, far[:1]]


def _seconds_left(entry: dict[str, Any], entries: list[dict[str, Any]]) -> float | None:
    """The mean of the nearest cells that ended well, less what this one has run."""
    for nearness, like in enumerate(entry["like"]):
        taken = [
            other["seconds"]
            for other in entries
            if other["state"] == "done" and other.get("seconds") and other["like"][nearness] == like
        ]
        if taken:
            return float(max(fmean(taken) - entry.get("running_seconds", 0.0), 0.0))
    return None


def _driver(folder: Path) -> str | None:
    """Who is at work; None where nobody is."""
    if not (folder / "driver.lock").exists():
        return None
    try:
        with locked(folder / "driver.lock"):
            return None
    except LockedError:
        return driver_of(folder)


def status_text(record: Mapping[str, Any]) -> str:
    """The status as lines for a person."""
    states = ", ".join(f"{count} {state}" for state, count in record["states"].items())
    left = record["seconds_left"]
    time_left = "nothing left to do" if left == 0 else f"about {duration(left)} left"
    lines = [
        f"{record['name']}: {record['num_cells']} cells, {states}; {time_left}",
        f"driver: {record['driver'] or 'none at work'}",
    ]
    for entry in record["cells"]:
        if entry["state"] == "running":
            lines.append(f"running  {entry['cell']}: {entry.get('news') or 'starting'}")
        elif entry["state"] not in ("planned", "done"):
            lines.append(f"{entry['state']:8} {entry['cell']}: {entry['reason']}")
    return "\n".join(lines)


def duration(seconds: float | None) -> str:
    """Seconds in words."""
    if seconds is None:
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
