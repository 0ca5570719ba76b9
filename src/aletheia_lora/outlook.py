"""A model's configuration, never its weights -> will training fit, how long is a step, what would selecting save.

Comes in: a ``config.json`` (or a model on the ``meta`` device), the shape of a batch and a machine's memory and rate.
Goes out: a plain record of predictions for depths of selection, with and without checkpointing, for 16-bit and 4-bit
weights. There are no scores without data, so nothing here says which layers are worth adapting: the rows are how far
down backward runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from .activations import without_contents
from .allocation import AllocationOptions, allocate, ranks_by_count
from .anatomy import ModelAnatomy, anatomy
from .cost import CostModel, Ranks, StepShape, cost_model
from .errors import UnsupportedModelError
from .memory import MemoryModel, in_words, memory_model, stored_bytes

FORMAT = "aletheia-outlook/1"
DEPTHS = (("uniform", 1.0), ("top half", 0.5), ("top quarter", 0.25))
# NF4: half a byte a weight, and one float32 scale for each block of 64.
FOUR_BIT_BYTES = 0.5 + 4 / 64
PACKABLE = ("linear", "conv1d")
"""Storages that bitsandbytes packs; stacks of experts stay as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlookOptions:
    """What the predictions are made for."""

    batch_size: int = 4
    """Rows in a batch."""
    max_length: int = 512
    """Tokens of each row; every row is taken to be this long and labelled throughout."""
    allocation: str = "matched"
    """What gives the ranks of half and a quarter of the layers; of layers of different sizes the highest it can give,
    and ``proportional`` ones, which need scores, are taken to be ``rank``."""
    ranks: AllocationOptions = field(default_factory=AllocationOptions)
    """Rank of uniform LoRA, what bounds the others, and which modules get adapters."""
    operations_per_second: float
    """Rate of the machine."""
    rate_from: str = "given"
    """``measured`` on this machine, or ``given``."""
    memory_bytes: int
    """Memory that a step has to fit in."""


def auto_class(config: Any) -> Any:
    """The transformers class that makes the language model of this configuration, also one that sees images."""
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def model_from_config(source: str | Path | Any) -> Any:
    """A causal language model without weights, on the ``meta`` device, in bfloat16.

    Args:
        source: A folder with a ``config.json``, such a file, a hub id, or a transformers configuration.

    Raises:
        UnsupportedModelError: If there is no such configuration, or no causal language model of its type.
    """
    try:
        path = source.parent if isinstance(source, Path) and source.is_file() else source
        if isinstance(source, str) and source.endswith(".json") and Path(source).is_file():
            path = Path(source).parent if Path(source).name == "config.json" else Path(source)
        config = AutoConfig.from_pretrained(path) if isinstance(path, str | Path) else path
        with torch.device("meta"):
            return auto_class(config).from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # foreign configurations raise whatever they raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"cannot build {str(source)[:200]!r} from its configuration: {reason} Expected a folder with the "
            "config.json of a causal language model, that file, or a hub id that can be reached."
        ) from error


def outlook(model: Any, options: OutlookOptions) -> dict[str, Any]:
    """Predict time and memory of a training step of this model, from shapes alone.

    Args:
        model: On the ``meta`` device, as :func:`model_from_config` builds it, or loaded.
        options: Batch, machine and rank.

    Returns:
        A plain record: the model, the machine, and one row for each weight storage, depth and checkpointing switch.

    Raises:
        PlanError: If a target matches nothing, or a rank is larger than a module allows.
    """
    twin, mode = without_contents(model, "cpu")
    with mode:
        found = anatomy(twin)
    tokens = options.batch_size * options.max_length
    every, targets = range(found.num_layers), options.ranks.targets
    for rule in {"uniform", options.allocation} - {"proportional"}:
        allocate(found, every, rule, options.ranks)  # refuse what cannot be
    ranks = ranks_by_count(found, options.allocation, options.ranks) or {}
    shape = StepShape(num_tokens=tokens, num_labelled_tokens=tokens, sequence_length=options.max_length)
    cost = cost_model(found, shape, targets=targets).in_seconds(options.operations_per_second)

    def memory_of(stored: ModelAnatomy, weights: int | None) -> MemoryModel:
        return memory_model(
            stored,
            num_rows=options.batch_size,
            length=options.max_length,
            num_labelled=tokens,
            model=model,
            weights=weights,
            targets=targets,
        )

    packed = _packed(found)
    storages = {"bfloat16": memory_of(found, None), "4-bit": memory_of(packed, _four_bit_bytes(model, packed))}
    rows = []
    for storage, memory in storages.items():
        for depth, share in DEPTHS:
            layers = every[found.num_layers - max(math.floor(found.num_layers * share), 1) :]
            rank: Ranks = options.ranks.rank if share == 1 else ranks.get(len(layers), options.ranks.rank)
            for checkpointing in (False, True):
                row = {"weights": storage, "depth": depth, "num_layers": len(layers), "lowest": layers[0]}
                needed = memory.step(layers, rank=rank, checkpointing=checkpointing)
                row |= {"checkpointing": checkpointing, "bytes": needed, "fits": needed <= options.memory_bytes}
                rows.append(row | _times(cost, layers, rank, options.ranks.rank, checkpointing))
    return {
        "format": FORMAT,
        "architecture": found.architecture,
        "num_layers": found.num_layers,
        "num_params": found.num_params,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "rank": options.ranks.rank,
        "allocation": options.allocation,
        "operations_per_second": options.operations_per_second,
        "rate_from": options.rate_from,
        "memory_bytes": options.memory_bytes,
        "activations": {storage: of_storage.activations for storage, of_storage in storages.items()},
        "weights_bytes": {storage: of_storage.weights for storage, of_storage in storages.items()},
        "predictions": rows,
        "limits": LIMITS,
    }


