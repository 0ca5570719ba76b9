"""Each layer's forward and backward through ``torch.compile`` while training runs; layers alike share what is compiled.

Layer by layer, and not the model as a whole: the wait before the first step does not grow with the depth, and hooks
between layers, those that cut backward and those that watch it, stay outside.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from ..errors import ConfigError
from ..layers import layer_blocks


class CompiledLayers:
    """Compiled forwards on every decoder layer; :meth:`remove` gives each its own back."""

    def __init__(self, base_model: nn.Module) -> None:
        """Have each layer compiled when it first runs, and anew for what it has not met, such as another width.

        Args:
            base_model: The model inside PEFT's wrapper.
        """
        blocks = [block for layer in layer_blocks(base_model) for block in layer]
        self._own = [(block, vars(block).get("forward")) for block in blocks]
        for block in blocks:
            block.forward = torch.compile(block.forward)

    def remove(self) -> None:
        """Run the layers as before."""
        for block, own in self._own:
            del block.forward
            if own is not None:
                block.forward = own
        self._own = []


def check_compiles(engine: str, device: torch.device) -> None:
    """Check that layers can be compiled here, before anything is trained.

    Args:
        engine: Who runs the steps: the name of an :class:`~aletheia_lora.training.engine.Engine`.
        device: Where the model is.

    Raises:
        ConfigError: Under an engine that hooks into the layers, or where something compiled does not run: with the
            compiler's own reason, such as a missing C++ compiler or Triton.
    """
    if engine not in ("one process", "DDP"):
        raise ConfigError(f"compile_layers is for one process or DDP, but the engine is {engine}. Leave it out.")
    reason = _compiler_fails(device)
    if reason is not None:
        raise ConfigError(
            f"compile_layers needs torch.compile, which does not work on {device}: {reason} Install what it names, or "
            "leave compile_layers out."
        )


@functools.cache
def _compiler_fails(device: torch.device) -> str | None:
    """What the compiler says to something small; None where it works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:  # whatever a compiler may raise
        return " ".join(str(error).split())[:200]
    return None
