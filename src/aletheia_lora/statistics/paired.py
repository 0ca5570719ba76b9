"""Pairs of numbers -> their mean difference, its intervals and tests, and whether it is small enough.

Comes in: one pair per run or item, and the group of each pair where several share a cause: seeds of one model,
questions of one subject. Goes out: records that say n and method. Only the bootstrap is random; its generator is an
argument.

The mean is over all pairs, by weight where weights are given. For its standard error the residuals of a group are
added up first, so that pairs of a group may depend on each other. With differences d, weights w (1 each), their mean
m and G groups::

    SE^2 = G / (G - 1) * sum over groups of (sum over the group of w (d - m))^2 / (sum of w)^2

with G - 1 degrees of freedom: Liang and Zeger, "Longitudinal data analysis using generalized linear models" (1986).
Where every pair is a group of its own, this is the textbook standard error, and the test is Student's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy import special, stats

from .numbers import Codes, Floats, Groups, Numbers, at_least_two, binary_pairs, finite, group_codes, pairs
from .records import EffectSize, Equivalence, Holm, Interval, McNemar, PairedDifference

CONFIDENCE = 0.95
ALPHA = 0.05
NUM_RESAMPLES = 9999
MAX_SIGNS = 13
"""Up to this many pairs, Wilcoxon's test with ties goes through all signs."""


def paired_difference(
    values: Numbers,
    references: Numbers,
    *,
    groups: Groups | None = None,
    weights: Numbers | None = None,
    binary: bool = False,
    confidence: float = CONFIDENCE,
    rng: np.random.Generator | None = None,
    num_resamples: int = NUM_RESAMPLES,
) -> PairedDifference:
    """Mean of ``values - references`` with a t interval, a bootstrap interval, two tests and effect sizes.

    Read the t interval where there are fewer than about 30 groups: a bootstrap of few is too narrow. With groups, the
    bootstrap draws whole groups, and Wilcoxon's test and the effect sizes are of the groups' means.

    Args:
        values: One number per pair.
        references: The other number of each pair, in the same order.
        groups: A name per pair; pairs of one name may depend on each other. None: every pair by itself.
        weights: Of each pair, above 0, such as its number of tokens. None: all alike.
        binary: Numbers are 0 or 1. Interval and t test then add one pair of difference 1 and one of -1, after Bonett
            and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
            data" (2012), so that the interval is no point where no pair differs. Their quantile is the normal one,
            ours is Student's.
        confidence: Of both intervals.
        rng: Draws the bootstrap's resamples; without one there is no bootstrap interval.
        num_resamples: Drawn by the bootstrap.

    Returns:
        The record. Without any spread the interval is a point, and the t test gives 1 at a difference of 0, else 0.

    Raises:
        ValueError: If there are fewer than two pairs or groups, lengths differ, a number is NaN or infinite, a weight
            is not above 0, or, for ``binary``, a number is not 0 or 1 or there are weights.
    """
    differences, codes, weight = _differences(values, references, groups, weights, binary)
    mean, error, dof = _location(differences, codes, weight, binary)
    means = np.bincount(codes, weight * differences) / np.bincount(codes, weight)
    drawn = None if rng is None else bootstrap_interval(differences, codes, weight, rng, confidence, num_resamples)
    return PairedDifference(
        n=len(differences),
        num_groups=len(means),
        mean=float(np.average(differences, weights=weight)),
        standard_error=error,
        interval=_t_interval(mean, error, dof, confidence),
        bootstrap=drawn,
        t_p_value=min(1.0, 2 * _tail(abs(mean), error, dof)),
        wilcoxon_p_value=_wilcoxon(means),
        effect=effect_size(means),
    )


