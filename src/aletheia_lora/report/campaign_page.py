"""A campaign's tables and figures -> one HTML page that loads nothing and runs nothing.

Comes in: the dict that ``aletheia_lora.campaign.report`` makes from the records. Goes out: HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .campaign_plots import (
    LOSS,
    NOT_KNOWN,
    between,
    campaign_titles,
    chosen_methods,
    counted,
    find,
    kind_of,
    method_role,
    tally,
)
from .canvas import ROLE_COLOURS
from .forgetting import number
from .measurement import pairs
from .templates import html, image, title_parts
from .words import DASH, known, visible

Record = Mapping[str, Any]
STATES = {"held": "holds", "did not hold": "differs", "not known": "unknown"}
"""Classes of the style, by answer."""
MORE_FIGURES = ("deltas_other", "deltas_points", "benchmarks", "benchmarks_loss")
"""Drawn only where there is something to draw."""
ASKED = ("questions", "speed_questions")
"""Tables of questions; what a clock answers is apart."""


def render_campaign(
    record: Record, plots: Mapping[str, bytes], shown: Mapping[str, Sequence[Mapping[str, str]]]
) -> str:
    """The whole page as HTML.

    Args:
        record: What was found.
        plots: PNG bytes by the names of ``draw_campaign``. One that is missing is said to be missing.
        shown: The tables as rows of text, by name.
    """
    title = campaign_finding(record)
    titles = campaign_titles(record)
    return html(
        "campaign.html.j2",
        title=title,
        title_parts=title_parts(title),
        name=visible(record["name"]),
        models=", ".join(visible(model["name"]) for model in record["models"]),
        tasks=", ".join(visible(task["name"]) for task in record["tasks"]),
        deck=_deck(record),
        cards=_cards(record),
        questions=[_question(row) for name in ASKED for row in record["tables"][name]],
        plots={name: image(found, plots.get(name)) for name, found in titles.items()},
        evaluated=bool(record["evaluated"]),
        more_figures=[name for name in MORE_FIGURES if name in titles],
        tables={name: _table(record, rows) for name, rows in shown.items()},
        missing=record["missing"],
        definitions=_definitions(record),
        facts=_facts(record),
        limits=_limits(record),
        colours=ROLE_COLOURS,
    )


def campaign_finding(record: Record) -> str:
    """The outcome in one plain sentence, good or bad: the loss against uniform LoRA's, and against the controls."""
    for method in chosen_methods(record):
        rows = find(record["tables"]["comparisons"], method=method, measure=LOSS, match=record["match"][0])
        own = [row for row in rows if row["against"] == "uniform"]
        controls = [row for row in rows if row["against"] == "control"]
        told = [_against_uniform(row) for row in own]
        if controls:
            told.append(f"against {counted(len(controls), 'control')}: {tally(controls)}")
        if told:
            return f"At equal {record['match'][0]}, {visible(method)} {'; '.join(told)}."
    return "No method that chooses layers by a score was run beside another; nothing can be compared."


def _against_uniform(row: Mapping[str, Any]) -> str:
    words = {
        "better": "ended with a lower held-out loss than uniform LoRA",
        "worse": "ended with a higher held-out loss than uniform LoRA",
        "equal": f"kept the held-out loss of uniform LoRA within {row['margin'] or 0:g} nats",
        NOT_KNOWN: "was not shown to keep or to change the held-out loss of uniform LoRA",
    }
    within = ", by less than the margin" if "," in row["verdict"] else ""
    return f"{words[kind_of(row)]}{within} ({row['n']} of {row['of']} pairs)"


def _question(row: Mapping[str, Any]) -> dict[str, str]:
    return {**{key: visible(row[key]) for key in ("question", "answer", "why")}, "state": STATES[row["answer"]]}


def _deck(record: Record) -> list[str]:
    told = [
        f"{record['num_done']} of {record['num_runs']} runs ended well. {_margins(record)} “Not known” means that "
        "neither a difference nor its absence was shown."
    ]
    if not record["evaluated"]:
        told.append("No benchmark was evaluated: the campaign has no evaluation.")
    return told


def _margins(record: Record) -> str:
    told: dict[str, list[str]] = {}
    for key, value in record["margins"].items():
        if value:
            when = "changed after cells had run" if key in record["changed_margins"] else "fixed before the first run"
            told.setdefault(when, []).append(f"{visible(key).replace('_', ' ')} {value:g}")
    return " ".join(f"Differences that count as none were {when}: {', '.join(own)}." for when, own in told.items())


def _cards(record: Record) -> list[dict[str, str]]:
    method = next(iter(chosen_methods(record)), None)
    if method is None:
        return []
    cards = []
    for row in find(record["tables"]["speed"], scope="all", method=method):
        value = DASH if row["ratio"] is None else f"{row['ratio']:.2f}x"
        note = f"{between(row, digits=2)}; {row['n']} of {row['of']} pairs"
        cards.append({"value": value, "label": "as fast as uniform LoRA at equal steps, probe paid", "note": note})
    for row in find(record["tables"]["comparisons"], method=method, measure=LOSS, against="uniform"):
        value = DASH if row["mean"] is None else number(row["mean"], row["unit"], signed=True)
        note = f"{between(row)}; {row['n']} of {row['of']} pairs"
        label = f"nats of held-out loss against uniform LoRA at equal {row['match']}"
        cards.append({"value": value, "label": label, "note": note})
    asked = find(record["tables"]["comparisons"], method=method, measure=LOSS, against="control")
    if asked:
        value = f"{sum(kind_of(row) == 'better' for row in asked)} of {len(asked)}"
        cards.append({"value": value, "label": "times better than a control", "note": tally(asked)})
    return cards


