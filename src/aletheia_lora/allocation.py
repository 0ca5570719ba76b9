"""The chosen layers -> a rank and an alpha for every module in them.

Comes in: a :class:`ModelAnatomy`, the layers, and :class:`AllocationOptions`. Goes out: a tuple of
:class:`ModuleRank`, in order of depth, computed as data and applied elsewhere. Reading :data:`ALLOCATIONS` is reading
the table of allocations.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .anatomy import ModelAnatomy, ModuleAnatomy, matches_target
from .errors import PlanError, nearest

PROPORTIONAL_CEILING = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocationOptions:
    """What the allocations may be told; each reads only what its rule needs."""

    rank: int = 16
    """Rank of uniform LoRA: the rank itself, or what sets the parameter budget of a computed one."""
    alpha_ratio: float = 2.0
    """alpha / rank, the same everywhere, so that a module's rank does not change its scale."""
    attention_rank: int = 16
    """``asymmetric``: rank of attention modules."""
    mlp_rank: int = 64
    """``asymmetric``: rank of MLP and expert modules."""
    max_rank: int | None = None
    """No rank above this one (servers often accept 16 by default); None leaves it open, but 64 for ``proportional``."""
    min_rank: int = 4
    """``proportional``: no rank below this one, rounded up to a power of two, where the matrix is large enough."""
    module_scores: Mapping[str, float] | None = None
    """``proportional``: score of each module by its full name."""
    is_flat: bool = False
    """True if the profile hardly tells layers apart; ``proportional`` then refuses."""
    targets: tuple[str, ...] | None = None
    """Only modules of these names: last parts such as ``q_proj``, longer endings, or full names. None takes all."""

    def __post_init__(self) -> None:
        for name in ("rank", "attention_rank", "mlp_rank", "max_rank", "min_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PlanError(f"got {name} {value}, expected at least 1. To train less, choose fewer layers.")
        if not (math.isfinite(self.alpha_ratio) and self.alpha_ratio > 0):
            raise PlanError(f"alpha_ratio={self.alpha_ratio}, expected a number above 0. The usual one is 2.")


@dataclass(frozen=True, slots=True)
class ModuleRank:
    """The adapter that one module gets."""

    name: str
    """Full dotted name, as in :class:`ModuleAnatomy`."""
    layer_idx: int
    kind: str
    rank: int
    alpha: float | int
    """LoRA's alpha; an int where it is a whole number."""
    num_params: int
    """Trainable weights of the adapter."""


Allocation = Callable[[ModelAnatomy, Sequence[int], AllocationOptions], tuple[ModuleRank, ...]]


def allocate(
    anatomy: ModelAnatomy, layers: Sequence[int], strategy: str = "matched", options: AllocationOptions | None = None
) -> tuple[ModuleRank, ...]:
    """Give every module of these layers a rank, by the allocation of this name in :data:`ALLOCATIONS`.

    Args:
        anatomy: The model.
        layers: The chosen layers.
        strategy: A key of :data:`ALLOCATIONS`.
        options: What the allocation needs to know.

    Raises:
        ValueError: If no allocation has this name.
        PlanError: If a layer does not exist or is named twice, a target matches nothing, a rank that was asked for is
            larger than a module allows, or the budget cannot be kept.
    """
    if strategy not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {strategy!r}. {nearest(strategy, ALLOCATIONS)}")
    return ALLOCATIONS[strategy](anatomy, anatomy.check_layers(list(layers)), options or AllocationOptions())


def trainable_params(ranks: Iterable[ModuleRank]) -> int:
    """Trainable weights of all these adapters together."""
    return sum(module.num_params for module in ranks)


def ranks_by_count(
    anatomy: ModelAnatomy, strategy: str, options: AllocationOptions
) -> dict[int, dict[int, float]] | None:
    """For each number k of chosen layers the mean rank of every layer, weighted by in + out: what a choice costs by.

    ``matched`` ranks fall as more layers are chosen. Where layers differ in size, too, a layer's is that of itself and
    the k - 1 smallest others: the highest it can get, so that no choice costs more than it seems to. ``asymmetric``
    ones are the same for every k. None where ``options.rank`` stands for all: ``uniform``, and ``proportional``, whose
    weights are at most as many.

    Args:
        anatomy: The model.
        strategy: A key of :data:`ALLOCATIONS`.
        options: As for :func:`allocate`.
    """
    layers = [layer.targeted(options.targets) for layer in anatomy.layers]
    counts = range(1, anatomy.num_layers + 1)
    if strategy == "asymmetric":
        fixed = {idx: _mean(modules, [_by_kind(m, options) for m in modules]) for idx, modules in enumerate(layers)}
        return dict.fromkeys(counts, fixed)
    if strategy != "matched" or not any(layers):
        return None
    limit = _uniform_params(anatomy, options)
    shapes = [tuple((m.adapter_params(1), _ceiling(m, options)) for m in modules) for modules in layers]
    ordered = sorted(filter(layers.__getitem__, range(len(layers))), key=lambda idx: sum(one for one, _ in shapes[idx]))
    found = {}
    for count in counts:
        means: dict[tuple[tuple[int, int], ...], float] = {(): 0.0}
        for idx in ordered:
            if shapes[idx] not in means:
                others = [other for other in ordered if other != idx][: count - 1]
                together = [module for chosen in (idx, *others) for module in layers[chosen]]
                rank = _matched_rank(together, limit, options)
                means[shapes[idx]] = _mean(layers[idx], [min(rank, ceiling) for _, ceiling in shapes[idx]])
        found[count] = {idx: means[shape] for idx, shape in enumerate(shapes)}
    return found


# --- allocations ------------------------------------------------------------------------------------------------


def uniform(anatomy: ModelAnatomy, layers: Sequence[int], options: AllocationOptions) -> tuple[ModuleRank, ...]:
    """``options.rank`` for every module."""
    modules = _modules(anatomy, layers, options)
    return _asked(modules, [options.rank] * len(modules), options)


def asymmetric(anatomy: ModelAnatomy, layers: Sequence[int], options: AllocationOptions) -> tuple[ModuleRank, ...]:
    """The paper's ranks by the kind of the weight: attention 16, MLP and experts 64, anything else ``options.rank``.

    Saket, "Aletheia", arXiv 2604.15351, asymmetric ranks. There the scale changes with the rank; here alpha follows it.
    """
    modules = _modules(anatomy, layers, options)
    return _asked(modules, [_by_kind(module, options) for module in modules], options)


def proportional(anatomy: ModelAnatomy, layers: Sequence[int], options: AllocationOptions) -> tuple[ModuleRank, ...]:
    """Ranks in proportion to ``options.module_scores`` within the parameters of ``uniform`` on the same layers.

    rank = c * score, rounded down to a power of two between ``min_rank`` and ``max_rank`` (64 where it is None), with
    one c for all modules: the largest that keeps the budget. So the order of modules does not matter, and modules
    with equal scores and sides get equal ranks.

    Raises:
        PlanError: If the profile is flat, a score is missing, negative or not finite, all are 0, or ``min_rank``
            alone is over the budget.
    """
    if options.is_flat:
        raise PlanError(
            "the profile is flat: the highest layer score is less than 2.5 times the lowest (max/min < 2.5). Ranks in "
            "proportion to such scores lost accuracy against one rank (arXiv 2605.07366). Use uniform."
        )
    modules = _modules(anatomy, layers, options)
    scores = _module_scores(modules, options)
    ceilings = [_power_of_two(min(module.max_rank, options.max_rank or PROPORTIONAL_CEILING)) for module in modules]
    least = 1 << (options.min_rank - 1).bit_length()
    floors = [min(least, ceiling) for ceiling in ceilings]
    limit = trainable_params(uniform(anatomy, layers, options))

    def ranks_at(scale: float) -> list[int]:
        wanted = (_power_of_two(min(scale * score, max(ceilings))) for score in scores)
        return [min(max(rank, low), high) for rank, low, high in zip(wanted, floors, ceilings, strict=True)]

    def params_at(scale: float) -> int:
        return sum(module.adapter_params(rank) for module, rank in zip(modules, ranks_at(scale), strict=True))

    if params_at(0.0) > limit:
        raise PlanError(
            f"min_rank={options.min_rank} alone takes {params_at(0.0):,} parameters, the budget of uniform rank "
            f"{options.rank} is {limit:,}. Raise rank."
        )
    # The total is a staircase in c. It can only rise where c * score reaches a power of two.
    powers = [2**exponent for exponent in range(max(ceilings).bit_length())]
    steps = sorted({power / score * (1 + 1e-12) for score in scores if score > 0 for power in powers})
    reached = bisect_right(steps, limit, key=params_at)
    return _ranked(modules, ranks_at(steps[reached - 1] if reached else 0.0), options)


def matched(anatomy: ModelAnatomy, layers: Sequence[int], options: AllocationOptions) -> tuple[ModuleRank, ...]:
    """One rank, the largest whose parameters do not exceed those of uniform LoRA over all layers at ``options.rank``.

    A module whose shorter side (or ``max_rank``) is below that rank gets what it can hold. With ``targets`` the
    uniform LoRA is that of the same targets.
    """
    modules = _modules(anatomy, layers, options)
    _asked(modules, [options.rank] * len(modules), options)  # refuse a baseline that could not exist
    rank = _matched_rank(modules, _uniform_params(anatomy, options), options)
    return _ranked(modules, [min(rank, _ceiling(module, options)) for module in modules], options)


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "asymmetric": asymmetric,
    "proportional": proportional,
    "matched": matched,
}


