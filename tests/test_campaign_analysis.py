"""What is said of a campaign: numbers against SciPy and hand computation, and every gap by its name."""

import math

import numpy as np
import pytest
from scipy import stats

from aletheia_lora.campaign.pairing import role_of
from aletheia_lora.campaign.records import CellFolder
from aletheia_lora.campaign.report import campaign_record, tables, unsure_rates
from aletheia_lora.campaign.spec import cells
from aletheia_lora.statistics import holm
from campaign_results import SCORES, campaign, method, named, result, spec

NOISE = np.random.default_rng(0).normal(0, 0.004, 4096)


def noise(content):
    """A small number that follows from the cell."""
    words = (content["model"]["name"], content["task"]["name"], content["method"]["name"], content["match"])
    return float(NOISE[hash_of((*words, content["seed"], content["draw"]))])


def hash_of(words):
    return sum((index + 3) * ord(letter) for index, letter in enumerate("|".join(map(str, words)))) % 4096


def losses(shift):
    """Gives a result whose loss is moved by the method."""
    return lambda content: result(content, heldout_loss=2.0 + shift.get(content["method"]["name"], 0) + noise(content))


def find(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def column(folder, name, key="heldout_loss", match="steps"):
    rows = [row for row in tables(folder)["runs"] if (row["method"], row["match"]) == (name, match)]
    return [row[key] for row in rows]


# --- ranking ----------------------------------------------------------------------------------------------------


def test_methods_are_ranked_beside_chance_and_corrected_for_all_that_were_tried(tmp_path):
    drawn = method("random", draws=2)
    made = spec("uniform", drawn, "paper", "stride", "last", seeds=[0, 1, 2, 3], match=["steps", "time"])
    shift = {"paper": 0.1, "stride": -0.1, "last": 0.002}

    def outcome(content):
        return ("nan", "x") if content["match"] == "time" and content["draw"] == 1 else losses(shift)(content)

    campaign(tmp_path, made, outcome)
    rows = tables(tmp_path)["ranking"]
    steps = [row for row in rows if row["match"] == "steps"]
    assert [row["mean"] for row in steps] == sorted(row["mean"] for row in steps)
    assert (steps[0]["method"], steps[0]["verdict"]) == ("stride", "better")
    assert (steps[-1]["method"], steps[-1]["verdict"]) == ("paper", "worse")
    assert {row["chance"] for row in rows} == {"random"} and {row["tried"] for row in rows} == {4}
    chance = np.reshape(column(tmp_path, "random"), (4, 2)).mean(axis=1)  # two draws of each seed
    wanted = {name: stats.ttest_rel(column(tmp_path, name), chance).pvalue for name in ("uniform", *shift)}
    adjusted = holm(wanted).adjusted
    for row in steps:
        assert row["t_p"] == pytest.approx(wanted[row["method"]])
        assert row["holm_p"] == pytest.approx(adjusted[row["method"]])
    assert find(steps, method="stride")["num_layers"] == "2"
    assert all((row["mean"], row["verdict"]) == (None, "not known") for row in rows if row["match"] == "time")


def test_without_a_random_method_nothing_is_ranked(tmp_path):
    campaign(tmp_path, spec("uniform", "paper"), losses({}))
    assert tables(tmp_path)["ranking"] == []


# --- differences ------------------------------------------------------------------------------------------------


def test_one_model_and_task_gives_the_paired_t_test_over_seeds(tmp_path):
    made = spec("uniform", "paper", "last", seeds=[0, 1, 2, 3, 4])
    campaign(tmp_path, made, losses({"paper": -0.1}))
    row = find(tables(tmp_path)["comparisons"], method="paper", reference="last")
    first, second = column(tmp_path, "paper"), column(tmp_path, "last")
    wanted = stats.ttest_rel(first, second)
    interval = wanted.confidence_interval(0.95)
    assert (row["n"], row["of"], row["basis"], row["against"]) == (5, 5, "pairs", "control")
    assert row["mean"] == pytest.approx(np.mean(first) - np.mean(second))
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["t_p"] == pytest.approx(wanted.pvalue)
    assert row["wilcoxon_p"] == pytest.approx(stats.wilcoxon(first, second).pvalue)
    differences = np.subtract(first, second)
    assert row["cohen_d"] == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert row["bootstrap_low"] < row["mean"] < row["bootstrap_high"]
    assert row["verdict"] == "better" and row["missing"] == ""


def test_two_tasks_are_no_groups(tmp_path):
    campaign(tmp_path, spec("uniform", "paper", tasks=named("x", "y")), losses({"paper": 0.02}))
    row = find(tables(tmp_path)["comparisons"], method="paper")
    wanted = stats.ttest_rel(column(tmp_path, "paper"), column(tmp_path, "uniform")).confidence_interval(0.95)
    assert (row["n"], row["num_groups"], row["basis"]) == (6, 6, "pairs")
    assert (row["low"], row["high"]) == pytest.approx((wanted.low, wanted.high))


def test_several_models_and_tasks_are_groups(tmp_path):
    made = spec("uniform", "paper", models=named("a", "b"), tasks=named("x", "y"), seeds=[0, 1])
    campaign(tmp_path, made, losses({"paper": 0.02}))
    row = find(tables(tmp_path)["comparisons"], method="paper")
    differences = np.subtract(column(tmp_path, "paper"), column(tmp_path, "uniform"))
    sums = (differences - differences.mean()).reshape(4, 2).sum(1)
    error = math.sqrt(4 / 3 * (sums**2).sum()) / 8
    assert (row["n"], row["num_groups"], row["basis"]) == (8, 4, "models x tasks")
    assert row["high"] - row["mean"] == pytest.approx(stats.t.ppf(0.975, 3) * error)


def test_draws_are_averaged_within_their_pair_and_a_pair_without_one_of_them_is_missing(tmp_path):
    made = spec("uniform", "paper", method("random", draws=2))

    def outcome(content):
        if (content["method"]["name"], content["seed"], content["draw"]) == ("random", 1, 1):
            return "failed", "ValueError: <b>"
        return result(content, heldout_loss=2.0 + content["seed"] + (content["draw"] + 1) / 8)

    campaign(tmp_path, made, outcome)
    found = tables(tmp_path)["comparisons"]
    row = find(found, method="paper", reference="random")
    assert (row["n"], row["of"]) == (2, 3)
    assert row["mean"] == pytest.approx(1 / 8 - (1 / 8 + 2 / 8) / 2)
    assert row["missing"] == "m, t, seed 1: draw 1 of random is failed"
    assert find(found, method="paper", reference="uniform")["n"] == 3
    assert campaign_record(tmp_path)["missing"][0] == "m, t, seed 1: draw 1 of random is failed (lines that lack it: 3)"


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (None, "paper is planned"),
        (("nan", "a loss"), "paper is nan"),
        (("oom", "too large"), "paper is oom"),
        (("invalid", "checks"), "paper is invalid"),
        ({"heldout_loss": float("nan")}, "paper has no such number"),
        ({"heldout_loss": True}, "paper has no such number"),
        ({"rows_digest": "other"}, "measured on other rows"),
    ],
    ids=str,
)
def test_what_has_no_number_is_in_no_mean_and_named(tmp_path, ended, said):
    def outcome(content):
        if (content["method"]["name"], content["seed"]) != ("paper", 2):
            return result(content)
        return result(content, **ended) if isinstance(ended, dict) else ended

    campaign(tmp_path, spec("uniform", "paper"), outcome)
    row = find(tables(tmp_path)["comparisons"], method="paper")
    assert (row["n"], row["of"], row["missing"]) == (2, 3, f"m, t, seed 2: {said}")


