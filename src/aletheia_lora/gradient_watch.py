"""A model under way -> the gradient norm of every tensor in its layers, by hooks; no gradient outlives its norm.

For a linear map with inputs X (T x in) and output gradients G (T x out) the gradient is G^T X, and its norm needs no
gradient at all (the Gram form):

    ||G^T X||_F^2 = sum((X X^T) * (G G^T))

which is cheaper while T is small, and works on quantized weights as they are. Everything that is not a linear map
(norms, biases, stacked experts) is measured by autograd, tensor by tensor, and dropped at once.

Where asked, the same X and G also give what an adapter W + B A would see first: with B = 0 its gradient is
dL/dB = G^T (X A^T), out x rank, which is summed over the batches; and a sketch of the gradient, small enough to keep
of every batch, from which inner products of gradients follow.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .anatomy import ModelAnatomy, is_quantized, linear_shape
from .errors import ProbeError, UnsupportedModelError
from .layers import layer_blocks
from .loss import full_precision
from .placement import weight_value
from .probe_result import Method, Mode, TensorStatistics
from .stopwatch import Stopwatch

ADAPTER_RANK = 16
"""Rank of the adapters whose first gradient is taken."""
SKETCH_SIZE = 64
"""Rows and columns of a sketched gradient."""


class GradientWatch:
    """The hooks of one probe: which tensor is measured how, and the norms as they come in."""

    def __init__(
        self,
        model: nn.Module,
        found: ModelAnatomy,
        mode: Mode,
        taylor: bool,
        descent: bool,
        kernels: bool,
        clock: Stopwatch,
        names: Mapping[str, str] | None,
    ) -> None:
        self.mode, self.taylor, self.descent, self.kernels, self.clock = mode, taylor, descent, kernels, clock
        self.device_type = clock.device.type
        self.handles: list[Any] = []
        self.kinds: dict[str, str] = {module.name: module.kind for module in found.modules}
        self.stacks = {module.name for module in found.modules if module.storage == "stacked"}
        self.squares: dict[str, float] = {}
        """Squared norm of each tensor in the batch under way."""
        self.norms: dict[str, list[float]] = {}
        self.taylors: dict[str, list[float]] = {}
        self.adapter_gradients: dict[str, Tensor] = {}
        """dL/dB of an adapter on each linear map, (out, rank), summed over the batches so far."""
        self.sketch = torch.zeros(found.num_layers if kernels else 0, SKETCH_SIZE, SKETCH_SIZE)
        """Of each layer the sum of its linear maps' sketched gradients in the batch under way, on the CPU."""
        self.sketches: list[Tensor] = []
        """The same of each batch so far."""
        self.experts: dict[str, Tensor] = {}
        """Norm of each expert's gradient in a stack, summed over the batches so far."""
        self.owners: dict[str, tuple[int, int, Method, float | None]] = {}
        """name -> (layer, weights, method, norm of the weight)."""
        self.linears: dict[str, nn.Module] = {}
        self.calls: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        """Inputs and output gradients of each linear map's calls in the batch under way."""
        self.input_grams: dict[int, tuple[Tensor, Tensor]] = {}
        self.input_users: dict[int, int] = {}
        self.in_backward = False
        adaptable = set(self.kinds)
        for item in found.left_out:
            if item.reason == "router":
                self.kinds[item.name] = self.kinds[f"{item.name}.weight"] = "router"
        try:
            self._watch(model, adaptable, _names_by_id(model, names))
            if kernels:
                self._check_kernels(found)
        except BaseException:
            self.close()
            raise

    def _watch(self, model: nn.Module, adaptable: set[str], known: Mapping[int, str | None]) -> None:
        """Freeze the model, and hook every tensor in its layers."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer_idx, block in enumerate(layer_blocks(model)):
            for module in (module for part in block for module in part.modules()):
                name = known[id(module)]
                if name is None:  # an adapter's
                    continue
                hooked = name in adaptable and linear_shape(module) is not None
                if hooked:
                    self._watch_linear(name, module, layer_idx)
                for leaf, parameter in module.named_parameters(recurse=False):
                    if not (hooked and parameter.ndim > 1) and parameter.is_floating_point():
                        self._watch_parameter(f"{name}.{leaf}", parameter, layer_idx)

    def _check_kernels(self, found: ModelAnatomy) -> None:
        without = sorted(set(range(found.num_layers)) - {self.owners[name][0] for name in self.linears})
        if without:
            raise UnsupportedModelError(
                f"{found.architecture} has layers without a linear map that can be adapted ({without}), and layers are "
                "compared by the gradients of these (stacked experts are left out). Choose by a strategy that does not "
                "compare layers, e.g. spread."
            )

    # --- linear maps -------------------------------------------------------------------------------------------

    def _watch_linear(self, name: str, module: nn.Module, layer_idx: int) -> None:
        shape = linear_shape(module)
        assert shape is not None
        self.linears[name] = module
        norm = None if is_quantized(module) else float(full_precision(weight_value(module)).norm())
        self.owners[name] = (layer_idx, shape[0] * shape[1], "formed", norm)

        def after_forward(owner: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            if args[0].requires_grad and not output.requires_grad:
                raise UnsupportedModelError(
                    f"no gradient passes {name}: its {type(owner).__name__} is made for inference. Load the model "
                    "unquantized, or in a format that trains (bitsandbytes: nf4, fp4, int8)."
                )
            calls = self.calls.setdefault(name, [])
            if self.in_backward and calls:  # a checkpoint recomputes: the first call already has its hook
                return None
            if not output.requires_grad:
                output.requires_grad_(True)
            position, key = len(calls), id(args[0])
            calls.append((args[0].detach(), None))
            self.input_users[key] = self.input_users.get(key, 0) + 1

            def with_gradient(gradient: Tensor) -> None:  # lives as long as the graph: it must not hold the inputs
                self.in_backward = True
                calls[position] = (calls[position][0], gradient)
                if all(grad is not None for _, grad in calls):
                    self._measure(name, owner, key)

            output.register_hook(with_gradient)
            return output

        self.handles.append(module.register_forward_hook(after_forward))

    def _measure(self, name: str, module: nn.Module, input_key: int) -> None:
        """Norm of d(loss)/d(weight) from all calls of one linear map, then forget them."""
        with self.clock.paused(), torch.autocast(self.device_type, enabled=False):
            self._measure_in_full_precision(name, module, input_key)

    def _measure_in_full_precision(self, name: str, module: nn.Module, input_key: int) -> None:
        calls = self.calls[name]
        layer_idx, num_params, _, norm = self.owners[name]
        shape = linear_shape(module)
        assert shape is not None
        in_features, out_features = shape
        num_rows = sum(inputs.numel() // in_features for inputs, _ in calls)
        users = self.input_users.get(input_key, 1) if len(calls) == 1 else 1
        cheaper = num_rows * (in_features / users + out_features) < in_features * out_features
        use_gram = self.mode == "gram" or (self.mode == "auto" and cheaper) or is_quantized(module)
        x_TI = _stacked([inputs for inputs, _ in calls], in_features)
        g_TO = _stacked([gradient for _, gradient in calls if gradient is not None], out_features)
        if use_gram:
            gram_TT = self._input_gram(x_TI, calls[0][0], input_key if users > 1 else None)
            self.squares[name] = max(float(torch.dot(gram_TT.flatten(), (g_TO @ g_TO.T).flatten())), 0.0)
        else:
            grad_OI = g_TO.T @ x_TI
            self.squares[name] = float(grad_OI.norm()) ** 2
            if self.taylor and norm is not None:
                weight = weight_value(module).to(grad_OI.device)
                weight_OI = weight.T if isinstance(module, Conv1D) else weight
                self.taylors.setdefault(name, []).append(float((grad_OI * weight_OI).abs().sum()))
        if self.descent:
            gradient_OR = g_TO.T @ (x_TI @ _first_adapter(in_features).to(x_TI).T)
            before = self.adapter_gradients.get(name)
            self.adapter_gradients[name] = gradient_OR if before is None else before + gradient_OR
        if self.kernels:
            self.sketch[layer_idx] += _sketch(x_TI, g_TO, zlib.crc32(name.encode())).cpu()
        self.owners[name] = (layer_idx, num_params, "gram" if use_gram else "formed", norm)
        calls.clear()

    def _input_gram(self, x_TI: Tensor, inputs: Tensor, key: int | None) -> Tensor:
        """X X^T, computed once for all maps that read the same input (query, key and value; gate and up)."""
        if key is None:
            return x_TI @ x_TI.T
        kept = self.input_grams.get(key)
        if kept is None or kept[0].data_ptr() != inputs.data_ptr():
            self.input_grams.clear()
            kept = (inputs, x_TI @ x_TI.T)
            self.input_grams[key] = kept
        return kept[1]

    # --- everything else -----------------------------------------------------------------------------------------

    def _watch_parameter(self, name: str, parameter: nn.Parameter, layer_idx: int) -> None:
        if parameter.requires_grad:  # tied to a layer that is watched already
            return
        self.owners[name] = (layer_idx, parameter.numel(), "autograd", float(full_precision(parameter.detach()).norm()))
        parameter.requires_grad_(True)

        def after_accumulation(leaf: Tensor) -> None:
            assert leaf.grad is not None
            with self.clock.paused():
                gradient = full_precision(leaf.grad)
                self.squares[name] = float(gradient.norm()) ** 2
                if name in self.stacks:
                    norms_E = gradient.flatten(1).norm(dim=1)
                    self.experts[name] = self.experts[name] + norms_E if name in self.experts else norms_E
                if self.taylor:
                    self.taylors.setdefault(name, []).append(float((leaf.grad * leaf.detach()).float().abs().sum()))
                leaf.grad = None

        self.handles.append(parameter.register_post_accumulate_grad_hook(after_accumulation))

    # --- the record ----------------------------------------------------------------------------------------------

    def end_of_batch(self, index: int) -> None:
        """Move the batch's norms to the record; a tensor that the loss does not reach counts as zero.

        Raises:
            ProbeError: If a norm is NaN or infinite, or every one is zero.
        """
        for name, calls in self.calls.items():  # some calls of a map may not reach the loss: their gradient is zero
            calls[:] = [call for call in calls if call[1] is not None]
            if calls:
                self._measure(name, self.linears[name], 0)
        for name, (layer_idx, *_) in self.owners.items():
            square = self.squares.get(name, 0.0)
            if not square < float("inf"):
                raise ProbeError(
                    f"the gradient of {name} (layer {layer_idx}) is not finite on batch {index}. It is never made a "
                    "score; look at that row, or probe in bfloat16 or float32."
                )
            self.norms.setdefault(name, []).append(square**0.5)
        if not any(self.squares.values()):
            raise ProbeError(f"batch {index} gave no gradient in any layer: the loss does not depend on the layers.")
        if self.kernels:
            self.sketches.append(self.sketch)
            self.sketch = torch.zeros_like(self.sketch)
        self.squares.clear()
        self.calls.clear()
        self.input_grams.clear()
        self.input_users.clear()
        self.in_backward = False

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def statistics(self) -> tuple[TensorStatistics, ...]:
        """One record per tensor, in the order of depth."""
        records = [
            TensorStatistics(
                name=name,
                layer_idx=layer_idx,
                kind=self.kinds.get(name, "other"),
                num_params=num_params,
                method=method,
                grad_norm=tuple(norms := self.norms.get(name, [])),
                taylor=tuple(taylors) if len(taylors := self.taylors.get(name, [])) == len(norms) else None,
                weight_norm=norm,
                expert_grad_norm=tuple(self.experts[name].tolist()) if name in self.experts else None,
            )
            for name, (layer_idx, num_params, method, norm) in self.owners.items()
        ]
        return tuple(sorted(records, key=lambda record: record.layer_idx))


def _first_adapter(in_features: int) -> Tensor:
    """A of a fresh adapter, (rank, in), drawn as PEFT draws it: uniform within 1 / sqrt(in). The same every time."""
    drawn_RI = torch.rand(ADAPTER_RANK, in_features, generator=torch.Generator().manual_seed(in_features))
    return (2 * drawn_RI - 1) / math.sqrt(in_features)


def _sketch(x_TI: Tensor, g_TO: Tensor, seed: int) -> Tensor:
    """The gradient G^T X between two random matrices, B^T G^T X A / size, shape (size, size).

    A (in x size) and B (out x size) hold standard normal numbers, drawn by the seed. So in the mean over seeds the
    inner product of two sketches is that of the two gradients under one seed, and 0 under two: sketches of different
    weights, each with its own seed, may be added up as if they lay end to end.
    """
    source = torch.Generator().manual_seed(seed)
    a_IS = torch.randn(x_TI.shape[1], SKETCH_SIZE, generator=source).to(x_TI)
    b_OS = torch.randn(g_TO.shape[1], SKETCH_SIZE, generator=source).to(g_TO)
    return (g_TO @ b_OS).T @ (x_TI @ a_IS) / SKETCH_SIZE


def _stacked(tensors: Sequence[Tensor], features: int) -> Tensor:
    """All rows of the tensors, (rows, features), in float32 or better; no copy where there is one such tensor."""
    flat = [full_precision(tensor.reshape(-1, features)) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def measured_by_autograd(
    model: nn.Module, found: ModelAnatomy, names: Mapping[str, str] | None = None
) -> list[nn.Module]:
    """The modules inside the layers that own a weight besides the matrix of an adaptable linear map."""
    linear = {module.name for module in found.modules if module.storage != "stacked"}
    known = _names_by_id(model, names)
    inside = (module for part in layer_blocks(model) for block in part for module in block.modules())
    own = ((module, {name for name, _ in module.named_parameters(recurse=False)}) for module in inside)
    return [module for module, mine in own if (mine - {"weight"} if known.get(id(module)) in linear else mine)]


def _names_by_id(model: nn.Module, names: Mapping[str, str] | None) -> dict[int, str | None]:
    """Name of each module in the anatomy; None for an adapter's own."""
    return {id(module): path if names is None else names.get(path) for path, module in model.named_modules()}
