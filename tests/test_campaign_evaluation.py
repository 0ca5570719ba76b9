"""Runs whose adapters are asked standard tasks: cells of their own, added to a finished campaign or planned with it."""

import json
import shutil

import pytest
import yaml

from aletheia_lora.campaign import commands, pack
from aletheia_lora.campaign.cell import run_cell
from aletheia_lora.campaign.forecast import forecast
from aletheia_lora.campaign.records import CellFolder
from aletheia_lora.campaign.runner import rows_at_a_time, run_campaign
from aletheia_lora.campaign.spec import cells, load_campaign, resolved
from aletheia_lora.errors import ConfigError, DataError, SandboxError
from aletheia_lora.evaluation.evaluate import EvaluationOptions
from aletheia_lora.evaluation.forgetting import paired_scores
from aletheia_lora.evaluation.items import read_items
from aletheia_lora.run_config import RunConfig
from evaluation_inputs import byte_model, byte_tokenizer, write_rows
from forgetting_items import answer
from test_campaign_cell import VALUES as TRAINING
from tiny_inputs import save_rows, word_rows

pytestmark = pytest.mark.usefixtures("library_logging")
PACK = {"tasks": ["gsm8k", "wikitext"], "data_dir": "tasks", "limit": 2, "num_fewshot": 1, "max_new_tokens": 4}
VALUES = {**TRAINING, "models": ["bytes"], "evaluation": PACK}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a model over bytes, rows to learn from and the rows of tasks."""
    folder = tmp_path_factory.mktemp("asked")
    byte_model(max_length=2048).save_pretrained(folder / "bytes")
    byte_tokenizer().save_pretrained(folder / "bytes")
    save_rows(folder / "rows.jsonl", word_rows(32))
    write_rows(folder / "tasks")
    return folder


@pytest.fixture
def spec(ground, monkeypatch):
    """Gives the resolved spec with changes; keys whose value is None are left out."""
    monkeypatch.chdir(ground)

    def made(**changed):
        path = ground / "spec.yaml"
        values = {**VALUES, **changed}
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return resolved(load_campaign(path), ground)

    return made


class Here:
    """A job that runs its cell in this process, at once."""

    def __init__(self, folder, _base):
        self.code = run_cell(folder, print)

    def poll(self):
        return self.code

    def stop(self):
        pass


def run(made, folder, ground, **options):
    run_campaign(made, folder, ground, executor=Here, **options)
    return [CellFolder.of(folder, cell) for cell in cells(made)]


def of_kind(places, kind):
    return [place for place in places if place.cell.content["kind"] == kind]


# --- what is measured -------------------------------------------------------------------------------------------


def test_a_finished_campaign_gets_its_pack_later_and_base_and_adapters_answer_the_same_items(spec, ground, tmp_path):
    methods, folder = ["uniform", "last"], tmp_path / "out"
    before = run(spec(methods=methods, evaluation=None), folder, ground)
    records = [(place.path / "record.json").read_bytes() for place in before]
    made = spec(methods=methods)
    with pytest.raises(ConfigError, match="--accept-change"):
        run(made, folder, ground)
    places = run(made, folder, ground, accept_change=True)
    assert places[:2] == before and [(place.path / "record.json").read_bytes() for place in before] == records
    asked = of_kind(places, "evaluation")
    assert [place.state() for place in places] == [("done", None)] * 4 and len(asked) == 2
    results = [place.record()["result"] for place in asked]
    for place, result in zip(before, results, strict=True):
        assert result["adapter_digest"] == place.record()["result"]["adapter_digest"]
        assert all(result["checks"].values()) and set(result["evaluation"]) == {"gsm8k", "wikitext"}
        gsm8k, wikitext = (result["evaluation"][name] for name in ("gsm8k", "wikitext"))
        assert (gsm8k["unit"], gsm8k["higher_is_better"]) == ("points", True)
        assert (wikitext["unit"], wikitext["higher_is_better"]) == ("nats per token", False)
        for task in (gsm8k, wikitext):
            assert set(task["items"]) == set(task["base_items"]) and len(task["items"]) == 2
        weights = wikitext["weights"]
        for whole, items in (("value", "items"), ("base", "base_items")):
            mean = sum(wikitext[items][key] * weights[key] for key in weights) / sum(weights.values())
            assert wikitext[whole] == pytest.approx(mean)
        assert wikitext["value"] != wikitext["base"]  # the adapter is on the model
    one, other = (result["evaluation"]["wikitext"] for result in results)
    assert one["base_items"] == other["base_items"] and one["value"] != other["value"]
    shared = list((folder / "shared").glob("evaluation-*.json"))
    assert len(shared) == 1  # the base model was asked once
    items = read_items(asked[0].path / "evaluation" / "items.jsonl")
    texts = [item for item in items if item.task == "wikitext"]
    losses = {item.item_id: -item.scores["loglikelihood"] / item.num_response_tokens for item in texts}
    assert {key: losses[key] for key in one["items"]} == pytest.approx(one["items"])
    assert not list(folder.rglob("answers"))


def test_leaf_tasks_asked_by_name_stand_alone(spec, ground, tmp_path):
    made = spec(evaluation={"tasks": ["mmlu_anatomy", "mmlu_virology"], "data_dir": "tasks", "num_fewshot": 0})
    (asked,) = of_kind(run(made, tmp_path / "out", ground), "evaluation")
    found = asked.record()["result"]["evaluation"]
    assert {name: len(task["items"]) for name, task in found.items()} == {"mmlu_anatomy": 3, "mmlu_virology": 3}
    assert {value for task in found.values() for value in task["items"].values()} <= {0.0, 100.0}


def test_a_group_is_one_task_whose_items_are_named_after_its_leaves():
    answers = [
        answer(label, leaf, "7", scores={"acc": float(label == "base" or leaf == "mmlu_virology")})
        for label in ("base", "tuned")
        for leaf in ("mmlu_anatomy", "mmlu_virology")
    ]
    groups = {"mmlu": ["mmlu_anatomy", "mmlu_virology"], "mmlu_part": ["mmlu_virology"]}
    (task,) = paired_scores(answers, groups=groups).items()
    assert task[0] == "mmlu" and (task[1]["base"], task[1]["value"]) == (100.0, 50.0)
    assert task[1]["items"] == {"mmlu_anatomy/7": 0.0, "mmlu_virology/7": 100.0}
    with pytest.raises(DataError, match="expected those of base and of one adapter"):
        paired_scores(answers[:2])
    with pytest.raises(DataError, match=r"tuned has not answered 1 of 2 items"):
        paired_scores(answers[:3], groups=groups)


@pytest.mark.parametrize("adapter", ["dora", "adalora", "uniform_trainer"])
def test_adapters_of_every_kind_are_loaded_as_they_were_trained(spec, ground, tmp_path, adapter):
    places = run(spec(methods=[adapter]), tmp_path / "out", ground)
    assert [place.state() for place in places] == [("done", None)] * 2
    task = places[1].record()["result"]["evaluation"]["wikitext"]
    assert task["value"] != task["base"]


def test_only_the_chosen_runs_are_asked(spec):
    made = spec(
        methods=["uniform", "last"],
        match=["steps", "time"],
        evaluation={**PACK, "methods": ["last"], "match": ["time"]},
    )
    (asked,) = [cell for cell in cells(made) if cell.content["kind"] == "evaluation"]
    assert asked.content["method"]["name"] == "last" and asked.content["match"] == "time"
    everything = spec(methods=["uniform", "last"], match=["steps", "time"])
    assert asked in cells(everything)  # the choice of runs is no part of a cell


# --- how it ends ------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(spec, ground, tmp_path):
    """A run with its adapter, and the evaluation that is not there yet."""
    made = spec()
    run_cell_, asked = (CellFolder.of(tmp_path / "out", cell) for cell in cells(made))
    run(spec(evaluation=None), tmp_path / "out", ground)
    asked.make()
    return made, run_cell_, asked


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda adapter: shutil.rmtree(adapter), "the adapter of its run is damaged: .* is no adapter"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "damaged: .* has no weights"),
        (
            lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"x"),
            "is not the one that was trained",
        ),
    ],
    ids=["no folder", "no weights", "other weights"],
)
def test_an_adapter_that_is_not_the_one_that_was_trained_is_not_asked(trained, ground, damage, message):
    made, place, asked = trained
    damage(place.path / "adapter")
    folder = place.path.parents[1]
    run(made, folder, ground, accept_change=True)
    state, reason = asked.state()
    assert state == "failed"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(reason)
    assert f"Remove the folder '{place.path.name}' and run the campaign with --retry-failed" in reason
    shutil.rmtree(place.path)
    run(made, folder, ground, retry_failed=True)
    assert (place.state(), asked.state()) == (("done", None), ("done", None))


def test_a_run_from_before_adapters_were_kept_says_how_to_get_one(trained, ground):
    made, place, asked = trained
    result = place.record()["result"]
    del result["adapter_digest"]
    (place.path / "record.json").unlink()
    place.finish("done", **result)
    run(made, place.path.parents[1], ground, accept_change=True)
    assert "from before runs kept their adapters. Remove the folder" in asked.state()[1]


def test_the_evaluation_of_a_run_that_failed_fails_with_its_reason_and_starts_nothing(spec, ground, tmp_path):
    broken, asked = run(spec(models=["no-such-folder/model"]), tmp_path / "out", ground)
    assert broken.state()[0] == "failed" and asked.record()["attempts"] == 0
    assert asked.state() == ("failed", f"its run ended as failed: {broken.state()[1]}")


def test_another_model_under_the_same_name_makes_the_evaluation_invalid(trained, ground):
    made, place, asked = trained
    folder = place.path.parents[1]
    run(made, folder, ground, accept_change=True)
    assert asked.state() == ("done", None)
    (asked.path / "record.json").unlink()
    (base,) = (folder / "shared").glob("evaluation-*.json")
    base.write_text(json.dumps({**json.loads(base.read_text()), "model_digest": "another"}))
    run(made, folder, ground)
    assert asked.state() == ("invalid", "checks that do not hold: base")


def test_an_evaluation_that_ran_out_of_memory_reads_fewer_prompts_at_once(trained, ground):
    made, place, asked = trained
    assert rows_at_a_time(asked.cell) == 8
    with asked.lock():
        asked.append("attempt_ended", cause="memory", code=76, reason="out of memory")
    run(made, place.path.parents[1], ground, accept_change=True)
    assert asked.record()["result"]["eval_batch_size"] == 4


# --- what is refused before anything runs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        pytest.param(
            {"evaluation": {**PACK, "tasks": ["gsm9k"]}},
            ConfigError,
            "unknown task 'gsm9k'. Did you mean 'gsm8k'",
            marks=pytest.mark.slow,  # the harness reads the files of all its tasks
        ),
        ({"evaluation": {**PACK, "tasks": []}}, ConfigError, "evaluation.tasks"),
        ({"evaluation": {**PACK, "tasks": ["gsm8k", "gsm8k"]}}, ConfigError, "'gsm8k' is given twice"),
        ({"evaluation": {**PACK, "limits": 3}}, ConfigError, "unknown key 'evaluation.limits'. Did you mean 'limit'"),
        ({"evaluation": {**PACK, "limit": 0}}, ConfigError, "evaluation.limit=0"),
        ({"evaluation": {"limit": 2}}, ConfigError, "evaluation.tasks is missing"),
        ({"evaluation": {**PACK, "data_dir": "nowhere"}}, DataError, "nowhere.* is not a folder"),
        ({"evaluation": {**PACK, "tasks": ["mbpp"]}}, DataError, "no rows of .*mbpp"),
        ({"evaluation": {**PACK, "methods": ["last"]}}, ConfigError, "there is no method 'last' here"),
        ({"evaluation": {**PACK, "match": ["time"]}}, ConfigError, "no run is matched by 'time'"),
        ({"evaluation": {**PACK, "tasks": ["humaneval"]}}, ConfigError, "Give allow_code to agree"),
        ({"margins": {"heldout_loss": 0.01, "mmlu": 1}}, ConfigError, "unknown key 'margins.mmlu'"),
        ({"margins": {"heldout_loss": 0.01, "gsm8k": 0}}, ConfigError, "margins.gsm8k=0"),
        ({"margins": {"heldout_los": 0.01}}, ConfigError, "Did you mean 'heldout_loss'"),
    ],
    ids=str,
)
def test_a_pack_that_cannot_be_asked_is_refused_with_the_next_step(spec, changed, error, message):
    with pytest.raises(error, match=message):
        spec(**changed)


def test_margins_of_tasks_are_fixed_beforehand_and_no_part_of_any_cell(spec):
    plain, made = spec(), spec(margins={"heldout_loss": 0.01, "gsm8k": 2, "wikitext": "2e-2"})
    assert made["margins"] == {"heldout_loss": 0.01, "other_loss": None, "gsm8k": 2.0, "wikitext": 0.02}
    assert cells(plain) == cells(made)


def test_programs_that_cannot_be_contained_stop_a_campaign_before_anything_runs(spec, ground, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    spec(evaluation={**PACK, "tasks": ["wikitext"]})
    values = {**VALUES, "evaluation": {**PACK, "tasks": ["humaneval"], "allow_code": True}}
    path = ground / "code.yaml"
    path.write_text(yaml.safe_dump({**values, "name": "code"}))
    monkeypatch.setattr("aletheia_lora.evaluation.sandbox.find_bwrap", _no_bwrap)
    options = {"workers": 1, "executor": "local", "executor_options": [], "accept_change": False, "retry_failed": False}
    for start in (lambda: commands.preview(path, print), lambda: commands.run(path, None, say=print, **options)):
        with pytest.raises(SandboxError, match="bubblewrap"):
            start()
    assert not (ground / "code").exists()


def _no_bwrap(_given):
    raise SandboxError("bubblewrap is not installed.")


def test_the_forecast_lists_evaluations_and_does_not_guess_their_time(spec):
    record = forecast(spec(), print)
    run_entry, asked = record["cells"]
    assert run_entry["seconds"] > 0 and asked["seconds"] is None and record["num_unknown"] == 1
    assert asked["cell"].startswith("evaluation-bytes-words-uniform-s0-")
    assert asked["reason"] == "an answer is as long as the model makes it"


def test_the_words_of_the_pack_are_those_of_the_evaluation(spec):
    known = {*EvaluationOptions.__dataclass_fields__} - {"any_base"}
    assert known == {*pack.Evaluation.model_fields} - {*pack.CHOICES}
    for name in known - {"tasks"}:
        assert pack.Evaluation.model_fields[name].default == RunConfig.model_fields[name].default


def test_changed_rows_of_a_task_are_another_cell(spec, ground):
    before = cells(spec())
    file = ground / "tasks" / "gsm8k" / "test.jsonl"
    kept = file.read_text()
    try:
        file.write_text(kept + kept.splitlines()[0].replace("What", "Say what") + "\n")
        after = cells(spec())
    finally:
        file.write_text(kept)
    assert before[0] == after[0] and before[1] != after[1]
