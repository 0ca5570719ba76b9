"""A model and the shape of a batch -> the bytes of a training step for any choice of layers.

Comes in: a model (on the ``meta`` device, too) or only its anatomy, and the rows and row length of a batch. Goes out:
a :class:`MemoryModel`. What autograd keeps is found by ``activations.py``; the rest is counted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from .activations import Activations, LayerActivations, layer_activations, storage_of
from .anatomy import ModelAnatomy, ModuleAnatomy
from .cost import Ranks
from .errors import PlanError
from .layers import embedding_of
from .loss import LOGIT_BYTES, all_at_once
from .quantized import plain_tensors, state_tensors

GIB = 2**30
STATE_BYTES = 16
"""Of one trained weight: itself, its gradient and AdamW's two moments, each in float32."""
WORKING_COPIES = 4
"""Copies of a layer's widest activation that forward or backward of one layer has in use at a time."""
LOGIT_COPIES = 3
"""Float32 copies of all logits where they are not computed in chunks: themselves, log-softmax, gradient."""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """Bytes of the parts of a training step on one device."""

    layers: tuple[LayerActivations, ...]
    adapter_params: tuple[int, ...]
    """Weights of one rank on every targeted module of each layer."""
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
        head = self.logits_all_tokens if all_logits else self.logits
        # Head and loss are over before a layer's backward begins: the larger of the two peaks counts.
        if checkpointing:
            highest = max(rank.values()) if isinstance(rank, Mapping) else rank
            one = max(self._activations(layer, highest) for layer in kept)
            step = self.hidden * len(kept) + max(head, one + self.working)
        else:
            step = sum(self.layers[layer].saved for layer in kept) + max(head, self.working)
        return self.weights + step + (self.hidden if prefix_cached else 0)

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
    targets: Sequence[str] | None = None,
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
        targets: Names of the modules that get adapters, of uniform LoRA too, as in ``PlanOptions``; None: all.
    """
    tokens = num_rows * length
    if model is not None:
        dtype = embedding_of(model).weight.dtype
        weights = stored_bytes(model) if weights is None else weights
    layers, how = layer_activations(anatomy, model, num_rows=num_rows, length=length, dtype=dtype, targets=targets)
    layers = tuple(
        replace(entry, adapter_inputs=entry.adapter_inputs + _merged_experts(layer.targeted(targets), model, dtype))
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
        adapter_params=tuple(sum(m.adapter_params(1) for m in layer.targeted(targets)) for layer in anatomy.layers),
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
        storages.update(storage_of(tensor) for tensor in plain_tensors(owner))
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


def _merged_experts(modules: Sequence[ModuleAnatomy], model: Any, dtype: torch.dtype) -> int:
    """Bytes of expert stacks with their adapters added in, which PEFT makes anew, in their dtype, in every forward."""
    stacks = [module for module in modules if module.storage == "stacked"]
    sizes = [dtype.itemsize if model is None else model.get_parameter(stack.name).element_size() for stack in stacks]
    return sum(size * stack.num_params for size, stack in zip(sizes, stacks, strict=True))
