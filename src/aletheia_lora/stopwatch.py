"""A model under way -> the seconds that each of its layers takes, by hooks at the layers' borders.

Comes in: a model that somebody else runs forward and backward. Goes out: a :class:`StepTiming`. On a GPU the borders
are events on its stream, so nothing waits; on a CPU they are readings of the clock.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layers import layer_blocks
from .loss import num_labelled
from .probe_result import StepTiming


class Stopwatch:
    """Hooks on the layer blocks; :meth:`close` removes them.

    Forward of a layer lasts from its call to its return. Backward of a layer begins when the gradient of its output is
    complete, and ends when that of the next lower layer is, or with the whole backward. What happens inside
    :meth:`paused` counts for nobody.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        blocks = layer_blocks(model)
        self.num_layers = len(blocks)
        self.handles: list[Any] = []
        for layer_idx, part in enumerate(blocks):
            for block in part:
                self.handles.append(block.register_forward_pre_hook(self._before(layer_idx)))
                self.handles.append(block.register_forward_hook(self._after(layer_idx)))
        self.batches: list[tuple[list[float], list[float], float]] = []
        self.shapes: list[tuple[int, int, int]] = []
        """Rows, tokens of a row and labelled tokens of each batch."""
        self._clear()

    def _clear(self) -> None:
        self.entered: dict[int, Any] = {}
        self.forwards: list[tuple[int, Any, Any]] = []
        """Layer, start and end of each block's forward."""
        self.borders: list[tuple[int, Any]] = []
        """Layer, and the moment when the gradient of its output was complete."""
        self.pauses: list[tuple[int, Any, Any]] = []
        """Borders passed before it, start and end of each pause."""
        self.in_backward = False

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return float(end - start) if self.device.type != "cuda" else float(start.elapsed_time(end)) / 1000

    def _before(self, layer_idx: int) -> Callable[..., None]:
        def enter(_module: nn.Module, _args: Any) -> None:
            if not self.in_backward:  # a checkpoint that recomputes is part of backward
                self.entered[layer_idx] = self._now()

        return enter

    def _after(self, layer_idx: int) -> Callable[..., None]:
        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            if self.in_backward or layer_idx not in self.entered:
                return
            self.forwards.append((layer_idx, self.entered.pop(layer_idx), self._now()))
            hidden = output[0] if isinstance(output, tuple | list) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _gradient: self.borders.append((layer_idx, self._now())))

        return leave

    def start(self) -> None:
        """A batch begins."""
        self._clear()
        self.started = self._now()

    def turn(self) -> None:
        """Forward is over, backward begins."""
        self.in_backward = True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While open, time counts for no layer."""
        start = self._now()
        try:
            yield
        finally:
            self.pauses.append((len(self.borders), start, self._now()))

    def stop(self, batch: Mapping[str, Tensor]) -> None:
        """Backward is over: sum up the batch."""
        ended = self._now()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        forward, backward = [0.0] * self.num_layers, [0.0] * self.num_layers
        for layer_idx, start, end in self.forwards:
            forward[layer_idx] += self._seconds(start, end)
        lost = [0.0] * (len(self.borders) + 1)
        for passed, start, end in self.pauses:
            lost[passed] += self._seconds(start, end)
        ends = [*(mark for _, mark in self.borders[1:]), ended]
        for index, ((layer_idx, mark), end) in enumerate(zip(self.borders, ends, strict=True)):
            backward[layer_idx] += self._seconds(mark, end) - lost[index + 1]
        outside = self._seconds(self.started, ended) - sum(forward) - sum(backward) - sum(lost)
        self.batches.append((forward, backward, outside))
        rows, length = batch["input_ids"].shape
        self.shapes.append((int(rows), int(length), num_labelled(batch)))
        self._clear()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def timing(self) -> StepTiming | None:
        """The record of all batches; None where a layer was not seen, forward and backward, in each of them."""
        if not self.batches or any(min(*batch[0], *batch[1]) <= 0 for batch in self.batches):
            return None
        return StepTiming(
            device=self.device.type,
            forward=tuple(tuple(forward) for forward, _, _ in self.batches),
            backward=tuple(tuple(backward) for _, backward, _ in self.batches),
            outside=tuple(max(outside, 0.0) for _, _, outside in self.batches),
            num_rows=tuple(rows for rows, _, _ in self.shapes),
            lengths=tuple(length for _, length, _ in self.shapes),
            num_labelled=tuple(labelled for _, _, labelled in self.shapes),
        )
