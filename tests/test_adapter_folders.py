"""Adapters whose start rewrites the frozen weights, on a twin: the model behind it stays as it was."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from aletheia_lora.errors import AdapterError
from aletheia_lora.evaluation.adapters import weights_digest, with_adapter
from evaluation_inputs import byte_model


def save_adapter(folder, **settings):
    """A folder of an adapter that has moved from its start."""
    adapted = get_peft_model(byte_model(), LoraConfig(r=2, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "all-linear"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_twin_owns_the_weights_that_loading_rewrites(start, targets, tmp_path):
    folder, model = save_adapter(tmp_path, init_lora_weights=start, target_modules=targets), byte_model()
    before, ids = weights_digest(model), torch.arange(2, 30)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(byte_model(), str(folder))(ids).logits
        with with_adapter(model, folder) as twin:
            assert torch.equal(twin(ids).logits, expected)
            assert weights_digest(model) == before
            shared = {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
            assert targets == "all-linear" or len(shared) == len(list(model.parameters())) - 4  # two in each layer
    assert weights_digest(model) == before


def test_a_start_that_cannot_be_repeated_is_refused(tmp_path):
    folder = save_adapter(tmp_path, target_modules=["q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(AdapterError, match="something else out of the"), with_adapter(byte_model(), folder):
        pytest.fail("it was used")
