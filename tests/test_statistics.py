"""Differences, intervals and tests: equal to SciPy where it has them, and right as often as they say."""

import json
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from scipy import stats

from aletheia_lora.statistics import (
    Interval,
    bootstrap_interval,
    effect_size,
    equivalence,
    holm,
    loss_at,
    mcnemar,
    paired_difference,
    parameter_matched,
    spearman,
    speed_ratio,
    time_matched,
    win_rate,
)

NUM_STUDIES = 2000
"""Simulated studies per figure: a true 95 % then reads 95 % give or take 1 (two standard errors)."""


def pairs_of(seed: int, n: int = 24, shift: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    references = rng.normal(size=n)
    return references + rng.normal(shift, 0.5, size=n), references


def answers(rng: np.random.Generator, n: int, gain: float, loss: float, base: float = 0.6) -> tuple[Any, Any]:
    """Right or wrong twice, where a share ``gain`` turns right and a share ``loss`` turns wrong on average."""
    kinds = rng.choice(4, size=n, p=[gain, loss, base - loss, 1 - base - gain])
    return np.isin(kinds, (0, 2)).astype(float), np.isin(kinds, (1, 2)).astype(float)


# --- against SciPy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_paired_difference_is_the_textbooks_where_every_pair_stands_alone(seed: int) -> None:
    values, references = pairs_of(seed)
    found = paired_difference(values, references)
    expected = stats.ttest_rel(values, references)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx((values - references).mean(), rel=1e-12)
    assert found.standard_error == pytest.approx(stats.sem(values - references), rel=1e-12)
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), rel=1e-9)
    assert found.t_p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.wilcoxon_p_value == pytest.approx(stats.wilcoxon(values, references).pvalue, rel=1e-12)
    assert (found.n, found.num_groups, found.bootstrap) == (24, 24, None)


def test_groups_of_one_size_give_the_t_test_of_their_means() -> None:
    values, references = pairs_of(1, n=30)
    groups = np.repeat(list("abcdef"), 5)
    found = paired_difference(values, references, groups=groups)
    expected = stats.ttest_1samp((values - references).reshape(6, 5).mean(axis=1), 0)
    assert found.t_p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)
    assert (found.n, found.num_groups) == (30, 6)


def test_a_group_of_copies_counts_once() -> None:
    values, references = pairs_of(2, n=12)
    alone = paired_difference(values, references)
    copied = paired_difference(np.repeat(values, 7), np.repeat(references, 7), groups=np.repeat(np.arange(12), 7))
    assert copied.interval.low == pytest.approx(alone.interval.low, rel=1e-9)
    assert copied.t_p_value == pytest.approx(alone.t_p_value, rel=1e-9)


def test_the_order_of_pairs_and_the_names_of_groups_do_not_matter() -> None:
    values, references = pairs_of(3, n=20)
    groups = np.arange(20) % 6
    order = np.random.default_rng(0).permutation(20)
    found = paired_difference(values, references, groups=groups)
    other = paired_difference(values[order], references[order], groups=[f"model {group}" for group in groups[order]])
    assert other.interval.low == pytest.approx(found.interval.low, rel=1e-9)
    assert other.wilcoxon_p_value == pytest.approx(found.wilcoxon_p_value, rel=1e-9)


def test_a_weighted_mean_is_the_ratio_of_sums() -> None:
    rng = np.random.default_rng(4)
    values, references, tokens = rng.normal(size=9), rng.normal(size=9), rng.integers(1, 50, size=9)
    found = paired_difference(values, references, weights=tokens)
    assert found.mean == pytest.approx(((values - references) * tokens).sum() / tokens.sum(), rel=1e-12)
    alike, plain = paired_difference(values, references, weights=[3.0] * 9), paired_difference(values, references)
    assert alike.interval.low == pytest.approx(plain.interval.low, rel=1e-12)


