"""A plan as a file that people edit: what is taken, and what is refused with the next step."""

import json

import pytest
from peft import get_peft_model

from aletheia_lora.adapter import check_census
from aletheia_lora.anatomy import anatomy
from aletheia_lora.data import batches, tokenize
from aletheia_lora.errors import PlanError
from aletheia_lora.plan_options import PlanOptions
from aletheia_lora.planning import Plan, plan, plan_from_probe
from aletheia_lora.probe import probe
from families import build
from test_planning import SMALL


@pytest.fixture(scope="module")
def rows(tokenized_rows):
    return tokenize(tokenized_rows(8, min_length=8, max_length=16, num_prompt_tokens=4), None)


@pytest.fixture(scope="module")
def llama_plan(rows):
    return plan(build("llama"), rows, **SMALL, strategy="top_percent")


@pytest.fixture(scope="module")
def measured(rows):
    model = build("llama")
    return model, anatomy(model), probe(model, list(batches(rows, 4, 0)))


def edited(made, change):
    record = json.loads(json.dumps(made.to_dict()))
    change(record)
    return record


def selects(*layers):
    return lambda record: record["selection"].update(layers=list(layers))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (selects(1, 4), "layers"),
        (selects(1, 99), "layers"),
        (selects(-1, 3), "layers"),
        (selects(3, 3), "each once"),
        (selects(3, 1), "in ascending order"),
        (selects(), "at least one layer"),
        (lambda r: r["selection"].update(layers=[0, 9], num_layers=10), "layer 9 does not exist"),
        (selects(3), "ranks to layers it does not select"),
        (lambda r: r["ranks"].append(dict(r["ranks"][0])), "named twice"),
        (lambda r: r["ranks"][0].update(name="model.layers.0.mlp.nothing"), "not in LlamaForCausalLM"),
        (lambda r: r.update(ranks=[]), "no module was given a rank"),
        (lambda r: r.update(format="aletheia-plan/2"), "format is 'aletheia-plan/2'"),
        (lambda r: r.pop("format"), "format is None"),
        (lambda r: r.pop("scores"), r"lacks \['scores'\]"),
        (lambda r: r.pop("probe"), r"lacks \['probe'\]"),
        (lambda r: (r.pop("ranks"), r.pop("anatomy")), "anatomy.*ranks"),
    ],
)
def test_an_edited_plan_that_cannot_be_is_refused(measured, change, message):
    model, found, result = measured
    made = plan_from_probe(found, result, PlanOptions(**SMALL, strategy="stride"), model=model)
    assert made.selection.layers == (1, 3)
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(edited(made, change))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["selection"].pop("layers"),
        lambda r: r["selection"].update(surprise=1),
        lambda r: r["ranks"][0].pop("rank"),
        lambda r: r["ranks"][0].update(surprise=1),
        lambda r: r["options"].update(surprise=1),
        lambda r: r["anatomy"].pop("layers"),
        lambda r: r.update(scores=[1.0, 2.0]),
        lambda r: r.update(selection=None),
    ],
    ids=["layers gone", "selection key", "rank gone", "rank key", "option key", "anatomy", "scores a list", "null"],
)
def test_a_plan_with_a_broken_part_is_a_plan_error(llama_plan, change):
    with pytest.raises(PlanError):
        Plan.from_dict(edited(llama_plan, change))


@pytest.mark.parametrize("rank", [0, -4, 33, 2.5, None], ids=str)
def test_an_edited_rank_that_cannot_be_is_refused(llama_plan, rank):
    with pytest.raises(PlanError, match="rank"):
        Plan.from_dict(edited(llama_plan, lambda record: record["ranks"][0].update(rank=rank)))


def test_an_edited_rank_is_counted_as_edited(llama_plan):
    wider = Plan.from_dict(edited(llama_plan, lambda record: record["ranks"][0].update(rank=16)))
    entries = check_census(get_peft_model(build("llama"), wider.lora_config()), wider.ranks)
    assert wider.trainable_params == sum(entry.num_params for entry in entries)


def test_a_module_of_an_unselected_layer_is_refused_whatever_number_stands_beside_it(measured):
    model, found, result = measured
    made = plan_from_probe(found, result, PlanOptions(**SMALL, strategy="last", num_layers=2), model=model)

    def change(record):
        record["ranks"][0]["name"] = record["ranks"][0]["name"].replace("layers.2.", "layers.1.")

    with pytest.raises(PlanError, match="does not select"):
        Plan.from_dict(edited(made, change))


def test_an_edited_plan_that_can_be_is_taken(measured):
    model, found, result = measured
    made = plan_from_probe(found, result, PlanOptions(**SMALL, strategy="last", num_layers=2), model=model)

    def change(record):
        record["selection"]["layers"] = [3]
        record["ranks"] = [entry for entry in record["ranks"] if entry["layer_idx"] == 3]

    smaller = Plan.from_dict(edited(made, change))
    assert smaller.selection.lowest == 3
    entries = check_census(get_peft_model(model, smaller.lora_config()), smaller.ranks)
    assert all(entry.name.startswith("model.layers.3.") for entry in entries)


def test_a_plan_fits_any_model_of_the_shape_and_no_other(llama_plan, tiny_llama):
    llama_plan.check_fits(build("llama", seed=5))
    for other in (build("phi3"), tiny_llama(num_layers=3), tiny_llama(hidden_size=64)):
        with pytest.raises(PlanError, match=r"this plan was made for LlamaForCausalLM .*Make a plan for this model"):
            llama_plan.check_fits(other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"not a plan", r"is not JSON \(line 1\)"),
        (b"{}", "not a plan"),
        (b"[]", "not a plan"),
        (b"null", "not a plan"),
        (b'"text"', "not a plan"),
        (b"\xff\xfe", "plan"),
    ],
)
def test_a_file_that_is_no_plan_is_a_plan_error(tmp_path, content, message):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_file_that_cannot_be_read_is_a_plan_error(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(PlanError, match="cannot read the plan"):
            Plan.load(path)
