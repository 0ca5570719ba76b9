"""Kernels against formed gradients, likeness against its definition, the greedy choice against a slow reference."""

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from aletheia_lora.anatomy import anatomy
from aletheia_lora.data import tokenize
from aletheia_lora.errors import PlanError, ProbeError, UnsupportedModelError
from aletheia_lora.gradient_watch import _sketch
from aletheia_lora.loss import labelled_loss
from aletheia_lora.plan_options import PlanOptions
from aletheia_lora.planning import Plan, plan, plan_from_probe
from aletheia_lora.probe import _with_kernels, probe
from aletheia_lora.probe_result import ProbeResult
from aletheia_lora.redundancy import greedy, similarities
from aletheia_lora.selection import STRATEGIES, select
from aletheia_lora.selection_options import SelectionOptions
from families import build, random_batches
from tiny_inputs import word_rows, word_tokenizer

SCORES = {0: 4.0, 1: 3.9, 2: 3.0, 3: 1.0, 4: 0.5, 5: 0.1}


def kernels_of(rng, num_layers, num_batches=6, num_weights=4):
    """Kernels of random gradients."""
    gradients = rng.normal(size=(num_layers, num_batches, num_weights)) + rng.normal(size=(num_layers, 1, num_weights))
    return gradients @ gradients.transpose(0, 2, 1)


def exact_kernels(model, batches):
    """By plain autograd: all gradients of all batches alive at once."""
    model.eval()
    found = anatomy(model)
    maps = [[m.name for m in layer.modules if m.storage != "stacked"] for layer in found.layers]
    gradients = [[] for _ in maps]
    for batch in batches:
        model.zero_grad()
        labelled_loss(model, batch).backward()
        for layer_idx, names in enumerate(maps):
            parts = [model.get_submodule(name).weight.grad.flatten().double() for name in names]
            gradients[layer_idx].append(torch.cat(parts))
    return [torch.stack(rows) @ torch.stack(rows).T for rows in gradients]


# --- kernels ------------------------------------------------------------------------------------------------------


def test_the_inner_product_of_sketches_is_that_of_the_gradients_in_the_mean_over_seeds():
    source = torch.Generator().manual_seed(0)
    x, g, other_x, other_g = (
        torch.randn(*shape, generator=source, dtype=torch.float64) for shape in ((5, 6), (5, 4), (7, 6), (7, 4))
    )
    other_x[:5], other_g[:5] = x, g  # the two gradients have something in common
    exact = float(((g.T @ x) * (other_g.T @ other_x)).sum())
    found = [float((_sketch(x, g, seed) * _sketch(other_x, other_g, seed)).sum()) for seed in range(1000)]
    apart = [float((_sketch(x, g, seed) * _sketch(other_x, other_g, seed + 5000)).sum()) for seed in range(1000)]
    for values, mean in ((found, exact), (apart, 0.0)):
        error = np.std(values, ddof=1) / np.sqrt(len(values))
        assert error < 0.02 * exact
        assert abs(np.mean(values) - mean) < 4 * error


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_kernels_are_those_of_formed_gradients_in_the_mean_over_seeds_and_the_same_in_every_mode(family, monkeypatch):
    batches = random_batches(4)
    expected = np.stack([kernel.numpy() for kernel in exact_kernels(build(family), batches)])
    model, real = build(family), zlib.crc32
    found = []
    for seed in range(16):
        monkeypatch.setattr(zlib, "crc32", lambda name, seed=seed: real(name) + seed)
        found.append(probe(model, batches, mode=("exact", "gram")[seed % 2], kernels=True).kernels)
    off = np.linalg.norm(found - expected, axis=(2, 3)) / np.linalg.norm(expected, axis=(1, 2))
    assert off.max() < 0.8  # of one draw; the gradients of so small a model are nearly of rank one, the worst case
    mean_off = np.linalg.norm(np.mean(found, axis=0) - expected, axis=(1, 2)) / np.linalg.norm(expected, axis=(1, 2))
    assert mean_off.max() < 0.15
    monkeypatch.undo()
    exact, gram = (np.asarray(probe(model, batches, mode=mode, kernels=True).kernels) for mode in ("exact", "gram"))
    np.testing.assert_allclose(gram, exact, rtol=1e-4, atol=1e-5 * exact.max())  # float32


