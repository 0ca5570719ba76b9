"""A resolved spec -> its cells with predicted time and disk, from the models' configurations and some rows of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import AutoTokenizer

from ..activations import without_contents
from ..allocation import AllocationOptions, ModuleRank, allocate, trainable_params
from ..anatomy import ModelAnatomy, anatomy
from ..calibration import measured_rate
from ..cost import CostModel, StepShape, cost_model
from ..data import tokenize
from ..embedded import standard_library_rows
from ..errors import AletheiaError
from ..outlook import model_from_config
from ..rows import load_rows
from ..run_config import configuration
from ..runs import EMBEDDED, Say, load_model
from ..selection import BUDGETED, SCORED, STRATEGIES
from ..selection_options import SelectionOptions
from .methods import Method
from .spec import Cell, cells
from .status import duration

SAMPLED_ROWS = 64
RECORD_BYTES, STEP_BYTES = 8_000, 60
"""Of a cell's folder with its log, and of each step in its record; as counted on small campaigns."""
WEIGHT_BYTES = 4
"""Of a trained weight: adapters train in float32."""
PROBE_BYTES, PROBE_BATCH_BYTES = 150, 45
"""Of each module in the file of a probe, and of each batch of it."""


@dataclass(frozen=True)
class _Ground:
    """What is known of a model on a task without running it."""

    found: ModelAnatomy
    cost: CostModel
    mean_length: float
    dtype: torch.dtype
    """That products are in, and hidden states kept in."""

    def seconds(self, cell: Cell) -> float:
        """Training and evaluation; starting the process and loading the model are not in it."""
        content = cell.content
        uniform = self.cost.uniform(rank=content["rank"])
        layers = self.layers(cell)
        step = uniform if content.get("match") == "time" else self.cost.step(layers, rank=content["rank"])
        forward = sum(self.cost.forward) + self.cost.head / 2
        if content["kind"] == "grid":
            looks = content["validation_rows"]
        else:
            looks = content["heldout_rows"] * min(content["evaluations"], content["steps"])
            looks += content["other_rows"] if content["other_text"] is not None else 0
        return float(content["steps"] * step + looks / content["batch_size"] * forward)

    def layers(self, cell: Cell) -> list[int]:
        """The layers of a method that reads neither scores nor budgets; of others all, the most that they can take."""
        method = Method(**cell.content["method"])
        everything = dict.fromkeys(range(self.found.num_layers), 1.0)
        if method.strategy in SCORED or method.strategy in BUDGETED:
            return list(everything)
        options = SelectionOptions(percent=method.percent, num_layers=method.num_layers)
        return STRATEGIES[method.strategy](everything, options)

    def ranks(self, cell: Cell) -> tuple[ModuleRank, ...]:
        """The adapters of a method; those in proportion to scores train at most as much as matched ones."""
        name, rank = cell.content["method"]["allocation"], cell.content["rank"]
        options = AllocationOptions(rank=rank, attention_rank=rank, mlp_rank=4 * rank)
        return allocate(self.found, self.layers(cell), "matched" if name == "proportional" else name, options)

    def num_bytes(self, cell: Cell) -> float:
        """Of the cell's own folder with its adapter, and of the frozen layers' output where that is kept."""
        content = cell.content
        own = float(RECORD_BYTES + STEP_BYTES * content["steps"])
        if content["kind"] == "grid":
            return own
        own += WEIGHT_BYTES * trainable_params(self.ranks(cell))
        if not content["prefix_cache"]:
            return own
        rows = content["train_rows"] or content["task"]["max_rows"] or 0
        return own + float(rows * self.mean_length * self.found.hidden_size * self.dtype.itemsize)


