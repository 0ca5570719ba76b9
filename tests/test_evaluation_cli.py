"""`aletheia eval` as it is typed: what it prints and writes, and what it says when something is wrong."""

import json
import sys

import pytest

from aletheia_lora.cli import main
from aletheia_lora.errors import SandboxError
from aletheia_lora.evaluation.answer import Answer
from aletheia_lora.evaluation.evaluate import EvaluationOptions, build_items, judge, prepare
from aletheia_lora.evaluation.items import read_items
from aletheia_lora.evaluation.sandbox import Sandbox
from aletheia_lora.evaluation.tasks import quiet
from evaluation_inputs import byte_model, byte_tokenizer, write_rows
from test_evaluation import save_adapter

pytestmark = pytest.mark.usefixtures("library_logging")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    byte_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def aletheia(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["aletheia", "eval", *map(str, arguments)])
        main()
        return capsys.readouterr()

    return run


def test_a_model_and_two_adapters_are_scored_in_one_command(aletheia, model_folder, rows, tmp_path):
    adapters = [save_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    given = (model_folder, *adapters, "--tasks", "mmlu_anatomy,wikitext", "--data-dir", rows)
    printed = aletheia(*given, "--output", tmp_path / "out", "--limit", 2)
    for word in ("mmlu_anatomy", "acc", "word_perplexity", "base", "one", "two", "±", "stands in for test"):
        assert word in printed.out
    items = read_items(tmp_path / "out" / "items.jsonl")
    assert {item.label: sum(other.label == item.label for other in items) for item in items} == dict.fromkeys(
        ("base", "one", "two"), 4
    )
    record = json.loads(aletheia(*given, "--output", tmp_path / "out", "--limit", 2, "--json").out)
    assert [entry["asked"] for entry in record["answers"].values()] == [0, 0, 0]
    assert record["options"]["tasks"] == ["mmlu_anatomy", "wikitext"] and record["options"]["fewshot_seed"] == 1234


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--tasks", "humaneval"), "humaneval runs programs"),
        (("--tasks", "mmlu_anatomy", "--limit", "0"), "limit"),
        ((), "no task was given"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(monkeypatch, capsys, rows, tmp_path, given, message):
    monkeypatch.setattr("aletheia_lora.runs.load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr(sys, "argv", ["aletheia", "eval", "tiny", *given, "--data-dir", str(rows)])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code and printed.out == "" and message in printed.err and "Traceback" not in printed.err


@pytest.mark.slow
def test_programs_are_run_in_the_true_sandbox(rows):
    try:
        prepared = prepare(EvaluationOptions(tasks=("humaneval",), data_dir=rows, allow_code=True), sandbox=Sandbox())
    except SandboxError as error:
        pytest.skip(f"no box can be made here: {error}")
    with quiet():
        from aletheia_lora.evaluation.language_model import LanguageModel
    lm = LanguageModel(byte_model(max_length=2048), byte_tokenizer())
    with quiet():
        items = build_items(prepared.loaded, lm, prepared.options)
    answers = [Answer(response=text, stop_reason="eos") for text in ("    return x + x\n", "    return 3\n")]
    right, wrong = judge(prepared, items, answers, label="base", digest_of_adapter=None)
    assert (right.scores, wrong.scores) == ({"pass@1": 1.0}, {"pass@1": 0.0})
    assert right.details["forgeable"] is False and wrong.details["reason"] != "passed"
