"""A campaign's folder -> everything that is said of it: tables, figures and a page, from the records alone.

``report.md`` and its tables hold no clock, so they are the same however often a campaign was interrupted; what was
measured by the clock is in the tables of ``CLOCK``, in ``speed.md``, in the figures and on the page.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..files import write_bytes
from ..report.campaign_page import render_campaign
from ..report.campaign_plots import draw_campaign
from ..report.latex import latex
from ..report.tables import markdown, markdown_text
from ..report.words import visible
from .analysis import Row, comparisons, deltas, questions
from .measures import LOSSES, measures
from .outcomes import Outcome, outcomes
from .pairing import role_of
from .ranking import ranking
from .records import accepted_changes
from .spec import SHARED
from .speed import counted, speed_questions, speeds
from .status import pinned_spec
from .usefulness import layer_scores, mean_scores, usefulness

FACTS = ("learning_rate", "steps", "lowest_backward_layer", "trainable_params")
CLOCK = ("times", "speed", "speed_questions")
"""Tables that hold what a clock said."""
CAPTIONS = {
    "questions": "What was asked",
    "ranking": "Held-out loss minus that of a random choice, the lowest first; Holm's correction over all `tried`",
    "comparisons": "Differences in pairs",
    "deltas": "What training changed against the base model",
    "counted": "Steps in uniform LoRA's predicted time, by counting operations",
    "usefulness": "Rank correlation of the score that a selection holds with how far it lowered the loss",
    "methods": "Means over the runs that ended well, `n` of them; `gaps` are not in the mean",
    "runs": "Every run",
    "grid": "Learning rates: each method takes the one with the lowest validation loss",
    "speed_questions": "What was asked of time",
    "speed": "Times as fast as uniform LoRA at equal steps, the probe paid",
}
"""Tables for people, in this order; the others are files only."""
SHORT = {
    "questions": ("question", "answer", "why"),
    "ranking": (
        *("match", "method", "role", "num_layers", "n", "of", "mean", "low", "high", "t_p", "holm_p", "tried"),
        "verdict",
    ),
    "comparisons": (
        *("match", "measure", "method", "reference", "n", "of", "basis", "mean", "low", "high"),
        *("bootstrap_low", "bootstrap_high", "wilcoxon_p", "holm_p", "tried", "holm_p_of_all", "hedges_g"),
        *("margin", "equivalence_p", "verdict"),
    ),
    "deltas": ("measure", "unit", "match", "method", "n", "of", "basis", "mean", "low", "high"),
    "speed": (
        *("scope", "name", "method", "n", "of", "ratio", "low", "high", "bootstrap_low", "bootstrap_high", "holm_p"),
        *("verdict", "faster_models", "num_models", "counted_ratio"),
    ),
}
"""Columns that people are shown; the CSV files have all."""
SETTINGS = ("steps", "seeds", "learning_rates", "grid_steps", *(key for key in SHARED if key != "versions"))
MARKED = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes text that begins so for a formula."""

Texts = Mapping[str, Sequence[Mapping[str, str]]]


def campaign_record(folder: Path) -> dict[str, Any]:
    """Everything that is known, as plain JSON types: facts of the campaign, and its ``tables``.

    Raises:
        ConfigError: If there is no campaign in the folder.
        DamagedError: If a record is not what was written.
    """
    spec = pinned_spec(folder)
    found, accepted = outcomes(folder, spec), accepted_changes(folder)
    judged = measures(spec, found)
    compared, changed = comparisons(spec, found, judged), deltas(spec, found, judged)
    models = [{**entry, **_family(entry["name"], found)} for entry in spec["models"]]
    families = {model["name"]: model["family"] for model in models}
    runs = [_run(one) for one in found if one.kind == "run"]
    timed = speeds(spec, found, families)
    made = {
        "questions": questions(spec, compared),
        "ranking": ranking(spec, found, judged),
        "comparisons": compared,
        "deltas": changed,
        "counted": counted(spec, found),
        "usefulness": usefulness(spec, found),
        "methods": means(runs, ("model", "task", "match", "method"), LOSSES),
        "runs": runs,
        "grid": [_grid(one) for one in found if one.kind == "grid"],
        "scores": mean_scores(layer_scores(found)),
        "speed_questions": speed_questions(spec, timed),
        "speed": timed,
        "times": [_times(one) for one in found],
    }
    return {
        "name": spec["name"],
        "match": list(spec["match"]),
        "margins": dict(spec["margins"]),
        "changed_margins": changed_margins(spec["margins"], accepted),
        "accepted_changes": accepted,
        "methods": [{"name": method["name"], "role": role_of(method)} for method in spec["methods"]],
        "models": models,
        "tasks": [dict(task) for task in spec["tasks"]],
        "settings": {key: spec[key] for key in SETTINGS if key in spec},
        "versions": dict(spec["versions"]),
        "environments": _environments(found),
        "num_runs": len(runs),
        "num_done": sum(run["state"] == "done" for run in runs),
        "evaluated": any(one.kind == "evaluation" for one in found),
        "missing": _missing([*compared, *changed]),
        "unsure_rates": unsure_rates(made["grid"], float(spec["margins"]["heldout_loss"])),
        "tables": made,
    }