def _times(cost: CostModel, layers: range, rank: Ranks, uniform_rank: int, checkpointing: bool) -> dict[str, Any]:
    """Seconds of a step and how many times as fast as uniform LoRA's; in later epochs with the prefix cache, too."""
    uniform = cost.uniform(rank=uniform_rank, checkpointing=checkpointing)
    seconds = cost.step(layers, rank=rank, checkpointing=checkpointing)
    cached = None
    if layers[0] > 0:  # below layer 0 a cache has nothing to keep
        cached = cost.step(layers, rank=rank, checkpointing=checkpointing, prefix_cached=True)
    return {
        "seconds": seconds,
        "speedup_ratio": uniform / seconds,
        "cached_seconds": cached,
        "cached_speedup_ratio": None if cached is None else uniform / cached,
    }


LIMITS = (
    "No data was read and no layer was scored: the rows differ in how far down backward runs, not in which layers are "
    "worth adapting. Time is counted operations at the rate of large matrix products, which a step does not reach: "
    "compare rows by their speed ('cached': in later epochs with the prefix cache, which takes the memory of one more "
    "batch of hidden states). Unpacking 4-bit weights, the optimizer and loading data are not in it. Adapters are "
    "plain LoRA; all rows of a batch are taken to be of full length. 4-bit packs linear maps, not stacks of experts."
)


def outlook_text(record: dict[str, Any]) -> str:
    """The record as lines for people."""
    lines = [
        f"{record['architecture']}: {record['num_layers']} layers, {record['num_params']:,} weights; batches of "
        f"{record['batch_size']} rows of {record['max_length']} tokens, uniform LoRA of rank {record['rank']}, the "
        f"others {record['allocation']}",
        f"at {record['operations_per_second'] / 1e12:.3g} TFLOPS ({record['rate_from']}), into "
        f"{in_words(record['memory_bytes'])}; activations {', '.join(dict.fromkeys(record['activations'].values()))}",
        f"{'weights':9} {'layers':12} {'backward from':>13} {'checkpointing':>13} {'s a step':>9} {'speed':>6} "
        f"{'cached':>6} {'peak memory':>12}  fits",
    ]
    for row in record["predictions"]:
        cached = "" if row["cached_speedup_ratio"] is None else f"{row['cached_speedup_ratio']:.2f}x"
        lines.append(
            f"{row['weights']:9} {row['depth']:12} {row['lowest']:13d} {'on' if row['checkpointing'] else 'off':>13} "
            f"{row['seconds']:9.3g} {row['speedup_ratio']:5.2f}x {cached:>6} {in_words(row['bytes']):>12}  "
            f"{'yes' if row['fits'] else 'no'}"
        )
    return "\n".join([*lines, record["limits"]])


def _packed(found: ModelAnatomy) -> ModelAnatomy:
    """The anatomy that the model would have with the linear maps of its layers packed."""
    layers = []
    for layer in found.layers:
        modules = (replace(m, storage="quantized") if m.storage in PACKABLE else m for m in layer.modules)
        layers.append(replace(layer, modules=tuple(modules)))
    return replace(found, layers=tuple(layers))


def _four_bit_bytes(model: Any, packed: ModelAnatomy) -> int:
    """Bytes of the model with what is packed in 4 bits and everything else as it is stored."""
    num_params: int = sum(module.num_params for module in packed.modules if module.storage == "quantized")
    size = int(next(model.parameters()).element_size())
    return round(stored_bytes(model) - num_params * size + num_params * FOUR_BIT_BYTES)
