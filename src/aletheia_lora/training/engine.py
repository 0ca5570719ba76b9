"""A trainer in one process or many -> who runs its steps, what that takes from it, and its adapters in one piece.

accelerate wraps the model for DDP, FSDP or DeepSpeed. Everything that is true of one of them and not of the others
stands here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from ..errors import ConfigError
from ..processes import is_main, is_sharded


@dataclass(frozen=True, slots=True)
class Engine:
    """Who runs the steps of a training."""

    name: str
    """``one process``, ``device_map``, ``DDP``, ``FSDP2`` or ``ZeRO-1`` to ``ZeRO-3``."""
    num_processes: int

    @property
    def shards_weights(self) -> bool:
        """True where a forward waits for the other processes, so that none may run one more than the others."""
        return self.name in ("FSDP2", "ZeRO-3")

    @property
    def keeps_gradients(self) -> bool:
        """True where gradients are not on the parameters after backward."""
        return self.name.startswith("ZeRO")

    def limits(self, *, reentrant: bool) -> dict[str, str]:
        """What works less well than in one process, by name, and why.

        Args:
            reentrant: True under reentrant activation checkpointing.
        """
        found = {}
        if self.shards_weights:
            found["padding"] = f"{self.name} shards the weights: one on trial would wait for the other processes"
        if self.keeps_gradients:
            found["dead_adapters"] = f"not known: {self.name} keeps gradients to itself"
        if self.name == "ZeRO-3":
            found["fast_adapters"] = "ZeRO-3 brings a frozen weight in only for the forward of its own module"
        if self.name == "ZeRO-3":
            found["labelled_logits"] = (
                "ZeRO-3 loses count where the head sees some positions only: TRL computes the loss"
            )
        if self.name == "ZeRO-3" and reentrant:
            found["truncation"] = (
                "ZeRO-3 needs reentrant checkpointing, which runs backward only where a layer's input requires a "
                "gradient: the lowest adapted layer's is made to, and its gradient is computed for nothing"
            )
        return found


def check_engine(args: TrainingArguments, model: nn.Module) -> None:
    """Check, before anything is attached, that a trainer with these arguments can run the model.

    Raises:
        ConfigError: For ``nn.DataParallel`` (several GPUs in one process without a device map), for a model that was
            loaded in parts, and for offloaded weights.
    """
    parts = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if parts is not None:
        raise ConfigError(
            f"the model's weights are in parts over processes already, e.g. {parts}, and adapters go onto whole ones. "
            "Load the model before making the trainer's arguments (under ZeRO-3 it is loaded in parts after)."
        )
    away = next((name for name, parameter in model.named_parameters() if parameter.device.type == "meta"), None)
    if away is not None:
        raise ConfigError(
            f"weights are offloaded, e.g. {away}, and backward needs them in memory. Plan here and train by the saved "
            "plan where they fit: on more GPUs, or quantized."
        )
    if args.n_gpu > 1 and len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        raise ConfigError(
            f"one process sees {args.n_gpu} GPUs and would run nn.DataParallel, which is not supported. Start it with "
            "`accelerate launch`, load the model with a device_map, or set CUDA_VISIBLE_DEVICES=0."
        )


def engine_of(accelerator: Any, model: nn.Module) -> Engine:
    """Who runs the steps of a trainer with this accelerator.

    Raises:
        ConfigError: For FSDP 1, whose flat weights hold frozen and trained ones together.
    """
    count = int(accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ConfigError("FSDP version 1 cannot hold frozen and trained weights apart. Set fsdp_version: 2.")
        return Engine("FSDP2", count)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return Engine(f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}", count)
    if count > 1:
        return Engine("DDP", count)
    several = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    return Engine("device_map" if several else "one process", count)


def in_forward_of(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The loss of a model; under DDP as what its forward returns.

    DDP finds the parameters that took part by walking back from what forward returned, and waits for their gradients.
    Our loss is found inside the forward, beside the output, so it has to be made the output. Other engines watch the
    modules and are called as they are.
    """
    if not isinstance(model, DistributedDataParallel):
        return loss(model)
    inner: nn.Module = model.module
    own = vars(inner).get("forward")

    def put_back() -> None:
        vars(inner).pop("forward", None)
        if own is not None:
            inner.forward = own

    def once() -> Tensor:
        put_back()
        return loss(inner)

    inner.forward = once
    try:
        found: Tensor = model()
        return found
    finally:
        put_back()


def sharded_loading() -> bool:
    """True where FSDP lets process 0 alone load the weights and hands them to the others later."""
    flags = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return all(os.environ.get(flag, "false").lower() in ("1", "true") for flag in flags)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; all of it, if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_adapters(model: nn.Module) -> dict[str, Tensor] | None:
    """Every trained weight in one piece on the CPU of process 0, to be saved; None where the model itself has them.

    Every process has to call this. On the others the values are missing.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(hasattr(parameter, "ds_id") for parameter in trained.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trained.values())):
            return {name: parameter.detach().cpu().clone() for name, parameter in trained.items() if is_main()}
    if any(isinstance(parameter, DTensor) for parameter in trained.values()):
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in trained.items():
                value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                found[name] = value.detach().cpu()
        return found
    return None