@pytest.mark.parametrize("n", [5, 9, 30])
def test_wilcoxon_with_ties_is_scipys(n: int) -> None:
    differences = np.random.default_rng(n).integers(-3, 5, size=n).astype(float)
    moved = differences[differences != 0]
    found = paired_difference(differences, np.zeros(n)).wilcoxon_p_value
    assert found == pytest.approx(stats.wilcoxon(moved).pvalue, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_mcnemar_is_the_binomial_test_of_the_changed_pairs(seed: int) -> None:
    values, references = answers(np.random.default_rng(seed), 80, 0.2, 0.1)
    found = mcnemar(values, references)
    gained, lost = int(((values == 1) & (references == 0)).sum()), int(((values == 0) & (references == 1)).sum())
    assert (found.n, found.num_gained, found.num_lost) == (80, gained, lost)
    assert found.p_value == pytest.approx(stats.binomtest(gained, gained + lost).pvalue, rel=1e-12)
    assert mcnemar(values, values).p_value == 1.0


def test_equivalence_is_two_one_sided_t_tests() -> None:
    values, references = pairs_of(5, n=40, shift=0.02)
    found = equivalence(values, references, margin=0.25)
    differences = values - references
    lower = stats.ttest_1samp(differences, -0.25, alternative="greater").pvalue
    upper = stats.ttest_1samp(differences, 0.25, alternative="less").pvalue
    assert (found.p_value_lower, found.p_value_upper) == pytest.approx((lower, upper), rel=1e-9)
    assert found.p_value == max(found.p_value_lower, found.p_value_upper)
    assert found.interval.confidence == pytest.approx(0.9)
    for margin in (0.05, 0.1, 0.15, 0.2, 0.3):
        tried = equivalence(values, references, margin=margin)
        assert tried.equivalent == (-margin < tried.interval.low and tried.interval.high < margin)
        assert tried.equivalent == (tried.p_value < 0.05)


def test_spearman_and_its_p_value_are_scipys() -> None:
    rng = np.random.default_rng(6)
    scores = rng.normal(size=30)
    usefulness = scores + rng.normal(size=30)
    found, expected = spearman(scores, usefulness), stats.spearmanr(scores, usefulness)
    assert (found.rho, found.p_value) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-12)
    assert found.interval.low < found.rho < found.interval.high
    assert spearman(np.exp(scores), usefulness).rho == pytest.approx(found.rho, rel=1e-12)


@pytest.mark.parametrize("n", [4, 12, 30])
def test_a_perfect_ranking_of_few_layers_keeps_an_interval(n: int) -> None:
    found = spearman(range(n), range(n))
    assert found.rho == found.interval.high == pytest.approx(1)
    assert found.interval.low < 1 - 1 / n**3
    assert spearman(range(n), range(n, 0, -1)).interval.high == pytest.approx(-found.interval.low, rel=1e-12)


def test_win_rate_has_the_exact_interval() -> None:
    found = win_rate([0.2, 0.1, -0.1, 0.3, 0.0])
    low, high = stats.binomtest(3, 5).proportion_ci()
    assert (found.wins, found.num_models, found.rate) == (3, 5, 0.6)
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), rel=1e-12)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found.adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert found.rejected == ("a", "d")
    assert holm({"a": 0.9, "b": 0.8}).adjusted == {"a": 1.0, "b": 1.0}


def test_effect_sizes_by_hand() -> None:
    found = effect_size([1.0, 2.0, -1.0, 4.0])
    d = 1.5 / math.sqrt(((-0.5) ** 2 + 0.5**2 + 2.5**2 + 2.5**2) / 3)
    assert found.cohen_d == pytest.approx(d, rel=1e-12)
    assert found.hedges_g == pytest.approx(d * math.gamma(1.5) / (math.sqrt(1.5) * math.gamma(1.0)), rel=1e-12)
    assert found.rank_biserial == pytest.approx((4 + 3 + 1.5 - 1.5) / 10, rel=1e-12)
    assert effect_size([3.0, 1.0, 2.0]).rank_biserial == 1.0
    assert math.isnan(effect_size([1.0, 2.0]).hedges_g)


def test_speed_ratio_is_the_geometric_mean_and_weighs_faster_and_slower_alike() -> None:
    found = speed_ratio([2.0, 2.0, 8.0, 8.0], [1.0, 4.0, 2.0, 2.0], models=["a", "a", "b", "b"])
    assert found.ratio == pytest.approx(2.0)
    assert found.time_saved_share == pytest.approx(0.5)
    assert found.model_ratios == pytest.approx({"a": 1.0, "b": 4.0})
    assert (found.n, found.num_models, found.win_rate.wins) == (4, 2, 1)
    rng = np.random.default_rng(7)
    slow, fast = rng.lognormal(1.2, 0.1, 12), rng.lognormal(1.0, 0.1, 12)
    there, back = speed_ratio(slow, fast), speed_ratio(fast, slow)
    assert there.interval.low == pytest.approx(1 / back.interval.high, rel=1e-9)
    assert there.t_p_value == pytest.approx(back.t_p_value, rel=1e-9)


