import json
from dataclasses import replace
from hashlib import sha256

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from aletheia_lora.data import split, tokenize
from aletheia_lora.planning import plan
from aletheia_lora.training.model_card import model_card
from aletheia_lora.training.run import TrainOptions, train_adapter
from families import build
from tiny_inputs import word_rows, word_tokenizer

REVISION = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = [
    "x\n---\nlicense: mit\n---\n# Owned",
    "a: b # c",
    "'quoted' \"twice\"",
    "![x](https://evil.example/x.png)",
    "[link](javascript:alert(1))",
    "<script>alert(1)</script>",
    "`code` ``more``",
    "| a | b |\n| - | - |",
    "{{ config }} {% raw %}",
    "!!python/object:os.system",
    "\u202eevil\u2028next\x00\x1b[31m",
    "é" * 500,
    "",
]


@pytest.fixture(scope="module")
def rows():
    return tokenize(word_rows(16), word_tokenizer())


@pytest.fixture(scope="module")
def made(rows):
    return plan(build("llama"), rows, rank=4, probe_batches=6, strategy="top_percent", allocation="uniform")


@pytest.fixture
def record(made):
    """What training writes, made up."""
    return {
        "model": "org/tiny",
        "data": "org/words",
        "dataset_id": "org/words",
        "revision": REVISION,
        "adapter": "lora",
        "layers": list(made.selection.layers),
        "trainable_params": 1234,
        "options": {"steps": 4, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-3, "seed": 0},
        "train_rows": 8,
        "train_digest": "1" * 64,
        "seconds": 2.0,
        "probe_seconds": 0.5,
        "lowest_backward_layer": 2,
        "dead_adapters": [],
        "engine": {"name": "one process", "num_processes": 1},
        "prefix_cache": None,
        "losses": [3.0, 2.5],
        "environment": {"aletheia-lora": "1.0", "torch": "2.13.0"},
        "weights_sha256": "2" * 64,
        "config_sha256": "3" * 64,
    }


def front_matter(card):
    """The block at the top, read as the Hub reads it: by its own expression and a plain YAML reader."""
    return yaml.safe_load(REGEX_YAML_BLOCK.search(card).group(2))


# --- what it says -----------------------------------------------------------------------------------------------


