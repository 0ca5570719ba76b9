"""Finished arms -> the record ``compare.json``, from which every table, figure and claim is made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from statistics import median
from typing import Any

from ..data import TokenizedRows
from ..environment import environment
from ..planning import Plan
from .arms import TWIN, Arm, CompareOptions

FORMAT = "aletheia-compare/1"


def make_record(
    plan: Plan,
    options: CompareOptions,
    arms: list[Arm],
    base_loss: float,
    model_name: str,
    data_name: str,
    train: TokenizedRows,
    validation: TokenizedRows,
) -> dict[str, Any]:
    """The whole comparison as plain JSON types, without names of hosts, users or folders."""
    probe = plan.probe
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model_name,
        "architecture": plan.anatomy.architecture,
        "num_layers": plan.anatomy.num_layers,
        "data": data_name,
        "environment": environment(),
        "settings": {
            **{name: getattr(options, name) for name in options.__dataclass_fields__ if name != "controls"},
            "controls": ", ".join(options.controls) or "none",
            "strategy": plan.options.strategy,
            "score": plan.options.score,
            "time_budget": plan.options.time_budget,
            "allocation": plan.options.allocation,
            "rank": plan.options.rank,
            "train_rows": len(train),
            "heldout_rows": len(validation),
            "heldout_labelled_tokens": sum(row.num_labelled for row in validation),
            "train_digest": train.digest,
            "heldout_digest": validation.digest,
        },
        "probe": {
            "scores": [plan.scores[layer] for layer in sorted(plan.scores)],
            "standard_errors": [float(e) for e in probe.standard_errors()] if probe is not None else [],
            "seconds": probe.seconds if probe is not None else 0.0,
            "num_batches": probe.num_batches if probe is not None else 0,
            "spread": probe.spread if probe is not None else float("nan"),
            "split_half_overlap": probe.split_half_overlap() if probe is not None else float("nan"),
            "peak_memory_bytes": probe.peak_memory_bytes if probe is not None else None,
        },
        "selection": {
            **plan.selection.to_dict(),
            "describe": plan.selection.describe(plan.predicted_when),
            "lowest": plan.selection.lowest,
        },
        "pareto": [
            {
                "lowest": point.lowest,
                "num_layers": len(point.layers),
                "layers": list(point.layers),
                "score_share": point.score_share,
                "predicted_time_share": point.predicted_time_share,
            }
            for point in plan.pareto
        ],
        "base_heldout_loss": base_loss,
        "arms": [arm.to_dict() for arm in arms],
        "summary": summarize(arms, plan),
    }


def summarize(arms: Sequence[Arm], plan: Plan) -> dict[str, Any]:
    """The figures that the comparison stands for, each a ratio of medians of steps taken in turns.

    ``speedup_ratio``: uniform LoRA under plain PEFT and Trainer over the selection with its probe, for the same steps.
    ``selection_ratio``: the same against the fastest uniform run, whichever trainer that was. ``trainer_ratio``: what
    our trainer alone does for uniform LoRA. Batches differ in length from step to step, so two runs are compared over
    the steps that both took.
    """
    by_name = {arm.name: arm for arm in arms}
    uniform, selected = by_name["uniform"], by_name["selected"]
    own = median(selected.step_seconds[1:] or selected.step_seconds)
    per_step = {arm.name: own * step_ratio(arm, selected) for arm in arms if arm.step_seconds}
    uniforms = [arm for arm in arms if arm.role == "uniform" and arm.step_seconds and not (arm.pace or arm.failed)]
    fastest = min((arm.name for arm in uniforms), key=per_step.__getitem__)
    selected_seconds = per_step["selected"] * selected.steps + selected.probe_seconds
    ours = by_name.get(TWIN)
    matched = _end(by_name.get("selected_time_matched"))
    uniform_matched = _end(by_name.get(f"{TWIN}_time_matched"))
    return {
        "speedup_ratio": per_step["uniform"] * uniform.steps / selected_seconds,
        "selection_ratio": per_step[fastest] * uniform.steps / selected_seconds,
        "step_speedup_ratio": per_step["uniform"] / per_step["selected"],
        "step_selection_ratio": per_step[fastest] / per_step["selected"],
        "trainer_ratio": step_ratio(uniform, ours) if ours and ours.step_seconds else float("nan"),
        "fastest_uniform": fastest,
        "uniform_seconds": uniform.total_seconds,
        "selected_seconds": selected.total_seconds,
        "uniform_heldout_loss": uniform.heldout[-1]["loss"],
        "selected_heldout_loss": selected.heldout[-1]["loss"],
        "time_matched_heldout_loss": matched[0],
        "time_matched_steps": matched[1],
        "time_matched_uniform_heldout_loss": uniform_matched[0],
        "time_matched_uniform_steps": uniform_matched[1],
        "selected_layers": list(plan.selection.layers),
        "probe_seconds": selected.probe_seconds,
        "probe_share": selected.probe_seconds / sum(selected.step_seconds) if selected.step_seconds else float("nan"),
    }


def _end(arm: Arm | None) -> tuple[float, int] | tuple[None, None]:
    """Held-out loss and steps at the end of a run; nothing of one that failed or is not there."""
    if arm is None or arm.failed or not arm.heldout:
        return None, None
    return arm.heldout[-1]["loss"], len(arm.step_seconds)


def step_ratio(one: Arm, other: Arm) -> float:
    """Median step of one run over that of another, over the steps that both took; the first, a warm-up, left out."""
    shared = min(len(one.step_seconds), len(other.step_seconds))
    first = 1 if shared > 1 else 0
    return median(one.step_seconds[first:shared]) / median(other.step_seconds[first:shared])
