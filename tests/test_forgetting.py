"""What was forgotten, item by item: the definitions, the gaps, the verdicts, and no alarm where nothing differs."""

import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from aletheia_lora.errors import DataError
from aletheia_lora.evaluation.forgetting import forgetting_report
from aletheia_lora.evaluation.items import ItemResult
from forgetting_items import ABOUT, GROUPS, answer, answers_to, sha, study

LABELS = ("base", "uniform", "selected")


def report(results: list[ItemResult], **more: Any) -> dict[str, Any]:
    return forgetting_report(results, **{"margin": 2.0, "loss_margin": 0.02, "groups": GROUPS, **more})


def entry(record: dict[str, Any], task: str, label: str) -> dict[str, Any]:
    found = next(one for one in record["tasks"] if one["task"] == task)
    return next(one for one in found["arms"] if one["label"] == label)


def plain(base: list[float], uniform: list[float], selected: list[float], task: str = "gsm8k") -> list[ItemResult]:
    scores = dict(zip(LABELS, (base, uniform, selected), strict=True))
    return [item for label in LABELS for item in answers_to(label, task, scores[label])]


# --- definitions ------------------------------------------------------------------------------------------------------


def test_forgetting_is_base_minus_tuned_and_extra_is_selected_minus_uniform() -> None:
    record = report(plain([1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 1]))
    assert [entry(record, "gsm8k", label)["score"] for label in LABELS] == pytest.approx([80, 60, 40])
    assert entry(record, "gsm8k", "uniform")["forgetting"]["mean"] == pytest.approx(20)
    assert entry(record, "gsm8k", "selected")["forgetting"]["mean"] == pytest.approx(40)
    extra = entry(record, "gsm8k", "selected")["extra"]
    assert extra["mean"] == pytest.approx(20)
    assert (extra["n"], extra["num_worse"], extra["num_better"]) == (5, 2, 1)
    assert (extra["test"], extra["p_value"]) == ("McNemar, exact", stats.binomtest(2, 3).pvalue)
    assert entry(record, "gsm8k", "base")["forgetting"] is None
    assert entry(record, "gsm8k", "uniform")["extra"] is None


def test_items_of_a_benchmark_are_grouped_by_its_parts() -> None:
    record = report(study(texts=0))
    task = record["tasks"][0]
    assert (task["task"], task["n"], task["num_groups"]) == ("mmlu", 1140, 57)
    assert entry(record, "mmlu", "selected")["extra"]["test"] == "t, clustered"
    assert record["tasks"][1]["num_groups"] is None


def test_forgetting_of_plain_text_is_the_difference_of_losses_per_token() -> None:
    results = study(subjects=0, sizes=())
    found = entry(report(results), "wikitext", "selected")
    nats = {label: sum(one.scores["loglikelihood"] for one in results if one.label == label) for label in LABELS}
    tokens = sum(one.num_response_tokens for one in results if one.label == "base")
    loss = {label: -total / tokens for label, total in nats.items()}
    assert found["score"] == pytest.approx(loss["selected"], rel=1e-12)
    assert found["forgetting"]["mean"] == pytest.approx(loss["selected"] - loss["base"], rel=1e-9)
    assert found["extra"]["mean"] == pytest.approx(loss["selected"] - loss["uniform"], rel=1e-9)
    assert found["extra"]["equivalence"]["margin"] == 0.02


def test_scores_between_0_and_1_take_the_t_test() -> None:
    rng = np.random.default_rng(0)
    base, uniform, selected = rng.uniform(size=(3, 40))
    extra = entry(report(plain(list(base), list(uniform), list(selected))), "gsm8k", "selected")["extra"]
    assert extra["p_value"] == pytest.approx(stats.ttest_rel(uniform, selected).pvalue, rel=1e-9)
    assert extra["mean"] == pytest.approx(100 * (uniform - selected).mean(), rel=1e-9)


def test_noise_is_what_a_second_evaluation_changed() -> None:
    results = plain([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0])
    results += answers_to("selected_again", "gsm8k", [1, 0, 1])
    noise = report(results, repeat="selected_again")["tasks"][0]["noise"]
    assert (noise["label"], noise["n"], noise["num_worse"], noise["num_better"]) == ("selected", 3, 1, 1)
    assert (noise["mean"], noise["num_responses_changed"]) == (0.0, 2)
    assert report(results[:12])["tasks"][0]["noise"] is None


