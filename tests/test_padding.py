"""Padding that training will compute is foreseen and predicted; choices by counts do not look at it."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest

from aletheia_lora.anatomy import anatomy
from aletheia_lora.padding import foreseen_padding, why_padded
from aletheia_lora.plan_options import PlanOptions
from aletheia_lora.planning import plan_from_probe
from aletheia_lora.prediction import batch_shape
from aletheia_lora.probe import probe
from families import build, random_batches


@pytest.fixture(scope="module")
def measured():
    """A llama, its anatomy and a probe."""
    model = build("llama")
    return model, anatomy(model), probe(model, random_batches(2))


def test_padding_is_predicted_where_training_computes_it(measured):
    model, found, result = measured
    lengths = np.asarray(sorted(result.row_lengths or range(8, 17)))
    result = replace(result, row_lengths=tuple(lengths.tolist()))
    longest = [max(rows) for rows in itertools.product(lengths, repeat=2)]
    assert batch_shape(result, 2, padded=True).mean_length == pytest.approx(np.mean(longest))
    assert batch_shape(result, 1, padded=True).mean_length == pytest.approx(batch_shape(result, 1).mean_length)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    options = PlanOptions(probe_batches=2, rank=4, time_budget=0.9)
    without, with_padding = (plan_from_probe(found, result, options, model=given) for given in (model, eager))
    assert without.prediction.mean_length == pytest.approx(lengths.mean())
    assert with_padding.prediction.mean_length > lengths.mean()
    assert without.prediction.uniform_seconds < with_padding.prediction.uniform_seconds
    assert without.selection == with_padding.selection  # counts choose, alike everywhere


def test_padding_is_foreseen_for_the_reasons_that_training_has(measured, monkeypatch):
    model, found, _ = measured
    assert foreseen_padding(found, model) is None and foreseen_padding(found, None) is None
    assert foreseen_padding(anatomy(build("mamba")), None) == "its mixers carry a state along"
    assert why_padded(found, model, trl_loss=True, engine="it shards") == "TRL computes the loss"
    assert why_padded(found, model, trl_loss=False, engine="it shards") == "it shards"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert foreseen_padding(found, model) == "FSDP2 shards the weights"