# --- inside -----------------------------------------------------------------------------------------------------


def _by_kind(module: ModuleAnatomy, options: AllocationOptions) -> int:
    by_kind = {"attention": options.attention_rank, "mlp": options.mlp_rank, "expert": options.mlp_rank}
    return by_kind.get(module.kind, options.rank)


def _ceiling(module: ModuleAnatomy, options: AllocationOptions) -> int:
    return min(module.max_rank, options.max_rank or module.max_rank)


def _uniform_params(anatomy: ModelAnatomy, options: AllocationOptions) -> int:
    """Trainable weights of uniform LoRA on the targets of all layers."""
    everywhere = [module for layer in anatomy.layers for module in layer.targeted(options.targets)]
    return sum(module.adapter_params(min(options.rank, module.max_rank)) for module in everywhere)


def _matched_rank(modules: Sequence[ModuleAnatomy], limit: int, options: AllocationOptions) -> int:
    """The largest rank whose adapters on these modules, cut at their ceilings, have at most ``limit`` weights."""
    shapes = Counter((module.adapter_params(1), _ceiling(module, options)) for module in modules)

    def params_at(rank: int) -> int:
        return sum(count * sides * min(rank, ceiling) for (sides, ceiling), count in shapes.items())

    return bisect_right(range(max(ceiling for _, ceiling in shapes) + 1), limit, key=params_at) - 1


