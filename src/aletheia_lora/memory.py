"""A model and the shape of a batch -> the bytes of a training step for any choice of layers.

Comes in: a model (on the ``meta`` device, too) or only its anatomy, and the rows and row length of a batch. Goes out:
a :class:`MemoryModel`. What autograd keeps is not guessed: the model runs once on tensors without contents, at the
very shape of training, and every tensor that is saved for backward is noted layer by layer.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .anatomy import LayerAnatomy, ModelAnatomy, is_quantized, linear_shape
from .cost import Ranks
from .errors import PlanError
from .layers import embedding_of, layer_blocks
from .loss import LOGIT_BYTES, all_at_once
from .quantized import KEEPS_INPUT, plain_tensors, state_tensors

Activations = Literal["traced", "run", "formula"]
GIB = 2**30
STATE_BYTES = 16
"""Of one trained weight: itself, its gradient and AdamW's two moments, each in float32."""
WORKING_COPIES = 4
"""Copies of a layer's widest activation that forward or backward of one layer has in use at a time."""
LOGIT_COPIES = 3
"""Float32 copies of all logits where they are not computed in chunks: themselves, log-softmax, gradient."""
TRIAL_LENGTH = 32
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """Bytes that one layer keeps for its backward, for one batch."""

    saved: int
    """Without adapters; every storage once, weights not counted."""
    adapter_inputs: int
    """What adapters on all its modules keep besides, whatever their rank: inputs that nothing else keeps."""
    adapter_per_rank: int
    """What each rank of them keeps besides."""


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Bytes of the parts of a training step on one device."""

    layers: tuple[LayerActivations, ...]
    adapter_params: tuple[int, ...]
    """Weights of one rank on every module of each layer."""
    weights: int
    """Frozen weights and buffers as stored."""
    hidden: int
    """Hidden states of the batch at one layer's border."""
    working: int
    """What is in use for a moment inside one layer, forward or backward; of packed weights one matrix, unpacked."""
    logits: int
    """Head and loss of the labelled tokens: one chunk of logits (all of them where the head allows no chunks), and the
    hidden states' gradient."""
    logits_all_tokens: int
    """The same when logits of all tokens are alive at once."""
    hidden_per_token: int
    """Hidden state of one token at one layer's border."""
    activations: Activations
    """How ``layers`` were found: ``traced`` without contents, ``run`` on few tokens and scaled, or by ``formula``."""

    @property
    def num_layers(self) -> int:
        """Number of layers, L."""
        return len(self.layers)

    def without_adapters(
        self,
        lowest: int,
        *,
        rank: Ranks = 16,
        checkpointing: bool = False,
        prefix_cached: bool = False,
        all_logits: bool = False,
    ) -> int:
        """Bytes of a step whose backward stops at layer ``lowest``, but for what each adapted layer adds.

        Args:
            lowest: m, the lowest adapted layer.
            rank: As for :meth:`step`; under checkpointing it sets how large the one layer at work may be.
            checkpointing: Only the input of each layer from ``lowest`` up is kept, and one layer's activations.
            prefix_cached: The input of layer ``lowest`` comes from a cache: one batch of it is in memory besides.
            all_logits: Logits of all tokens at once.
        """
        kept = range(lowest, self.num_layers)
        if checkpointing:
            highest = max(rank.values()) if isinstance(rank, Mapping) else rank
            one = max(self._activations(layer, highest) for layer in kept)
            saved = self.hidden * len(kept) + one
        else:
            saved = sum(self.layers[layer].saved for layer in kept)
        head = self.logits_all_tokens if all_logits else self.logits
        # Head and loss are over before a layer's backward begins: the larger of the two peaks counts.
        return self.weights + saved + max(head, self.working) + (self.hidden if prefix_cached else 0)

    def adapters(self, layers: Iterable[int], *, rank: Ranks = 16, checkpointing: bool = False) -> int:
        """Bytes that the adapters of these layers add: weights, gradients, moments, and what they keep for backward.

        Raises:
            PlanError: If ``rank`` is a mapping that lacks one of the layers.
        """
        total = 0.0
        for layer in sorted(set(layers)):
            if isinstance(rank, Mapping) and layer not in rank:
                raise PlanError(f"no rank was given for layer {layer}. Give one for each adapted layer.")
            of_layer = rank[layer] if isinstance(rank, Mapping) else rank
            total += STATE_BYTES * of_layer * self.adapter_params[layer]
            if not checkpointing:
                total += self.layers[layer].adapter_inputs + of_layer * self.layers[layer].adapter_per_rank
        return round(total)

    def step(
        self,
        layers: Iterable[int],
        *,
        rank: Ranks = 16,
        checkpointing: bool = False,
        prefix_cached: bool = False,
        all_logits: bool = False,
    ) -> int:
        """Highest bytes of a training step that adapts these layers.

        Like the time of a step, it holds only if nothing asks for gradients below the lowest layer.

        Args:
            layers: S, the adapted layers.
            rank: One rank, or one per layer.
            checkpointing: As for :meth:`without_adapters`.
            prefix_cached: As for :meth:`without_adapters`.
            all_logits: As for :meth:`without_adapters`.

        Raises:
            PlanError: If no layer is given, one does not exist, or one has no rank.
        """
        chosen = sorted(set(layers))
        if not chosen or chosen[0] < 0 or chosen[-1] >= self.num_layers:
            raise PlanError(f"layers {chosen}: expected at least one, all between 0 and {self.num_layers - 1}.")
        base = self.without_adapters(
            chosen[0], rank=rank, checkpointing=checkpointing, prefix_cached=prefix_cached, all_logits=all_logits
        )
        return base + self.adapters(chosen, rank=rank, checkpointing=checkpointing)

    def prefix_cache(self, num_tokens: int) -> int:
        """Bytes on disk of a prefix cache over a data set of this many tokens."""
        return num_tokens * self.hidden_per_token

    def _activations(self, layer: int, rank: float) -> int:
        entry = self.layers[layer]
        return entry.saved + entry.adapter_inputs + round(rank * entry.adapter_per_rank)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> MemoryModel:
        """Read back what :meth:`to_dict` wrote."""
        layers = tuple(LayerActivations(**layer) for layer in record["layers"])
        return cls(**{**record, "layers": layers, "adapter_params": tuple(record["adapter_params"])})


