"""A comparison record -> one self-contained HTML page that opens with the finding in a plain sentence.

Comes in: the dict of ``compare.json`` and the figures. Goes out: HTML that loads nothing, runs nothing, and shows
text from models and data as text. The template only lays out what is put in words here and in ``measurement``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_bytes
from .canvas import ROLE_COLOURS
from .forgetting_page import forgetting_parts
from .forgetting_plots import draw_forgetting
from .measurement import checks, definitions, environment, limits, settings
from .plots import PLOTS, draw_plots, plot_titles
from .tables import (
    REFERENCE,
    SELECTED,
    Arm,
    Record,
    arm_number,
    arm_role,
    arm_title,
    check_record,
    comparison_table,
    failure,
    find_arm,
    paid_seconds,
    probe_seconds,
    step_ratio,
)
from .templates import html, image, title_parts
from .words import DASH, duration, known, loss_difference, loss_text, percent, significant, speed_text, visible

FLAT_SPREAD = 2.5
"""Below this ratio of largest to smallest score a profile hardly discriminates; the probe warns at the same one."""


def finding(record: Record) -> str:
    """The outcome in one plain sentence, good or bad.

    For example: ``15 of 30 layers trained 1.71x faster than uniform LoRA (probe included); held-out loss 1.234 against
    1.221 at the same number of steps (1.1 % worse).``

    Raises:
        DataError: If the record is not a comparison record, or contradicts itself.
    """
    check_record(record)
    selected = find_arm(record, SELECTED)
    if selected is None:
        return "No arm with selected layers was run; nothing can be compared."
    who = f"{len(selected.get('layers') or ())} of {visible(record.get('num_layers'))} layers"
    for name, called in ((SELECTED, f"Training {who}"), (REFERENCE, "Uniform LoRA")):
        arm = find_arm(record, name)
        if arm is not None and arm.get("failed"):
            return f"{called} failed ({failure(arm)}); nothing can be compared."
    ratio = known(_summary(record).get("speedup_ratio"))
    paid = " (probe included)" if probe_seconds(selected) else ""
    if not ratio:
        speed = f"{who} were trained, how fast against uniform LoRA is not known"
    elif speed_text(ratio) == "equally fast":
        speed = f"{who} trained as fast as uniform LoRA{paid}"
    else:
        speed = f"{who} trained {speed_text(ratio)} than uniform LoRA{paid}"
    return f"{speed}; {_loss_phrase(record)}."


def render_page(record: Record, plots: Mapping[str, bytes]) -> str:
    """The whole page as HTML.

    Args:
        record: The dict of ``compare.json``.
        plots: PNG bytes by the names in ``plots.PLOTS``. One that is missing is said to be missing.

    Raises:
        DataError: If the record is not a comparison record, or contradicts itself.
    """
    title = finding(record)
    titles = plot_titles(record)
    return html(
        "page.html.j2",
        title=title,
        title_parts=title_parts(title),
        deck=_deck(record),
        model=visible(record.get("model")),
        architecture=visible(record.get("architecture")),
        data=visible(record.get("data")),
        created=visible(record.get("created")),
        figures=_key_figures(record),
        plots={name: image(titles[name], plots.get(name)) for name in PLOTS},
        controls=_controls(record),
        ledger=_ledger(record),
        ledger_intro=_ledger_intro(record),
        ledger_note=_ledger_note(record),
        table=_table(record),
        scores_note=_scores_note(record),
        pareto_note=_pareto_note(record),
        checks=checks(record),
        definitions=definitions(record),
        facts=[("Settings", settings(record)), ("Environment", environment(record))],
        limits=limits(record),
        forgetting=forgetting_parts(record["forgetting"], plots) if record.get("forgetting") else None,
        colours=ROLE_COLOURS,
    )


def write_page(record: Record, folder: Path) -> Path:
    """Write ``page.html`` and its figures as PNG files into ``folder``; the path of the page.

    Raises:
        DataError: If the record is not a comparison record, or contradicts itself.
        OutputError: If the folder cannot be written.
    """
    check_record(record)
    plots = draw_plots(record)
    if record.get("forgetting"):
        plots |= draw_forgetting(record["forgetting"])
    page = render_page(record, plots)
    for name, drawn in plots.items():
        write_bytes(Path(folder) / f"{name}.png", drawn)
    return write_bytes(Path(folder) / "page.html", page.encode())


# --- what came out ----------------------------------------------------------------------------------------------------


def _loss_phrase(record: Record) -> str:
    selected, uniform = _losses(record)
    if selected is None:
        return "the held-out loss was not measured"
    if uniform is None:
        return f"held-out loss {loss_text(selected)}, that of uniform LoRA was not measured"
    steps = [known((find_arm(record, name) or {}).get("steps")) for name in (SELECTED, REFERENCE)]
    after = "at the same number of steps"
    if steps[0] is not None and steps[1] is not None and steps[0] != steps[1]:
        after = f"after {steps[0]:,.0f} against {steps[1]:,.0f} steps"
    difference = loss_difference(selected, uniform)
    return f"held-out loss {loss_text(selected)} against {loss_text(uniform)} {after} ({difference})"


def _deck(record: Record) -> list[str]:
    """Below the title: what the trainer did, what the selection did, what equal time brings."""
    if _broken(record):
        return []
    summary, sentences = _summary(record), []
    fastest, saved = _fastest_uniform(record), step_ratio(find_arm(record, REFERENCE), _fastest_uniform(record))
    before, selected = _fastest_seconds(record), paid_seconds(record, SELECTED)
    if fastest is not None and fastest.get("name") != REFERENCE and saved and before and selected:
        sentences.append(
            f"Not all of the difference is the choice of layers: all layers in the fastest way we measured "
            f"({arm_title(fastest)}) trained {speed_text(saved)} than plain PEFT. "
            f"Against that way, the selected layers trained {speed_text(before / selected)}."
        )
    matched, steps = known(summary.get("time_matched_heldout_loss")), known(summary.get("time_matched_steps"))
    loss = known(summary.get("uniform_heldout_loss"))
    if matched is not None and loss is not None:
        sentences.append(
            f"Given {f'{steps:,.0f}' if steps is not None else 'more'} steps, as many as plain PEFT's time allowed, "
            f"the selected layers reached a held-out loss of {loss_text(matched)} ({loss_difference(matched, loss)})"
            f"{_time_really_taken(record)}."
        )
        sentences += _all_layers_in_that_time(summary)
    return sentences


def _all_layers_in_that_time(summary: Mapping[str, Any]) -> list[str]:
    """What of that is the trainer's: all layers had the same time in it."""
    loss, steps = (known(summary.get(f"time_matched_uniform_{name}")) for name in ("heldout_loss", "steps"))
    if loss is None or steps is None:
        return []
    return [f"All layers in the same trainer and time reached {loss_text(loss)} in {steps:,.0f} steps."]