def test_one_seed_has_a_difference_and_no_interval(tmp_path):
    campaign(tmp_path, spec("uniform", "paper", seeds=[0]), losses({"paper": -1.0}))
    made = tables(tmp_path)
    row = find(made["comparisons"], method="paper")
    assert row["mean"] < -0.9 and (row["n"], row["basis"], row["verdict"]) == (1, "one pair", "not known")
    assert all(row[key] is None for key in ("low", "bootstrap_low", "t_p", "holm_p", "equivalence_p", "hedges_g"))
    asked = find(made["questions"], question="Does paper keep the held-out loss of uniform LoRA at equal steps?")
    assert asked["answer"] == "not known" and "no interval from one pair" in asked["why"]
    assert made["speed"][0]["ratio"] == 1.0 and made["speed"][0]["low"] is None


def test_holms_correction_is_over_every_comparison_that_a_question_tried(tmp_path):
    made = spec("uniform", "paper", "last", "stride", seeds=[0, 1, 2, 3])

    def outcome(content):
        return ("failed", "x") if content["method"]["name"] == "stride" else losses({"paper": -0.01})(content)

    campaign(tmp_path, made, outcome)
    rows = tables(tmp_path)["comparisons"]
    pairs = [(row["method"], row["reference"]) for row in rows]
    wanted = [("paper", "uniform"), ("paper", "last"), ("paper", "stride"), ("last", "uniform"), ("stride", "uniform")]
    assert pairs == wanted
    tried = {str(index): 1.0 if row["t_p"] is None else row["t_p"] for index, row in enumerate(rows)}
    assert [row["t_p"] is None for row in rows] == [False, False, True, False, True]
    assert [row["tried"] for row in rows] == [3, 3, 3, 2, 2]  # the question about paper, and the others together
    for key, names in (("holm_p", "012"), ("holm_p", "34"), ("holm_p_of_all", "01234")):
        adjusted = holm({name: tried[name] for name in names}).adjusted
        assert all(rows[int(name)][key] in (None, adjusted[name]) for name in names)
    assert rows[0]["holm_p_of_all"] > rows[0]["holm_p"] > rows[0]["t_p"]


