"""Seconds that the report of a campaign of about 1,000 made-up records takes, process start included."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import numpy as np  # noqa: E402

from aletheia_lora.campaign.records import CellFolder, chosen_rate  # noqa: E402
from aletheia_lora.campaign.spec import cells  # noqa: E402
from aletheia_lora.files import write_json  # noqa: E402
from campaign_results import method, named, result, spec  # noqa: E402

NUM_LAYERS, STEPS = 30, 48
METHODS = ("uniform", "paper", "last", "stride", "same_params", "dora", "fisher", "taylor")
RATES = [5e-4, 1e-3, 2e-3]
MATCH = ["steps", "time"]


def made_up(models, tasks, seeds):
    """The resolved spec of a campaign."""
    return spec(
        *METHODS,
        method("random", draws=3),
        name="large",
        models=named(*(f"model-{index}" for index in range(models))),
        tasks=named(*(f"task-{index}" for index in range(tasks))),
        seeds=list(range(seeds)),
        learning_rates=RATES,
        match=MATCH,
        steps=STEPS,
        other_text={"name": "other", "data": "other.jsonl"},
        margins={"heldout_loss": 0.01, "other_loss": 0.02},
    )


def write_records(folder, campaign, rng):
    """A record for every cell; gives how many."""
    write_json(folder / "campaign.json", campaign)
    wanted = cells(campaign)
    for cell in wanted:
        place = CellFolder.of(folder, cell)
        place.make()
        place.append("attempt_started", pid=0)
        if cell.content["kind"] == "grid":
            place.finish("done", validation_loss=2 + rng.random(), rows_digest="same")
        elif rng.random() < 0.02:
            place.finish("failed", "RuntimeError: made up")
        else:
            place.finish("done", **run(place, rng))
    return len(wanted)


def run(place, rng):
    """What a run might have measured."""
    content = place.cell.content
    name, whole = content["method"]["name"], list(range(NUM_LAYERS))
    half = sorted(rng.choice(NUM_LAYERS, NUM_LAYERS // 2, replace=False).tolist())
    layers = whole if content["method"]["strategy"] == "all" else half
    rate, grid = chosen_rate(place)
    step = 0.6 + 0.4 * len(layers) / NUM_LAYERS
    return result(
        content,
        learning_rate=rate,
        grid=grid,
        layers=layers,
        layer_scores={"gradient_norm": (1 + rng.random(NUM_LAYERS)).tolist()},
        model_type=("llama", "qwen2")[content["model"]["name"] == "model-0"],
        steps=STEPS if content["match"] == "steps" else round(STEPS / step),
        step_seconds=(step * (1 + 0.05 * rng.random(STEPS))).tolist(),
        probe_seconds=2.0 if name in ("paper", "fisher", "taylor") else 0.0,
        heldout=[{"step": index, "loss": 2.0} for index in range(4)],
        heldout_loss=2.0 + 0.02 * rng.normal(),
        other_loss=1.0 + 0.01 * rng.normal(),
        train_losses=rng.random(STEPS).tolist(),
    )


def timed(folder):
    """Seconds of `aletheia campaign report` in a process of its own: by the clock, and of the processor."""
    (folder.parent / "large.yaml").write_text("name: large\n", encoding="utf-8")
    command = [sys.executable, "-m", "aletheia_lora", "campaign", "report", "large.yaml", "--output", str(folder)]
    started, before = time.perf_counter(), os.times()
    subprocess.run(
        command,
        check=True,
        cwd=folder.parent,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, used


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in (("models", 3), ("tasks", 3), ("seeds", 5)):
        parser.add_argument(f"--{name}", type=int, default=count)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "large"
        campaign = made_up(chosen.models, chosen.tasks, chosen.seeds)
        num_records = write_records(folder, campaign, np.random.default_rng(0))
        seconds, used = timed(folder)
        size = (folder / "report.html").stat().st_size
    found = {"num_records": num_records, "seconds": round(seconds, 2), "processor_seconds": round(used, 2)}
    print(json.dumps({**found, "page_bytes": size}))


if __name__ == "__main__":
    main()