def _time_really_taken(record: Record) -> str:
    """What the selection's run that ends by plain PEFT's clock really took."""
    taken = known((find_arm(record, "selected_time_matched") or {}).get("total_seconds"))
    allowed = known((find_arm(record, REFERENCE) or {}).get("total_seconds"))
    if not taken or not allowed:
        return ""
    return f" in {significant(taken)} s against {significant(allowed)} s"


def _key_figures(record: Record) -> list[dict[str, str]]:
    if _broken(record):
        return []
    matched = known(_summary(record).get("time_matched_heldout_loss"))
    all_layers = known(_summary(record).get("time_matched_uniform_heldout_loss"))
    selected, uniform = _losses(record)
    same = "same time" if all_layers is None else "same time and trainer"
    return [
        _speed_figure(record),
        _loss_figure(selected, uniform, "held-out loss, same steps", "not measured"),
        _loss_figure(matched, all_layers or uniform, f"held-out loss, {same}", "not run to its end"),
        _probe_figure(record),
    ]


def _speed_figure(record: Record) -> dict[str, str]:
    ratio = known(_summary(record).get("speedup_ratio"))
    if not ratio:
        return {"value": DASH, "label": "speed against uniform LoRA in plain PEFT", "note": "not measured"}
    value, _, direction = speed_text(ratio).partition(" ")
    label = f"{direction} than uniform LoRA in plain PEFT"
    if value == "equally":
        value, label = "1.00x", "as fast as uniform LoRA in plain PEFT"
    paid = ", probe included" if probe_seconds(find_arm(record, SELECTED) or {}) else ""
    seconds = f"{duration(paid_seconds(record, SELECTED))} against {duration(paid_seconds(record, REFERENCE))}{paid}"
    return {"value": value, "label": label, "note": seconds}


