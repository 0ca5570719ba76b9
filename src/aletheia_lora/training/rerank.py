"""A run under way -> how the ranking of layers moves, and, if asked, other layers that train from then on.

Comes in: the plan, rows held aside, and the trainer's callbacks. Every so many steps the probe measures the gradients
of the frozen weights in the function that model and adapters compute by then, and the plan's own rule chooses again.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peft import PeftModel
from scipy.stats import kendalltau, spearmanr
from transformers import TrainerCallback

from ..adapter import adapter_weights, add_adapters, check_census, own_modules, shared_copy
from ..allocation import ModuleRank
from ..data import TokenizedRows, tokenize
from ..errors import PlanError
from ..methods import method_of
from ..planning import LayerChange, Plan, plan_from_probe
from ..probe import probe
from ..probing import probe_batches
from ..processes import is_sharded
from ..scores import layer_scores

WITHOUT_DATA = ("weight_snr", "random")
"""Scores that read no gradient: the same however long a run trains."""
AGREEMENT = ("spearman", "kendall")


class ReRank(TrainerCallback):
    """Probe again every ``every`` optimizer steps and report; with ``change`` also train other layers.

    Under any trainer of a ``PeftModel``: ``callbacks=[ReRank(plan, rows, every=100)]``. Model, gradients and random
    state are left as found, so that a run whose choice does not move is the run without this callback, bit by bit.

    With ``change`` a layer that leaves the choice is frozen: its adapter stays as it is, and is saved; what the
    optimizer knew of it is dropped. A layer that enters gets a fresh adapter at the rank of the new plan (one that left
    earlier: its own again) and fresh optimizer state. Layers that stay keep ranks and state; schedules go on.
    """

    def __init__(
        self,
        plan: Plan,
        rows: TokenizedRows | Sequence[Mapping[str, Any]],
        *,
        every: int,
        change: bool = False,
        tokenizer: Any = None,
        max_length: int = 1024,
        say: Callable[[str], None] = print,
    ) -> None:
        """Draw the batches.

        Args:
            plan: The plan that the run trains by; its scores are the first ranking.
            rows: Rows to probe on, best those of the plan's own probe; not rows that are trained on.
            every: Optimizer steps between two probes.
            change: Train the layers that the plan's rule chooses each time.
            tokenizer: Needed for rows that are not tokenized; says what to pad with.
            max_length: Tokens kept per row.
            say: Called with one line at each probe.

        Raises:
            ValueError: If ``every`` is below 1.
            PlanError: If the plan's score reads no gradient, or layers cannot be added to its adapter: it has one rank
                for all, or its start rewrites the weights of the layers that enter.
            DataError: If the rows cannot be tokenized, or there are none.
        """
        if every < 1:
            raise ValueError(f"every={every}, expected at least 1 optimizer step.")
        if plan.options.score in WITHOUT_DATA or len(plan.scores) != plan.anatomy.num_layers:
            raise PlanError(
                f"the plan's score is {plan.options.score} of {len(plan.scores)} layers: not a ranking that training "
                "moves. Plan with a score of the gradients."
            )
        if change and method_of(plan.options.adapter).rank == "one for all":
            raise PlanError(
                f"{plan.options.adapter} has one rank for all modules, so no layer can be added. Use change=False."
            )
        if change and plan.options.adapter_options.rewrites_weights:
            raise PlanError(
                f"init_lora_weights={plan.options.init_lora_weights!r} would rewrite the frozen weights of layers that "
                "enter. Use change=False, or another start."
            )
        tokenized = rows if isinstance(rows, TokenizedRows) else tokenize(rows, tokenizer, max_length=max_length)
        self.plan = plan
        """The plan with every layer that carries an adapter by now."""
        self.layers = plan.selection.layers
        """Layers that train now."""
        self.first_scores = dict(plan.scores)
        self.events: list[dict[str, Any]] = []
        self.every, self.change, self.say = every, change, say
        self._batches = probe_batches(tokenized, plan.options, getattr(tokenizer, "pad_token_id", None) or 0)
        self._paused: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._moved: Callable[[], None] = lambda: None

    def connect(self, paused: Callable[[], contextlib.AbstractContextManager[None]], moved: Callable[[], None]) -> None:
        """Let a trainer take its shortcuts off while ``paused()`` is open, and hear in it when layers ``moved``."""
        self._paused, self._moved = paused, moved

    def record(self) -> dict[str, Any]:
        """What was found and changed, as plain JSON types."""
        return {
            "every": self.every,
            "change": self.change,
            "first_scores": [self.first_scores[layer] for layer in sorted(self.first_scores)],
            "layers": list(self.layers),
            "frozen": sorted(set(self.plan.selection.layers) - set(self.layers)),
            "events": self.events,
        }

    # --- callbacks ----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot be.

        Raises:
            PlanError: If the model carries no adapters, its weights are sharded over processes, or layers cannot
                change under this trainer.
            CensusError: If the adapters are not those of the plan.
        """
        if not isinstance(model, PeftModel):
            raise PlanError(f"re-ranking needs a PeftModel under training, got {type(model).__name__}.")
        check_census(model, self.plan.ranks, self.plan.options.adapter_options)
        sharded = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
        if sharded is not None:
            raise PlanError(
                f"re-ranking probes whole weights, and they are sharded over processes, e.g. {sharded}. Leave it out, "
                "or train by DDP or in one process."
            )
        reason = _why_not(args, state) if self.change else None
        if reason is not None:
            raise PlanError(f"the layers that train cannot change: {reason}. Use change=False.")

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Probe, report, and change the layers where that is wanted and training goes on."""
        if state.global_step % self.every:
            return
        started = time.perf_counter()
        with self._paused():
            chosen, event = self._chosen_again(model)
            moves = chosen is not None and chosen.selection.layers != self.layers
            event["changed"] = bool(self.change and moves and state.global_step < state.max_steps)
            if chosen is not None and event["changed"]:
                self._change(model, optimizer, chosen, state.global_step, args.seed + state.global_step)
                self._moved()
        event |= {"step": state.global_step, "seconds": time.perf_counter() - started}
        self.events.append(event)
        state.log_history.append({"step": event["step"], **{f"rerank_{key}": event[key] for key in AGREEMENT}})
        self.say(_line(event))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _chosen_again(self, model: PeftModel) -> tuple[Plan | None, dict[str, Any]]:
        """The plan that would be made now, None where none can be; and what to record of it."""
        options, first = self.plan.options, self.plan.probe
        base: Any = model.get_base_model()
        measured = probe(
            base,
            self._batches,
            mode=options.probe_mode,
            **options.probe_extras,
            anatomy_=self.plan.anatomy,
            names=own_modules(base),
        )
        if first is not None:  # a step costs what it cost: noise in timing shall not move the choice
            measured = replace(measured, timing=first.timing, row_lengths=first.row_lengths)
        event = self._agreement(layer_scores(options.score, measured)) | {"reason": None}
        bare = _bare(model) if options.memory_budget is not None else None
        chosen = None
        try:
            chosen = plan_from_probe(self.plan.anatomy, measured, options, model=bare)
        except PlanError as error:
            event["reason"] = str(error)
        layers = self.layers if chosen is None else chosen.selection.layers
        entered, left = sorted(set(layers) - set(self.layers)), sorted(set(self.layers) - set(layers))
        return chosen, event | {"layers": list(layers), "entered": entered, "left": left}

    def _agreement(self, scores: Mapping[int, float]) -> dict[str, Any]:
        """The scores, and how their ranking agrees with the first: 1 is the same order, -1 the reverse."""
        now, then = ([ranking[layer] for layer in sorted(ranking)] for ranking in (scores, self.first_scores))
        constant = len(set(now)) < 2 or len(set(then)) < 2  # no ranking to agree with
        return {
            "scores": now,
            "spearman": math.nan if constant else float(spearmanr(then, now).statistic),
            "kendall": math.nan if constant else float(kendalltau(then, now).statistic),
        }

    def _change(self, model: PeftModel, optimizer: Any, chosen: Plan, step: int, seed: int) -> None:
        """Train the chosen layers from now on."""
        layers = chosen.selection.layers
        carried = set(self.plan.selection.layers)
        further = [entry for entry in chosen.ranks if entry.layer_idx not in carried]
        if further:
            options = self.plan.options.adapter_options
            add_adapters(model, self.plan.anatomy, self.plan.ranks, further, options, seed=seed)
        ranks = _by_depth(self.plan, [*self.plan.ranks, *further])
        _train_only(model, optimizer, {entry.name: entry.layer_idx in layers for entry in ranks})
        change = LayerChange(
            step=step,
            layers=layers,
            entered=tuple(sorted(set(layers) - set(self.layers))),
            left=tuple(sorted(set(self.layers) - set(layers))),
        )
        self.layers = layers
        total, together = math.fsum(self.first_scores.values()), tuple(sorted(carried | set(layers)))
        share = math.fsum(self.first_scores[layer] for layer in together) / total if total > 0 else math.nan
        selection = replace(self.plan.selection, layers=together, score_share=share, predicted_time_share=math.nan)
        self.plan = replace(
            self.plan, selection=selection, ranks=ranks, prediction=None, history=(*self.plan.history, change)
        )


def _bare(model: PeftModel) -> Any:
    """The model without adapters, over the same weights."""
    bare = shared_copy(model).unload()
    vars(bare).pop("forward", None)  # TRL's own forward, made for one model, would run that one
    return bare


def _why_not(args: Any, state: Any) -> str | None:
    """Why this trainer cannot take parameters in and out while it trains; None if it can."""
    if getattr(args, "world_size", 1) > 1:
        return "several processes share the gradients of parameters that were there at the start"
    for name in ("deepspeed", "fsdp", "torch_compile", "load_best_model_at_end"):
        if getattr(args, name, None):
            return f"{name} is on and knows only the parameters of the start"
    if getattr(args, "n_gpu", 1) > 1:
        return "the model is copied to several GPUs"
    if state.global_step > 0:
        return "the run was resumed, and its optimizer is that of the layers at the checkpoint"
    return None


def _by_depth(plan: Plan, ranks: Sequence[ModuleRank]) -> tuple[ModuleRank, ...]:
    order = {module.name: position for position, module in enumerate(plan.anatomy.modules)}
    return tuple(sorted(ranks, key=lambda entry: order[entry.name]))


def _train_only(model: PeftModel, optimizer: Any, trains: Mapping[str, bool]) -> None:
    """Freeze the adapters of some modules and train the others; the optimizer knows of those that train, and no more.

    A parameter that comes in joins the group of its like, and so takes part in that group's rate and decay.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    weights = adapter_weights(model)
    group_of = {
        key: groups[id(parameter)]
        for parameters in weights.values()
        for key, parameter in parameters.items()
        if id(parameter) in groups
    }
    for name, parameters in weights.items():
        for key, parameter in parameters.items():
            group = groups.get(id(parameter))
            parameter.requires_grad_(trains[name])
            if trains[name] and group is None:
                group_of[key]["params"].append(parameter)
            elif not trains[name] and group is not None:
                group["params"] = [other for other in group["params"] if other is not parameter]
                optimizer.state.pop(parameter, None)
                parameter.grad = None


def _line(event: Mapping[str, Any]) -> str:
    """One sentence for people."""
    moved = f"in {event['entered'] or 'none'}, out {event['left'] or 'none'}"
    if event["reason"] is not None:
        outcome = f"no choice can be made ({event['reason']}), layers stay"
    elif event["changed"]:
        outcome = f"layers change: {moved}"
    elif event["entered"] or event["left"]:
        outcome = f"layers would change: {moved}"
    else:
        outcome = "the choice stays"
    agreement = f"Spearman {event['spearman']:.2f}, Kendall {event['kendall']:.2f}"
    return f"step {event['step']}: ranking against the first: {agreement}; {outcome} ({event['seconds']:.1f} s)"