def changed_margins(margins: Mapping[str, Any], accepted: Sequence[Mapping[str, Any]]) -> list[str]:
    """The margins that were not what they are when the first cell had a record already."""
    lines = [line for change in accepted if change["num_cells"] for line in change["changes"]]
    return [key for key in margins if any(line.startswith(f"margins.{key}: ") for line in lines)]


def tables(folder: Path) -> dict[str, list[Row]]:
    """The tables of :func:`campaign_record`, each a list of rows with the same keys."""
    made: dict[str, list[Row]] = campaign_record(folder)["tables"]
    return made


def _names(one: Outcome) -> Row:
    return {"model": one.model, "task": one.task, "method": one.method}


def _run(one: Outcome) -> Row:
    result = one.result
    values = {key: result.get(key) for name in LOSSES for key in (f"base_{name}", name)}
    return {
        **_names(one),
        **{key: one.content[key] for key in ("match", "seed", "draw")},
        "state": one.state,
        "num_layers": len(result["layers"]) if "layers" in result else None,
        **{key: result.get(key) for key in FACTS},
        **values,
        "reason": one.reason,
    }


def means(runs: Sequence[Row], keys: Sequence[str], numbers: Sequence[str]) -> list[Row]:
    """A row for every value of the keys: means over the runs that ended well, how many should have, and the gaps."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    rows = []
    for group, members in groups.items():
        done = [run for run in members if run["state"] == "done"]
        gaps = Counter(run["state"] for run in members if run["state"] != "done")
        row: Row = {**dict(zip(keys, group, strict=True)), "n": len(done), "of": len(members)}
        for name in numbers:
            values = [run[name] for run in done]
            row[f"mean_{name}"] = fmean(values) if values and None not in values else None
        row["gaps"] = ", ".join(f"{count} {state}" for state, count in sorted(gaps.items()))
        rows.append(row)
    return rows


def _grid(one: Outcome) -> Row:
    rate, loss = one.content["learning_rate"], one.result.get("validation_loss")
    return {**_names(one), "learning_rate": rate, "state": one.state, "validation_loss": loss, "reason": one.reason}


def unsure_rates(grid: Sequence[Row], margin: float) -> list[str]:
    """Why the learning rates that were taken may not be the best ones, one line a task and reason.

    Args:
        grid: Rows of the table ``grid``.
        margin: A difference of held-out loss that counts as none, in nats per token.
    """
    losses: dict[tuple[str, str, str], dict[float, float]] = {}
    for row in grid:
        if row["validation_loss"] is not None:
            losses.setdefault((row["model"], row["task"], row["method"]), {})[row["learning_rate"]] = row[
                "validation_loss"
            ]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for (model, task, method), tried in losses.items():
        best, *others = sorted(tried, key=lambda rate: (tried[rate], rate))
        if others and best in (min(tried), max(tried)):
            end = "lowest" if best == min(tried) else "highest"
            reason = f"the {end} rate of the grid, {best:g}, was the best, and one beyond it may be better"
            reasons.setdefault((model, task, reason), []).append(method)
        if others and tried[others[0]] - tried[best] < margin:
            reason = f"the best two rates of the grid differ by less than {margin:g} nats, and chance may have chosen"
            reasons.setdefault((model, task, reason), []).append(method)
    return [f"{model}, {task}: {reason} ({', '.join(methods)})." for (model, task, reason), methods in reasons.items()]


def _times(one: Outcome) -> Row:
    steps = one.result.get("step_seconds") or []
    return {
        "cell": one.cell,
        "attempts": one.attempts,
        "seconds": one.result.get("seconds"),
        "training_seconds": sum(steps) if steps else None,
        "median_step_seconds": median(steps[1:] or steps) if steps else None,
        "probe_seconds": one.result.get("probe_seconds"),
    }


def _family(model: str, found: Sequence[Outcome]) -> Row:
    """The type of a model as its runs recorded it; its name where they did not."""
    types = [one.result["model_type"] for one in found if one.model == model and one.result.get("model_type")]
    return {"family": types[0] if types else model, "family_known": bool(types)}


def _environments(found: Sequence[Outcome]) -> list[Row]:
    """The machines and versions that runs were measured on, with how many cells each."""
    seen = [one.result["environment"] for one in found if one.result.get("environment")]
    counts = Counter(json.dumps(environment, sort_keys=True) for environment in seen)
    return [{"num_cells": count, "environment": json.loads(text)} for text, count in counts.items()]


def _missing(rows: Sequence[Row]) -> list[str]:
    """Every pair that is missing somewhere, once, with what lacks it."""
    lacking: dict[str, int] = {}
    for row in rows:
        for pair in filter(None, row["missing"].split("; ")):
            lacking[pair] = lacking.get(pair, 0) + 1
    return [f"{visible(pair)} (lines that lack it: {count})" for pair, count in lacking.items()]


# --- as text ----------------------------------------------------------------------------------------------------


def shown(name: str, rows: Sequence[Row]) -> list[dict[str, str]]:
    """The rows of a table as text for people: the columns that say something, numbers rounded."""
    keys = SHORT.get(name) or tuple(rows[0] if rows else ())
    keys = tuple(key for key in keys if any(row[key] not in (None, "") for row in rows))
    return [{key: _cell(row[key]) for key in keys} for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 0.1 else f"{value:.4g}"
    return "" if value is None else " ".join(visible(value).split())


def report_text(folder: Path) -> str:
    """The tables in Markdown, without what a clock said."""
    record = campaign_record(folder)
    return _text(record, _texts(record))


def _texts(record: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    return {name: shown(name, record["tables"][name]) for name in CAPTIONS}


def _text(record: Mapping[str, Any], texts: Texts) -> str:
    lines = [f"# Campaign {record['name']}", ""]
    lines += [f"{record['num_done']} of {record['num_runs']} runs ended well.", ""]
    lines += [*_margins(record), ""]
    for change in record["accepted_changes"]:
        what = markdown_text(" ".join(visible("; ".join(change["changes"])).split()))
        lines += [f"The spec was changed; cells that had run by then: {change['num_cells']}. {what}", ""]
    lines += ["Better, worse: t tests at 5 % after Holm's correction over the comparisons that a question `tried`."]
    lines += ["Equal: two one-sided tests at 5 % place the difference inside the margin."]
    lines += ["Bootstrap intervals of fewer than about 30 groups are too narrow: read the t intervals (low, high)."]
    lines += ["Equal time: as many steps as fit in uniform LoRA's, by counting operations, the probe not paid.", ""]
    for reason in record["unsure_rates"]:
        lines += [f"Learning rates of {markdown_text(visible(reason))}", ""]
    if not record["evaluated"]:
        lines += ["No benchmark was evaluated: the campaign has no evaluation.", ""]
    for name, caption in CAPTIONS.items():
        if name not in CLOCK:
            lines += [f"## {caption}", "", _table(texts[name])]
        if name == "deltas":
            gaps = [f"- {markdown_text(gap)}" for gap in record["missing"]] or ["No pair is missing."]
            lines += ["## Pairs that are missing", "", *gaps, ""]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    return markdown(rows) if rows else "none\n"


def _margins(record: Mapping[str, Any]) -> list[str]:
    """Lines: what was fixed before anything ran, and what was not."""
    told: dict[str, list[str]] = {}
    for key, value in record["margins"].items():
        if value is not None:
            when = "changed after cells had run" if key in record["changed_margins"] else "fixed beforehand"
            unit = "nats" if key in LOSSES else "points (of plain text: nats)"
            told.setdefault(when, []).append(f"{key} {value:g} {unit}")
    return [f"Margins, {when}: {', '.join(margins)}." for when, margins in told.items()]


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV; text that a spreadsheet would take for a formula is marked as text."""
    if not rows:
        return ""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        writer.writerow([_field(value) for value in row.values()])
    return stream.getvalue()


