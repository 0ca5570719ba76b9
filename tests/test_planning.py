import copy
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from aletheia_lora.adapter import check_census
from aletheia_lora.allocation import ALLOCATIONS, allocate, mean_ranks
from aletheia_lora.anatomy import anatomy
from aletheia_lora.data import batches, tokenize
from aletheia_lora.errors import DataError, PlanError, ProbeError
from aletheia_lora.plan_options import PlanOptions
from aletheia_lora.planning import Plan, allocation_options, plan, plan_from_probe
from aletheia_lora.prediction import probe_cost
from aletheia_lora.probe import probe
from aletheia_lora.scores import SCORES, layer_scores
from aletheia_lora.selection import BUDGETED, STRATEGIES
from families import build
from tiny_inputs import word_tokenizer

FAMILIES = ("llama", "gpt2", "phi3", "mixtral", "qwen3_moe", "mamba")
SMALL = {"probe_batches": 2, "rank": 4, "attention_rank": 2, "mlp_rank": 8}


@pytest.fixture(scope="module")
def rows(tokenized_rows):
    return tokenize(tokenized_rows(8, min_length=8, max_length=16, num_prompt_tokens=4), None)


@pytest.fixture(scope="module")
def llama_plan(rows):
    return plan(build("llama"), rows, **SMALL, strategy="top_percent")


@pytest.fixture(scope="module")
def measured(rows):
    model = build("llama")  # with a probe that has everything that any score is made of
    return model, anatomy(model), probe(model, list(batches(rows, 4, 0)), taylor=True, descent=True)


def steepened(measured, factor=3.0):
    """The same probe with a profile that rises with depth and is not flat."""
    model, found, result = measured
    tensors = tuple(
        replace(tensor, grad_norm=tuple(norm * factor**tensor.layer_idx for norm in tensor.grad_norm))
        for tensor in result.tensors
    )
    return model, found, replace(result, tensors=tensors)


# --- making a plan ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_of_any_family_survives_saving_and_is_attached_by_stock_peft(family, rows, tmp_path):
    model = build(family)
    made = plan(model, rows, **SMALL, time_budget=0.9)
    loaded = Plan.load(made.save(tmp_path / "plan.json"))
    assert loaded == made
    assert loaded.to_dict() == made.to_dict()
    assert loaded.probe.tensors == made.probe.tensors
    config = loaded.lora_config()
    assert isinstance(config, LoraConfig)
    entries = check_census(get_peft_model(model, config), loaded.ranks)
    assert sum(entry.num_params for entry in entries) == loaded.trainable_params == made.trainable_params


@pytest.mark.parametrize("training", [True, False])
def test_planning_leaves_the_model_and_the_random_numbers_as_found(rows, training):
    model = build("gpt2").train(training)  # with dropout
    model.transformer.h[1].requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = copy.deepcopy(model)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    plan(model, rows, **SMALL, strategy="random", score="random")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old) and parameter.requires_grad == old.requires_grad, name
    assert model.lm_head.weight.grad is not None and bool((model.lm_head.weight.grad == 1).all())
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model, "peft_config")


def test_planning_from_a_probe_does_not_change_the_probe(measured):
    model, found, result = measured
    before = result.to_dict()
    for strategy, allocation in itertools.product(("budget", "top_percent", "mass"), ("matched", "asymmetric")):
        options = PlanOptions(**SMALL, strategy=strategy, allocation=allocation, time_budget=0.9)
        plan_from_probe(found, result, options, model=model)
    assert result.to_dict() == before


def test_the_same_seed_gives_the_same_plan_and_another_seed_other_rows(rows):
    model = build("llama")
    counted = {**SMALL, "strategy": "random", "num_layers": 2, "calibrate": False}  # a clock has no seed
    first, again, other = (plan(model, rows, **counted, seed=seed) for seed in (3, 3, 4))
    assert again.scores == first.scores and again.ranks == first.ranks and again.selection == first.selection
    assert other.probe.losses != first.probe.losses


def test_rows_may_be_plain_dicts_and_fewer_than_the_batches_asked_for(tokenized_rows):
    made = plan(build("llama"), tokenized_rows(3), rank=4, time_budget=0.9)
    assert made.probe.num_batches == 3
    with pytest.raises(DataError, match="no rows"):
        plan(build("llama"), [])
    with pytest.raises(DataError, match="expected at least one full batch"):
        plan(build("llama"), tokenized_rows(3), probe_batch_size=0)


