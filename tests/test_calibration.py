"""Seconds of a step: known timings give known costs, noise between equal layers is smoothed, nothing is left behind."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from aletheia_lora.anatomy import anatomy
from aletheia_lora.calibration import RANKS, calibrated_cost, measured_rate, timed_adapters
from aletheia_lora.cost import StepShape, cost_model
from aletheia_lora.data import tokenize
from aletheia_lora.plan_options import PlanOptions
from aletheia_lora.probe import probe, timed_step
from aletheia_lora.probe_result import AdapterTiming, ProbeResult, StepTiming
from aletheia_lora.probing import probe_rows, training_batch
from families import CONFIGS, build, random_batches
from tiny_inputs import word_rows, word_tokenizer

SHAPE = StepShape(num_tokens=96, num_labelled_tokens=40, sequence_length=24)
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def timing_at(found, *, rates=(1e-9, 2e-9, 3e-9), noise=()):
    """What a machine would show whose forward, backward and head take these seconds an operation."""
    batches = [(1, 12, 6), (1, 16, 8), (1, 20, 10)]
    counts = [
        cost_model(found, StepShape(num_tokens=r * n, num_labelled_tokens=labels, sequence_length=n))
        for r, n, labels in batches
    ]
    wobble = dict(noise)
    return StepTiming(
        device="cpu",
        forward=tuple(tuple(rates[0] * f * wobble.get(i, 1) for i, f in enumerate(c.forward)) for c in counts),
        backward=tuple(tuple(rates[1] * b for b in c.backward) for c in counts),
        outside=tuple(rates[2] * c.head for c in counts),
        num_rows=tuple(r for r, _, _ in batches),
        lengths=tuple(n for _, n, _ in batches),
        num_labelled=tuple(labels for *_, labels in batches),
    )


def test_known_rates_give_the_counts_at_those_rates():
    found = anatomy(build("llama"))
    made, counted = calibrated_cost(found, SHAPE, timing_at(found)), cost_model(found, SHAPE)
    assert (made.unit, made.source) == ("seconds", "calibrated")
    assert made.forward == pytest.approx([1e-9 * part for part in counted.forward])
    assert made.backward == pytest.approx([2e-9 * part for part in counted.backward])
    assert (made.head, made.head_all_tokens) == pytest.approx((3e-9 * counted.head, 3e-9 * counted.head_all_tokens))
    assert made.adapter_per_rank == pytest.approx([1e-9 * part for part in counted.adapter_per_rank])  # not timed


def test_noise_between_layers_of_equal_shape_does_not_decide():
    found = anatomy(build("llama"))
    made = calibrated_cost(found, SHAPE, timing_at(found, noise={2: 1.4}.items()))
    assert len(set(made.forward)) == 1
    mixed = anatomy(build("qwen3_moe"))  # its layer 0 has no experts
    made = calibrated_cost(mixed, SHAPE, timing_at(mixed, noise={0: 3.0}.items()))
    counted = cost_model(mixed, SHAPE)
    assert made.forward[0] == pytest.approx(3e-9 * counted.forward[0])
    assert made.forward[1:] == pytest.approx([1e-9 * part for part in counted.forward[1:]])


def test_adapters_cost_what_was_timed_on_their_shapes():
    found = anatomy(build("llama"))
    sides = sorted({(module.in_features, module.out_features) for module in found.modules})
    timed = tuple(AdapterTiming(*shape, fixed_seconds=0.5, seconds_per_rank=0.01) for shape in sides)
    made = calibrated_cost(found, SHAPE, replace(timing_at(found), adapters=timed, adapter_tokens=48))
    assert made.adapters([1], rank=10) == pytest.approx(2 * 7 * (0.5 + 10 * 0.01))  # 96 of 48 tokens, seven modules
    assert made.step([1], rank=10) == pytest.approx(made.without_adapters(1) + made.adapters([1], rank=10))
    timing = replace(timing_at(found), adapters=timed, adapter_tokens=48)
    two = calibrated_cost(found, SHAPE, timing, targets=("q_proj", "down_proj"))
    assert two.adapters([1], rank=10) == pytest.approx(2 * 2 * (0.5 + 10 * 0.01))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_probe_tells_where_its_time_went_on_every_family(family):
    model = build(family)
    result = probe(model, random_batches(2))
    timing = result.timing
    assert timing is not None and timing.num_rows == (2, 2) and timing.lengths == (12, 12)
    for forward, backward, outside in zip(timing.forward, timing.backward, timing.outside, strict=True):
        assert len(forward) == len(backward) == 4 and min(*forward, *backward) > 0
        assert sum(forward) + sum(backward) + outside < result.seconds
    assert calibrated_cost(anatomy(model), SHAPE, timing).uniform() > 0


@pytest.mark.parametrize("family", CONFIGS)
def test_a_batch_of_training_is_timed_on_every_family(family):
    model = build(family).train()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    timing = timed_step(model, random_batches(1, rows=3, length=10)[0])
    assert timing is not None and set(zip(timing.num_rows, timing.lengths, strict=True)) == {(3, 10)}
    assert all(min(*forward, *backward) > 0 for forward, backward in zip(timing.forward, timing.backward, strict=True))
    assert calibrated_cost(anatomy(model), SHAPE, timing).uniform() > 0
    assert model.training and flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_that_cannot_be_timed_leaves_the_probe_and_the_model_as_they_are(monkeypatch):
    model, batch = build("llama"), random_batches(1)[0]
    assert timed_step(model, {**batch, "labels": torch.full_like(batch["labels"], -100)}) is None

    def too_large(model, batch):
        raise torch.OutOfMemoryError("no room for a batch")

    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.warns(UserWarning, match="could not be timed.*no room for a batch"):
        assert timed_step(model, batch, loss_fn=too_large) is None
    with pytest.warns(UserWarning, match="could not be timed.*does not require grad"):
        assert timed_step(model, batch, loss_fn=lambda _model, _batch: torch.zeros(())) is None
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    monkeypatch.setattr("aletheia_lora.probing.timed_step", lambda *_: None)
    rows = tokenize(word_rows(8), word_tokenizer())
    _, measured = probe_rows(model, rows, PlanOptions(probe_batches=2, batch_size=4))
    assert measured.timing.num_rows == (1, 1)


def test_a_plan_times_a_batch_as_training_will_see_it(monkeypatch):
    rows = tokenize(word_rows(8), word_tokenizer())
    options = PlanOptions(probe_batches=2, batch_size=4)
    _, measured = probe_rows(build("llama"), rows, options)
    assert set(measured.timing.num_rows) == {4} and measured.timing.adapters == ()
    _, measured = probe_rows(build("llama"), rows, PlanOptions(probe_batches=2, batch_size=99, calibrate=True))
    assert set(measured.timing.num_rows) == {8} and measured.timing.adapters
    for short in ({"memory_budget": "1GiB"}, {"gradient_checkpointing": True}):  # a whole batch might not fit
        _, measured = probe_rows(build("llama"), rows, replace(options, **short))
        assert measured.timing.num_rows == (1, 1)
    longest = max(len(row.input_ids) for row in rows)
    monkeypatch.setattr("aletheia_lora.probing.TIMED_TOKENS", 2 * longest)
    assert 2 <= len(training_batch(rows, options, 0)["input_ids"]) < 4


def test_what_the_norms_take_is_not_counted_as_backward(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("aletheia_lora.stopwatch.time.perf_counter", lambda: float(next(clock)))
    measured = probe(build("llama"), random_batches(1), mode="exact").timing
    # Every reading is one tick later: a layer's backward is one tick, plus one before each of its pauses.
    assert measured is not None and len(set(measured.backward[0][:3])) == 1
    assert measured.backward[0][1] == 1 + 7 + 2  # seven matrices and two norms


def test_a_record_with_timing_survives_json_and_one_without_still_loads():
    result = probe(build("llama"), random_batches(2))
    full = replace(
        result,
        row_lengths=(3, 4),
        timing=timed_adapters(anatomy(build("llama")), result.timing, 24, **CPU, seconds=0.0),
    )
    record = json.loads(json.dumps(full.to_dict()))
    again = ProbeResult.from_dict(record)
    assert (again.timing, again.row_lengths) == (full.timing, (3, 4))
    assert StepTiming.from_dict(asdict(full.timing)) == full.timing
    older = {**record, "timing": {**record["timing"], "batching": 0.8}}
    assert ProbeResult.from_dict(older).timing == full.timing
    del record["timing"], record["row_lengths"]
    old = ProbeResult.from_dict(record)
    assert old.timing is None and old.row_lengths == ()


def test_adapters_are_timed_through_the_factory_and_random_state_stays():
    found = anatomy(build("llama"))
    asked = []

    def factory(in_features, out_features, rank, *, device, dtype):
        asked.append((in_features, out_features, rank))
        return nn.Linear(in_features, out_features, device=device, dtype=dtype)

    state = torch.get_rng_state()
    timing = timed_adapters(found, timing_at(found), 96, **CPU, make_module=factory, seconds=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    shapes = {(32, 32), (32, 16), (32, 64), (64, 32)}
    assert set(asked) == {(*shape, rank) for shape in shapes for rank in (None, *RANKS)}
    assert {(entry.in_features, entry.out_features) for entry in timing.adapters} == shapes
    assert timing.adapter_tokens == 96


def test_real_adapters_take_time():
    found = anatomy(build("llama"))
    timing = timed_adapters(found, timing_at(found), 96, **CPU, seconds=0.05)
    assert sum(entry.fixed_seconds + entry.seconds_per_rank * 64 for entry in timing.adapters) > 0


def test_a_rate_turns_counts_into_seconds():
    rate = measured_rate("cpu", seconds=0.0)
    assert rate > 1e7
    counted = cost_model(anatomy(build("llama")), SHAPE)
    timed = counted.in_seconds(rate)
    assert (timed.unit, timed.source) == ("seconds", "counted")
    assert timed.step([1, 3], rank=8) == pytest.approx(counted.step([1, 3], rank=8) / rate)
    assert timed.share([2]) == pytest.approx(counted.share([2]))
    assert timed.in_seconds(5.0) is timed


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_has_no_rate(device):
    with pytest.raises(ValueError, match=f"device='{device}' cannot multiply"):
        measured_rate(device)


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_cannot_be_is_refused(rate):
    with pytest.raises(ValueError, match="expected a positive number"):
        cost_model(anatomy(build("llama")), SHAPE).in_seconds(rate)