def _field(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return f"'{visible(value)}" if value.startswith(MARKED) else visible(value)


def write_report(folder: Path) -> str:
    """Write the whole report into the campaign's folder; gives the Markdown.

    ``report.md``, ``speed.md`` and ``report.html``; a CSV file for each table, a LaTeX file for those that people
    read; the figures as PNG in ``figures/``.

    Raises:
        ConfigError: If there is no campaign in the folder.
        DamagedError: If a record is not what was written.
        OutputError: If the folder cannot be written.
    """
    return save_report(campaign_record(folder), folder)


def save_report(record: Mapping[str, Any], folder: Path) -> str:
    """Write what :func:`campaign_record` found; see :func:`write_report`."""
    texts = _texts(record)
    text = _text(record, texts)
    for name, rows in record["tables"].items():
        write_bytes(folder / f"{name}.csv", csv_text(rows).encode())
    for name, said in texts.items():
        write_bytes(folder / f"{name}.tex", latex(said).encode())
    plots = draw_campaign(record)
    for name, drawn in plots.items():
        write_bytes(folder / "figures" / f"{name}.png", drawn)
    write_bytes(folder / "report.html", render_campaign(record, plots, texts).encode())
    timed = [f"## {CAPTIONS[name]}\n\n{_table(texts[name])}" for name in ("speed_questions", "speed")]
    write_bytes(folder / "speed.md", "\n".join([f"# Campaign {record['name']}: time\n", *timed]).encode())
    write_bytes(folder / "report.md", text.encode())
    return text
