import json
import subprocess
import sys

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from aletheia_lora.cli import DEMO, app, main
from aletheia_lora.data import split, tokenize
from aletheia_lora.planning import Plan, plan
from aletheia_lora.probe_result import ProbeResult
from aletheia_lora.run_config import GROUPS, RunConfig
from aletheia_lora.runs import load_parts
from families import build
from tiny_inputs import save_model, word_rows, word_tokenizer

pytestmark = pytest.mark.usefixtures("library_logging")

SMALL = ("--validation-rows", "4", "--probe-batches", "2", "--rank", "4", "--strategy", "last", "--num-layers", "2")
SHORT = ("--steps", "2", "--batch-size", "4")
COMMANDS = ("doctor", "probe", "plan", "train", "compare", "demo", "eval")


@pytest.fixture
def aletheia(monkeypatch, capsys):
    """Runs the command in this process; gives what it printed, after checking that it ended well."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["aletheia", *map(str, arguments)])
        try:
            main()
        except SystemExit as ended:  # to a shell the same as returning
            assert ended.code in (None, 0)
        return capsys.readouterr().out

    return run


def one_object(printed):
    """The one JSON object that is all of standard output."""
    assert printed.count("\n") == 1 and printed.endswith("\n")
    return json.loads(printed)


def names(folder):
    return {path.name for path in folder.iterdir()}


# --- what can be said -------------------------------------------------------------------------------------------


def test_every_command_explains_itself(aletheia, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    printed = aletheia("--help")
    for command in COMMANDS:
        assert f" {command} " in printed
        assert f" {command} [OPTIONS]" in aletheia(command, "--help")
    assert {command.name for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("doctor", ("model",)),
        ("probe", ("model", "data", "probe", "output")),
        ("plan", ("model", "data", "probe", "plan", "adapter", "step", "checkpointing", "plan_only", "output")),
        ("train", ("model", "data", "probe", "plan", "adapter", "step", "checkpointing", "train", "train_only")),
        ("compare", ("model", "data", "probe", "plan", "step", "train", "compare", "forgetting", "asking", "output")),
        ("eval", ("model", "evaluate", "output")),
    ],
)
def test_a_command_has_a_flag_for_every_key_it_reads(aletheia, monkeypatch, command, groups):
    monkeypatch.setenv("COLUMNS", "300")
    printed = aletheia(command, "--help")
    for key in (key for group in groups for key in GROUPS[group] if key not in ("model", "data", "adapters")):
        assert f"--{key.replace('_', '-')} " in printed
    for flag in ("--config", "--dry-run", "--json"):
        assert flag in printed


# --- dry runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["doctor", "probe", "train", "compare"])
def test_a_dry_run_prints_the_resolved_run_and_does_nothing(aletheia, monkeypatch, tmp_path, command):
    monkeypatch.setattr("aletheia_lora.runs.load_model", None)  # would raise if called
    monkeypatch.chdir(tmp_path)
    output = () if command == "doctor" else ("--output", tmp_path / "out")
    record = one_object(aletheia(command, "some/model", *output, "--dry-run", "--json"))
    assert RunConfig(**record).model == "some/model"
    assert json.loads(aletheia(command, "some/model", *output, "--dry-run")) == record
    assert names(tmp_path) == set()


def test_flags_go_on_top_of_the_file(aletheia, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: from/file\nsteps: 7\nbatch_size: 2\ntargets: [q_proj]\nmatched_time: true\n")
    record = json.loads(
        aletheia("compare", "--config", config, "--steps", "9", "--no-matched-time", "--controls", "last", "--dry-run")
    )
    assert (record["model"], record["steps"], record["batch_size"]) == ("from/file", 9, 2)
    assert (record["targets"], record["controls"], record["matched_time"]) == (["q_proj"], ["last"], False)
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(record))
    assert json.loads(aletheia("compare", "--config", again, "--dry-run")) == record


# --- doctor, probe, plan ----------------------------------------------------------------------------------------


def test_doctor_counts_what_can_be_adapted(aletheia, model):
    record = one_object(aletheia("doctor", model, "--json"))
    assert (record["architecture"], record["num_layers"], record["adaptable_share"]) == ("LlamaForCausalLM", 4, 1.0)
    assert record["modules_per_kind"] == {"attention": 16, "mlp": 12}
    assert record["layers"][3]["modules"][0] == "self_attn.q_proj"
    assert "LlamaForCausalLM: 4 layers" in aletheia("doctor", model)


def test_doctor_names_what_is_left_out_and_why(aletheia, tmp_path):
    folder = save_model(tmp_path / "mixtral", build("mixtral"))
    record = one_object(aletheia("doctor", folder, "--json"))
    assert set(record["left_out"]) == {"router"}
    assert "router" in aletheia("doctor", folder)


def test_doctor_says_the_same_from_a_configuration_as_from_weights(aletheia, tmp_path):
    whole = save_model(tmp_path / "whole", build("qwen3_moe"))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((whole / "config.json").read_bytes())
    from_weights = one_object(aletheia("doctor", whole, "--json"))
    from_config = one_object(aletheia("doctor", tmp_path / "bare", "--json"))
    assert (from_weights.pop("read_from"), from_config.pop("read_from")) == ("weights", "config.json")
    assert from_config == from_weights and from_config["trial_forward"] == "ran"
    assert "no weights were loaded" in aletheia("doctor", tmp_path / "bare")
    assert "mlp.gate.weight: router" in aletheia("doctor", tmp_path / "bare")


def test_probe_prints_a_score_per_layer_and_keeps_them_with_a_picture(aletheia, model, data, tmp_path):
    small = ("--validation-rows", "4", "--probe-batches", "2")
    record = one_object(aletheia("probe", model, data, *small, "--output", tmp_path / "out", "--json"))
    assert len(record["scores"]) == 4 and record["num_layers"] == 4 and record["num_tokens"]
    assert names(tmp_path / "out") == {"scores.json", "scores.png"}
    kept = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert kept["scores"] == record["scores"] and kept["score"] == "gradient_norm"
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert kept["spread"] == record["spread"] and "gradient_norm" not in kept
    printed = aletheia("probe", model, data, *small, "--score", "fisher", "--output", tmp_path / "fisher")
    of_fisher = json.loads((tmp_path / "fisher" / "scores.json").read_text())
    assert not {"spread", "standard_errors", "split_half_overlap"} & set(of_fisher)
    assert of_fisher["gradient_norm"] == {
        key: kept[key] for key in ("scores", "standard_errors", "spread", "split_half_overlap")
    }
    assert of_fisher["scores"] != kept["scores"] and dict(ProbeResult.from_dict(of_fisher))
    assert "of the gradient norms: spread" in printed
    assert [line.split()[0] for line in printed.splitlines()[:4]] == ["0", "1", "2", "3"]
    assert "split-half overlap" in printed


def test_plan_keeps_a_plan_that_says_what_was_printed(aletheia, model, data, tmp_path):
    for output in (tmp_path / "a" / "my.json", tmp_path / "b"):
        printed = aletheia("plan", model, data, *SMALL, "--output", output)
        file = output if output.suffix else output / "plan.json"
        made = Plan.load(file)
        assert printed == f"{made}\n"
        assert made.selection.layers == (2, 3)
        assert names(file.parent) == {file.name, f"{file.stem}.png"}
        assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    record = one_object(aletheia("plan", model, data, *SMALL, "--json"))
    assert Plan.from_dict(record).selection.layers == made.selection.layers
    assert record["file"] is None and record["text"].startswith("LlamaForCausalLM: layers 2-3")


def test_the_command_plans_as_the_library_does(aletheia, model, data):
    record = one_object(aletheia("plan", model, data, *SMALL, "--seed", "3", "--json"))
    parts = split(tokenize(word_rows(24), word_tokenizer(), max_length=512), seed=3, probe=2, validation=4)
    made = plan(build("llama"), parts.probe, probe_batches=2, rank=4, strategy="last", num_layers=2, seed=3)
    assert record["scores"] == {str(layer): pytest.approx(score, rel=1e-5) for layer, score in made.scores.items()}
    assert Plan.from_dict(record).ranks == made.ranks


def test_plan_chooses_among_layers_that_differ(aletheia, model, data):
    small = ("--validation-rows", "4", "--rank", "4", "--strategy", "diverse", "--num-layers", "3", "--json")
    made = Plan.from_dict(one_object(aletheia("plan", model, data, *small, "--probe-batches", "3")))
    assert len(made.selection.layers) == 3 and len(made.probe.kernels) == 4 and len(made.probe.kernels[0]) == 3


# --- train, compare, demo ---------------------------------------------------------------------------------------


def test_train_writes_an_adapter_by_a_plan_made_before(aletheia, model, data, tmp_path):
    aletheia("plan", model, data, *SMALL, "--output", tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    shared = (model, data, "--validation-rows", "4", *SHORT, "--plan", tmp_path / "plan.json")
    record = one_object(aletheia("train", *shared, "--output", tmp_path / "adapter", "--json"))
    assert record["layers"] == [2, 3] and record["lowest_backward_layer"] == 2 and len(record["losses"]) == 2
    assert record["model"] == "tiny-llama"  # never the path
    assert {"adapter_model.safetensors", "record.json", "README.md"} <= names(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "plan.json").read_text() == text
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_" in n) == record["trainable_params"]
    printed = aletheia("train", *shared, "--output", tmp_path / "again", "--gradient-accumulation", "2")
    assert "backward stopped at layer 2 (measured in the first step)" in printed
    assert names(tmp_path) == {"plan.json", "plan.png", "adapter", "again"}


def test_rows_that_are_cut_or_left_out_are_counted_aloud(data):
    lengths = [len(row["prompt"].split()) for row in word_rows(24)]
    said, more = [], {"probe_batches": 2, "validation_rows": 4}
    load_parts(RunConfig(model="any", data=str(data), max_length=7, **more), word_tokenizer(), said.append)
    dropped = sum(length >= 7 for length in lengths)  # the prompt alone fills the row
    assert 0 < dropped < 20
    assert said[1:] == [
        f"24 of 24 rows were cut to max_length=7, {dropped} left out because no label was left to learn from"
    ]
    load_parts(RunConfig(model="any", data=str(data), max_length=64, **more), word_tokenizer(), said.append)
    assert len(said) == 3


def test_train_takes_another_adapter_and_ranks_again_on_the_way(aletheia, model, data, tmp_path):
    shared = (model, data, *SMALL, "--validation-rows", "4", *SHORT, "--adapter", "loha", "--rerank-every", "1")
    record = one_object(aletheia("train", *shared, "--output", tmp_path / "adapter", "--json"))
    assert record["adapter"] == "loha" and [event["step"] for event in record["rerank"]["events"]] == [1, 2]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    assert sum(p.numel() for n, p in loaded.named_parameters() if "hada_" in n) == record["trainable_params"]
    assert "# loha adapter on 2 of 4 layers" in (tmp_path / "adapter" / "README.md").read_text()


def test_compare_prints_a_table_and_writes_a_page(aletheia, model, data, tmp_path):
    shared = (model, data, *SMALL, *SHORT, "--timed-steps", "1", "--no-matched-time")
    printed = aletheia("compare", *shared, "--output", tmp_path / "out")
    assert "| uniform LoRA, plain PEFT under Trainer | 4 of 4 |" in printed
    assert "2 of 4 layers trained" in printed
    assert {"compare.json", "plan.json", "page.html", "heldout.png"} <= names(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (record["model"], record["data"]) == ("tiny-llama", "rows.jsonl")
    assert str(tmp_path) not in (tmp_path / "out" / "page.html").read_text()
    assert not any(name.startswith(".") for name in names(tmp_path) | names(tmp_path / "out"))


def test_compare_prints_one_object_and_nothing_else_for_machines(aletheia, model, data, tmp_path):
    shared = (model, data, *SMALL, *SHORT, "--timed-steps", "1", "--no-matched-time", "--controls", "first")
    record = one_object(aletheia("compare", *shared, "--output", tmp_path / "out", "--json"))
    assert [arm["name"] for arm in record["arms"]][-2:] == ["selected", "first"]
    assert record["page"] == str(tmp_path / "out" / "page.html")


def test_demo_tells_the_whole_story_and_ends_with_one_object(aletheia, monkeypatch, tmp_path):
    parts = split(tokenize(word_rows(24), word_tokenizer()), seed=0, probe=8, validation=4)
    monkeypatch.setattr("aletheia_lora.runs.load_model", lambda config, say: (build("llama"), word_tokenizer()))
    monkeypatch.setattr("aletheia_lora.runs.load_parts", lambda config, tokenizer, say: parts)
    monkeypatch.setitem(DEMO, "timed_steps", 1)
    printed = aletheia("demo", "--steps", "2", "--output", tmp_path / "demo")
    summary = json.loads(printed.splitlines()[-1])
    assert summary["speedup_ratio"] > 0 and summary["page"] == str(tmp_path / "demo" / "page.html")
    assert "| uniform LoRA, plain PEFT under Trainer |" in printed


# --- as a process -----------------------------------------------------------------------------------------------


def process(*arguments, before="pass"):
    program = f"{before}; from aletheia_lora.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_a_process_prints_its_object_on_standard_output_and_the_rest_beside_it(model, data):
    done = process("plan", model, data, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    assert one_object(done.stdout)["selection"]["layers"] == [2, 3]
    assert "loading tiny-llama" in done.stderr and "Traceback" not in done.stderr


def test_a_process_that_fails_says_why_in_one_line_and_by_its_exit_code(tmp_path):
    done = process("plan", "--config", tmp_path / "missing.yaml", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: cannot read the configuration ") and done.stderr.count("\n") == 1
    assert process("plan", "--nonsense").returncode == 2


def test_a_dry_run_loads_no_heavy_library():
    look = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    done = process("compare", "--dry-run", before=look)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "embedded"
    assert done.stderr == "False\n"