def test_losses_at_one_time_lie_on_the_lines_between_looks() -> None:
    seconds, losses = [10.0, 20.0, 40.0], [2.0, 1.5, 1.1]
    assert loss_at(seconds, losses, 15) == pytest.approx(1.75)
    assert loss_at(seconds, losses, 40) == 1.1
    found = time_matched(seconds, losses, [12.0, 30.0], [1.9, 1.4])
    assert (found.matched_by, found.at) == ("seconds", 30.0)
    assert (found.loss, found.reference_loss) == pytest.approx((1.3, 1.4))
    assert found.difference == pytest.approx(-0.1)
    assert time_matched(seconds, losses, [12.0, 30.0], [1.9, 1.4], at=12).difference == pytest.approx(0.0)


def test_parameter_matched_refuses_what_is_not() -> None:
    found = parameter_matched(0.81, 4_900_000, 0.80, 4_884_480)
    assert found.difference == pytest.approx(0.01)
    with pytest.raises(ValueError, match=r"2,442,240 trainable parameters against 4,884,480.*allocation 'matched'"):
        parameter_matched(0.81, 2_442_240, 0.80, 4_884_480)


def test_records_are_frozen_and_plain_json() -> None:
    values, references = pairs_of(8)
    rng = np.random.default_rng(0)
    records = [
        paired_difference(values, references, rng=rng, num_resamples=99),
        speed_ratio(np.exp(values), np.exp(references), rng=rng, num_resamples=99),
        equivalence(values, references, margin=1.0),
        mcnemar([1, 0], [0, 0]),
        holm({"a": 0.01}),
        spearman(values, references),
        time_matched([1, 2], [3, 2], [1, 2], [3, 1]),
    ]
    for record in records:
        assert json.loads(json.dumps(record.to_dict(), allow_nan=False))
        with pytest.raises(FrozenInstanceError):
            record.n = 0  # type: ignore[misc,union-attr]


# --- the bootstrap ----------------------------------------------------------------------------------------------------


def test_the_bootstrap_draws_from_its_argument_alone() -> None:
    values, references = pairs_of(9)
    before = np.random.get_state()[1].tobytes()  # type: ignore[index,union-attr]
    first, again, other = (
        paired_difference(values, references, rng=np.random.default_rng(seed), num_resamples=499).bootstrap
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert np.random.get_state()[1].tobytes() == before  # type: ignore[index,union-attr]
    assert first is not None
    assert first.method == "bootstrap, BCa"


def test_the_bootstrap_draws_whole_groups() -> None:
    values, references = pairs_of(10, n=40)
    groups = np.repeat(np.arange(40), 6)
    rng = np.random.default_rng(0)
    alone = paired_difference(values, references, rng=rng).bootstrap
    copied = paired_difference(np.repeat(values, 6), np.repeat(references, 6), groups=groups, rng=rng).bootstrap
    assert alone is not None and copied is not None
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.05)


# --- right as often as they say ---------------------------------------------------------------------------------------


def share(study: Callable[[np.random.Generator], bool], seed: int, num_studies: int = NUM_STUDIES) -> float:
    rng = np.random.default_rng(seed)
    return float(np.mean([study(rng) for _ in range(num_studies)]))


def interval_of(values: Any, references: Any, **more: Any) -> Interval:
    """The 95 % interval of ``paired_difference`` without its tests and effect sizes, which take most of its time."""
    return equivalence(values, references, margin=1.0, alpha=0.025, **more).interval


@pytest.mark.parametrize("more", [{}, {"groups": np.arange(24) % 7}, {"weights": np.arange(1.0, 25.0)}])
def test_both_ways_to_an_interval_agree(more: dict[str, Any]) -> None:
    assert interval_of(*pairs_of(0), **more) == paired_difference(*pairs_of(0), **more).interval


def test_t_interval_covers_the_truth_95_times_in_100() -> None:
    def covers(rng: np.random.Generator) -> bool:
        references = rng.normal(size=10)
        interval = interval_of(references + rng.normal(0.4, 1.0, 10), references)
        return interval.low <= 0.4 <= interval.high

    assert 0.93 <= share(covers, 0) <= 0.97


def test_interval_covers_the_truth_where_seeds_of_a_model_are_alike() -> None:
    """Ten models, three seeds each; what a model gains differs from model to model far more than from seed to seed."""
    models, truth = np.repeat(np.arange(10), 3), math.log(1.3)

    def covers(rng: np.random.Generator, groups: Any) -> bool:
        gain = np.repeat(rng.normal(truth, 0.08, 10), 3) + rng.normal(0, 0.02, 30)
        interval = interval_of(gain, np.zeros(30), groups=groups)
        return interval.low <= truth <= interval.high

    assert 0.93 <= share(lambda rng: covers(rng, models), 1) <= 0.97
    assert share(lambda rng: covers(rng, None), 1) < 0.85, "the groups matter here, so leaving them out must show"


