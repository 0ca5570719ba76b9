"""Methods whose base model is packed: QLoRA, and any strategy on nf4, fp4 or int8."""

import importlib.util
import logging
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from aletheia_lora.campaign.cell import run_cell
from aletheia_lora.campaign.methods import METHODS, Method
from aletheia_lora.campaign.records import CellFolder
from aletheia_lora.campaign.spec import Cell, cells, load_campaign, resolved
from aletheia_lora.errors import ConfigError
from evaluation_inputs import write_rows
from families import ROTARY
from test_campaign_cell import VALUES
from tiny_inputs import save_model, save_rows, word_rows

pytestmark = pytest.mark.usefixtures("library_logging")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a Llama whose matrices are as wide as a block of bitsandbytes, and rows to learn from."""
    folder = tmp_path_factory.mktemp("packed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = AutoModelForCausalLM.from_config(LlamaConfig(**{**ROTARY, "hidden_size": 64, "intermediate_size": 128}))
    save_model(folder / "wide", wide)
    save_rows(folder / "rows.jsonl", word_rows(32))
    write_rows(folder / "tasks")
    return folder


@pytest.fixture
def spec(ground, monkeypatch):
    """Gives the resolved spec with changes."""
    monkeypatch.chdir(ground)
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)

    def made(**changed):
        path = ground / "spec.yaml"
        path.write_text(yaml.safe_dump({**VALUES, "models": ["wide"], "learning_rates": [3e-3], **changed}))
        return resolved(load_campaign(path), ground)

    yield made
    logger.setLevel(level)


def run(made, folder):
    """The results of all cells, by method."""
    found = {}
    for cell in cells(made):
        place = CellFolder.of(folder, cell)
        place.make()
        assert run_cell(place.path, print) == 0
        assert place.state() == ("done", None), place.state()
        found[cell.content["method"]["name"]] = place.record()["result"]
    return found


@needs_bitsandbytes
def test_qlora_trains_every_layer_over_a_packed_base_and_is_compared_with_that_base(spec, tmp_path):
    found = run(spec(methods=["uniform", "qlora"], steps=6), tmp_path)
    float_, packed = found["uniform"], found["qlora"]
    assert packed["layers"] == float_["layers"] and packed["trainable_params"] == float_["trainable_params"]
    assert packed["rows_digest"] == float_["rows_digest"] and all(packed["checks"].values())
    assert packed["fingerprint"] != float_["fingerprint"]  # each is checked against its own base model
    assert packed["base_heldout_loss"] != float_["base_heldout_loss"]
    assert packed["base_heldout_loss"] == pytest.approx(float_["base_heldout_loss"], rel=0.05)
    assert packed["heldout_loss"] < packed["base_heldout_loss"]
    shared = sorted(path.name.partition("-")[0] for path in (tmp_path / "shared").glob("*.json"))
    assert shared == ["base", "base", "probe", "probe"]


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_any_strategy_and_trainer_runs_on_a_packed_base(spec, tmp_path, quantization):
    names = ["paper", "uniform_trainer", "adalora", *(["dora"] if quantization != "int8" else [])]
    methods = [{"name": name, "quantization": quantization} for name in names]
    found = run(spec(methods=methods, prefix_cache=True), tmp_path)
    assert len(found["paper"]["layers"]) == 2 and found["paper"]["probe_seconds"] > 0
    for name in names:  # AdaLoRA learns slower, on a float base, too
        assert found[name]["heldout_loss"] < found[name]["base_heldout_loss"] + (0.01 if name == "adalora" else 0)


@needs_bitsandbytes
def test_the_grid_of_a_packed_method_is_its_own(spec, tmp_path):
    found = run(spec(methods=["qlora"], learning_rates=[1e-5, 3e-3]), tmp_path)
    assert found["qlora"]["learning_rate"] == 3e-3


@needs_bitsandbytes
def test_the_evaluation_of_a_packed_run_is_beside_its_packed_base(spec, tmp_path):
    eight = {"name": "eight", "strategy": "all", "allocation": "uniform", "quantization": "int8"}
    methods = ["qlora", eight]
    asked = {"tasks": ["wikitext"], "data_dir": "tasks"}
    for _again in range(2):  # the second time with the base model's answers of the first
        found = run(spec(methods=methods, evaluation=asked), tmp_path)
        shutil.rmtree(tmp_path / "cells")
    assert len(list((tmp_path / "shared").glob("evaluation-*.json"))) == 2
    tasks = [found[name]["evaluation"]["wikitext"] for name in ("qlora", "eight")]
    assert tasks[0]["base"] != tasks[1]["base"] and all(task["value"] != task["base"] for task in tasks)


@needs_bitsandbytes
def test_a_packed_method_has_no_cell_at_equal_time(spec):
    made = cells(spec(methods=["uniform", "qlora"], match=["steps", "time"]))
    matched = [(cell.content["method"]["name"], cell.content["match"]) for cell in made]
    assert matched == [("uniform", "steps"), ("qlora", "steps"), ("uniform", "time")]


@needs_bitsandbytes
def test_what_packs_a_base_is_part_of_its_cells_alone(spec):
    plain, both = spec(methods=["uniform"]), spec(methods=["uniform", "qlora"])
    (first,), (again, packed) = cells(plain), cells(both)
    assert first == again and "quantization" not in first.content["method"]
    assert set(packed.content["versions"]) - set(first.content["versions"]) == {"bitsandbytes"}


def test_without_bitsandbytes_a_campaign_is_refused_before_anything_runs(spec, monkeypatch):
    monkeypatch.setattr("aletheia_lora.quantized.importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="needs bitsandbytes, which is not installed"):
        spec(methods=["qlora"])


@pytest.mark.parametrize("score", ["relative", "taylor", "weight_snr"])
def test_a_score_that_reads_weights_is_refused_on_packed_ones(spec, score):
    with pytest.raises(ConfigError, match=f"the score '{score}' reads weights, which quantization='nf4' packs"):
        spec(methods=[{"name": "paper", "score": score, "quantization": "nf4"}])


def test_dora_on_int8_is_refused_as_peft_cannot_train_it(spec):
    with pytest.raises(ConfigError, match=r"PEFT's DoRA loses the scales of int8 weights\. Take nf4"):
        spec(methods=[{"name": "dora", "quantization": "int8"}])


def test_an_unknown_quantization_is_refused(spec):
    with pytest.raises(ConfigError, match=r"methods\.0\.quantization='nf3'"):
        spec(methods=[{"name": "paper", "quantization": "nf3"}])


def test_only_qlora_packs_by_itself():
    packed = {name for name, method in METHODS.items() if Method(name=name, **method).quantization != "none"}
    assert packed == {"qlora"}


CONTENT = {
    "kind": "run",
    "batch_size": 4,
    "rank": 16,
    "alpha_ratio": 2.0,
    "probe_batches": 8,
    "probe_batch_size": 1,
    "train_rows": None,
    "validation_rows": 24,
    "heldout_rows": 32,
    "prefix_cache": False,
    "versions": {"aletheia-lora": "0", "torch": "0"},
    "learning_rates": [0.0005, 0.001],
    "grid_steps": 16,
    "steps": 40,
    "evaluations": 4,
    "other_text": None,
    "other_rows": 64,
    "model": {"name": "tiny", "model": "owner/tiny", "dtype": "auto", "device": "auto", "digest": None},
    "task": {
        "name": "maths",
        "data": "rows.jsonl",
        "split": None,
        "prompt_column": "question",
        "completion_column": "answer",
        "completion_only": True,
        "max_length": 512,
        "max_rows": None,
        "digest": None,
    },
    "method": {
        "name": "paper",
        "strategy": "top_percent",
        "score": "gradient_norm",
        "percent": 50.0,
        "num_layers": None,
        "mass": 0.8,
        "time_budget": 0.7,
        "allocation": "uniform",
        "params_of": None,
        "trainer": "aletheia",
        "adapter": "lora",
    },
    "match": "steps",
    "seed": 0,
    "draw": 0,
}
DIGEST = "ef5ef8ccd9666cbecb5193ab0eed840f85f17da06074c83a8d73df12a8085762"
GRID_DIGEST = "da800cd9b02bec9d0220b7bba2078ea16a78ccabbfc6e7b0405653664edf942d"


def test_the_digest_of_a_plain_cell_stays_what_it_was(tmp_path):
    """Records of campaigns from before stay those of their cells: a new setting must not enter a content unasked."""
    (tmp_path / "spec.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "halves",
                "models": ["owner/tiny"],
                "tasks": [
                    {"name": "maths", "data": "rows.jsonl", "prompt_column": "question", "completion_column": "answer"}
                ],
                "methods": ["paper"],
                "seeds": [0],
                "learning_rates": ["5e-4", 1e-3],
                "margins": {"heldout_loss": 0.01},
            }
        )
    )
    made = resolved(load_campaign(tmp_path / "spec.yaml"), tmp_path)
    grid, _, found = cells({**made, "versions": CONTENT["versions"]})
    assert found.content == CONTENT
    assert (found.digest, grid.digest) == (DIGEST, GRID_DIGEST)
    assert Cell(CONTENT).digest == DIGEST
