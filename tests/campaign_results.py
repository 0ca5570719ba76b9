"""Campaigns whose records are made up, written by the functions that real cells use."""

from typing import Any

from aletheia_lora.campaign.records import CellFolder
from aletheia_lora.campaign.spec import Cell, cells
from aletheia_lora.files import write_json

STRATEGIES = {
    "uniform": "all",
    "paper": "top_percent",
    "random": "random",
    "last": "last",
    "stride": "stride",
    "same_params": "all",
    "dora": "all",
}
SCORES = [1.0, 2.0, 4.0, 3.0]
LAYERS = {"uniform": [0, 1, 2, 3], "paper": [2, 3], "random": [0, 2], "last": [2, 3], "stride": [1, 3]}
SETTINGS = {
    "learning_rates": [1e-3],
    "match": ["steps"],
    "grid_steps": 2,
    "evaluations": 1,
    "other_text": None,
    "other_rows": 4,
    "batch_size": 4,
    "rank": 4,
    "alpha_ratio": 2.0,
    "probe_batches": 2,
    "probe_batch_size": 1,
    "train_rows": 8,
    "validation_rows": 4,
    "heldout_rows": 4,
    "prefix_cache": False,
}
"""What every resolved spec of these tests says alike."""


def method(name: str, **changed: Any) -> dict[str, Any]:
    strategy = STRATEGIES.get(name, "top_percent")
    kind = "dora" if name == "dora" else "lora"
    params_of = "paper" if name == "same_params" else None
    made = {"name": name, "strategy": strategy, "score": "gradient_norm", "adapter": kind, "params_of": params_of}
    return {**made, "draws": 1, **changed}


def spec(*methods: str | dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A resolved spec; every part may be changed."""
    return {
        "name": "made-up",
        "models": [{"name": "m", "model": "owner/m"}],
        "tasks": [{"name": "t", "data": "t.jsonl"}],
        "methods": [method(entry) if isinstance(entry, str) else entry for entry in methods],
        "seeds": [0, 1, 2],
        "steps": 10,
        "margins": {"heldout_loss": 0.01, "other_loss": None},
        "versions": {},
        **SETTINGS,
        **changed,
    }


def named(*names: str) -> list[dict[str, Any]]:
    """Models or tasks of these names."""
    return [{"name": name, "model": f"owner/{name}", "data": f"{name}.jsonl"} for name in names]


def result(content: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """What a run of this content might have measured."""
    name = content["method"]["name"]
    layers = LAYERS.get(name, [0, 1, 2, 3])
    return {
        "learning_rate": 1e-3,
        "grid": [],
        "rows_digest": "same",
        "model_type": "llama",
        "layer_scores": {"gradient_norm": SCORES},
        "layers": layers,
        "ranks": [4],
        "trainable_params": 1000 * len(layers),
        "steps": 10,
        "lowest_backward_layer": layers[0],
        "step_seconds": [1.0] * 10,
        "probe_seconds": 0.0,
        "environment": {"device": "CPU", "threads": "1", "python": "3.11"},
        "base_heldout_loss": 3.0,
        "heldout_loss": 2.0,
        "base_other_loss": 1.0,
        "other_loss": 1.0,
        **changed,
    }


def campaign(folder, made, outcome):
    """Write a campaign; ``outcome`` gives a cell's result, or its state and reason, or None for no record."""
    write_json(folder / "campaign.json", made)
    write(folder, cells(made), outcome)
    return folder


def write(folder, wanted, outcome):
    for cell in wanted:
        place = CellFolder.of(folder, cell)
        place.make()
        ended = outcome(cell.content)
        if isinstance(ended, dict):
            place.finish("done", **ended)
        elif ended is not None:
            place.finish(*ended)


def evaluation_of(cell: Cell) -> Cell:
    """The evaluation of a run."""
    keys = ("model", "task", "method", "match", "seed", "draw")
    return Cell({"kind": "evaluation", **{key: cell.content[key] for key in keys}, "evaluation": {"name": "pack"}})


def evaluated(folder, made, outcome, monkeypatch):
    """Give every run of a campaign an evaluation; ``outcome`` gives the benchmarks of a cell, or state and reason."""
    runs = [cell for cell in cells(made) if cell.content["kind"] == "run"]
    more = [evaluation_of(cell) for cell in runs]
    monkeypatch.setattr("aletheia_lora.campaign.outcomes.cells", lambda spec: [*cells(spec), *more])

    def wrapped(content):
        ended = outcome(content)
        return {"evaluation": ended} if isinstance(ended, dict) else ended

    write(folder, more, wrapped)


def benchmark(value, base, items=None, base_items=None, unit="points"):
    """An entry of an evaluation."""
    return {
        "unit": unit,
        "higher_is_better": unit == "points",
        "base": base,
        "value": value,
        "items": items or {},
        "base_items": base_items or {},
    }
