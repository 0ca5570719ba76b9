import json
import math
from pathlib import Path

import pytest

from aletheia_lora.comparison import CompareOptions
from aletheia_lora.errors import ConfigError
from aletheia_lora.plan_options import PlanOptions
from aletheia_lora.run_config import GROUPS, RunConfig, configuration, resolve
from aletheia_lora.training.run import TrainOptions


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# --- the schema -------------------------------------------------------------------------------------------------


def test_every_key_is_in_exactly_one_group():
    assert sorted(key for keys in GROUPS.values() for key in keys) == sorted(RunConfig.model_fields)


def test_every_key_is_described():
    for name, field in RunConfig.model_fields.items():
        assert field.description and field.description.endswith("."), name


@pytest.mark.parametrize("options", [PlanOptions, TrainOptions, CompareOptions])
def test_every_option_of_a_stage_is_a_key_and_the_defaults_make_one(options):
    config = RunConfig()
    subset = config.subset(options)
    assert set(subset) == set(options.__dataclass_fields__)
    made = options(**{**subset, "controls": tuple(config.controls)} if options is CompareOptions else subset)
    assert all(getattr(made, name) == value for name, value in subset.items() if name != "controls")


@pytest.mark.parametrize("options", [PlanOptions, CompareOptions])
def test_a_key_left_out_means_what_the_library_means(options):
    ours, theirs = RunConfig().subset(options), options()
    different = {name for name, value in ours.items() if name != "controls" and value != getattr(theirs, name)}
    assert different == set()


# --- a file and flags -------------------------------------------------------------------------------------------


def test_without_a_file_and_flags_everything_has_its_default():
    assert resolve(None, {}) == RunConfig()
    assert resolve(None, {"steps": None, "plan": None}) == RunConfig()


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_changes_nothing(yaml_file, text):
    assert resolve(yaml_file(text), {}) == RunConfig()


def test_keys_of_the_file_are_read(yaml_file):
    text = "steps: 7\nlearning_rate: 1e-3\ntargets: [q_proj, v_proj]\noutput: some/folder\nmatched_time: false\n"
    config = resolve(yaml_file(text), {})
    assert (config.steps, config.learning_rate, config.targets) == (7, 1e-3, ["q_proj", "v_proj"])
    assert config.output == Path("some/folder") and config.matched_time is False


def test_flags_override_the_file_key_by_key(yaml_file):
    path = yaml_file("steps: 7\nbatch_size: 2\ncompletion_only: true\ncontrols: [last]\n")
    config = resolve(path, {"steps": 9, "completion_only": False, "controls": ["random"], "batch_size": None})
    assert (config.steps, config.batch_size, config.completion_only) == (9, 2, False)
    assert config.controls == ["random"]


def test_a_resolved_run_reads_back_as_itself(yaml_file):
    config = resolve(None, {"model": "some/model", "time_budget": 0.5, "targets": ["q_proj"], "output": Path("out")})
    assert configuration(json.loads(config.model_dump_json())) == config
    assert resolve(yaml_file(config.model_dump_json(indent=1)), {}) == config  # JSON is YAML


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time_bugdet: 0.5", "unknown key 'time_bugdet'. Did you mean 'time_budget'?"),
        ("Steps: 4", "unknown key 'Steps'. Did you mean 'steps'?"),
        ("learning-rate: 0.1", "unknown key 'learning-rate'. Did you mean 'learning_rate'?"),
        ("zzz: 1", "unknown key 'zzz'. Known: adapter, adapters, allocation,"),
        ("4: 1", "unknown key '4'"),
        ("null: 1", "unknown key"),
    ],
)
def test_an_unknown_key_names_the_nearest(yaml_file, text, message):
    with pytest.raises(ConfigError) as caught:
        resolve(yaml_file(text), {})
    assert message.replace("'4'", "4") in str(caught.value).replace("'4'", "4")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "many"),
        ("steps", 1.5),
        ("steps", True),
        ("steps", None),
        ("steps", [4]),
        ("steps", 0),
        ("seed", -1),
        ("seed", False),
        ("rank", "16k"),
        ("model", 5),
        ("model", None),
        ("dtype", "float8"),
        ("completion_only", "perhaps"),
        ("completion_only", 3),
        ("percent", 0),
        ("percent", 101),
        ("percent", True),
        ("time_budget", 0),
        ("time_budget", 1.01),
        ("mass", 2),
        ("targets", "q_proj"),
        ("targets", [1]),
        ("controls", {"last": True}),
        ("max_length", 1),
        ("learning_rate", 0),
        ("lora_dropout", 1.0),
        ("probe_mode", "fast"),
        ("output", 5),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_refused_by_its_key(yaml_file, key, value):
    with pytest.raises(ConfigError, match=f"^{key}") as caught:
        resolve(yaml_file(json.dumps({key: value})), {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- steps", "[1, 2]", "just words", "5", "true", "'text'"])
def test_a_file_that_is_no_mapping_says_what_it_holds(yaml_file, text):
    with pytest.raises(ConfigError, match=r"expected keys and values, e\.g\. `steps: 40`"):
        resolve(yaml_file(text), {})


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch CANARY']",
        "model: !!python/name:os.system",
        "!!python/object/new:os.system [touch CANARY]",
        "steps: !unknown 4",
    ],
)
def test_tags_run_nothing(yaml_file, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is not YAML"):
        resolve(yaml_file(text), {})
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize("text", ["steps: [", "steps: 4\n  batch: 5\n", "a: b: c", "\tsteps: 4", b"\xff\xfe\x00\xd8"])
def test_a_file_that_is_no_yaml_says_so_on_one_line(yaml_file, text):
    with pytest.raises(ConfigError, match="is not YAML") as caught:
        resolve(yaml_file(text), {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["learning_rate", "alpha_ratio", "time_budget", "percent", "uniform_learning_rate"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "'nan'", "'inf'", "1e999"])
def test_a_number_that_is_not_finite_is_refused(yaml_file, key, value):
    with pytest.raises(ConfigError, match=f"^{key}"):
        resolve(yaml_file(f"{key}: {value}"), {})


def test_a_flag_that_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match="learning_rate=nan, expected a finite number"):
        resolve(None, {"learning_rate": math.nan})


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*No such file"):
        resolve(tmp_path / "missing.yaml", {})
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*directory"):
        resolve(tmp_path, {})


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().steps = 5


def test_a_key_given_twice_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 7\nseed: 1\nsteps: 8\n")
    with pytest.raises(ConfigError, match="'steps' is given twice"):
        resolve(tmp_path / "run.yaml", {})