def test_raw_rows_are_tokenized_with_the_given_tokenizer():
    raw = [{"prompt": f"w{10 + i} w20", "completion": f" w{30 + i} w31"} for i in range(4)]
    made = plan(build("llama"), raw, tokenizer=word_tokenizer(), **SMALL, time_budget=0.9)
    assert made.probe.num_tokens == (5, 5)
    assert made.probe.num_labelled_tokens == (3, 3)


# --- every option -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_every_score_makes_a_plan(rows, score):
    made = plan(build("llama"), rows, **SMALL, score=score, strategy="top_percent")
    assert set(made.scores) == {0, 1, 2, 3}
    assert len(made.selection.layers) == 2
    assert made.pareto


@pytest.mark.parametrize(
    ("score", "strategy", "allocation"), list(itertools.product(SCORES, ("budget", "mass", "stride"), ALLOCATIONS))
)
def test_every_combination_makes_a_plan_that_fits(measured, score, strategy, allocation):
    model, found, result = steepened(measured)
    options = PlanOptions(**SMALL, score=score, strategy=strategy, allocation=allocation, time_budget=0.9)
    made = plan_from_probe(found, result, options, model=model)
    assert {entry.layer_idx for entry in made.ranks} == set(made.selection.layers)
    assert Plan.from_dict(made.to_dict()) == made
    assert str(made)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_makes_a_plan_or_says_why_not(measured, rows, strategy):
    model, found, result = steepened(measured)
    result = replace(result, kernels=probe(model, list(batches(rows, 2, 0)), kernels=True).kernels)
    made = plan_from_probe(found, result, PlanOptions(**SMALL, strategy=strategy, time_budget=0.9), model=model)
    assert made.selection.strategy == strategy
    assert 0 < made.selection.predicted_time_share <= 1.0 + 1e-9  # a share of uniform LoRA's


