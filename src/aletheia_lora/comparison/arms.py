"""A plan and options -> the arms of a comparison: what each trains, with which trainer, at which rate.

What a trainer saves and what a selection saves are kept apart: uniform LoRA runs as users run it today (plain PEFT
under transformers' Trainer, TRL as shipped, TRL with checkpointing and bf16 off) and through our trainer; the selection
and its controls run through our trainer. What TRL's runs learn is what plain PEFT's does, so they take few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..allocation import ModuleRank, allocate
from ..errors import ConfigError, nearest
from ..planning import Plan, allocation_options
from ..selection import SCORED, STRATEGIES, LayerSelection
from ..selection_options import SelectionOptions

MOST_STEPS_PER_UNIFORM_STEP = 50
CONTROLS = ("random", "bottom", "middle", "first", "last", "stride", "top_percent")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions:
    """How a comparison is run."""

    steps: int = 40
    """Optimizer steps of every full run."""
    batch_size: int = 4
    """Rows in a step."""
    learning_rate: float = 2e-3
    """Peak learning rate of the selection, decaying linearly to 0."""
    uniform_learning_rate: float | None = None
    """That of uniform LoRA; the same if left out."""
    timed_steps: int = 8
    """Steps of the runs that are there for their time only: uniform LoRA under TRL."""
    evaluations: int = 4
    """Held-out evaluations along a full run, the last one at its end."""
    controls: tuple[str, ...] = ()
    """Further strategies to train at the same number of layers and ranks."""
    matched_time: bool = True
    """Also train uniform LoRA and the selection in our trainer for as long as plain PEFT took, by the clock."""
    seed: int = 0
    """Seed of the adapters' start and of the order of rows, the same for every run."""

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("steps", "batch_size", "timed_steps", "evaluations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}, expected at least 1.")
        for name in ("learning_rate", "uniform_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value}, expected a positive number.")
        for name in self.controls:
            if name not in CONTROLS:
                raise ConfigError(f"control {name!r} is not known. {nearest(name, CONTROLS)}")


@dataclass
class Arm:
    """One run of the comparison: what it trains, how, and what came of it."""

    name: str
    title: str
    role: str
    """``uniform``, ``selected`` or ``control``."""
    trainer: str
    """``trainer`` (transformers), ``aletheia``, or one of TRL's settings in ``runs.py``."""
    plan: Plan
    learning_rate: float
    steps: int
    full: bool
    """False for a run that is there for its time only."""
    probe_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    heldout: list[dict[str, float]] = field(default_factory=list)
    lowest_backward_layer: int | None = None
    failed: str | None = None
    pace: Arm | None = None
    """The run whose clock says how long this one trains; by its own number of steps if left out."""
    ended: bool = False
    """True when nothing more will come, also after a failure."""
    prefix_cache: bool = False
    """Keep what the layers below the lowest adapted one compute, and replay it in later epochs; our trainer only."""
    prefix_cache_dir: Path | None = None
    """Keep it here for other runs; None: a temporary folder."""
    prefix_cache_record: dict[str, Any] | None = None
    gradient_accumulation: int = 1
    """Micro-batches that a step's rows are cut into: the same step in less memory."""

    @property
    def total_seconds(self) -> float:
        """Training seconds, with the probe's for arms that needed one."""
        return sum(self.step_seconds) + self.probe_seconds

    def to_dict(self) -> dict[str, Any]:
        """The arm's part of ``compare.json``."""
        timed = self.step_seconds[1:] or self.step_seconds  # the first step also warms caches up
        quantiles = np.quantile(timed, [0.2, 0.5, 0.8]) if timed else [float("nan")] * 3
        return {
            "name": self.name,
            "title": self.title,
            "role": self.role,
            "trainer": self.trainer,
            "layers": list(self.plan.selection.layers),
            "ranks": sorted({entry.rank for entry in self.plan.ranks}),
            "trainable_params": self.plan.trainable_params,
            "learning_rate": self.learning_rate,
            "steps": self.steps if self.pace is None else len(self.step_seconds),
            "full": self.full,
            "step_seconds": self.step_seconds,
            "step_seconds_p20": float(quantiles[0]),
            "median_step_seconds": float(quantiles[1]),
            "step_seconds_p80": float(quantiles[2]),
            "total_seconds": self.total_seconds,
            "lowest_backward_layer": self.lowest_backward_layer,
            "first_loss": self.train_losses[0] if self.train_losses else None,
            "train_losses": self.train_losses,
            "heldout": self.heldout,
            "final_heldout_loss": self.heldout[-1]["loss"] if self.full and self.heldout and not self.failed else None,
            "failed": self.failed,
        }