def _table(record: Record, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    lines = [
        {
            "cells": list(row.values()),
            "role": _colour(record, row["method"]) if "method" in row else "",
            "failed": row.get("state", "done") != "done",
            "main": False,
        }
        for row in rows
    ]
    return {"heads": [head.replace("_", " ") for head in rows[0]] if rows else [], "rows": lines}


def _colour(record: Record, method: str) -> str:
    role = method_role(record, method)
    return "uniform" if role == "baseline" else role


def _definitions(record: Record) -> list[tuple[str, str]]:
    return [
        (
            "Pair",
            "The same model, task and seed under two methods. Draws of a random method are averaged within the pair; a "
            "pair that lacks a draw, or whose run did not end well, is missing and named.",
        ),
        (
            "Interval",
            "95 %, of the mean difference: Student's t with each model and task as a group where there are three or "
            "more, else with each pair by itself, which knows nothing of other models and tasks. Not corrected for the "
            "number of comparisons. The BCa bootstrap beside it is too narrow below about 30 groups. Where all pairs "
            "differ alike there is no interval: a few coarse scores do so by chance.",
        ),
        (
            "Equal time",
            "As many steps as fit in the time of uniform LoRA's, by counting the operations of a step in our trainer; "
            "no clock is read, and the probe is not paid.",
        ),
        (
            "Better, worse, equal",
            "Better and worse: a t test at 5 % after Holm's correction over the comparisons of the question, those "
            "that gave no number included. A question is one selection on one measure at equal steps or time; "
            "benchmarks together are one. Equal: two one-sided tests at 5 %, each by itself, place the difference "
            "inside the margin that the spec fixed. The table also has the p-value corrected for all comparisons of "
            "the campaign.",
        ),
        (
            "Held, did not hold, not known",
            "“Is it better?” is held by better, and not by worse or equal. “Does it keep?” is held by better, by "
            "equal, and by worse within the margin. At equal count both sides adapted as many layers.",
        ),
        (
            "Faster",
            "Geometric mean of uniform LoRA's training seconds over those of the method, at equal steps, on the same "
            "device; the method's probe is paid where it needs one. Counted: steps in uniform LoRA's predicted time "
            "over uniform LoRA's steps.",
        ),
        (
            "Usefulness",
            "How far a selection lowered the held-out loss. Spearman's rank correlation with the share of the score "
            "that its layers hold; one point is one selection, over the seeds and draws that chose it.",
        ),
    ]


def _facts(record: Record) -> list[tuple[str, list[tuple[str, str]]]]:
    machines = [
        (f"Environment of {machine['num_cells']} cells", pairs(machine["environment"]))
        for machine in record["environments"]
    ]
    return [
        ("Settings", pairs(record["settings"])),
        ("Versions", pairs(record["versions"])),
        ("Models", [(visible(model["name"]), _model(model)) for model in record["models"]]),
        ("Tasks", [(visible(task["name"]), visible(task["data"])) for task in record["tasks"]]),
        *(machines or [("Environment", [])]),
    ]


def _model(model: Mapping[str, Any]) -> str:
    family = visible(model["family"]) if model["family_known"] else f"{DASH} (family not recorded)"
    return f"{visible(model['model'])}, {family}"


def _limits(record: Record) -> list[str]:
    rows = [row for row in record["tables"]["comparisons"] if known(row["mean"]) is not None]
    told = [
        f"The spec was changed on {visible(change['at'][:10])}; cells that had run by then: {change['num_cells']}. "
        f"{visible('; '.join(change['changes']))}"
        for change in record["accepted_changes"]
    ]
    if any(row["basis"] == "one pair" for row in rows):
        told.append("Some comparisons rest on one pair: they have no interval, and another seed may turn them round.")
    if any(row["basis"] == "items" for row in rows):
        told.append("Intervals over the items of one run say nothing about what another run would show.")
    if any(row["basis"] == "pairs" for row in rows):
        told.append(
            "With fewer than three models and tasks each pair stands by itself: the intervals do not say what another "
            "model or task would show."
        )
    told += [
        "The seeds of a task share its held-out rows and its learning rate, and a random choice is the same for all "
        "tasks: the intervals know nothing of other rows, nor of other random choices than those drawn.",
        "Times hold for these devices, models and rows of these lengths.",
        "Held-out loss says how well an adapter predicts text like the training data, and nothing about tasks.",
        "Each method trained at the best of the learning rates of the grid; rates that were not tried are not known.",
        *(f"Learning rates of {visible(reason)}" for reason in record["unsure_rates"]),
    ]
    return told
