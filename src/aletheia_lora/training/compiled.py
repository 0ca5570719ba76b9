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
from ..placement import input_device
from ..processes import world_size

CHECKPOINTED = "checkpointing runs the layers as they are. Leave out one of the two."
RECOMPILE_LIMIT = 64
"""Kinds of layers and batches that are compiled before torch gives up on one; its own limit is 8."""


class CompiledLayers:
    """Compiled forwards on every decoder layer; :meth:`remove` gives each its own back."""

    def __init__(self, base_model: nn.Module) -> None:
        """Have each layer compiled when it first runs, and anew for what it has not met, such as another width.

        Args:
            base_model: The model inside PEFT's wrapper.
        """
        settings = torch._dynamo.config
        self._limit, settings.recompile_limit = settings.recompile_limit, max(settings.recompile_limit, RECOMPILE_LIMIT)
        blocks = [block for layer in layer_blocks(base_model) for block in layer]
        self._own = [(block, vars(block).get("forward")) for block in blocks]
        for block in blocks:
            block.forward = torch.compile(block.forward)

    def remove(self) -> None:
        """Run the layers as before."""
        for block, own in self._own:
            vars(block).pop("forward", None)
            if own is not None:
                block.forward = own
        self._own = []
        torch._dynamo.config.recompile_limit = self._limit


def check_compiles(model: nn.Module, *, checkpointing: bool = False) -> None:
    """Check that the layers of a model can be compiled here, before anything is attached to it.

    Args:
        model: The model, adapted or not.
        checkpointing: True if training will checkpoint activations.

    Raises:
        ConfigError: With activation checkpointing, in several processes or on several devices, which hook into the
            layers, and where something compiled does not run: with the compiler's own reason, such as a missing C++
            compiler or Triton.
    """
    if checkpointing:
        raise ConfigError(f"compile_layers: {CHECKPOINTED}")
    if world_size() > 1 or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        raise ConfigError("compile_layers is for one process and one device. Leave it out.")
    device = input_device(model)
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
