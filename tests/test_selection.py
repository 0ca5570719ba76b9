"""Strategies against brute force and written-out answers, and every refusal."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aletheia_lora.activations import LayerActivations
from aletheia_lora.allocation import AllocationOptions, ranks_by_count
from aletheia_lora.anatomy import anatomy
from aletheia_lora.cost import CostModel, StepShape, cost_model
from aletheia_lora.errors import PlanError
from aletheia_lora.memory import MemoryModel
from aletheia_lora.selection import (
    BUDGETED,
    STRATEGIES,
    LayerSelection,
    pareto,
    select,
    select_layers,
)
from aletheia_lora.selection_options import SelectionOptions

SCORES = {0: 1.0, 1: 4.0, 2: 2.0, 3: 3.0}
DEEP = {layer: float((layer * 7) % 30) for layer in range(30)}
CONTROLS = ["random", "bottom", "middle", "first", "last", "stride"]


def flat_cost(num_layers: int, adapter: float = 0.01) -> CostModel:
    ones = (1.0,) * num_layers
    return CostModel(ones, ones, (adapter,) * num_layers, 1.0, 2.0)


def random_cost(rng: np.random.Generator, num_layers: int, *, equal_adapters: bool) -> CostModel:
    forward, backward, adapters = rng.uniform(0.5, 2.0, size=(3, num_layers))
    if equal_adapters:
        adapters[:] = adapters[0]
    return CostModel(tuple(forward), tuple(backward), tuple(adapters / 16), float(rng.uniform(0, 3)), 5.0)


def best_by_brute_force(scores: dict[int, float], options: SelectionOptions) -> float:
    """The best affordable total score over all subsets of the layers, or 0."""
    assert options.cost is not None
    limit = options.time_budget * options.cost.uniform(rank=options.rank) * (1 + 1e-9)
    best = 0.0
    for size in range(1, (options.num_layers or len(scores)) + 1):
        for layers in itertools.combinations(scores, size):
            if options.cost.step(layers, rank=options.rank) <= limit:
                best = max(best, sum(scores[layer] for layer in layers))
    return best


# --- the documented call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, [1, 3]), (100, [0, 1, 2, 3]), (74.9, [1, 3]), (75, [1, 2, 3]), (1, [1])]
)
def test_select_layers_takes_the_best_rounded_down(percent: float, expected: list[int]) -> None:
    assert select_layers(SCORES, top_pct=percent) == expected


def test_select_layers_breaks_ties_towards_the_lower_layer() -> None:
    assert select_layers({3: 1.0, 2: 1.0, 1: 1.0, 0: 1.0}) == [0, 1]


def test_select_layers_takes_one_layer_of_one() -> None:
    assert select_layers({0: 0.0}, 1) == [0]


def test_select_layers_refuses_no_scores() -> None:
    with pytest.raises(ValueError, match="layer_scores must"):
        select_layers({})


@pytest.mark.parametrize("percent", [0, 0.99, 100.5, -5, math.nan])
def test_select_layers_refuses_a_percentage_out_of_range(percent: float) -> None:
    with pytest.raises(ValueError, match="top_pct"):
        select_layers(SCORES, top_pct=percent)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_select_layers_refuses_a_score_that_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match=r"layer_scores must be finite numbers, got (nan|inf) for layer 2"):
        select_layers({**SCORES, 2: bad})


# --- strategies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("top_percent", [1, 3]),
        ("above_median", [1, 3]),
        ("mass", [1, 2, 3]),
        ("bottom", [0, 2]),
        ("middle", [1, 2]),
        ("first", [0, 1]),
        ("last", [2, 3]),
        ("stride", [1, 3]),
        ("spread", [1, 3]),
        ("all", [0, 1, 2, 3]),
    ],
)
def test_a_strategy_gives_the_layers_worked_out_by_hand(strategy: str, expected: list[int]) -> None:
    assert STRATEGIES[strategy](SCORES, SelectionOptions()) == expected


@pytest.mark.parametrize("strategy", CONTROLS)
@pytest.mark.parametrize(
    "options", [SelectionOptions(percent=p) for p in (1, 33, 50, 100)] + [SelectionOptions(num_layers=7)]
)
def test_a_control_has_as_many_layers_as_the_rule_it_controls(strategy: str, options: SelectionOptions) -> None:
    layers = STRATEGIES[strategy](DEEP, options)
    assert len(layers) == len(set(layers)) == len(STRATEGIES["top_percent"](DEEP, options))
    assert layers == sorted(layers)
    assert set(layers) <= set(DEEP)


@pytest.mark.parametrize("strategy", ["random", "middle", "first", "last", "stride"])
def test_a_control_does_not_look_at_the_scores(strategy: str) -> None:
    other = {layer: -score for layer, score in DEEP.items()}
    assert STRATEGIES[strategy](DEEP, SelectionOptions()) == STRATEGIES[strategy](other, SelectionOptions())


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("random", "diverse", *BUDGETED)])
def test_the_order_of_the_scores_does_not_matter(strategy: str) -> None:
    turned = dict(reversed(DEEP.items()))
    assert STRATEGIES[strategy](turned, SelectionOptions()) == STRATEGIES[strategy](DEEP, SelectionOptions())


def test_stride_over_half_of_thirty_takes_every_second_layer() -> None:
    assert select(DEEP, "stride").layers == tuple(range(1, 30, 2))


def test_spread_takes_the_best_of_each_stretch_and_the_lower_of_equals() -> None:
    scores = dict(enumerate([9.0, 8.0, 7.0, 1.0, 1.0, 1.0, 0.1, 0.5]))
    assert select(scores, "top_percent", SelectionOptions(num_layers=3)).layers == (0, 1, 2)
    assert select(scores, "spread", SelectionOptions(num_layers=3)).layers == (0, 3, 7)  # of 0-2, 3-5 and 6-7
    assert select(scores, "spread", SelectionOptions(num_layers=4)).layers == (0, 2, 4, 7)


def test_random_repeats_under_one_seed_and_differs_under_another() -> None:
    first, again, other = (select(DEEP, "random", SelectionOptions(seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first.layers != other.layers


def test_mass_takes_the_fewest_layers_that_hold_the_share() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = dict(enumerate(rng.exponential(size=9).tolist()))
        layers = STRATEGIES["mass"](scores, SelectionOptions(mass=0.7))
        held = sum(scores[layer] for layer in layers)
        assert held >= 0.7 * sum(scores.values())
        assert max(map(sum, itertools.combinations(scores.values(), len(layers) - 1))) < 0.7 * sum(scores.values())


def test_mass_of_one_takes_every_layer_that_scores() -> None:
    assert STRATEGIES["mass"]({0: 0.1, 1: 0.0, 2: 0.2, 3: 0.3}, SelectionOptions(mass=1.0)) == [0, 2, 3]


def test_above_median_of_a_flat_profile_is_refused() -> None:
    with pytest.raises(PlanError, match="the profile is flat"):
        select({0: 1.0, 1: 1.0, 2: 1.0}, "above_median")


# --- budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal_adapters", [True, False])
@pytest.mark.parametrize("num_layers", [None, 2])
def test_budget_equals_brute_force_over_all_subsets(equal_adapters: bool, num_layers: int | None) -> None:
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(25):
        scores = dict(enumerate(rng.exponential(size=7).tolist()))
        cost = random_cost(rng, 7, equal_adapters=equal_adapters)
        share = float(rng.uniform(0.4, 1.0))
        options = SelectionOptions(time_budget=share, num_layers=num_layers, cost=cost)
        best = best_by_brute_force(scores, options)
        if best == 0:
            with pytest.raises(PlanError):
                select(scores, "budget", options)
            continue
        found += 1
        selection = select(scores, "budget", options)
        assert sum(scores[layer] for layer in selection.layers) == pytest.approx(best, rel=1e-12)
        assert selection.predicted_time_share <= share * (1 + 1e-6)  # the solver's tolerance
        assert len(selection.layers) <= (num_layers or 7)
    assert found >= 15


def test_each_number_of_layers_is_solved_at_its_own_rank() -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=8, num_attention_heads=4
    )
    with torch.device("meta"):
        found = anatomy(LlamaForCausalLM(config))
    cost = cost_model(found, StepShape(num_tokens=800, num_labelled_tokens=300, sequence_length=200))
    scores = dict(enumerate((1.81, 1.19, 2.83, 0.4, 0.92, 0.57, 0.63, 0.31)))
    ranks = ranks_by_count(found, "matched", AllocationOptions(rank=4))
    assert ranks is not None and ranks[8][0] == 4 and ranks[4][0] == 8
    subsets = [layers for size in range(1, 9) for layers in itertools.combinations(range(8), size)]
    shares = {layers: cost.share(layers, rank=ranks[len(layers)], uniform_rank=4) for layers in subsets}
    for time_budget in (0.45, 0.55, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0):
        options = SelectionOptions(time_budget=time_budget, rank=4, ranks=ranks, cost=cost)
        best = max(sum(scores[layer] for layer in layers) for layers in subsets if shares[layers] <= time_budget)
        made = select(scores, "budget", options)
        assert sum(scores[layer] for layer in made.layers) == pytest.approx(best, rel=1e-12)
        assert made.predicted_time_share == pytest.approx(shares[made.layers])


def test_budget_of_all_the_time_takes_all_layers() -> None:
    assert select(SCORES, "budget", SelectionOptions(time_budget=1.0, cost=flat_cost(4))).layers == (0, 1, 2, 3)


@pytest.mark.parametrize("percent", [25, 50, 100])
def test_budget_spread_starts_at_the_lowest_layer_that_the_budget_affords(percent: int) -> None:
    def spread_from(start: int) -> tuple[int, ...]:
        above = np.array_split(np.arange(start, 30), max((30 - start) * percent // 100, 1))
        return tuple(max(part.tolist(), key=lambda layer: DEEP[layer]) for part in above)

    lowest = []
    for share in (0.5, 0.6, 0.8, 1.0):
        options = SelectionOptions(percent=percent, time_budget=share, cost=flat_cost(30))
        made = select(DEEP, "budget_spread", options)
        start = next(start for start in range(30) if options.time_share(spread_from(start)) <= share)
        assert made.layers == spread_from(start) and made.predicted_time_share <= share
        lowest.append(made.lowest)
    assert lowest == sorted(lowest, reverse=True) and lowest[0] > lowest[-1]
    if percent == 100:
        assert made.layers == tuple(range(30))


@pytest.mark.parametrize(("percent", "step"), [(25, 4), (33, 3), (50, 2), (67, 1), (100, 1)])
def test_budget_stride_takes_every_nth_layer_from_the_lowest_that_the_budget_affords(percent: int, step: int) -> None:
    lowest = []
    for share in (0.5, 0.6, 0.8, 1.0):
        options = SelectionOptions(percent=percent, time_budget=share, cost=flat_cost(30))
        made = select(DEEP, "budget_stride", options)
        start = next(start for start in range(30) if options.time_share(range(start, 30, step)) <= share)
        assert made.layers == tuple(range(start, 30, step))
        assert select(dict.fromkeys(DEEP, 0.0), "budget_stride", options).layers == made.layers  # reads no score
        lowest.append(made.lowest)
    assert lowest == sorted(lowest, reverse=True) and lowest[0] > lowest[-1]
    few = SelectionOptions(percent=percent, num_layers=2, time_budget=1.0, cost=flat_cost(30))
    assert select(DEEP, "budget_stride", few).layers == tuple(range(0, 30, step))[-2:]


@pytest.mark.parametrize("strategy", BUDGETED)
def test_a_memory_budget_moves_the_choice_up(strategy: str) -> None:
    layers = (LayerActivations(1000, 10, 1),) * 30
    memory = MemoryModel(layers, (1,) * 30, 1000, 10, 100, 50, 900, 5, "traced")
    options: dict[str, Any] = {"time_budget": 1.0, "cost": flat_cost(30), "memory": memory}
    free = select(DEEP, strategy, SelectionOptions(**options))
    half = memory.step(free.layers, rank=16) // 2
    bound = select(DEEP, strategy, SelectionOptions(**options, memory_budget=half))
    assert bound.lowest > free.lowest and memory.step(bound.layers, rank=16) <= half


def test_budget_grows_with_time() -> None:
    rng = np.random.default_rng(1)
    scores, cost = dict(enumerate(rng.exponential(size=12).tolist())), random_cost(rng, 12, equal_adapters=True)
    kept = [
        select(scores, "budget", SelectionOptions(time_budget=share, cost=cost)).score_share
        for share in (0.6, 0.7, 0.8, 0.9, 1.0)
    ]
    assert kept == sorted(kept)
    assert kept[-1] == 1.0


def test_zero_gradient_layer_is_never_chosen() -> None:
    scores = {0: 0.0, 1: 1.0, 2: 0.0, 3: 1.0}
    assert select(scores, "budget", SelectionOptions(time_budget=1.0, cost=flat_cost(4))).layers == (1, 3)


def test_budget_prefers_the_higher_of_equal_scores() -> None:
    options = SelectionOptions(time_budget=0.99, num_layers=1, cost=flat_cost(4))
    assert select(dict.fromkeys(range(4), 1.0), "budget", options).layers == (3,)


@pytest.mark.parametrize("strategy", BUDGETED)
def test_budget_that_no_layer_fits_says_what_one_needs(strategy: str) -> None:
    cost = flat_cost(4)
    with pytest.raises(PlanError, match=r"time_budget=0\.1 .*0\.596 .*layer 3") as caught:
        select(SCORES, strategy, SelectionOptions(time_budget=0.1, cost=cost))
    assert 0.595 <= cost.share([3]) <= 0.596
    assert "Raise time_budget" in str(caught.value)


def test_budget_with_the_cost_of_a_real_architecture_stays_under_it() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    shape = StepShape(num_tokens=64, num_labelled_tokens=32, sequence_length=16)
    options = SelectionOptions(time_budget=0.7, rank=2, cost=cost_model(anatomy(model), shape))
    selection = select(SCORES, "budget", options)
    assert selection.predicted_time_share <= 0.7
    assert selection.score_share == pytest.approx(best_by_brute_force(SCORES, options) / 10)


# --- the frontier -------------------------------------------------------------------------------------------------


def test_no_subset_beats_the_frontier_where_adapters_cost_the_same() -> None:
    rng = np.random.default_rng(2)
    scores = dict(enumerate(rng.exponential(size=7).tolist()))
    cost = random_cost(rng, 7, equal_adapters=True)
    total = sum(scores.values())
    frontier = pareto(scores, SelectionOptions(cost=cost))
    for size in range(1, 8):
        for layers in itertools.combinations(range(7), size):
            kept, time = sum(scores[layer] for layer in layers) / total, cost.share(layers)
            assert any(p.score_share >= kept - 1e-12 and p.predicted_time_share <= time + 1e-12 for p in frontier)


def test_the_frontier_rises_in_time_and_score_and_ends_at_uniform() -> None:
    frontier = pareto(DEEP, SelectionOptions(cost=flat_cost(30)))
    for before, after in itertools.pairwise(frontier):
        assert before.predicted_time_share < after.predicted_time_share
        assert before.score_share < after.score_share
    assert all(point.lowest == point.layers[0] for point in frontier)
    assert frontier[-1].score_share == pytest.approx(1.0)


def test_the_frontier_holds_the_budgets_choice() -> None:
    options = SelectionOptions(time_budget=0.75, cost=flat_cost(30))
    chosen = select(DEEP, "budget", options)
    within = [point for point in pareto(DEEP, options) if point.predicted_time_share <= 0.75 + 1e-9]
    assert within[-1].score_share == pytest.approx(chosen.score_share)


def test_the_frontier_keeps_to_a_number_of_layers() -> None:
    frontier = pareto(DEEP, SelectionOptions(num_layers=3, cost=flat_cost(30)))
    assert max(len(point.layers) for point in frontier) == 3


# --- the record ---------------------------------------------------------------------------------------------------


def test_a_selection_says_itself_in_one_sentence() -> None:
    selection = LayerSelection("last", tuple(range(14, 30)), 30, 0.46, 1 / 1.93, 0)
    assert selection.describe() == "layers 14-29, backward stops at 14, predicted 1.93x, keeps 46 % of the score"


def test_a_sentence_joins_neighbours_and_admits_what_is_unknown() -> None:
    selection = LayerSelection("top_percent", (0, 1, 2, 3, 9, 11, 12), 30, math.nan, math.nan, 0)
    expected = "layers 0-3, 9, 11-12, backward runs to the first layer, speed not predicted, score unknown"
    assert selection.describe() == expected


def test_a_selection_without_a_cost_model_has_no_predicted_time() -> None:
    assert math.isnan(select(SCORES, "top_percent").predicted_time_share)


def test_a_selection_of_scores_without_a_positive_sum_has_no_share() -> None:
    assert math.isnan(select({0: -1.0, 1: 0.5}, "top_percent").score_share)


def test_a_selection_survives_json() -> None:
    selection = select(SCORES, "budget", SelectionOptions(time_budget=0.9, cost=flat_cost(4)))
    assert LayerSelection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection
    assert selection.lowest == selection.layers[0]


def test_null_in_a_saved_selection_is_nan() -> None:
    record = {**select(SCORES, "last").to_dict(), "predicted_time_share": None}
    assert math.isnan(LayerSelection.from_dict(record).predicted_time_share)


@pytest.mark.parametrize("layers", [[], [2, 1], [1, 1], [3, 4], [-1, 2]])
def test_an_edited_selection_that_cannot_be_is_refused(layers: list[int]) -> None:
    record = {**select(SCORES, "last").to_dict(), "layers": layers}
    with pytest.raises(PlanError, match="layers="):
        LayerSelection.from_dict(record)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_an_unknown_strategy_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'budget'"):
        select(SCORES, "budgte")


def test_budget_and_frontier_without_a_cost_model_are_refused() -> None:
    with pytest.raises(ValueError, match="cost model"):
        select(SCORES)
    with pytest.raises(ValueError, match="cost model"):
        pareto(SCORES, SelectionOptions())


def test_scores_of_another_depth_than_the_cost_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layers 0-3, the cost model is of layers 0-4"):
        select(SCORES, "last", SelectionOptions(cost=flat_cost(5)))


def test_more_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(PlanError, match=r"num_layers=5, but the model has 4 layers"):
        select(SCORES, "last", SelectionOptions(num_layers=5))


@pytest.mark.parametrize("strategy", ["mass", "budget"])
@pytest.mark.parametrize("scores", [{0: -1.0, 1: 2.0}, {0: 0.0, 1: 0.0}])
def test_a_share_of_scores_that_are_no_shares_is_refused(strategy: str, scores: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="scores >= 0"):
        select(scores, strategy, SelectionOptions(cost=flat_cost(2)))


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_nan_score_is_refused_by_every_strategy(strategy: str) -> None:
    with pytest.raises(ValueError, match="layer_scores must"):
        select({**SCORES, 1: math.nan}, strategy, SelectionOptions(cost=flat_cost(4)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"percent": 0},
        {"percent": 101},
        {"num_layers": 0},
        {"mass": 0.0},
        {"mass": 1.1},
        {"time_budget": 0.0},
        {"time_budget": math.nan},
        {"rank": 0},
        {"seed": -1},
    ],
)
def test_an_option_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SelectionOptions(**wrong)


# --- memory -------------------------------------------------------------------------------------------------------


def random_memory(rng: np.random.Generator, num_layers: int, *, equal: bool) -> MemoryModel:
    sizes = [tuple(int(size) for size in rng.integers(50, 200, size=3)) for _ in range(num_layers)]
    layers = [LayerActivations(*(sizes[0] if equal else entry)) for entry in sizes]
    params = tuple(1 if equal else int(count) for count in rng.integers(1, 20, size=num_layers))
    return MemoryModel(tuple(layers), params, 1000, 10, 100, 50, 900, 5, "traced")


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_time_and_memory_budgets_together_are_kept_exactly(seed: int, checkpointing: bool, equal: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = {layer: float(score) for layer, score in enumerate(rng.uniform(0, 1, size=7))}
    cost, memory = random_cost(rng, 7, equal_adapters=equal), random_memory(rng, 7, equal=equal)
    switches = {"checkpointing": checkpointing, "prefix_cached": seed % 2 == 0}
    for share in (0.45, 0.6, 0.8):
        budget = int(memory.step(range(7), checkpointing=checkpointing) * share)
        options = SelectionOptions(time_budget=0.9, memory_budget=budget, cost=cost, memory=memory, rank=16, **switches)
        fitting = [
            layers
            for size in range(1, 8)
            for layers in itertools.combinations(scores, size)
            if options.time_share(layers) <= 0.9 * (1 + 1e-9) and options.step_bytes(layers) <= budget
        ]
        if not fitting:
            with pytest.raises(PlanError, match=r"is below what one layer needs"):
                select(scores, "budget", options)
            continue
        made = select(scores, "budget", options)
        assert sum(scores[layer] for layer in made.layers) == pytest.approx(
            max(sum(scores[layer] for layer in layers) for layers in fitting), rel=1e-6
        )
        assert options.step_bytes(made.layers) <= budget * (1 + 1e-6)  # the solver's tolerance


def test_a_memory_budget_needs_a_memory_model() -> None:
    with pytest.raises(ValueError, match="a memory budget needs a memory model"):
        SelectionOptions(memory_budget=10)
