"""A model's configuration, never its weights -> will training fit, how long is a step, what would selecting save.

Comes in: a ``config.json`` (or a model on the ``meta`` device), the shape of a batch and a machine's memory and rate.
Goes out: a plain record of predictions for depths of selection, with and without checkpointing, for 16-bit and 4-bit
weights. There are no scores without data, so nothing here says which layers are worth adapting: the rows are how far
down backward runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
from .anatomy import ModelAnatomy, anatomy
from .cost import StepShape, cost_model
from .errors import UnsupportedModelError
from .memory import in_words, memory_model, stored_bytes

FORMAT = "aletheia-outlook/1"
DEPTHS = (("uniform", 1.0), ("top half", 0.5), ("top quarter", 0.25))
# NF4: half a byte a weight, and one float32 scale for each block of 64.
FOUR_BIT_BYTES = 0.5 + 4 / 64


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlookOptions:
    """What the predictions are made for."""

    batch_size: int = 4
    """Rows in a batch."""
    max_length: int = 512
    """Tokens of each row; every row is taken to be this long and labelled throughout."""
    rank: int = 16
    """Rank of every adapter."""
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
    """
    twin, mode = without_contents(model, "cpu")
    with mode:
        found = anatomy(twin)
    tokens = options.batch_size * options.max_length
    shape = StepShape(num_tokens=tokens, num_labelled_tokens=tokens, sequence_length=options.max_length)
    cost = cost_model(found, shape).in_seconds(options.operations_per_second)
    memory = memory_model(
        found, num_rows=options.batch_size, length=options.max_length, num_labelled=tokens, model=model
    )
    storages = {"bfloat16": memory, "4-bit": replace(memory, weights=_four_bit_bytes(model, found))}
    rows = []
    for storage, of_storage in storages.items():
        for depth, share in DEPTHS:
            layers = range(found.num_layers - max(math.floor(found.num_layers * share), 1), found.num_layers)
            for checkpointing in (False, True):
                needed = of_storage.step(layers, rank=options.rank, checkpointing=checkpointing)
                seconds = cost.step(layers, rank=options.rank, checkpointing=checkpointing)
                uniform = cost.uniform(rank=options.rank, checkpointing=checkpointing)
                rows.append(
                    {
                        "weights": storage,
                        "depth": depth,
                        "num_layers": len(layers),
                        "lowest": layers[0],
                        "checkpointing": checkpointing,
                        "seconds": seconds,
                        "speedup_ratio": uniform / seconds,
                        "bytes": needed,
                        "fits": needed <= options.memory_bytes,
                    }
                )
    return {
        "format": FORMAT,
        "architecture": found.architecture,
        "num_layers": found.num_layers,
        "num_params": found.num_params,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "rank": options.rank,
        "operations_per_second": options.operations_per_second,
        "rate_from": options.rate_from,
        "memory_bytes": options.memory_bytes,
        "activations": memory.activations,
        "weights_bytes": {storage: of_storage.weights for storage, of_storage in storages.items()},
        "predictions": rows,
        "limits": LIMITS,
    }


LIMITS = (
    "No data was read and no layer was scored: the rows differ in how far down backward runs, not in which layers are "
    "worth adapting. Time is counted operations at the machine's rate: unpacking 4-bit weights, the optimizer and "
    "loading data are not in it. All rows are taken to be of full length."
)


def outlook_text(record: dict[str, Any]) -> str:
    """The record as lines for people."""
    lines = [
        f"{record['architecture']}: {record['num_layers']} layers, {record['num_params']:,} weights; batches of "
        f"{record['batch_size']} rows of {record['max_length']} tokens, rank {record['rank']}",
        f"at {record['operations_per_second'] / 1e12:.3g} TFLOPS ({record['rate_from']}), into "
        f"{in_words(record['memory_bytes'])}; activations {record['activations']}",
        f"{'weights':9} {'layers':12} {'backward from':>13} {'checkpointing':>13} {'s a step':>9} {'speed':>6} "
        f"{'peak memory':>12}  fits",
    ]
    for row in record["predictions"]:
        lines.append(
            f"{row['weights']:9} {row['depth']:12} {row['lowest']:13d} {'on' if row['checkpointing'] else 'off':>13} "
            f"{row['seconds']:9.3g} {row['speedup_ratio']:5.2f}x {in_words(row['bytes']):>12}  "
            f"{'yes' if row['fits'] else 'no'}"
        )
    return "\n".join([*lines, record["limits"]])


def _four_bit_bytes(model: Any, found: ModelAnatomy) -> int:
    """Bytes of the model with the linear maps of its layers in 4 bits and everything else as it is stored."""
    packed: int = sum(
        module.num_params for module in found.modules if module.storage in ("linear", "conv1d", "stacked")
    )
    size = int(next(model.parameters()).element_size())
    return round(stored_bytes(model) - packed * size + packed * FOUR_BIT_BYTES)
