"""Training runs in pairs -> how much faster, and which loss at the same time or the same number of parameters.

Comes in: wall seconds, looks at the held-out loss, numbers of trainable parameters, layer scores. Goes out: records
that say n and method.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from .numbers import Groups, Numbers, finite, pairs
from .paired import CONFIDENCE, NUM_RESAMPLES, paired_difference
from .records import Interval, MatchedLoss, Spearman, SpeedRatio, WinRate


def speed_ratio(
    reference_seconds: Numbers,
    seconds: Numbers,
    *,
    models: Groups | None = None,
    confidence: float = CONFIDENCE,
    rng: np.random.Generator | None = None,
    num_resamples: int = NUM_RESAMPLES,
) -> SpeedRatio:
    """How many times faster ``seconds`` are than ``reference_seconds``, pair by pair.

    The geometric mean of ``reference_seconds / seconds``. Mean, intervals and tests are those of the log ratios, so
    that twice as fast and half as fast weigh the same.

    Args:
        reference_seconds: Wall seconds of each run of the reference, such as uniform LoRA.
        seconds: The same of the other side with everything it had to pay; for a selection, its probe.
        models: The model of each pair: seeds of one model are one group. None: every pair is a model of its own.
        confidence: Of all intervals.
        rng: Draws the bootstrap's resamples; without one there is no bootstrap interval.
        num_resamples: Drawn by the bootstrap.

    Raises:
        ValueError: As :func:`~aletheia_lora.statistics.paired_difference`, and if a number is not above 0.
    """
    slow, fast = pairs(reference_seconds, seconds)
    shortest = min(slow.min(), fast.min())
    if shortest <= 0:
        raise ValueError(f"{shortest:g} seconds, expected more than 0. Leave out runs that have no time.")
    names = [str(name) for name in (range(len(slow)) if models is None else models)]
    logs = np.log(slow), np.log(fast)
    found = paired_difference(*logs, groups=names, confidence=confidence, rng=rng, num_resamples=num_resamples)
    own = {name: [a - b for a, b, of in zip(*logs, names, strict=True) if of == name] for name in names}
    means = {name: float(np.mean(own[name])) for name in own}
    return SpeedRatio(
        n=found.n,
        num_models=found.num_groups,
        ratio=float(np.exp(found.mean)),
        time_saved_share=float(-np.expm1(-found.mean)),
        interval=_of_ratios(found.interval),
        bootstrap=None if found.bootstrap is None else _of_ratios(found.bootstrap),
        t_p_value=found.t_p_value,
        wilcoxon_p_value=found.wilcoxon_p_value,
        effect=found.effect,
        win_rate=win_rate(list(means.values()), confidence=confidence),
        model_ratios={name: float(np.exp(mean)) for name, mean in means.items()},
    )


def win_rate(differences: Numbers, *, confidence: float = CONFIDENCE) -> WinRate:
    """Share of models whose difference is above 0, with Clopper and Pearson's exact interval (1934).

    Args:
        differences: One number per model, above 0 where it wins; a tie is no win.
        confidence: Of the interval.

    Raises:
        ValueError: If there are none, or one is NaN or infinite.
    """
    values = finite("differences", differences)
    wins = int((values > 0).sum())
    low, high = stats.binomtest(wins, len(values)).proportion_ci(confidence)
    return WinRate(
        wins, len(values), wins / len(values), Interval(float(low), float(high), confidence, "Clopper-Pearson")
    )


def loss_at(seconds: Numbers, losses: Numbers, at: float) -> float:
    """Held-out loss after ``at`` seconds, on the straight line between the looks before and after.

    Raises:
        ValueError: If seconds do not rise from look to look, or ``at`` lies outside them: nothing is extrapolated.
    """
    times, values = pairs(seconds, losses)
    if (np.diff(times) <= 0).any():
        raise ValueError("seconds do not rise from look to look. Sort the looks by time and keep one for each.")
    if not times[0] <= at <= times[-1]:
        raise ValueError(f"no loss after {at:g} s: the looks are from {times[0]:g} to {times[-1]:g} s.")
    return float(np.interp(at, times, values))


def time_matched(
    seconds: Numbers, losses: Numbers, reference_seconds: Numbers, reference_losses: Numbers, *, at: float | None = None
) -> MatchedLoss:
    """The losses of two runs after the same seconds: ``at``, or else the last second that both have reached.

    One pair of runs is no evidence: give the losses of several to
    :func:`~aletheia_lora.statistics.paired_difference`.

    Raises:
        ValueError: As :func:`loss_at`.
    """
    own, other = finite("seconds", seconds), finite("reference_seconds", reference_seconds)
    moment = float(min(own[-1], other[-1])) if at is None else float(at)
    loss, reference = loss_at(own, losses, moment), loss_at(other, reference_losses, moment)
    return MatchedLoss("seconds", moment, moment, loss, reference, loss - reference)


def parameter_matched(
    loss: float, trainable_params: int, reference_loss: float, reference_params: int, *, tolerance: float = 0.02
) -> MatchedLoss:
    """The losses of two runs that train the same number of parameters, up to ``tolerance`` of the reference's.

    Raises:
        ValueError: If a loss is NaN or infinite, or the numbers of parameters differ by more.
    """
    own, other = finite("losses", [loss, reference_loss]).tolist()
    if not abs(trainable_params - reference_params) <= tolerance * reference_params:
        raise ValueError(
            f"{trainable_params:,} trainable parameters against {reference_params:,}: they differ by more than "
            f"{tolerance:.0%}. Choose ranks with the allocation 'matched', or raise the tolerance and say so."
        )
    return MatchedLoss("trainable_params", trainable_params, reference_params, own, other, own - other)


def spearman(scores: Numbers, usefulness: Numbers, *, confidence: float = CONFIDENCE) -> Spearman:
    """Rank correlation of layer scores with what adapting the layers turned out to be worth.

    The interval is Fisher's z with the variance ``(1 + rho^2 / 2) / (n - 3)`` of Bonett and Wright, "Sample size
    requirements for estimating Pearson, Kendall and Spearman correlations" (2000). The formula knows no uncertainty
    at a perfect ranking, so that one counts as half a swap of neighbours away from perfect.

    Raises:
        ValueError: If there are fewer than four pairs, lengths differ, a number is NaN, or one list is constant.
    """
    first, second = pairs(scores, usefulness)
    n = len(first)
    if n < 4:
        raise ValueError(f"n = {n}: no interval of a rank correlation from fewer than 4 pairs.")
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        raise ValueError("all numbers of one list are equal, so they rank nothing. Say that the profile is flat.")
    found = stats.spearmanr(first, second)
    rho = float(found.statistic)
    limit = 1 - 6 / (n * (n**2 - 1))
    centre = np.arctanh(np.clip(rho, -limit, limit))
    reach = stats.norm.ppf((1 + confidence) / 2) * np.sqrt((1 + rho**2 / 2) / (n - 3))
    low, high = min(float(np.tanh(centre - reach)), rho), max(float(np.tanh(centre + reach)), rho)
    return Spearman(n, rho, Interval(low, high, confidence, "Fisher z, Bonett-Wright"), float(found.pvalue))


def _of_ratios(interval: Interval) -> Interval:
    low, high = float(np.exp(interval.low)), float(np.exp(interval.high))
    return Interval(low, high, interval.confidence, f"{interval.method} of log ratios")
