"""A forgetting record -> its finding, its table, and what must hold for it, in words.

Comes in: the dict of ``forgetting.json``. Goes out: sentences and rows of text that figures, table and page share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError
from .tables import Record
from .words import DASH, known, unknown, visible

FORMAT = "aletheia-forgetting/1"
BASE = "base"
POINTS = "points"
TOLERANCE = 1e-6
"""A stored difference may be this far from the difference of its parts, in the unit."""

Task = Mapping[str, Any]
Entry = Mapping[str, Any]


def check_forgetting(record: Record) -> None:
    """Refuse a record that is of another kind, or whose differences do not follow from each other.

    Raises:
        DataError: If the format is another one, or extra forgetting is not the difference of two forgettings, or a
            forgetting not that of two scores.
    """
    if record.get("format") != FORMAT:
        raise DataError(f"not a forgetting record: format is {visible(record.get('format'))!r}, expected {FORMAT!r}.")
    for task in record.get("tasks") or ():
        base, uniform = entry_of(task, BASE), entry_of(task, record.get("uniform"))
        for arm in task["arms"]:
            worse = 1 if task["unit"] != POINTS else -1
            scores = [known(entry.get("score")) for entry in (arm, base)]
            parts = [None if score is None else worse * score for score in scores]
            _agree(task, arm, "forgetting", mean_of(arm, "forgetting"), parts)
            _agree(task, arm, "extra", mean_of(arm, "extra"), [mean_of(one, "forgetting") for one in (arm, uniform)])


def entry_of(task: Task, label: object) -> Entry:
    """What a benchmark knows about one label; empty if it has never heard of it."""
    return next((entry for entry in task["arms"] if entry["label"] == label), {})


def mean_of(entry: Entry, what: str) -> float | None:
    """The mean ``forgetting`` or ``extra`` of one label, in the unit of the benchmark."""
    return known((entry.get(what) or {}).get("mean"))


def name_of(record: Record, label: object) -> str:
    """What people call this label."""
    known_names = {
        BASE: "base model",
        record.get("uniform"): "uniform LoRA",
        record.get("selected"): "selected layers",
    }
    return known_names.get(label) or visible(label)


def role_of(record: Record, label: object) -> str:
    """``uniform``, ``selected`` or ``control``, which is the colour; the base model is no adapter and shares grey."""
    roles = {BASE: "uniform", record.get("uniform"): "uniform", record.get("selected"): "selected"}
    return roles.get(label, "control")


def number(value: float, unit: str, *, signed: bool = False) -> str:
    """One decimal for points, three for a loss, with a true minus sign."""
    decimals = 1 if unit == POINTS else 3
    rounded = round(value, decimals) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''}.{decimals}f}".replace("-", "−")


def amount(value: float, unit: str) -> str:
    """A number with its unit: ``0.4 points``, ``0.012 nats``."""
    return f"{number(value, unit)} {POINTS if unit == POINTS else 'nats'}"


def margin_text(task: Task) -> str:
    """The margin as it was given: ``2 points``, ``0.02 nats``."""
    word = "nats" if task["unit"] != POINTS else "point" if task["margin"] == 1 else "points"
    return f"{task['margin']:g} {word}"


def interval(found: Mapping[str, Any], unit: str) -> str:
    """``−0.6 to 1.4``, or why there is none."""
    low, high = known(found.get("low")), known(found.get("high"))
    if low is None or high is None:
        return unknown(f"n = {found.get('n', 0)}, no interval")
    return f"{number(low, unit)} to {number(high, unit)}"


def items_text(task: Task, entry: Entry) -> str:
    """``1,140 in 57 groups``, and how many were left out."""
    groups = known(task.get("num_groups"))
    words = f"{entry['n']:,}" + (f" in {groups:.0f} groups" if groups else "")
    left = known(entry.get("num_left_out"))
    return words + (f", {left:,.0f} left out" if left else "")


def confidence_text(record: Record) -> str:
    """The confidence of the intervals: ``95 %``."""
    return f"{100 * record['settings']['confidence']:g} %"


def verdict(record: Record, task: Task) -> str:
    """``equivalent``, ``more``, ``less``, ``undecided``, or empty where the selection was not compared."""
    return str((entry_of(task, record.get("selected")).get("extra") or {}).get("verdict") or "")


def verdict_text(record: Record, task: Task) -> str:
    """The verdict on one benchmark, in a few words."""
    words = {
        "equivalent": f"equal within {margin_text(task)}",
        "more": "forgets more",
        "less": "forgets less",
        "undecided": "not decided",
    }
    return words.get(verdict(record, task), "not compared")


def by_verdict(record: Record) -> dict[str, list[Task]]:
    """The benchmarks by their verdict."""
    found: dict[str, list[Task]] = {}
    for task in record.get("tasks") or ():
        found.setdefault(verdict(record, task), []).append(task)
    return found


def forgetting_finding(record: Record) -> str:
    """The outcome in one plain sentence, good or bad.

    For example: ``The selected layers forgot as much as uniform LoRA within 2 points on 2 of 3 benchmarks (mmlu,
    gsm8k); humaneval is not decided.``

    Raises:
        DataError: If the record is not a forgetting record, or contradicts itself.
    """
    check_forgetting(record)
    tasks = record.get("tasks") or ()
    found = by_verdict(record)
    clauses = []
    for kind in ("more", "less"):
        clauses += [f"{kind} than uniform LoRA on {_with_interval(record, task)}" for task in found.get(kind, ())]
    alike = found.get("equivalent", [])
    if alike:
        margins = {margin_text(task) for task in alike}
        within = margins.pop() if len(margins) == 1 else "the margins"
        share = f"{len(alike)} of {len(tasks)} benchmarks ({_names(alike)})" if len(tasks) > 1 else _names(alike)
        clauses.append(f"as much as uniform LoRA within {within} on {share}")
    sentences = [f"The selected layers forgot {' and '.join(clauses)}"] if clauses else []
    undecided, absent = found.get("undecided"), found.get("")
    if undecided and not clauses:
        sentences.append(f"It is not decided whether the selected layers forgot more on {_names(undecided)}")
    elif undecided:
        sentences.append(f"{_names(undecided)} {'is' if len(undecided) == 1 else 'are'} not decided")
    if absent:
        sentences.append(f"{_names(absent)} {'was' if len(absent) == 1 else 'were'} not compared")
    return "; ".join(sentences) + "." if sentences else "No benchmark was evaluated; nothing is known about forgetting."


def forgetting_table(record: Record) -> list[dict[str, str]]:
    """One row per benchmark and label, in the order of the record; the keys are the column heads.

    Raises:
        DataError: If the record is not a forgetting record, or contradicts itself.
    """
    check_forgetting(record)
    return [_row(record, task, entry) for task in record.get("tasks") or () for entry in task["arms"]]


def _row(record: Record, task: Task, entry: Entry) -> dict[str, str]:
    unit, score = task["unit"], known(entry.get("score"))
    extra = entry.get("extra") or {}
    adjusted = known(extra.get("adjusted_p_value"))
    p_value = known(extra.get("p_value")) if adjusted is None else adjusted
    metric = visible(task["metric"]) if unit == POINTS else unit
    return {
        "Benchmark": visible(task["task"]),
        "Model": name_of(record, entry["label"]),
        "Items": items_text(task, entry) if score is not None else unknown("not evaluated"),
        "Score, loss": DASH if score is None else f"{number(score, unit)} {metric}",
        "Forgotten": _cell(entry, "forgetting", unit),
        "More than uniform LoRA": _cell(entry, "extra", unit),
        "p": DASH if p_value is None else _p_text(p_value),
    }


def _cell(entry: Entry, what: str, unit: str) -> str:
    found = entry.get(what) or {}
    mean = known(found.get("mean"))
    between = interval(found, unit).replace(" ", "\u00a0")
    return DASH if mean is None else f"{number(mean, unit, signed=True)} ({between})"


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _with_interval(record: Record, task: Task) -> str:
    extra = entry_of(task, record.get("selected"))["extra"]
    size = amount(abs(extra["mean"]), task["unit"])
    return f"{visible(task['task'])} (by {size}, {confidence_text(record)} interval {interval(extra, task['unit'])})"


def _names(tasks: Sequence[Task]) -> str:
    names = [visible(task["task"]) for task in tasks]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _agree(task: Task, arm: Entry, what: str, stored: float | None, parts: Sequence[float | None]) -> None:
    own, other = parts
    if stored is not None and own is not None and other is not None and abs(stored - (own - other)) > TOLERANCE:
        raise DataError(
            f"the record contradicts itself: {what} of {visible(arm['label'])} on {visible(task['task'])} is "
            f"{stored:.4g}, but its parts give {own - other:.4g}. It was edited or is damaged; make it again."
        )