def test_ranks_in_proportion_to_a_flat_profile_are_refused(rows):
    with pytest.raises(PlanError, match="the profile is flat"):
        plan(build("llama"), rows, **SMALL, strategy="top_percent", allocation="proportional")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "buget"}, "unknown strategy 'buget'. Did you mean 'budget'"),
        ({"score": "gradient_nrom"}, "unknown score 'gradient_nrom'. Did you mean 'gradient_norm'"),
        ({"allocation": "uniforn"}, "unknown allocation 'uniforn'. Did you mean 'uniform'"),
        ({"probe_mode": "fast"}, "mode='fast'"),
        ({"percent": 0}, "percent=0"),
        ({"percent": 101}, "percent=101"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_layers": 5, "strategy": "top_percent"}, "num_layers=5, but the model has 4 layers"),
        ({"time_budget": 0}, "time_budget=0"),
        ({"time_budget": 0.05}, "below what one layer needs"),
        ({"memory_budget": "24Gigs"}, "memory_budget='24Gigs'"),
        ({"memory_budget": 0}, "memory_budget=0"),
        ({"memory_budget": "1kB"}, "memory_budget=1000 bytes is below what one layer needs"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"mass": 1.5}, "mass=1.5"),
        ({"rank": 0}, "rank"),
        ({"rank": 33}, "rank 33 is larger than"),
        ({"seed": -1}, "non-negative|seed=-1"),
        ({"alpha_ratio": 0}, "alpha_ratio=0"),
        ({"targets": ("q_porj",)}, "target 'q_porj' matches no module .*Did you mean 'q_proj'"),
        ({"targets": ()}, "no module"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_the_next_step(rows, options, message):
    with pytest.raises(ValueError, match=message):
        plan(build("llama"), rows, **{"rank": 4, "probe_batches": 1, "time_budget": 0.9, **options})


def test_an_unknown_option_is_refused_by_its_name(rows):
    with pytest.raises(ValueError, match="time_bugdet"):
        plan(build("llama"), rows, time_bugdet=0.5)


@pytest.mark.parametrize("strategy", BUDGETED)
@pytest.mark.parametrize("allocation", ["uniform", "matched"])
@pytest.mark.parametrize("time_budget", [0.05, 0.35, 0.4, 0.45, 0.5, 0.55])
def test_a_budget_is_kept_with_the_ranks_that_are_given_or_the_error_names_one_that_will_do(
    measured, allocation, time_budget, strategy
):
    model, found, result = measured
    options = PlanOptions(**SMALL, strategy=strategy, allocation=allocation, time_budget=time_budget)
    try:
        made = plan_from_probe(found, result, options, model=model)
    except PlanError as error:
        assert str(error).startswith(f"time_budget={time_budget} is below")
        enough = float(re.search(r"needs: ([0-9.]+) of", str(error)).group(1))
        made = plan_from_probe(found, result, replace(options, time_budget=enough), model=model)
        assert enough > time_budget
        time_budget = enough
    assert made.selection.predicted_time_share <= time_budget * (1 + 1e-9)  # float64


@pytest.mark.parametrize("allocation", ["matched", "asymmetric"])
def test_no_choice_that_keeps_the_budget_with_its_own_ranks_scores_higher(measured, allocation):
    _, found, result = measured
    options = PlanOptions(**SMALL, allocation=allocation)
    cost = probe_cost(found, result, options.batch_size, calibrate=False)
    scores = layer_scores("gradient_norm", result)
    shares = {}
    for layers in (subset for size in range(1, 5) for subset in itertools.combinations(range(4), size)):
        ranks = mean_ranks(found, allocate(found, layers, allocation, allocation_options(options, result)))
        shares[layers] = cost.share(layers, rank=ranks, uniform_rank=options.rank)
    for time_budget in sorted({min(share, 1.0) for share in shares.values()}):
        made = plan_from_probe(found, result, replace(options, time_budget=time_budget))
        best = max(sum(scores[layer] for layer in layers) for layers in shares if shares[layers] <= time_budget)
        assert sum(scores[layer] for layer in made.selection.layers) == pytest.approx(best)
        assert made.selection.predicted_time_share == pytest.approx(shares[made.selection.layers])
        assert all(  # the choice is not beaten by its own frontier
            point.predicted_time_share > time_budget * (1 - 1e-9)
            or point.score_share <= made.selection.score_share + 1e-9
            for point in made.pareto
        )
        for point in made.pareto:
            assert point.predicted_time_share == pytest.approx(shares[point.layers])


@pytest.mark.parametrize("allocation", ["uniform", "matched"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_memory_budget_is_kept_or_the_error_names_one_that_will_do(measured, allocation, gradient_checkpointing):
    model, found, result = measured
    options = PlanOptions(
        **SMALL, allocation=allocation, time_budget=1, gradient_checkpointing=gradient_checkpointing, calibrate=False
    )
    free = plan_from_probe(found, result, options, model=model).prediction.bytes
    with pytest.raises(PlanError, match="memory_budget=1 bytes is below") as caught:
        plan_from_probe(found, result, replace(options, memory_budget=1), model=model)
    least = int(re.search(r": (\d+) bytes", str(caught.value)).group(1))
    assert least < free
    for budget in (least, (least + free) // 2, free):
        made = plan_from_probe(found, result, replace(options, memory_budget=budget), model=model)
        assert made.prediction.bytes <= budget


def test_predictions_are_for_training_batches_and_not_for_the_probes(rows):
    small, large = (plan(build("llama"), rows, **SMALL, strategy="all", batch_size=n) for n in (1, 8))
    assert (small.prediction.num_rows, large.prediction.num_rows) == (1, 8)
    assert large.prediction.bytes > small.prediction.bytes
    lengths = sorted(len(row.input_ids) for row in rows)
    assert large.prediction.max_length == small.prediction.max_length == lengths[-1]
    assert small.prediction.mean_length == large.prediction.mean_length == pytest.approx(sum(lengths) / len(lengths))
    assert large.prediction.time_from == "calibrated" and large.prediction.seconds > 0
    assert "calibrated time, traced memory" in str(large).splitlines()[1]
    assert Plan.from_dict(json.loads(json.dumps(large.to_dict()))) == large


def test_the_switches_change_the_prediction(measured):
    model, found, result = measured
    options = PlanOptions(**SMALL, strategy="last", num_layers=2)
    plain, cheaper, cached = (
        plan_from_probe(found, result, replace(options, **change), model=model).prediction
        for change in ({}, {"gradient_checkpointing": True}, {"prefix_cache": True})
    )
    assert cheaper.seconds > plain.seconds and cheaper.bytes < plain.bytes
    assert cached.seconds < plain.seconds and cached.uniform_seconds == plain.uniform_seconds


def test_a_plan_that_counts_on_a_prefix_cache_says_from_when_on_and_what_the_first_epoch_costs(measured):
    model, found, result = measured
    options = PlanOptions(**SMALL, strategy="last", num_layers=2, calibrate=False)
    plain, cached = (
        plan_from_probe(found, result, replace(options, **change), model=model)
        for change in ({}, {"prefix_cache": True})
    )
    first, later = plain.selection.predicted_time_share, cached.selection.predicted_time_share
    assert later < first == pytest.approx(cached.first_epoch_share())
    assert f"predicted {1 / later:.2f}x from the second epoch on, keeps" in str(cached)
    assert f"in the first, which fills it, a step is predicted to take {100 * first:.0f} %" in str(cached)
    loaded = Plan.from_dict(json.loads(json.dumps(cached.to_dict())))
    assert str(loaded) == str(cached) and str(loaded.with_adapter("ia3")).count("from the second epoch on") == 2
    assert plain.first_epoch_share() is None and "epoch" not in str(plain)
    everywhere = plan_from_probe(found, result, replace(options, strategy="all", prefix_cache=True), model=model)
    assert everywhere.first_epoch_share() is None and "epoch" not in str(everywhere)


def test_a_choice_by_counts_predicts_seconds_all_the_same_and_does_not_depend_on_them(measured):
    _, found, result = measured
    slow = replace(result.timing, backward=tuple(tuple(9 * s for s in batch) for batch in result.timing.backward))
    quick, late = (
        plan_from_probe(found, replace(result, timing=timing), PlanOptions(**SMALL, time_budget=0.8))
        for timing in (result.timing, slow)
    )
    assert quick.selection == late.selection
    assert late.prediction.uniform_seconds > quick.prediction.uniform_seconds > 0


def test_an_untimed_plan_has_no_seconds_and_an_old_one_no_prediction(measured):
    _, found, result = measured
    made = plan_from_probe(found, replace(result, timing=None), PlanOptions(**SMALL, strategy="last"))
    assert made.prediction.seconds is None
    assert (made.prediction.time_from, made.prediction.memory_from) == ("counted", "formula")
    record = made.to_dict()
    del record["prediction"]
    assert Plan.from_dict(record) == replace(made, prediction=None)


def test_targets_limit_what_is_adapted(rows):
    made = plan(build("llama"), rows, **SMALL, targets=("q_proj", "v_proj"), strategy="last", num_layers=1)
    assert [entry.name for entry in made.ranks] == [
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.self_attn.v_proj",
    ]
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))).options == made.options
    assert mean_ranks(made.anatomy, made.ranks, made.options.targets) == {3: made.ranks[0].rank}
    everywhere = plan(build("llama"), rows, **SMALL, targets=("q_proj", "v_proj"), strategy="all", allocation="uniform")
    assert everywhere.selection.predicted_time_share == pytest.approx(1.0)
    assert everywhere.prediction.bytes == everywhere.prediction.uniform_bytes


def test_a_probe_of_another_model_is_refused(measured):
    _, _, result = measured
    with pytest.raises(PlanError, match="the probe is of a model"):
        plan_from_probe(anatomy(build("phi3")), result, PlanOptions(**SMALL))


def test_a_broken_weight_makes_no_plan(rows):
    model = build("llama")
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ProbeError, match="batch 0; layer 2 is the first to put out a number that is not finite"):
        plan(model, rows, **SMALL)


