"""Scores (and the cost of a step) -> the layers to adapt.

Comes in: ``{layer_idx: score}`` and :class:`SelectionOptions`. Goes out: a sorted list of layers, or with
:func:`select` a :class:`LayerSelection` that can be saved, read and edited. Reading :data:`STRATEGIES` is reading the
table of strategies: the paper's, ours (``budget``), and the controls that any of them has to beat.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import PlanError, nearest
from .knapsack import ROUNDING, best_affordable
from .redundancy import greedy, similarities
from .selection_options import SelectionOptions, check_percent

if TYPE_CHECKING:
    from .cost import CostModel


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """The layers to adapt, how they were chosen, and what to expect of them."""

    strategy: str
    layers: tuple[int, ...]
    num_layers: int
    """Layers of the model, chosen or not."""
    score_share: float
    """Share of the total score that the chosen layers hold, 0 to 1; NaN where the scores have no positive sum."""
    predicted_time_share: float
    """Predicted step time, at the ranks that go with the choice, against uniform LoRA; NaN without a cost model."""
    seed: int

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise PlanError(f"layers={self.layers}: expected at least one layer, in ascending order, each once.")
        if self.layers[0] < 0 or self.layers[-1] >= self.num_layers:
            raise PlanError(f"layers={self.layers}: expected layers between 0 and {self.num_layers - 1}.")

    @property
    def lowest(self) -> int:
        """m, the lowest chosen layer: backward stops there."""
        return self.layers[0]

    def describe(self, when: str = "") -> str:
        """One sentence for people; ``when`` says of which steps the speed is, where not of all."""
        stop = f"backward stops at {self.lowest}" if self.lowest else "backward runs to the first layer"
        known = not math.isnan(self.predicted_time_share)
        speed = f"predicted {1 / self.predicted_time_share:.2f}x{when}" if known else "speed not predicted"
        kept = "score unknown" if math.isnan(self.score_share) else f"keeps {100 * self.score_share:.0f} % of the score"
        noun = "layers" if len(self.layers) > 1 else "layer"
        return f"{noun} {_ranges(self.layers)}, {stop}, {speed}, {kept}"

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return {**asdict(self), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LayerSelection:
        """Read back what :meth:`to_dict` wrote; JSON's null is NaN.

        Raises:
            PlanError: If the layers are not an ascending list within the model.
        """
        shares = {
            name: math.nan if record[name] is None else record[name] for name in ("score_share", "predicted_time_share")
        }
        return cls(**{**record, **shares, "layers": tuple(record["layers"])})


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """A choice that no other beats on both score and time."""

    lowest: int
    layers: tuple[int, ...]
    score_share: float
    """Share of the total score kept, 0 to 1."""
    predicted_time_share: float
    """Predicted step time, at the ranks that go with so many layers, against uniform LoRA."""


Strategy = Callable[[Mapping[int, float], SelectionOptions], list[int]]


def select_layers(layer_scores: Mapping[int, float], top_pct: float = 50) -> list[int]:
    """The best-scoring ``max(int(L * top_pct / 100), 1)`` of L layers, in ascending order.

    The paper's rule (Saket, "Aletheia", arXiv 2604.15351). Of layers with equal scores the lower comes first.

    Args:
        layer_scores: ``{layer_idx: score}``.
        top_pct: Percent of the layers to choose, 1 to 100.

    Raises:
        ValueError: If there are no scores, a score is not a finite number, or ``top_pct`` is out of range.
    """
    check_percent("top_pct", top_pct)
    scores = _checked(layer_scores)
    return sorted(_best_first(scores)[: max(int(len(scores) * top_pct / 100), 1)])


def select(
    scores: Mapping[int, float], strategy: str = "budget", options: SelectionOptions | None = None
) -> LayerSelection:
    """Choose layers by the strategy of this name in :data:`STRATEGIES`.

    Args:
        scores: ``{layer_idx: score}`` of every layer.
        strategy: A key of :data:`STRATEGIES`.
        options: What the strategy needs to know.

    Raises:
        ValueError: If no strategy has this name, it lacks an option, or the scores are empty or not finite.
        PlanError: If the strategy finds no layers under these options.
    """
    options = options or SelectionOptions()
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}. {nearest(strategy, STRATEGIES)}")
    scores = _checked(scores)
    layers = STRATEGIES[strategy](scores, options)
    total = math.fsum(scores.values())
    kept = math.fsum(scores[layer] for layer in layers)
    time_share = math.nan
    if options.cost is not None:
        _cost_of(scores, options)
        time_share = options.time_share(layers)
    return LayerSelection(
        strategy=strategy,
        layers=tuple(layers),
        num_layers=len(scores),
        score_share=kept / total if total > 0 else math.nan,
        predicted_time_share=time_share,
        seed=options.seed,
    )


# --- strategies -------------------------------------------------------------------------------------------------


def top_percent(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """The k best, the paper's rule."""
    return sorted(_best_first(scores)[: _count(scores, options)])


