"""Allocations: the laws every one keeps, the answers worked out by hand, and every refusal."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from aletheia_lora.allocation import (
    ALLOCATIONS,
    AllocationOptions,
    allocate,
    mean_ranks,
    ranks_by_count,
    trainable_params,
)
from aletheia_lora.anatomy import LayerAnatomy, ModelAnatomy, ModuleAnatomy, anatomy
from aletheia_lora.errors import PlanError

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def tiny() -> ModelAnatomy:
    with torch.device("meta"):
        return anatomy(LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)))


def made_up(*layers: list[tuple[str, str, int, int]]) -> ModelAnatomy:
    """An anatomy from (leaf name, kind, in, out) of each layer's modules."""
    blocks = []
    for index, modules in enumerate(layers):
        found = tuple(
            ModuleAnatomy(f"layers.{index}.{leaf}", index, kind, "linear", rows, columns)  # type: ignore[arg-type]
            for leaf, kind, rows, columns in modules
        )
        blocks.append(LayerAnatomy(index, f"layers.{index}", sum(module.num_params for module in found), found))
    return ModelAnatomy("MadeUp", "made_up", 32, 64, tuple(blocks), (), 0, "ran")


def scored(model: ModelAnatomy, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {module.name: float(rng.exponential()) for module in model.modules}


def options_for(name: str, model: ModelAnatomy, **changes: Any) -> AllocationOptions:
    ranks = {"rank": 8, "attention_rank": 4, "mlp_rank": 16}
    return AllocationOptions(**{**ranks, "module_scores": scored(model), **changes})


# --- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ALLOCATIONS))
def test_every_module_of_the_chosen_layers_gets_a_rank_it_can_hold(tiny: ModelAnatomy, name: str) -> None:
    ranks = allocate(tiny, [3, 1], name, options_for(name, tiny))
    expected = [module for layer in (1, 3) for module in tiny.layers[layer].modules]
    assert [rank.name for rank in ranks] == [module.name for module in expected]
    for rank, module in zip(ranks, expected, strict=True):
        assert 1 <= rank.rank <= module.max_rank
        assert rank.num_params == module.adapter_params(rank.rank)
        assert rank.alpha == 2 * rank.rank
        assert isinstance(rank.alpha, int)
        assert (rank.layer_idx, rank.kind) == (module.layer_idx, module.kind)


def test_trainable_parameters_equal_those_of_plain_peft() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    ranks = allocate(anatomy(model), [1, 3], "uniform", AllocationOptions(rank=8))
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft_model = get_peft_model(model, LoraConfig(r=8, target_modules=leaves, layers_to_transform=[1, 3]))
    assert trainable_params(ranks) == peft_model.get_nb_trainable_parameters()[0]


def test_alpha_stays_a_fraction_where_it_is_one(tiny: ModelAnatomy) -> None:
    ranks = allocate(tiny, [0], "uniform", AllocationOptions(rank=3, alpha_ratio=0.5))
    assert {rank.alpha for rank in ranks} == {1.5}


# --- uniform and asymmetric ---------------------------------------------------------------------------------------


def test_uniform_gives_one_rank(tiny: ModelAnatomy) -> None:
    assert {rank.rank for rank in allocate(tiny, [0, 2], "uniform", AllocationOptions(rank=5))} == {5}


def test_asymmetric_goes_by_kind() -> None:
    model = made_up(
        [("q", "attention", 99, 99), ("up", "mlp", 99, 99), ("e", "expert", 99, 99), ("in", "mixer", 99, 99)]
    )
    ranks = allocate(model, [0], "asymmetric", AllocationOptions(rank=8))
    assert [(rank.kind, rank.rank, rank.alpha) for rank in ranks] == [
        ("attention", 16, 32),
        ("mlp", 64, 128),
        ("expert", 64, 128),
        ("mixer", 8, 16),
    ]


def test_asymmetric_counts_every_expert_of_a_stack() -> None:
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    with torch.device("meta"):
        model = anatomy(MixtralForCausalLM(config))
    experts = [r for r in allocate(model, [0], "asymmetric", AllocationOptions(mlp_rank=8)) if r.kind == "expert"]
    assert [rank.num_params for rank in experts] == [4 * 8 * (32 + 96), 4 * 8 * (48 + 32)]


# --- matched ------------------------------------------------------------------------------------------------------


def test_matched_over_half_of_equal_layers_doubles_the_rank(tiny: ModelAnatomy) -> None:
    ranks = allocate(tiny, [1, 2], options=AllocationOptions(rank=8))
    assert {rank.rank for rank in ranks} == {16}
    everywhere = allocate(tiny, range(4), "uniform", AllocationOptions(rank=8))
    assert trainable_params(ranks) == trainable_params(everywhere)


def test_matched_over_all_layers_is_uniform(tiny: ModelAnatomy) -> None:
    options = AllocationOptions(rank=7)
    assert allocate(tiny, range(4), "matched", options) == allocate(tiny, range(4), "uniform", options)


def test_matched_is_the_largest_rank_within_the_budget(tiny: ModelAnatomy) -> None:
    limit = trainable_params(allocate(tiny, range(4), "uniform", AllocationOptions(rank=4)))
    ranks = allocate(tiny, [0, 1, 3], "matched", AllocationOptions(rank=4))
    one_more = allocate(tiny, [0, 1, 3], "uniform", AllocationOptions(rank=ranks[0].rank + 1))
    assert trainable_params(ranks) <= limit < trainable_params(one_more)


def test_matched_spends_on_wide_modules_what_narrow_ones_cannot_hold() -> None:
    layer = [("narrow", "attention", 8, 100), ("wide", "mlp", 100, 100)]
    model = made_up(layer, layer, layer, layer)
    ranks = {r.name: r.rank for r in allocate(model, [3], "matched", AllocationOptions(rank=6))}
    budget = 4 * 6 * (108 + 200)
    assert ranks["layers.3.narrow"] == 8
    assert ranks["layers.3.wide"] == (budget - 8 * 108) // 200


def test_matched_stops_at_the_ceiling(tiny: ModelAnatomy) -> None:
    ranks = allocate(tiny, [3], "matched", AllocationOptions(rank=8, max_rank=16))
    assert {rank.rank for rank in ranks} == {16}


def test_matched_compares_the_same_targets(tiny: ModelAnatomy) -> None:
    ranks = allocate(tiny, [0, 1], "matched", AllocationOptions(rank=4, targets=("q_proj",)))
    assert [(rank.name.rpartition(".")[2], rank.rank) for rank in ranks] == [("q_proj", 8)] * 2


# --- proportional -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_proportional_keeps_the_budget_and_powers_of_two(tiny: ModelAnatomy, seed: int) -> None:
    options = AllocationOptions(rank=8, module_scores=scored(tiny, seed), min_rank=2)
    ranks = allocate(tiny, [0, 2, 3], "proportional", options)
    assert trainable_params(ranks) <= trainable_params(allocate(tiny, [0, 2, 3], "uniform", options))
    assert all(rank.rank & (rank.rank - 1) == 0 and rank.rank >= 2 for rank in ranks)


@pytest.mark.parametrize("seed", range(5))
def test_proportional_gives_no_less_to_a_higher_score(tiny: ModelAnatomy, seed: int) -> None:
    scores = scored(tiny, seed)
    ranks = allocate(tiny, [1], "proportional", AllocationOptions(rank=8, module_scores=scores))
    same_size = [rank for rank in ranks if "mlp" in rank.name]
    same_size.sort(key=lambda rank: scores[rank.name])
    assert [rank.rank for rank in same_size] == sorted(rank.rank for rank in same_size)


def test_proportional_equals_a_search_over_a_fine_grid_of_factors(tiny: ModelAnatomy) -> None:
    scores = scored(tiny, 3)
    options = AllocationOptions(rank=8, module_scores=scores, min_rank=2)
    modules = tiny.layers[0].modules
    limit = trainable_params(allocate(tiny, [0], "uniform", options))
    best: list[int] = []
    for factor in np.geomspace(1e-2, 1e4, 20_000):
        wanted = [2 ** math.floor(math.log2(factor * scores[module.name])) for module in modules]
        ranks = [int(min(max(rank, 2), module.max_rank)) for rank, module in zip(wanted, modules, strict=True)]
        if sum(module.adapter_params(rank) for module, rank in zip(modules, ranks, strict=True)) <= limit:
            best = ranks
    assert [rank.rank for rank in allocate(tiny, [0], "proportional", options)] == best


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_proportional_to_equal_scores_is_uniform(tiny: ModelAnatomy, rank: int) -> None:
    options = AllocationOptions(rank=rank, module_scores=dict.fromkeys(scored(tiny), 0.3))
    assert allocate(tiny, [0, 3], "proportional", options) == allocate(tiny, [0, 3], "uniform", options)


def test_proportional_does_not_depend_on_the_scale_of_the_scores(tiny: ModelAnatomy) -> None:
    small, large = (
        AllocationOptions(rank=8, module_scores={name: unit * score for name, score in scored(tiny).items()})
        for unit in (2.0**-20, 2.0**20)
    )
    assert allocate(tiny, [0, 1], "proportional", small) == allocate(tiny, [0, 1], "proportional", large)


def test_proportional_stays_between_floor_and_ceiling(tiny: ModelAnatomy) -> None:
    scores = dict.fromkeys(scored(tiny), 1e-300)
    scores["model.layers.0.self_attn.q_proj"] = 1e300
    ranks = allocate(tiny, [0], "proportional", AllocationOptions(rank=8, module_scores=scores, max_rank=16))
    assert {rank.name.rpartition(".")[2]: rank.rank for rank in ranks} == {
        **dict.fromkeys(["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 4),
        "q_proj": 16,
    }


def test_proportional_refuses_a_flat_profile(tiny: ModelAnatomy) -> None:
    with pytest.raises(PlanError, match=r"the profile is flat.*2605\.07366.*Use uniform"):
        allocate(tiny, [0], "proportional", options_for("proportional", tiny, is_flat=True))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, "module_scores=None"),
        ({}, r"layers\.0\.self_attn\.q_proj: its score is None"),
        (math.nan, "its score is nan"),
        (-1.0, r"its score is -1\.0"),
        (0.0, "every module score is 0"),
    ],
)
def test_proportional_refuses_scores_it_cannot_use(tiny: ModelAnatomy, scores: Any, message: str) -> None:
    module_scores = dict.fromkeys(scored(tiny), scores) if isinstance(scores, float) else scores
    with pytest.raises(PlanError, match=message):
        allocate(tiny, [0], "proportional", AllocationOptions(rank=8, module_scores=module_scores))


