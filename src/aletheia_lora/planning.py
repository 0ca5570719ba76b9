"""A model and rows -> a plan: probe, score, cost, choose, rank; and the plan as a file for people to read and edit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig, PeftConfig

from .adapter import lora_config, peft_config
from .adapter_options import AdapterOptions
from .allocation import AllocationOptions, ModuleRank, allocate, mean_ranks, ranks_by_count, trainable_params
from .anatomy import ModelAnatomy, anatomy
from .data import TokenizedRows
from .errors import PlanError, nearest
from .files import write_json
from .memory import parse_bytes
from .methods import method_of, with_params
from .padding import foreseen_padding
from .plan_options import PlanOptions
from .prediction import Prediction, batch_shape, predict, prediction_from_dict, probe_cost, probe_memory
from .probe_result import ProbeResult
from .probing import probe_rows
from .processes import on_main
from .scores import layer_scores
from .selection import BUDGETED, NOT_SHOWN, SCORED, LayerSelection, ParetoPoint, nothing_fits, pareto, select
from .selection_options import SelectionOptions

FORMAT = "aletheia-plan/1"
OPTIONAL = frozenset({"prediction", "history"})  # plans from before these lack them


@dataclass(frozen=True, slots=True)
class LayerChange:
    """The layers that train, changed while training; a layer that left keeps its adapter as it was."""

    step: int
    """Optimizer steps before the change."""
    layers: tuple[int, ...]
    """Layers that train from then on."""
    entered: tuple[int, ...]
    left: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which layers, why, with which ranks, and what that is predicted to cost."""

    anatomy: ModelAnatomy
    options: PlanOptions
    scores: dict[int, float]
    selection: LayerSelection
    ranks: tuple[ModuleRank, ...]
    pareto: tuple[ParetoPoint, ...]
    probe: ProbeResult | None
    """What the scores were made from; None for a plan made without a probe."""
    prediction: Prediction | None = None
    """Time and memory of a step; None in plans from before these were predicted."""
    history: tuple[LayerChange, ...] = ()
    """How the layers that train changed on the way; the plan names all that carry an adapter."""

    @property
    def trainable_params(self) -> int:
        """Weights of the adapters, which will train; modules that are saved whole come on top."""
        rows = {module.name: module.out_features for module in self.anatomy.modules}
        extra = self.options.use_dora or self.options.lora_bias
        return trainable_params(self.ranks) + (sum(rows[entry.name] for entry in self.ranks) if extra else 0)

    @property
    def rewritten_modules(self) -> tuple[str, ...]:
        """Modules whose frozen weights attaching will change; a copy of the model needs those weights for itself."""
        return tuple(entry.name for entry in self.ranks) if self.options.adapter_options.rewrites_weights else ()

    def lora_config(self) -> LoraConfig:
        """An ordinary ``peft.LoraConfig`` naming every adapted module in full, whatever the plan's adapter is."""
        options = self.options.adapter_options
        return lora_config(self.anatomy, self.ranks, options if options.adapter == "lora" else AdapterOptions())

    def peft_config(self) -> PeftConfig:
        """The ordinary PEFT configuration of the plan's adapter, naming every adapted module in full.

        Raises:
            PlanError: If that method cannot adapt one of the modules; says which and why.
        """
        return peft_config(self.anatomy, self.ranks, self.options.adapter_options)

    def with_adapter(self, adapter: str) -> Plan:
        """The same layers and ranks, adapted by another method: a key of ``methods.METHODS``.

        Raises:
            ValueError: If there is no such method.
            PlanError: If it cannot adapt one of the modules; says which and why.
        """
        options = replace(self.options, adapter=adapter)
        made = replace(self, options=options, ranks=with_params(adapter, self.anatomy, self.ranks))
        made.peft_config()
        return made

    def check_fits(self, model: Any) -> None:
        """Check that the plan was made for a model of this shape.

        Raises:
            PlanError: If the model's fingerprint differs.
        """
        found = anatomy(model)
        if found.fingerprint != self.anatomy.fingerprint:
            raise PlanError(
                f"this plan was made for {self.anatomy.architecture} ({self.anatomy.fingerprint}), but the model is "
                f"{found.architecture} ({found.fingerprint}). Make a plan for this model."
            )

    def __str__(self) -> str:
        """Which layers, why, what it costs; a few lines for a person."""
        lines = [f"{self.anatomy.architecture}: {self.selection.describe(self.predicted_when)}"]
        if self.prediction is not None:
            lines.append(self.prediction.describe())
        first = self.first_epoch_share()
        if first is not None:
            lines.append(
                "prefix cache: choice, speed and time are of steps that replay it, from the second epoch on; in the "
                f"first, which fills it, a step is predicted to take {100 * first:.0f} % of uniform LoRA's "
                f"({1 / first:.2f}x)"
            )
        if self.probe is not None:
            overlap = self.probe.split_half_overlap()
            lines.append(
                f"probe: {self.probe.num_batches} batches in {self.probe.seconds:.1f} s, score {self.options.score}; "
                f"of the gradient norms: spread {self.probe.spread:.1f}, split-half overlap {overlap:.2f}"
            )
            if self.probe.is_flat:
                lines.append(
                    f"the profile is flat (max/min {self.probe.spread:.2f} < 2.5): the scores hardly tell layers "
                    "apart, so cost decides; ranks in proportion to such scores have cost accuracy (arXiv 2605.07366)"
                )
        ranks = ", ".join(str(rank) for rank in sorted({entry.rank for entry in self.ranks}))
        method = method_of(self.options.adapter)
        lines.append(
            (f"ranks: {self.options.allocation}, {ranks}; " if method.rank is not None else "")
            + f"{self.trainable_params:,} trainable weights in {len(self.ranks)} modules"
        )
        if self.options.adapter != "lora":
            lines.append(f"adapter: {self.options.adapter}; predictions are for LoRA of rank {ranks} on these layers")
        if self.options.adapter_options.in_words():
            lines.append(f"adapters: {self.options.adapter_options.in_words()}; predictions are those of plain LoRA")
        if self.selection.strategy in SCORED:
            lines.append(f"{NOT_SHOWN}; `aletheia compare --controls random` asks it of your data")
        if self.selection.lowest == 0:
            lines.append("layer 0 is among them, so backward runs through the whole model and little time is saved")
        if len(self.selection.layers) < self.anatomy.num_layers:
            lines.append(
                "a step on fewer layers can take less time and memory; that they learn more than all in the same time "
                "has not been shown: --strategy all adapts all, and training leaves out the same needless work"
            )
        return "\n".join(lines)

    @property
    def predicted_when(self) -> str:
        """Of which steps choice and prediction are: with a prefix cache of those that replay it, else of all."""
        return " from the second epoch on" if self.options.prefix_cache and self.selection.lowest > 0 else ""

    def first_epoch_share(self) -> float | None:
        """Predicted time of a step that fills the prefix cache, as a share of uniform LoRA's; None if unknown."""
        if not self.predicted_when or self.probe is None:
            return None
        rank = mean_ranks(self.anatomy, with_params("lora", self.anatomy, self.ranks))
        return probe_cost(self.anatomy, self.probe, self.options.batch_size, calibrate=self.options.calibrate).share(
            rank,
            rank=rank,
            uniform_rank=self.options.rank,
            checkpointing=self.options.gradient_checkpointing,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {
            "format": FORMAT,
            "anatomy": self.anatomy.to_dict(),
            "options": asdict(self.options),
            "scores": {str(layer): score for layer, score in self.scores.items()},
            "selection": self.selection.to_dict(),
            "ranks": [asdict(entry) for entry in self.ranks],
            "pareto": [asdict(point) for point in self.pareto],
            "probe": None if self.probe is None else self.probe.to_dict(),
            "prediction": None if self.prediction is None else self.prediction.to_dict(),
            "history": [asdict(change) for change in self.history],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Plan:
        """Read back what :meth:`to_dict` wrote, edited by hand or not.

        Raises:
            PlanError: If the record is of another format, lacks a part, or names layers or modules twice or unknown.
        """
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            given = record.get("format") if isinstance(record, Mapping) else type(record).__name__
            raise PlanError(f"not a plan: format is {given!r}, expected {FORMAT!r}.")
        missing = [key.name for key in fields(cls) if key.name not in record and key.name not in OPTIONAL]
        if missing:
            raise PlanError(f"the plan lacks {missing}. Make it again with `aletheia plan`.")
        try:
            return cls._from_parts(record)
        except PlanError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"a part of the plan cannot be read: {error}. Make it again with `aletheia plan`."
            ) from error

    @classmethod
    def _from_parts(cls, record: Mapping[str, Any]) -> Plan:
        options = dict(record["options"])
        unknown = sorted(set(options) - set(PlanOptions.__dataclass_fields__))
        if unknown:
            raise PlanError(f"unknown option {unknown[0]!r}. {nearest(unknown[0], PlanOptions.__dataclass_fields__)}")
        for name in ("targets", "modules_to_save"):
            if options.get(name) is not None:
                options[name] = tuple(options[name])
        made = cls(
            anatomy=ModelAnatomy.from_dict(record["anatomy"]),
            options=PlanOptions(**options),
            scores={int(layer): float(score) for layer, score in record["scores"].items()},
            selection=LayerSelection.from_dict(record["selection"]),
            ranks=tuple(ModuleRank(**entry) for entry in record["ranks"]),
            pareto=tuple(ParetoPoint(**{**point, "layers": tuple(point["layers"])}) for point in record["pareto"]),
            probe=None if record["probe"] is None else ProbeResult.from_dict(record["probe"]),
            prediction=prediction_from_dict(record.get("prediction")),
            history=tuple(
                LayerChange(entry["step"], *(tuple(entry[key]) for key in ("layers", "entered", "left")))
                for entry in record.get("history", ())
            ),
        )
        layers = made.anatomy.check_layers(made.selection.layers)
        made.peft_config()
        modules = {module.name: module for module in made.anatomy.modules}
        for entry in made.ranks:
            module = modules[entry.name]
            if not isinstance(entry.rank, int) or not 1 <= entry.rank <= module.max_rank:
                raise PlanError(f"rank {entry.rank!r} of {entry.name}, expected 1 to {module.max_rank}.")
            if module.layer_idx not in layers:
                raise PlanError(f"the plan gives ranks to layers it does not select: {entry.name}. Edit both.")
        ranks = [
            replace(entry, layer_idx=module.layer_idx, kind=module.kind)
            for entry in made.ranks
            for module in (modules[entry.name],)
        ]
        return replace(made, ranks=with_params(made.options.adapter, made.anatomy, ranks))

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all."""
        return write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: If the file is missing, not JSON, or not a plan.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise PlanError(f"cannot read the plan {str(path)!r}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise PlanError(f"the plan {str(path)!r} is not UTF-8 (byte {error.start}).") from error
        except json.JSONDecodeError as error:
            raise PlanError(f"{str(path)!r} is not JSON (line {error.lineno}): {error.msg}.") from error


def plan(
    model: Any,
    rows: TokenizedRows | Sequence[Mapping[str, Any]] | Any,
    *,
    tokenizer: Any = None,
    max_length: int = 1024,
    progress: bool = False,
    **options: Any,
) -> Plan:
    """Probe the model on the rows and plan what to adapt: probe -> score -> cost -> choose -> rank.

    In a ``torch.distributed`` group every process has to call this with the same model and rows; they share the probe's
    batches out and all get the same plan.

    Args:
        model: Causal language model; left exactly as found.
        rows: Rows in TRL's formats, or :class:`~aletheia_lora.data.TokenizedRows`.
        tokenizer: Needed for rows that are not tokenized.
        max_length: Tokens kept per row.
        progress: Show a progress bar.
        **options: The fields of :class:`PlanOptions`, e.g. ``time_budget=0.6``, ``strategy="top_percent"``.

    Raises:
        DataError: If the rows cannot be tokenized, or there are fewer than one batch.
        ProbeError: If the probe cannot be trusted.
        PlanError: If the budget or the ranks cannot be met.
        ProcessError: If the processes of a group hold different models or rows.
        ValueError: If an option is unknown or out of range.
    """
    for name in options:
        if name not in PlanOptions.__dataclass_fields__:
            raise ValueError(f"unknown option {name!r}. {nearest(name, PlanOptions.__dataclass_fields__)}")
    chosen = PlanOptions(**options)
    found, measured = probe_rows(model, rows, chosen, tokenizer=tokenizer, max_length=max_length, progress=progress)
    return on_main(lambda: plan_from_probe(found, measured, chosen, model=model), "planning")


def plan_from_probe(found: ModelAnatomy, measured: ProbeResult, options: PlanOptions, *, model: Any = None) -> Plan:
    """The part of planning that needs no data: score -> cost -> choose -> rank.

    Raises:
        PlanError: If the probe is of another model, the budget or ranks cannot be met, or the adapter does not take
            one of the modules.
        ValueError: If an option names something unknown.
    """
    if measured.fingerprint != found.fingerprint:
        raise PlanError(
            f"the probe is of a model {measured.fingerprint}, but this one is {found.fingerprint}. Probe this model."
        )
    rng = np.random.default_rng(options.seed)
    scores = layer_scores(options.score, measured, model=model, rng=rng)
    targets = options.targets
    padded = foreseen_padding(found, model) is not None
    # A choice by counts is the same everywhere; only seconds are those of this device and launch.
    timed = probe_cost(found, measured, options.batch_size, targets=targets, padded=padded)
    counted = probe_cost(found, measured, options.batch_size, calibrate=False, targets=targets)
    cost = timed if options.calibrate else counted
    memory = probe_memory(found, measured, options.batch_size, model=model, targets=targets)
    memory_budget = parse_bytes(options.memory_budget)
    how_to_rank = allocation_options(options, measured)
    choice = SelectionOptions(
        percent=options.percent,
        num_layers=options.num_layers,
        mass=options.mass,
        time_budget=options.time_budget,
        memory_budget=memory_budget,
        rank=options.rank,
        ranks=ranks_by_count(found, options.allocation, how_to_rank),
        seed=options.seed,
        cost=cost,
        memory=memory,
        checkpointing=options.gradient_checkpointing,
        prefix_cached=options.prefix_cache,
        kernels=measured.kernels,
    )
    frontier = tuple(pareto(scores, choice)) if min(scores.values()) >= 0 and max(scores.values()) > 0 else ()

    def ranked(layers: Sequence[int]) -> Ranked:
        ranks = allocate(found, layers, options.allocation, how_to_rank)
        rank, switches = mean_ranks(found, ranks, targets), {"checkpointing": options.gradient_checkpointing}
        share = cost.share(layers, rank=rank, uniform_rank=options.rank, prefix_cached=options.prefix_cache, **switches)
        shape = batch_shape(measured, options.batch_size, padded=padded)
        predicted = predict(
            timed,
            memory,
            shape,
            layers,
            rank=rank,
            uniform_rank=options.rank,
            prefix_cached=options.prefix_cache,
            **switches,
        )
        return ranks, share, predicted

    selection, (ranks, share, predicted) = _chosen(scores, options, choice, ranked)
    selection = replace(selection, predicted_time_share=share)
    made = Plan(found, options, scores, selection, ranks, frontier, measured, predicted)
    return made.with_adapter(options.adapter)


Ranked = tuple[tuple[ModuleRank, ...], float, Prediction]
"""The ranks of a choice of layers, its share of uniform LoRA's step time, and what a step is predicted to take."""


def _chosen(
    scores: Mapping[int, float],
    options: PlanOptions,
    choice: SelectionOptions,
    ranked: Callable[[Sequence[int]], Ranked],
) -> tuple[LayerSelection, Ranked]:
    """The strategy's choice with its ranks; one that keeps the budgets with them, where the strategy has any."""
    memory_budget = choice.memory_budget
    while True:
        try:
            selection = select(scores, options.strategy, choice)
        except PlanError as error:
            if options.strategy not in BUDGETED:
                raise
            alone = {layer: ranked([layer]) for layer in scores if scores[layer] > 0 or options.strategy != "budget"}
            raise nothing_fits(
                {layer: share for layer, (_, share, _) in alone.items()},
                {layer: predicted.bytes for layer, (_, _, predicted) in alone.items()},
                options.time_budget,
                memory_budget,
                with_ranks=f", with the ranks that {options.allocation!r} gives it",
            ) from error
        found = ranked(selection.layers)
        _, share, predicted = found
        too_slow = share > options.time_budget * (1 + 1e-9)
        too_large = memory_budget is not None and predicted.bytes > memory_budget
        if options.strategy not in BUDGETED or not (too_slow or too_large):
            return selection, found
        # Ranks that depend on which layers were chosen can cost more than it was made at: choose within less.
        if too_slow:
            choice = replace(choice, time_budget=choice.time_budget * min(options.time_budget / share, 0.999))
        if too_large and memory_budget is not None and choice.memory_budget is not None:
            over = predicted.bytes - memory_budget
            chosen_at = min(choice.memory_budget, choice.step_bytes(selection.layers))
            choice = replace(choice, memory_budget=max(chosen_at - max(over // 4, 1), 1))


def allocation_options(options: PlanOptions, measured: ProbeResult | None) -> AllocationOptions:
    """What ``allocate`` is told for a plan with these options."""
    tensors = () if measured is None else measured.tensors
    return AllocationOptions(
        rank=options.rank,
        alpha_ratio=options.alpha_ratio,
        attention_rank=options.attention_rank,
        mlp_rank=options.mlp_rank,
        max_rank=options.max_rank,
        module_scores={tensor.name: sum(tensor.grad_norm) for tensor in tensors if tensor.adaptable} or None,
        is_flat=measured is not None and measured.is_flat,
        targets=options.targets,
    )