def _loss_figure(loss: float | None, reference: float | None, label: str, reason: str) -> dict[str, str]:
    if loss is None or not reference:
        return {"value": DASH, "label": label, "note": reason}
    words = loss_difference(loss, reference)
    value = "equal" if words.startswith("equal") else f"{100 * (loss / reference - 1):+.1f} %".replace("-", "−")
    return {"value": value, "label": label, "note": f"{loss_text(loss)} against {loss_text(reference)}: {words}"}


def _probe_figure(record: Record) -> dict[str, str]:
    seconds, total = probe_seconds(find_arm(record, SELECTED) or {}), paid_seconds(record, SELECTED)
    if not seconds or not total:
        return {"value": DASH, "label": "spent on the probe", "note": "no probe was run for this selection"}
    share = f"{percent(seconds / total)} of the selected layers' time"
    return {"value": duration(seconds), "label": "spent on the probe", "note": share}


def _controls(record: Record) -> list[str]:
    """How the selected layers stand against every control that was trained in full."""
    selected = arm_number(find_arm(record, SELECTED), "final_heldout_loss")
    sentences = []
    for arm in record["arms"]:
        loss = arm_number(arm, "final_heldout_loss")
        if arm_role(arm) == "control" and selected is not None and loss is not None:
            sentences.append(
                f"Control, {arm_title(arm)}: held-out loss {loss_text(loss)}; the selected layers ended "
                f"{loss_difference(selected, loss)}."
            )
    return sentences or [
        "No control was trained in full, so this page cannot say whether other layers of the same number would have "
        "done as well."
    ]


# --- where the time went ----------------------------------------------------------------------------------------------


def _ledger(record: Record) -> list[dict[str, str]]:
    """From plain PEFT over the fastest way to train all layers to the selected layers, with bars to the longest."""
    if _broken(record):
        return []
    fastest = _fastest_uniform(record)
    names = [REFERENCE]
    if fastest is not None and fastest.get("name") != REFERENCE:
        names.append(str(fastest["name"]))
    entries = [(find_arm(record, name), paid_seconds(record, name)) for name in (*names, SELECTED)]
    known_entries = [(arm, seconds) for arm, seconds in entries if arm is not None and seconds]
    longest = max((seconds for _, seconds in known_entries), default=1.0)
    rows: list[dict[str, str]] = []
    before = None
    for arm, seconds in known_entries:
        paid = probe_seconds(arm)
        cause = "by choosing layers" + (", probe paid" if paid else "")
        rows.append(
            {
                "role": arm_role(arm),
                "title": arm_title(arm),
                "text": duration(seconds),
                "probe_width": f"{100 * paid / longest:.2f}" if paid else "",
                "rest_width": f"{100 * (seconds - paid) / longest:.2f}",
                "change": "" if before is None else _change(seconds, before),
                "cause": cause if arm.get("name") == SELECTED else "by the way of training alone",
            }
        )
        before = seconds
    return rows


def _change(seconds: float, before: float) -> str:
    share = round(100 * (1 - seconds / before))
    return "nothing saved" if share == 0 else f"{abs(share)} % {'saved' if share > 0 else 'lost'}"