def bootstrap_interval(
    differences: Numbers,
    groups: Groups | None,
    weights: Numbers | None,
    rng: np.random.Generator,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """BCa interval of the mean difference; whole groups are drawn with replacement.

    Bias-corrected and accelerated: Efron, "Better bootstrap confidence intervals" (1987), as SciPy computes it.

    Raises:
        ValueError: As :func:`paired_difference`.
    """
    values, codes, weight = _differences(differences, np.zeros(len(differences)), groups, weights, binary=False)
    if np.ptp(values) == 0:
        return Interval(float(values[0]), float(values[0]), confidence, "bootstrap, BCa")
    drawn = stats.bootstrap(
        (np.bincount(codes, weight * values), np.bincount(codes, weight)),
        lambda sums, totals, axis: sums.sum(axis) / totals.sum(axis),
        paired=True,
        vectorized=True,
        batch=1000,
        n_resamples=num_resamples,
        confidence_level=confidence,
        method="BCa",
        rng=rng,
    )
    low, high = drawn.confidence_interval
    return Interval(float(low), float(high), confidence, "bootstrap, BCa")


def effect_size(differences: Numbers) -> EffectSize:
    """Cohen's d of paired differences, Hedges' g, and the matched-pairs rank-biserial correlation.

    With v = n - 1, ``g = d * gamma(v / 2) / (sqrt(v / 2) * gamma((v - 1) / 2))``: Hedges, "Distribution theory for
    Glass's estimator of effect size" (1981). The rank-biserial correlation leaves out pairs without a difference.

    Raises:
        ValueError: If there are fewer than two differences, or one is NaN or infinite.
    """
    values = finite("differences", differences)
    at_least_two(len(values), "pair")
    half = (len(values) - 1) / 2
    d = float(values.mean() / values.std(ddof=1)) if np.ptp(values) > 0 else float("nan")
    g = d * float(special.poch(half - 0.5, 0.5)) / half**0.5 if half > 0.5 else float("nan")
    moved = values[values != 0]
    ranks = stats.rankdata(np.abs(moved))
    biserial = float((np.sign(moved) * ranks).sum() / ranks.sum()) if len(moved) else float("nan")
    return EffectSize(d, g, biserial)


def mcnemar(values: Numbers, references: Numbers) -> McNemar:
    """McNemar's test in its exact form: is a change to right as likely as a change to wrong?

    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages" (1947). Pairs
    count as independent; where they come in groups, take the t test of :func:`paired_difference`.

    Raises:
        ValueError: If the lists are empty, their lengths differ, or a number is not 0 or 1.
    """
    first, second = binary_pairs(values, references)
    gained, lost = int((first > second).sum()), int((first < second).sum())
    p_value = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return McNemar(len(first), gained, lost, p_value)


def equivalence(
    values: Numbers,
    references: Numbers,
    *,
    margin: float,
    groups: Groups | None = None,
    weights: Numbers | None = None,
    binary: bool = False,
    alpha: float = ALPHA,
) -> Equivalence:
    """Two one-sided t tests that the mean of ``values - references`` lies inside (-margin, margin).

    Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the equivalence
    of average bioavailability" (1987). No difference found is no evidence of equality; this is.

    Args:
        values: One number per pair.
        references: The other number of each pair, in the same order.
        margin: The largest difference that would not matter, above 0, fixed before the numbers are seen.
        groups: As in :func:`paired_difference`.
        weights: As in :func:`paired_difference`.
        binary: As in :func:`paired_difference`.
        alpha: The accepted chance of calling equivalent what is not.

    Raises:
        ValueError: As :func:`paired_difference`, and if the margin is not above 0.
    """
    if not 0 < margin < np.inf:
        raise ValueError(f"margin={margin}, expected a number above 0: the largest difference that would not matter.")
    differences, codes, weight = _differences(values, references, groups, weights, binary)
    mean, error, dof = _location(differences, codes, weight, binary)
    lower, upper = _tail(mean + margin, error, dof), _tail(margin - mean, error, dof)
    return Equivalence(
        n=len(differences),
        num_groups=int(codes.max()) + 1,
        mean=float(np.average(differences, weights=weight)),
        margin=float(margin),
        alpha=alpha,
        interval=_t_interval(mean, error, dof, 1 - 2 * alpha),
        p_value_lower=lower,
        p_value_upper=upper,
        p_value=max(lower, upper),
        equivalent=max(lower, upper) < alpha,
    )


def holm(p_values: Mapping[str, float], *, alpha: float = ALPHA) -> Holm:
    """Holm's correction: the chance of any false alarm among all tests stays at most ``alpha``.

    Holm, "A simple sequentially rejective multiple test procedure" (1979): the i-th smallest of k p-values is
    multiplied by k + 1 - i, and none may fall below one before it.

    Raises:
        ValueError: If there is none, or one is no probability.
    """
    values = finite("p_values", list(p_values.values()))
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"p-values from {values.min():g} to {values.max():g}, expected 0 to 1.")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    named = dict(zip(p_values, adjusted.tolist(), strict=True))
    return Holm(named, alpha, tuple(name for name, p_value in named.items() if p_value < alpha))


def _differences(
    values: Numbers, references: Numbers, groups: Groups | None, weights: Numbers | None, binary: bool
) -> tuple[Floats, Codes, Floats]:
    """Checked differences, the number of each one's group, and its weight."""
    first, second = (binary_pairs if binary else pairs)(values, references)
    codes = group_codes(groups, len(first))
    at_least_two(len(first), "pair")
    at_least_two(int(codes.max()) + 1, "group")
    if weights is None:
        return first - second, codes, np.ones(len(first))
    weight = pairs(weights, first)[0]
    if weight.min() <= 0 or binary:
        raise ValueError("weights must be above 0, and right or wrong takes none. Leave empty items out.")
    return first - second, codes, weight


def _location(differences: Floats, codes: Codes, weights: Floats, binary: bool) -> tuple[float, float, int]:
    """Mean, its standard error, and degrees of freedom; ``binary`` adds one pair of 1 and one of -1."""
    if binary:
        differences, weights = np.append(differences, (1.0, -1.0)), np.append(weights, (1.0, 1.0))
        codes = np.append(codes, codes.max() + np.array((1, 2)))
    mean = float(np.average(differences, weights=weights))
    sums = np.bincount(codes, weights * (differences - mean))
    error = np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / weights.sum()
    return mean, float(error), len(sums) - 1


def _t_interval(mean: float, error: float, dof: int, confidence: float) -> Interval:
    reach = float(special.stdtrit(dof, (1 + confidence) / 2)) * error
    return Interval(mean - reach, mean + reach, confidence, "t")


def _tail(distance: float, error: float, dof: int) -> float:
    """Chance of a mean this far above where it is expected; without spread all or nothing."""
    return float(special.stdtr(dof, -distance / error)) if error else float(distance <= 0)


def _wilcoxon(differences: Floats) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test; pairs without a difference are left out.

    With few pairs and ties, all signs are tried, as SciPy does one by one.
    """
    moved = differences[differences != 0]
    size = np.abs(moved)
    if not len(moved):
        return 1.0
    if len(moved) > MAX_SIGNS or len(np.unique(size)) == len(size):
        return float(stats.wilcoxon(moved).pvalue)
    ranks = stats.rankdata(size)
    signs = 1 - 2 * (np.arange(2 ** len(moved))[:, np.newaxis] >> np.arange(len(moved)) & 1)
    return float(np.mean(np.abs(signs @ ranks) >= abs(np.sign(moved) @ ranks) - 1e-9))
