"""Scores against sums written out by hand on a synthetic probe, and the data-free control against plain SVD."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from aletheia_lora.anatomy import anatomy
from aletheia_lora.errors import ProbeError
from aletheia_lora.probe_result import ProbeResult, TensorStatistics
from aletheia_lora.scores import SCORES, layer_scores

NORMS = [[3.0, 4.0], [1.0, 2.0]]  # of the adaptable tensor "q" of each layer, two batches


def tensor(layer: int, name: str, norms: list[float], **changes: Any) -> TensorStatistics:
    fields: dict[str, Any] = {
        "kind": "attention",
        "num_params": 10,
        "method": "formed",
        "taylor": tuple(2 * norm for norm in norms),
        "weight_norm": 5.0,
        "descent": sum(norms) / 2,
    }
    return TensorStatistics(
        name=f"layers.{layer}.{name}", layer_idx=layer, grad_norm=tuple(norms), **{**fields, **changes}
    )


def probe(*tensors: TensorStatistics, num_layers: int = 2, fingerprint: str = "f") -> ProbeResult:
    batches = len(tensors[0].grad_norm)
    return ProbeResult(
        fingerprint=fingerprint,
        num_layers=num_layers,
        tensors=tensors,
        losses=(1.0,) * batches,
        num_tokens=(8,) * batches,
        num_labelled_tokens=(4,) * batches,
        batch_size=1,
        seconds=1.0,
        peak_memory_bytes=0,
        mode="exact",
    )


def two_layers() -> ProbeResult:
    adaptable = [tensor(layer, "q", norms) for layer, norms in enumerate(NORMS)]
    wide = tensor(0, "up", [1.0, 1.0], kind="mlp", num_params=30, weight_norm=2.0)
    norm_weight = tensor(0, "norm", [100.0, 100.0], kind="other", taylor=None, weight_norm=None)
    return probe(*adaptable, wide, norm_weight)


def tiny_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes))


def probe_of(model: LlamaForCausalLM) -> ProbeResult:
    layers = model.config.num_hidden_layers
    tensors = [tensor(layer, "q", [1.0]) for layer in range(layers)]
    return probe(*tensors, num_layers=layers, fingerprint=anatomy(model).fingerprint)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gradient_norm", {0: 3 + 4 + 1 + 1 + 200, 1: 1 + 2}),
        ("gradient_norm_rms", {0: math.sqrt((9 + 16 + 1 + 1) / (40 * 2)), 1: math.sqrt((1 + 4) / (10 * 2))}),
        ("relative", {0: 7 / 5 + 2 / 2, 1: 3 / 5}),
        ("fisher", {0: 9 + 16 + 1 + 1, 1: 1 + 4}),
        ("taylor", {0: 14 + 4, 1: 6}),
        ("adapter_descent", {0: 3.5 + 1, 1: 1.5}),
    ],
)
def test_a_score_equals_its_definition_written_out(name: str, expected: dict[int, float]) -> None:
    assert layer_scores(name, two_layers()) == pytest.approx(expected, rel=1e-14)


def test_gradient_norm_is_the_probe_itself() -> None:
    assert layer_scores("gradient_norm", two_layers()) == dict(two_layers())


@pytest.mark.parametrize("name", [name for name in SCORES if name not in ("weight_snr", "random")])
def test_the_order_of_batches_does_not_matter(name: str) -> None:
    turned = [
        dataclasses.replace(t, grad_norm=t.grad_norm[::-1], taylor=None if t.taylor is None else t.taylor[::-1])
        for t in two_layers().tensors
    ]
    assert layer_scores(name, probe(*turned)) == pytest.approx(layer_scores(name, two_layers()), rel=1e-14)


@pytest.mark.parametrize("name", ["gradient_norm_rms", "relative", "fisher", "taylor", "adapter_descent"])
def test_a_layer_without_adaptable_tensors_scores_zero(name: str) -> None:
    result = probe(tensor(0, "q", [1.0]), tensor(1, "norm", [9.0], kind="other"))
    assert layer_scores(name, result)[1] == 0.0


def test_rms_does_not_favour_the_wide_layer() -> None:
    entry = 0.1
    narrow, wide = (tensor(i, "q", [entry * math.sqrt(n)], num_params=n) for i, n in enumerate((16, 4096)))
    scores = layer_scores("gradient_norm_rms", probe(narrow, wide))
    assert scores == pytest.approx({0: entry, 1: entry})


def test_relative_names_the_tensor_whose_weight_norm_is_hidden() -> None:
    result = probe(tensor(0, "q", [1.0]), tensor(1, "q", [1.0], weight_norm=None))
    with pytest.raises(ProbeError, match=r"layers\.1\.q .*quantized storage hides it"):
        layer_scores("relative", result)


def test_relative_refuses_a_weight_of_zeros() -> None:
    with pytest.raises(ProbeError, match=r"layers\.0\.q is all zeros"):
        layer_scores("relative", probe(tensor(0, "q", [1.0], weight_norm=0.0), num_layers=1))


def test_taylor_names_the_tensor_whose_gradient_was_not_formed() -> None:
    result = probe(tensor(0, "q", [1.0], method="gram", taylor=None), num_layers=1)
    with pytest.raises(ProbeError, match=r"layers\.0\.q .*taylor=True.*mode='exact'"):
        layer_scores("taylor", result)


def test_adapter_descent_names_the_tensor_that_was_measured_without() -> None:
    result = probe(tensor(0, "q", [1.0], descent=None), num_layers=1)
    with pytest.raises(ProbeError, match=r"layers\.0\.q .*descent=True"):
        layer_scores("adapter_descent", result)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_names_the_layer(bad: float) -> None:
    result = probe(tensor(0, "q", [1.0, 1.0]), tensor(1, "q", [1.0, bad]))
    with pytest.raises(ProbeError, match="layer 1: the fisher score is"):
        layer_scores("fisher", result)


def test_an_unknown_score_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'gradient_norm'"):
        layer_scores("gradient_nrom", two_layers())


def test_random_repeats_under_one_seed_and_leaves_global_state_alone() -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
    first, again, other = (layer_scores("random", two_layers(), rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr,index]


def test_random_without_rng_is_refused() -> None:
    with pytest.raises(ValueError, match="default_rng"):
        layer_scores("random", two_layers())


def test_weight_snr_equals_a_plain_svd() -> None:
    model = tiny_model()
    ratios = []
    for module in anatomy(model).layers[2].modules:
        weight = model.get_submodule(module.name).weight.detach().double().numpy()
        values = np.linalg.svd(weight, compute_uv=False)
        sigma = (np.quantile(values, 0.75) - np.quantile(values, 0.25)) / 1.349
        edge = sigma * (1 + math.sqrt(min(weight.shape) / max(weight.shape)))
        ratios.append(values[values > edge].sum() / values[values <= edge].sum())
    # float32 against float64
    assert layer_scores("weight_snr", probe_of(model), model=model)[2] == pytest.approx(np.mean(ratios), rel=1e-4)


def test_weight_snr_rises_with_a_planted_direction() -> None:
    model = tiny_model()
    with torch.no_grad():
        weight = model.model.layers[1].self_attn.q_proj.weight
        weight.add_(torch.outer(torch.ones(32), torch.ones(32)))
    scores = layer_scores("weight_snr", probe_of(model), model=model)
    assert max(scores, key=lambda layer: scores[layer]) == 1


def test_weight_snr_of_stacked_experts_is_their_mean() -> None:
    from aletheia_lora.scores import _signal_to_noise

    stack = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))
    apart = [_signal_to_noise(expert, "w") for expert in stack]
    assert _signal_to_noise(stack, "w") == pytest.approx(sum(apart) / 3)


def test_weight_snr_where_nothing_lies_below_the_edge_divides_by_the_edge() -> None:
    from aletheia_lora.scores import _signal_to_noise

    values = torch.tensor([10.0, 9.5, 9.0, 8.5])
    edge = 0.75 / 1.349 * 2
    assert _signal_to_noise(torch.diag(values), "w") == pytest.approx(37.0 / edge)


def test_weight_snr_without_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="expected model"):
        layer_scores("weight_snr", two_layers())


def test_weight_snr_refuses_another_model_than_the_probed_one() -> None:
    with pytest.raises(ProbeError, match="the probe is of another model"):
        layer_scores("weight_snr", two_layers(), model=tiny_model())


def test_weight_snr_names_a_quantized_weight() -> None:
    model = tiny_model()
    packed = torch.zeros(32, 16, dtype=torch.uint8)
    model.model.layers[3].mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ProbeError, match=r"layers\.3\.mlp\.up_proj is stored quantized"):
        layer_scores("weight_snr", probe_of(model), model=model)


def test_weight_snr_names_a_weight_without_values() -> None:
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(ProbeError, match=r"layers\.0\..*meta device"):
        layer_scores("weight_snr", probe_of(model), model=model)


def test_weight_snr_names_a_weight_without_spread() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.copy_(torch.eye(32))
    with pytest.raises(ProbeError, match=r"layers\.0\.self_attn\.q_proj: the quartiles"):
        layer_scores("weight_snr", probe_of(model), model=model)


def test_every_score_covers_every_layer() -> None:
    model = tiny_model()
    result = probe_of(model)
    for name in SCORES:
        scores = layer_scores(name, result, model=model, rng=np.random.default_rng(0))
        assert list(scores) == [0, 1, 2, 3], name
