"""A model and the shape of a batch -> the bytes that each layer keeps for its backward.

Nothing is guessed where it can be seen: the model runs once on tensors without contents, at the very shape of
training, and every tensor that is saved for backward is noted layer by layer.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from .anatomy import LayerAnatomy, ModelAnatomy, is_quantized, linear_shape
from .layers import embedding_of, layer_blocks
from .quantized import KEEPS_INPUT

Activations = Literal["traced", "run", "formula"]
TRIAL_LENGTH = 32


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes that one layer keeps for its backward, for one batch."""

    saved: int
    """Without adapters; every storage once, weights not counted."""
    adapter_inputs: int
    """What adapters on all its targeted modules keep besides, whatever their rank: inputs that nothing else keeps."""
    adapter_per_rank: int
    """What each rank of them keeps besides."""


def layer_activations(
    anatomy: ModelAnatomy,
    model: Any,
    *,
    num_rows: int,
    length: int,
    dtype: torch.dtype,
    targets: Sequence[str] | None = None,
) -> tuple[tuple[LayerActivations, ...], Activations]:
    """What each layer keeps for a batch of this shape, by the best way that works, and which one that was.

    Args:
        anatomy: The model's anatomy.
        model: The model, left as found; without it activations follow a formula.
        num_rows: Rows of a batch.
        length: Tokens of each row.
        dtype: Of activations, where the formula has to do.
        targets: Names of the modules that get adapters; None: all.
    """
    if model is not None:
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        level = logger.level
        try:
            logger.setLevel(logging.CRITICAL)  # a kernel that cannot be traced is no news: there is another way
            packed = [module.name for module in anatomy.modules if module.storage == "quantized"]
            twin, mode = without_contents(model, packed=packed)
            with mode:
                return saved_activations(twin, anatomy, num_rows=num_rows, length=length, targets=targets), "traced"
        except Exception:  # kernels that read contents, packed weights: whatever a foreign forward raises
            pass
        finally:
            logger.setLevel(level)
        if not any(parameter.device.type == "meta" for parameter in model.parameters()):
            try:
                few = min(length, TRIAL_LENGTH)
                found = saved_activations(model, anatomy, num_rows=1, length=few, targets=targets)
                return tuple(_times(entry, num_rows * length / few) for entry in found), "run"
            except Exception:  # likewise; the formula still stands
                pass
    tokens = num_rows * length
    return tuple(_formula(layer, anatomy, tokens, dtype, targets) for layer in anatomy.layers), "formula"


def saved_activations(
    model: nn.Module,
    anatomy: ModelAnatomy,
    *,
    num_rows: int,
    length: int,
    targets: Sequence[str] | None = None,
) -> tuple[LayerActivations, ...]:
    """Bytes that each layer keeps for backward in one real forward of this shape; the model is left as found.

    The batch is padded, as batches of training are: with a mask attention keeps more than without.
    Frozen weights need no gradient, so only what the gradient of the activations needs is kept, plus what adapters
    need: the input of each adapted matrix and per rank one number per token, as they are where ``fast_lora.py`` runs
    the adapter; where PEFT does, in float32, and of an input in half precision one copy for each matrix.

    Raises:
        RuntimeError: Or whatever the model's forward raises.
    """
    trace = _Trace(model, anatomy, targets)
    weight = embedding_of(model).weight
    input_ids = torch.zeros(num_rows, length, dtype=torch.long, device=weight.device)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = [weight.device] if weight.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            model.eval()
            mask = torch.ones_like(input_ids)
            mask[0, -1] = 0
            with torch.autograd.graph.saved_tensors_hooks(trace.note, lambda tensor: tensor):
                model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    finally:
        trace.close()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
    return trace.layers()


def without_contents(
    model: nn.Module, device: torch.device | str | None = None, *, packed: Iterable[str] = ()
) -> tuple[Any, FakeTensorMode]:
    """A twin of the model whose tensors have shapes and a device but no contents, and the mode to run it under.

    A ``meta`` tensor has no device, so attention could not choose the kernel that training will use; a fake one has.
    A quantized linear map becomes a plain one: what it keeps for backward does not depend on how its weight is stored.

    Args:
        model: Any model, ``meta`` included; not touched.
        device: Where the twin pretends to be; by default the model's device, and the CPU for ``meta``.
        packed: Names of linear maps that are to be taken for quantized ones, though they are not yet.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    quantized, replaced = set(packed), set[int]()
    like = embedding_of(model).weight
    for name, module in model.named_modules():
        shape = linear_shape(module)
        if shape is not None and (is_quantized(module) or name in quantized):
            where = device or ("cpu" if like.device.type == "meta" else like.device)
            with mode:
                memo[id(module)] = _Unpacked(module, *shape, device=where, like=like)
            replaced.update(id(tensor) for tensor in [*module.parameters(), *module.buffers()])
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in replaced:
            continue
        where = device or ("cpu" if tensor.device.type == "meta" else tensor.device)
        with mode:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=where)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo), mode


def storage_of(tensor: Tensor) -> tuple[int, int]:
    """What tells a tensor's storage from others while both are alive, and its bytes."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()


# --- inside -----------------------------------------------------------------------------------------------------


