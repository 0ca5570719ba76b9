"""A forgetting record -> figures: what each adapter forgot, and what the selection forgot beyond uniform LoRA.

Comes in: the dict of ``forgetting.json``. Goes out: PNG bytes; benchmarks in points and plain text in nats have
figures of their own, since they share no axis.
"""

from __future__ import annotations

from collections.abc import Sequence

from .canvas import ROLE_COLOURS, shortened
from .forest import Line, forest
from .forgetting import (
    BASE,
    POINTS,
    Task,
    amount,
    by_verdict,
    confidence_text,
    entry_of,
    interval,
    items_text,
    margin_text,
    mean_of,
    name_of,
    number,
    role_of,
    verdict,
    verdict_text,
)
from .tables import Record
from .words import known, visible


def draw_forgetting(record: Record) -> dict[str, bytes]:
    """All figures by their names: ``forgetting`` and ``extra_forgetting``, ``_loss`` behind those of plain text."""
    figures = {}
    for suffix, tasks in _by_unit(record).items():
        figures[f"forgetting{suffix}"] = plot_forgetting(record, tasks)
        figures[f"extra_forgetting{suffix}"] = plot_extra(record, tasks)
    return figures


def forgetting_titles(record: Record) -> dict[str, str]:
    """The finding that each figure shows, in words: its title, and its alternative text."""
    titles = {}
    for suffix, tasks in _by_unit(record).items():
        titles[f"forgetting{suffix}"] = _forgetting_title(record, tasks)
        titles[f"extra_forgetting{suffix}"] = _extra_title(record, tasks)
    return titles


def plot_forgetting(record: Record, tasks: Sequence[Task]) -> bytes:
    """What every adapter forgot, benchmark by benchmark, with its interval; the noise floor below where it is known."""
    unit = tasks[0]["unit"] if tasks else POINTS
    what = "Base model minus tuned model" if unit == POINTS else "Loss of the tuned model minus that of the base model"
    subtitle = f"{what}, item by item; right of the line is forgotten. Whiskers: {confidence_text(record)} intervals."
    blocks = [(_heading(task), _forgetting_lines(record, task)) for task in tasks]
    words = "points forgotten against the base model" if unit == POINTS else "nats per token lost to the base model"
    return forest(_forgetting_title(record, tasks), subtitle, blocks, words)


def plot_extra(record: Record, tasks: Sequence[Task]) -> bytes:
    """What the selection forgot beyond uniform LoRA, against the margin that was given beforehand."""
    unit = tasks[0]["unit"] if tasks else POINTS
    level = 100 * (1 - 2 * record["settings"]["alpha"])
    subtitle = (
        f"Shaded: the margin given beforehand. Thin: {confidence_text(record)} intervals; thick: {level:g} %. "
        "Where the thick one lies in the shade, both forget alike."
    )
    blocks = []
    for task in tasks:
        extra = entry_of(task, record.get("selected")).get("extra")
        colour = ROLE_COLOURS["selected"]
        text = "" if extra is None else number(extra["mean"], unit, signed=True)
        decided = verdict(record, task) not in ("", "undecided")
        blocks.append((_heading(task), [Line(verdict_text(record, task), extra, colour, text, bold=decided)]))
    words = "points forgotten beyond uniform LoRA" if unit == POINTS else "nats per token lost beyond uniform LoRA"
    margin = known(tasks[0]["margin"]) if tasks else None
    return forest(_extra_title(record, tasks), subtitle, blocks, words, margin=margin)


def _forgetting_lines(record: Record, task: Task) -> list[Line]:
    lines = []
    for entry in task["arms"]:
        label = entry["label"]
        if label == BASE:
            continue
        mean, role = mean_of(entry, "forgetting"), role_of(record, label)
        text = "" if mean is None else number(mean, task["unit"], signed=True)
        bold = label == record.get("selected")
        lines.append(Line(name_of(record, label), entry.get("forgetting"), ROLE_COLOURS[role], text, bold))
    noise = task.get("noise")
    if noise:
        colour = ROLE_COLOURS[role_of(record, noise["label"])]
        text = number(noise["mean"], task["unit"], signed=True)
        lines.append(Line("the same adapter twice", noise, colour, text, hollow=True))
    return lines


def _heading(task: Task) -> tuple[str, str]:
    words = items_text({**task}, {"n": task["n"]})
    return shortened(visible(task["task"]), 24), f"n = {words}"


def _forgetting_title(record: Record, tasks: Sequence[Task]) -> str:
    labels = (record.get("uniform"), record.get("selected"))
    worst: tuple[float, Task] | None = None
    for task in tasks:
        means = [mean for label in labels if (mean := mean_of(entry_of(task, label), "forgetting")) is not None]
        if means and (worst is None or max(means) > worst[0]):
            worst = max(means), task
    if worst is None:
        return "What was forgotten is not known"
    task = worst[1]
    ends = [
        f"{name_of(record, label)} {number(mean, task['unit'], signed=True)}"
        for label in labels
        if (mean := mean_of(entry_of(task, label), "forgetting")) is not None
    ]
    unit = "points" if task["unit"] == POINTS else "nats per token"
    where = f"Most was forgotten on {visible(task['task'])}" if worst[0] > 0 else "Nothing got worse"
    least = "" if worst[0] > 0 else f"; least gained on {visible(task['task'])}"
    return f"{where}{least}: {', '.join(ends)} {unit}"


def _extra_title(record: Record, tasks: Sequence[Task]) -> str:
    found = by_verdict({**record, "tasks": tasks})
    if len(tasks) == 1 and not found.get(""):
        extra = entry_of(tasks[0], record.get("selected"))["extra"]
        unit = tasks[0]["unit"]
        more = "more" if extra["mean"] > 0 else "less"
        size = f"The selected layers forgot {amount(abs(extra['mean']), unit)} {more} than uniform LoRA"
        return f"{size} ({interval(extra, unit)}): {verdict_text(record, tasks[0])}"
    words = {
        "equivalent": f"equal within {margin_text(tasks[0])}" if tasks else "",
        "more": "forgotten more",
        "less": "forgotten less",
        "undecided": "not decided",
        "": "not compared",
    }
    counts = [f"{len(found[kind])} {words[kind]}" for kind in words if found.get(kind)]
    if not counts:
        return "What was forgotten beyond uniform LoRA is not known"
    return f"Selected layers against uniform LoRA on {len(tasks)} benchmarks: {', '.join(counts)}"


def _by_unit(record: Record) -> dict[str, list[Task]]:
    split: dict[str, list[Task]] = {}
    for task in record.get("tasks") or ():
        split.setdefault("" if task["unit"] == POINTS else "_loss", []).append(task)
    return split