def forecast(spec: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Every cell with its predicted seconds and bytes; None, with the reason, where that cannot be known.

    So it is with a model or task that cannot be read, and with a method that cannot be planned on a model.
    """
    grounds: dict[tuple[str, str], _Ground | str] = {}
    for model in spec["models"]:
        for task in spec["tasks"]:
            try:
                grounds[model["name"], task["name"]] = _ground(model, task, spec, say)
            except (AletheiaError, ValueError, OSError) as error:
                grounds[model["name"], task["name"]] = " ".join(str(error).split())
    entries = [_entry(cell, grounds[cell.group[:2]]) for cell in cells(spec)]
    per_module = PROBE_BYTES + PROBE_BATCH_BYTES * spec["probe_batches"]
    known = [ground for ground in grounds.values() if isinstance(ground, _Ground)]
    probes = sum(len(ground.found.modules) * per_module * (len(spec["seeds"]) + 1) for ground in known)
    return {
        "name": spec["name"],
        "num_cells": len(entries),
        "seconds": sum(entry["seconds"] or 0.0 for entry in entries),
        "bytes": probes + sum(entry["bytes"] or 0.0 for entry in entries),
        "num_unknown": sum(entry["seconds"] is None for entry in entries),
        "cells": entries,
    }


def _entry(cell: Cell, ground: _Ground | str) -> dict[str, Any]:
    known: dict[str, Any] = {"seconds": None, "bytes": None, "reason": None}
    if isinstance(ground, str):
        known["reason"] = ground
    elif cell.content["kind"] == "evaluation":
        known["reason"] = "an answer is as long as the model makes it"
    else:
        try:
            known |= {"seconds": ground.seconds(cell), "bytes": ground.num_bytes(cell)}
        except (AletheiaError, ValueError) as error:
            known["reason"] = " ".join(str(error).split())
    return {"cell": cell.folder_name, **known}


def _ground(model: Mapping[str, Any], task: Mapping[str, Any], spec: Mapping[str, Any], say: Say) -> _Ground:
    config = configuration({key: model[key] for key in ("model", "dtype", "device")})
    if config.model == EMBEDDED:
        built, tokenizer = load_model(config, say)
    else:
        built = model_from_config(config.model)
        tokenizer = AutoTokenizer.from_pretrained(config.model)
    twin, mode = without_contents(built, "cpu")
    with mode:
        found = anatomy(twin)
    rows = standard_library_rows() if task["data"] == EMBEDDED else load_rows(task["data"], split=task["split"])
    keys = ("max_length", "completion_only", "prompt_column", "completion_column")
    sample = tokenize(rows[:SAMPLED_ROWS], tokenizer, **{key: task[key] for key in keys})
    length = fmean(len(row.input_ids) for row in sample)
    labelled = fmean(row.num_labelled for row in sample)
    tokens = max(round(length * spec["batch_size"]), 1)
    shape = StepShape(
        num_tokens=tokens,
        num_labelled_tokens=min(max(round(labelled * spec["batch_size"]), 1), tokens),
        sequence_length=max(round(length), 1),
    )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if model["device"] == "auto" else model["device"]
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if model["dtype"] != "auto":
        dtype = getattr(torch, model["dtype"])
    return _Ground(found, cost_model(found, shape).in_seconds(measured_rate(device, dtype)), length, dtype)


def forecast_text(record: Mapping[str, Any]) -> str:
    """The list for a person."""
    lines = []
    for entry in record["cells"]:
        if entry["seconds"] is None:
            lines.append(f"{entry['cell']}: not known: {entry['reason']}")
        else:
            lines.append(f"{entry['cell']}: {duration(entry['seconds'])}, {entry['bytes'] / 1e6:.2f} MB")
    unknown = f", {record['num_unknown']} more not known" if record["num_unknown"] else ""
    total = f"{duration(record['seconds'])} and {record['bytes'] / 1e6:.1f} MB{unknown}"
    lines.append(
        f"{record['num_cells']} cells, about {total}. Time is counted operations at this machine's rate, one cell "
        "after the other; starting processes, loading models, probing and unpacking quantized weights are not in it, "
        "and methods that choose by score are taken at all layers."
    )
    return "\n".join(lines)
