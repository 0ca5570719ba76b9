"""A campaign's folder -> plain tables: every run, the mean of each method with its n and gaps, the grid.

Nothing but the records is read. The tables hold no clock, so they are the same however often a campaign was
interrupted; what was measured by the clock is a table of its own.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..errors import AletheiaError
from ..files import write_bytes
from .records import CellFolder, DamagedError, chosen_rate
from .spec import cells
from .status import pinned_spec

MEASURES = ("heldout_loss", "other_loss")
"""What a run is judged by; each has a value of the base model beside it, ``base_...``."""
FACTS = ("learning_rate", "steps", "lowest_backward_layer", "trainable_params")
Row = dict[str, Any]


def tables(folder: Path) -> dict[str, list[Row]]:
    """``runs``, ``methods``, ``grid`` and ``times``, each a list of rows with the same keys.

    Raises:
        ConfigError: If there is no campaign in the folder.
        DamagedError: If a record is not what was written.
    """
    places = [CellFolder.of(folder, cell) for cell in cells(pinned_spec(folder))]
    runs = [_run(place) for place in places if place.cell.content["kind"] == "run"]
    return {
        "runs": runs,
        "methods": _methods(runs),
        "grid": [_grid(place) for place in places if place.cell.content["kind"] == "grid"],
        "times": [_times(place) for place in places],
    }


def _names(place: CellFolder) -> Row:
    return {key: place.cell.content[key]["name"] for key in ("model", "task", "method")}


def _run(place: CellFolder) -> Row:
    state, reason = place.state()
    record = place.record()
    result = {} if record is None else record["result"]
    if state == "done" and not _rate_stands(place, result):
        state, reason = "invalid", "its grid of learning rates changed after it ran"
    values = {key: result.get(key) for name in MEASURES for key in (f"base_{name}", name)}
    return {
        **_names(place),
        **{key: place.cell.content[key] for key in ("match", "seed", "draw")},
        "state": state,
        "num_layers": len(result["layers"]) if "layers" in result else None,
        **{key: result.get(key) for key in FACTS},
        **values,
        "reason": reason,
    }


def _rate_stands(place: CellFolder, result: Mapping[str, Any]) -> bool:
    """True while the grid is the one that the run chose from."""
    try:
        return chosen_rate(place) == (result["learning_rate"], result["grid"])
    except DamagedError:
        raise
    except AletheiaError:
        return False


def _methods(runs: Sequence[Row]) -> list[Row]:
    """Means over the runs that ended well, with how many there should be and what became of the others."""
    keys = ("model", "task", "match", "method")
    rows = []
    for group in dict.fromkeys(tuple(run[key] for key in keys) for run in runs):
        members = [run for run in runs if tuple(run[key] for key in keys) == group]
        done = [run for run in members if run["state"] == "done"]
        gaps = Counter(run["state"] for run in members if run["state"] != "done")
        row: Row = {**dict(zip(keys, group, strict=True)), "n": len(done), "of": len(members)}
        for name in MEASURES:
            values = [run[name] for run in done]
            row[f"mean_{name}"] = fmean(values) if values and None not in values else None
        row["gaps"] = ", ".join(f"{count} {state}" for state, count in sorted(gaps.items()))
        rows.append(row)
    return rows


def _grid(place: CellFolder) -> Row:
    state, reason = place.state()
    record = place.record()
    loss = None if record is None else record["result"].get("validation_loss")
    rate = place.cell.content["learning_rate"]
    return {**_names(place), "learning_rate": rate, "state": state, "validation_loss": loss, "reason": reason}


def _times(place: CellFolder) -> Row:
    record = place.record()
    result = {} if record is None else record["result"]
    steps = result.get("step_seconds") or []
    return {
        "cell": place.path.name,
        "attempts": None if record is None else record["attempts"],
        "seconds": result.get("seconds"),
        "training_seconds": sum(steps) if steps else None,
        "median_step_seconds": median(steps[1:] or steps) if steps else None,
        "probe_seconds": result.get("probe_seconds"),
    }


# --- as text ----------------------------------------------------------------------------------------------------


def report_text(folder: Path) -> str:
    """The tables ``methods``, ``runs`` and ``grid`` in Markdown."""
    spec, made = pinned_spec(folder), tables(folder)
    ended = sum(row["state"] == "done" for row in made["runs"])
    lines = [f"# Campaign {spec['name']}", "", f"{ended} of {len(made['runs'])} runs ended well.", ""]
    lines += [f"Margins, fixed beforehand: {_margins(spec['margins'])}.", ""]
    captions = {
        "methods": "Means over the runs that ended well, `n` of them; `gaps` are not in the mean",
        "runs": "Every run",
        "grid": "Learning rates: each method takes the one with the lowest validation loss",
    }
    for name, caption in captions.items():
        lines += [f"## {caption}", "", *_markdown(made[name]), ""]
    return "\n".join(lines)


def _margins(margins: Mapping[str, float | None]) -> str:
    known = [(key, value) for key, value in margins.items() if value is not None]
    units = {key: "nats" if key in MEASURES else "points (of plain text: nats)" for key, _ in known}
    return ", ".join(f"{key} {value:g} {units[key]}" for key, value in known)


def _markdown(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["none"]
    keys = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)]
    lines = [f"| {' | '.join(keys)} |", "|" + " --- |" * len(keys)]
    return lines + [f"| {' | '.join(_cell(row[key]) for key in keys)} |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 0.1 else f"{value:g}"
    text = "" if value is None else str(value)
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV; text that a spreadsheet would take for a formula is marked as text."""
    if not rows:
        return ""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([f"'{value}" if str(value)[:1] in ("=", "+", "@") else value for value in row.values()])
    return stream.getvalue()


def write_report(folder: Path) -> str:
    """Write ``report.md`` and one CSV file a table into the campaign's folder; gives the Markdown."""
    text = report_text(folder)
    write_bytes(folder / "report.md", text.encode())
    for name, rows in tables(folder).items():
        write_bytes(folder / f"{name}.csv", csv_text(rows).encode())
    return text
