"""An anatomy, a probe and a batch size -> what a training step costs, in time and bytes, for any choice of layers.

Comes in: what planning knows. Goes out: the :class:`CostModel` and :class:`MemoryModel` that choose the layers, and a
:class:`Prediction` for one choice. Both are for batches as training will see them, not for those that were probed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .activations import Activations
from .anatomy import ModelAnatomy
from .calibration import calibrated_cost
from .cost import CostModel, Ranks, Source, StepShape, cost_model
from .memory import MemoryModel, in_words, memory_model
from .probe_result import ProbeResult

MAX_LENGTHS = 101


@dataclass(frozen=True, slots=True)
class BatchShape:
    """What the batches of training look like."""

    num_rows: int
    """Rows in a batch."""
    mean_length: float
    """Tokens of a row on average, padding included where it is computed."""
    max_length: int
    """Tokens of the longest row."""
    labelled_per_row: float
    """Tokens of a row that carry a label, on average."""
    max_labelled: int
    """Tokens that carry a label in a batch of the longest rows."""

    @property
    def step(self) -> StepShape:
        """The average batch, for predictions of time."""
        length = max(round(self.mean_length), 1)
        tokens = self.num_rows * length
        labelled = min(max(round(self.num_rows * self.labelled_per_row), 1), tokens)
        return StepShape(num_tokens=tokens, num_labelled_tokens=labelled, sequence_length=length)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a step of the planned adapters is predicted to take, beside a step of uniform LoRA."""

    seconds: float | None
    """Of forward, backward and loss on an average batch; None where nothing was timed."""
    uniform_seconds: float | None
    """The same for uniform LoRA under the same switches."""
    bytes: int
    """At the highest point of a step on a batch of the longest rows, on one device."""
    uniform_bytes: int
    """The same for uniform LoRA under the same switches."""
    time_from: Source
    """``calibrated`` by the probe's timing, or ``counted`` from shapes."""
    memory_from: Activations
    """How the activations were found, see :class:`~aletheia_lora.memory.MemoryModel`."""
    num_rows: int
    mean_length: float
    max_length: int

    def describe(self) -> str:
        """One sentence for people."""
        time = ""
        if self.seconds is not None and self.uniform_seconds is not None:
            time = f"{self.seconds:.3g} s a step against {self.uniform_seconds:.3g} s of uniform LoRA, "
        return (
            f"predicted ({self.time_from} time, {self.memory_from} memory): {time}{in_words(self.bytes)} at most "
            f"against {in_words(self.uniform_bytes)}; batches of {self.num_rows} rows, {self.mean_length:.0f} tokens "
            f"on average and {self.max_length} at most"
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)


def batch_shape(measured: ProbeResult, batch_size: int, *, padded: bool = False) -> BatchShape:
    """The shape of training batches, from the lengths of rows that were seen.

    Args:
        measured: What the probe saw.
        batch_size: Rows in a batch.
        padded: Every row is computed up to the longest of its batch: on average the expected longest of ``batch_size``
            rows drawn from those lengths.
    """
    rows = measured.row_lengths or tuple(sorted(tokens // measured.batch_size for tokens in measured.num_tokens))
    lengths = np.maximum(np.sort(np.asarray(rows)), 1)
    labelled = sum(measured.num_labelled_tokens) / max(sum(measured.num_tokens), 1)
    return BatchShape(
        num_rows=batch_size,
        mean_length=_mean_longest(lengths, batch_size) if padded else float(lengths.mean()),
        max_length=int(lengths[-1]),
        labelled_per_row=float(lengths.mean()) * labelled,
        max_labelled=max(round(batch_size * int(lengths[-1]) * labelled), 1),
    )


def _mean_longest(ascending: NDArray[np.int64], count: int) -> float:
    """Expected longest of ``count`` lengths drawn from these, with replacement."""
    no_longer = (np.arange(len(ascending) + 1) / len(ascending)) ** count
    return float(ascending @ np.diff(no_longer))


def length_profile(lengths: Sequence[int]) -> tuple[int, ...]:
    """The lengths in ascending order; of many rows 101 that are evenly spread, the shortest and longest among them."""
    ordered = sorted(lengths)
    if len(ordered) <= MAX_LENGTHS:
        return tuple(ordered)
    return tuple(ordered[round(index * (len(ordered) - 1) / (MAX_LENGTHS - 1))] for index in range(MAX_LENGTHS))


def probe_cost(
    found: ModelAnatomy,
    measured: ProbeResult,
    batch_size: int,
    *,
    calibrate: bool = True,
    targets: Sequence[str] | None = None,
    padded: bool = False,
) -> CostModel:
    """The cost of a training step: calibrated where the probe kept its time and ``calibrate`` is on, else counted."""
    shape = batch_shape(measured, batch_size, padded=padded).step
    if measured.timing is None or not calibrate:
        return cost_model(found, shape, targets=targets)
    return calibrated_cost(found, shape, measured.timing, targets=targets)


def probe_memory(
    found: ModelAnatomy,
    measured: ProbeResult,
    batch_size: int,
    *,
    model: Any = None,
    targets: Sequence[str] | None = None,
) -> MemoryModel:
    """The bytes of a training step on a batch of the longest rows; by formula where there is no model."""
    shape = batch_shape(measured, batch_size)
    return memory_model(
        found,
        num_rows=shape.num_rows,
        length=shape.max_length,
        num_labelled=shape.max_labelled,
        model=model,
        targets=targets,
    )


def predict(
    cost: CostModel,
    memory: MemoryModel,
    shape: BatchShape,
    layers: Sequence[int],
    *,
    rank: Ranks,
    uniform_rank: int,
    checkpointing: bool,
    prefix_cached: bool,
) -> Prediction:
    """Time and bytes of a step of these layers, beside those of uniform LoRA.

    Raises:
        PlanError: If a layer does not exist or has no rank.
    """
    step = cost.step(layers, rank=rank, checkpointing=checkpointing, prefix_cached=prefix_cached)
    uniform = cost.uniform(rank=uniform_rank, checkpointing=checkpointing)
    timed = cost.unit == "seconds"
    return Prediction(
        seconds=step if timed else None,
        uniform_seconds=uniform if timed else None,
        bytes=memory.step(layers, rank=rank, checkpointing=checkpointing, prefix_cached=prefix_cached),
        uniform_bytes=memory.step(range(memory.num_layers), rank=uniform_rank, checkpointing=checkpointing),
        time_from=cost.source,
        memory_from=memory.activations,
        num_rows=shape.num_rows,
        mean_length=shape.mean_length,
        max_length=shape.max_length,
    )


def prediction_from_dict(record: Mapping[str, Any] | None) -> Prediction | None:
    """Read back what :meth:`Prediction.to_dict` wrote; None stays None."""
    return None if record is None else Prediction(**record)
