import copy
import importlib
import json
import math
import random
import warnings
from dataclasses import replace
from statistics import median

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import aletheia_lora
from aletheia_lora.adapter import shared_copy
from aletheia_lora.comparison import CompareOptions, compare, runs, watch
from aletheia_lora.comparison.arms import CONTROLS, planned_arms, uniform_plan
from aletheia_lora.comparison.record import summarize
from aletheia_lora.comparison.watch import is_over, progress
from aletheia_lora.data import collate, split, tokenize
from aletheia_lora.errors import ConfigError, DataError, NonFiniteLossError, PlanError
from aletheia_lora.files import json_text
from aletheia_lora.loss import heldout_loss
from aletheia_lora.planning import plan
from aletheia_lora.report.tables import check_record
from families import build
from tiny_inputs import word_rows, word_tokenizer

STEPS = 6
OPTIONS = CompareOptions(
    steps=STEPS,
    batch_size=4,
    learning_rate=1e-2,
    timed_steps=3,
    evaluations=3,
    controls=("random", "last"),
    matched_time=False,
    seed=5,
)
ROOM = importlib.import_module("aletheia_lora.comparison.compare")  # by name: the function hides the file


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def parts(tokenizer):
    return split(tokenize(word_rows(32), tokenizer), seed=0, probe=4, validation=6)


@pytest.fixture(scope="module")
def made(parts):
    return plan(build("llama"), parts.probe, probe_batches=4, rank=4, strategy="last", num_layers=2)


def compared(made, parts, tokenizer, model=None, **changes):
    model = build("llama") if model is None else model
    return compare(model, tokenizer, made, parts.train, parts.validation, replace(OPTIONS, **changes))


@pytest.fixture(scope="module")
def record(made, parts, tokenizer):
    return compared(made, parts, tokenizer)


def by_name(record):
    return {arm["name"]: arm for arm in record["arms"]}


# --- what is run ------------------------------------------------------------------------------------------------


def test_every_arm_is_there_with_its_role_and_trainer(record):
    assert [(arm["name"], arm["role"], arm["trainer"], arm["full"], arm["steps"]) for arm in record["arms"]] == [
        ("uniform", "uniform", "trainer", True, 6),
        ("uniform_trl", "uniform", "trl_as_shipped", False, 3),
        ("uniform_trl_fast", "uniform", "trl_fast", False, 3),
        ("uniform_aletheia", "uniform", "aletheia", True, 6),
        ("selected", "selected", "aletheia", True, 6),
        ("random", "control", "aletheia", True, 6),
        ("last", "control", "aletheia", True, 6),
    ]
    for arm in record["arms"]:
        assert arm["failed"] is None
        assert len(arm["train_losses"]) == len(arm["step_seconds"]) == arm["steps"]
        assert all(seconds > 0 for seconds in arm["step_seconds"])
        assert (arm["final_heldout_loss"] is not None) is arm["full"]


def test_uniform_arms_adapt_every_layer_and_controls_as_many_as_the_selection(record, made):
    for arm in record["arms"]:
        count = 4 if arm["role"] == "uniform" else 2
        assert len(set(arm["layers"])) == len(arm["layers"]) == count
    arms = by_name(record)
    assert arms["selected"]["layers"] == arms["last"]["layers"] == [2, 3]
    assert arms["selected"]["trainable_params"] == made.trainable_params
    assert arms["last"]["trainable_params"] == made.trainable_params
    assert arms["uniform"]["ranks"] == [4]


def test_all_uniform_arms_start_from_the_same_loss(record):
    arms = by_name(record)
    first = arms["uniform"]["first_loss"]
    for name in ("uniform_trl_fast", "uniform_aletheia", "selected", "random", "last"):
        assert arms[name]["first_loss"] == pytest.approx(first, abs=1e-5), name  # float32; adapters start at zero
    assert arms["uniform_trl"]["first_loss"] == pytest.approx(first, abs=5e-2)  # bfloat16 by TRL's own default


def test_uniform_arms_of_one_precision_take_the_same_course(made, parts, tokenizer):
    arms = by_name(compared(made, parts, tokenizer, timed_steps=STEPS, controls=()))
    for name in ("uniform_trl_fast", "uniform_aletheia"):
        assert arms[name]["train_losses"] == pytest.approx(arms["uniform"]["train_losses"], abs=2e-5), name  # float32
    selected = arms["selected"]["train_losses"]
    assert selected != pytest.approx(arms["uniform"]["train_losses"], abs=1e-4)
    assert selected[-1] < selected[0]


