import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import aletheia_lora.campaign.cell as cell_room
import aletheia_lora.campaign.forecast as forecast_room
from aletheia_lora.campaign.cell import exit_code, run_cell
from aletheia_lora.campaign.executors import EXIT_MACHINE, EXIT_MEMORY
from aletheia_lora.campaign.forecast import forecast, forecast_text
from aletheia_lora.campaign.methods import Method
from aletheia_lora.campaign.records import CellFolder
from aletheia_lora.campaign.report import tables
from aletheia_lora.campaign.runner import driver_lock
from aletheia_lora.campaign.spec import cells, load_campaign, resolved
from aletheia_lora.cli import main
from aletheia_lora.evaluation.adapters import adapter_digest, with_adapter
from aletheia_lora.files import write_json
from aletheia_lora.loss import heldout_loss
from tiny_inputs import save_model, save_rows, word_rows

pytestmark = pytest.mark.usefixtures("library_logging")
VALUES = {
    "name": "tiny",
    "models": ["tiny-llama"],
    "tasks": [{"name": "words", "data": "rows.jsonl"}],
    "methods": ["uniform"],
    "seeds": [0],
    "learning_rates": [0.01],
    "steps": 3,
    "grid_steps": 2,
    "batch_size": 2,
    "rank": 4,
    "probe_batches": 2,
    "train_rows": 8,
    "validation_rows": 4,
    "heldout_rows": 4,
    "evaluations": 2,
    "margins": {"heldout_loss": 0.01},
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a tiny model, rows to learn from and another text."""
    folder = tmp_path_factory.mktemp("ground")
    save_model(folder / "tiny-llama")
    save_rows(folder / "rows.jsonl", word_rows(32))
    save_rows(folder / "other.jsonl", word_rows(8, seed=9))
    return folder


@pytest.fixture
def begun(ground, tmp_path, monkeypatch):
    """Makes a campaign's folder with all cells planned; the working folder is that of the spec."""
    monkeypatch.chdir(ground)

    def begin(**changed):
        path = ground / "spec.yaml"
        path.write_text(yaml.safe_dump({**VALUES, **changed}))
        spec = resolved(load_campaign(path), ground)
        write_json(tmp_path / "out" / "campaign.json", spec)
        places = [CellFolder.of(tmp_path / "out", cell) for cell in cells(spec)]
        for place in places:
            place.make()
        return places

    return begin


def run(places):
    for place in places:
        assert run_cell(place.path, print) == 0
    return [place.record() for place in places]


# --- what a cell measures ---------------------------------------------------------------------------------------


def test_each_method_trains_what_it_says(begun):
    methods = ["uniform", "paper", "last", "all_matched_params", "uniform_trainer", "dora", "adalora"]
    methods.append("paper_asymmetric")
    records = run(begun(methods=methods))
    assert [(record["state"], record["reason"]) for record in records] == [("done", None)] * len(methods)
    found = dict(zip(methods, (record["result"] for record in records), strict=True))
    everything = [0, 1, 2, 3]
    assert [len(found[name]["layers"]) for name in methods] == [4, 2, 2, 4, 4, 4, 4, 2]
    assert found["last"]["layers"] == [2, 3] and found["last"]["lowest_backward_layer"] == 2
    assert found["all_matched_params"]["layers"] == everything and found["all_matched_params"]["ranks"] == [2]
    assert found["all_matched_params"]["trainable_params"] == found["paper"]["trainable_params"]
    assert found["paper_asymmetric"]["ranks"] == [4, 16]
    assert found["dora"]["trainable_params"] > found["uniform"]["trainable_params"]
    assert found["uniform"]["probe_seconds"] == 0 < found["paper"]["probe_seconds"]
    # Plain PEFT under transformers' Trainer and our trainer are the same mathematics, in float32.
    assert found["uniform_trainer"]["heldout_loss"] == pytest.approx(found["uniform"]["heldout_loss"], rel=1e-5)
    for result in found.values():
        assert result["heldout_loss"] < result["base_heldout_loss"]
        assert all(result["checks"].values()) and result["other_loss"] is None


def test_as_many_weights_as_the_method_of_this_campaign_has(begun):
    paper, same = run(begun(methods=[{"name": "paper", "percent": 25.0, "score": "taylor"}, "all_matched_params"]))
    assert (paper["state"], same["state"]) == ("done", "done")
    assert (len(paper["result"]["layers"]), paper["result"]["ranks"], same["result"]["ranks"]) == (1, [4], [1])
    assert paper["result"]["trainable_params"] == same["result"]["trainable_params"]


def test_what_no_rank_matches_fails_before_it_trains_and_names_the_nearest(begun):
    three = {"name": "three", "strategy": "last", "num_layers": 3, "allocation": "uniform"}
    same = {"name": "same", "strategy": "all", "allocation": "uniform", "params_of": "three"}
    done, failed = run(begun(methods=[three, same], rank=5))
    wanted = done["result"]["trainable_params"]
    assert (failed["state"], "step_seconds" in failed["result"]) == ("failed", False)
    assert f"as many weights as three, {wanted:,} within 2 %" in failed["reason"]
    assert f"the nearest rank, 4, trains {wanted * 16 // 15:,}. Raise the campaign's rank" in failed["reason"]


def test_a_run_keeps_the_adapter_that_was_measured(begun):
    place = begun(learning_rates=[0.01], other_text={"name": "other", "data": "other.jsonl"})[0]
    (record,) = run([place])
    result = record["result"]
    assert result["adapter_digest"] == adapter_digest(place.path / "adapter")
    bench = cell_room.Bench.of(place.cell.content, place.path.parent.parent / "shared", 1, print)
    with with_adapter(bench.model, place.path / "adapter") as adapted:
        assert heldout_loss(adapted, bench.batches(bench.held_out)) == pytest.approx(result["heldout_loss"], abs=1e-6)
        assert heldout_loss(adapted, bench.batches(bench.other_text())) == pytest.approx(result["other_loss"], abs=1e-6)


def test_a_record_says_how_many_cells_its_driver_ran_at_a_time(begun):
    alone, beside = begun(seeds=[0, 1], steps=1, evaluations=1)
    run([alone])
    with driver_lock(beside.path.parents[1], workers=3):
        run([beside])
    assert "workers" not in alone.record()["result"]["environment"]
    assert beside.record()["result"]["environment"]["workers"] == "3"


def test_a_record_keeps_the_scores_of_its_layers_and_the_type_of_its_model(begun):
    methods = ["paper", "last", {"name": "fisher", "strategy": "top_percent", "score": "fisher"}]
    paper, last, fisher = (record["result"] for record in run(begun(methods=methods, steps=1, evaluations=1)))
    scores = paper["layer_scores"]["gradient_norm"]
    assert sorted(sorted(range(4), key=lambda layer: -scores[layer])[:2]) == paper["layers"]
    assert last["layer_scores"] == paper["layer_scores"]
    assert list(fisher["layer_scores"]) == ["fisher"] and len(fisher["layer_scores"]["fisher"]) == 4
    assert {result["model_type"] for result in (paper, last, fisher)} == {"llama"}


def test_a_probe_is_shared_by_the_methods_that_read_the_same_of_it(begun, tmp_path, monkeypatch):
    content, seen = begun()[0].cell.content, []

    def shared_file(_folder, _name, identity, _write):
        seen.append(identity)
        raise FileNotFoundError

    monkeypatch.setattr(cell_room, "shared_file", shared_file)
    bench = cell_room.Bench(content, tmp_path, 1, *[None] * 6)
    for strategy, score in itertools.product(("spread", "diverse"), ("fisher", "taylor")):
        with pytest.raises(FileNotFoundError):
            bench.probe(Method(name="some", strategy=strategy, score=score), 7, print)
    assert [identity.pop("extra") for identity in seen] == [None, "taylor", "diverse", "taylor+diverse"]
    assert all(identity == seen[0] for identity in seen) and seen[0]["seed"] == 7


def test_layers_that_differ_are_chosen_from_a_probe_of_three_batches(begun):
    diverse = {"name": "diverse", "strategy": "diverse", "allocation": "uniform"}
    (record,) = run(begun(methods=[diverse], probe_batches=3, steps=1, evaluations=1))
    assert (record["state"], record["reason"]) == ("done", None)
    assert len(record["result"]["layers"]) == 2


def test_the_rate_is_the_best_of_the_grid_on_rows_that_are_not_the_held_out_ones(begun):
    places = begun(learning_rates=[1e-5, 1e-2], other_text={"name": "other", "data": "other.jsonl"}, other_rows=4)
    low, high, found = (record["result"] for record in run(places))
    assert found["learning_rate"] == 1e-2
    assert [entry["validation_loss"] for entry in found["grid"]] == [low["validation_loss"], high["validation_loss"]]
    assert low["validation_loss"] > high["validation_loss"]
    assert found["other_loss"] != found["heldout_loss"] and found["base_other_loss"] > 0
    (row,) = tables(places[0].path.parent.parent)["runs"]
    assert (row["state"], row["learning_rate"], row["other_loss"]) == ("done", 1e-2, found["other_loss"])


def test_equal_time_is_more_steps_for_what_is_predicted_to_be_faster(begun):
    uniform, last = (record["result"] for record in run(begun(methods=["uniform", "last"], match=["time"], steps=6)))
    assert uniform["steps"] == 6 < last["steps"] == len(last["step_seconds"])


def test_cells_share_the_probe_and_the_base_model_and_draws_differ(begun, monkeypatch):
    places = begun(methods=["paper", {"name": "random", "draws": 2}])
    probes = []
    real = cell_room.probe_rows
    monkeypatch.setattr(cell_room, "probe_rows", lambda *args, **options: probes.append(1) or real(*args, **options))
    _, first, second = run(places)
    shared = sorted(path.name.partition("-")[0] for path in (places[0].path.parents[1] / "shared").glob("*.json"))
    assert (len(probes), shared) == (1, ["base", "probe"])
    assert first["result"]["layers"] != second["result"]["layers"]


def test_a_prefix_cache_is_shared_and_changes_nothing_but_rounding(begun):
    plain, _ = run(begun(methods=["last"], seeds=[0, 1], steps=8))
    first, second = run(begun(methods=["last"], seeds=[0, 1], steps=8, prefix_cache=True))
    assert first["result"]["heldout_loss"] == pytest.approx(plain["result"]["heldout_loss"], rel=1e-5)
    caches = [record["result"]["prefix_cache"] for record in (first, second)]
    assert caches[0]["bytes_written"] > caches[1]["bytes_written"]  # some of the second seed's rows were there
    assert [cache["bytes_held"] > cache["bytes_written"] for cache in caches] == [False, True]


def test_a_step_in_micro_batches_is_the_same_step_in_less_memory(begun):
    (place,) = begun()
    (whole,) = run([place])
    (place.path / "record.json").unlink()
    with place.lock():
        place.append("attempt_ended", cause="memory", code=EXIT_MEMORY, reason="out of memory")
    (halved,) = run([place])
    assert (whole["result"]["micro_batches"], halved["result"]["micro_batches"]) == (1, 2)
    assert halved["result"]["heldout_loss"] == pytest.approx(whole["result"]["heldout_loss"], rel=1e-5)


# --- how a cell ends --------------------------------------------------------------------------------------------


def test_a_model_that_cannot_load_is_the_reason_of_its_cells_alone(begun):
    broken, fine = begun(models=["no-such-folder/model", "tiny-llama"])
    failed, done = run([broken, fine])
    assert failed["state"] == "failed" and "cannot load 'no-such-folder/model'" in failed["reason"]
    assert done["state"] == "done"


def test_a_loss_that_is_not_finite_is_its_own_state(begun):
    (record,) = run(begun(learning_rates=[1e30]))
    assert record["state"] == "nan"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), EXIT_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), EXIT_MEMORY),
        (OSError(12, "Cannot allocate memory"), EXIT_MEMORY),
        (OSError(28, "No space left on device"), EXIT_MACHINE),
        (OSError(5, "Input/output error"), EXIT_MACHINE),
        (ValueError("always"), None),
        (FileNotFoundError(2, "No such file"), None),
    ],
    ids=repr,
)
def test_what_the_machine_did_leaves_no_record_and_what_the_program_did_is_one(begun, monkeypatch, error, code):
    (place,) = begun()

    def fails(*_args):
        raise RuntimeError("while training") from error

    monkeypatch.setattr(cell_room, "_run", fails)
    assert run_cell(place.path, print) == (code or 0)
    record = place.record()
    assert (record is None) if code else (record["reason"] == "RuntimeError: while training")


