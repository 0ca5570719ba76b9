"""What the front door promises: its names, the documented calls as they are written, and a light import."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import aletheia_lora
from aletheia_lora.adapter import census
from tiny_inputs import save_model, word_rows

ROOT = Path(aletheia_lora.__file__).parent
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- names ------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_every_listed_name_is_public():
    assert aletheia_lora.__all__ == sorted(set(aletheia_lora.__all__))
    assert set(aletheia_lora._HOMES) == set(aletheia_lora.__all__)
    assert dir(aletheia_lora) == sorted([*aletheia_lora.__all__, "__version__"])
    for name in aletheia_lora.__all__:
        room = importlib.import_module(f"aletheia_lora.{aletheia_lora._HOMES[name]}")
        assert getattr(aletheia_lora, name) is getattr(room, name)
        assert getattr(aletheia_lora, name).__doc__


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == aletheia_lora._HOMES
    assert (ROOT / "py.typed").is_file()


def test_everything_can_be_imported_with_a_star():
    names = {}
    exec("from aletheia_lora import *", names)
    assert set(aletheia_lora.__all__) <= set(names)


@pytest.mark.parametrize("name", ["gradient_prob", "torch", "_nothing"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'aletheia_lora' has no attribute '{name}'"):
        getattr(aletheia_lora, name)
    with pytest.raises(ImportError):
        exec(f"from aletheia_lora import {name}")


def process(program):
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_imports_nothing_heavy_and_its_names_do():
    assert process("import sys, aletheia_lora; print('torch' in sys.modules)") == ["False"]
    assert process("import sys, aletheia_lora; dir(aletheia_lora); print('torch' in sys.modules)") == ["False"]
    assert process("import sys; from aletheia_lora import AletheiaError; print('torch' in sys.modules)") == ["False"]


# --- the documented calls ---------------------------------------------------------------------------------------


def test_the_documented_calls_run_as_they_are_written(tiny_llama, tokenized_rows):
    model, train_dataset = tiny_llama(), tokenized_rows(8)

    from aletheia_lora import apply_aletheia_lora, gradient_probe, select_layers

    layer_scores = gradient_probe(
        model=model,
        dataset=train_dataset,
        num_layers=4,
        probe_batches=5,
        chunk_size=8,
    )
    selected_layers = select_layers(layer_scores, top_pct=50)
    peft_config = apply_aletheia_lora(
        model=model,
        selected_layers=selected_layers,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        r=16,
        lora_alpha=32,
    )
    model = get_peft_model(model, peft_config)

    assert isinstance(layer_scores, Mapping) and list(layer_scores) == [0, 1, 2, 3]
    assert all(isinstance(score, float) and score > 0 for score in layer_scores.values())
    assert layer_scores.num_batches == 5  # it carries the statistics
    assert len(selected_layers) == 2 and selected_layers == sorted(selected_layers)
    assert min(layer_scores[layer] for layer in selected_layers) >= max(
        layer_scores[layer] for layer in range(4) if layer not in selected_layers
    )
    assert isinstance(peft_config, LoraConfig) and isinstance(model, PeftModel)
    entries = census(model)
    assert {entry.name.rpartition(".")[2] for entry in entries} == set(SEVEN)
    assert {int(entry.name.split(".")[2]) for entry in entries} == set(selected_layers)
    assert {(entry.rank, entry.alpha) for entry in entries} == {(16, 32.0)}


def test_what_may_be_left_out_may_be_left_out(tiny_llama, tokenized_rows):
    model, rows = tiny_llama(), tokenized_rows(8)
    short = aletheia_lora.gradient_probe(model, rows)
    assert dict(short) == dict(aletheia_lora.gradient_probe(model=model, dataset=rows, num_layers=4, probe_batches=5))
    config = aletheia_lora.apply_aletheia_lora(model, aletheia_lora.select_layers(short))
    assert {entry.name.rpartition(".")[2] for entry in census(get_peft_model(model, config))} == set(SEVEN)


def test_a_configuration_needs_no_model(tiny_llama):
    config = aletheia_lora.aletheia_lora_config([1, 3], r=8, lora_alpha=16)
    assert config.layers_to_transform == [1, 3] and set(config.target_modules) == set(SEVEN)
    entries = census(get_peft_model(tiny_llama(), config))
    assert {int(entry.name.split(".")[2]) for entry in entries} == {1, 3}


def test_the_one_call_above_them_runs_as_it_is_written(tmp_path, capsys):
    folder = save_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = word_rows(16)

    import aletheia_lora as aletheia

    plan = aletheia.plan(model, rows, tokenizer=tokenizer, time_budget=0.8)
    print(plan)
    args = SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = aletheia.SFTTrainer(model, plan=plan, args=args, train_dataset=rows)
    trainer.train()

    assert "LlamaForCausalLM: layer" in capsys.readouterr().out
    assert plan.selection.predicted_time_share <= 0.8
    assert trainer.lowest_backward_layer == plan.selection.lowest
    assert trainer.dead_adapters == []
    assert isinstance(plan.lora_config(), LoraConfig)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, rows: aletheia_lora.gradient_probe(model, rows, num_layers=5), "num_layers=5, but Llama"),
        (lambda model, rows: aletheia_lora.gradient_probe(model, rows, probe_batches=0), "probe_batches=0"),
        (lambda model, rows: aletheia_lora.gradient_probe(model, rows, chunk_size=-1), "chunk_size=-1"),
        (lambda model, rows: aletheia_lora.gradient_probe(model, []), "0 rows"),
        (lambda model, rows: aletheia_lora.select_layers({}), "layer_scores"),
        (lambda model, rows: aletheia_lora.select_layers({0: 1.0}, top_pct=0), "top_pct"),
        (lambda model, rows: aletheia_lora.apply_aletheia_lora(model, [4]), "layer 4 does not exist"),
        (lambda model, rows: aletheia_lora.apply_aletheia_lora(model, [1, 1]), "more than once"),
        (lambda model, rows: aletheia_lora.apply_aletheia_lora(model, [1], ["q_porj"]), "Did you mean 'q_proj'"),
        (lambda model, rows: aletheia_lora.apply_aletheia_lora(model, [1], r=0), "rank 0"),
        (lambda model, rows: aletheia_lora.apply_aletheia_lora(model, [1], r=64), "rank 64"),
    ],
)
def test_a_call_that_cannot_be_met_is_a_value_error_with_the_next_step(tiny_llama, tokenized_rows, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_llama(), tokenized_rows(4))


def test_the_documented_calls_leave_the_model_and_the_random_numbers_as_found(tiny_llama, tokenized_rows):
    model = tiny_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    scores = aletheia_lora.gradient_probe(model=model, dataset=tokenized_rows(6), num_layers=4)
    aletheia_lora.apply_aletheia_lora(model=model, selected_layers=aletheia_lora.select_layers(scores))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_errors_are_of_one_tree_and_of_pythons_own_kinds():
    from aletheia_lora import errors

    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(found) > 5
    assert all(issubclass(error, aletheia_lora.AletheiaError) for error in found)
    assert issubclass(errors.PlanError, ValueError) and issubclass(errors.OutputError, OSError)
    assert issubclass(errors.UnsupportedModelError, NotImplementedError)
    drawn = {word for word in errors.__doc__.split() if word.endswith("Error")}
    assert drawn >= {error.__name__ for error in found}
