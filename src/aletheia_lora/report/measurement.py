"""A comparison record -> how it was measured and what it does not know, in words for the page.

Comes in: the dict of ``compare.json``. Goes out: checks that the arms are comparable, definitions of what was timed,
settings, and limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tables import (
    REFERENCE,
    SELECTED,
    Record,
    arm_number,
    arm_title,
    failure,
    find_arm,
    layers_text,
)
from .words import duration, known, visible

SAME_LOSS = 1e-3
"""First training losses within this share of each other count as one: float32 kernels differ by far less."""

Check = dict[str, str]


def checks(record: Record) -> list[Check]:
    """What must hold if the arms are comparable, read off the record; a state (holds, differs, unknown) and a text."""
    return [_same_start(record), _depth(record), _same_steps(record), _same_rate(record)]


def definitions(record: Record) -> list[tuple[str, str]]:
    """What each timed quantity is, in words."""
    return [
        (
            "Step",
            "From the end of one update of the adapter to the end of the next: batch, forward, backward, optimizer, "
            "logging. The clock stands still during evaluation. The arms take their steps in turns, so that all meet "
            "one machine; a run that gets plain PEFT's time goes on until it has taken as long. Medians leave out "
            "the first step of an arm, which warms caches up, and two arms are compared over the steps that both "
            "took.",
        ),
        (
            "Faster, slower",
            "Median step times number of steps, for the selected layers plus the whole wall time of the probe, against "
            "the same of uniform LoRA.",
        ),
        ("Step speed", "Median step of plain PEFT over that of the arm. The probe is not in it."),
        (
            "Total seconds",
            "All training steps of an arm added up, the first one too, plus the probe for arms that needed it. The "
            "time axis of the held-out loss is this sum.",
        ),
        (
            "Held-out loss",
            "Mean loss per labelled token, in nats, on rows that neither probe nor training read; the same rows for "
            "every arm.",
        ),
        ("Probe", _probe_words(record)),
        (
            "Backward stops here",
            "Below the lowest adapted layer nothing needs a gradient: no graph is kept and no backward pass runs.",
        ),
    ]


def settings(record: Record) -> list[tuple[str, str]]:
    """How the comparison was set up, one line each."""
    selection = record.get("selection") or {}
    first = {"layers chosen": layers_text(selection.get("layers"), record.get("num_layers"))}
    if selection.get("describe"):
        first["what was expected of them"] = selection["describe"]
    return pairs({**first, **(record.get("settings") or {})})


def environment(record: Record) -> list[tuple[str, str]]:
    """Versions and hardware, one line each."""
    return pairs(record.get("environment") or {})


def limits(record: Record) -> list[str]:
    """What this page does not know."""
    chosen, machine = record.get("settings") or {}, record.get("environment") or {}
    seed = f"seed {visible(chosen['seed'])}" if chosen.get("seed") is not None else "one seed"
    device = visible(machine.get("device") or "one machine")
    told = [
        f"One run per arm, {seed}: n = 1. There is no interval, and another seed may turn a small difference round.",
        f"Times hold for this machine ({device}), this model and rows of this length.",
        "Held-out loss says how well the adapter predicts text like the training data. It says nothing about tasks, or "
        "about what the model has forgotten.",
        "Another learning rate or rank could move either side; this page knows only the ones listed.",
    ]
    timed_only = [arm_title(arm) for arm in record["arms"] if not arm.get("full") and not arm.get("failed")]
    if timed_only:
        told.append(f"Only timed, not trained to the end, so without a held-out loss: {'; '.join(timed_only)}.")
    told += [
        f"Failed, in no figure above: {arm_title(arm)} ({failure(arm)})." for arm in record["arms"] if arm.get("failed")
    ]
    return told


def _probe_words(record: Record) -> str:
    probe = record.get("probe") or {}
    batches, memory = known(probe.get("num_batches")), known(probe.get("peak_memory_bytes"))
    if not batches:
        return "None was run for this selection."
    words = "Forward and backward passes before training that read every layer's gradient and change nothing; here "
    words += f"on {batches:,.0f} batches"
    seconds = known(probe.get("seconds"))
    words += f", in {duration(seconds)}" if seconds is not None else ""
    words += f", with {memory / 2**20:,.0f} MiB above the memory before it" if memory is not None else ""
    return f"{words}."


def _same_start(record: Record) -> Check:
    losses = {arm_title(arm): loss for arm in record["arms"] if (loss := arm_number(arm, "first_loss")) is not None}
    if len(losses) < 2:
        return _check("unknown", "Whether all arms start from the same loss is not known.")
    start = arm_number(find_arm(record, REFERENCE), "first_loss")
    start = next(iter(losses.values())) if start is None else start
    off = [f"{title} {loss:.4f}" for title, loss in losses.items() if abs(loss - start) > SAME_LOSS * abs(start)]
    if not off:
        return _check("holds", f"All {len(losses)} arms start from the same loss on the first batch, {start:.4f}.")
    return _check(
        "differs", f"The arms do not all start from the loss {start:.4f} on the first batch: {'; '.join(off)}."
    )


def _depth(record: Record) -> Check:
    lowest = known((record.get("selection") or {}).get("lowest"))
    reached = arm_number(find_arm(record, SELECTED), "lowest_backward_layer")
    if lowest is None or reached is None:
        return _check("unknown", "How deep the backward pass on the selected layers went is not known.")
    went = f"The backward pass on the selected layers was seen to go down to layer {reached:.0f}"
    if lowest == reached:
        return _check("holds", f"{went}, as planned.")
    return _check("differs", f"{went}; planned was {lowest:.0f}.")


def _same_steps(record: Record) -> Check:
    selected, uniform = (known((find_arm(record, name) or {}).get("steps")) for name in (SELECTED, REFERENCE))
    if selected is None or uniform is None:
        return _check("unknown", "Whether both took the same number of steps is not known.")
    if selected == uniform:
        return _check("holds", f"The selected layers and uniform LoRA both took {selected:,.0f} steps.")
    return _check("differs", f"The selected layers took {selected:,.0f} steps, uniform LoRA {uniform:,.0f}.")


def _same_rate(record: Record) -> Check:
    rates: dict[float, list[str]] = {}
    for arm in record["arms"]:
        rate = arm_number(arm, "learning_rate")
        if rate is not None:
            rates.setdefault(rate, []).append(arm_title(arm))
    if not rates:
        return _check("unknown", "The learning rates were not recorded.")
    if len(rates) == 1:
        return _check("holds", f"Every arm was trained with the learning rate {next(iter(rates)):g}.")
    listed = "; ".join(f"{rate:g} for {', '.join(titles)}" for rate, titles in rates.items())
    return _check("differs", f"The arms had different learning rates: {listed}.")


def _check(state: str, text: str) -> Check:
    return {"state": state, "text": text}


def pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and values as text, one line each."""
    return [(visible(key).replace("_", " "), _scalar(value)) for key, value in values.items()]


def _scalar(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else visible(value)