def test_the_record_is_plain_json_and_does_not_depend_on_the_order_of_results() -> None:
    results = study(subjects=4, repeat=True)
    record = report(results, repeat="selected_again", about=ABOUT)
    shuffled = [results[index] for index in np.random.default_rng(0).permutation(len(results))]
    other = report(shuffled, repeat="selected_again", about=ABOUT)
    assert json.loads(json.dumps(record, allow_nan=False))["model"] == ABOUT["model"]
    for task in record["tasks"]:
        found, again = (entry(one, task["task"], "selected")["extra"] for one in (record, other))
        assert again["mean"] == pytest.approx(found["mean"], abs=1e-9)
        assert again["low"] == pytest.approx(found["low"], abs=1e-9)
        assert again["adjusted_p_value"] == pytest.approx(found["adjusted_p_value"], abs=1e-9)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_verdicts_say_equal_more_less_and_undecided() -> None:
    rng = np.random.default_rng(1)
    base = np.ones(800)
    worse = (rng.uniform(size=800) > 0.10).astype(float)
    results = [
        *plain(list(base), list(base), list(base), "same"),
        *plain(list(base), list(base), list(worse), "worse"),
        *plain(list(base), list(worse), list(base), "better"),
        *plain(list(base[:30]), list(base[:30]), list(base[:30]), "few"),
    ]
    record = report(results)
    verdicts = {task["task"]: entry(record, task["task"], "selected")["extra"]["verdict"] for task in record["tasks"]}
    assert verdicts == {"same": "equivalent", "worse": "more", "better": "less", "few": "undecided"}


def test_p_values_are_corrected_for_the_number_of_benchmarks() -> None:
    record = report(study(seed=3, extra_loss=0.05))
    extras = [entry(record, task["task"], "selected")["extra"] for task in record["tasks"]]
    assert min(extra["p_value"] for extra in extras) * len(extras) == pytest.approx(
        min(extra["adjusted_p_value"] for extra in extras)
    )
    assert all(extra["adjusted_p_value"] >= extra["p_value"] for extra in extras)


