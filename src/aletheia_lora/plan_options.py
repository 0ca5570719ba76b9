"""What a person may ask of a plan: how to probe, score, choose and rank, and what to adapt with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .adapter_options import AdapterOptions
from .memory import parse_bytes
from .methods import method_of
from .probe_result import Mode

EXTRAS: dict[str, dict[str, Any]] = {
    "taylor": {"taylor": True},
    "adapter_descent": {"descent": True},
    "diverse": {"kernels": True},
}
"""Scores and strategies that read what not every probe measures -> the argument with which ``probe`` does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """How a plan is made."""

    score: str = "gradient_norm"
    """Which statistic scores a layer: a key of ``scores.SCORES``."""
    strategy: str = "budget"
    """Which rule chooses the layers: a key of ``selection.STRATEGIES``."""
    percent: float = 50
    """Share of layers to choose, for strategies that go by number."""
    num_layers: int | None = None
    """Number of layers to choose; overrides ``percent`` and caps ``budget``."""
    mass: float = 0.8
    """Share of the total score to hold, for ``mass``."""
    time_budget: float = 0.8
    """Predicted step time allowed, as a share of uniform LoRA's, for ``budget``; 1 leaves memory to decide."""
    memory_budget: int | str | None = None
    """Predicted memory allowed at the highest point of a step, for ``budget``: bytes, or text such as ``24GiB``."""
    batch_size: int = 4
    """Rows in a batch of training, which predictions are made for."""
    gradient_checkpointing: bool = False
    """Training will recompute activations from the lowest layer up."""
    prefix_cache: bool = False
    """Predict later epochs of a training that keeps the input of the lowest layer."""
    calibrate: bool = False
    """Choose by what the probe timed here, adapters timed besides; without, by counts: the same choice everywhere."""
    allocation: str = "matched"
    """Which rule gives the ranks: a key of ``allocation.ALLOCATIONS``."""
    rank: int = 16
    """Rank of uniform LoRA, the yardstick for parameters and time."""
    attention_rank: int = 16
    """Rank of attention modules under ``asymmetric``."""
    mlp_rank: int = 64
    """Rank of MLP modules and experts under ``asymmetric``."""
    max_rank: int | None = None
    """Highest rank that ``matched`` and ``proportional`` may give; many servers load 16 at most by default."""
    alpha_ratio: float = 2.0
    """lora_alpha / rank, the same on every module."""
    targets: tuple[str, ...] | None = None
    """Leaf or full module names to adapt; all that can be adapted if left out."""
    lora_dropout: float = 0.0
    """Dropout before the adapters, LoRA's only like the next five, which are as in ``AdapterOptions``."""
    use_dora: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    init_lora_weights: str = "default"
    modules_to_save: tuple[str, ...] | None = None
    adapter: str = "lora"
    """What the chosen layers get: a key of ``methods.METHODS``. The choice itself counts with LoRA's cost."""
    probe_batches: int = 8
    """Batches read by the probe."""
    probe_batch_size: int = 1
    """Rows in a probe batch."""
    probe_mode: Mode = "auto"
    """``exact``, ``gram`` or the cheaper of the two for each weight."""
    seed: int = 0
    """Seed of everything random in the plan."""

    def __post_init__(self) -> None:
        """Check what no later room checks."""
        parse_bytes(self.memory_budget)
        method_of(self.adapter)
        _ = self.adapter_options  # it checks its own fields
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}, expected at least 1.")

    @property
    def extras(self) -> tuple[str, ...]:
        """The score and the strategy, each if it is a key of :data:`EXTRAS`."""
        return tuple(name for name in (self.score, self.strategy) if name in EXTRAS)

    @property
    def probe_extras(self) -> dict[str, Any]:
        """The arguments with which ``probe`` measures what score and strategy read."""
        return {key: value for name in self.extras for key, value in EXTRAS[name].items()}

    @property
    def adapter_options(self) -> AdapterOptions:
        """What the adapters are besides rank and alpha."""
        return AdapterOptions(**{name: getattr(self, name) for name in AdapterOptions.__dataclass_fields__})
