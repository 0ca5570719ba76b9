"""A model with packed weights -> the plain tensors they are kept in, and gradients that still pass them.

Formats that are known by more than their shape: bitsandbytes (4-bit, 8-bit), torchao and HQQ. None of these libraries
is imported unless a model is to be loaded in its format; every other linear map is read by what it says of itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import ConfigError, UnsupportedModelError, nearest

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
"""What a base model can be loaded in: name -> arguments of transformers' ``BitsAndBytesConfig``."""
# Where these libraries keep scales and codes: attributes of the weight, and of the module.
WEIGHT_STATES = ("quant_state", "CB", "SCB")
MODULE_STATES = ("quant_state", "state", "meta")
KEEPS_INPUT = frozenset({"Linear8bitLt", "HQQLinear"})
"""Classes of linear maps that hold on to their input until backward, though their weight is frozen."""


def quantization_config(name: str, dtype: torch.dtype | None = None) -> Any:
    """The transformers configuration that loads a base model packed: one of :data:`QUANTIZATIONS`.

    Args:
        name: ``nf4``, ``fp4`` or ``int8``.
        dtype: What 4-bit weights are unpacked to when multiplied; bitsandbytes' default if left out.

    Raises:
        ConfigError: If the name is unknown, or bitsandbytes is not installed.
    """
    if name not in QUANTIZATIONS:
        raise ConfigError(f"unknown quantization {name!r}. {nearest(name, QUANTIZATIONS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization={name!r} needs bitsandbytes, which is not installed. Run `pip install bitsandbytes`, or "
            "leave quantization out."
        )
    from transformers import BitsAndBytesConfig  # slow to import, and needed here only

    four_bit = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in QUANTIZATIONS[name] and dtype else {}
    return BitsAndBytesConfig(**QUANTIZATIONS[name], **four_bit)


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with storage of their own inside a tensor subclass, a dict, or a state of bitsandbytes."""
    if isinstance(value, Tensor):
        inner: Any = value
        if is_traceable_wrapper_subclass(inner):
            for name in inner.__tensor_flatten__()[0]:
                yield from plain_tensors(getattr(inner, name))
        else:
            yield inner
    elif isinstance(value, dict):
        for inner in value.values():
            yield from plain_tensors(inner)
    elif type(value).__module__.startswith("bitsandbytes."):
        yield from plain_tensors(vars(value))


def state_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Scales, codes and other tensors of packed weights that are neither parameters nor buffers."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None or hasattr(module, "W_q"):
            states = [*(getattr(weight, name, None) for name in WEIGHT_STATES)]
            for state in [*states, *(getattr(module, name, None) for name in MODULE_STATES)]:
                yield from plain_tensors(state)


def settle_states(model: nn.Module) -> None:
    """Move 8-bit scales from the weight to its module, as its first forward does; before copies share the weight.

    bitsandbytes takes the scales off the weight when a module first runs. Were that module a copy, the others would
    find a weight without scales and quantize it a second time.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if getattr(getattr(module, "weight", None), "CB", None) is not None and hasattr(module, "init_8bit_state"):
            module.init_8bit_state()


def check_gradients_pass(model: nn.Module) -> None:
    """Check that bitsandbytes has not repacked the model's 4-bit weights for inference.

    Raises:
        UnsupportedModelError: If it has; no gradient passes such weights, and training would quietly learn nothing.
    """
    for module in model.modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                "a forward in eval mode made bitsandbytes repack this model's 4-bit weights for inference on this CPU, "
                "and no gradient passes them any more. Load the model anew, and probe or train it before you generate."
            )


_levels: list[int] = []
"""The level of bitsandbytes' logger at each entry; whoever leaves puts the last one back, so runs may leave in any
order, and the last to leave puts back what the first one found."""


@contextlib.contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from repacking 4-bit weights for inference while open; its setting is put back afterwards.

    On CPUs with AVX512-BF16 it repacks a weight, for good, when the module first runs in eval mode.
    Meanwhile it does not warn, either: it would say of every 8-bit module in every batch that its input is cast.
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    flags = [module.support_avx512bf16_for_cpu for module in modules]
    logger = logging.getLogger("bitsandbytes")
    _levels.append(logger.level)
    try:
        logger.setLevel(max(logger.level, logging.ERROR))
        for module in modules:
            module.support_avx512bf16_for_cpu = False
        yield
    finally:
        logger.setLevel(_levels.pop())
        for module, flag in zip(modules, flags, strict=True):
            module.support_avx512bf16_for_cpu = flag


@contextlib.contextmanager
def trainable_format(model: Any) -> Iterator[None]:
    """Check that transformers lets a model in this format train; while open it takes unpacked weights as such.

    transformers unpacks a GGUF file while loading, and yet refuses to train what came of it as a packed model.

    Raises:
        UnsupportedModelError: If it does not train the format, and the weights are packed.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or getattr(quantizer, "is_trainable", True):
        yield
        return
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", type(quantizer).__name__)
    method = getattr(method, "value", method)
    if method != "gguf" or not all(weight.is_floating_point() for weight in model.parameters()):
        raise UnsupportedModelError(
            f"transformers does not train models that it loaded from {method}. Load the model unquantized, or in a "
            "format that trains (bitsandbytes: nf4, fp4, int8)."
        )
    owner = next(module for module in model.modules() if "hf_quantizer" in vars(module))
    said = owner.is_quantized
    owner.is_quantized = False
    try:
        yield
    finally:
        owner.is_quantized = said