def test_the_same_adapter_twice_raises_an_alarm_in_at_most_5_of_100_studies() -> None:
    """Two evaluations that differ by noise alone, on two benchmarks; an alarm is any verdict of more or less."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(120):
        results = []
        for task, size in (("a", 40), ("b", 30)):
            ability = rng.uniform(size=size)
            for label in LABELS:
                results += answers_to(label, task, (rng.uniform(size=size) < ability).astype(float))
        record = report(results)
        verdicts = [entry(record, task, "selected")["extra"]["verdict"] for task in ("a", "b")]
        alarms += bool({"more", "less"} & set(verdicts))
    assert alarms <= 0.05 * 120


def test_the_committed_simulation_keeps_its_rule_and_draws_the_same_studies_again() -> None:
    folder = Path(__file__).resolve().parents[1] / "benchmarks" / "false_alarms"
    module = runpy.run_path(str(folder / "run.py"))
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    shares = {(one["kind"], one["statement"]): one["count"] / one["n"] for one in records}
    slack = 2 * (0.05 * 0.95 / records[0]["n"]) ** 0.5
    assert shares["one adapter twice", "alarm"] <= 0.05 + slack
    assert all(shares["at the margin", f"equal, {task}"] <= 0.05 + slack for task in ("mmlu", "gsm8k", "humaneval"))
    told: list[str] = []
    first, again = (module["simulate"](5, 0, told.append) for _ in range(2))
    assert first == again
    assert told[0] == "one adapter twice: 5 studies"
    assert {(one["kind"], one["statement"]) for one in first} == set(shares)
    assert module["table"](records).count("\n") == len(records) + 1


# --- gaps and refusals ------------------------------------------------------------------------------------------------


def without(results: list[ItemResult], label: str, task: str, count: int | None = None) -> list[ItemResult]:
    lost = [item for item in results if (item.label, item.task) == (label, task)][:count]
    return [item for item in results if item not in lost]


def test_a_missing_item_is_refused_or_left_out_of_every_label_and_counted() -> None:
    results = without(study(texts=0), "uniform", "humaneval", 3)
    with pytest.raises(DataError, match=r"uniform has not answered 3 of 100 items of humaneval, such as .* / 0000"):
        report(results)
    record = report(results, missing="leave_out")
    assert [entry(record, "humaneval", label)["n"] for label in LABELS] == [97, 97, 97]
    assert [entry(record, "humaneval", label)["num_left_out"] for label in LABELS] == [3, 0, 3]
    assert entry(record, "humaneval", "selected")["extra"]["n"] == 97


def test_a_benchmark_that_one_label_has_not_answered_is_a_gap() -> None:
    record = report(without(study(texts=0), "selected", "humaneval"))
    gap = entry(record, "humaneval", "selected")
    assert (gap["n"], gap["forgetting"], gap["extra"]) == (0, None, None)
    assert entry(record, "humaneval", "uniform")["forgetting"]["n"] == 100
    assert "verdict" in entry(record, "gsm8k", "selected")["extra"]


def test_one_item_has_a_difference_and_no_interval() -> None:
    extra = entry(report(plain([1], [1], [0])), "gsm8k", "selected")["extra"]
    assert (extra["mean"], extra["n"]) == (100.0, 1)
    assert extra["low"] is extra["p_value"] is extra["equivalence"] is None


def test_cut_answers_are_counted() -> None:
    results = plain([1, 1], [1, 1], [1, 0])
    results[-1] = replace(results[-1], stop_reason="length")
    results[0] = replace(results[0], prompt_truncated=True)
    record = report(results)
    assert entry(record, "gsm8k", "selected")["num_answers_cut"] == 1
    assert entry(record, "gsm8k", "base")["num_prompts_cut"] == 1


SMALL = plain([1, 1], [1, 0], [1, 1])


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (lambda items: [*items, items[0]], {}, "base answers item 0000 of gsm8k twice"),
        (lambda items: [], {}, "no results of base, uniform, selected; there are none"),
        (lambda items: items[:4], {}, "no results of selected; there are base, uniform"),
        (lambda items: items, {"repeat": "again"}, "no results of again"),
        (lambda items: items, {"selected": "uniform"}, "each must be another one"),
        (
            lambda items: [*items[:-1], replace(items[-1], prompt_sha256=sha("other"))],
            {},
            r"1 prompts differ between labels.*item 0001 of gsm8k \(base against selected\)",
        ),
        (lambda items: [*items[:-1], replace(items[-1], adapter_digest=sha("x"))], {}, "answers of 2 adapters"),
        (lambda items: [replace(item, adapter_digest=sha("x")) for item in items], {}, "base was evaluated with an"),
        (
            lambda items: [replace(item, adapter_digest=item.adapter_digest and sha("x")) for item in items],
            {},
            "selected and uniform are the same adapter",
        ),
        (lambda items: [*items, answer("other", "gsm8k", "0000")], {"repeat": "other"}, "other repeats none of base"),
        (
            lambda items: [replace(item, scores={"acc": 1.0, "acc_norm": 0.0}) for item in items],
            {},
            r"scores acc, acc_norm. Name one: metrics=\{'gsm8k'",
        ),
        (lambda items: items, {"metrics": {"gsm8k": "f1"}}, "the scores exact_match, not f1"),
        (lambda items: [replace(items[0], scores={"acc": 1.0}), *items[1:]], {}, "Name one"),
        (lambda items: [replace(item, scores={"bleu": 37.2}) for item in items], {}, "points need 0 to 1"),
        (
            lambda items: [replace(item, scores={"loglikelihood": -9.0}) for item in items],
            {"loss_margin": None},
            "give loss_margin",
        ),
        (
            lambda items: [
                replace(item, scores={"loglikelihood": -9.0}, num_response_tokens=len(item.label)) for item in items
            ],
            {},
            "other numbers of tokens under uniform",
        ),
        (lambda items: items, {"missing": "ignore"}, "missing='ignore', expected one of refuse, leave_out"),
        (lambda items: items, {"margin": 0.0}, "margin=0.0"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    change: Callable[[list[ItemResult]], list[ItemResult]], more: dict[str, Any], words: str
) -> None:
    report(SMALL)
    with pytest.raises(ValueError, match=words):
        report(change(list(SMALL)), **more)
