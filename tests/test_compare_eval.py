"""`aletheia compare --eval`: the adapters are kept and asked standard tasks, and what was lost is shown."""

import json
import sys

import pytest

from aletheia_lora.cli import main
from aletheia_lora.comparison.forgotten import AGAIN, Margins
from aletheia_lora.errors import ConfigError
from aletheia_lora.evaluation.items import read_items
from evaluation_inputs import byte_model, byte_tokenizer, write_rows

pytestmark = pytest.mark.usefixtures("library_logging")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    byte_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, write_rows(folder / "tasks")


@pytest.fixture
def compared(monkeypatch, capsys, inputs):
    folder, tasks = inputs

    def run(output, *arguments):
        given = ["compare", folder / "model", folder / "rows.jsonl", "--strategy", "last", "--num-layers", 1]
        given += ["--steps", 2, "--batch-size", 2, "--timed-steps", 1, "--evaluations", 1, "--validation-rows", 4]
        given += ["--rank", 2, "--no-matched-time", "--probe-batches", 2, "--max-length", 64, "--output", output]
        monkeypatch.setattr(sys, "argv", [str(word) for word in ["aletheia", *given, "--data-dir", tasks, *arguments]])
        main()
        return capsys.readouterr()

    return run


def test_what_was_forgotten_stands_beside_what_was_saved(compared, tmp_path):
    compared(tmp_path / "out", "--eval", "mmlu_anatomy,gsm8k", "--limit", 2, "--max-new-tokens", 4, "--margin", 3)
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    lost = record["forgetting"]
    assert {task["task"] for task in lost["tasks"]} == {"mmlu_anatomy", "gsm8k"}
    assert lost["settings"]["margin"] == 3
    assert {entry["label"] for task in lost["tasks"] for entry in task["arms"]} >= {"uniform", "selected"}
    items = read_items(tmp_path / "out" / "evaluation" / "items.jsonl")
    assert {item.label for item in items} == {"base", "uniform", "selected"}
    again = read_items(tmp_path / "out" / "evaluation" / "again" / "items.jsonl")
    assert {item.label for item in again} == {"selected"} and AGAIN in json.dumps(lost)
    assert "orgot" in (tmp_path / "out" / "page.html").read_text()


def test_a_task_that_does_not_exist_is_found_out_before_training(compared, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compared(tmp_path / "out", "--eval", "gsm9k")
    assert "gsm8k" in capsys.readouterr().err
    assert not (tmp_path / "out" / "compare.json").exists()


def test_adapters_of_an_earlier_comparison_are_not_overwritten(compared, tmp_path, capsys):
    (tmp_path / "out" / "adapters" / "uniform").mkdir(parents=True)
    with pytest.raises(SystemExit):
        compared(tmp_path / "out", "--eval", "gsm8k")
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{"margin": 0.0}, {"loss_margin": float("inf")}])
def test_a_margin_that_is_no_margin_is_refused(given):
    with pytest.raises(ConfigError, match="expected a positive number"):
        Margins(**given)