def _ledger_intro(record: Record) -> str:
    fastest = _fastest_uniform(record)
    if fastest is None:
        return "Which way of training all layers was the fastest is not known, so the causes cannot be told apart."
    if fastest.get("name") == REFERENCE:
        return "Plain PEFT was the fastest way to train all layers here, so the trainer saved nothing by itself."
    return (
        "Two things can make training shorter, and only one of them is the choice of layers. From plain PEFT on, one "
        "change at a time:"
    )


def _ledger_note(record: Record) -> str:
    selected = find_arm(record, SELECTED) or {}
    steps, paid = known(selected.get("steps")), probe_seconds(selected)
    parts = [] if steps is None else [f"Times are the median step times {steps:,.0f} steps."]
    if paid:
        parts.append(f"The fainter part of the last bar is the probe, {duration(paid)}.")
    ratio = known(_summary(record).get("trainer_ratio"))
    if ratio:
        parts.append(f"Step for step, uniform LoRA in our trainer was {speed_text(ratio)} than in plain PEFT.")
    return " ".join(parts)


def _table(record: Record) -> dict[str, Any]:
    rows = comparison_table(record)
    lines = [
        {
            "cells": list(row.values()),
            "role": arm_role(arm),
            "failed": bool(arm.get("failed")),
            "main": arm.get("name") == SELECTED,
        }
        for row, arm in zip(rows, record["arms"], strict=True)
    ]
    return {"heads": list(rows[0]) if rows else [], "rows": lines}


# --- the scores and the prediction ------------------------------------------------------------------------------------


def _scores_note(record: Record) -> str:
    probe = record.get("probe") or {}
    parts = []
    spread, overlap = known(probe.get("spread")), known(probe.get("split_half_overlap"))
    if spread is not None:
        parts.append(f"The largest gradient norm is {significant(spread)} times the smallest.")
        if spread < FLAT_SPREAD:
            parts.append(f"That is flat (below {FLAT_SPREAD:g}): it hardly tells the layers apart.")
    if overlap is not None:
        parts.append(
            "Scored on the odd and on the even batches alone, the better halves of the layers overlap by "
            f"{percent(overlap)} (Jaccard)."
        )
    else:
        parts.append("Whether half of the batches would rank the layers alike is not known; it needs two batches.")
    return " ".join(parts)


def _pareto_note(record: Record) -> str:
    predicted = known((record.get("selection") or {}).get("predicted_time_share"))
    if predicted is None:
        return "This selection came without a prediction of its time."
    selected = find_arm(record, SELECTED)
    for arm in record["arms"]:
        taken = step_ratio(selected, arm)
        alike = selected is not None and arm.get("trainer") == selected.get("trainer")
        if arm_role(arm) == "uniform" and alike and taken:
            return (
                f"Checked afterwards: a step on the selected layers was predicted to take {percent(predicted)} of a "
                f"step on all layers, and took {percent(taken)} of one of “{arm_title(arm)}”, the same trainer."
            )
    return "No uniform arm ran in the same trainer as the selected layers, so the prediction could not be checked."


# --- reading the record -----------------------------------------------------------------------------------------------


def _summary(record: Record) -> Mapping[str, Any]:
    return record.get("summary") or {}


def _losses(record: Record) -> tuple[float | None, float | None]:
    """Held-out loss of the selected and of the uniform arm at the end of their steps."""
    summary = _summary(record)
    return known(summary.get("selected_heldout_loss")), known(summary.get("uniform_heldout_loss"))


def _fastest_uniform(record: Record) -> Arm | None:
    arm = find_arm(record, str(_summary(record).get("fastest_uniform")))
    return None if arm is None or arm.get("failed") else arm


def _fastest_seconds(record: Record) -> float | None:
    fastest = _fastest_uniform(record)
    return None if fastest is None else paid_seconds(record, str(fastest["name"]))


def _broken(record: Record) -> bool:
    """True if there is no selected arm, or one of the two arms that every headline compares has failed."""
    selected, reference = find_arm(record, SELECTED), find_arm(record, REFERENCE)
    return selected is None or any(arm is not None and bool(arm.get("failed")) for arm in (selected, reference))