@pytest.mark.parametrize(
    ("shift", "spread", "verdict"),
    [
        (-0.5, 1.0, "better"),
        (0.5, 1.0, "worse"),
        (0.0, 1.0, "equal"),
        (-0.005, 0.1, "better, within the margin"),
        (0.005, 0.1, "worse, within the margin"),
        (0.0, 40.0, "not known"),
    ],
)
def test_verdicts(tmp_path, shift, spread, verdict):
    made = spec("uniform", "paper", seeds=list(range(8)), margins={"heldout_loss": 0.02, "other_loss": None})

    def outcome(content):
        moved = shift if content["method"]["name"] == "paper" else 0.0
        return result(content, heldout_loss=2.0 + moved + spread * noise(content))

    campaign(tmp_path, made, outcome)
    assert find(tables(tmp_path)["comparisons"], method="paper")["verdict"] == verdict


def test_the_bootstrap_of_a_comparison_does_not_hang_on_its_neighbours(tmp_path):
    shift = losses({"paper": -0.1})
    campaign(tmp_path / "two", spec("uniform", "paper"), shift)
    campaign(tmp_path / "more", spec("uniform", "last", "stride", "paper"), shift)
    found = [tables(tmp_path / name)["comparisons"] for name in ("two", "more")]
    rows = [find(own, method="paper", reference="uniform") for own in found]
    assert rows[0]["bootstrap_low"] == rows[1]["bootstrap_low"] != rows[0]["low"]