def test_our_trainer_alone_is_trained_in_full_and_loses_nothing(record):
    arms = by_name(record)
    ours, plain = arms["uniform_aletheia"], arms["uniform"]
    assert ours["steps"] == len(ours["step_seconds"]) == STEPS and ours["full"]
    assert ours["final_heldout_loss"] == pytest.approx(plain["final_heldout_loss"], abs=1e-4)


def test_where_backward_stops_is_measured(record):
    lowest = {name: arm["lowest_backward_layer"] for name, arm in by_name(record).items()}
    assert all(lowest[name] == 0 for name in ("uniform", "uniform_trl", "uniform_trl_fast", "uniform_aletheia"))
    assert lowest["selected"] == lowest["last"] == 2
    assert lowest["random"] == by_name(record)["random"]["layers"][0]


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"),
    [(6, 3, [2, 4, 6]), (5, 2, [3, 5]), (4, 1, [4]), (2, 4, [1, 2]), (7, 4, [2, 4, 6, 7]), (10, 4, [3, 5, 8, 10])],
)
def test_heldout_loss_is_measured_along_the_run_and_at_its_end(
    monkeypatch, made, parts, tokenizer, steps, evaluations, expected
):
    monkeypatch.setattr(ROOM, "planned_arms", lambda *args: [arm for arm in planned_arms(*args) if arm.full])
    arms = by_name(compared(made, parts, tokenizer, steps=steps, evaluations=evaluations, controls=()))
    for arm in arms.values():
        entries = arm["heldout"]
        assert [entry["step"] for entry in entries] == expected  # never more than asked for
        assert [entry["seconds"] for entry in entries] == sorted(entry["seconds"] for entry in entries)
        assert arm["final_heldout_loss"] == entries[-1]["loss"]


def test_a_run_that_is_there_for_its_time_is_not_evaluated(record):
    for arm in record["arms"]:
        assert [entry["step"] for entry in arm["heldout"]] == ([2, 4, 6] if arm["full"] else [])