def test_interval_of_a_weighted_mean_covers_the_truth() -> None:
    """Texts of different lengths, whose loss depends on the length; the truth is the loss of a token."""
    truth = 0.1 + 0.002 * (300 + 200**2 / 12 / 300)

    def covers(rng: np.random.Generator) -> bool:
        tokens = rng.uniform(200, 400, size=60)
        interval = interval_of(0.1 + 0.002 * tokens + rng.normal(0, 0.2, 60), np.zeros(60), weights=tokens)
        return interval.low <= truth <= interval.high

    assert 0.93 <= share(covers, 12) <= 0.97


def test_bootstrap_interval_covers_the_truth() -> None:
    def covers(rng: np.random.Generator) -> bool:
        found = bootstrap_interval(rng.normal(0.4, 1.0, 80), None, None, rng, num_resamples=499)
        return found.low <= 0.4 <= found.high

    assert 0.93 <= share(covers, 2, 600) <= 0.97


@pytest.mark.parametrize(("gain", "loss"), [(0.05, 0.05), (0.02, 0.06), (0.15, 0.10)])
def test_interval_of_right_and_wrong_covers_the_truth(gain: float, loss: float) -> None:
    def covers(rng: np.random.Generator) -> bool:
        interval = interval_of(*answers(rng, 200, gain, loss), binary=True)
        return interval.low <= gain - loss <= interval.high

    assert 0.93 <= share(covers, 3) <= 0.97


def test_interval_of_grouped_right_and_wrong_covers_the_truth() -> None:
    """Subjects of 20 questions, each with a change of its own."""
    subjects = np.repeat(np.arange(57), 20)

    def covers(rng: np.random.Generator) -> bool:
        tilt = np.repeat(rng.uniform(-0.12, 0.12, 57), 20)
        draw = rng.uniform(size=1140)
        differences = (draw < 0.15 + tilt).astype(float) - (draw > 0.85 + tilt)
        interval = interval_of(differences > 0, differences < 0, groups=subjects, binary=True)
        return interval.low <= 0 <= interval.high

    assert 0.93 <= share(covers, 4) <= 0.97


def test_rank_correlation_interval_covers_the_truth() -> None:
    rho = 0.6  # of normal numbers whose ranks correlate as follows (Pearson 1907)
    truth = 6 / math.pi * math.asin(rho / 2)

    def covers(rng: np.random.Generator) -> bool:
        first, noise = rng.normal(size=(2, 30))
        interval = spearman(first, rho * first + math.sqrt(1 - rho**2) * noise).interval
        return interval.low <= truth <= interval.high

    assert 0.93 <= share(covers, 5, 1000) <= 0.97


def test_nothing_there_is_found_5_times_in_100_at_most() -> None:
    def alarms(rng: np.random.Generator) -> tuple[bool, bool]:
        found = paired_difference(rng.normal(size=12), rng.normal(size=12))
        assert (found.t_p_value < 0.05) == (not found.interval.low <= 0 <= found.interval.high)
        return found.t_p_value < 0.05, found.wilcoxon_p_value < 0.05

    rng = np.random.default_rng(6)
    student, wilcoxon = np.mean([alarms(rng) for _ in range(800)], axis=0)
    assert 0.03 <= student <= 0.065
    assert 0.03 <= wilcoxon <= 0.065


def test_mcnemar_raises_at_most_5_false_alarms_in_100() -> None:
    assert share(lambda rng: mcnemar(*answers(rng, 200, 0.08, 0.08)).p_value < 0.05, 7) <= 0.05


def test_holm_raises_at_most_5_false_alarms_in_100_families() -> None:
    def alarm(rng: np.random.Generator) -> bool:
        return bool(holm(dict(zip("abcdef", rng.uniform(size=6), strict=True))).rejected)

    def uncorrected(rng: np.random.Generator) -> bool:
        return bool((rng.uniform(size=6) < 0.05).any())

    assert share(alarm, 8) <= 0.06
    assert share(uncorrected, 8) > 0.2


def test_equivalence_at_the_margin_is_claimed_5_times_in_100_at_most() -> None:
    def claims(rng: np.random.Generator) -> bool:
        return equivalence(rng.normal(0.5, 1.0, 50), np.zeros(50), margin=0.5).equivalent

    assert 0.03 <= share(claims, 9) <= 0.06