def test_equal_steps_and_equal_time_are_kept_apart(tmp_path):
    made = spec("uniform", "paper", "dora", match=["steps", "time"])

    def outcome(content):
        faster = content["match"] == "time" and content["method"]["name"] == "paper"
        return result(content, heldout_loss=2.0 - 0.25 * faster + content["seed"], steps=15 if faster else 10)

    campaign(tmp_path, made, outcome)
    found = tables(tmp_path)
    means = {(row["match"], row["method"]): row["mean"] for row in found["comparisons"]}
    assert means == {("steps", "paper"): 0.0, ("steps", "dora"): 0.0, ("time", "paper"): -0.25}
    assert [(row["method"], row["ratio"]) for row in found["counted"]] == [("paper", 1.5)] * 3
    assert find(found["speed"], scope="all", method="paper")["counted_ratio"] == pytest.approx(1.5)
    questions = [row["question"] for row in found["questions"]]
    assert "Is paper better than uniform LoRA at equal time?" in questions


def test_as_many_parameters_are_compared_only_where_they_are_as_many(tmp_path):
    params = {("same_params", 0): 2010, ("same_params", 1): 2000, ("same_params", 2): 1500}

    def outcome(content):
        key = content["method"]["name"], content["seed"]
        return result(content, trainable_params=params.get(key, 2000))

    campaign(tmp_path, spec("uniform", "paper", "same_params"), outcome)
    row = find(tables(tmp_path)["comparisons"], against="parameters")
    assert (row["method"], row["reference"], row["n"], row["of"]) == ("paper", "same_params", 2, 3)
    assert row["missing"] == "m, t, seed 2: 2,000 trainable parameters against 1,500"


def test_other_text_is_compared_where_there_is_one(tmp_path):
    other = {"name": "other", "data": "o.jsonl"}
    made = spec("uniform", "paper", other_text=other, margins={"heldout_loss": 0.01, "other_loss": 0.02})
    campaign(tmp_path, made, lambda content: result(content, other_loss=1.5 + noise(content)))
    found = tables(tmp_path)
    row = find(found["comparisons"], method="paper", measure="other_loss")
    assert (row["margin"], row["n"]) == (0.02, 3)
    assert find(found["deltas"], method="paper", measure="other_loss")["mean"] == pytest.approx(0.5, abs=0.02)
    assert any("the loss on other text of uniform LoRA" in row["question"] for row in found["questions"])


# --- questions --------------------------------------------------------------------------------------------------


def test_a_question_is_held_did_not_hold_or_is_not_known(tmp_path):
    made = spec("uniform", "paper", "last", "stride", method("random", draws=2), seeds=list(range(6)))
    made["margins"] = {"heldout_loss": 0.03, "other_loss": None}
    shift = {"paper": 0.0, "last": 0.5, "stride": -0.5}

    def outcome(content):
        random = content["method"]["name"] == "random"
        return result(content, heldout_loss=2.0 + 50 * noise(content)) if random else losses(shift)(content)

    campaign(tmp_path, made, outcome)
    asked = {row["question"]: row for row in tables(tmp_path)["questions"]}
    assert {question: row["answer"] for question, row in asked.items()} == {
        "Does paper keep the held-out loss of uniform LoRA at equal steps?": "held",
        "Is paper better than last at equal steps and count?": "held",
        "Is paper better than stride at equal steps and count?": "did not hold",
        "Is paper better than random at equal steps and count?": "not known",
    }
    assert "6 of 6 pairs" in asked["Is paper better than last at equal steps and count?"]["why"]


def test_equal_count_is_not_taken_on_trust(tmp_path):
    def outcome(content):
        layers = [1, 2, 3] if content["method"]["name"] == "paper" else [3]
        return losses({"paper": -0.5})(content) | {"layers": layers}

    campaign(tmp_path, spec("uniform", "paper", "last", seeds=list(range(6))), outcome)
    row = find(tables(tmp_path)["questions"], reference="last")
    assert row["question"] == "Is paper better than last at equal steps, with other numbers of layers?"


def test_roles():
    assert role_of(method("uniform")) == "uniform" and role_of(method("dora")) == "baseline"
    assert role_of(method("stride")) == "control" and role_of(method("mine")) == "selected"
    assert role_of(method("mine", score="weight_snr")) == "control"
    assert role_of({"name": "only"}) == "control" and role_of(method("low", strategy="bottom")) == "control"


