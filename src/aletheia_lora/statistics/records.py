"""What the statistics hand out: small frozen records that say n and method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A confidence interval and the way it was made."""

    low: float
    high: float
    confidence: float
    method: str

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class EffectSize:
    """How large a paired difference is against its own spread; NaN where there is no spread."""

    cohen_d: float
    """Mean difference over the standard deviation of the differences (Cohen's d_z)."""
    hedges_g: float
    """``cohen_d`` times Hedges' correction for few pairs; NaN for two pairs, where none exists."""
    rank_biserial: float
    """Matched-pairs rank-biserial correlation: share of the rank sum that favours the first side minus the rest."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class PairedDifference:
    """Mean of ``values - references`` over pairs."""

    n: int
    num_groups: int
    mean: float
    standard_error: float
    interval: Interval
    bootstrap: Interval | None
    t_p_value: float
    wilcoxon_p_value: float
    effect: EffectSize

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class WinRate:
    """In how many models the mean is on the winning side; a tie counts as no win."""

    wins: int
    num_models: int
    rate: float
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class SpeedRatio:
    """How many times faster one side is: geometric mean of paired ratios of seconds."""

    n: int
    num_models: int
    ratio: float
    time_saved_share: float
    """``1 - 1 / ratio``: the share of the reference's time that is saved."""
    interval: Interval
    bootstrap: Interval | None
    t_p_value: float
    wilcoxon_p_value: float
    effect: EffectSize
    win_rate: WinRate
    model_ratios: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class McNemar:
    """Pairs of right and wrong that changed sides, and the exact two-sided test that both changes are as likely."""

    n: int
    num_gained: int
    """Pairs where only the first side is right."""
    num_lost: int
    """Pairs where only the second side is right."""
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: is the mean difference inside (-margin, margin)?"""

    n: int
    num_groups: int
    mean: float
    margin: float
    alpha: float
    interval: Interval
    """Of confidence ``1 - 2 alpha``: it lies inside the margin exactly where ``equivalent`` is true."""
    p_value_lower: float
    """Of the test against a difference of ``-margin`` or less."""
    p_value_upper: float
    """Of the test against a difference of ``margin`` or more."""
    p_value: float
    equivalent: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Holm:
    """P-values corrected for being several, by name."""

    adjusted: dict[str, float]
    alpha: float
    rejected: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class MatchedLoss:
    """Two losses at the same number of seconds or of trainable parameters."""

    matched_by: str
    at: float
    reference_at: float
    loss: float
    reference_loss: float
    difference: float
    """``loss - reference_loss``, in nats per token; below 0 the first side is better."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Spearman:
    """Rank correlation of two lists."""

    n: int
    rho: float
    interval: Interval
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)