@pytest.mark.parametrize(("n", "gain", "loss"), [(100, 0.0, 0.02), (100, 0.03, 0.05), (400, 0.06, 0.08)])
def test_equivalence_of_right_and_wrong_is_not_claimed_from_silence(n: int, gain: float, loss: float) -> None:
    """The truth lies at the margin; with few changed answers a plain t test calls it equivalent far too often."""

    def claims(rng: np.random.Generator) -> bool:
        return equivalence(*answers(rng, n, gain, loss), margin=0.02, binary=True).equivalent

    assert share(claims, 10) <= 0.055


def test_equivalence_is_found_where_it_is_and_the_pairs_are_enough() -> None:
    def claims(rng: np.random.Generator) -> bool:
        return equivalence(*answers(rng, 1000, 0.02, 0.02), margin=0.02, binary=True).equivalent

    assert share(claims, 11, 500) > 0.8


# --- edges ------------------------------------------------------------------------------------------------------------


def test_all_equal_is_no_difference_and_a_constant_shift_is_one() -> None:
    same = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], rng=np.random.default_rng(0))
    assert (same.mean, same.t_p_value, same.wilcoxon_p_value) == (0.0, 1.0, 1.0)
    assert (same.interval.low, same.interval.high) == (0.0, 0.0)
    assert same.bootstrap is not None
    assert (same.bootstrap.low, same.bootstrap.high) == (0.0, 0.0)
    assert math.isnan(same.effect.cohen_d)
    shifted = paired_difference([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert (shifted.interval.low, shifted.interval.high, shifted.t_p_value) == (1.0, 1.0, 0.0)


def test_right_and_wrong_without_a_change_keep_an_interval() -> None:
    same = paired_difference([1.0] * 100, [1.0] * 100, binary=True)
    assert same.mean == 0.0
    assert 0.02 < same.interval.high < 0.04
    assert not equivalence([1.0] * 100, [1.0] * 100, margin=0.02, binary=True).equivalent
    assert equivalence([1.0] * 400, [1.0] * 400, margin=0.02, binary=True).equivalent


@pytest.mark.parametrize(
    ("values", "references", "more", "words"),
    [
        ([], [], {}, "at least one number"),
        ([1.0], [2.0], {}, "n = 1: no interval from one pair"),
        ([1.0, 2.0], [1.0], {}, "2 numbers against 1, expected pairs"),
        ([1.0, math.nan], [1.0, 2.0], {}, r"values\[1\] is nan"),
        ([1.0, 2.0], [math.inf, 2.0], {}, r"references\[0\] is inf"),
        ([[1.0]], [[2.0]], {}, r"shape \(1, 1\)"),
        ([1.0, 2.0], [1.0, 2.0], {"groups": ["a"]}, "1 groups for 2 pairs"),
        ([1.0, 2.0], [1.0, 2.0], {"groups": ["a", "a"]}, "n = 1: no interval from one group"),
        ([1.0, 0.5], [1.0, 0.0], {"binary": True}, "a score of 0.5, expected 1"),
        ([1.0, 2.0], [1.0, 2.0], {"weights": [1.0, 0.0]}, "weights must be above 0"),
    ],
)
def test_what_is_no_pair_is_refused(values: Any, references: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        paired_difference(values, references, **more)
    with pytest.raises(ValueError, match=words):
        equivalence(values, references, margin=1.0, **more)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: equivalence([1, 2], [1, 2], margin=0), "margin=0, expected a number above 0"),
        (lambda: equivalence([1, 2], [1, 2], margin=math.nan), "margin=nan"),
        (lambda: speed_ratio([1.0, 0.0], [1.0, 1.0]), "0 seconds, expected more than 0"),
        (lambda: speed_ratio([1.0, 2.0, 3.0], [1.0, 1.0, 2.0], models=["a"] * 3), "no interval from one group"),
        (lambda: win_rate([]), "at least one number"),
        (lambda: mcnemar([1, 2], [0, 1]), "a score of 2"),
        (lambda: holm({}), "at least one number"),
        (lambda: holm({"a": 1.2}), "expected 0 to 1"),
        (lambda: effect_size([1.0]), "n = 1"),
        (lambda: spearman([1, 2, 3], [1, 2, 3]), "n = 3"),
        (lambda: spearman([1, 1, 1, 1], [1, 2, 3, 4]), "rank nothing"),
        (lambda: loss_at([1.0, 2.0], [2.0, 1.0], 3.0), "the looks are from 1 to 2 s"),
        (lambda: loss_at([2.0, 1.0], [2.0, 1.0], 1.5), "do not rise"),
        (lambda: parameter_matched(math.nan, 1, 1.0, 1), "nan"),
    ],
)
def test_what_cannot_be_answered_is_refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