def test_proportional_refuses_a_floor_above_the_budget(tiny: ModelAnatomy) -> None:
    with pytest.raises(PlanError, match=r"min_rank=8 alone takes"):
        allocate(tiny, [0], "proportional", options_for("proportional", tiny, rank=4, min_rank=8))


# --- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), ["self_attn.q_proj"]),
        (("mlp.up_proj",), ["mlp.up_proj"]),
        (("model.layers.2.mlp.up_proj", "k_proj"), ["self_attn.k_proj", "mlp.up_proj"]),
    ],
)
def test_targets_leave_only_what_they_name(tiny: ModelAnatomy, targets: tuple[str, ...], expected: list[str]) -> None:
    ranks = allocate(tiny, [2], "uniform", AllocationOptions(rank=4, targets=targets))
    assert [rank.name for rank in ranks] == [f"model.layers.2.{name}" for name in expected]


@pytest.mark.parametrize("target", ["qproj", "model.layers.0.self_attn.q_proj", "q"])
def test_a_target_that_matches_nothing_in_the_layers_is_refused(tiny: ModelAnatomy, target: str) -> None:
    with pytest.raises(PlanError, match=f"target '{target}' matches no module in layers .*_proj"):
        allocate(tiny, [1, 2], "uniform", AllocationOptions(rank=4, targets=("up_proj", target)))


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rank", "attention_rank", "mlp_rank", "max_rank", "min_rank"])
def test_a_rank_of_zero_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=f"got {name} 0"):
        AllocationOptions(**{name: 0})


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_ratio_that_is_no_scale_is_refused(ratio: float) -> None:
    with pytest.raises(PlanError, match="alpha_ratio"):
        AllocationOptions(alpha_ratio=ratio)