def test_a_campaign_without_uniform_lora_compares_what_it_has(tmp_path):
    campaign(tmp_path, spec("paper", "last"), losses({}))
    found = tables(tmp_path)
    assert [(row["method"], row["reference"]) for row in found["comparisons"]] == [("paper", "last")]
    assert found["speed"] == []


# --- time -------------------------------------------------------------------------------------------------------


def seconds(per_step, probe=0.0):
    return {"step_seconds": [per_step] * 10, "probe_seconds": probe}


def test_speed_is_the_geometric_mean_of_seconds_with_the_probe_paid(tmp_path):
    def outcome(content):
        paper = content["method"]["name"] == "paper"
        return result(content, **(seconds(0.5, probe=content["seed"]) if paper else seconds(1.0)))

    campaign(tmp_path, spec("uniform", "paper"), outcome)
    row = find(tables(tmp_path)["speed"], scope="all", method="paper")
    logs = np.log([10 / 5, 10 / 6, 10 / 7])
    wanted = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert row["ratio"] == pytest.approx(np.exp(logs.mean()))
    assert (row["low"], row["high"]) == pytest.approx((np.exp(wanted.low), np.exp(wanted.high)))
    assert (row["n"], row["of"], row["faster_models"], row["num_models"]) == (3, 3, 1, 1)
    (asked,) = tables(tmp_path)["speed_questions"]
    assert (asked["question"].startswith("Is paper faster"), asked["answer"]) == (True, "held")
    assert "faster on 1 of 1 models, 3 of 3 pairs" in asked["why"]


def test_speed_by_model_and_family(tmp_path):
    made = spec("uniform", "paper", models=named("a", "b", "c"), seeds=[0, 1])
    families = {"a": "llama", "b": "llama", "c": "qwen2"}

    def outcome(content):
        name = content["model"]["name"]
        faster = 0.5 if name != "b" else 2.0
        step = faster if content["method"]["name"] == "paper" else 1.0
        return result(content, **seconds(step * (1 + 0.01 * content["seed"])), model_type=families[name])

    campaign(tmp_path, made, outcome)
    record = campaign_record(tmp_path)
    rows = record["tables"]["speed"]
    assert [(row["scope"], row["name"]) for row in rows] == [
        ("all", "all models"),
        *(("model", name) for name in "abc"),
        ("family", "llama"),
        ("family", "qwen2"),
    ]
    assert rows[0]["num_groups"] == 3 and (rows[0]["faster_models"], rows[0]["num_models"]) == (2, 3)
    assert rows[0]["verdict"] == "not known"
    assert rows[4]["ratio"] == pytest.approx(1.0, abs=0.02) and rows[5]["ratio"] == pytest.approx(2.0, abs=0.02)
    assert rows[1]["num_groups"] == 2  # one model and task: its pairs stand by themselves
    assert [(model["family"], model["family_known"]) for model in record["models"]] == [
        ("llama", True),
        ("llama", True),
        ("qwen2", True),
    ]


def test_seconds_of_other_devices_are_no_pair(tmp_path):
    def outcome(content):
        other = content["method"]["name"] == "paper" and content["seed"] == 0
        return result(content, environment={"device": "GPU" if other else "CPU", "threads": "1"})

    campaign(tmp_path, spec("uniform", "paper"), outcome)
    row = find(tables(tmp_path)["speed"], scope="all", method="paper")
    assert (row["n"], row["of"], row["missing"]) == (2, 3, "m, t, seed 0: measured on another device")


# --- scores -----------------------------------------------------------------------------------------------------