def test_the_loss_before_training_is_that_of_the_bare_model(record, parts):
    batches = [collate([row], 0) for row in parts.validation]
    assert record["base_heldout_loss"] == pytest.approx(heldout_loss(build("llama"), batches), rel=1e-5)  # float32
    assert by_name(record)["selected"]["final_heldout_loss"] < record["base_heldout_loss"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_and_another_seed_others(record, made, parts, tokenizer):
    again, other = compared(made, parts, tokenizer), compared(made, parts, tokenizer, seed=6)
    for arm, same in zip(record["arms"], again["arms"], strict=True):
        assert same["train_losses"] == arm["train_losses"]
        assert [entry["loss"] for entry in same["heldout"]] == [entry["loss"] for entry in arm["heldout"]]
    assert by_name(other)["selected"]["train_losses"] != by_name(record)["selected"]["train_losses"]


# --- what is left behind ----------------------------------------------------------------------------------------


def random_states():
    numpy_state = np.random.get_state()
    return {"torch": torch.get_rng_state().tolist(), "numpy": numpy_state[1].tolist(), "python": random.getstate()}


def assert_as_found(model, before):
    flags = {name: parameter.requires_grad for name, parameter in before.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert model.state_dict().keys() == before.state_dict().keys()
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_modules())
    assert not hasattr(model, "peft_config")
    for module, old in zip(model.modules(), before.modules(), strict=True):
        assert type(module) is type(old) and module.training is old.training
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        assert getattr(module, "gradient_checkpointing", None) == getattr(old, "gradient_checkpointing", None)
    assert model.config.to_dict() == before.config.to_dict()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_exactly_as_found(made, parts, tokenizer, training):
    model = build("llama").train(training)
    model.model.layers[1].requires_grad_(False)  # a mixed pattern
    before = copy.deepcopy(model)
    compared(made, parts, tokenizer, model, steps=2, timed_steps=1, matched_time=True)
    assert_as_found(model, before)


def test_the_random_numbers_of_the_caller_do_not_move(made, parts, tokenizer):
    random.seed(11), np.random.seed(12), torch.manual_seed(13)  # what no run before can have left behind
    before = random_states()
    compared(made, parts, tokenizer, steps=2, timed_steps=1, controls=())
    after = random_states()
    assert [name for name in before if after[name] != before[name]] == []


def test_the_warning_filters_of_the_caller_do_not_move(made, parts, tokenizer):
    filters = list(warnings.filters)
    compared(made, parts, tokenizer, steps=2, timed_steps=1, controls=())
    assert list(warnings.filters) == filters


def test_a_shared_copy_has_modules_of_its_own_over_the_same_memory():
    model = build("llama")
    model.model.layers[0].requires_grad_(False)
    before = copy.deepcopy(model)
    twin = shared_copy(model)
    pairs = list(zip(model.named_parameters(), twin.named_parameters(), strict=True))
    assert all(left_name == right_name for (left_name, _), (right_name, _) in pairs)
    assert all(left.data_ptr() == right.data_ptr() for (_, left), (_, right) in pairs)
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
    assert twin.config is not model.config
    twin.model.layers[1].register_forward_hook(lambda *_: None)
    twin.model.layers[2].mlp = torch.nn.Identity()
    assert_as_found(model, before)


def test_a_shared_copy_keeps_tied_weights_tied(tiny_llama):
    twin = shared_copy(tiny_llama(tie_word_embeddings=True))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


# --- arms that fail or are refused ------------------------------------------------------------------------------


def failing(monkeypatch, name, when):
    """Let the arm of this name fail: before it has a trainer, or in its second step."""
    make = runs.make_trainer

    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise RuntimeError("out of luck")

    def trainer(arm, *args):
        if arm.name == name and when == "before":
            raise RuntimeError("out of luck")
        made = make(arm, *args)
        if arm.name == name:
            made.add_callback(Broken())
        return made

    monkeypatch.setattr(runs, "make_trainer", trainer)


@pytest.mark.parametrize("when", ["before", "within"])
@pytest.mark.parametrize("name", ["random", "uniform_trl"])
def test_an_arm_that_fails_is_marked_and_does_not_stop_the_rest(
    monkeypatch, record, made, parts, tokenizer, name, when
):
    failing(monkeypatch, name, when)
    model = build("llama")
    before = copy.deepcopy(model)
    found = compared(made, parts, tokenizer, model)
    for arm, undisturbed in zip(found["arms"], record["arms"], strict=True):
        if arm["name"] == name:
            assert arm["failed"] == "RuntimeError: out of luck"
            assert arm["final_heldout_loss"] is None
        else:
            assert arm["failed"] is None
            assert arm["train_losses"] == undisturbed["train_losses"]
    assert found["summary"]["fastest_uniform"] != name
    check_record(found)
    assert json.loads(json_text(found))["arms"]
    assert_as_found(model, before)


@pytest.mark.parametrize("name", ["uniform", "selected"])
def test_without_the_two_arms_that_matter_there_is_no_comparison(monkeypatch, made, parts, tokenizer, name):
    failing(monkeypatch, name, "within")
    model = build("llama")
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        compared(made, parts, tokenizer, model, controls=())
    assert_as_found(model, before)


def test_a_learning_rate_that_breaks_the_selection_is_named(made, parts, tokenizer):
    with pytest.raises(NonFiniteLossError, match="training stopped before the update"):
        compared(made, parts, tokenizer, learning_rate=1e36, uniform_learning_rate=1e-2, controls=(), steps=8)


@pytest.mark.parametrize("at_call", [1, 2, 4])
def test_an_interruption_leaves_the_model_as_found(monkeypatch, made, parts, tokenizer, at_call):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == at_call:  # the first is of the bare model, the others are within runs
            raise KeyboardInterrupt
        return heldout_loss(*args)

    model = build("llama")
    before = copy.deepcopy(model)
    monkeypatch.setattr(ROOM, "heldout_loss", interrupted)
    monkeypatch.setattr(watch, "heldout_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compared(made, parts, tokenizer, model)
    assert_as_found(model, before)


def test_fewer_rows_than_a_batch_are_an_error(made, parts, tokenizer):
    with pytest.raises(DataError, match="3 training rows are fewer than a batch of 4"):
        compare(build("llama"), tokenizer, made, parts.train[:3], parts.validation, OPTIONS)
    with pytest.raises(DataError, match="0 rows"):
        compare(build("llama"), tokenizer, made, parts.train, parts.validation[:0], OPTIONS)


def test_a_plan_for_another_model_is_refused(made, parts, tokenizer):
    with pytest.raises(PlanError, match="this plan was made for LlamaForCausalLM"):
        compare(build("phi3"), tokenizer, made, parts.train, parts.validation, OPTIONS)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"timed_steps": -1}, "timed_steps=-1"),
        ({"evaluations": 0}, "evaluations=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
        ({"uniform_learning_rate": -1.0}, "uniform_learning_rate=-1.0"),
        ({"controls": ("botom",)}, "control 'botom' is not known. Did you mean 'bottom'"),
        ({"controls": ("all",)}, "control 'all' is not known"),
    ],
)
def test_options_that_cannot_be_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        CompareOptions(**kwargs)