def test_a_training_writes_a_card_that_the_hub_reads(tmp_path, rows):
    model = build("llama")
    parts = split(rows, seed=0, probe=4, validation=2)
    made = plan(model, parts.probe, rank=4, probe_batches=4, time_budget=0.7)
    names = {"model_name": str(tmp_path / "my-llama"), "data_name": f"{tmp_path}/rows.jsonl"}
    record = train_adapter(model, word_tokenizer(), made, parts.train, tmp_path / "a", TrainOptions(steps=2), **names)
    text = (tmp_path / "a" / "README.md").read_text()
    assert str(tmp_path) not in text + json.dumps(record)
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "my-llama",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "aletheia-lora"],
    }
    assert str(card) == text and text == model_card(made, json.loads((tmp_path / "a" / "record.json").read_text()))
    assert "for the base model `my-llama`, on `rows.jsonl`" in card.text
    assert "loaded from a folder or file, so that name may not be one on the Hub" in card.text
    weights = sha256((tmp_path / "a" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert record["weights_sha256"] == weights and weights in card.text
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    del config["base_model_name_or_path"]
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"))
    assert sha256(canonical.encode()).hexdigest() in card.text
    assert parts.train.digest in card.text and made.anatomy.fingerprint in card.text
    assert f"torch {record['environment']['torch']}" in card.text
    assert f"backward stopped at layer {made.selection.lowest} (measured in the first step)" in card.text


def test_the_card_says_what_was_not_shown_of_scores(made, record, rows):
    assert "more than as many random ones has not been shown" in model_card(made, record)
    other = plan(build("llama"), rows, rank=4, probe_batches=2, strategy="stride")
    assert "as many random ones" not in model_card(other, {**record, "layers": list(other.selection.layers)})


def test_a_model_and_data_from_the_hub_are_named_with_their_revision(made, record):
    card = ModelCard(model_card(made, record))
    assert (card.data.base_model, card.data.datasets) == ("org/tiny", ["org/words"])
    assert f'from_pretrained("org/tiny", revision="{REVISION}")' in card.text
    assert "may not be one on the Hub" not in card.text
    assert "model-index" not in card.data.to_dict() and card.data.license is None  # neither was measured nor known
    compile(card.text.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_revision_of_a_model_is_taken_only_if_that_name_loaded_it(tmp_path, rows, made):
    for loaded_as, revision in (("org/tiny", REVISION), (str(tmp_path / "tiny"), None)):
        model = build("llama")
        model.name_or_path = model.config.name_or_path = loaded_as
        model.config._commit_hash = REVISION
        folder = tmp_path / f"adapter-{revision}"
        options = TrainOptions(steps=1)
        record = train_adapter(model, word_tokenizer(), made, rows, folder, options, model_name="org/tiny")
        assert (record["model"], record["revision"]) == ("org/tiny", revision)


def test_the_edge_names_the_closest_layers_and_their_errors(made, record):
    low = min(made.selection.layers, key=made.scores.__getitem__)
    high = max(set(made.scores) - set(made.selection.layers), key=made.scores.__getitem__)
    errors = made.probe.standard_errors()
    text = model_card(made, record)
    assert f"layer {low} has the lowest score that was chosen, {made.scores[low]:.4g} ± {errors[low]:.2g}" in text
    assert f"layer {high} the highest that was left out, {made.scores[high]:.4g} ± {errors[high]:.2g}" in text
    overlap = made.probe.split_half_overlap(100 * 2.5 / 4)
    assert f"the 2 layers with the largest gradient norms by odd and by even batches: overlap {overlap:.2f}" in text


def with_norms(made, norms):
    """The plan with these gradient norms, a row for each layer; the best half of the layers is chosen."""
    first = {layer: next(t for t in made.probe.tensors if t.layer_idx == layer) for layer in range(4)}
    tensors = tuple(replace(first[layer], grad_norm=tuple(norms[layer])) for layer in range(4))
    probe = replace(made.probe, tensors=tensors, losses=(1.0,) * len(norms[0]))
    scores = {layer: sum(norms[layer]) for layer in range(4)}
    best = tuple(sorted(sorted(scores, key=scores.__getitem__)[2:]))
    return replace(made, probe=probe, scores=scores, selection=replace(made.selection, layers=best))


def test_layers_that_the_probe_cannot_tell_apart_are_called_ties(made, record):
    clear = with_norms(made, [[1, 1.1, 1], [2, 2.1, 2], [5, 5.1, 5], [6, 6.1, 6]])
    assert "ties at the edge: none within 2 standard errors" in model_card(clear, record)
    close = with_norms(made, [[1, 1.1, 1], [3, 6, 4], [6, 3, 4.5], [9, 9.1, 9]])
    assert "ties at the edge, within 2 standard errors of the other side: left out 1; chosen 2." in model_card(
        close, record
    )
    paired = with_norms(made, [[1, 5, 9], [2, 6, 10], [3, 7, 11], [4, 8, 12.1]])  # rows differ more than layers do
    assert "ties at the edge: none" in model_card(paired, record)


def test_what_is_not_known_is_said(made, record):
    unprobed = replace(made, probe=None)
    assert "ties at the edge: not known, the plan was made without a probe" in model_card(unprobed, record)
    one = with_norms(made, [[1], [2], [3], [4]])
    assert "standard errors of the scores: not known, one batch was probed" in model_card(one, record)
    other = replace(made, options=replace(made.options, score="fisher"))
    assert "standard errors are there for the score gradient_norm alone" in model_card(other, record)
    control = replace(made, options=replace(made.options, strategy="last"))
    assert "this strategy does not prefer high scores" in model_card(control, record)
    diverse = replace(made, options=replace(made.options, strategy="diverse"))
    assert "resemble those of a layer taken before, so there is no one edge" in model_card(diverse, record)
    everything = replace(made, selection=replace(made.selection, layers=(0, 1, 2, 3)))
    assert "every layer is adapted, so there is no edge" in model_card(everything, record)


def test_a_negative_margin_is_put_down_to_cost(made, record):
    best = max(made.scores, key=made.scores.__getitem__)
    others = tuple(layer for layer in made.scores if layer != best)
    odd = replace(made, selection=replace(made.selection, layers=others))
    assert "the margin is negative: predicted cost decided besides the scores" in model_card(odd, record)


# --- names from outside -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("key", ["model", "data", "dataset_id", "revision"])
def test_a_hostile_name_stays_a_name(made, record, name, key):
    plain = model_card(made, record)
    text = model_card(made, {**record, key: name})
    expected = front_matter(plain)
    expected.pop({"model": "base_model", "dataset_id": "datasets"}.get(key), None)
    assert front_matter(text) == expected == ModelCard(text).data.to_dict()
    headings = [line for line in plain.splitlines() if line.startswith("#")]
    assert [line for line in text.splitlines() if line.startswith("#")] == headings
    assert len(plain.splitlines()) - len(text.splitlines()) in (0, 1, 2)  # the front matter may lack that name
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    compile(text.split("```python\n")[1].split("```")[0], "card", "exec")
    for line in text.splitlines():
        outside = "".join(line.split("`")[::2]) if "``" not in line else ""
        assert not any(piece in outside for piece in ("<script", "](", "![", "{{"))


@pytest.mark.parametrize("name", ["null", "yes", "2024", "1.5", "0x10", "~"])
def test_a_name_that_yaml_would_read_as_something_else_stays_text(made, record, name):
    found = front_matter(model_card(made, {**record, "model": name}))
    assert found.get("base_model", name) == name
    assert "base_model" in found or name == "~"


@pytest.mark.parametrize("strategy", ["`x` <b>", "a\n# b"])
def test_a_plan_edited_by_hand_cannot_write_headings(made, record, strategy):
    edited = replace(made, options=replace(made.options, strategy=strategy))
    plain = model_card(made, record)
    text = model_card(edited, record)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in plain.splitlines() if line.startswith("#")
    ]
