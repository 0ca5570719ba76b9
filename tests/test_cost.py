"""The predicted cost of a step against hand counts, its laws, and against steps that were measured."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from aletheia_lora.anatomy import ModelAnatomy, anatomy
from aletheia_lora.cost import ADAPTER_OVERHEAD_RANKS, BACKWARD_PENALTY, HEAD_PENALTY, CostModel, StepShape, cost_model
from aletheia_lora.errors import PlanError

SHAPE = StepShape(num_tokens=40, num_labelled_tokens=10, sequence_length=20)


@pytest.fixture(scope="module")
def tiny() -> ModelAnatomy:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    with torch.device("meta"):
        return anatomy(LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)))


@pytest.fixture(scope="module")
def smollm2() -> CostModel:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        found = anatomy(LlamaForCausalLM(config))
    return cost_model(found, StepShape(num_tokens=868, num_labelled_tokens=364, sequence_length=217))


PAPER = [*range(4), *range(9, 20)]


# Measured: SmolLM2-135M in float32, one batch of 4 GSM8K rows (868 tokens, 364 with a label), two cores, medians of 6
# interleaved rounds; the ratio is that of plain uniform LoRA of rank 16 with logits for all tokens.
@pytest.mark.parametrize(
    ("layers", "prefix_cached", "measured_speedup"),
    [
        (range(30), False, 1.23),
        (PAPER, False, 1.29),
        (range(9, 24), False, 1.39),
        (range(9, 24), True, 1.63),
        (range(15, 30), False, 1.76),
        (range(15, 30), True, 2.09),
        (range(22, 30), True, 3.64),
    ],
)
def test_prediction_is_within_ten_percent_of_the_measured_step(
    smollm2: CostModel, layers: Any, prefix_cached: bool, measured_speedup: float
) -> None:
    predicted = smollm2.uniform(all_logits=True) / smollm2.step(layers, prefix_cached=prefix_cached)
    assert predicted == pytest.approx(measured_speedup, rel=0.1)


@pytest.mark.parametrize(
    ("layers", "prefix_cached", "measured_speedup"),
    [(PAPER, False, 1.16), (range(9, 24), False, 1.28), (range(15, 30), False, 1.54), (range(15, 30), True, 1.86)],
)
def test_prediction_with_all_logits_is_within_ten_percent_too(
    smollm2: CostModel, layers: Any, prefix_cached: bool, measured_speedup: float
) -> None:
    share = smollm2.share(layers, prefix_cached=prefix_cached, all_logits=True)
    assert 1 / share == pytest.approx(measured_speedup, rel=0.1)


# Likewise on another day: 872 positions, 364 with a label, in seconds; plain uniform LoRA took 6.47.
@pytest.mark.parametrize(
    ("layers", "rank", "measured_seconds"),
    [
        (range(15, 30), 8, 3.67),
        (range(15, 30), 16, 3.69),
        (range(15, 30), 32, 3.68),
        (range(15, 30), 64, 4.09),
        ([15], 16, 3.38),
        (range(20, 30), 16, 3.15),
        (range(30), 16, 5.22),
    ],
)
def test_prediction_at_other_ranks_is_within_ten_percent(
    smollm2: CostModel, layers: Any, rank: int, measured_seconds: float
) -> None:
    predicted = smollm2.uniform(all_logits=True) / smollm2.step(layers, rank=rank)
    assert predicted == pytest.approx(6.47 / measured_seconds, rel=0.1)


def test_checkpointing_uniform_lora_costs_what_was_measured(smollm2: CostModel) -> None:
    predicted = smollm2.uniform(all_logits=True) / smollm2.uniform(all_logits=True, checkpointing=True)
    assert predicted == pytest.approx(0.78, rel=0.1)


def test_parts_equal_a_count_by_hand(tiny: ModelAnatomy) -> None:
    cost = cost_model(tiny, SHAPE)
    params = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    sides = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    scores = 4 * 40 * 20 * 32
    assert cost.forward == (2 * params * 40 + scores,) * 4
    assert cost.backward == (BACKWARD_PENALTY * (2 * params * 40 + 2 * scores),) * 4
    assert cost.adapter_per_rank == (6 * 40 * sides,) * 4
    assert (cost.head, cost.head_all_tokens) == (HEAD_PENALTY * 4 * 10 * 64 * 32, HEAD_PENALTY * 4 * 40 * 64 * 32)


def test_only_targeted_modules_pay_for_adapters(tiny: ModelAnatomy) -> None:
    everything, some = cost_model(tiny, SHAPE), cost_model(tiny, SHAPE, targets=("q_proj", "mlp.up_proj"))
    assert some.adapter_per_rank == (6 * 40 * (32 + 32 + 32 + 48),) * 4
    assert some.fixed == pytest.approx([ADAPTER_OVERHEAD_RANKS * one for one in some.adapter_per_rank])
    assert (some.forward, some.backward, some.head) == (everything.forward, everything.backward, everything.head)
    assert some.uniform() == pytest.approx(some.without_adapters(0) + some.adapters(range(4)))
    assert some.uniform() < everything.uniform()


def test_a_step_is_the_sum_of_the_written_equation() -> None:
    cost = CostModel((1.0, 2.0, 4.0), (10.0, 20.0, 40.0), (0.1, 0.2, 0.4), 100.0, 300.0)
    rank1 = 1 - ADAPTER_OVERHEAD_RANKS  # so that an adapter costs one rank in all
    assert cost.step([1, 2], rank=rank1) == pytest.approx(7 + 60 + 0.6 + 100)
    assert cost.step([0, 2], rank={0: rank1 + 1, 2: rank1 + 2}) == pytest.approx(7 + 70 + 0.2 + 1.2 + 100)
    assert cost.step([1], rank=rank1, checkpointing=True) == pytest.approx(7 + 60 + 0.2 * 4 / 3 + 100 + 6)
    assert cost.step([1], rank=rank1, prefix_cached=True) == pytest.approx(6 + 60 + 0.2 + 100)
    assert cost.step([1], rank=rank1, all_logits=True) == pytest.approx(7 + 60 + 0.2 + 300)
    assert cost.step([2], rank=rank1, checkpointing=True, prefix_cached=True) == pytest.approx(
        4 + 40 + 0.4 * 4 / 3 + 100 + 4
    )


def test_only_experts_that_a_token_passes_through_are_counted() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=1,
    )
    with torch.device("meta"):
        one, two = (cost_model(anatomy(MixtralForCausalLM(config)), SHAPE) for config.num_experts_per_tok in (1, 2))
    assert two.forward[0] - one.forward[0] == 2 * 40 * (3 * 32 * 48)
    sides = (32 + 96) + (48 + 32)  # gate and up are one stack
    assert two.adapter_per_rank[0] - one.adapter_per_rank[0] == 6 * 40 * sides


def test_all_layers_cost_what_uniform_costs(tiny: ModelAnatomy) -> None:
    cost = cost_model(tiny, SHAPE)
    assert cost.share(range(4)) == 1.0
    assert cost.share(range(4), prefix_cached=True) == 1.0
    assert cost.share(range(4), rank=32, uniform_rank=32, checkpointing=True) == 1.0


def test_leaving_out_a_layer_never_costs_more(tiny: ModelAnatomy) -> None:
    cost = cost_model(tiny, SHAPE)
    for size in (2, 3, 4):
        for layers in itertools.combinations(range(4), size):
            for left_out in layers:
                assert cost.step(set(layers) - {left_out}) < cost.step(layers)


def test_of_equally_many_layers_the_last_are_cheapest(tiny: ModelAnatomy) -> None:
    cost = cost_model(tiny, SHAPE)
    assert min(itertools.combinations(range(4), 2), key=cost.step) == (2, 3)


def test_measured_seconds_can_take_the_place_of_counts() -> None:
    cost = CostModel((1.0, 1.0), (1.0, 1.0), (0.1, 0.1), 1.0, 2.0)
    seconds = CostModel((0.5, 0.5), (0.5, 0.5), (0.05, 0.05), 0.5, 1.0)
    assert seconds.share([1]) == pytest.approx(cost.share([1]))


def test_a_cost_model_survives_json(tiny: ModelAnatomy) -> None:
    cost = cost_model(tiny, SHAPE)
    assert CostModel.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost


@pytest.mark.parametrize(
    ("layers", "rank", "message"),
    [
        ([], 16, "no layers were chosen"),
        ([4], 16, "layer 4 does not exist"),
        ([-1, 2], 16, "layer -1 does not exist"),
        ([1, 2], {1: 8}, r"no rank was given for layers \[2\]"),
    ],
)
def test_a_step_that_cannot_be_predicted_is_refused(tiny: ModelAnatomy, layers: Any, rank: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        cost_model(tiny, SHAPE).step(layers, rank=rank)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 0}, "num_tokens=0, expected at least 1"),
        ({"num_labelled_tokens": 0}, "num_labelled_tokens=0"),
        ({"num_labelled_tokens": 41}, "at most num_tokens=40"),
        ({"sequence_length": 41}, "sequence_length=41"),
    ],
)
def test_an_impossible_step_shape_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepShape(**{"num_tokens": 40, "num_labelled_tokens": 10, "sequence_length": 20, **change})
