"""Bytes of a step: what is traced against what a real forward keeps, laws, budgets in words, and refusals."""

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch

from aletheia_lora.activations import LayerActivations, saved_activations
from aletheia_lora.adapter import attach
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy
from aletheia_lora.errors import PlanError
from aletheia_lora.fast_lora import FastLora
from aletheia_lora.loss import LOGIT_BYTES
from aletheia_lora.memory import (
    STATE_BYTES,
    MemoryModel,
    device_memory,
    memory_model,
    parse_bytes,
    stored_bytes,
)
from families import CONFIGS, GROUPED_MATMUL, build

SHAPE = {"num_rows": 2, "length": 12, "num_labelled": 10}
BY_HAND = MemoryModel(
    layers=(LayerActivations(100, 10, 1), LayerActivations(200, 20, 2), LayerActivations(300, 30, 3)),
    adapter_params=(1, 2, 3),
    weights=10_000,
    hidden=50,
    working=70,
    logits=60,
    logits_all_tokens=900,
    hidden_per_token=5,
    activations="traced",
)


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - GROUPED_MATMUL))
def test_the_trace_without_contents_equals_what_a_real_forward_keeps(family):
    model = build(family)
    found = anatomy(model)
    real = saved_activations(model, found, num_rows=2, length=12)
    made = memory_model(found, **SHAPE, model=model)
    assert (made.layers, made.activations) == (real, "traced")
    assert min(layer.saved for layer in real) > 0


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_model_on_meta_is_traced_like_the_real_one(family):
    model = build(family)
    found = anatomy(model)
    assert memory_model(found, **SHAPE, model=copy.deepcopy(model).to("meta")) == memory_model(
        found, **SHAPE, model=model
    )


def test_experts_that_cannot_be_traced_are_run_on_few_tokens_and_the_record_says_so():
    model = build("mixtral")
    made = memory_model(anatomy(model), **SHAPE, model=model)
    real = saved_activations(model, anatomy(model), num_rows=2, length=12)
    assert made.activations == "run"
    assert made.layers[1].saved == pytest.approx(real[1].saved, rel=0.01)  # counts of tokens per expert do not scale
    stack = sum(4 * module.num_params for module in anatomy(model).layers[1].modules if module.storage == "stacked")
    assert made.layers[1].adapter_inputs == real[1].adapter_inputs + stack
    half = memory_model(anatomy(model), **SHAPE, model=build("mixtral", torch.bfloat16))
    few = saved_activations(build("mixtral", torch.bfloat16), anatomy(model), num_rows=2, length=12)
    assert half.layers[1].adapter_inputs == few[1].adapter_inputs + stack // 2  # PEFT adds in the stack's own dtype
    assert memory_model(anatomy(model), **SHAPE, dtype=torch.bfloat16).layers[1].adapter_inputs < (
        memory_model(anatomy(model), **SHAPE).layers[1].adapter_inputs
    )


def test_without_a_model_a_formula_stands_in_and_the_record_says_so():
    model = build("llama")
    made, traced = (memory_model(anatomy(model), **SHAPE, model=given) for given in (None, model))
    assert made.activations == "formula"
    assert made.layers[1].saved == pytest.approx(traced.layers[1].saved, rel=0.5)
    assert made.layers[1].adapter_per_rank == traced.layers[1].adapter_per_rank
    assert made.weights == anatomy(model).num_params * 4


def test_a_llama_layer_keeps_what_a_count_by_hand_says():
    model = build("llama")
    tokens = 2 * 12
    norms = 2 * (tokens * 32 + tokens)  # input, and the inverse root of its mean square
    heads = 4 * tokens * 32 + tokens * 4 + 2 * 12 * 12  # query, key, value, output; log of the sum; mask
    gated = 3 * tokens * 64  # gate, its activation, up
    made = memory_model(anatomy(model), **SHAPE, model=model)
    assert made.layers[2].saved == 4 * (norms + heads + gated)
    # Of query, key and value; of gate and up; of down. The input of the output map is attention's output, kept already.
    assert made.layers[2].adapter_inputs == 4 * tokens * (32 + 32 + 64)
    assert made.layers[2].adapter_per_rank == 4 * tokens * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fast", [True, False])
def test_adapters_are_predicted_to_keep_what_they_keep(dtype, fast):
    model = build("llama", dtype).requires_grad_(False)
    found = anatomy(model)
    predicted = saved_activations(model, found, num_rows=2, length=12)
    twin = attach(copy.deepcopy(model), found, allocate(found, [3], "uniform", AllocationOptions(rank=4)))
    if fast:
        FastLora(twin)
    kept = kept_bytes(twin, found) - kept_bytes(model, found)
    expected = predicted[3].adapter_inputs + 4 * predicted[3].adapter_per_rank
    if dtype == torch.bfloat16 and not fast:  # predictions are for fast adapters: PEFT copies each input in float32
        tokens = 2 * 12
        expected = 4 * tokens * (6 * 32 + 64) + 4 * (4 * tokens * 7)
    assert kept == expected


