import json
from copy import deepcopy

import pytest
import yaml

from aletheia_lora.campaign.methods import METHODS
from aletheia_lora.campaign.spec import campaign_folder, cells, changes, grid_of, load_campaign, resolved
from aletheia_lora.errors import ConfigError
from aletheia_lora.selection import STRATEGIES

VALUES = {
    "name": "halves",
    "models": ["owner/tiny"],
    "tasks": [{"name": "maths", "data": "rows.jsonl", "prompt_column": "question", "completion_column": "answer"}],
    "methods": ["uniform", "paper", "random"],
    "seeds": [0, 1],
    "learning_rates": ["5e-4", 1e-3],
    "margins": {"heldout_loss": 0.01},
}
SAME = {"name": "same", "strategy": "all", "allocation": "uniform"}


@pytest.fixture
def load(tmp_path):
    """Loads the spec with changes: keys to set, or to remove where the value is None."""

    def loaded(**changed):
        values = {**deepcopy(VALUES), **changed}
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return load_campaign(path)

    return loaded


@pytest.fixture
def spec(load, tmp_path):
    """Gives the resolved spec with changes."""
    return lambda **changed: resolved(load(**changed), tmp_path)


# --- what is accepted -------------------------------------------------------------------------------------------


def test_a_model_and_a_method_may_be_given_by_name_alone(load):
    campaign = load()
    assert (campaign.models[0].name, campaign.models[0].model) == ("tiny", "owner/tiny")
    assert [method.name for method in campaign.methods] == ["uniform", "paper", "random"]
    assert campaign.methods[1].strategy == "top_percent"
    assert campaign.learning_rates == [5e-4, 1e-3]


def test_every_method_of_the_table_can_be_asked_for_and_no_two_are_the_same(load):
    campaign = load(methods=list(METHODS))
    assert [method.name for method in campaign.methods] == list(METHODS)


