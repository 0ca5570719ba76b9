"""What is said of the benchmarks that a campaign's adapters were asked."""

import numpy as np
import pytest

from aletheia_lora.campaign.analysis import reason
from aletheia_lora.campaign.outcomes import outcomes
from aletheia_lora.campaign.report import tables
from aletheia_lora.statistics import paired_difference
from campaign_results import benchmark, campaign, evaluated, result, spec
from test_campaign_analysis import find, losses


def test_benchmarks_are_compared_in_points_run_by_run(tmp_path, monkeypatch):
    made = spec("uniform", "paper", seeds=[0, 1, 2, 3])
    campaign(tmp_path, made, losses({}))
    values = {"uniform": [0.50, 0.52, 0.49, 0.51], "paper": [0.48, 0.52, 0.50, 0.47]}
    evaluated(
        tmp_path,
        made,
        lambda content: {"quiz": benchmark(values[content["method"]["name"]][content["seed"]], 0.55)},
        monkeypatch,
    )
    found = tables(tmp_path)
    row = find(found["comparisons"], measure="quiz")
    wanted = paired_difference(np.multiply(values["paper"], 100), np.multiply(values["uniform"], 100))
    assert (row["unit"], row["n"], row["basis"], row["higher_is_better"]) == ("points", 4, "pairs", True)
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((-1.25, wanted.interval.low, wanted.interval.high))
    delta = find(found["deltas"], measure="quiz", method="uniform")
    assert delta["mean"] == pytest.approx(100 * (np.mean(values["uniform"]) - 0.55))


def test_one_run_has_its_interval_over_items(tmp_path, monkeypatch):
    made = spec("uniform", "paper", seeds=[0])
    campaign(tmp_path, made, losses({}))
    rng = np.random.default_rng(1)
    base, uniform, paper = ({str(item): float(right) for item, right in enumerate(rng.random(60) < 0.5)} for _ in "bup")
    text = {"a": 2.0, "b": 3.0}

    def outcome(content):
        items = paper if content["method"]["name"] == "paper" else uniform
        weighted = benchmark(2.9, 2.4, {"a": 2.5, "b": 3.1}, text, unit="nats per token")
        return {"quiz": benchmark(np.mean([*items.values()]), np.mean([*base.values()]), items, base), "text": weighted}

    evaluated(tmp_path, made, outcome, monkeypatch)
    found = tables(tmp_path)
    row, delta = find(found["comparisons"], measure="quiz"), find(found["deltas"], measure="quiz", method="paper")
    for one, other in ((row, uniform), (delta, base)):
        wanted = paired_difference([*paper.values()], [*other.values()], binary=True)
        assert (one["basis"], one["n"]) == ("items", 1)
        assert one["mean"] == pytest.approx(100 * wanted.mean)
        assert (one["low"], one["high"]) == pytest.approx((100 * wanted.interval.low, 100 * wanted.interval.high))
    unlike = find(found["deltas"], measure="text", method="paper")
    assert unlike["mean"] == pytest.approx(0.5) and unlike["low"] is None  # its items give another number


def test_items_of_text_weigh_by_their_tokens_and_those_of_several_leaves_are_groups(tmp_path, monkeypatch):
    made = spec("uniform", seeds=[0], margins={"heldout_loss": 0.01, "other_loss": None, "quiz": 5.0})
    campaign(tmp_path, made, losses({}))
    rng = np.random.default_rng(2)
    names = [f"leaf_{index % 4}/{index}" for index in range(40)]
    before, after = (dict(zip(names, 100.0 * (rng.random(40) < 0.6), strict=True)) for _ in "ba")
    texts, losses_before, losses_after = "abc", [2.0, 3.0, 4.0], [2.1, 3.3, 4.2]
    weights = [10.0, 20.0, 70.0]
    text = benchmark(
        np.average(losses_after, weights=weights),
        np.average(losses_before, weights=weights),
        dict(zip(texts, losses_after, strict=True)),
        dict(zip(texts, losses_before, strict=True)),
        unit="nats per token",
    )
    text["weights"] = dict(zip(texts, weights, strict=True))
    quiz = benchmark(np.mean([*after.values()]), np.mean([*before.values()]), after, before)
    evaluated(tmp_path, made, lambda content: {"quiz": quiz, "text": text}, monkeypatch)
    rows = tables(tmp_path)["deltas"]
    wanted = paired_difference(losses_after, losses_before, weights=weights)
    row = find(rows, measure="text")
    assert (row["mean"], row["low"], row["high"]) == pytest.approx(
        (wanted.mean, wanted.interval.low, wanted.interval.high)
    )
    shares = [[value / 100 for value in answers.values()] for answers in (after, before)]
    leaves = [name.partition("/")[0] for name in names]
    wanted = paired_difference(*shares, groups=leaves, binary=True)
    row = find(rows, measure="quiz")  # recorded in points, as they are shown
    assert (row["mean"], row["low"]) == pytest.approx((100 * wanted.mean, 100 * wanted.interval.low))
    assert row["num_groups"] == 4


def test_an_evaluation_of_a_run_that_did_not_end_well_counts_for_nothing(tmp_path, monkeypatch):
    made = spec("uniform", "paper")

    def outcome(content):
        bad = content["method"]["name"] == "paper" and content["seed"] == 0
        return ("invalid", "a check") if bad else result(content)

    campaign(tmp_path, made, outcome)
    evaluated(tmp_path, made, lambda content: {"quiz": benchmark(0.5, 0.4)}, monkeypatch)
    assert [one.state for one in outcomes(tmp_path, made) if one.kind == "evaluation"].count("invalid") == 1
    row = find(tables(tmp_path)["comparisons"], measure="quiz")
    assert (row["n"], row["of"], row["missing"]) == (2, 3, "m, t, seed 0: paper is invalid")


def test_coarse_scores_that_all_differ_alike_are_not_called_better_or_equal(tmp_path, monkeypatch):
    margins = {"heldout_loss": 0.01, "other_loss": None, "mmlu": 5.0}
    made = spec("uniform", "paper", "last", margins=margins)
    campaign(tmp_path, made, losses({}))
    scores = {"uniform": 0.2, "paper": 0.3, "last": 0.2}
    evaluated(tmp_path, made, lambda content: {"mmlu": benchmark(scores[content["method"]["name"]], 0.2)}, monkeypatch)
    rows = tables(tmp_path)["comparisons"]
    for name, mean in (("paper", 10.0), ("last", 0.0)):
        row = find(rows, measure="mmlu", method=name, reference="uniform")
        assert row["mean"] == pytest.approx(mean) and (row["n"], row["verdict"]) == (3, "not known")
        assert all(row[key] is None for key in ("low", "t_p", "equivalence_p"))
        assert "no interval from pairs that all differ alike" in reason(row)


def test_a_benchmark_that_one_run_lacks_is_a_gap(tmp_path, monkeypatch):
    made = spec("uniform", "paper", seeds=[0, 1])
    campaign(tmp_path, made, losses({}))
    evaluated(
        tmp_path,
        made,
        lambda content: {"quiz": benchmark(float("nan") if content["seed"] else 0.5, 0.4)},
        monkeypatch,
    )
    row = find(tables(tmp_path)["comparisons"], measure="quiz")
    assert (row["n"], row["of"], row["missing"]) == (1, 2, "m, t, seed 1: paper has no such number")