def kept_bytes(model, found):
    """Bytes that a forward keeps for the backward of layer 3 and what follows, weights not counted."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = base.model.layers[2].register_forward_hook(lambda _m, _a, output: output.detach().requires_grad_(True))
    ids, mask = torch.zeros(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
    mask[0, -1] = 0
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        base(input_ids=ids, attention_mask=mask, use_cache=False)
    handle.remove()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("given", [True, False])
def test_only_targeted_modules_keep_something_for_adapters(given):
    model = build("llama")
    found = anatomy(model)
    made = memory_model(found, **SHAPE, model=model if given else None, targets=("q_proj", "down_proj"))
    assert made.layers[2].adapter_inputs == 4 * 24 * (32 + 64)
    assert made.layers[2].adapter_per_rank == 4 * 24 * 2
    assert made.adapter_params[2] == 32 + 32 + 64 + 32
    assert made.layers[2].saved == memory_model(found, **SHAPE, model=model if given else None).layers[2].saved
    stacked = anatomy(build("mixtral"))
    assert memory_model(stacked, **SHAPE, targets=("q_proj",)).layers[1].adapter_inputs == 4 * 24 * 32


def test_inputs_that_peft_copies_are_counted_where_no_fast_adapter_runs():
    found = anatomy(build("llama"))
    packed = replace(
        found,
        layers=tuple(
            replace(layer, modules=tuple(replace(module, storage="quantized") for module in layer.modules))
            for layer in found.layers
        ),
    )
    plain, copied = (memory_model(given, **SHAPE, dtype=torch.bfloat16).layers[1] for given in (found, packed))
    single = memory_model(found, **SHAPE).layers[1]
    assert (plain.adapter_inputs, plain.adapter_per_rank) == (single.adapter_inputs / 2, single.adapter_per_rank / 2)
    assert copied.adapter_inputs == 4 * 24 * (6 * 32 + 64) and copied.adapter_per_rank == single.adapter_per_rank


def test_tracing_leaves_the_model_as_found():
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    next(model.parameters()).requires_grad_(False)
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    memory_model(anatomy(model), **SHAPE, model=model)
    saved_activations(model, anatomy(model), num_rows=1, length=4)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_step_is_the_sum_of_its_parts():
    states = STATE_BYTES * 2 * (2 + 3)
    assert BY_HAND.step([1, 2], rank=2) == 10_000 + 500 + 70 + states + (20 + 2 * 2) + (30 + 2 * 3)
    assert BY_HAND.step([1, 2], rank={1: 2, 2: 2}) == BY_HAND.step([1, 2], rank=2)
    assert BY_HAND.step([1, 2], rank=2, prefix_cached=True) == BY_HAND.step([1, 2], rank=2) + 50
    assert BY_HAND.step([1, 2], rank=2, all_logits=True) == BY_HAND.step([1, 2], rank=2) + 830
    one_layer = 300 + 30 + 2 * 3
    assert BY_HAND.step([1, 2], rank=2, checkpointing=True) == 10_000 + 2 * 50 + one_layer + 70 + states
    assert BY_HAND.prefix_cache(1000) == 5000


def test_leaving_out_a_layer_never_needs_more_and_neither_does_checkpointing():
    made = memory_model(anatomy(build("llama")), **SHAPE, model=build("llama"))
    for layers in itertools.combinations(range(4), 3):
        for left_out in layers:
            assert made.step(set(layers) - {left_out}) < made.step(layers)
        assert made.step(layers, checkpointing=True) < made.step(layers)


def test_logits_are_never_more_than_a_chunk():
    made = memory_model(anatomy(build("llama")), num_rows=1000, length=1000, num_labelled=10**6)
    assert made.logits == LOGIT_BYTES["cuda"] + 2 * 10**6 * made.hidden_per_token
    assert made.logits_all_tokens > 10**9


def test_where_a_head_allows_no_chunks_all_labelled_logits_count():
    model = build("llama")
    chunked = memory_model(anatomy(model), **SHAPE, model=model)
    model.lm_head = type("PackedLinear", (torch.nn.Linear,), {})(32, 256, bias=False)
    whole = memory_model(anatomy(model), **SHAPE, model=model)
    kept = 2 * SHAPE["num_labelled"] * whole.hidden_per_token
    assert whole.logits - kept == whole.logits_all_tokens * SHAPE["num_labelled"] // (
        SHAPE["num_rows"] * SHAPE["length"]
    )
    assert whole.logits > chunked.logits


def test_weights_count_as_stored_and_shared_ones_once():
    model = build("llama")
    assert stored_bytes(model) >= 4 * sum(parameter.numel() for parameter in model.parameters())
    single = stored_bytes(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert stored_bytes(model) == single - 4 * model.lm_head.weight.numel()
    assert memory_model(anatomy(model), **SHAPE, model=model.bfloat16()).weights < single / 2 + 1000


def test_a_memory_model_survives_json():
    assert MemoryModel.from_dict(json.loads(json.dumps(BY_HAND.to_dict()))) == BY_HAND


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        (1, 1),
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("800MiB", 800 * 2**20),
        ("2k", 2000),
        ("8e9", 8 * 10**9),
        ("512", 512),
        ("1TiB", 2**40),
    ],
)
def test_a_memory_budget_is_read_in_every_usual_spelling(given, expected):
    assert parse_bytes(given) == expected


@pytest.mark.parametrize(
    "given", ["", "much", "24GBit", "-1GiB", "0", 0, -5, "1,5GB", "GiB", "12iB", True, "nan", 1.5e400]
)
def test_a_malformed_memory_budget_is_refused(given):
    with pytest.raises(PlanError, match="memory_budget="):
        parse_bytes(given)


@pytest.mark.parametrize("layers", [[], [3], [-1]])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(PlanError, match="between 0 and 2"):
        BY_HAND.step(layers)
    with pytest.raises(PlanError, match="no rank was given for layer 2"):
        BY_HAND.step([1, 2], rank={1: 8})


def test_the_memory_of_a_device_is_read_or_refused():
    assert device_memory("cpu") > 2**28
    for device in ("nonsense", "meta"):
        with pytest.raises(ValueError, match=f"device='{device}'"):
            device_memory(device)