class _Unpacked(nn.Linear):
    """What stands for a quantized linear map on a twin without contents."""

    def __init__(
        self, packed: nn.Module, in_features: int, out_features: int, *, device: torch.device | str, like: Tensor
    ) -> None:
        has_bias = getattr(packed, "bias", None) is not None
        super().__init__(in_features, out_features, bias=has_bias, device=device, dtype=like.dtype)
        self.requires_grad_(False)
        self.keeps_input = type(packed).__name__ in KEEPS_INPUT


class _Trace:
    """Hooks that note what each layer keeps for backward, storage by storage."""

    def __init__(self, model: nn.Module, anatomy: ModelAnatomy, targets: Sequence[str] | None) -> None:
        self.anatomy = anatomy
        self.weights = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        self.current: int | None = None
        self.kept: dict[int, tuple[int, int, Tensor]] = {}
        """Storage -> layer, bytes, and a tensor that keeps the storage from being used again."""
        self.inputs: dict[int, dict[int, tuple[int, Tensor]]] = defaultdict(dict)
        """Layer -> storage of a module's input -> bytes."""
        self.casts: dict[int, int] = defaultdict(int)
        """Layer -> bytes of the float32 copies of half-precision inputs that PEFT's own forward makes."""
        self.per_rank: dict[int, int] = defaultdict(int)
        """Layer -> bytes that one rank on all its modules keeps."""
        modules = dict(model.named_modules())
        self.handles = [embedding_of(model).register_forward_hook(_requires_gradient)]
        for layer_idx, part in enumerate(layer_blocks(model)):
            for block in part:
                self.handles.append(block.register_forward_pre_hook(self._enter(layer_idx), with_kwargs=True))
                self.handles.append(block.register_forward_hook(self._leave))
        for entry in [module for layer in anatomy.layers for module in layer.targeted(targets)]:
            if entry.storage != "stacked":
                hook = self._input(entry.layer_idx, entry.in_features)
                self.handles.append(modules[entry.name].register_forward_pre_hook(hook))

    def _enter(self, layer_idx: int) -> Any:
        def enter(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
            self.current = layer_idx

        return enter

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.current = None

    def _input(self, layer_idx: int, in_features: int) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                if getattr(module, "keeps_input", type(module).__name__ in KEEPS_INPUT):
                    self.note(args[0])
                storage, size = storage_of(args[0])
                half = args[0].dtype in (torch.float16, torch.bfloat16)
                copied = half and not _runs_fast(module, args[0].dtype)
                of_one = 2 if half and not copied else 4
                self.per_rank[layer_idx] += of_one * (args[0].numel() // in_features)
                if copied:
                    self.casts[layer_idx] += 4 * args[0].numel()
                else:
                    self.inputs[layer_idx][storage] = (size, args[0])

        return look

    def note(self, tensor: Tensor) -> Tensor:
        """A tensor is saved for backward."""
        if self.current is not None:
            storage, size = storage_of(tensor)
            if storage not in self.weights and storage not in self.kept:
                self.kept[storage] = (self.current, size, tensor)
        return tensor

    def layers(self) -> tuple[LayerActivations, ...]:
        saved: dict[int, int] = defaultdict(int)
        for layer_idx, size, _ in self.kept.values():
            saved[layer_idx] += size
        return tuple(
            LayerActivations(
                saved=saved[layer.layer_idx],
                adapter_inputs=sum(
                    size for storage, (size, _) in self.inputs[layer.layer_idx].items() if storage not in self.kept
                )
                + self.casts[layer.layer_idx],
                adapter_per_rank=self.per_rank[layer.layer_idx],
            )
            for layer in self.anatomy.layers
        )

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _formula(
    layer: LayerAnatomy, anatomy: ModelAnatomy, tokens: int, dtype: torch.dtype, targets: Sequence[str] | None
) -> LayerActivations:
    """Two norms keep their inputs; the output of every matrix is kept once, of a gated one as the product, too."""
    size = dtype.itemsize
    outputs = sum(module.out_features * module.num_experts * module.active_share for module in layer.modules)
    adapted = layer.targeted(targets)
    copied = [module for module in adapted if size < 4 and module.storage == "quantized"]
    inputs = {(module.kind, module.in_features) for module in adapted if module not in copied}
    own = sum(module.storage != "stacked" for module in adapted) - len(copied)
    return LayerActivations(
        saved=round(tokens * size * (2 * anatomy.hidden_size + 1.5 * outputs)),
        adapter_inputs=tokens * (size * sum(side for _, side in inputs) + 4 * sum(m.in_features for m in copied)),
        adapter_per_rank=tokens * (size * own + 4 * len(copied)),
    )


def _runs_fast(module: nn.Module, dtype: torch.dtype) -> bool:
    """True where ``FastLora`` will run a plain adapter on this bare module, on inputs of this dtype."""
    return type(module) in (nn.Linear, Conv1D) and module.weight.dtype == dtype


def _times(entry: LayerActivations, factor: float) -> LayerActivations:
    return LayerActivations(
        round(entry.saved * factor), round(entry.adapter_inputs * factor), round(entry.adapter_per_rank * factor)
    )


def _requires_gradient(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True)