def test_memory_that_torch_is_refused_on_a_cpu_is_no_fault_of_the_program():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 50)  # more than an address space holds: refused at once
    assert exit_code(refused.value) == EXIT_MEMORY
    with pytest.raises(ValueError, match="while training") as wrapped:
        try:
            torch.empty(1 << 50)
        except RuntimeError:
            raise ValueError("while training")  # noqa: B904 (met as the context alone)
    assert exit_code(wrapped.value) == EXIT_MEMORY
    assert exit_code(RuntimeError("shape '[2]' is invalid")) is None


def test_a_check_that_does_not_hold_makes_the_cell_invalid(begun, monkeypatch):
    (place,) = begun()
    real = cell_room._measured

    def still(*args):
        result = real(*args)
        return {**result, "checks": {**result["checks"], "adapters_moved": False}}

    monkeypatch.setattr(cell_room, "_measured", still)
    (record,) = run([place])
    assert (record["state"], record["reason"]) == ("invalid", "checks that do not hold: adapters_moved")


def test_other_rows_than_those_of_the_base_model_make_the_cell_invalid(begun, ground):
    first, second = begun(seeds=[0, 1])
    run([first])
    kept = (ground / "rows.jsonl").read_text()
    try:
        save_rows(ground / "rows.jsonl", word_rows(32, seed=5))
        (record,) = run([second])
    finally:
        (ground / "rows.jsonl").write_text(kept)
    assert (record["state"], record["reason"]) == ("invalid", "checks that do not hold: rows")


