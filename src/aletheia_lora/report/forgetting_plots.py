"""A forgetting record -> figures: what each adapter forgot, and what the selection forgot beyond uniform LoRA.

Comes in: the dict of ``forgetting.json``. Goes out: PNG bytes; benchmarks in points and plain text in nats have
figures of their own, since they share no axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .canvas import INK, MUTED, ROLE_COLOURS, RULE, SMALL_SIZE, beside, canvas, drawable, empty, png, shortened, wrapped
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

MARGIN_COLOUR = "#e6eef5"
HEADING_HEIGHT, ROW_HEIGHT, GAP = 0.36, 0.30, 0.14
"""Inches of the name of a benchmark, of a line below it, and between benchmarks."""


@dataclass(frozen=True)
class _Line:
    name: str
    found: Mapping[str, Any] | None
    colour: str
    text: str
    bold: bool = False
    hollow: bool = False


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
    return _forest(_forgetting_title(record, tasks), subtitle, blocks, words, unit)


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
        blocks.append((_heading(task), [_Line(verdict_text(record, task), extra, colour, text, bold=decided)]))
    words = "points forgotten beyond uniform LoRA" if unit == POINTS else "nats per token lost beyond uniform LoRA"
    margin = known(tasks[0]["margin"]) if tasks else None
    return _forest(_extra_title(record, tasks), subtitle, blocks, words, unit, margin=margin)


def _forest(
    title: str,
    subtitle: str,
    blocks: Sequence[tuple[tuple[str, str], Sequence[_Line]]],
    words: str,
    unit: str,
    *,
    margin: float | None = None,
) -> bytes:
    """Points with whiskers, grouped under the names of their benchmarks."""
    height = sum(HEADING_HEIGHT + ROW_HEIGHT * len(lines) + GAP for _, lines in blocks)
    with canvas(title, subtitle, body=max(height, 1.2), left=2.1, right=1.0) as (figure, axes):
        if not blocks:
            return empty(figure, axes, "No benchmark was evaluated.")
        axes.set_ylim(-height, 0)
        if margin is not None:
            axes.axvspan(-margin, margin, color=MARGIN_COLOUR, linewidth=0, zorder=0)
        axes.axvline(0, color=INK, linewidth=1)
        centres, names = [], []
        y = 0.0
        for (heading, note), lines in blocks:
            y -= HEADING_HEIGHT / 2 + GAP / 2
            _write_heading(axes, y, heading, note)
            y -= HEADING_HEIGHT / 2
            for line in lines:
                _draw_line(axes, y - ROW_HEIGHT / 2, line, unit)
                centres.append(y - ROW_HEIGHT / 2)
                names.append(drawable(wrapped(line.name, 30)))
                y -= ROW_HEIGHT
            y -= GAP / 2
        low, high = axes.get_xlim()
        reach = max(abs(low), abs(high))
        axes.set_xlim(min(low, -0.35 * reach), max(high, 0.35 * reach))
        axes.set_yticks(centres, names)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        axes.set_xlabel(words)
        axes.grid(axis="x")
        return png(figure)


def _write_heading(axes: Axes, y: float, heading: str, note: str) -> None:
    place = axes.get_yaxis_transform()
    axes.axhline(y + HEADING_HEIGHT / 2, xmin=-2, color=RULE, linewidth=0.8, clip_on=False)
    axes.annotate(
        drawable(heading), (0, y), (-141, 0), place, "offset points", va="center", weight="bold", annotation_clip=False
    )
    axes.text(
        1.0,
        y,
        drawable(note),
        transform=place,
        va="center",
        ha="right",
        color=MUTED,
        fontsize=SMALL_SIZE,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
    )


def _draw_line(axes: Axes, y: float, line: _Line, unit: str) -> None:
    mean = known((line.found or {}).get("mean"))
    if line.found is None or mean is None:
        beside(axes, 0, y, "not evaluated", colour=MUTED)
        return
    low, high = known(line.found.get("low")), known(line.found.get("high"))
    if low is not None and high is not None:
        axes.plot([low, high], [y, y], color=line.colour, linewidth=1.3, zorder=3, solid_capstyle="butt")
        for end in (low, high):
            axes.plot([end, end], [y - 0.05, y + 0.05], color=line.colour, linewidth=1.3, zorder=3)
    inner = line.found.get("equivalence") or {}
    if known(inner.get("low")) is not None:
        axes.plot([inner["low"], inner["high"]], [y, y], color=line.colour, linewidth=4, zorder=3, alpha=0.55)
    face = "white" if line.hollow else line.colour
    axes.plot(mean, y, "o", color=line.colour, markerfacecolor=face, markersize=7, zorder=4)
    text = line.text if low is not None else f"{line.text}  (n = {line.found.get('n', 0)})"
    beside(axes, mean if high is None else max(high, mean), y, text, weight="bold" if line.bold else "normal")


def _forgetting_lines(record: Record, task: Task) -> list[_Line]:
    lines = []
    for entry in task["arms"]:
        label = entry["label"]
        if label == BASE:
            continue
        mean, role = mean_of(entry, "forgetting"), role_of(record, label)
        text = "" if mean is None else number(mean, task["unit"], signed=True)
        bold = label == record.get("selected")
        lines.append(_Line(name_of(record, label), entry.get("forgetting"), ROLE_COLOURS[role], text, bold))
    noise = task.get("noise")
    if noise:
        colour = ROLE_COLOURS[role_of(record, noise["label"])]
        text = number(noise["mean"], task["unit"], signed=True)
        lines.append(_Line("the same adapter twice", noise, colour, text, hollow=True))
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