def test_a_probe_repeats_its_kernels_and_has_them_only_where_they_are_asked_for():
    batches = random_batches(3)
    model = build("llama", torch.float64)
    plain, first, again = (probe(model, batches, kernels=asked) for asked in (False, True, True))
    assert plain.kernels is None and first.kernels == again.kernels
    assert dict(plain) == dict(first)
    backwards = np.asarray(probe(model, batches[::-1], kernels=True).kernels)
    np.testing.assert_allclose(backwards[:, ::-1, ::-1], first.kernels, rtol=1e-9)


def test_kernels_come_in_the_order_of_batches_whoever_probed_them():
    result = probe(build("llama"), random_batches(5))
    source = torch.Generator().manual_seed(0)
    sketches = [torch.randn(4, 2, 3, generator=source) for _batch in range(5)]
    alone = _with_kernels(result, [sketches]).kernels
    assert all(_with_kernels(result, [sketches[r::n] for r in range(n)]).kernels == alone for n in (2, 3, 7))
    assert alone[1][2][4] == pytest.approx(float((sketches[2][1] * sketches[4][1]).sum()), rel=1e-6)


def test_kernels_survive_being_saved_and_are_absent_in_older_records(tmp_path):
    result = probe(build("llama"), random_batches(3), kernels=True)
    assert ProbeResult.load(result.save(tmp_path / "scores.json")).kernels == result.kernels
    older = result.to_dict()
    del older["kernels"]
    assert ProbeResult.from_dict(older).kernels is None


def test_a_layer_without_a_linear_map_of_its_own_is_refused():
    model = build("llama")
    first, second = model.model.layers[0], model.model.layers[1]
    for mine, other in zip(first.modules(), second.modules(), strict=True):
        if isinstance(mine, torch.nn.Linear):
            other.weight = mine.weight
    with pytest.raises(UnsupportedModelError, match=r"layers without a linear map .*spread"):
        probe(model, random_batches(3), kernels=True)
    assert not any(module._forward_hooks for module in model.modules())


# --- likeness -----------------------------------------------------------------------------------------------------


def test_similarity_is_its_definition_and_1_for_a_layer_with_itself():
    kernels = kernels_of(np.random.default_rng(0), 5)
    centring = np.eye(6) - 1 / 6
    alike = similarities(kernels)
    for one, other in itertools.product(range(5), repeat=2):
        left, right = (centring @ kernels[layer_idx] @ centring for layer_idx in (one, other))
        expected = np.trace(left @ right) / np.sqrt(np.trace(left @ left) * np.trace(right @ right))
        assert alike[one, other] == pytest.approx(expected, rel=1e-12)
    assert (np.diag(alike) == 1).all() and alike.min() >= 0 and alike[np.triu_indices(5, 1)].max() < 1


def test_similarity_does_not_change_with_the_scale_of_a_layer_or_the_order_of_batches():
    kernels = kernels_of(np.random.default_rng(1), 4)
    scaled = kernels * np.array([1e-6, 1.0, 3.0, 1e4])[:, None, None]
    order = [3, 1, 0, 5, 4, 2]
    np.testing.assert_allclose(similarities(scaled), similarities(kernels), rtol=1e-12)
    np.testing.assert_allclose(similarities(kernels[:, order][:, :, order]), similarities(kernels), rtol=1e-12)


def test_fewer_than_three_batches_are_refused_with_what_to_do():
    with pytest.raises(ProbeError, match=r"2 batches, expected at least 3.*Raise probe_batches"):
        similarities(kernels_of(np.random.default_rng(0), 4, num_batches=2))
    similarities(kernels_of(np.random.default_rng(0), 4, num_batches=3))


@pytest.mark.parametrize("kernel", [np.zeros((6, 6)), np.full((6, 6), 0.3)])
def test_a_gradient_that_is_the_same_on_all_batches_is_refused_by_its_layer(kernel):
    kernels = kernels_of(np.random.default_rng(0), 4)
    kernels[2] = kernel
    with pytest.raises(ProbeError, match=r"layer 2 is the same on all 6 batches.*spread"):
        similarities(kernels)


# --- the choice ---------------------------------------------------------------------------------------------------


def by_trying_all(scores, alike, count):
    """The greedy choice, step by step in plain Python."""
    chosen = []
    while len(chosen) < count:
        gains = {
            layer: scores[layer] * (1 - max((alike[layer][other] for other in chosen), default=0.0))
            for layer in sorted(scores)
            if layer not in chosen
        }
        chosen.append(max(gains, key=gains.__getitem__))  # the first of equals
    return sorted(chosen)


