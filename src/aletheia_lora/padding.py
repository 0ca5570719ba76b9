"""A model and who trains it -> why batches are computed with their padding; None where rows are laid end to end.

Training asks it before it takes padding out, and a prediction before it counts tokens.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .anatomy import ModelAnatomy
from .placement import input_device

ROW_BY_ROW = "aletheia_row_by_row"
"""Name of our attention among those of transformers, in place of sdpa while training runs."""


def why_padded(found: ModelAnatomy, model: nn.Module, *, trl_loss: bool, engine: str | None = None) -> str | None:
    """Why our trainer computes the padding of this model's batches; None if it does not.

    Whether a model computes the same without padding is found out by the first batch; that is not foreseen here.

    Args:
        found: The model's anatomy.
        model: The model, adapted or not.
        trl_loss: The loss is TRL's to compute.
        engine: The reason of the engine that runs the steps, where it has one.
    """
    if any(module.kind == "mixer" for module in found.modules):
        return "its mixers carry a state along"
    if trl_loss:
        return "TRL computes the loss"
    if engine is not None:
        return engine
    attention = {getattr(config, "_attn_implementation", None) for config in configs_of(model)}
    return None if attention & {"sdpa", ROW_BY_ROW} else "attention does not run as sdpa"


def foreseen_padding(found: ModelAnatomy, model: nn.Module | None) -> str | None:
    """The same before there is a trainer: for training on the model's device, as this process was launched.

    A model that is not at hand is taken to be trained on a CPU, with attention that runs row by row.
    """
    if model is None:
        return next(("its mixers carry a state along" for m in found.modules if m.kind == "mixer"), None)
    return why_padded(found, model, trl_loss=trl_skips_unlabelled(input_device(model)), engine=_sharded_launch())


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations inside the model, each once."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return list(configs.values())


def trl_skips_unlabelled(device: torch.device) -> bool:
    """True where TRL's fused head projects labelled positions only: where Triton runs. Elsewhere it projects all."""
    if device.type in ("cpu", "meta"):
        return False
    try:
        from trl.kernels.chunked_logprob import _use_triton  # slow to import, and of no use on a CPU
    except ImportError:  # another TRL
        return False
    return bool(_use_triton(device))


def _sharded_launch() -> str | None:
    """What shards the weights, as accelerate's launcher says it in the environment."""

    def on(name: str) -> bool:
        return os.environ.get(name, "false").lower() in ("1", "true")

    if on("ACCELERATE_USE_FSDP"):
        return "FSDP2 shards the weights"
    zero3 = on("ACCELERATE_USE_DEEPSPEED") and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    return "ZeRO-3 shards the weights" if zero3 else None
