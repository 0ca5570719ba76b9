"""Predictions for models that were never loaded: right sizes, honest words, clear refusals."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config

from aletheia_lora.anatomy import anatomy
from aletheia_lora.cli import main
from aletheia_lora.cost import StepShape, cost_model
from aletheia_lora.errors import UnsupportedModelError
from aletheia_lora.memory import memory_model
from aletheia_lora.outlook import OutlookOptions, model_from_config, outlook, outlook_text
from families import CONFIGS

OPTIONS = OutlookOptions(batch_size=2, max_length=16, operations_per_second=1e9, memory_bytes=1_000_000)


@pytest.fixture
def folder(tmp_path):
    CONFIGS["llama"]().save_pretrained(tmp_path)
    return tmp_path


def dry_run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["aletheia", "plan", *map(str, arguments), "--dry-run"])
    try:
        main()
    except SystemExit as ended:
        assert ended.code in (None, 0), capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_has_an_outlook(family):
    record = outlook(model_from_config(CONFIGS[family]()), replace(OPTIONS, allocation="uniform"))
    assert record["activations"] == {"bfloat16": "traced", "4-bit": "traced"} and len(record["predictions"]) == 12
    by = {(row["weights"], row["depth"], row["checkpointing"]): row for row in record["predictions"]}
    for weights in ("bfloat16", "4-bit"):
        for checkpointing in (False, True):
            rows = [by[weights, depth, checkpointing] for depth in ("uniform", "top half", "top quarter")]
            assert [row["num_layers"] for row in rows] == [4, 2, 1]
            assert rows[0]["seconds"] > rows[1]["seconds"] > rows[2]["seconds"] > 0
            assert rows[0]["bytes"] > rows[1]["bytes"] > rows[2]["bytes"]
            assert rows[0]["speedup_ratio"] == 1.0 < rows[1]["speedup_ratio"] < rows[1]["cached_speedup_ratio"]
            assert rows[0]["cached_seconds"] is rows[0]["cached_speedup_ratio"] is None
    weights = record["weights_bytes"]
    for depth, checkpointing in {key[1:] for key in by}:  # packed matrices are unpacked, their inputs copied
        plain, packed = (by[w, depth, checkpointing]["bytes"] - weights[w] for w in ("bfloat16", "4-bit"))
        assert packed > plain or (checkpointing and packed == plain), (depth, checkpointing)
    assert all(row["fits"] is (row["bytes"] <= 1_000_000) for row in record["predictions"])
    assert "no layer was scored" in outlook_text(record)


def test_a_72b_model_is_predicted_from_its_shape():
    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    model = model_from_config(config)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    record = outlook(model, OPTIONS)
    assert record["num_params"] == 72_706_203_648
    assert record["weights_bytes"]["bfloat16"] == pytest.approx(2 * 72_706_203_648, rel=1e-6)
    assert record["weights_bytes"]["4-bit"] == pytest.approx(
        0.5625 * 80 * (3 * 8192 * 29568 + 2 * 8192 * 8192 + 2 * 8192 * 1024) + 2 * 2 * 152064 * 8192, rel=1e-3
    )


def test_the_command_answers_from_a_folder_or_a_file_without_weights(folder, monkeypatch, capsys):
    flags = ("--tflops", "0.001", "--memory-budget", "1GB", "--batch-size", "2", "--max-length", "16", "--json")
    record = json.loads(dry_run(monkeypatch, capsys, folder, *flags))
    assert record["run"]["model"] == str(folder) and record["run"]["memory_budget"] == "1GB"
    assert (record["operations_per_second"], record["rate_from"], record["memory_bytes"]) == (1e9, "given", 10**9)
    assert (record["batch_size"], record["max_length"]) == (2, 16)
    again = json.loads(dry_run(monkeypatch, capsys, folder / "config.json", *flags))
    assert again["predictions"] == record["predictions"]
    printed = dry_run(monkeypatch, capsys, folder, *flags[:-1])
    assert "LlamaForCausalLM: 4 layers" in printed and printed.count("4-bit") == 8


def test_rate_and_memory_are_this_machines_unless_given(folder, monkeypatch, capsys):
    record = json.loads(dry_run(monkeypatch, capsys, folder, "--device", "cpu", "--max-length", "16", "--json"))
    assert record["rate_from"] == "measured" and record["memory_bytes"] > 2**28


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory-budget", "lots"), "memory_budget='lots'"),
        (("--device", "nonsense"), "device='nonsense'"),
        (("--tflops", "0"), "tflops=0"),
        (("--tflops", "nan"), "tflops=nan"),
        (("--strategy", "buget"), "Did you mean 'budget'"),
        (("--tflops", "1", "--targets", "q_poj"), "target 'q_poj' matches no module"),
        (("--tflops", "1", "--rank", "4096"), "rank 4096 is larger than"),
        (("--tflops", "1", "--allocation", "asymmetric"), "rank 64 is larger than"),
        (("--quantization", "int8"), "a dry run predicts bfloat16 and 4-bit weights"),
    ],
)
def test_an_outlook_that_cannot_be_made_says_why(folder, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["aletheia", "plan", str(folder), *flags, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model_type": "nonsense"}', '{"model_type": "t5"}'])
def test_a_configuration_of_no_language_model_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match="cannot build"):
        model_from_config(str(tmp_path))


def test_an_outlook_of_a_loaded_model_leaves_it_as_found():
    torch.manual_seed(0)
    model = model_from_config(CONFIGS["gpt2"]())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    outlook(model, OPTIONS)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())


def test_ranks_and_targets_are_those_of_the_plan_that_would_be_made(folder, monkeypatch, capsys):
    flags = ("--tflops", "0.001", "--memory-budget", "1GB", "--max-length", "16", "--json")

    def half(*more):
        record = json.loads(dry_run(monkeypatch, capsys, folder, *flags, *more))
        rows = [row for row in record["predictions"] if row["weights"] == "bfloat16" and row["checkpointing"]]
        return {row["depth"]: row for row in rows}["top half"]

    model = model_from_config(str(folder))
    found = anatomy(model)
    shape = StepShape(num_tokens=64, num_labelled_tokens=64, sequence_length=16)
    for more, targets, rank in (
        ((), None, 8),
        (("--allocation", "uniform"), None, 4),
        (("--targets", "q_proj", "--targets", "down_proj", "--max-rank", "6"), ("q_proj", "down_proj"), 6),
    ):
        cost = cost_model(found, shape, targets=targets).in_seconds(1e9)
        memory = memory_model(found, num_rows=4, length=16, num_labelled=64, model=model, targets=targets)
        row = half("--rank", "4", *more)
        assert row["bytes"] == memory.step(range(2, 4), rank=rank, checkpointing=True), more
        assert row["seconds"] == pytest.approx(cost.step(range(2, 4), rank=rank, checkpointing=True)), more
        assert row["speedup_ratio"] == pytest.approx(cost.uniform(rank=4, checkpointing=True) / row["seconds"]), more
