"""A comparison record -> rows of plain text for people.

Comes in: the dict of ``compare.json``. Goes out: one dict of strings per arm, and the same as Markdown. How an arm is
found and read is here too, so that figures and page read it alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ..errors import DataError
from .words import DASH, known, layer_ranges, loss_text, significant, unknown, visible

FORMAT = "aletheia-compare/1"
REFERENCE = "uniform"
"""Name of the arm that every speed is measured against: all layers, plain PEFT under transformers' Trainer."""
SELECTED = "selected"
TOLERANCE = 0.01
"""A stored number may differ this much from what its parts give: records are rounded by hand now and then."""
NUM_TEXT_COLUMNS = 3

Record = Mapping[str, Any]
Arm = Mapping[str, Any]


def comparison_table(record: Record) -> list[dict[str, str]]:
    """One row per arm, in the order of the record; the keys are the column heads.

    A failed arm keeps its row. What it measured before it failed is not shown, since it is not a result.

    Raises:
        DataError: If the record is not a comparison record.
    """
    check_record(record)
    return [_row(record, arm) for arm in record["arms"]]


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a GitHub table; characters with a meaning in Markdown or HTML are escaped."""
    if not rows:
        return "No arms were compared.\n"
    heads = list(rows[0])
    lines = [heads, [":--" if index < NUM_TEXT_COLUMNS else "--:" for index in range(len(heads))]]
    lines += [[markdown_text(row.get(head, DASH)) for head in heads] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def check_record(record: Record) -> None:
    """Refuse a record that is not a comparison, or whose figures do not follow from its own steps.

    Raises:
        DataError: If the format is another one, the arms are missing, a median is not that of the steps beside it, or
            the speed-up is not that of the medians.
    """
    if record.get("format") != FORMAT:
        raise DataError(f"not a comparison record: format is {visible(record.get('format'))!r}, expected {FORMAT!r}.")
    arms = record.get("arms")
    if not isinstance(arms, list) or not all(isinstance(arm, Mapping) and arm.get("name") for arm in arms):
        raise DataError("the comparison record has no list of named arms. Run the comparison again.")
    for arm in arms:
        steps = [seconds for step in arm.get("step_seconds") or () if (seconds := known(step)) is not None]
        if steps:
            _agree(f"median_step_seconds of {arm_title(arm)}", arm_number(arm, "median_step_seconds"), _median(steps))
    uniform, selected = paid_seconds(record, REFERENCE), paid_seconds(record, SELECTED)
    if uniform is not None and selected is not None:
        _agree("speedup_ratio", known((record.get("summary") or {}).get("speedup_ratio")), uniform / selected)


def find_arm(record: Record, name: str) -> Arm | None:
    """The arm of that name, whether it failed or not; None if the comparison had none."""
    return next((arm for arm in record.get("arms") or [] if arm.get("name") == name), None)


def arm_title(arm: Arm) -> str:
    """What people call this arm."""
    return visible(arm.get("title") or arm.get("name"))


def arm_role(arm: Arm) -> str:
    """``uniform``, ``selected`` or ``control``; anything else counts as a control."""
    role = arm.get("role")
    return role if role in ("uniform", "selected") else "control"


def arm_number(arm: Arm | None, key: str) -> float | None:
    """A measured number of an arm; None if the arm is absent or failed, whatever it had noted until then."""
    return None if arm is None or arm.get("failed") else known(arm.get(key))


def failure(arm: Arm) -> str:
    """Why an arm failed, on one line; empty if it did not."""
    return visible(arm["failed"]) if arm.get("failed") else ""


def step_speed(record: Record, arm: Arm) -> float | None:
    """How many times faster than plain PEFT a step of this arm is: :func:`step_ratio`."""
    return step_ratio(find_arm(record, REFERENCE), arm)


def step_ratio(one: Arm | None, other: Arm | None) -> float | None:
    """Median step seconds of one arm over those of another, over the steps that both took; above 1 the other is faster.

    Batches differ in length from step to step, so medians over other steps would not compare. None where an arm is
    missing, failed or took no step.
    """
    if any(arm_number(arm, "median_step_seconds") is None for arm in (one, other)):
        return None
    slow, fast = ([float(step) for step in (arm or {}).get("step_seconds") or ()] for arm in (one, other))
    shared = min(len(slow), len(fast))
    if not shared:
        return None
    above, below = _median(slow[:shared]), _median(fast[:shared])
    return above / below if above and below else None


def probe_seconds(arm: Arm) -> float:
    """What an arm had paid before its first step: its total without its steps, 0 where there was no probe to pay."""
    total, steps = known(arm.get("total_seconds")), [known(step) for step in arm.get("step_seconds") or ()]
    paid = (total or 0.0) - sum(step or 0.0 for step in steps)
    return paid if steps and paid > 1e-6 * (total or 0.0) else 0.0


def paid_seconds(record: Record, name: str) -> float | None:
    """Median step of an arm times the steps of the selected arm, plus its probe: what the speed-up compares.

    The median does not see the first step, which warms caches up, nor the step in which the machine did something
    else. An arm that took a few steps only is set against the selected arm's same steps.
    """
    arm, selected = find_arm(record, name), find_arm(record, SELECTED)
    steps, step = known((selected or {}).get("steps")), arm_number(selected, "median_step_seconds")
    ratio = step_ratio(arm, selected)
    return None if arm is None or not ratio or not step or not steps else ratio * step * steps + probe_seconds(arm)


def layers_text(layers: Sequence[int] | None, num_layers: object) -> str:
    """``30 of 30``, or ``15 of 30 (0–3, 19–29)``."""
    if layers is None:
        return unknown("not recorded")
    count = f"{len(layers)} of {visible(num_layers)}"
    return count if len(layers) == num_layers or not layers else f"{count} ({layer_ranges(layers)})"


def ranks_text(ranks: object) -> str:
    """``16``, ``16, 64``, or ``attention 16, mlp 64``."""
    if ranks is None:
        return unknown("not recorded")
    if isinstance(ranks, Mapping):
        return ", ".join(f"{visible(kind)} {visible(rank)}" for kind, rank in ranks.items()) or unknown("no adapters")
    if isinstance(ranks, list | tuple):
        return ", ".join(map(visible, ranks)) or unknown("no adapters")
    return visible(ranks)


def _row(record: Record, arm: Arm) -> dict[str, str]:
    params = known(arm.get("trainable_params"))
    step, speed = arm_number(arm, "median_step_seconds"), step_speed(record, arm)
    total, loss = arm_number(arm, "total_seconds"), arm_number(arm, "final_heldout_loss")
    missing = DASH if arm.get("failed") else unknown("not measured")
    cells = {
        "Arm": arm_title(arm),
        "Layers": layers_text(arm.get("layers"), record.get("num_layers")),
        "Ranks": ranks_text(arm.get("ranks")),
        "Trainable parameters": unknown("not recorded") if params is None else f"{params:,.0f}",
        "Seconds per step": missing if step is None else significant(step),
        "Step speed": f"{speed:.2f}x" if speed is not None else missing if step is None else _no_speed(record),
        "Total seconds": missing if total is None else significant(total),
        "Held-out loss": loss_text(loss),
    }
    if arm.get("failed"):
        cells["Held-out loss"] = unknown(f"failed: {failure(arm)}")
    elif not arm.get("full"):
        num_timed = len(arm.get("step_seconds") or ())
        cells["Total seconds"] = cells["Held-out loss"] = unknown(f"{num_timed} steps timed")
    return cells


def _no_speed(record: Record) -> str:
    reference = find_arm(record, REFERENCE)
    if reference is None:
        return unknown("no plain PEFT arm")
    return unknown("plain PEFT failed" if reference.get("failed") else "plain PEFT not measured")


def _median(steps: Sequence[float]) -> float:
    return median(steps[1:] or steps)


def _agree(name: str, stored: float | None, found: float) -> None:
    if stored is not None and abs(stored - found) > TOLERANCE * abs(found):
        raise DataError(
            f"the record contradicts itself: {name} is {stored:.4g}, but its own steps give {found:.4g}. "
            "It was edited or is damaged; run the comparison again."
        )


def markdown_text(text: str) -> str:
    """The text with every character escaped that means something in Markdown or HTML."""
    escaped = re.sub(r"([\\`*\[\]<>|~&$])", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)