def memory_model(
    anatomy: ModelAnatomy,
    *,
    num_rows: int,
    length: int,
    num_labelled: int,
    model: Any = None,
    dtype: torch.dtype = torch.float32,
    weights: int | None = None,
) -> MemoryModel:
    """Bytes of a training step on batches of this shape.

    Args:
        anatomy: The model's anatomy.
        num_rows: Rows of a batch.
        length: Tokens of each row.
        num_labelled: Tokens of the batch that get logits.
        model: The model, left as found, on any device; without it (or where it does not run without contents, nor on
            a few real tokens) activations follow a formula, which the result says.
        dtype: Of activations, where there is no model.
        weights: Bytes of the frozen weights, where they are not stored as in ``model``.
    """
    tokens = num_rows * length
    if model is not None:
        dtype = embedding_of(model).weight.dtype
        weights = stored_bytes(model) if weights is None else weights
    layers, how = _activations(anatomy, model, num_rows, length, dtype)
    layers = tuple(
        replace(entry, adapter_inputs=entry.adapter_inputs + _merged_experts(layer))
        for entry, layer in zip(layers, anatomy.layers, strict=True)
    )
    widest = max(max(m.in_features, m.out_features) for m in anatomy.modules)
    unpacked = max((m.num_params * dtype.itemsize for m in anatomy.modules if m.storage == "quantized"), default=0)
    hidden_per_token = anatomy.hidden_size * dtype.itemsize
    chunk = LOGIT_BYTES["cpu" if model is not None and embedding_of(model).weight.device.type == "cpu" else "cuda"]
    logit_bytes = anatomy.vocab_size * (dtype.itemsize + 4 * LOGIT_COPIES)
    logits = min(chunk, num_labelled * anatomy.vocab_size * 4)
    if model is not None and all_at_once(model, frozen=True) is not None:
        logits = num_labelled * logit_bytes
    return MemoryModel(
        layers=layers,
        adapter_params=tuple(sum(m.adapter_params(1) for m in layer.modules) for layer in anatomy.layers),
        weights=anatomy.num_params * dtype.itemsize if weights is None else weights,
        hidden=tokens * hidden_per_token,
        working=WORKING_COPIES * tokens * widest * dtype.itemsize + unpacked,
        logits=logits + 2 * num_labelled * hidden_per_token,
        logits_all_tokens=tokens * logit_bytes,
        hidden_per_token=hidden_per_token,
        activations=how,
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers as they are stored, packed formats too; shared ones once."""
    storages: dict[int, int] = {}
    for owner in [*model.parameters(), *model.buffers(), *state_tensors(model)]:
        storages.update(_storage_of(tensor) for tensor in plain_tensors(owner))
    return sum(storages.values())


def parse_bytes(given: int | str | None) -> int | None:
    """Bytes from a number, or from text such as ``24GiB``, ``24 GB``, ``800MiB`` or ``8e9``; None stays None.

    Raises:
        PlanError: If it is anything else, or not above 0.
    """
    if given is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", str(given).lower())
    if match is None or isinstance(given, bool) or (match[3] and not match[2]):
        raise PlanError(f"memory_budget={given!r}: expected bytes, or a number with a unit such as 24GiB or 800MB.")
    factor = BINARY[match[2]] if match[3] else UNITS[match[2]]
    count = int(float(match[1]) * factor)
    if count <= 0:
        raise PlanError(f"memory_budget={given!r}, expected more than 0 bytes.")
    return count


def in_words(num_bytes: float) -> str:
    """Bytes for people: GiB, or MiB below one."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def device_memory(device: torch.device | str) -> int:
    """All the memory of a device: a GPU's own, or the machine's.

    Raises:
        ValueError: If there is no such device here.
    """
    try:
        target = torch.device(device)
        if target.type == "cuda":
            return int(torch.cuda.get_device_properties(target).total_memory)
        if target.type == "cpu":
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        raise RuntimeError(f"the memory of {target.type} cannot be read")
    except (RuntimeError, AssertionError, ValueError, OSError) as error:
        raise ValueError(
            f"device={str(device)!r}: {str(error).splitlines()[0]}. Name a device of this machine, or give "
            "memory_budget."
        ) from error


# --- what autograd keeps ----------------------------------------------------------------------------------------


def saved_activations(
    model: nn.Module, anatomy: ModelAnatomy, *, num_rows: int, length: int
) -> tuple[LayerActivations, ...]:
    """Bytes that each layer keeps for backward in one real forward of this shape; the model is left as found.

    The batch is padded, as batches of training are: with a mask attention keeps more than without.
    Frozen weights need no gradient, so only what the gradient of the activations needs is kept, plus what adapters
    need: the input of each adapted matrix, in float32, and per rank one float32 number per token.

    Raises:
        RuntimeError: Or whatever the model's forward raises.
    """
    trace = _Trace(model, anatomy)
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


def without_contents(model: nn.Module, device: torch.device | str | None = None) -> tuple[Any, FakeTensorMode]:
    """A twin of the model whose tensors have shapes and a device but no contents, and the mode to run it under.

    A ``meta`` tensor has no device, so attention could not choose the kernel that training will use; a fake one has.
    A quantized linear map becomes a plain one: what it keeps for backward does not depend on how its weight is stored.

    Args:
        model: Any model, ``meta`` included; not touched.
        device: Where the twin pretends to be; by default the model's device, and the CPU for ``meta``.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    packed: set[int] = set()
    like = embedding_of(model).weight
    for module in model.modules():
        shape = linear_shape(module)
        if shape is not None and is_quantized(module):
            where = device or ("cpu" if like.device.type == "meta" else like.device)
            with mode:
                memo[id(module)] = _Unpacked(module, *shape, device=where, like=like)
            packed.update(id(tensor) for tensor in [*module.parameters(), *module.buffers()])
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in packed:
            continue
        where = device or ("cpu" if tensor.device.type == "meta" else tensor.device)
        with mode:
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=where)
        memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo), mode


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

    def __init__(self, model: nn.Module, anatomy: ModelAnatomy) -> None:
        self.anatomy = anatomy
        self.weights = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        self.current: int | None = None
        self.kept: dict[int, tuple[int, int, Tensor]] = {}
        """Storage -> layer, bytes, and a tensor that keeps the storage from being used again."""
        self.inputs: dict[int, dict[int, tuple[int, Tensor]]] = defaultdict(dict)
        """Layer -> storage of a module's input -> bytes."""
        self.rows: dict[str, int] = {}
        """Rows that went through each module."""
        self.casts: dict[int, int] = defaultdict(int)
        """Layer -> bytes of float32 copies of inputs, where inputs are of another dtype."""
        modules = dict(model.named_modules())
        self.handles = [embedding_of(model).register_forward_hook(_requires_gradient)]
        for layer_idx, part in enumerate(layer_blocks(model)):
            for block in part:
                self.handles.append(block.register_forward_pre_hook(self._enter(layer_idx), with_kwargs=True))
                self.handles.append(block.register_forward_hook(self._leave))
        for entry in anatomy.modules:
            if entry.storage != "stacked":
                hook = self._input(entry.layer_idx, entry.name, entry.in_features)
                self.handles.append(modules[entry.name].register_forward_pre_hook(hook))

    def _enter(self, layer_idx: int) -> Any:
        def enter(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
            self.current = layer_idx

        return enter

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.current = None

    def _input(self, layer_idx: int, name: str, in_features: int) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                if getattr(module, "keeps_input", type(module).__name__ in KEEPS_INPUT):
                    self.note(args[0])
                storage, size = _storage_of(args[0])
                self.rows[name] = self.rows.get(name, 0) + args[0].numel() // in_features
                if args[0].dtype in (torch.float16, torch.bfloat16):
                    self.casts[layer_idx] += 4 * args[0].numel()
                else:
                    self.inputs[layer_idx][storage] = (size, args[0])

        return look

    def note(self, tensor: Tensor) -> Tensor:
        """A tensor is saved for backward."""
        if self.current is not None:
            storage, size = _storage_of(tensor)
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
                adapter_per_rank=sum(4 * self.rows.get(module.name, 0) for module in layer.modules),
            )
            for layer in self.anatomy.layers
        )

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _activations(
    anatomy: ModelAnatomy, model: Any, num_rows: int, length: int, dtype: torch.dtype
) -> tuple[tuple[LayerActivations, ...], Activations]:
    """The activations by the best way that works, and which one that was."""
    if model is not None:
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        level = logger.level
        try:
            logger.setLevel(logging.CRITICAL)  # a kernel that cannot be traced is no news: there is another way
            twin, mode = without_contents(model)
            with mode:
                return saved_activations(twin, anatomy, num_rows=num_rows, length=length), "traced"
        except Exception:  # kernels that read contents, packed weights: whatever a foreign forward raises
            pass
        finally:
            logger.setLevel(level)
        if not any(parameter.device.type == "meta" for parameter in model.parameters()):
            try:
                few = min(length, TRIAL_LENGTH)
                found = saved_activations(model, anatomy, num_rows=1, length=few)
                return tuple(_times(entry, num_rows * length / few) for entry in found), "run"
            except Exception:  # likewise; the formula still stands
                pass
    return tuple(_formula(layer, anatomy, num_rows * length, dtype) for layer in anatomy.layers), "formula"


