"""Every family that transformers knows, one by one: read, probed, adapted, trained, saved, loaded and merged."""

import math

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper

from aletheia_lora.adapter import attach, dead_adapters
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy, linear_shape
from aletheia_lora.layers import layer_blocks
from aletheia_lora.loss import labelled_loss
from aletheia_lora.probe import probe
from families import random_batches
from model_zoo import FAMILIES, build

RANKS = AllocationOptions(rank=2, attention_rank=2, mlp_rank=4)


def snapshot(model):
    """All that a caller could see of a model: names, contents, flags, modes, hooks."""
    return (
        [
            (name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks), type(module))
            for name, module in model.named_modules()
        ],
        [(name, parameter.requires_grad, parameter.grad is None) for name, parameter in model.named_parameters()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def assert_as_found(model, before):
    after = snapshot(model)
    assert after[:2] == before[:2]
    assert after[2].keys() == before[2].keys()
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in after[2].items())


def matrices(model, layer_idx):
    """Names of all matrices of a layer, by walking it: of the module, and of the parameter where it has several axes."""
    names = {id(module): name for name, module in model.named_modules()}
    found = set()
    for block in layer_blocks(model)[layer_idx]:
        for module in block.modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and not leaf.endswith("bias"):
                    linear = leaf == "weight" and linear_shape(module) is not None
                    found.add(names[id(module)] if linear else f"{names[id(module)]}.{leaf}")
    return found


def adapted_names(peft_model):
    """What carries an adapter, read from the names of the trainable tensors alone."""
    owners = {name.rpartition(".lora_B")[0] for name, p in peft_model.named_parameters() if ".lora_B" in name}
    found = set()
    for owner in owners:
        module = peft_model.get_submodule(owner)
        name = owner.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            name = f"{name}.{module.parameter_name}".removesuffix(".weight")
        found.add(name)
    return found


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_probed_adapted_trained_saved_loaded_and_merged(family, tmp_path):
    expected = FAMILIES[family]
    model, batch = build(family), random_batches(1)[0]
    before = snapshot(model)

    found = anatomy(model)
    assert found.num_layers == expected.num_layers
    assert found.trial_forward == "ran"
    left_out = {item.name for item in found.left_out}
    for layer in found.layers:
        modules = {module.name for module in layer.modules}
        assert modules | {n for n in left_out if n in matrices(model, layer.layer_idx)} == matrices(
            model, layer.layer_idx
        )
    scores = probe(model, [batch])
    assert all(math.isfinite(score) for score in scores.values())
    assert {layer for layer, score in scores.items() if score == 0} == set(expected.silent_layers)
    assert_as_found(model, before)

    layers = expected.layers
    ranks = allocate(found, layers, "asymmetric", RANKS)
    adapted = attach(model, found, ranks)
    wanted = {name for layer in layers for name in matrices(model, layer)}
    wanted = set().union(*(matrices(build(family), layer) for layer in layers)) - left_out
    assert adapted_names(adapted) == wanted
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == sum(entry.num_params for entry in ranks)

    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    adapted.train()
    labelled_loss(adapted, batch).backward()
    assert {name.rpartition(".lora_B")[0] for name in dead_adapters(adapted)} == set(expected.dead)
    torch.optim.SGD(trained, lr=0.5).step()
    with torch.no_grad():
        for index, parameter in enumerate(trained):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    logits = logits_of(adapted, batch)
    assert not torch.allclose(logits, logits_of(build(family), batch))

    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(build(family), str(tmp_path))
    torch.testing.assert_close(logits_of(loaded, batch), logits, rtol=0, atol=1e-6)  # float32; 0 but for scans
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, batch), logits, rtol=1e-4, atol=2e-5)  # float32
