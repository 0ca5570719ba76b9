"""PEFT's LoRA layers, run as one autograd function each while training: same numbers, fewer passes over memory.

With x the input, W the frozen weight, A and B the adapter and s = alpha / rank::

    h = x A^T,  y = x W^T + b + s h B^T                        forward
    dh = s dy B,  dB = s dy^T h,  dA = dh^T x,  dx = dy W + dh A    backward

PEFT writes h B^T, its scaled copy and the sum to memory one after the other, forward and again backward. Here both
sums are made in place by the matrix products that add to them, and nothing is kept but x and h. Maps that read one
input (query, key and value; gate and up) share its copy where autocast wants another dtype.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

_copies = WeakTensorKeyDictionary()  # input of adapted maps -> (its version, its copy in autocast's dtype)


class FastLora:
    """Fast forward and backward on every LoRA layer that allows it, until :meth:`remove`.

    Adapters, their names and their files stay PEFT's. A layer that cannot be fast, every one of another method among
    them, runs as before, and ``skipped`` says why; so does, call by call, one that is merged, disabled or asked for
    another adapter.
    """

    def __init__(self, peft_model: nn.Module) -> None:
        """Look at every adapted module of the model and make those fast that can be."""
        self.modules: dict[str, PeftLinear] = {}
        self.skipped: dict[str, str] = {}
        """name of the adapted module -> why it runs as PEFT runs it."""
        layers = [(name, module) for name, module in peft_model.named_modules() if isinstance(module, BaseTunerLayer)]
        for path, module in layers:
            name = path.removeprefix("base_model.model.")
            reason = _why_not(module)
            if reason is None:
                module.forward = MethodType(_forward, module)  # type: ignore[attr-defined]
                self.modules[name] = module  # type: ignore[assignment]
            else:
                self.skipped[name] = reason

    def remove(self) -> None:
        """Give every module its own forward back."""
        for module in self.modules.values():
            vars(module).pop("forward", None)
        self.modules = {}


def adapted_linear(
    in_features: int, out_features: int, rank: int | None, *, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """One frozen linear map on its own: bare (``rank`` None), or with an adapter as training attaches and runs it.

    Weights are random; draws from the global generator.
    """
    base = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype).requires_grad_(False)
    if rank is None:
        return base
    config = LoraConfig(r=rank, lora_alpha=2 * rank)
    adapted = PeftLinear(base, "default", config=config, r=rank, lora_alpha=2 * rank)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()  # as PEFT trains adapters of half-precision models
    FastLora(adapted)
    return adapted


def _why_not(module: BaseTunerLayer) -> str | None:
    """Why this adapted layer must run as PEFT runs it; None if it can be fast."""
    if isinstance(module, ParamWrapper):
        return "stacked experts"
    if type(module) is not PeftLinear:
        return f"PEFT runs it as {type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__}"
    base: Any = module.get_base_layer()
    if type(base) not in (nn.Linear, Conv1D):
        return f"the base layer is a {type(base).__name__}"
    if hasattr(base.weight, "ds_id"):
        return "ZeRO-3 brings the weight in only for the forward of its own module"
    if not base.weight.is_floating_point():
        return f"the weight is stored as {base.weight.dtype}"
    if base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base) or "forward" in vars(module):
        return "a hook or another patch runs on it"
    if len(module.active_adapters) != 1:
        return f"{len(module.active_adapters)} adapters are active on it"
    (name,) = module.active_adapters
    if name not in module.lora_A:
        return f"it has no adapter {name!r}"
    if name in module.lora_variant:
        return f"it uses {type(module.lora_variant[name]).__name__}"
    if module.lora_bias[name]:
        return "its adapter has a bias"
    dropout = module.lora_dropout[name]
    if not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0:
        return "its adapter has dropout"
    return None


def _forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What replaces ``LoraLayer.forward``."""
    base = module.base_layer
    names = module.active_adapters
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    usual = (
        args
        or any(value is not None for value in kwargs.values())
        or module.disable_adapters
        or module.merged
        or len(names) != 1
        or names[0] not in module.lora_A
        or base.weight.requires_grad
        or not (autocast or base.weight.dtype == dtype)
    )
    if usual:
        return PeftLinear.forward(module, x, *args, **kwargs)
    (name,) = names
    weight_OI = base.weight.T if isinstance(base, Conv1D) else base.weight
    with torch.autocast(x.device.type, enabled=False):
        output: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x,
            weight_OI,
            base.bias,
            module.lora_A[name].weight,
            module.lora_B[name].weight,
            module.scaling[name],
            dtype,
        )
    return output


def _cast_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, made once for all maps that read ``x``, and kept no longer than it or their graph."""
    if x.dtype == dtype or x.is_inference() or torch.compiler.is_compiling():
        return x.to(dtype)
    known: tuple[int, Tensor] | None = _copies.get(x)
    if known is None or known[0] != x._version or known[1].dtype != dtype:
        known = x._version, x.to(dtype)
        _copies[x] = known
    return known[1]


class _LoraLinear(torch.autograd.Function):
    """A frozen linear map and its adapter; computes in ``dtype``, returns adapter gradients in the adapter's own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """(..., in) -> (..., out) in ``dtype``."""
        x_TI = _cast_once(x, dtype).reshape(-1, x.shape[-1])
        bias_O = None if bias_O is None else bias_O.to(dtype)
        y_TO = functional.linear(x_TI, weight_OI.to(dtype), bias_O)
        h_TR = x_TI @ a_RI.T.to(dtype)
        y_TO.addmm_(h_TR, b_OR.T.to(dtype), alpha=scaling)
        ctx.save_for_backward(x_TI, h_TR, weight_OI, a_RI, b_OR)
        ctx.scaling, ctx.dtype, ctx.input_shape, ctx.input_dtype = scaling, dtype, x.shape, x.dtype
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input and of the two adapter matrices."""
        x_TI, h_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        dtype = ctx.dtype
        dy_TO = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
        dh_TR = (dy_TO @ b_OR.to(dtype)).mul_(ctx.scaling)
        da_RI = db_OR = dx = None
        if ctx.needs_input_grad[3]:  # not where the adapter was frozen
            db_OR = (dy_TO.T @ h_TR).to(b_OR.dtype).mul_(ctx.scaling)
            da_RI = (dh_TR.T @ x_TI).to(a_RI.dtype)
        if ctx.needs_input_grad[0]:
            dx_TI = (dy_TO @ weight_OI.to(dtype)).addmm_(dh_TR, a_RI.to(dtype))
            dx = dx_TI.view(ctx.input_shape).to(ctx.input_dtype)
        return dx, None, None, da_RI, db_OR, None, None