def above_median(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """Every layer that scores above the median, the threshold named in the paper's review.

    Raises:
        PlanError: If no layer does, because too many share the highest score.
    """
    median = float(np.median(list(scores.values())))
    layers = sorted(layer for layer, score in scores.items() if score > median)
    if not layers:
        raise PlanError(f"no layer scores above the median, {median:g}: the profile is flat. Use stride.")
    return layers


def mass(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """The fewest layers that hold a share ``options.mass`` of the total score: how concentrated it is.

    Raises:
        ValueError: If a score is negative or all are 0.
    """
    _check_shares(scores)
    order = _best_first(scores)
    held = np.cumsum([scores[layer] for layer in order])
    count = int(np.searchsorted(held, options.mass * held[-1] * (1 - ROUNDING))) + 1
    return sorted(order[:count])


def budget(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """The best total score whose predicted step keeps ``options.time_budget`` and ``options.memory_budget``.

    Ours, and exact: for every possible lowest layer m, the best-scoring affordable subset of the layers m and above;
    of these the best total, on a tie that with the larger m. Where the layers' adapters cost the same a sort finds
    the subset; else it is a knapsack, solved to one millionth of the budgets. A layer that scores 0 is never chosen.
    Where ``options.ranks`` makes prices depend on the number of layers, each number is solved at its own, and on a tie
    the fewest layers win.

    Raises:
        ValueError: If there is no cost model, a score is negative, or all are 0.
        PlanError: If not even one layer fits; says the smallest budget that one does.
    """
    cost = _cost_of(scores, options)
    _check_shares(scores)
    most = min(options.num_layers or cost.num_layers, cost.num_layers)
    counts = [(1, most)] if options.ranks is None else [(count, count) for count in range(1, most + 1)]
    best: list[int] = []
    for at_least, at_most in counts:
        best = _better(best, scores, options, at_least, at_most)
    if not best:
        raise _no_layer_fits([layer for layer, score in scores.items() if score > 0], options)
    return best


def budget_spread(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """As ``spread``, from the lowest layer up that the budgets afford; ``options.percent`` of the layers above it.

    Ours, and tried: not shown to learn more than what it was compared with (docs/findings.md).

    Raises:
        ValueError: If there is no cost model.
        PlanError: If not even one layer fits; says the smallest budget that one does.
    """
    layers = sorted(scores)

    def above(start: int) -> list[int]:
        count = max(int((len(layers) - start) * options.percent / 100), 1)
        return _best_of_stretches(scores, layers[start:], min(count, options.num_layers or count))

    return _first_affordable(above, scores, options)


def budget_stride(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """Every n-th layer, n = 100 / ``options.percent``, from the lowest up that the budgets afford; no score is read.

    Ours: few layers with high ranks, spread above the lowest one that the time allows. Of more than
    ``options.num_layers`` the upper ones. docs/findings.md says what it was shown to be worth.

    Raises:
        ValueError: If there is no cost model.
        PlanError: If not even one layer fits; says the smallest budget that one does.
    """
    layers, step = sorted(scores), max(round(100 / options.percent), 1)
    return _first_affordable(lambda start: layers[start::step][-(options.num_layers or 0) :], scores, options)


def _first_affordable(
    above: Callable[[int], list[int]], scores: Mapping[int, float], options: SelectionOptions
) -> list[int]:
    """The choice above the lowest start with which it keeps both budgets."""
    _cost_of(scores, options)
    for start in range(len(scores)):
        chosen = above(start)
        quick = options.time_share(chosen) <= options.time_budget * (1 + ROUNDING)
        if quick and (options.memory_budget is None or options.step_bytes(chosen) <= options.memory_budget):
            return chosen
    raise _no_layer_fits(sorted(scores), options)


def _no_layer_fits(layers: Sequence[int], options: SelectionOptions) -> PlanError:
    shares = {layer: options.time_share([layer]) for layer in layers}
    needed = {} if options.memory_budget is None else {layer: options.step_bytes([layer]) for layer in layers}
    return nothing_fits(shares, needed, options.time_budget, options.memory_budget)


def nothing_fits(
    shares: Mapping[int, float],
    needed: Mapping[int, int],
    time_budget: float,
    memory_budget: int | None,
    *,
    with_ranks: str = "",
) -> PlanError:
    """The error for a budget that no layer fits alone, with the least that one would.

    Args:
        shares: Predicted step time of each layer alone, as a share of uniform LoRA's.
        needed: Predicted bytes of each layer alone; empty where memory has no limit.
        time_budget: What was allowed.
        memory_budget: Likewise, in bytes.
        with_ranks: Which ranks that was predicted for, in words.
    """
    quick = [layer for layer, share in shares.items() if share <= time_budget * (1 + ROUNDING)]
    if not quick or memory_budget is None:
        smallest, layer = min((share, layer) for layer, share in shares.items())
        return PlanError(
            f"time_budget={time_budget} is below what one layer needs: "
            f"{math.ceil(1000 * smallest) / 1000:.3f} of uniform LoRA's step time (layer {layer}{with_ranks}). "
            "Raise time_budget to at least that."
        )
    least, layer = min((needed[layer], layer) for layer in quick)
    return PlanError(
        f"memory_budget={memory_budget} bytes is below what one layer needs within time_budget={time_budget}: "
        f"{least} bytes, {math.ceil(least / 2**20)}MiB (layer {layer}{with_ranks}). Raise memory_budget to at least "
        "that, shorten the batch, or turn on gradient_checkpointing."
    )


def random(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """Control: k layers drawn by ``options.seed``."""
    rng = np.random.default_rng(options.seed)
    return sorted(rng.choice(sorted(scores), size=_count(scores, options), replace=False).tolist())


def bottom(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """Control: the k lowest-scoring layers, on a tie the lower layer."""
    return sorted(sorted(sorted(scores), key=lambda layer: scores[layer])[: _count(scores, options)])


def middle(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """Control: k layers around the middle of the depth."""
    start = (len(scores) - (count := _count(scores, options))) // 2
    return sorted(scores)[start : start + count]


def first(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """Control: the first k layers."""
    return sorted(scores)[: _count(scores, options)]


def last(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """Control: the last k layers, the cheapest choice of k."""
    return sorted(scores)[-_count(scores, options) :]


def stride(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """Control: k layers evenly spread over the depth, the last layer among them."""
    layers, count = sorted(scores), _count(scores, options)
    return sorted(layers[-1 - step * len(layers) // count] for step in range(count))


def spread(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """The best-scoring layer of each of k equal stretches of the depth: a score's choice without heaps."""
    return _best_of_stretches(scores, sorted(scores), _count(scores, options))


def _best_of_stretches(scores: Mapping[int, float], layers: Sequence[int], count: int) -> list[int]:
    return [max(stretch.tolist(), key=lambda layer: scores[layer]) for stretch in np.array_split(layers, count)]


def diverse(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """Greedily the best score * (1 - largest similarity of gradients to a layer chosen before): no two say the same.

    Raises:
        ValueError: If there are no kernels, they are of another number of layers, or a score is negative.
        ProbeError: If the kernels are of fewer than three batches, or a layer's gradient is the same on all of them.
    """
    kernels = options.kernels
    if kernels is None:
        raise ValueError("diverse compares gradients: expected options.kernels, got None. Probe with kernels=True.")
    if len(kernels) != len(scores):
        raise ValueError(f"{len(scores)} scores, but kernels of {len(kernels)} layers. Take both from the same probe.")
    if min(scores.values()) < 0:
        raise ValueError(
            f"diverse weighs scores: expected none below 0, got {min(scores.values()):g}. Use spread, which does not."
        )
    return greedy(scores, similarities(kernels), _count(scores, options))


def all_layers(scores: Mapping[int, float], options: SelectionOptions) -> list[int]:
    """Every layer: uniform LoRA."""
    return sorted(scores)


STRATEGIES: dict[str, Strategy] = {
    "top_percent": top_percent,
    "above_median": above_median,
    "mass": mass,
    "budget": budget,
    "budget_spread": budget_spread,
    "budget_stride": budget_stride,
    "random": random,
    "bottom": bottom,
    "middle": middle,
    "first": first,
    "last": last,
    "stride": stride,
    "spread": spread,
    "diverse": diverse,
    "all": all_layers,
}
# These read scores: they need a probe.
SCORED = ("top_percent", "above_median", "mass", "budget", "budget_spread", "bottom", "spread", "diverse")
NOT_SHOWN = "that layers chosen by such scores learn more than as many random ones has not been shown"
# These keep a time and a memory budget.
BUDGETED = ("budget", "budget_spread", "budget_stride")


def pareto(scores: Mapping[int, float], options: SelectionOptions) -> list[ParetoPoint]:
    """The choices worth considering, from the fastest to the one that keeps the most score.

    Every lowest layer m is combined with every number of best-scoring layers from m up; kept are those that no other
    beats in both score and predicted time, each at the rank of so many layers. Where adapters cost the same in every
    layer this is the whole frontier. A memory budget is not looked at.

    Args:
        scores: ``{layer_idx: score}`` of every layer.
        options: ``cost``, ``rank`` and ``ranks``; ``num_layers``, where given, bounds the number of layers.

    Raises:
        ValueError: If there is no cost model, a score is negative, or all are 0.
    """
    scores = _checked(scores)
    cost = _cost_of(scores, options)
    _check_shares(scores)
    total, uniform = math.fsum(scores.values()), options.uniform_cost
    points = []
    for lowest in range(cost.num_layers):
        order = _best_first({layer: scores[layer] for layer in range(lowest, cost.num_layers)})
        base = cost.without_adapters(lowest, checkpointing=options.checkpointing, prefix_cached=options.prefix_cached)
        for count in range(1, min(len(order), options.num_layers or len(order)) + 1):
            layers = tuple(sorted(order[:count]))
            if layers[0] == lowest:  # any other is counted, cheaper, where its own lowest layer is
                rank = options.rank_of(count)
                adapters = cost.adapters(layers, rank=rank, checkpointing=options.checkpointing)
                time_share = (base + adapters) / uniform
                score_share = math.fsum(scores[layer] for layer in layers) / total
                points.append(ParetoPoint(lowest, layers, score_share, time_share))
    frontier: list[ParetoPoint] = []
    for point in sorted(points, key=lambda point: (point.predicted_time_share, -point.score_share)):
        if point.score_share > (frontier[-1].score_share if frontier else 0.0):
            frontier.append(point)
    return frontier


# --- inside -----------------------------------------------------------------------------------------------------


def _better(
    best: list[int], scores: Mapping[int, float], options: SelectionOptions, at_least: int, at_most: int
) -> list[int]:
    """The best affordable choice of so many layers, if it scores higher than ``best``; else that."""
    cost, memory = _cost_of(scores, options), options.memory
    rank, checkpointing, cached = options.rank_of(at_most), options.checkpointing, options.prefix_cached
    everything = range(cost.num_layers)
    prices: list[list[float]] = [
        [cost.adapters([layer], rank=rank, checkpointing=checkpointing) for layer in everything]
    ]
    limit = options.time_budget * options.uniform_cost * (1 + ROUNDING)
    total = math.fsum(scores[layer] for layer in best)
    if options.memory_budget is not None and memory is not None:
        prices.append([memory.adapters([layer], rank=rank, checkpointing=checkpointing) for layer in everything])
    for lowest in reversed(everything):
        candidates = [layer for layer in everything[lowest:] if scores[layer] > 0]
        highest = sorted((scores[layer] for layer in candidates), reverse=True)[:at_most]
        if math.fsum(highest) <= total:
            continue
        money = [limit - cost.without_adapters(lowest, checkpointing=checkpointing, prefix_cached=cached)]
        if options.memory_budget is not None and memory is not None:
            bare = memory.without_adapters(lowest, rank=rank, checkpointing=checkpointing, prefix_cached=cached)
            money.append(options.memory_budget - bare)
        of_candidates = [[row[layer] for layer in candidates] for row in prices]
        worth = [scores[layer] for layer in candidates]
        chosen = best_affordable(worth, of_candidates, money, at_least=at_least, at_most=at_most)
        if math.fsum(worth[index] for index in chosen) > total:
            best = [candidates[index] for index in chosen]
            total = math.fsum(scores[layer] for layer in best)
    return best


def _best_first(scores: Mapping[int, float]) -> list[int]:
    """Layers from the best to the worst score; of equal scores the lower layer first."""
    return sorted(sorted(scores), key=lambda layer: -scores[layer])


def _count(scores: Mapping[int, float], options: SelectionOptions) -> int:
    """k, the number of layers that ``top_percent`` and every control choose."""
    if options.num_layers is None:
        return max(int(len(scores) * options.percent / 100), 1)
    if options.num_layers > len(scores):
        raise PlanError(f"num_layers={options.num_layers}, but the model has {len(scores)} layers. Ask for fewer.")
    return options.num_layers


def _cost_of(scores: Mapping[int, float], options: SelectionOptions) -> CostModel:
    if options.cost is None:
        raise ValueError("a time budget needs a cost model: expected options.cost, got None. Pass cost_model(...).")
    if sorted(scores) != list(range(options.cost.num_layers)):
        raise ValueError(
            f"scores are of layers {_ranges(sorted(scores))}, the cost model is of layers "
            f"0-{options.cost.num_layers - 1}. Make both from the same model."
        )
    return options.cost


def _checked(layer_scores: Mapping[int, float]) -> dict[int, float]:
    """The scores as a plain dict, because a probe result computes each one anew."""
    scores = {int(layer): float(score) for layer, score in layer_scores.items()}
    if not scores:
        raise ValueError("layer_scores must hold a score for at least one layer, got none. Pass a probe's result.")
    for layer, score in scores.items():
        if not math.isfinite(score):
            raise ValueError(f"layer_scores must be finite numbers, got {score} for layer {layer}. Probe again.")
    return scores


def _check_shares(scores: Mapping[int, float]) -> None:
    if min(scores.values()) < 0 or not any(scores.values()):
        raise ValueError(
            "shares of a total need scores >= 0 that are not all 0, "
            f"got {min(scores.values()):g} to {max(scores.values()):g}. Use top_percent, which only compares."
        )


def _ranges(layers: Sequence[int]) -> str:
    """(0, 1, 2, 3, 9, 11, 12) -> "0-3, 9, 11-12"."""
    groups = itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
    runs = [[layer for _, layer in group] for _, group in groups]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
