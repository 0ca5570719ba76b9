"""Every family that transformers knows, one by one: read, probed, adapted, trained, saved, loaded and merged."""

import functools
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import trl
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper

from aletheia_lora.adapter import attach, dead_adapters
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy, linear_shape
from aletheia_lora.data import tokenize
from aletheia_lora.errors import ProbeError, UnsupportedModelError
from aletheia_lora.layers import layer_blocks
from aletheia_lora.loss import labelled_loss
from aletheia_lora.planning import plan
from aletheia_lora.probe import probe
from aletheia_lora.training.trainer import SFTTrainer
from families import random_batches
from model_zoo import (
    FAMILIES,
    LAYERS,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    NOT_BUILT,
    REFUSED,
    build,
)
from tiny_inputs import word_rows, word_tokenizer

CHECKOUT = Path(__file__).resolve().parents[1]
DOZEN = {
    *("llama", "gpt2", "gemma3", "phi3", "mixtral", "qwen3_moe", "deepseek_v3", "mamba2", "jamba", "qwen3_next"),
    *("zamba2", "recurrent_gemma", "gpt_neox"),
}
"""Families that run by default: dense, fused, mixtures, hybrids, tied layers, parallel attention, a vision tower."""
ONE_BY_ONE = [pytest.param(name, marks=() if name in DOZEN else pytest.mark.all_families) for name in FAMILIES]
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
    """Names of all matrices of a layer, by walking it: the module of a linear map, else the parameter."""
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
        if isinstance(module, ParamWrapper) and linear_shape(module.get_base_layer()) is None:
            name = f"{name}.{module.parameter_name}"
        found.add(name)
    return found


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], use_cache=False).logits


@pytest.mark.parametrize("family", sorted(DOZEN))
def test_our_trainer_takes_a_step_and_backward_ends_where_the_plan_says(family, tmp_path):
    tokenizer = word_tokenizer()
    rows = tokenize(word_rows(8), tokenizer)
    made = plan(build(family), rows, strategy="last", num_layers=2, probe_batches=1, rank=2, allocation="uniform")
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(build(family), plan=made, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.lowest_backward_layer == made.selection.lowest == LAYERS - 2
    assert trainer.dead_adapters == []
    assert all(p.abs().max() > 0 for name, p in trainer.model.named_parameters() if "lora_B" in name)


# PEFT compares rank patterns with modules alone, and so warns of those that name a parameter, which do apply.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
# Of a model whose head was never tied, though its configuration says so.
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("family", ONE_BY_ONE)
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
    wanted = set().union(*(matrices(model, layer) for layer in layers)) - left_out
    plain_logits = logits_of(model, batch)
    model.train()
    adapted = attach(model, found, ranks)
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
    assert not torch.allclose(logits, plain_logits)

    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(build(family), str(tmp_path))
    torch.testing.assert_close(logits_of(loaded, batch), logits, rtol=0, atol=1e-6)  # float32; 0 but for scans
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, batch), logits, rtol=1e-4, atol=2e-5)  # float32


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.all_families) for name in REFUSED])
def test_a_family_that_cannot_be_is_refused_with_the_reason(family):
    model = build(family)
    with pytest.raises((UnsupportedModelError, ProbeError), match=REFUSED[family]):
        probe(model, random_batches(1), anatomy_=anatomy(model))


def test_every_type_that_transformers_knows_is_tried_or_listed_with_a_reason():
    assert {*FAMILIES, *REFUSED, *NOT_BUILT} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert len(FAMILIES) >= 170 and set(FAMILIES) >= DOZEN
    assert all(REFUSED.values()) and all(NOT_BUILT.values())


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_of_a_model_that_sees_only_the_text_decoder_is_adapted(family):
    model = build(family)
    found = anatomy(model)
    assert found.num_layers == LAYERS
    adapted = attach(model, found, allocate(found, list(range(found.num_layers)), "uniform", RANKS))
    names = adapted_names(adapted)
    assert names == set().union(*(matrices(build(family), layer) for layer in range(found.num_layers)))
    assert not any("vision" in name or "visual" in name for name in names)
    labelled_loss(adapted, random_batches(1)[0]).backward()
    assert dead_adapters(adapted) == []


@functools.cache
def table_script():
    spec = importlib.util.spec_from_file_location("models_run", CHECKOUT / "benchmarks" / "models" / "run.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_the_committed_table_says_what_the_code_finds(family):
    table = (CHECKOUT / "docs" / "models.md").read_text(encoding="utf-8")
    assert table_script().line(family) in table.splitlines()


def test_the_committed_table_lists_every_type_and_at_least_eighty_whole_ones():
    table = (CHECKOUT / "docs" / "models.md").read_text(encoding="utf-8")
    listed = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert set(listed) >= {*FAMILIES, *REFUSED, *NOT_BUILT}
    assert table.count("| 100 % |") >= 80
