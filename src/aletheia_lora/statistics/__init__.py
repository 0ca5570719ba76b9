"""Numbers in pairs -> differences with intervals, tests, equivalence and corrections. NumPy and SciPy, no torch."""

from .paired import bootstrap_interval, effect_size, equivalence, holm, mcnemar, paired_difference
from .records import (
    EffectSize,
    Equivalence,
    Holm,
    Interval,
    MatchedLoss,
    McNemar,
    PairedDifference,
    Spearman,
    SpeedRatio,
    WinRate,
)
from .runs import loss_at, parameter_matched, spearman, speed_ratio, time_matched, win_rate

__all__ = [
    "EffectSize",
    "Equivalence",
    "Holm",
    "Interval",
    "MatchedLoss",
    "McNemar",
    "PairedDifference",
    "Spearman",
    "SpeedRatio",
    "WinRate",
    "bootstrap_interval",
    "effect_size",
    "equivalence",
    "holm",
    "loss_at",
    "mcnemar",
    "paired_difference",
    "parameter_matched",
    "spearman",
    "speed_ratio",
    "time_matched",
    "win_rate",
]
