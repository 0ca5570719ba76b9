import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from aletheia_lora.adapter import attach
from aletheia_lora.adapter_options import AdapterOptions
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy
from aletheia_lora.fast_lora import FastLora, _copies, _LoraLinear, adapted_linear
from families import CONFIGS, GROUPED_MATMUL, build, random_batches


def adapted(family, dtype=torch.float32, layers=(1, 3), lora_dropout=0.0):
    model = build(family, dtype)
    found = anatomy(model)
    ranks = allocate(found, layers, "asymmetric", AllocationOptions(attention_rank=2, mlp_rank=4))
    peft_model = attach(model, found, ranks, AdapterOptions(lora_dropout=lora_dropout)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:  # starts at zero, where mistakes would not show
            parameter.data.normal_(0, 0.05, generator=generator)
    return peft_model


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", CONFIGS)
def test_losses_and_gradients_are_pefts_on_every_family(family):
    dtype = torch.float32 if family in GROUPED_MATMUL else torch.float64
    model, batch = adapted(family, dtype), random_batches(1)[0]
    expected_loss, expected = loss_and_gradients(model, batch)
    fast = FastLora(model)
    loss, gradients = loss_and_gradients(model, batch)
    fast.remove()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_every_layer_is_either_fast_or_named_with_its_reason(family):
    model = adapted(family)
    fast = FastLora(model)
    adapters = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    names = {name.removeprefix("base_model.model.") for name in adapters}
    assert set(fast.modules) | set(fast.skipped) == names
    assert fast.modules and set(fast.skipped.values()) <= {"stacked experts"}
    fast.remove()
    assert all("forward" not in vars(module) for module in model.modules())


def test_it_is_really_the_fast_function_that_runs(monkeypatch):
    model, batch = adapted("llama"), random_batches(1)[0]
    fast = FastLora(model)
    calls, apply = [], _LoraLinear.apply
    monkeypatch.setattr(_LoraLinear, "apply", lambda *args: calls.append(1) or apply(*args))
    model(**batch)
    assert len(calls) == len(fast.modules) == 14


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_near_to_float32_as_pefts_is(autocast):
    batch = random_batches(1)[0]
    _, truth = loss_and_gradients(adapted("llama"), batch)
    errors = []
    for make_fast in (False, True):
        model = adapted("llama") if autocast else adapted("llama", torch.bfloat16)
        fast = FastLora(model) if make_fast else None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            _, gradients = loss_and_gradients(model, batch)
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        errors.append(sum(float((gradients[name].float() - truth[name]).norm()) for name in truth))
        assert fast is None or not fast.skipped
    assert errors[1] <= 1.5 * errors[0]


def test_nothing_is_kept_for_backward_but_input_and_its_projection():
    x = torch.randn(5, 8, requires_grad=True)
    weight, a, b = torch.randn(6, 8), torch.randn(2, 8, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _LoraLinear.apply(x, weight, None, a, b, 2.0, torch.float32)
    shapes = [tuple(tensor.shape) for tensor in kept]
    assert shapes == [(5, 8), (5, 2), (6, 8), (2, 8), (6, 2)]
    assert kept[0].data_ptr() == x.data_ptr()


def test_under_autocast_maps_of_one_input_share_its_copy_which_goes_with_it():
    torch.manual_seed(0)
    device = torch.device("cpu")
    query, key = (adapted_linear(8, 6, 2, device=device, dtype=torch.float32) for _ in range(2))
    x, kept = torch.randn(5, 8, requires_grad=True), []

    def run(of_query, of_key):
        with torch.autocast("cpu", torch.bfloat16):
            return query(of_query), key(of_key)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        together = run(x, x)
    inputs = [tensor for tensor in kept if tensor.shape == (5, 8)]
    assert [tensor.dtype for tensor in inputs] == [torch.bfloat16] * 2
    assert inputs[0].data_ptr() == inputs[1].data_ptr()
    (shared,) = torch.autograd.grad(sum(y.float().square().sum() for y in together), x)
    apart = run(x.detach().clone().requires_grad_(True), x.detach().clone())
    assert all(torch.equal(left, right) for left, right in zip(together, apart, strict=True))
    copy_ = x.detach().clone().requires_grad_(True)
    outputs = run(copy_, copy_.clone())
    (expected,) = torch.autograd.grad(sum(y.float().square().sum() for y in outputs), copy_)
    torch.testing.assert_close(shared, expected, rtol=0, atol=0)
    before = run(x, x)[0]
    with torch.no_grad():
        x.mul_(2)
    assert not torch.equal(run(x, x)[0], before)  # changed in place: cast anew
    assert len(_copies) >= 1
    kept.clear()
    del x, copy_, together, apart, outputs, before, inputs, shared, expected
    gc.collect()
    assert len(_copies) == 0


def test_double_precision_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 4), (5, 2)))
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, a, b: _LoraLinear.apply(x, weight, bias, a, b, 0.5, torch.float64), (x, a, b)
    )
    expected = functional.linear(x, weight + 0.5 * b @ a, bias)
    torch.testing.assert_close(_LoraLinear.apply(x, weight, bias, a, b, 0.5, torch.float64), expected)


def test_what_cannot_be_fast_runs_as_peft_runs_it_and_says_why():
    cases = [
        (LoraConfig(target_modules=["q_proj"], lora_dropout=0.1), "its adapter has dropout"),
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "it uses DoraLinearVariant"),
        (LoraConfig(target_modules=["embed_tokens"]), "PEFT runs it as lora.layer.Embedding"),
    ]
    for config, reason in cases:
        model = get_peft_model(build("llama"), config)
        fast = FastLora(model)
        assert not fast.modules and set(fast.skipped.values()) == {reason}
    with_bias = get_peft_model(build("gpt_neox"), LoraConfig(target_modules=["dense"], lora_bias=True))
    assert set(FastLora(with_bias).skipped.values()) == {"its adapter has a bias"}
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(lambda *args: None)
    fast = FastLora(model)
    assert list(fast.skipped.values()) == ["a hook or another patch runs on it"] and len(fast.modules) == 3


def test_merged_disabled_and_other_adapters_are_seen_at_the_call():
    model, batch = adapted("llama"), random_batches(1)[0]
    plain = copy.deepcopy(model)
    FastLora(model)
    with torch.no_grad():
        for change in (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()):
            change(model), change(plain)
            torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
        with model.disable_adapter(), plain.disable_adapter():
            torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=0, atol=0)
