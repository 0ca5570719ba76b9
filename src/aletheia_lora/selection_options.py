"""What the strategies of ``selection.py`` may be told: how many layers, within which budgets, by which predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .probe_result import Kernel

if TYPE_CHECKING:
    from .cost import CostModel, Ranks
    from .memory import MemoryModel


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionOptions:
    """What the strategies may be told; each reads only what its rule needs."""

    percent: float = 50
    """Layers to choose, in percent of all: ``top_percent`` and the controls."""
    num_layers: int | None = None
    """Layers to choose, as a count. Overrides ``percent``; for ``budget`` it is an upper bound."""
    mass: float = 0.8
    """Share of the total score that ``mass`` keeps, 0 to 1."""
    time_budget: float = 0.8
    """Predicted step time that ``budget`` may use, as a share of uniform LoRA's."""
    rank: int = 16
    """Rank that predictions assume, of uniform LoRA and, unless ``ranks`` is given, of the choice."""
    ranks: Mapping[int, Ranks] | None = None
    """The choice's rank for each number of chosen layers, where it depends on that."""
    seed: int = 0
    """Seed of ``random``."""
    cost: CostModel | None = None
    """What a step costs; ``budget`` and predictions of time need it."""
    memory_budget: int | None = None
    """Bytes that ``budget`` may use at the highest point of a step; None sets no limit."""
    memory: MemoryModel | None = None
    """Bytes of a step; ``memory_budget`` needs it."""
    checkpointing: bool = False
    """Predict steps with activation checkpointing from the lowest layer up, in uniform LoRA too."""
    prefix_cached: bool = False
    """Predict steps whose layers below the lowest one do not run; uniform LoRA has no prefix."""
    kernels: Sequence[Kernel] | None = None
    """Inner products of each layer's gradients, as in ``ProbeResult.kernels``; ``diverse`` needs them."""

    def __post_init__(self) -> None:
        check_percent("percent", self.percent)
        for name in ("mass", "time_budget"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected a share above 0 and at most 1.")
        for name, least in (("num_layers", 1), ("rank", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}, expected at least {least}.")
        if self.memory_budget is not None and self.memory is None:
            raise ValueError("a memory budget needs a memory model: expected options.memory. Pass memory_model(...).")

    def rank_of(self, count: int) -> Ranks:
        """Rank of the adapters where this many layers are chosen."""
        return self.rank if self.ranks is None else self.ranks[count]

    @property
    def uniform_cost(self) -> float:
        """Predicted cost of a step of uniform LoRA under these options."""
        assert self.cost is not None
        return self.cost.uniform(rank=self.rank, checkpointing=self.checkpointing)

    def time_share(self, layers: Sequence[int]) -> float:
        """Predicted step time of these layers, at the rank of so many, against uniform LoRA."""
        assert self.cost is not None
        rank = self.rank_of(len(layers))
        step = self.cost.step(layers, rank=rank, checkpointing=self.checkpointing, prefix_cached=self.prefix_cached)
        return step / self.uniform_cost

    def step_bytes(self, layers: Sequence[int]) -> int:
        """Predicted highest bytes of a step of these layers, at the rank of so many."""
        assert self.memory is not None
        rank = self.rank_of(len(layers))
        return self.memory.step(layers, rank=rank, checkpointing=self.checkpointing, prefix_cached=self.prefix_cached)


def check_percent(name: str, percent: float) -> None:
    """Refuse what is no percentage of layers.

    Raises:
        ValueError: If it is below 1 or above 100.
    """
    if not 1 <= percent <= 100:
        raise ValueError(f"{name}={percent}, expected a percentage from 1 to 100. Use 50 for half of the layers.")