def _formula(layer: LayerAnatomy, anatomy: ModelAnatomy, tokens: int, dtype: torch.dtype) -> LayerActivations:
    """Two norms keep their inputs; the output of every matrix is kept once, of a gated one as the product, too."""
    size = dtype.itemsize
    outputs = sum(module.out_features * module.num_experts * module.active_share for module in layer.modules)
    inputs = {(module.kind, module.in_features) for module in layer.modules}
    casts = [module.in_features for module in layer.modules] if size < 4 else [side for _, side in inputs]
    return LayerActivations(
        saved=round(tokens * size * (2 * anatomy.hidden_size + 1.5 * outputs)),
        adapter_inputs=tokens * 4 * sum(casts),
        adapter_per_rank=4 * tokens * sum(module.storage != "stacked" for module in layer.modules),
    )


def _merged_experts(layer: LayerAnatomy) -> int:
    """Bytes of expert stacks with their adapters added in, which PEFT makes anew in every forward."""
    return sum(4 * module.num_params for module in layer.modules if module.storage == "stacked")


def _times(entry: LayerActivations, factor: float) -> LayerActivations:
    return LayerActivations(
        round(entry.saved * factor), round(entry.adapter_inputs * factor), round(entry.adapter_per_rank * factor)
    )


def _requires_gradient(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_(True)


def _storage_of(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()