def uniform_plan(plan: Plan) -> Plan:
    """The plan's yardstick: every layer, one rank, as users run LoRA today."""
    layers = tuple(range(plan.anatomy.num_layers))
    return with_layers(plan, "all", layers, "uniform")


def with_layers(plan: Plan, strategy: str, layers: Sequence[int], allocation: str) -> Plan:
    """The same plan for other layers, ranked by another rule."""
    options = plan.options
    ranks: tuple[ModuleRank, ...] = allocate(
        plan.anatomy,
        tuple(layers),
        allocation,
        allocation_options(options, plan.probe),
    )
    total = sum(plan.scores.values())
    selection = LayerSelection(
        strategy=strategy,
        layers=tuple(layers),
        num_layers=plan.anatomy.num_layers,
        score_share=sum(plan.scores[layer] for layer in layers) / total if total else float("nan"),
        predicted_time_share=float("nan"),
        seed=options.seed,
    )
    return replace(plan, selection=selection, ranks=ranks)


TWIN = "uniform_aletheia"
"""Learns what ``uniform`` does, step by step, so only that one is kept and asked."""
UNIFORM = {
    "uniform": ("uniform LoRA, plain PEFT under Trainer", "trainer", True),
    "uniform_trl": ("uniform LoRA, TRL as shipped", "trl_as_shipped", False),
    "uniform_trl_fast": ("uniform LoRA, TRL, checkpointing and bf16 off", "trl_fast", False),
    TWIN: ("uniform LoRA, our trainer", "aletheia", True),
}
"""Title and trainer of the ways to train all layers, and whether they take all steps."""


def planned_arms(plan: Plan, options: CompareOptions) -> list[Arm]:
    """Uniform LoRA under each trainer, the selection, and the controls that were asked for."""
    every, rate = uniform_plan(plan), options.learning_rate
    uniform_rate = rate if options.uniform_learning_rate is None else options.uniform_learning_rate
    probe_seconds = plan.probe.seconds if plan.probe is not None else 0.0
    timed, count = min(options.timed_steps, options.steps), len(plan.selection.layers)
    arms = [
        Arm(name, title, "uniform", trainer, every, uniform_rate, options.steps if full else timed, full)
        for name, (title, trainer, full) in UNIFORM.items()
    ]
    title = f"{count} selected layers, our trainer"
    arms.append(Arm("selected", title, "selected", "aletheia", plan, rate, options.steps, True, probe_seconds))
    for control in options.controls:
        layers = STRATEGIES[control](plan.scores, SelectionOptions(num_layers=count, seed=options.seed))
        other = with_layers(plan, control, layers, plan.options.allocation)
        cost = probe_seconds if control in SCORED else 0.0
        arms.append(
            Arm(control, f"{count} layers, {control}", "control", "aletheia", other, rate, options.steps, True, cost)
        )
    if options.matched_time:
        by_name = {arm.name: arm for arm in arms}
        arms += [_time_matched(by_name[name], f"{name}_time_matched", arms[0], options) for name in (TWIN, "selected")]
    return arms


def _time_matched(arm: Arm, name: str, pace: Arm, options: CompareOptions) -> Arm:
    """The same run, for as long as another one takes."""
    return replace(
        arm,
        name=name,
        title=f"{arm.title}, as long as plain PEFT",
        steps=options.steps * MOST_STEPS_PER_UNIFORM_STEP,
        pace=pace,
        step_seconds=[],
        train_losses=[],
        heldout=[],
    )
