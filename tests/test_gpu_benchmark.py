"""The GPU benchmark on tiny models on the CPU: every run, its record, and the report that follows from records."""

import importlib.util
import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
NOTHING_BELOW = "RuntimeError: layer 0 is adapted, so nothing lies below it to replay"


@pytest.fixture
def script(monkeypatch):
    """The script as a module; it needs neither torch nor a device to be imported."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("shapes", None)


def run_script(*arguments):
    done = subprocess.run([sys.executable, FOLDER / "run.py", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "num_shapes"), [("bfloat16", 3), ("nf4", 1)])
def test_every_run_of_every_tiny_shape_is_measured_and_shown_again(tmp_path, storage, num_shapes):
    if storage == "nf4":
        pytest.importorskip("bitsandbytes", reason="no bitsandbytes: no 4-bit weights")
    which = ["--four-bit"] * (storage == "nf4")
    shown = run_script(*which, "--device", "cpu", "--tiny", "--steps", 1, "--output", tmp_path)
    assert run_script("--print", "--output", tmp_path) == shown
    assert date.fromisoformat(json.loads((tmp_path / "environment.json").read_text())["date"]) <= date.today()
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["failed"] for record in records] == [None] * num_shapes
    for record in records:
        assert record["storage"] == storage
        assert record["probe"]["seconds"] > 0 and len(record["probe"]["scores"]) == record["num_layers"] == 4
        assert len(record["runs"]) == 2 * 10
        for line in record["runs"]:
            if line["run"].endswith("_prefix") and line["failed"]:
                assert line["failed"] == NOTHING_BELOW
                continue
            assert line["failed"] is None and len(line["step_seconds"]) == 1
            assert line["lowest_backward_layer"] == min(line["layers"])
            assert line["predicted_share"]["calibrated"] > 0
        losses = [line["first_loss"] for line in record["runs"] if not line["failed"] and not line["checkpointing"]]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=5e-3)  # bfloat16; adapters start at zero
        replays = [line["prefix"] for line in record["runs"] if line["run"] == "last_half_prefix"]
        assert all(replay["replayed_batches"] > 0 and replay["turned_off"] is None for replay in replays)


def test_a_shape_without_time_or_process_is_recorded_and_the_rest_go_on(script, tmp_path, monkeypatch, capsys):
    calls = []

    def dying(options, names, seconds):
        calls.append(list(names))
        return "its process ended with exit code -9"

    monkeypatch.setattr(script, "child", dying)
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "Qwen2.5-0.5B", "Gemma-2-9B", "--output", str(tmp_path)])
    script.main()
    assert calls == [["Qwen2.5-0.5B", "Gemma-2-9B"], ["Gemma-2-9B"]]
    assert capsys.readouterr().out.count("**not finished: its process ended with exit code -9**") == 2

    def losing_its_device(options, names, seconds):
        calls.append(list(names))
        script.append(tmp_path / "records.jsonl", {"shape": names[0], "failed": "illegal address", "runs": []})

    monkeypatch.setattr(script, "child", losing_its_device)
    script.main()
    assert calls[2:] == calls[:2] and capsys.readouterr().out.count("**not finished: illegal address**") == 2
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--limit-seconds", "0"])
    script.main()
    assert len(calls) == 4 and capsys.readouterr().out.count("the time of the run was over before it") == 2


def test_savings_are_medians_against_plain_peft_and_failed_runs_count_nowhere(script, tmp_path, capsys):
    def line(run, seconds, failed=None):
        made = {"run": run, "checkpointing": False, "failed": failed, "step_seconds": seconds, "layers": [1]}
        return made | {
            "lowest_backward_layer": 1,
            "peak_bytes": None,
            "predicted_share": {"calibrated": 0.5, "counted": 0.6},
        }

    records = [
        {"shape": "A", "failed": None, "runs": [line("uniform_peft", [2, 2, 9]), line("last_half", [1, 1, 1])]},
        {"shape": "D", "failed": None, "runs": [line("uniform_ours", [2.5]), line("last_half", [1])]},
        {"shape": "B", "failed": None, "runs": [line("uniform_peft", [2]), line("last_half", [], "no memory")]},
        {"shape": "C", "failed": "does not fit", "runs": []},
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    script.show(tmp_path)
    out = capsys.readouterr().out
    assert "| last_half | 1 | 1 | 1.0000 | 3 | 3 | 2.00x | 50.0 % |" in out
    assert "| last_half | failed: no memory |" in out and "**not finished: does not fit**" in out
    assert "| last_half | 50.0 % | 50.0 % | 50.0 % | 1 | 1 | 60.0 % | 1 | 1 |" in out
    assert "share predicted, calibrated: mean absolute error 25.0%, n = 1" in out


def test_shapes_have_the_weights_of_the_models_they_are_named_after(script):
    """Of models that are known by their number of weights, built without contents."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {"Qwen2.5-0.5B": 0.494, "Llama-3.1-8B": 8.030, "Gemma-2-9B": 9.242, "Pythia-6.9B": 6.857}
    known |= {"Phi-3.5-mini": 3.821, "StableLM-2-1.6B": 1.645, "TinyLlama-1.1B": 1.100, "Mistral-7B-v0.3": 7.248}
    known |= {"Qwen2.5-1.5B": 1.544, "Qwen2.5-3B": 3.086, "Qwen2.5-7B": 7.616, "Qwen2.5-14B": 14.770}
    for name, billions in known.items():
        shape = script.SHAPES[name]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.model_type, **shape.numbers))
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=2e-3)
