"""An anatomy and the shape of a batch -> what a training step costs for any choice of layers, by counting.

Comes in: a :class:`ModelAnatomy` (of a model on the ``meta`` device, too) and a :class:`StepShape`. Goes out: a
:class:`CostModel` in floating-point operations: only ratios of its answers mean something. ``calibration.py`` puts
measured seconds in their place, or a machine's rate turns them into seconds (:meth:`CostModel.in_seconds`); every
method stays as it is.

With F_l the forward of layer l, B_l its activation backward, a_l its adapters, H the head and loss, S the adapted
layers and m the lowest of them::

    T(S) = sum_l F_l + H + sum_{l >= m} B_l + sum_{l in S} a_l
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .anatomy import ModelAnatomy, ModuleAnatomy
from .errors import PlanError

# What counting misses, fitted together to 19 measured steps of SmolLM2-135M in float32 on two cores, taken in turns;
# all are within 10 % and stand in tests/test_cost.py.
# Backward of a layer has as many products as forward, and more passes over activations (norms, gates, rotations).
BACKWARD_PENALTY = 1.8
# Every adapted module adds passes over its whole output (scale, add), whatever the rank: the last 15 layers took
# 3.67, 3.69, 3.68 and 4.09 s at ranks 8, 16, 32 and 64.
ADAPTER_OVERHEAD_RANKS = 30.0
# The softmax takes several float32 passes over tokens x vocabulary.
HEAD_PENALTY = 1.5

Unit = Literal["operations", "seconds"]
Source = Literal["counted", "calibrated"]
Ranks = float | Mapping[int, float]
"""One rank for all layers, or one per layer. Where ranks differ within a layer, their mean over its targeted modules,
weighted by in + out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """How many tokens one optimizer step sees."""

    num_tokens: int
    """Tokens that run through the layers, padding included (it costs the same)."""
    num_labelled_tokens: int
    """Tokens that carry a label, i.e. need logits."""
    sequence_length: int
    """Tokens of one row; attention scores grow with it."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_labelled_tokens", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1.")
        for name in ("num_labelled_tokens", "sequence_length"):
            if getattr(self, name) > self.num_tokens:
                raise ValueError(f"{name}={getattr(self, name)}, expected at most num_tokens={self.num_tokens}.")


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost of the parts of a step, one entry per layer, in ``unit``."""

    forward: tuple[float, ...]
    """F_l: the frozen layer, without adapters."""
    backward: tuple[float, ...]
    """B_l: gradients of the activations; frozen weights need none of their own."""
    adapter_per_rank: tuple[float, ...]
    """One rank on every targeted module of the layer, forward and backward."""
    head: float
    """H: logits and loss of the labelled tokens, forward and backward."""
    head_all_tokens: float
    """The same when logits are computed for every token, as transformers' Trainer does."""
    adapter_fixed: tuple[float, ...] | None = None
    """What the adapters of a layer cost whatever their rank; None is ADAPTER_OVERHEAD_RANKS times one rank."""
    unit: Unit = "operations"
    """Of every number above."""
    source: Source = "counted"
    """``calibrated`` where the numbers follow from seconds measured on this model and machine."""

    def __post_init__(self) -> None:
        if len({len(self.forward), len(self.backward), len(self.adapter_per_rank), len(self.fixed)}) > 1:
            raise ValueError("the parts of a cost model differ in their number of layers, expected one number a layer.")

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return len(self.forward)

    @property
    def fixed(self) -> tuple[float, ...]:
        """What the adapters of each layer cost whatever their rank."""
        if self.adapter_fixed is not None:
            return self.adapter_fixed
        return tuple(ADAPTER_OVERHEAD_RANKS * one for one in self.adapter_per_rank)

    def in_seconds(self, operations_per_second: float) -> CostModel:
        """The same model in seconds, for a machine of this rate; as it is where it is in seconds already.

        Args:
            operations_per_second: As :func:`~aletheia_lora.calibration.measured_rate` finds it.

        Raises:
            ValueError: If the rate is not a positive finite number.
        """
        if not 0 < operations_per_second < float("inf"):
            raise ValueError(f"a rate of {operations_per_second} operations a second, expected a positive number.")
        if self.unit == "seconds":
            return self

        def scaled(parts: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(part / operations_per_second for part in parts)

        return replace(
            self,
            forward=scaled(self.forward),
            backward=scaled(self.backward),
            adapter_per_rank=scaled(self.adapter_per_rank),
            adapter_fixed=scaled(self.fixed),
            head=self.head / operations_per_second,
            head_all_tokens=self.head_all_tokens / operations_per_second,
            unit="seconds",
        )

    def without_adapters(
        self, lowest: int, *, checkpointing: bool = False, prefix_cached: bool = False, all_logits: bool = False
    ) -> float:
        """Cost of a step whose backward stops at layer ``lowest``, before any adapter is paid for.

        Args:
            lowest: m, the lowest adapted layer.
            checkpointing: Layers from ``lowest`` up are computed once more in backward.
            prefix_cached: The input of layer ``lowest`` is at hand, so the layers below do not run.
            all_logits: Logits for every token, not only where a label is.
        """
        forward = sum(self.forward[lowest:] if prefix_cached else self.forward)
        recomputed = sum(self.forward[lowest:]) if checkpointing else 0.0
        return forward + recomputed + sum(self.backward[lowest:]) + (self.head_all_tokens if all_logits else self.head)

    def adapters(self, layers: Iterable[int], *, rank: Ranks = 16, checkpointing: bool = False) -> float:
        """Cost of the adapters alone, sum of a_l over these layers; a third more with checkpointing.

        A third of an adapter's work is its forward, and every adapted layer runs forward once more then.

        Raises:
            PlanError: If ``rank`` is a mapping that lacks one of the layers.
        """
        chosen = sorted(set(layers))
        if isinstance(rank, Mapping):
            missing = [layer for layer in chosen if layer not in rank]
            if missing:
                raise PlanError(f"no rank was given for layers {missing}. Give one for each of {chosen}.")
        fixed = self.fixed
        once = sum(
            fixed[layer] + (rank[layer] if isinstance(rank, Mapping) else rank) * self.adapter_per_rank[layer]
            for layer in chosen
        )
        return once * 4 / 3 if checkpointing else once

    def step(
        self,
        layers: Iterable[int],
        *,
        rank: Ranks = 16,
        checkpointing: bool = False,
        prefix_cached: bool = False,
        all_logits: bool = False,
    ) -> float:
        """T(S): cost of a training step that adapts these layers.

        It holds only if nothing asks for gradients below the lowest layer (``enable_input_require_grads`` does).

        Args:
            layers: S, the adapted layers.
            rank: One rank, or one per layer.
            checkpointing: As for :meth:`without_adapters` and :meth:`adapters`.
            prefix_cached: As for :meth:`without_adapters`: a step of the second and later epochs.
            all_logits: As for :meth:`without_adapters`.

        Raises:
            PlanError: If no layer is given, one does not exist, or one has no rank.
        """
        chosen = sorted(set(layers))
        if not chosen:
            raise PlanError("no layers were chosen, so there is no training step to predict. Choose at least one.")
        for layer in chosen:
            if not 0 <= layer < self.num_layers:
                raise PlanError(f"layer {layer} does not exist: the model has layers 0 to {self.num_layers - 1}.")
        base = self.without_adapters(
            chosen[0], checkpointing=checkpointing, prefix_cached=prefix_cached, all_logits=all_logits
        )
        return base + self.adapters(chosen, rank=rank, checkpointing=checkpointing)

    def uniform(self, *, rank: Ranks = 16, checkpointing: bool = False, all_logits: bool = False) -> float:
        """Cost of a step of uniform LoRA, every layer adapted. A prefix cache has nothing to keep there."""
        return self.step(range(self.num_layers), rank=rank, checkpointing=checkpointing, all_logits=all_logits)

    def share(
        self,
        layers: Iterable[int],
        *,
        rank: Ranks = 16,
        uniform_rank: int = 16,
        checkpointing: bool = False,
        prefix_cached: bool = False,
        all_logits: bool = False,
    ) -> float:
        """Cost of a step against uniform LoRA's under the same switches; 0.5 is twice as fast.

        Args:
            layers: The adapted layers.
            rank: Their rank, or one per layer.
            uniform_rank: Rank of the uniform LoRA that they are compared with.
            checkpointing: In both.
            prefix_cached: For these layers; uniform LoRA has no prefix.
            all_logits: In both.

        Raises:
            PlanError: As :meth:`step`.
        """
        chosen = self.step(
            layers, rank=rank, checkpointing=checkpointing, prefix_cached=prefix_cached, all_logits=all_logits
        )
        return chosen / self.uniform(rank=uniform_rank, checkpointing=checkpointing, all_logits=all_logits)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CostModel:
        """Read back what :meth:`to_dict` wrote."""
        per_layer = {key: tuple(record[key]) for key in ("forward", "backward", "adapter_per_rank")}
        if record.get("adapter_fixed") is not None:
            per_layer["adapter_fixed"] = tuple(record["adapter_fixed"])
        return cls(**{**record, **per_layer})


def cost_model(anatomy: ModelAnatomy, shape: StepShape, *, targets: Sequence[str] | None = None) -> CostModel:
    """Count the operations of each part of a step.

    A matrix with P active weights costs 2 P per token forward and 2 P for the gradient of its input. Attention scores
    cost 4 * tokens * sequence length * hidden size forward and twice that backward; backward as a whole is multiplied
    by :data:`BACKWARD_PENALTY`. One rank of an adapter costs
    2 (in + out) per token forward and twice that backward; an adapter costs as if it had
    :data:`ADAPTER_OVERHEAD_RANKS` more. The head costs 4 * vocabulary * hidden size, times :data:`HEAD_PENALTY`, per
    token that gets logits. Norms, activations and the embedding are not counted;
    nor is what a sliding window saves.

    Args:
        anatomy: The model; only shapes are read.
        shape: Tokens of one step.
        targets: Names of the modules that get adapters, of uniform LoRA too, as in ``PlanOptions``; None: all.
    """
    scores = 4.0 * shape.num_tokens * shape.sequence_length * anatomy.hidden_size
    left_out = dict.fromkeys(range(anatomy.num_layers), 0)
    for item in anatomy.left_out:  # no adapter sits on them, but they run
        left_out[item.layer_idx] += item.num_params
    forward, backward = [], []
    for layer in anatomy.layers:
        active = left_out[layer.layer_idx] + sum(module.num_params * module.active_share for module in layer.modules)
        matrices = 2.0 * active * shape.num_tokens
        attends = any(module.kind == "attention" for module in layer.modules)
        forward.append(matrices + attends * scores)
        backward.append(BACKWARD_PENALTY * (matrices + attends * 2 * scores))
    head_per_token = HEAD_PENALTY * 4.0 * anatomy.vocab_size * anatomy.hidden_size
    return CostModel(
        forward=tuple(forward),
        backward=tuple(backward),
        adapter_per_rank=tuple(
            _adapter_per_rank(layer.targeted(targets), shape.num_tokens) for layer in anatomy.layers
        ),
        head=head_per_token * shape.num_labelled_tokens,
        head_all_tokens=head_per_token * shape.num_tokens,
    )


def _adapter_per_rank(modules: Sequence[ModuleAnatomy], num_tokens: int) -> float:
    sides = sum(module.adapter_params(1) * module.active_share for module in modules)
    return 6.0 * num_tokens * sides