def test_a_known_method_may_be_changed_and_any_score_may_meet_any_strategy(load):
    mine = {"name": "mine", "strategy": "mass", "score": "fisher", "mass": 0.5}
    campaign = load(methods=[{"name": "random", "draws": 3}, mine])
    assert (campaign.methods[0].draws, campaign.methods[0].percent) == (3, 50)
    assert (campaign.methods[1].score, campaign.methods[1].mass) == ("fisher", 0.5)
    assert all(method["strategy"] in STRATEGIES for method in METHODS.values())


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stepz": 3}, "unknown key 'stepz'. Did you mean 'steps'"),
        ({"tasks": [{"name": "maths", "date": "x"}]}, "unknown key 'tasks.0.date'. Did you mean 'data'"),
        ({"models": [{"name": "a", "modell": "x"}]}, "Did you mean 'model'"),
        ({"margins": {"heldout_los": 1}}, "Did you mean 'heldout_loss'"),
        ({"methods": [{"name": "paper", "precent": 25}]}, "Did you mean 'percent'"),
        ({"methods": ["papr"]}, "there is no method 'papr'. Did you mean 'paper'"),
        ({"methods": [{"name": "mine", "strategy": "best"}]}, "unknown strategy 'best'"),
        ({"methods": [{"name": "paper", "score": "gradient_nrm"}]}, "Did you mean 'gradient_norm'"),
        ({"methods": [{"name": "paper", "allocation": "even"}]}, "unknown allocation 'even'"),
        ({"methods": [{"name": "paper", "draws": 2}]}, "2 draws of a choice that is not random"),
        ({"methods": [3]}, "methods holds 3"),
        ({"methods": "paper"}, "methods is a str, expected a list"),
        ({"methods": ["paper", "paper"]}, "'paper' is given twice"),
        ({"methods": ["paper", {"name": "half", "strategy": "top_percent", "allocation": "uniform"}]}, "are the same"),
        ({"methods": [{**SAME, "params_of": "papr"}]}, "unknown params_of 'papr'. Did you mean 'paper'"),
        ({"methods": [{**SAME, "params_of": "all_matched_params"}]}, "'all_matched_params' has its own from another"),
        ({"methods": [{**SAME, "params_of": "same"}]}, "'same' has its own from another one"),
        ({"methods": [{**SAME, "params_of": "adalora"}]}, "'adalora' changes it along the run"),
        ({"seeds": [1, 1]}, "1 is given twice, so its cells would be doubled"),
        ({"learning_rates": [0.001, "1e-3"]}, "given twice"),
        ({"models": ["a/tiny", "b/tiny"]}, "'tiny' is given twice"),
        ({"tasks": [{"name": "a", "data": "x"}, {"name": "b", "data": "x"}]}, "'a' and 'b' are the same"),
        ({"name": "../../x"}, "no plain name"),
        ({"name": "a..b"}, "no plain name"),
        ({"models": [{"name": "../../x", "model": "y"}]}, "no plain name"),
        ({"tasks": [{"name": "../../x", "data": "y"}]}, "no plain name"),
        ({"methods": [{"name": "../../x", "strategy": "last"}]}, "no plain name"),
        ({"models": ["../.."]}, "no plain name"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [True]}, "seeds.0=True"),
        ({"seeds": None}, "seeds is missing"),
        ({"margins": None}, "margins is missing"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rates": [float("nan")]}, "learning_rates.0"),
        ({"learning_rates": ["fast"]}, "learning_rates.0='fast'"),
        ({"match": ["params"]}, "match.0='params'"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_with_the_next_step(load, changed, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        load(**changed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("strategy", "last"), ("allocation", "asymmetric"), ("params_of", "paper")),
        *(("trainer", "trainer"), ("quantization", "nf4")),
    ],
)
def test_what_is_called_uniform_is_uniform_lora(load, key, value):
    with pytest.raises(ConfigError, match=f"method 'uniform': got {key}='{value}', expected .*another name"):
        load(methods=[{"name": "uniform", key: value}])


def test_a_file_that_is_not_there_or_no_mapping_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_campaign(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="holds a list"):
        load_campaign(tmp_path / "list.yaml")


def test_the_folder_has_the_name_of_the_campaign_and_lies_beside_the_file(tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: halves")
    assert campaign_folder(spec, None) == tmp_path / "halves"
    assert campaign_folder(spec, tmp_path / "elsewhere") == tmp_path / "elsewhere"
    spec.write_text("name: ../halves")
    with pytest.raises(ConfigError, match="no plain name"):
        campaign_folder(spec, None)


# --- cells ------------------------------------------------------------------------------------------------------


def test_the_cells_are_the_whole_grid_and_each_has_a_name_of_its_own(spec):
    made = cells(spec(methods=["uniform", {"name": "random", "draws": 3}], match=["steps", "time"]))
    grid = [cell for cell in made if cell.content["kind"] == "grid"]
    runs = [cell for cell in made if cell.content["kind"] == "run"]
    assert (len(grid), len(runs)) == (2 * 2, 2 * 2 * 1 + 2 * 2 * 3)
    assert len({cell.folder_name for cell in made}) == len(made)
    assert all(set(grid_of(run)) <= set(grid) and len(grid_of(run)) == 2 for run in runs)


def test_a_tasks_grids_come_before_its_runs_which_go_seed_after_seed(spec):
    tasks = [{"name": name, "data": f"{name}.jsonl"} for name in ("one", "two")]
    made = cells(spec(methods=["uniform", "last"], tasks=tasks, match=["steps", "time"], seeds=[0, 1]))
    runs = [cell.content for cell in made if cell.content["kind"] == "run"]
    order = [(run["match"], run["task"]["name"], run["seed"]) for run in runs]
    assert order == sorted(order) and len(order) == 2 * 2 * 2 * 2
    for run in (cell for cell in made if cell.content["kind"] == "run"):
        assert all(made.index(grid) < made.index(run) for grid in grid_of(run))
    first_of_two = next(place for place, cell in enumerate(made) if cell.content["task"]["name"] == "two")
    assert first_of_two == 4 + 4  # the grids and the runs at equal steps of the first task


def test_a_grid_of_one_rate_has_nothing_to_search(spec):
    made = cells(spec(learning_rates=[1e-3]))
    assert {cell.content["kind"] for cell in made} == {"run"} and grid_of(made[0]) == []


def test_what_no_counting_knows_the_time_of_has_no_cell_at_equal_time(spec):
    mine = {"name": "mine", "strategy": "last", "trainer": "trainer"}
    made = cells(spec(methods=["uniform", "dora", "adalora", "uniform_trainer", mine, "last"], match=["steps", "time"]))
    timed = [cell for cell in made if cell.content.get("match") == "time"]
    assert {cell.content["method"]["name"] for cell in timed} == {"uniform", "last"}


@pytest.mark.parametrize("name", ["dora", "uniform_trainer", "qlora"])
def test_a_method_that_would_have_no_cell_at_all_is_refused(load, name):
    with pytest.raises(ConfigError, match=f"method '{name}' would never run.*Add 'steps' to match"):
        load(methods=["uniform", name], match=["time"])


def test_another_seed_leaves_the_cells_that_are_there_alone(spec):
    before, after = cells(spec()), cells(spec(seeds=[0, 1, 2], margins={"heldout_loss": 0.5}))
    assert {cell.folder_name for cell in before} < {cell.folder_name for cell in after}


def test_a_matched_method_is_part_of_the_cell_where_it_is_not_as_the_table_has_it(spec):
    def control(*methods):
        found = cells(spec(methods=list(methods)))
        return [cell for cell in found if cell.content["method"]["params_of"] is not None]

    alone, beside = control("all_matched_params"), control("paper", "all_matched_params")
    assert alone == beside and not any("matched_method" in cell.content for cell in alone)
    changed = control({"name": "paper", "percent": 25.0}, "all_matched_params")
    assert [cell.content["matched_method"]["percent"] for cell in changed] == [25.0] * len(alone)
    assert {cell.content["kind"] for cell in changed} == {"grid", "run"} and not set(alone) & set(changed)
    mine = {"name": "mine", "strategy": "mass", "score": "fisher"}
    assert control(mine, {**SAME, "params_of": "mine"})[0].content["matched_method"]["score"] == "fisher"


@pytest.mark.parametrize("changed", [{"rank": 8}, {"batch_size": 2}, {"train_rows": 9}, {"heldout_rows": 9}], ids=str)
def test_what_changes_a_result_changes_the_name(spec, changed):
    assert not {cell.digest for cell in cells(spec())} & {cell.digest for cell in cells(spec(**changed))}


def test_changed_data_under_the_same_name_is_another_cell(spec, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    before = spec()
    (tmp_path / "rows.jsonl").write_text("{ }")
    after = spec()
    assert not {cell.digest for cell in cells(before)} & {cell.digest for cell in cells(after)}
    (line,) = changes(before, after)
    assert line.startswith("tasks.maths.digest: ") and " -> " in line


def test_a_diff_names_entries_and_both_values(spec):
    found = changes(spec(), spec(steps=9, methods=["uniform", "last", "random"]))
    assert "steps: 40 -> 9" in found
    assert any(line.startswith("methods.paper: {") and line.endswith("-> null") for line in found)
    assert any(line.startswith("methods.last: null -> ") for line in found)
    assert changes(spec(), json.loads(json.dumps(spec()))) == []
