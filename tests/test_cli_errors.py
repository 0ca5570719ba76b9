"""What the command says when something is wrong: one line on standard error, an exit code, and nothing half-made."""

import json
import re
import sys

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from aletheia_lora.cli import main
from families import build
from tiny_inputs import save_model, save_rows, word_rows

pytestmark = pytest.mark.usefixtures("library_logging")

NEEDS = ("--validation-rows", "4", "--probe-batches", "2")
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
SMALL = (*NEEDS, "--rank", "4", "--time-budget", "0.9")


@pytest.fixture
def error_of(monkeypatch, capsys):
    """Runs the command, which must fail; gives the text of its one error line."""

    def run(*arguments, code=1):
        monkeypatch.setattr(sys, "argv", ["aletheia", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        printed = capsys.readouterr()
        assert stopped.value.code == code, printed.err
        assert printed.out == ""
        assert "Traceback" not in printed.err
        lines = [line for line in printed.err.split("\n") if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        assert errors == lines[-1:], printed.err
        return errors[0].removeprefix("error: ")

    return run


@pytest.fixture
def rows_file(tmp_path):
    def write(content):
        if not isinstance(content, str):
            return save_rows(tmp_path / "given.jsonl", content)
        (tmp_path / "given.jsonl").write_text(content)
        return tmp_path / "given.jsonl"

    return write


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def refuse(*args):
        pytest.fail("the model was loaded before the error was found")

    monkeypatch.setattr("aletheia_lora.runs.load_model", refuse)


# --- data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["probe", "plan", "train", "compare"])
def test_a_missing_data_file_is_named(error_of, model, tmp_path, command):
    output = ("--output", tmp_path / "out") if command in ("train", "compare") else ()
    error = error_of(command, model, tmp_path / "missing.jsonl", *NEEDS, *output)
    assert re.search(r"cannot read .*missing\.jsonl.*No such file", error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty (0 bytes)"),
        ("\n\n", "has no rows"),
        ('{"prompt": "w4", "completion": "w5"}\n{"prompt": "w4", \n', "row 2 of"),
        ('{"prompt": "w4", "completion": "w5"}\n\n\nnot JSON\n', "row 4 of"),
        ('{"prompt": "w4", "completion": "w5"}\n[1, 2]\n', "row 2 of"),
        ('{"question": "w4", "answer": "w5"}\n', "the columns 'question', 'answer' are no known format"),
        ('{"prompt": "w4"}\n', "the columns 'prompt' are no known format"),
        ('{"prompt": "w4", "completion": "w5"}\n{"prompt": "w4"}\n', "row 2 lacks 'completion'"),
        ('{"prompt": "w4", "completion": 5}\n', "row 1, column 'completion'"),
        ('{"input_ids": [4, 5, 6], "labels": [-100, -100, -100]}\n', "no row has a supervised token: 1 rows"),
        ('{"messages": [{"role": "user", "content": "w4"}]}\n', "the tokenizer has no chat template"),
    ],
)
def test_broken_data_is_named_with_the_place(error_of, model, rows_file, content, message):
    assert message in error_of("plan", model, rows_file(content), *SMALL)


def test_columns_that_were_asked_for_and_are_not_there_are_named_beside_those_there(error_of, model, data):
    error = error_of("plan", model, data, *SMALL, "--prompt-column", "question", "--completion-column", "answer")
    assert "'question', 'answer'" in error and "'prompt', 'completion'" in error


def test_rows_whose_prompts_fill_the_length_are_named(error_of, model, data):
    assert "Raise max_length" in error_of("plan", model, data, *SMALL, "--max-length", "3")


def test_fewer_rows_than_needed_are_counted(error_of, model, rows_file, tmp_path):
    error = error_of("plan", model, rows_file(word_rows(6)), *SMALL)
    assert "got 6 rows" in error and "need 2 for the probe, 4 for validation" in error
    few = rows_file(word_rows(9))
    error = error_of("train", model, few, *SMALL, "--output", tmp_path / "out", "--steps", "1")
    assert "3 rows are fewer than a batch of 4" in error
    error = error_of("compare", model, few, *SMALL, "--output", tmp_path / "out", "--steps", "1")
    assert "3 training rows are fewer than a batch of 4" in error
    assert not (tmp_path / "out" / "compare.json").exists()


def test_the_same_row_again_and_again_is_not_many_rows(error_of, model, rows_file):
    assert "1 of them different" in error_of("plan", model, rows_file(word_rows(1) * 20), *SMALL)


# --- models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing-folder", "missing/model", "./missing"])
def test_a_model_that_is_not_there_is_named(error_of, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    error = error_of("doctor", name)
    assert f"cannot load {name!r} as a causal language model" in error
    assert "a folder that save_pretrained wrote" in error


def test_an_encoder_decoder_model_is_refused_by_its_name(error_of, tmp_path):
    config = T5Config(vocab_size=256, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=16, decoder_start_token_id=0)
    folder = save_model(tmp_path / "t5", T5ForConditionalGeneration(config))
    error = error_of("doctor", folder)
    assert "T5" in error and "causal language model" in error


def test_a_folder_without_weights_is_refused(error_of, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "cannot load" in error_of("doctor", tmp_path / "empty")


def test_a_broken_weight_file_is_refused(error_of, tmp_path):
    folder = save_model(tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load" in error_of("doctor", folder)


@pytest.mark.parametrize("device", ["nowhere", pytest.param("cuda", marks=NO_CUDA)])
def test_a_device_that_is_not_there_is_named(error_of, model, device):
    assert device in error_of("doctor", model, "--device", device).lower()


@pytest.mark.parametrize("command", ["probe", "plan", "train", "compare"])
def test_a_nan_in_the_weights_names_layer_and_batch(error_of, tmp_path, data, command):
    broken = build("llama")
    with torch.no_grad():
        broken.model.layers[2].self_attn.o_proj.weight[0, 0] = float("nan")
    folder = save_model(tmp_path / "broken", broken)
    output = () if command == "plan" else ("--output", tmp_path / "out")
    small = NEEDS if command == "probe" else SMALL
    error = error_of(command, folder, data, *small, *output)
    assert re.search(r"nan on batch 0; layer 2 is the first to put out a number that is not finite", error)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--percent", "0"), "percent=0"),
        (("--percent", "101"), "percent=101"),
        (("--num-layers", "0"), "num_layers=0"),
        (("--time-budget", "0"), "time_budget=0"),
        (("--time-budget", "nan"), "time_budget=nan, expected a finite number"),
        (("--alpha-ratio", "inf"), "alpha_ratio=inf, expected a finite number"),
        (("--seed", "-1"), "seed=-1"),
        (("--dtype", "float8"), "dtype='float8'"),
        (("--max-length", "1"), "max_length=1"),
        (("--validation-rows", "0"), "validation_rows=0"),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_loaded(
    error_of, nothing_is_loaded, model, data, flags, message
):
    assert message in error_of("plan", model, data, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-layers", "5", "--strategy", "top_percent"), "num_layers=5, but the model has 4 layers"),
        (("--time-budget", "0.05"), "below what one layer needs"),
        (("--rank", "0"), "rank"),
        (("--rank", "-3"), "rank"),
        (("--rank", "33"), "rank 33 is larger than min(in, out) = 32"),
        (("--mlp-rank", "64", "--allocation", "asymmetric"), "rank 64 is larger than min(in, out) = 32"),
        (("--targets", "q_porj"), "target 'q_porj' matches no module"),
        (("--targets", "q_proj", "--targets", "lm_head"), "target 'lm_head' matches no module"),
        (("--strategy", "buget"), "unknown strategy 'buget'. Did you mean 'budget'?"),
        (("--score", "fishre"), "unknown score 'fishre'. Did you mean 'fisher'?"),
        (("--allocation", "matchd"), "unknown allocation 'matchd'. Did you mean 'matched'?"),
        (("--allocation", "proportional"), "the profile is flat"),
    ],
)
def test_an_option_that_does_not_fit_the_model_is_refused(error_of, model, data, flags, message):
    assert message in error_of("plan", model, data, *SMALL, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--controls", "botom"), "control 'botom' is not known. Did you mean 'bottom'?"),
        (("--learning-rate", "0"), "learning_rate=0"),
        (("--steps", "0"), "steps=0"),
        (("--evaluations", "0"), "evaluations=0"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_before_anything_is_loaded(
    error_of, nothing_is_loaded, model, data, tmp_path, flags, message
):
    assert message in error_of("compare", model, data, *flags, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "--tim-budget", "0.5"), "--tim-budget"),
        (("plan", "--rank", "many"), "--rank"),
        (("plan", "model", "data", "surplus"), "surplus"),
        (("doctor", "--steps", "4"), "--steps"),
        (("plna",), "plna"),
        (("--verbose",), "--verbose"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_a_usage_error(error_of, arguments, message):
    assert message in error_of(*arguments, code=2)


def test_no_command_prints_the_help_and_no_empty_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aletheia"])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert "doctor" in printed.out + printed.err
    assert "error:" not in printed.err


# --- configuration and plan files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time_bugdet: 0.5", "unknown key 'time_bugdet'. Did you mean 'time_budget'?"),
        ("steps: many", "steps='many'"),
        ("- steps", "holds a list, expected keys and values"),
        ("steps: [", "is not YAML"),
        ("model: !!python/name:os.system", "is not YAML"),
        ("learning_rate: .nan", "learning_rate=nan"),
    ],
)
def test_a_broken_configuration_is_named(error_of, nothing_is_loaded, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert message in error_of("plan", "--config", tmp_path / "run.yaml")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "aletheia-plan/1"}', None])
def test_a_plan_file_that_is_no_plan_is_named(error_of, model, data, tmp_path, content):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    arguments = (model, data, "--validation-rows", "4", "--plan", tmp_path / "plan.json", "--output", tmp_path / "out")
    assert "plan" in error_of("train", *arguments)
    assert not (tmp_path / "out").exists()


def saved_plan(model, data, tmp_path, monkeypatch):
    flags = (*NEEDS, "--rank", "4", "--strategy", "last", "--num-layers", "2", "--output", str(tmp_path / "plan.json"))
    monkeypatch.setattr(sys, "argv", ["aletheia", "plan", model, data, *flags])
    try:
        main()
    except SystemExit as ended:  # to a shell the same as returning
        assert ended.code in (None, 0)
    return tmp_path / "plan.json"


def test_an_edited_plan_with_a_layer_out_of_range_is_refused(error_of, monkeypatch, capsys, model, data, tmp_path):
    file = saved_plan(model, data, tmp_path, monkeypatch)
    capsys.readouterr()
    record = json.loads(file.read_text())
    record["selection"]["layers"] = [2, 3, 7]
    file.write_text(json.dumps(record))
    arguments = (model, data, "--validation-rows", "4", "--plan", file, "--output", tmp_path / "out")
    assert "layers" in error_of("train", *arguments)


def test_a_plan_for_another_model_is_refused(error_of, monkeypatch, capsys, model, data, tmp_path):
    file = saved_plan(model, data, tmp_path, monkeypatch)
    capsys.readouterr()
    other = save_model(tmp_path / "phi3", build("phi3"))
    arguments = (other, data, "--validation-rows", "4", "--plan", file, "--output", tmp_path / "out")
    assert "this plan was made for LlamaForCausalLM" in error_of("train", *arguments)


# --- output -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["probe", "plan", "train", "compare"])
def test_an_output_that_cannot_be_written_is_found_before_anything_is_loaded(
    error_of, nothing_is_loaded, model, data, tmp_path, command
):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot write into" in error_of(command, model, data, "--output", tmp_path / "file" / "below" / "out")
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("command", ["probe", "plan", "compare", "train"])
def test_an_output_that_is_a_file_is_found_before_anything_is_loaded(
    error_of, nothing_is_loaded, model, data, tmp_path, command
):
    (tmp_path / "file").write_text("not a folder")
    assert "file" in error_of(command, model, data, "--output", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_training_needs_an_output_and_does_not_overwrite_one(error_of, nothing_is_loaded, model, data, tmp_path):
    assert "output is missing" in error_of("train", model, data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    assert "exists and is not an empty folder" in error_of("train", model, data, "--output", tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "kept"


# --- Ctrl-C -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("doctor", "aletheia_lora.runs.anatomy"),
        ("probe", "aletheia_lora.runs.write_json"),
        ("plan", "aletheia_lora.probing.probe"),
        ("train", "aletheia_lora.training.run.whole_folder"),
        ("train", "aletheia_lora.training.run.write_bytes"),  # the last file of the folder
        ("compare", "aletheia_lora.runs.compare"),
        ("compare", "aletheia_lora.runs.write_json"),
    ],
)
def test_an_interruption_exits_130_and_leaves_nothing_that_looks_whole(
    error_of, monkeypatch, model, data, tmp_path, command, where
):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    arguments = {
        "doctor": (model,),
        "probe": (model, data, *NEEDS, "--output", tmp_path / "out"),
        "plan": (model, data, *SMALL, "--output", tmp_path / "out" / "plan.json"),
        "train": (model, data, *SMALL, "--steps", "1", "--output", tmp_path / "out"),
        "compare": (model, data, *SMALL, "--steps", "1", "--no-matched-time", "--output", tmp_path / "out"),
    }
    assert "interrupted" in error_of(command, *arguments[command], code=130)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == []
    assert not (command == "train" and (tmp_path / "out").exists())