def test_usefulness_ranks_selections_by_the_score_that_they_hold(tmp_path):
    layers = {"uniform": [0, 1, 2, 3], "paper": [2, 3], "last": [1, 3], "stride": [0, 2], "mine": [1, 2], "low": [0, 1]}
    gained = {"uniform": 1.0, "paper": 0.9, "last": 0.2, "stride": 0.7, "mine": 0.6, "low": 0.1}

    def outcome(content):
        name = content["method"]["name"]
        return result(content, layers=layers[name], heldout_loss=3.0 - gained[name] - 0.01 * content["seed"])

    campaign(tmp_path, spec(*layers), outcome)
    every, halves = tables(tmp_path)["usefulness"]
    assert (every["selections"], every["n"], halves["selections"], halves["n"]) == (
        *("all selections", 6),
        *("selections of 2 layers", 5),
    )
    shares = [0.7, 0.5, 0.5, 0.6, 0.3]
    wanted = stats.spearmanr(shares, [gained[name] for name in ("paper", "last", "stride", "mine", "low")])
    assert halves["rho"] == pytest.approx(wanted.statistic) and halves["p"] == pytest.approx(wanted.pvalue)
    assert halves["low"] < halves["rho"] < halves["high"]


def test_too_few_selections_have_no_correlation_and_say_so(tmp_path):
    campaign(tmp_path, spec("uniform", "paper", "stride"), losses({}))
    rows = tables(tmp_path)["usefulness"]
    assert [row["rho"] for row in rows] == [None, None]
    assert [(row["n"], row["note"]) for row in rows] == [(3, "too few"), (2, "too few")]


def test_scores_are_averaged_over_seeds_and_scaled_within_their_task(tmp_path):
    def outcome(content):
        return result(content, layer_scores={"gradient_norm": [score + content["seed"] for score in (1, 2, 4, 3)]})

    campaign(tmp_path, spec("uniform", "paper"), outcome)
    rows = tables(tmp_path)["scores"]
    assert [row["mean_score"] for row in rows] == [2, 3, 5, 4]
    assert [row["share_of_highest"] for row in rows] == [0.4, 0.6, 1.0, 0.8]
    assert {row["num_seeds"] for row in rows} == {3}


def test_scores_of_runs_that_did_not_end_well_are_in_no_mean(tmp_path):
    made = spec("uniform", "paper", seeds=[0, 1, 2])
    campaign(tmp_path, made, lambda content: result(content) if content["seed"] == 0 else None)
    for cell in cells(made):
        if cell.content["seed"] > 0:
            values = result(cell.content, layer_scores={"gradient_norm": [9.0, 9.0, 9.0, 9.0], "fisher": [1.0] * 4})
            CellFolder.of(tmp_path, cell).finish("nan" if cell.content["seed"] == 1 else "invalid", "bad", **values)
    rows = tables(tmp_path)["scores"]
    assert [(row["score"], row["mean_score"], row["num_seeds"]) for row in rows] == [
        ("gradient_norm", score, 1) for score in SCORES
    ]
    assert {row["score"] for row in tables(tmp_path)["usefulness"]} == {"gradient_norm"}


# --- learning rates ---------------------------------------------------------------------------------------------


def tried(method, **losses):
    names = {"model": "small", "task": "maths", "method": method}
    return [{**names, "learning_rate": float(rate[1:]), "validation_loss": loss} for rate, loss in losses.items()]


def test_a_rate_at_the_end_of_its_grid_or_hardly_better_than_another_is_said():
    inside = tried("paper", _1=2.0, _2=1.5, _4=1.8)
    assert unsure_rates(inside, 0.1) == []
    low, near = tried("low", _1=1.0, _2=1.3, _4=None), tried("near", _1=2.0, _2=1.0, _4=1.05)
    said = unsure_rates([*inside, *low, *near], 0.1)
    assert said == [
        "small, maths: the lowest rate of the grid, 1, was the best, and one beyond it may be better (low).",
        "small, maths: the best two rates of the grid differ by less than 0.1 nats, and chance may have chosen (near).",
    ]
    at_the_end = unsure_rates(tried("high", _1=2.0, _2=1.99), 0.1)
    assert [line.rpartition(" ")[2] for line in at_the_end] == ["(high).", "(high)."]  # for both reasons
    assert unsure_rates(tried("alone", _1=2.0), 0.1) == []  # no grid, no choice