def test_the_greedy_choice_equals_a_slow_reference():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = dict(enumerate(rng.exponential(size=9).tolist()))
        kernels = kernels_of(rng, 9)
        for count in (1, 4, 9):
            options = SelectionOptions(num_layers=count, kernels=kernels)
            assert STRATEGIES["diverse"](scores, options) == by_trying_all(scores, similarities(kernels), count)


def test_two_layers_that_say_the_same_are_not_both_chosen_while_others_are_left():
    kernels = kernels_of(np.random.default_rng(0), 6)
    kernels[1] = 5 * kernels[0]
    choices = [select(SCORES, "diverse", SelectionOptions(num_layers=k, kernels=kernels)).layers for k in range(1, 7)]
    assert choices[0] == (0,)
    assert all(1 not in layers for layers in choices[:5]) and choices[5] == (0, 1, 2, 3, 4, 5)
    assert select(SCORES, "top_percent", SelectionOptions(num_layers=2)).layers == (0, 1)


def test_of_equal_layers_the_lower_is_chosen():
    same = np.repeat(kernels_of(np.random.default_rng(0), 1), 6, axis=0)
    assert STRATEGIES["diverse"](SCORES, SelectionOptions(num_layers=3, kernels=same)) == [0, 1, 2]
    assert greedy(dict.fromkeys(range(4), 1.0), np.eye(4), 2) == [0, 1]
    assert greedy(dict.fromkeys(range(4), 0.0), np.eye(4), 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("given", [{"percent": 1}, {"percent": 50}, {"percent": 100}, {"num_layers": 5}])
def test_it_chooses_as_many_layers_as_the_papers_rule_whatever_the_order_of_the_scores(given):
    options = SelectionOptions(**given, kernels=kernels_of(np.random.default_rng(0), 6))
    layers = STRATEGIES["diverse"](SCORES, options)
    assert len(layers) == len(STRATEGIES["top_percent"](SCORES, options)) and layers == sorted(layers)
    assert STRATEGIES["diverse"](dict(reversed(SCORES.items())), options) == layers


def test_what_the_choice_cannot_be_made_from_is_refused():
    kernels = kernels_of(np.random.default_rng(0), 6)
    with pytest.raises(ValueError, match=r"expected options\.kernels, got None.*kernels=True"):
        select(SCORES, "diverse")
    with pytest.raises(ValueError, match="6 scores, but kernels of 4 layers"):
        select(SCORES, "diverse", SelectionOptions(kernels=kernels[:4]))
    with pytest.raises(ValueError, match=r"none below 0, got -1\..*spread"):
        select({**SCORES, 3: -1.0}, "diverse", SelectionOptions(kernels=kernels))
    with pytest.raises(PlanError, match="num_layers=7, but the model has 6 layers"):
        select(SCORES, "diverse", SelectionOptions(num_layers=7, kernels=kernels))


# --- in a plan ----------------------------------------------------------------------------------------------------


def test_a_plan_probes_for_what_its_score_and_its_strategy_read():
    assert PlanOptions().probe_extras == PlanOptions(strategy="spread", score="fisher").probe_extras == {}
    assert PlanOptions(score="taylor").probe_extras == {"taylor": True}
    assert PlanOptions(strategy="diverse").probe_extras == {"kernels": True}
    assert PlanOptions(strategy="diverse", score="adapter_descent").probe_extras == {"descent": True, "kernels": True}


def test_a_plan_chooses_by_the_kernels_of_its_own_probe():
    rows = tokenize(word_rows(8), word_tokenizer())
    made = plan(build("llama"), rows, strategy="diverse", percent=75, rank=4, probe_batches=4)
    assert made.selection.layers == tuple(greedy(made.scores, similarities(made.probe.kernels), 3))
    assert Plan.from_dict(made.to_dict()).probe.kernels == made.probe.kernels
    assert {entry.layer_idx for entry in made.ranks} == set(made.selection.layers)
    with pytest.raises(ProbeError, match="2 batches, expected at least 3"):
        plan(build("llama"), rows, strategy="diverse", rank=4, probe_batches=2)


def test_a_probe_from_before_kernels_says_how_to_get_them():
    rows = tokenize(word_rows(8), word_tokenizer())
    made = plan(build("llama"), rows, strategy="spread", rank=4, probe_batches=4)
    with pytest.raises(ValueError, match="Probe with kernels=True"):
        plan_from_probe(made.anatomy, made.probe, replace(made.options, strategy="diverse"))