def _mean(modules: Sequence[ModuleAnatomy], ranks: Sequence[int]) -> float:
    """Mean rank, weighted by in + out; 0 without modules."""
    params = sum(module.adapter_params(rank) for module, rank in zip(modules, ranks, strict=True))
    return params / (sum(module.adapter_params(1) for module in modules) or 1)


def _modules(anatomy: ModelAnatomy, layers: Sequence[int], options: AllocationOptions) -> list[ModuleAnatomy]:
    """The modules of these layers that the targets name, in order of depth."""
    present = [module for layer in layers for module in anatomy.layer(layer).modules]
    for target in options.targets or ():
        if not any(matches_target(module.name, target) for module in present):
            leaves = sorted({module.name.rpartition(".")[2] for module in present})
            raise PlanError(f"target {target!r} matches no module in layers {list(layers)}. {nearest(target, leaves)}")
    modules = [module for layer in layers for module in anatomy.layer(layer).targeted(options.targets)]
    if not modules:
        raise PlanError(f"layers {list(layers)} of {anatomy.architecture} hold no module that can be adapted.")
    return modules


def _asked(
    modules: Sequence[ModuleAnatomy], ranks: Sequence[int], options: AllocationOptions
) -> tuple[ModuleRank, ...]:
    """Ranks that the user asked for: refused, not lowered, where they do not fit."""
    for module, rank in zip(modules, ranks, strict=True):
        if rank > module.max_rank:
            raise PlanError(
                f"{module.name}: rank {rank} is larger than min(in, out) = {module.max_rank} of its "
                f"{module.in_features} x {module.out_features} weight. Lower the rank or leave the module out."
            )
        if options.max_rank is not None and rank > options.max_rank:
            raise PlanError(
                f"{module.name}: rank {rank} was asked for, but max_rank is {options.max_rank}. "
                "Lower the one or raise the other."
            )
    return _ranked(modules, ranks, options)


def _ranked(
    modules: Sequence[ModuleAnatomy], ranks: Sequence[int], options: AllocationOptions
) -> tuple[ModuleRank, ...]:
    return tuple(
        ModuleRank(
            name=module.name,
            layer_idx=module.layer_idx,
            kind=module.kind,
            rank=rank,
            alpha=_alpha(rank, options.alpha_ratio),
            num_params=module.adapter_params(rank),
        )
        for module, rank in zip(modules, ranks, strict=True)
    )


def _alpha(rank: int, ratio: float) -> float | int:
    alpha = rank * ratio
    return int(alpha) if float(alpha).is_integer() else alpha


def _module_scores(modules: Sequence[ModuleAnatomy], options: AllocationOptions) -> list[float]:
    if options.module_scores is None:
        raise PlanError("proportional ranks need a score for each module, got module_scores=None. Use uniform without.")
    for module in modules:
        score = options.module_scores.get(module.name)
        if score is None or not math.isfinite(score) or score < 0:
            raise PlanError(f"{module.name}: its score is {score}, expected a number >= 0. Probe the same model.")
    scores = [float(options.module_scores[module.name]) for module in modules]
    if not any(scores):
        raise PlanError("every module score is 0, so there is nothing to be proportional to. Use uniform.")
    return scores


def _power_of_two(value: float) -> int:
    """The largest power of two not above ``value``, or 0 below 1."""
    return 1 << (int(value).bit_length() - 1) if value >= 1 else 0


def mean_ranks(
    found: ModelAnatomy, ranks: Sequence[ModuleRank], targets: Sequence[str] | None = None
) -> dict[int, float]:
    """Each layer's mean rank over its targeted modules, weighted by in + out: what its adapters cost by."""
    params: Counter[int] = Counter()
    for entry in ranks:
        params[entry.layer_idx] += entry.num_params
    one = {layer: sum(module.adapter_params(1) for module in found.layer(layer).targeted(targets)) for layer in params}
    return {layer: params[layer] / one[layer] for layer in params}
