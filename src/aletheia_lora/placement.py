"""A model whose weights lie on several devices, or in no memory until they are used -> where inputs go, and values.

``device_map`` puts layers on different devices; accelerate's hooks move inputs there, and bring offloaded weights in
for one forward at a time. Outside of it an offloaded weight is on ``meta`` and has no values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .layers import embedding_of


def input_device(model: nn.Module) -> torch.device:
    """Where a batch goes: the device of the input embedding, or where that is run if its weight is offloaded."""
    embedding = embedding_of(model)
    hook = _offload_hook(embedding)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    device: torch.device = embedding.weight.device
    return device


def check_placement(model: nn.Module) -> None:
    """Check that the weights are there, on one device or where a device map put them.

    Raises:
        UnsupportedModelError: If weights have no contents, or lie on several devices and nothing moves data between.
    """
    architecture = type(model).__name__
    empty = [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.device.type == "meta" and _offload_hook(module) is None
    ]
    if empty:
        raise UnsupportedModelError(
            f"{len(empty)} weights of {architecture} are on the meta device, without contents, e.g. {empty[0]}. "
            "Load them first: from_pretrained outside an empty-weights context, or by a device_map."
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters() if parameter.device.type != "meta"})
    if len(devices) > 1 and not any(hasattr(module, "hf_device_map") for module in model.modules()):
        raise UnsupportedModelError(
            f"the weights of {architecture} lie on {' and '.join(devices)}, and nothing moves data between them. "
            "Put the model on one device with model.to(...), or load it with a device_map."
        )


def weight_value(module: nn.Module, name: str = "weight") -> Tensor:
    """The values of one weight, read from where it is offloaded to if need be; may be ``meta`` if it has none."""
    weight: Tensor = torch.as_tensor(getattr(module, name)).detach()
    hook = _offload_hook(module)
    if weight.device.type == "meta" and hook is not None:
        return torch.as_tensor(hook.weights_map[name])
    return weight


@contextlib.contextmanager
def in_memory(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, the offloaded weights that these modules own stay where they are run."""
    hooks = [(module, hook) for module in modules if (hook := _offload_hook(module)) is not None]
    opened: list[tuple[nn.Module, Any]] = []
    try:
        for module, hook in hooks:
            hook.pre_forward(module)
            hook.offload = False
            opened.append((module, hook))
        yield
    finally:
        for module, hook in opened:
            hook.offload = True
            hook.post_forward(module, None)


def _offload_hook(module: nn.Module) -> Any:
    """Accelerate's hook on this module, if it keeps the module's weights elsewhere; else None."""
    hook = getattr(module, "_hf_hook", None)
    every = getattr(hook, "hooks", None) or [hook]
    return next((each for each in every if getattr(each, "offload", False)), None)
