"""A forgetting record -> the section of a comparison's page, or a page of its own, that says what was forgotten.

Comes in: the dict of ``forgetting.json`` and its figures. Goes out: HTML that loads nothing and runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_bytes, write_json
from .canvas import ROLE_COLOURS
from .forgetting import (
    POINTS,
    Task,
    amount,
    check_forgetting,
    confidence_text,
    entry_of,
    forgetting_finding,
    forgetting_table,
    interval,
    margin_text,
    mean_of,
    name_of,
    number,
    role_of,
    verdict,
    verdict_text,
)
from .forgetting_plots import draw_forgetting, forgetting_titles
from .measurement import Check, environment, pairs
from .tables import Record
from .templates import html, image, title_parts
from .words import DASH, known, visible

MAX_DIFFERENT_CUTS = 0.01
"""Shares of answers cut at the token limit may differ by this much between models before the page objects."""


def render_forgetting(record: Record, plots: Mapping[str, bytes]) -> str:
    """The whole page as HTML.

    Args:
        record: The dict of ``forgetting.json``.
        plots: PNG bytes by the names of ``draw_forgetting``. One that is missing is said to be missing.

    Raises:
        DataError: If the record is not a forgetting record, or contradicts itself.
    """
    parts = forgetting_parts(record, plots)
    return html(
        "forgetting.html.j2",
        forgetting=parts,
        plots=parts["plots"],
        title_parts=title_parts(parts["finding"]),
        model=visible(record.get("model") or "model not recorded"),
        data=visible(record.get("data") or "data not recorded"),
        created=visible(record.get("created")),
        facts=[
            ("Settings", pairs(record["settings"])),
            ("Adapters", [(name_of(record, label), _digest(value)) for label, value in record["adapters"].items()]),
            ("Environment", environment(record)),
        ],
        colours=ROLE_COLOURS,
    )


def write_forgetting(record: Record, folder: Path) -> Path:
    """Write ``forgetting.html``, its figures and ``forgetting.json`` into ``folder``; the path of the page.

    Raises:
        DataError: If the record is not a forgetting record, or contradicts itself.
        OutputError: If the folder cannot be written.
    """
    check_forgetting(record)
    plots = draw_forgetting(record)
    page = render_forgetting(record, plots)
    write_json(Path(folder) / "forgetting.json", record)
    for name, drawn in plots.items():
        write_bytes(Path(folder) / f"{name}.png", drawn)
    return write_bytes(Path(folder) / "forgetting.html", page.encode())


def forgetting_parts(record: Record, plots: Mapping[str, bytes]) -> dict[str, Any]:
    """What the section shows, in words and figures.

    Raises:
        DataError: If the record is not a forgetting record, or contradicts itself.
    """
    finding = forgetting_finding(record)
    titles = forgetting_titles(record)
    return {
        "finding": finding,
        "deck": _deck(record),
        "cards": [_card(record, task) for task in record["tasks"]],
        "plots": {name: image(title, plots.get(name)) for name, title in titles.items()},
        "forgotten": [name for name in titles if name.startswith("forgetting")],
        "extra": [name for name in titles if name.startswith("extra")],
        "verdicts": [_sentence(record, task) for task in record["tasks"]],
        "noise": _noise(record),
        "table": _table(record),
        "checks": _checks(record),
        "definitions": _definitions(record),
        "limits": _limits(record),
    }


def _deck(record: Record) -> list[str]:
    margins = list(dict.fromkeys(margin_text(task) for task in record["tasks"]))
    if not margins:
        return []
    return [
        f"Extra forgetting that would not matter was fixed beforehand: {' and '.join(margins)}. “Equal” means that two "
        "one-sided tests put the difference inside it; that no difference was found would not be enough."
    ]


def _card(record: Record, task: Task) -> dict[str, str]:
    extra = entry_of(task, record["selected"]).get("extra")
    unit = "points" if task["unit"] == POINTS else "nats per token"
    label = f"{visible(task['task'])}: {unit} forgotten beyond uniform LoRA"
    if extra is None:
        return {"value": DASH, "label": label, "note": "not evaluated for both"}
    note = f"{confidence_text(record)} interval {interval(extra, task['unit'])}; {verdict_text(record, task)}"
    return {"value": number(extra["mean"], task["unit"], signed=True), "label": label, "note": note}


def _sentence(record: Record, task: Task) -> str:
    """One benchmark in words: what each forgot, and what follows from it."""
    unit, name = task["unit"], visible(task["task"])
    told = []
    for label in (record["uniform"], record["selected"]):
        mean = mean_of(entry_of(task, label), "forgetting")
        who = name_of(record, label)
        if mean is None:
            told.append(f"{who} was not evaluated")
        elif number(mean, unit) == number(0, unit):
            told.append(f"{who} changed nothing")
        else:
            told.append(f"{who} {'forgot' if mean > 0 else 'gained'} {amount(abs(mean), unit)}")
    extra = entry_of(task, record["selected"]).get("extra")
    reason = {
        "equivalent": f"the two are equal within {margin_text(task)}",
        "more": "the selection forgets more",
        "less": "the selection forgets less",
        "undecided": f"{task['n']:,} items cannot decide between equal within {margin_text(task)} and different",
    }.get(verdict(record, task), "they cannot be compared")
    if extra is not None and known((extra.get("equivalence") or {}).get("low")) is not None:
        inner = extra["equivalence"]
        level = f"{100 * inner['confidence']:g} %"
        reason += f" ({level} interval of the difference {interval({**inner, 'n': extra['n']}, unit)})"
    return f"{name}: {', '.join(told)}; {reason}."


def _noise(record: Record) -> list[str]:
    """What evaluating one adapter twice changed, benchmark by benchmark."""
    told = []
    for task in record["tasks"]:
        noise = task.get("noise")
        if not noise:
            continue
        unit = task["unit"]
        changed = noise["num_worse"] + noise["num_better"]
        responses = known(noise.get("num_responses_changed"))
        text = "" if responses is None else f"{responses:,.0f} of {noise['n']:,} answers read differently, "
        told.append(
            f"{visible(task['task'])}: {text}{changed:,} of {noise['n']:,} scores changed; on average "
            f"{number(noise['mean'], unit, signed=True)} {'points' if unit == POINTS else 'nats per token'} "
            f"({confidence_text(record)} interval {interval(noise, unit)}), with "
            f"{name_of(record, noise['label'])} evaluated twice."
        )
    return told or ["No adapter was evaluated twice, so the noise of the evaluation itself is not known."]


def _table(record: Record) -> dict[str, Any]:
    rows = forgetting_table(record)
    entries = [entry for task in record["tasks"] for entry in task["arms"]]
    lines = [
        {
            "cells": list(row.values()),
            "role": role_of(record, entry["label"]),
            "failed": False,
            "main": entry["label"] == record["selected"],
        }
        for row, entry in zip(rows, entries, strict=True)
    ]
    return {"heads": list(rows[0]) if rows else [], "rows": lines}


def _checks(record: Record) -> list[Check]:
    labels = [name_of(record, entry["label"]) for entry in (record["tasks"] or [{"arms": []}])[0]["arms"]]
    checks = [
        {
            "state": "holds",
            "text": f"Every item was asked with the same prompt of all: {', '.join(labels)}. Prompts are compared by "
            "digest, and a difference is refused.",
        }
    ]
    gaps = [
        f"{visible(task['task'])}: {name_of(record, entry['label'])}"
        for task in record["tasks"]
        for entry in task["arms"]
        if not entry["n"]
    ]
    left = {
        visible(task["task"]): lost
        for task in record["tasks"]
        if (lost := max(entry.get("num_left_out", 0) for entry in task["arms"]))
    }
    if gaps or left:
        told = [f"not evaluated: {'; '.join(gaps)}"] if gaps else []
        told += [f"left out on {name}, as not all answered: {count:,}" for name, count in left.items()]
        checks.append({"state": "differs", "text": f"There are gaps. {'. '.join(told)}."})
    else:
        checks.append({"state": "holds", "text": "Every model answered every item."})
    return [*checks, *(_cut_check(record, task) for task in record["tasks"] if _num_cut(task))]


def _num_cut(task: Task) -> int:
    return sum(entry.get("num_answers_cut", 0) + entry.get("num_prompts_cut", 0) for entry in task["arms"])


def _cut_check(record: Record, task: Task) -> Check:
    """Answers or prompts that did not fit; a model that is cut more often is not measured alike."""
    shown, shares = [], []
    for entry in task["arms"]:
        if entry["n"]:
            cut = entry["num_answers_cut"] + entry["num_prompts_cut"]
            shares.append(cut / entry["n"])
            shown.append(f"{name_of(record, entry['label'])} {cut:,}")
    state = "differs" if max(shares) - min(shares) > MAX_DIFFERENT_CUTS else "holds"
    words = f"answers or prompts cut at the limit of tokens: {', '.join(shown)} of {task['n']:,}"
    return {"state": state, "text": f"{visible(task['task'])}: {words}. A cut answer counts as it was read."}


def _definitions(record: Record) -> list[tuple[str, str]]:
    level = confidence_text(record)
    return [
        (
            "Forgotten",
            "Score of the base model minus score after tuning, in points of 100; on plain text the loss after tuning "
            "minus the loss before, in nats per token. Below 0 the model got better.",
        ),
        ("More than uniform LoRA", "What the selection forgot minus what uniform LoRA forgot, on the same items."),
        (
            "Interval",
            f"{level}, of the mean over items. Where items are right or wrong, one pair changed each way is added "
            "(Bonett and Price), so that no change in few items is not taken for none at all. Where a benchmark has "
            "parts, such as subjects, its items are grouped by them, since those of one part may move together.",
        ),
        (
            "Equal",
            "Two one-sided t tests at the level "
            f"{record['settings']['alpha']:g} place the difference inside the margin; the thick interval of the figure "
            "is the same statement.",
        ),
        (
            "p",
            "Of no difference: McNemar's exact test where items are right or wrong and stand alone, else a t test, by "
            "groups where there are some. For the selection corrected for the number of benchmarks, after Holm.",
        ),
        (
            "The same adapter twice",
            "A second evaluation of one adapter, in another order and batch size. What it changes is noise of the "
            "evaluation, and no difference below it means anything.",
        ),
    ]


def _limits(record: Record) -> list[str]:
    return [
        "One adapter per model was evaluated. The intervals say what other items of the same kind would show; what "
        "another training run would forget, they do not say.",
        "Only these benchmarks were asked. What the model lost elsewhere is not known.",
        "Undecided is no middle way: with more items, either answer could come out.",
    ]


def _digest(value: object) -> str:
    return "no adapter" if value is None else visible(value)[:16]
