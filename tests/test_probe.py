import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from aletheia_lora.anatomy import layer_blocks
from aletheia_lora.errors import ProbeError
from aletheia_lora.gradient_watch import _first_adapter
from aletheia_lora.loss import labelled_loss
from aletheia_lora.probe import gradient_probe, probe
from aletheia_lora.probe_result import ProbeResult
from families import CONFIGS, GROUPED_MATMUL, build, random_batches


def reference_scores(model, batches):
    """The definition by plain autograd: all gradients alive at once, summed tensor by tensor."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    scores = {}
    for batch in batches:
        model.zero_grad()
        labelled_loss(model, batch).backward()
        for layer_idx, blocks in enumerate(layer_blocks(model)):
            norms = [p.grad.norm() for block in blocks for p in block.parameters() if p.grad is not None]
            scores[layer_idx] = scores.get(layer_idx, 0.0) + float(sum(norms))
    return scores


@pytest.mark.parametrize("mode", ["exact", "gram", "auto"])
@pytest.mark.parametrize("family", CONFIGS)
def test_scores_equal_plain_autograd_on_every_family(family, mode):
    dtype, tolerance = (torch.float32, 2e-6) if family in GROUPED_MATMUL else (torch.float64, 1e-12)
    model, batches = build(family, dtype), random_batches(3)
    measured = dict(probe(model, batches, mode=mode))
    expected = reference_scores(model, batches)
    assert measured == pytest.approx(expected, rel=tolerance)
    assert min(measured.values()) > 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_exactly_as_found(fails):
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    parameters = list(model.parameters())
    for index, parameter in enumerate(parameters):
        parameter.requires_grad_(index % 2 == 0)
    parameters[0].grad = torch.ones_like(parameters[0])
    kept, modes = parameters[0].grad, [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    batches = random_batches(2)
    if fails:
        batches[1]["input_ids"][0, 0] = 10_000  # no such token: the forward raises
        with pytest.raises(IndexError):
            probe(model, batches)
    else:
        probe(model, batches)
    assert [parameter.requires_grad for parameter in parameters] == [index % 2 == 0 for index in range(len(parameters))]
    assert parameters[0].grad is kept
    assert all(parameter.grad is None for parameter in parameters[1:])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)


def test_no_hook_stays_when_setting_them_up_fails(monkeypatch):
    model, calls = build("llama"), []

    def out_of_memory(tensor):
        calls.append(tensor)
        if len(calls) == 20:
            raise MemoryError
        return tensor.float()

    monkeypatch.setattr("aletheia_lora.gradient_watch.full_precision", out_of_memory)
    with pytest.raises(MemoryError):
        probe(model, random_batches(1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dropout_is_off_in_the_probe():
    model = build("gpt2", torch.float64).train()
    first, second = (dict(probe(model, random_batches(2))) for _ in range(2))
    assert first == pytest.approx(second, rel=1e-12)


def test_the_order_of_batches_does_not_matter():
    model, batches = build("llama", torch.float64), random_batches(3)
    assert dict(probe(model, batches)) == pytest.approx(dict(probe(model, batches[::-1])), rel=1e-12)


def test_prompt_and_padding_do_not_count():
    model, batch = build("llama"), random_batches(1, rows=1)[0]
    padded = {
        key: torch.cat([value, torch.full((1, 8), fill)], dim=1)
        for (key, value), fill in zip(batch.items(), (0, 0, -100), strict=True)
    }
    assert dict(probe(model, [padded])) == pytest.approx(dict(probe(model, [batch])), rel=1e-5)


def test_a_map_that_runs_twice_is_measured_over_both_runs():
    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden) + self.inner(2 * hidden)

    for mode in ("exact", "gram"):
        model = build("llama", torch.float64)
        shared = model.model.layers[1].mlp
        model.model.layers[1].mlp = Twice(shared)
        batches = random_batches(2)
        assert dict(probe(model, batches, mode=mode)) == pytest.approx(reference_scores(model, batches), rel=1e-12)


def test_taylor_is_the_sum_of_weight_times_gradient():
    model, batches = build("llama", torch.float64), random_batches(1)
    result = probe(model, batches, taylor=True)
    labelled_loss(model.eval(), batches[0]).backward()
    weight = model.model.layers[2].mlp.up_proj.weight
    weight, gradient = weight.detach(), weight.grad
    record = next(tensor for tensor in result.tensors if tensor.name == "model.layers.2.mlp.up_proj")
    assert record.taylor == pytest.approx((float((weight * gradient).abs().sum()),))
    assert record.weight_norm == pytest.approx(float(weight.norm()))
    assert all(t.taylor is None for t in probe(model, batches, mode="gram").tensors if t.method == "gram")


def test_taylor_of_a_square_matrix_that_is_stored_the_other_way_round():
    model, batches = build("gpt2", torch.float64), random_batches(1)
    result = probe(model, batches, taylor=True)
    labelled_loss(model.eval(), batches[0]).backward()
    weight = model.transformer.h[2].attn.c_proj.weight
    assert weight.shape[0] == weight.shape[1]
    record = next(tensor for tensor in result.tensors if tensor.name == "transformer.h.2.attn.c_proj")
    assert record.taylor == pytest.approx((float((weight * weight.grad).detach().abs().sum()),))


@pytest.mark.parametrize("mode", ["exact", "gram"])
def test_descent_is_the_sum_of_the_gradient_of_a_real_adapters_b_over_all_batches(mode):
    model, batches = build("llama"), random_batches(3)
    result = probe(model, batches, mode=mode, descent=True)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).eval()
    maps = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    for module in maps.values():
        module.lora_A["default"].weight.data = _first_adapter(module.in_features)
    for batch in batches:
        (labelled_loss(adapted, batch) / len(batches)).backward()
    descents = {tensor.name: tensor.descent for tensor in result.tensors}
    for name, module in maps.items():
        expected = float(module.lora_B["default"].weight.grad.abs().sum())
        assert descents[name.removeprefix("base_model.model.")] == pytest.approx(expected, rel=1e-4)
    doubled = probe(build("llama", torch.float64), batches, mode=mode, descent=True)
    found = {tensor.name: tensor.descent for tensor in doubled.tensors if tensor.descent is not None}
    assert found == pytest.approx({name: descents[name] for name in found}, rel=1e-4) and len(found) == 28
    assert descents["model.layers.0.input_layernorm.weight"] is None
    assert all(tensor.descent is None for tensor in probe(build("llama"), batches).tensors)


def test_the_record_survives_being_saved_and_loaded(tmp_path):
    result = probe(build("mixtral"), random_batches(3))
    again = ProbeResult.load(result.save(tmp_path / "scores.json"))
    assert dict(again) == dict(result)
    assert again.tensors == result.tensors
    assert (again.standard_errors() == result.standard_errors()).all()
    assert result.num_tokens == (21, 21, 21) and result.num_labelled_tokens == (13, 13, 13)
    assert result.seconds > 0 and 0 <= result.split_half_overlap() <= 1


def test_standard_error_is_that_of_a_sum_and_unknown_for_one_batch():
    result = probe(build("llama"), random_batches(4))
    table = result.batch_scores()
    assert result.standard_errors()[2] == pytest.approx(table[2].std(ddof=1) * 2)
    one = probe(build("llama"), random_batches(1))
    assert math.isnan(one.standard_errors()[0]) and math.isnan(one.split_half_overlap())


def test_a_nan_weight_names_the_layer_and_the_batch():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ProbeError, match=r"batch 0; layer 2 is the first"):
        probe(model, random_batches(1))


def test_a_nan_gradient_under_a_finite_loss_names_the_tensor_and_the_batch():
    model = build("llama")
    poison = model.model.layers[1].mlp.down_proj.register_full_backward_hook(
        lambda module, grad_in, grad_out: (grad_in[0] * float("nan"),)
    )
    with pytest.raises(ProbeError, match=r"layer [01]\) is not finite on batch 0"):
        probe(model, random_batches(1))
    poison.remove()


def test_a_batch_without_labels_is_an_error_not_a_zero():
    batches = random_batches(2)
    batches[1]["labels"].fill_(-100)
    with pytest.raises(ProbeError, match="batch 1 has no labelled token"):
        probe(build("llama"), batches)


def test_gradient_probe_takes_what_the_documentation_promises(tiny_llama, tokenized_rows):
    model = tiny_llama()
    scores = gradient_probe(model=model, dataset=tokenized_rows(8), num_layers=4, probe_batches=5, chunk_size=8)
    assert list(scores) == [0, 1, 2, 3] and scores.num_batches == 5
    assert dict(gradient_probe(model, tokenized_rows(8))) == dict(scores)
    assert dict(gradient_probe(model, tokenized_rows(8), seed=7)) != dict(scores)


@pytest.mark.parametrize("kwargs", [{"num_layers": 0}, {"num_layers": 5}, {"probe_batches": 0}, {"chunk_size": -1}])
def test_gradient_probe_refuses_counts_that_cannot_be(tiny_llama, tokenized_rows, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        gradient_probe(tiny_llama(), tokenized_rows(2), **kwargs)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode='fast'"):
        probe(build("llama"), random_batches(1), mode="fast")


def test_quantized_weights_are_measured_as_they_are():
    class Int8Linear(nn.Module):
        """A linear map whose weight is stored as int8 with one scale, as quantization libraries do."""

        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.scale = float(linear.weight.detach().abs().max()) / 127
            self.weight = nn.Parameter(
                (linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False
            )

        def forward(self, hidden):
            return nn.functional.linear(hidden, self.weight.to(hidden.dtype) * self.scale)

    model, plain, batches = build("llama"), build("llama"), random_batches(2)
    for layer, twin in zip(model.model.layers, plain.model.layers, strict=True):
        layer.mlp.up_proj = Int8Linear(layer.mlp.up_proj)
        twin.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.float() * layer.mlp.up_proj.scale
    for mode in ("exact", "gram"):
        result = probe(model, batches, mode=mode)
        assert dict(result) == pytest.approx(reference_scores(plain, batches), rel=2e-6)
        quantized = [tensor for tensor in result.tensors if tensor.name.endswith("up_proj")]
        assert len(quantized) == 4 and all(
            tensor.weight_norm is None and tensor.num_params == 32 * 64 for tensor in quantized
        )


def test_a_weight_tied_across_layers_is_measured_once():
    model = build("llama")
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    names = [tensor.name for tensor in probe(model, random_batches(1)).tensors if "up_proj" in tensor.name]
    assert names == [f"model.layers.{layer}.mlp.up_proj" for layer in (0,)] + ["model.layers.1.mlp.up_proj.weight"] + [
        "model.layers.3.mlp.up_proj"
    ]
