"""Backward stops at the lowest adapted layer, and a measurement that shows where it really stopped.

Below the lowest adapted layer nothing needs a gradient, so autograd builds no graph there by itself. Frameworks defeat
this by making the embedding's output require a gradient; then every backward runs to the bottom, whatever was
selected. Activation checkpointing is needed from the lowest adapted layer up only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import layer_blocks


class Truncation:
    """Hooks that end the graph at layer ``lowest`` while training runs; :meth:`remove` puts everything back."""

    def __init__(self, base_model: Any, lowest: int, *, reentrant: bool = False) -> None:
        """Cut below layer ``lowest``.

        Args:
            base_model: The model inside PEFT's wrapper.
            lowest: Lowest adapted layer; 0 cuts at the embedding only.
            reentrant: True under reentrant checkpointing, which needs an input that requires a gradient.
        """
        blocks = layer_blocks(base_model)
        self.handles = [base_model.get_input_embeddings().register_forward_hook(_detached)]
        self.flags: list[tuple[nn.Module, bool]] = []
        for block in (block for layer in blocks[:lowest] for block in layer):
            for module in block.modules():
                if getattr(module, "gradient_checkpointing", False):
                    self.flags.append((module, True))
                    module.gradient_checkpointing = False  # type: ignore[assignment]
        if reentrant:
            self.handles.append(blocks[lowest][0].register_forward_pre_hook(_require_gradient, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks and restore the checkpointing flags."""
        for handle in self.handles:
            handle.remove()
        for module, flag in self.flags:
            module.gradient_checkpointing = flag  # type: ignore[assignment]
        self.handles, self.flags = [], []


@contextlib.contextmanager
def backward_depth(base_model: nn.Module) -> Iterator[list[int]]:
    """Yield a list that fills with every layer whose output received a gradient while open: measured, not assumed.

    Its minimum is the layer where backward stopped.
    """
    reached: list[int] = []

    def watch(layer_idx: int) -> Any:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _gradient: reached.append(layer_idx))

        return after

    handles = [
        block.register_forward_hook(watch(layer_idx))
        for layer_idx, layer in enumerate(layer_blocks(base_model))
        for block in layer
    ]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


def _detached(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.detach()


def _require_gradient(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    if args and isinstance(args[0], Tensor) and torch.is_grad_enabled() and not args[0].requires_grad:
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs
    return None