@pytest.mark.parametrize("control", CONTROLS)
def test_every_control_can_be_an_arm(made, control):
    arm = planned_arms(made, replace(OPTIONS, controls=(control,)))[-1]
    assert (arm.name, arm.role, len(arm.plan.selection.layers)) == (control, "control", 2)
    assert {entry.layer_idx for entry in arm.plan.ranks} == set(arm.plan.selection.layers)
    assert (arm.probe_seconds > 0) is (control in ("top_percent", "bottom"))  # these need the probe


def test_uniform_adapts_every_layer_with_the_plain_rank_and_the_plans_targets(parts):
    made = plan(build("llama"), parts.probe, probe_batches=1, rank=4, time_budget=0.9, targets=("q_proj",))
    uniform = uniform_plan(made)
    assert uniform.selection.layers == (0, 1, 2, 3)
    assert [(entry.name.rpartition(".")[2], entry.rank) for entry in uniform.ranks] == [("q_proj", 4)] * 4


# --- time -------------------------------------------------------------------------------------------------------


def test_the_time_matched_run_is_over_when_one_more_step_would_take_it_past_uniforms_time(made):
    arms = {arm.name: arm for arm in planned_arms(made, replace(OPTIONS, matched_time=True))}
    uniform, matched = arms["uniform"], arms["selected_time_matched"]
    matched.probe_seconds = 3.0
    uniform.step_seconds = [5.0, 2.0, 2.0]  # 9 of 18 s: 2 s are the probe's, so 6 steps
    matched.step_seconds = [1.0] * 6
    assert progress(matched) == pytest.approx(9 / 18)
    assert not is_over(matched)  # uniform has not ended
    uniform.step_seconds += [2.0] * 3
    uniform.ended = True
    matched.step_seconds = [1.0] * 11
    assert not is_over(matched)
    matched.step_seconds = [1.0] * 12
    assert is_over(matched) and progress(matched) == 1


def test_the_time_matched_run_keeps_pace_with_uniform_and_decays_by_the_clock(made, parts, tokenizer):
    made = replace(made, probe=replace(made.probe, seconds=0.0))
    arms = by_name(found := compared(made, parts, tokenizer, controls=(), steps=10, matched_time=True))
    matched, selected, uniform = arms["selected_time_matched"], arms["selected"], arms["uniform"]
    assert matched["steps"] == len(matched["step_seconds"]) == len(matched["train_losses"])
    slowest = max(matched["step_seconds"])
    assert uniform["total_seconds"] - 2 * slowest < matched["total_seconds"] < uniform["total_seconds"] + slowest
    assert matched["layers"] == selected["layers"] and matched["role"] == "selected" and matched["full"]
    assert matched["first_loss"] == selected["first_loss"]
    assert matched["heldout"][-1]["step"] == matched["steps"]
    assert found["summary"]["time_matched_steps"] == matched["steps"]
    assert found["summary"]["time_matched_heldout_loss"] == matched["final_heldout_loss"]
    all_layers = arms["uniform_aletheia_time_matched"]
    assert all_layers["layers"] == uniform["layers"] and all_layers["trainer"] == matched["trainer"] == "aletheia"
    assert abs(all_layers["total_seconds"] - uniform["total_seconds"]) < 2 * max(all_layers["step_seconds"])
    assert found["summary"]["time_matched_uniform_steps"] == all_layers["steps"]
    assert found["summary"]["time_matched_uniform_heldout_loss"] == all_layers["final_heldout_loss"]
    check_record(found)


def test_time_matched_arms_are_left_out_on_request(record):
    assert not any(name.endswith("time_matched") for name in by_name(record))
    assert record["summary"]["time_matched_steps"] is record["summary"]["time_matched_uniform_steps"] is None


def test_a_time_matched_run_that_failed_has_no_end_and_is_never_the_fastest_uniform_one(made):
    arms = planned_arms(made, replace(OPTIONS, matched_time=True, controls=()))
    for arm in arms:
        arm.step_seconds = [1.0, 0.1 if arm.pace else 1.0]
        arm.heldout = [{"step": 2, "seconds": 2.0, "loss": 1.0}]
    arms[-1].failed = "out of memory"
    summary = summarize(arms, made)
    assert summary["time_matched_heldout_loss"] is summary["time_matched_steps"] is None
    assert (summary["time_matched_uniform_heldout_loss"], summary["time_matched_uniform_steps"]) == (1.0, 2)
    assert not summary["fastest_uniform"].endswith("time_matched")


# --- the record -------------------------------------------------------------------------------------------------


