"""What a probe measured: a mapping from layer to score, with everything the score was made from.

A :class:`ProbeResult` is a plain record. It is written by ``probe.py``, read by ``scores.py`` and everything after
it, saved as JSON and read back without torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import ProbeError
from .files import write_json

Method = Literal["formed", "gram", "autograd"]
Mode = Literal["auto", "exact", "gram"]
Kernel = tuple[tuple[float, ...], ...]
FORMAT = "aletheia-probe/1"
FLAT_SPREAD = 2.5
# Records from before these were measured lack them.
OPTIONAL = frozenset({"timing", "row_lengths", "expert_loads", "kernels"})
NESTED = frozenset({"timing", "tensors", "expert_loads"})


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Gradient statistics of one weight tensor over the probe batches."""

    name: str
    layer_idx: int
    kind: str
    """``attention``, ``mlp``, ``expert``, ``mixer``; ``router``, or ``other`` for all else that gets no adapter."""
    num_params: int
    method: Method
    """How the norm was found: the gradient ``formed`` and dropped, its ``gram`` form, or ``autograd``'s own."""
    grad_norm: tuple[float, ...]
    """Frobenius norm of d(mean token loss)/d(weight), one per batch."""
    taylor: tuple[float, ...] | None = None
    """Sum of |weight * gradient| per batch; None where the gradient itself was never formed."""
    weight_norm: float | None = None
    """Frobenius norm of the weight; None where it is stored quantized."""
    expert_grad_norm: tuple[float, ...] | None = None
    """Of a stack of experts: Frobenius norm of each expert's gradient, summed over batches; None for all else."""
    descent: float | None = None
    """Sum of |d(mean loss over all batches)/dB| of a fresh adapter W + B A of rank 16 on this weight: what the first
    step of Adam lowers the loss by, per unit of learning rate, to first order. None where it was not measured."""

    @property
    def adaptable(self) -> bool:
        """True if an adapter can sit on this tensor."""
        return self.kind not in ("other", "router")


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Tokens that the router of a layer sent to each of its experts, over all probe batches."""

    name: str
    """Full name of the module that holds the experts."""
    layer_idx: int
    num_tokens: tuple[int, ...]
    """Tokens that each expert received, padding excluded; a token counts once for each expert that it is sent to."""

    @property
    def share(self) -> tuple[float, ...]:
        """What each expert received of all that was sent; adds up to 1. NaN if nothing was."""
        total = sum(self.num_tokens)
        return tuple(count / total if total else float("nan") for count in self.num_tokens)

    @property
    def effective_experts(self) -> float:
        """exp(entropy of the shares): the number of experts if they share evenly, 1 if one gets everything."""
        share = np.asarray(self.share)
        return float(np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1.0)))))


@dataclass(frozen=True, slots=True)
class AdapterTiming:
    """What an adapter on a matrix of this shape adds to a training step, measured on its own."""

    in_features: int
    out_features: int
    fixed_seconds: float
    """Forward and backward whatever the rank: passes over inputs and outputs."""
    seconds_per_rank: float
    """What each rank adds to that."""


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Where the time of each batch went: of batches as training sees them, or of the probe's, without its norms."""

    device: str
    """Device type, e.g. ``cpu``."""
    forward: tuple[tuple[float, ...], ...]
    """Seconds of each layer's forward, one tuple per batch."""
    backward: tuple[tuple[float, ...], ...]
    """Seconds of each layer's backward: gradients of activations, none of frozen matrices; one tuple per batch."""
    outside: tuple[float, ...]
    """Seconds outside the layers per batch, forward and backward: embedding, mask, last norm, head and loss."""
    num_rows: tuple[int, ...]
    """Rows of each batch."""
    lengths: tuple[int, ...]
    """Tokens of a row of each batch, padding included."""
    num_labelled: tuple[int, ...]
    """Tokens of each batch that got logits."""
    adapters: tuple[AdapterTiming, ...] = ()
    """What adapters cost on each shape of matrix, on a batch of ``adapter_tokens``; empty if not measured."""
    adapter_tokens: int = 0
    """Tokens that ``adapters`` were measured for."""
    num_first: int = 1
    """How many batches, from the start, were the first of their process, and so warmed caches up."""

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> StepTiming:
        """Read back what ``dataclasses.asdict`` wrote, from JSON or not."""
        fields = _with_tuples(record)
        for key in ("forward", "backward"):
            fields[key] = tuple(tuple(batch) for batch in record[key])
        fields["adapters"] = tuple(AdapterTiming(**entry) for entry in record["adapters"])
        fields.pop("batching", None)  # of records from before a batch of training was timed
        return cls(**fields)