# --- the command ------------------------------------------------------------------------------------------------


def test_a_forecast_lists_every_cell_and_says_what_it_cannot_know(begun, ground):
    begun(models=["tiny-llama", "no-such-folder/model"], methods=["uniform", "last"], learning_rates=[1e-3, 1e-2])
    record = forecast(resolved(load_campaign(ground / "spec.yaml"), ground), print)
    assert (record["num_cells"], record["num_unknown"]) == (12, 6)
    by_name = {entry["cell"].rpartition("-")[0]: entry for entry in record["cells"]}
    uniform, last = (by_name[f"run-tiny-llama-words-{name}-s0"] for name in ("uniform", "last"))
    assert uniform["seconds"] > last["seconds"] > 0 and uniform["bytes"] > last["bytes"] > 0
    assert "config.json" in by_name["run-model-words-last-s0"]["reason"]
    assert "12 cells" in forecast_text(record) and "6 more not known" in forecast_text(record)


def test_a_method_that_cannot_be_planned_is_named_in_the_forecast_and_the_others_stand(begun, ground):
    last = {"name": "nine", "strategy": "last", "num_layers": 9}
    begun(methods=["uniform", last], learning_rates=[1e-3, 1e-2])
    record = forecast(resolved(load_campaign(ground / "spec.yaml"), ground), print)
    assert (record["num_cells"], record["num_unknown"]) == (6, 3)
    unknown = {entry["cell"].rpartition("-")[0]: entry for entry in record["cells"] if entry["seconds"] is None}
    assert unknown["run-tiny-llama-words-nine-s0"]["bytes"] is None
    assert {entry["reason"] for entry in unknown.values()} == {
        "num_layers=9, but the model has 4 layers. Ask for fewer."
    }