def test_the_record_is_json_and_passes_the_reports_own_check(record):
    read = json.loads(json_text(record))
    check_record(read)
    assert read["format"] == "aletheia-compare/1"
    assert read["settings"]["controls"] == "random, last"
    assert read["settings"]["train_rows"] == 22 and read["settings"]["heldout_rows"] == 6
    assert read["selection"]["layers"] == [2, 3] and read["selection"]["lowest"] == 2
    assert set(read["environment"]) >= {"python", "torch", "transformers", "peft", "trl", "accelerate", "device"}


def test_ratios_follow_from_the_seconds_of_the_steps(record, made):
    arms, per_step = by_name(record), {}
    own = arms["selected"]["step_seconds"]
    for name, arm in arms.items():
        assert arm["median_step_seconds"] == pytest.approx(median(arm["step_seconds"][1:]))
        assert arm["step_seconds_p20"] <= arm["median_step_seconds"] <= arm["step_seconds_p80"]
        shared = slice(1, arm["steps"])  # the steps that the selection took on the same rows
        per_step[name] = median(arm["step_seconds"][shared]) / median(own[shared]) * median(own[1:])
    summary, probe_seconds = record["summary"], made.probe.seconds
    fastest = min((name for name in arms if arms[name]["role"] == "uniform"), key=per_step.__getitem__)
    selected = STEPS * per_step["selected"] + probe_seconds
    expected = {
        "speedup_ratio": STEPS * per_step["uniform"] / selected,
        "selection_ratio": STEPS * per_step[fastest] / selected,
        "step_speedup_ratio": per_step["uniform"] / per_step["selected"],
        "step_selection_ratio": per_step[fastest] / per_step["selected"],
        "trainer_ratio": per_step["uniform"] / per_step["uniform_aletheia"],
        "uniform_seconds": sum(arms["uniform"]["step_seconds"]),
        "selected_seconds": sum(arms["selected"]["step_seconds"]) + probe_seconds,
        "probe_seconds": probe_seconds,
        "probe_share": probe_seconds / sum(arms["selected"]["step_seconds"]),
        "uniform_heldout_loss": arms["uniform"]["heldout"][-1]["loss"],
        "selected_heldout_loss": arms["selected"]["heldout"][-1]["loss"],
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert summary["fastest_uniform"] == fastest


def test_the_first_step_warms_up_and_counts_in_totals_only(made):
    arms = [arm for arm in planned_arms(made, OPTIONS) if arm.role != "control"]
    for arm, seconds in zip(arms, (2.0, 4.0, 1.5, 1.0, 0.5), strict=True):
        arm.step_seconds = [100.0, *[seconds] * (arm.steps - 1)]
        arm.heldout = [{"step": arm.steps, "seconds": 1.0, "loss": 1.0}]
        arm.probe_seconds = 1.0 if arm.name == "selected" else 0.0
    summary = summarize(arms, made)
    assert summary["step_speedup_ratio"] == 4.0
    assert summary["speedup_ratio"] == 12.0 / (3.0 + 1.0)
    assert (summary["fastest_uniform"], summary["step_selection_ratio"]) == ("uniform_aletheia", 2.0)
    assert summary["selection_ratio"] == 6.0 / (3.0 + 1.0)
    assert summary["trainer_ratio"] == 2.0
    assert summary["uniform_seconds"] == 110.0


def test_a_run_of_fewer_steps_is_compared_over_the_steps_that_both_took(made):
    arms = [arm for arm in planned_arms(made, OPTIONS) if arm.role != "control"]
    for arm in arms:  # later rows are longer
        arm.step_seconds = [100.0, 2.0, 2.0, 8.0, 8.0, 8.0][: arm.steps]
        arm.heldout = [{"step": arm.steps, "seconds": 1.0, "loss": 1.0}]
    arms[3].step_seconds = [100.0, 1.0, 1.0]
    assert (arms[3].name, arms[4].name) == ("uniform_aletheia", "selected")
    arms[4].step_seconds = [100.0, 0.5, 0.5, 0.4, 0.4, 0.4]
    summary = summarize(arms, made)
    assert summary["trainer_ratio"] == 2.0
    assert summary["step_speedup_ratio"] == 20.0
    assert summary["step_selection_ratio"] == 2.0  # not 20 / 2


def test_the_probes_time_is_part_of_the_selections(record, made):
    selected = by_name(record)["selected"]
    assert selected["total_seconds"] == pytest.approx(sum(selected["step_seconds"]) + made.probe.seconds)
    assert selected["heldout"][0]["seconds"] > made.probe.seconds
    assert by_name(record)["last"]["total_seconds"] == pytest.approx(sum(by_name(record)["last"]["step_seconds"]))


def test_the_front_door_leads_here():
    assert aletheia_lora.compare is compare and aletheia_lora.CompareOptions is CompareOptions