@dataclass(frozen=True, eq=False)
class ProbeResult(Mapping[int, float]):
    """``layer_idx -> score`` by the paper's definition, carrying all statistics.

    The score of layer l is the sum over batches, then over the tensors p of the layer, of ||dLoss/dp||_2
    (Saket, "Aletheia", arXiv 2604.15351, the layer score).
    """

    fingerprint: str
    """Fingerprint of the model that was probed (:attr:`ModelAnatomy.fingerprint`)."""
    num_layers: int
    tensors: tuple[TensorStatistics, ...]
    losses: tuple[float, ...]
    """Mean loss per labelled token of each batch, in nats."""
    num_tokens: tuple[int, ...]
    """Tokens of each batch, padding excluded."""
    num_labelled_tokens: tuple[int, ...]
    """Tokens of each batch that carry a label, i.e. enter the loss."""
    batch_size: int
    """Rows in a batch, the largest if they differ."""
    seconds: float
    """Wall time of the whole probe."""
    peak_memory_bytes: int | None
    """Highest memory above that before the probe: allocator on a GPU, resident set on a CPU; None where unreadable."""
    mode: str
    """``auto``, ``exact`` or ``gram``, as asked."""
    timing: StepTiming | None = None
    """Where the time of the batches went; None where it could not be told."""
    row_lengths: tuple[int, ...] = ()
    """Tokens of the rows that training will see, ascending (at most 101, evenly spread); empty if not known."""
    expert_loads: tuple[ExpertLoad, ...] = ()
    """Tokens of each expert, an entry per layer with stacked experts; empty in records from before that."""
    kernels: tuple[Kernel, ...] | None = None
    """Of each layer, in order, the inner product of its gradients on batches i and j, (num_batches, num_batches):
    over the weights of its linear maps, stacked experts left out, estimated from sketches. None if not measured."""

    def __getitem__(self, layer_idx: int) -> float:
        return (
            float(self.batch_scores()[layer_idx].sum())
            if 0 <= layer_idx < self.num_layers
            else self._missing(layer_idx)
        )

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.num_layers))

    def __len__(self) -> int:
        return self.num_layers

    def _missing(self, layer_idx: int) -> float:
        raise KeyError(f"layer {layer_idx}: the probed model has layers 0 to {self.num_layers - 1}")

    @property
    def num_batches(self) -> int:
        """Batches that were probed."""
        return len(self.losses)

    def batch_scores(self) -> NDArray[np.float64]:
        """The paper's score of each layer on each batch, shape (num_layers, num_batches)."""
        table = np.zeros((self.num_layers, self.num_batches))
        for tensor in self.tensors:
            table[tensor.layer_idx] += np.asarray(tensor.grad_norm)
        return table

    def standard_errors(self) -> NDArray[np.float64]:
        """Standard error of each layer's summed score over batches, shape (num_layers,); NaN for one batch."""
        if self.num_batches < 2:
            return np.full(self.num_layers, np.nan)
        table = self.batch_scores()
        return np.asarray(table.std(axis=1, ddof=1) * np.sqrt(self.num_batches))

    @property
    def spread(self) -> float:
        """Largest score over smallest, max/min; infinite if a layer scores 0."""
        scores = self.batch_scores().sum(axis=1)
        return float(scores.max() / scores.min()) if scores.min() > 0 else float("inf")

    @property
    def is_flat(self) -> bool:
        """True if the profile hardly discriminates: spread under 2.5 (see arXiv 2605.07366)."""
        return self.spread < FLAT_SPREAD

    def split_half_overlap(self, percent: float = 50) -> float:
        """Jaccard overlap of the top ``percent`` layers of odd and of even batches, 0 to 1; NaN for one batch."""
        if self.num_batches < 2:
            return float("nan")
        table = self.batch_scores()
        count = max(int(self.num_layers * percent / 100), 1)
        halves = [set(np.argsort(-table[:, start::2].sum(axis=1), kind="stable")[:count].tolist()) for start in (0, 1)]
        return len(halves[0] & halves[1]) / len(halves[0] | halves[1])

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types, with the derived scores beside it for human readers."""
        errors = self.standard_errors()
        return {
            "format": FORMAT,
            **{key: getattr(self, key) for key in self.__dataclass_fields__ if key not in NESTED},
            "timing": None if self.timing is None else asdict(self.timing),
            "scores": [self[layer] for layer in self],
            "standard_errors": [float(error) for error in errors],
            "spread": self.spread,
            "split_half_overlap": self.split_half_overlap(),
            "expert_loads": [asdict(load) for load in self.expert_loads],
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ProbeResult:
        """Read back what :meth:`to_dict` wrote.

        Raises:
            ProbeError: If the record is of another format or lacks a field; the message names it.
        """
        if record.get("format") != FORMAT:
            raise ProbeError(f"not a probe record: format is {record.get('format')!r}, expected {FORMAT!r}.")
        missing = [key for key in cls.__dataclass_fields__ if key not in record and key not in OPTIONAL]
        if missing:
            raise ProbeError(f"the probe record lacks {missing}. Run the probe again.")
        fields = {key: record[key] for key in cls.__dataclass_fields__ if key in record}
        for key in ("losses", "num_tokens", "num_labelled_tokens", "row_lengths"):
            fields[key] = tuple(fields.get(key, ()))
        fields["timing"] = None if fields.get("timing") is None else StepTiming.from_dict(fields["timing"])
        fields["tensors"] = tuple(TensorStatistics(**_with_tuples(tensor)) for tensor in record["tensors"])
        if fields.get("kernels") is not None:
            fields["kernels"] = tuple(tuple(tuple(row) for row in kernel) for kernel in fields["kernels"])
        fields["expert_loads"] = tuple(ExpertLoad(**_with_tuples(load)) for load in fields.get("expert_loads", ()))
        return cls(**fields)

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON, whole or not at all."""
        return write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """Read a record written by :meth:`save`.

        Raises:
            ProbeError: If the file is not a probe record.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ProbeError(f"{str(path)!r} is not JSON (line {error.lineno}): {error.msg}.") from error


def merged(parts: Sequence[ProbeResult]) -> ProbeResult:
    """The result of all batches from those of several processes, of which part r measured batches r, r + n, ...

    Statistics, losses, tokens and timing come in the order of batches. Seconds and memory are those of the slowest and
    the largest process. A part without batches counts for nothing; one part alone is the result.
    """
    if len(parts) == 1:
        return parts[0]
    used = [part for part in parts if part.num_batches]
    last = used[(sum(part.num_batches for part in used) - 1) % len(parts)]

    def in_turns(columns: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
        return tuple(column[turn] for turn in range(len(columns[0])) for column in columns if turn < len(column))

    def tensor(index: int) -> TensorStatistics:
        mine = [part.tensors[index] for part in used]
        taylors = [entry.taylor for entry in mine if entry.taylor is not None]
        return replace(
            last.tensors[index],
            grad_norm=in_turns([entry.grad_norm for entry in mine]),
            taylor=in_turns(taylors) if len(taylors) == len(mine) else None,
            expert_grad_norm=_added([entry.expert_grad_norm for entry in mine]),
        )

    def load(index: int) -> ExpertLoad:
        mine = [part.expert_loads[index] for part in used]
        return replace(mine[0], num_tokens=_added([entry.num_tokens for entry in mine]) or ())

    timings = [part.timing for part in used if part.timing is not None]
    timing = None
    if len(timings) == len(used):
        columns = ("forward", "backward", "outside", "num_rows", "lengths", "num_labelled")
        together: dict[str, Any] = {name: in_turns([getattr(each, name) for each in timings]) for name in columns}
        timing = replace(timings[0], **together, num_first=len(used))
    peaks = [part.peak_memory_bytes for part in used if part.peak_memory_bytes is not None]
    return replace(
        used[0],
        tensors=tuple(tensor(index) for index in range(len(used[0].tensors))),
        losses=in_turns([part.losses for part in used]),
        num_tokens=in_turns([part.num_tokens for part in used]),
        num_labelled_tokens=in_turns([part.num_labelled_tokens for part in used]),
        batch_size=max(part.batch_size for part in used),
        seconds=max(part.seconds for part in parts),
        peak_memory_bytes=max(peaks) if len(peaks) == len(used) else None,
        timing=timing,
        expert_loads=tuple(load(index) for index in range(len(used[0].expert_loads))),
    )


def _added(rows: Sequence[tuple[Any, ...] | None]) -> tuple[Any, ...] | None:
    """Sums entry by entry; None where a row is missing."""
    present = [row for row in rows if row is not None]
    return tuple(map(sum, zip(*present, strict=True))) if len(present) == len(rows) else None


def _with_tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries with each list, as JSON has it, a tuple again."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