@pytest.mark.parametrize(("dtype", "wanted"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_forecast_takes_the_rate_of_the_dtype_that_a_model_is_trained_in(begun, ground, monkeypatch, dtype, wanted):
    rates = {torch.float32: 1e9, torch.bfloat16: 5e8}
    asked = []
    monkeypatch.setattr(forecast_room, "measured_rate", lambda _device, dtype: asked.append(dtype) or rates[dtype])
    begun(models=[{"name": "tiny-llama", "model": "tiny-llama", "dtype": dtype, "device": "cpu"}])
    (entry,) = forecast(resolved(load_campaign(ground / "spec.yaml"), ground), print)["cells"]
    assert asked == [wanted] and entry["seconds"] > 0


def test_the_command_says_what_is_wrong_and_what_there_is(ground, monkeypatch, capsys):
    path = ground / "command.yaml"
    path.write_text(yaml.safe_dump({**VALUES, "stepz": 3}))

    def aletheia(*arguments):
        monkeypatch.setattr(sys, "argv", ["aletheia", "campaign", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    assert aletheia("run", path) == (1, "error: unknown key 'stepz'. Did you mean 'steps'?\n")
    path.write_text(yaml.safe_dump({**VALUES, "name": "command"}))
    assert "unknown executor 'locl'. Did you mean 'local'?" in aletheia("run", path, "--executor", "locl")[1]
    assert "there is no campaign in" in aletheia("status", path)[1]
    assert "there is no campaign in" in aletheia("report", path)[1]
    assert not (ground / "command").exists()


@pytest.mark.slow
def test_the_command_runs_a_campaign_in_processes_of_its_own_and_goes_on_after_a_kill(ground):
    whole = {**VALUES, "name": "whole", "models": ["tiny-llama", "no/model"]}
    (ground / "whole.yaml").write_text(yaml.safe_dump(whole))
    environment = {**os.environ, "PYTHONPATH": str(Path(cell_room.__file__).parents[2])}

    def start(*arguments):
        command = [sys.executable, "-m", "aletheia_lora", "campaign", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ground, env=environment, **pipes)

    driver = start("run", "whole.yaml", "--workers", "2")
    folder = ground / "whole"
    while not list(folder.glob("cells/*/events.jsonl")):
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.02)
    driver.kill()
    driver.communicate()

    again = start("run", "whole.yaml", "--workers", "2", "--json")
    printed, said = again.communicate()
    assert again.returncode == 3, said
    assert json.loads(printed)["states"] == {"failed": 1, "done": 1}
    status = start("status", "whole.yaml").communicate()[0]
    assert status.startswith("whole: 2 cells, 1 failed, 1 done; nothing left to do")
    assert "1 of 2 runs ended well" in start("report", "whole.yaml").communicate()[0]
    assert {"report.md", "runs.csv", "methods.csv", "grid.csv", "times.csv"} <= {path.name for path in folder.iterdir()}
