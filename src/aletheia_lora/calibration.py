"""Counts and what a probe timed -> a CostModel in seconds; and a machine's rate, where nothing was timed.

Comes in: a :class:`ModelAnatomy`, the :class:`StepShape` of training, and a :class:`StepTiming`. Goes out: a
:class:`CostModel`. Counting says how each part grows with tokens and sequence length; the timed batches say how many
seconds an operation of that part takes here; adapters are timed on their own, on a batch of the training shape.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Protocol

import torch
from torch import Tensor, nn

from .anatomy import LayerAnatomy, ModelAnatomy, ModuleAnatomy
from .cost import CostModel, StepShape, cost_model
from .fast_lora import adapted_linear
from .probe_result import AdapterTiming, StepTiming

RANKS = (8, 64)
"""The two ranks that adapters are timed at: what grows with the rank is a line through them."""
MIN_ROUNDS, MAX_ROUNDS = 3, 15
RATE_SIZE = 1024


class ModuleFactory(Protocol):
    """Makes one frozen matrix, alone (``rank`` None) or with an adapter, as training will run it."""

    def __call__(
        self, in_features: int, out_features: int, rank: int | None, *, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        """The module, its frozen weights and its adapter random."""


def measured_rate(device: torch.device | str, dtype: torch.dtype = torch.float32, *, seconds: float = 0.2) -> float:
    """Floating-point operations a second of this machine: the median over square products for about ``seconds``.

    Raises:
        ValueError: If the device does not exist here or cannot multiply in this dtype.
    """
    try:
        target = torch.device(device)
        a_NN, b_NN = (torch.ones(RATE_SIZE, RATE_SIZE, device=target, dtype=dtype) for _ in range(2))
        a_NN @ b_NN  # the first product sets libraries up
        _wait(target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={str(device)!r} cannot multiply in {dtype}: {str(error).splitlines()[0]} Name a device of this "
            "machine such as cpu or cuda."
        ) from error
    taken: list[float] = []
    # One product on a GPU is shorter than its launch: a row of them is timed together.
    repeats = 1 if target.type == "cpu" else 20
    ends = time.perf_counter() + seconds
    while len(taken) < 2 or time.perf_counter() < ends:
        started = time.perf_counter()
        for _ in range(repeats):
            a_NN @ b_NN
        _wait(target)
        taken.append((time.perf_counter() - started) / repeats)
    return 2.0 * RATE_SIZE**3 / median(taken)


def timed_adapters(
    anatomy: ModelAnatomy,
    timing: StepTiming,
    num_tokens: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    make_module: ModuleFactory = adapted_linear,
    seconds: float = 0.4,
) -> StepTiming:
    """The same timing, with what adapters add to each shape of matrix on a batch of the training shape.

    Every shape is run forward and backward alone and with adapters of two ranks, in turns; medians of the differences.
    Where a few turns would take longer than ``seconds`` fewer tokens are run and the result is scaled. Stacks of
    experts are not timed. The global random state does not move.

    Args:
        anatomy: The model.
        timing: Where the time of the timed batches went.
        num_tokens: Tokens of a training batch.
        device: Where training runs.
        dtype: Of the activations.
        make_module: Makes the matrix with or without its adapter.
        seconds: About how long this may take.
    """
    shapes = sorted({(m.in_features, m.out_features) for m in anatomy.modules if m.storage != "stacked"})
    if not shapes:
        return timing
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        benches = {
            shape: [_Bench(make_module, *shape, rank, device, dtype) for rank in (None, *RANKS)] for shape in shapes
        }
        few = min(32, num_tokens)
        everything = [bench for group in benches.values() for bench in group]
        _round(everything, few)  # the first run sets libraries up
        one = sum(_round(everything, few)) / few
        tokens = max(min(num_tokens, int(seconds / MIN_ROUNDS / one)), few)
        rounds: list[list[float]] = []
        ends = time.perf_counter() + seconds
        while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and time.perf_counter() < ends):
            rounds.append(_round(everything, tokens))
    adapters = []
    for index, (in_features, out_features) in enumerate(shapes):
        start = index * (len(RANKS) + 1)
        low, high = (median(row[start + 1 + k] - row[start] for row in rounds) * num_tokens / tokens for k in range(2))
        per_rank = max((high - low) / (RANKS[1] - RANKS[0]), 0.0)
        adapters.append(AdapterTiming(in_features, out_features, max(low - per_rank * RANKS[0], 0.0), per_rank))
    return replace(timing, adapters=tuple(adapters), adapter_tokens=num_tokens)


def calibrated_cost(
    anatomy: ModelAnatomy, shape: StepShape, timing: StepTiming, *, targets: Sequence[str] | None = None
) -> CostModel:
    """The cost of a training step in seconds, from what the timed batches took.

    For each layer, forward and backward by themselves: seconds per counted operation on each batch, the median over
    the batches (without the first of each process, where there are more) and over all layers of equal shapes, times
    the operations of the training step. Likewise for what is outside the layers, per labelled token. So noise between
    equal layers does not decide which is cheaper. Adapters cost what was timed on their shapes; where that is missing
    (stacks of experts), what was counted, at the seconds per operation of the layers' forward.

    Args:
        anatomy: The model.
        shape: Tokens of a training step.
        timing: Where the time of the timed batches went, on this model.
        targets: As for :func:`~aletheia_lora.cost.cost_model`.
    """
    target = cost_model(anatomy, shape, targets=targets)
    batches = [
        cost_model(
            anatomy,
            StepShape(
                num_tokens=rows * length,
                num_labelled_tokens=min(max(labelled, 1), rows * length),
                sequence_length=length,
            ),
        )
        for rows, length, labelled in zip(timing.num_rows, timing.lengths, timing.num_labelled, strict=True)
    ]
    used = range(timing.num_first if len(batches) > timing.num_first else 0, len(batches))
    groups: dict[object, list[int]] = defaultdict(list)
    left_out = defaultdict(list)
    for item in anatomy.left_out:
        left_out[item.layer_idx].append(item.num_params)
    for layer in anatomy.layers:
        groups[_shape_of(layer, left_out[layer.layer_idx])].append(layer.layer_idx)
    forward, backward = [0.0] * anatomy.num_layers, [0.0] * anatomy.num_layers
    for members in groups.values():
        forward_rate = median(timing.forward[b][layer] / batches[b].forward[layer] for b in used for layer in members)
        backward_rate = median(
            timing.backward[b][layer] / batches[b].backward[layer] for b in used for layer in members
        )
        for layer_idx in members:
            forward[layer_idx] = forward_rate * target.forward[layer_idx]
            backward[layer_idx] = backward_rate * target.backward[layer_idx]
    outside = median(timing.outside[b] / batches[b].head for b in used)
    counted = median(seconds / operations for seconds, operations in zip(forward, target.forward, strict=True))
    fixed, per_rank = _adapter_seconds(
        [layer.targeted(targets) for layer in anatomy.layers], shape, timing, target, counted
    )
    return CostModel(
        forward=tuple(forward),
        backward=tuple(backward),
        adapter_per_rank=per_rank,
        head=outside * target.head,
        head_all_tokens=outside * target.head_all_tokens,
        adapter_fixed=fixed,
        unit="seconds",
        source="calibrated",
    )


# --- inside -----------------------------------------------------------------------------------------------------


class _Bench:
    """One matrix, with or without an adapter, that can be run forward and backward."""

    def __init__(
        self,
        make_module: ModuleFactory,
        in_features: int,
        out_features: int,
        rank: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.module = make_module(in_features, out_features, rank, device=device, dtype=dtype)
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.device, self.dtype, self.sides = device, dtype, (in_features, out_features)
        self.batches: dict[int, tuple[Tensor, Tensor]] = {}

    def seconds(self, num_tokens: int) -> float:
        """Wall time of one forward and backward on this many tokens."""
        if num_tokens not in self.batches:
            inputs, gradient = (
                torch.randn(1, num_tokens, side, device=self.device, dtype=self.dtype) for side in self.sides
            )
            self.batches = {num_tokens: (inputs.requires_grad_(), gradient)}
        inputs, gradient = self.batches[num_tokens]
        _wait(self.device)
        started = time.perf_counter()
        torch.autograd.grad(self.module(inputs), [inputs, *self.trained], gradient)
        _wait(self.device)
        return time.perf_counter() - started


def _round(benches: Iterable[_Bench], num_tokens: int) -> list[float]:
    return [bench.seconds(num_tokens) for bench in benches]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _shape_of(layer: LayerAnatomy, left_out: list[int]) -> object:
    """What two layers share only if one costs what the other does."""
    modules = tuple((m.kind, m.storage, m.in_features, m.out_features, m.num_experts) for m in layer.modules)
    return layer.num_params, modules, tuple(left_out)


def _adapter_seconds(
    targeted: Sequence[Sequence[ModuleAnatomy]],
    shape: StepShape,
    timing: StepTiming,
    target: CostModel,
    counted: float,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fixed seconds and seconds per rank of each layer's adapters, which sit on its ``targeted`` modules."""
    known = {(entry.in_features, entry.out_features): entry for entry in timing.adapters}
    scale = shape.num_tokens / timing.adapter_tokens if timing.adapter_tokens else math.nan
    fixed, per_rank = [], []
    for layer_idx, modules in enumerate(targeted):
        entries = [known.get((m.in_features, m.out_features)) if m.storage != "stacked" else None for m in modules]
        sides = [m.adapter_params(1) * m.active_share for m in modules]
        unknown = sum(side for side, entry in zip(sides, entries, strict=True) if entry is None) / (sum(sides) or 1.0)
        found = [entry for entry in entries if entry is not None]
        timed_fixed = sum(entry.fixed_seconds for entry in found) * scale if found else 0.0
        timed_rank = sum(entry.seconds_per_rank for entry in found) * scale if found else 0.0
        fixed.append(timed_fixed + unknown * counted * target.fixed[layer_idx])
        per_rank.append(timed_rank + unknown * counted * target.adapter_per_rank[layer_idx])
    return tuple(fixed), tuple(per_rank)