@pytest.mark.parametrize("name", ["uniform", "asymmetric", "matched"])
def test_a_rank_that_a_module_cannot_hold_is_refused_by_its_name(tiny: ModelAnatomy, name: str) -> None:
    options = AllocationOptions(rank=17, attention_rank=17, mlp_rank=16)
    with pytest.raises(PlanError, match=r"layers\.0\.self_attn\.k_proj: rank 17 is larger than min\(in, out\) = 16"):
        allocate(tiny, [0], name, options)


def test_a_rank_above_the_ceiling_is_refused(tiny: ModelAnatomy) -> None:
    with pytest.raises(PlanError, match="rank 16 was asked for, but max_rank is 8"):
        allocate(tiny, [0], "uniform", AllocationOptions(rank=16, max_rank=8))


@pytest.mark.parametrize(
    ("layers", "message"),
    [([], "no layers were chosen"), ([0, 4], "layer 4 does not exist"), ([1, 1], "more than once")],
)
def test_layers_that_do_not_fit_the_model_are_refused(tiny: ModelAnatomy, layers: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        allocate(tiny, layers)


def test_layers_without_anything_to_adapt_are_refused() -> None:
    with pytest.raises(PlanError, match=r"layers \[1\] of MadeUp hold no module"):
        allocate(made_up([("q", "attention", 32, 32)], []), [1])


def test_an_unknown_allocation_names_the_nearest(tiny: ModelAnatomy) -> None:
    with pytest.raises(ValueError, match="Did you mean 'matched'"):
        allocate(tiny, [0], "matchd")


def test_ranks_by_count_are_those_of_any_choice_of_so_many_equal_layers(tiny: ModelAnatomy) -> None:
    for name in ("matched", "asymmetric"):
        options = options_for(name, tiny)
        counted = ranks_by_count(tiny, name, options)
        assert counted is not None
        for layers in ([0], [1, 3], [0, 1, 2], [0, 1, 2, 3]):
            ranks = mean_ranks(tiny, allocate(tiny, layers, name, options))
            assert {layer: counted[len(layers)][layer] for layer in layers} == ranks
    assert ranks_by_count(tiny, "uniform", AllocationOptions()) is None


def test_ranks_by_count_are_never_below_those_of_a_choice_of_unequal_layers() -> None:
    small, large = [("q", "attention", 16, 16)], [("q", "attention", 32, 32), ("up", "mlp", 32, 64)]
    model = made_up(small, large, small, large, [])
    counted = ranks_by_count(model, "matched", AllocationOptions(rank=4))
    assert counted is not None and counted[1][4] == 0.0
    for layers in (subset for size in range(1, 5) for subset in itertools.combinations(range(4), size)):
        ranks = mean_ranks(model, allocate(model, layers, "matched", AllocationOptions(rank=4)))
        assert all(counted[len(layers)][layer] >= rank for layer, rank in ranks.items())
        if len(layers) == 1:
            assert counted[1][layers[0]] == ranks[layers[0]]