# --- the plan in words ------------------------------------------------------------------------------------------


def test_a_flat_profile_is_named(measured):
    model, found, result = measured
    assert result.is_flat
    options = PlanOptions(**SMALL, strategy="last", num_layers=2)
    assert "the profile is flat (max/min" in str(plan_from_probe(found, result, options, model=model))
    model, found, steep = steepened(measured)
    assert "flat" not in str(plan_from_probe(found, steep, options, model=model))


@pytest.mark.parametrize(("strategy", "said"), [("first", True), ("last", False)])
def test_layer_0_among_the_chosen_is_named_with_what_it_costs(measured, strategy, said):
    model, found, result = measured
    made = plan_from_probe(found, result, PlanOptions(**SMALL, strategy=strategy, num_layers=2), model=model)
    assert ("layer 0 is among them" in str(made)) is said
    assert ("backward runs to the first layer" in str(made)) is said
    assert ("backward stops at 2" in str(made)) is not said


def test_a_plan_without_a_probe_or_with_one_batch_still_prints(measured):
    model, found, result = measured
    made = plan_from_probe(found, result, PlanOptions(**SMALL, strategy="last"), model=model)
    assert "probe:" in str(made)
    without = replace(made, probe=None)
    assert "probe:" not in str(without) and "layers 2-3" in str(without)
    assert Plan.from_dict(without.to_dict()).probe is None


def test_a_plan_says_what_was_not_shown_of_scores(measured):
    model, found, result = measured
    for strategy, said in (("budget", True), ("top_percent", True), ("stride", False), ("last", False), ("all", False)):
        made = plan_from_probe(found, result, PlanOptions(**SMALL, strategy=strategy), model=model)
        assert ("as many random ones has not been shown" in str(made)) is said
        assert ("--strategy all adapts all" in str(made)) is (strategy != "all")
