"""Held-out loss after the same predicted time: all layers, upper parts, bands, spread choices, rare early updates."""

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_methods import Setup, cached_steps, embedded_setup

from aletheia_lora.adapter import attach, shared_copy
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy
from aletheia_lora.cost import StepShape, cost_model
from aletheia_lora.data import TokenizedRow, batches, split
from aletheia_lora.environment import environment
from aletheia_lora.fast_lora import FastLora
from aletheia_lora.loss import heldout_loss, labelled_loss
from aletheia_lora.training.prefix_cache import PrefixCache, PrefixCacheOptions
from aletheia_lora.training.unpadded import Unpadded

HERE = Path(__file__).resolve().parent
UNIFORM_STEPS, EPOCH_STEPS, HELD_OUT, MAX_LENGTH, RATE = 30, 15, 48, 320, 2e-3


@dataclass(frozen=True)
class Choice:
    """What is adapted, and how often the layers below ``cut`` are."""

    layers: tuple[int, ...]
    cut: int = 0
    every: int = 1
    """Layers below ``cut`` are updated at every so-manieth step; the others stop backward at ``cut``."""
    cached: bool = False
    """Whether later epochs start from the hidden states that the first one kept."""
    epochs: int = 0
    """Of uniform LoRA of ``EPOCH_STEPS`` steps, in whose time this trains; 0: ``UNIFORM_STEPS`` on new rows."""

    @property
    def against(self) -> str:
        """The choice that it is compared with."""
        return f"uniform_{self.epochs}_epochs" if self.epochs else "uniform"


CHOICES = {
    "uniform": Choice(tuple(range(30))),
    "last_15": Choice(tuple(range(15, 30))),
    "last_20": Choice(tuple(range(10, 30))),
    "last_10": Choice(tuple(range(20, 30))),
    "band_9_23": Choice(tuple(range(9, 24))),
    "every_second_from_9": Choice(tuple(range(9, 30, 2))),
    "every_third_from_9": Choice(tuple(range(9, 30, 3))),
    "every_second": Choice(tuple(range(1, 30, 2))),
    "all_early_every_4th": Choice(tuple(range(30)), cut=15, every=4),
    "last_20_early_every_4th": Choice(tuple(range(10, 30)), cut=20, every=4),
    **{
        f"{name}_{epochs}_epochs": Choice(tuple(range(lowest, 30)), cached=lowest > 0, epochs=epochs)
        for epochs in (2, 4)
        for name, lowest in (("uniform", 0), ("last_20_cached", 10), ("last_15_cached", 15))
    },
}


def main() -> None:
    """Run what is missing, or print the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl, or rows in one of TRL's formats")
    parser.add_argument("--records", type=Path, default=HERE / "records.jsonl", help="one file for each task")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--print", action="store_true", help="only print the table of the records")
    options = parser.parse_args()
    records_file = options.records
    records = [json.loads(line) for line in records_file.read_text().splitlines()] if records_file.exists() else []
    if not options.print:
        done = {(record["choice"], record["seed"]) for record in records}
        bench = Bench(embedded_setup(options.data, max_length=MAX_LENGTH))
        (HERE / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
        for seed in options.seeds:
            for name in options.choices:
                if (name, seed) in done:
                    continue
                record = {"choice": name, "seed": seed, **bench.run(CHOICES[name], seed)}
                records.append(record)
                print(json.dumps({k: record[k] for k in ("choice", "seed", "steps", "heldout_loss")}), file=sys.stderr)
                with records_file.open("a") as stream:
                    stream.write(json.dumps(record) + "\n")
    print(table(records))


COLUMNS = ("choice", "layers", "rank", "lowest", "share of a step", "steps", "held-out loss, by seed")


def table(records: list[dict[str, Any]]) -> str:
    """Each choice against uniform LoRA of as many epochs and the same seed, best first."""
    losses = {(record["choice"], record["seed"]): record["heldout_loss"] for record in records}
    rows = []
    for name, choice in CHOICES.items():
        seeds = sorted(seed for one, seed in losses if one == name)
        if not seeds:
            continue
        first = next(record for record in records if record["choice"] == name)
        facts = [len(choice.layers), first["rank"], first["lowest"], f"{first['time_share']:.2f}", first["steps"]]
        changes, cells = [], []
        for seed in seeds:
            uniform = losses.get((choice.against, seed), math.nan)
            changes.append(losses[name, seed] / uniform - 1)
            cells.append(f"{losses[name, seed]:.4f} ({changes[-1]:+.1%})")
        row = f"| {' | '.join([name, *map(str, facts), '; '.join(cells)])} |"
        rows.append((choice.epochs, statistics.mean(changes), row))
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS), *(row for *_, row in sorted(rows))])


class Bench:
    """The model, its rows in their parts, and the counts that say how many steps a choice gets."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.found = setup, anatomy(setup.model)
        parts = split(setup.rows, seed=0, probe=0, validation=HELD_OUT)
        self.train = list(parts.train)
        held_out = sorted(parts.validation, key=lambda row: len(row.input_ids))
        self.held_out = list(batches(held_out, setup.batch_size, setup.pad))
        sample = self.train[:200]
        tokens = sum(len(row.input_ids) for row in sample) // len(sample) * setup.batch_size
        labels = sum(sum(label != -100 for label in row.labels) for row in sample) // len(sample) * setup.batch_size
        length = max(tokens // setup.batch_size, 1)
        shape = StepShape(num_tokens=tokens, num_labelled_tokens=labels, sequence_length=length)
        self.cost = cost_model(self.found, shape)

    def run(self, choice: Choice, seed: int) -> dict[str, Any]:
        """Train one choice for uniform LoRA's time and look at the held-out rows."""
        ranks = allocate(self.found, choice.layers, "matched", AllocationOptions(rank=self.setup.rank))
        rank = max(entry.rank for entry in ranks)
        share = self.share(choice, rank)
        steps = self.steps(choice, rank, share)
        adapted = attach(shared_copy(self.setup.model), self.found, ranks, seed=seed)
        layer_of = {entry.name: entry.layer_idx for entry in ranks}
        rows = self.rows(choice, seed, steps)
        losses = self.train_on(batches(rows, self.setup.batch_size, self.setup.pad), adapted, choice, layer_of, steps)
        return {
            "layers": list(choice.layers),
            "rank": rank,
            "lowest": min(choice.layers),
            "time_share": share,
            "steps": steps,
            "train_losses": losses,
            "heldout_loss": heldout_loss(adapted, self.held_out),
        }

    def rows(self, choice: Choice, seed: int, steps: int) -> list[TokenizedRow]:
        """The rows of so many steps in their order: new ones, or those of one epoch shuffled anew for each."""
        draw = np.random.default_rng(seed)
        order = draw.permutation(len(self.train))
        if choice.epochs:
            epoch = order[: EPOCH_STEPS * self.setup.batch_size]
            order = np.concatenate([draw.permutation(epoch) for _ in range(-(-steps // EPOCH_STEPS))])
        return [self.train[int(index)] for index in order[: steps * self.setup.batch_size]]

    def train_on(
        self,
        rows: Iterable[dict[str, Any]],
        adapted: PeftModel,
        choice: Choice,
        layer_of: dict[str, int],
        steps: int,
    ) -> list[float]:
        """The loss of every step; the product's shortcuts are on, so that only what a choice needs is computed."""
        weights = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
        early = [weight for name, weight in weights.items() if layer_of[module_of(name)] < choice.cut]
        optimizer = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=0.0)
        base_model, losses = adapted.get_base_model(), []
        with contextlib.ExitStack() as shortcuts:
            shortcuts.callback(FastLora(adapted).remove)
            shortcuts.callback((unpadded := Unpadded(base_model)).remove)
            if choice.cached:
                shortcuts.callback(PrefixCache(base_model, min(choice.layers), PrefixCacheOptions()).remove)
            adapted.train()
            for step, batch in enumerate(rows):
                for group in optimizer.param_groups:
                    group["lr"] = RATE * (1 - step / steps)
                for weight in early:
                    weight.requires_grad_(step % choice.every == 0)
                loss = labelled_loss(adapted, unpadded.batch(adapted, batch))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
        return losses

    def steps(self, choice: Choice, rank: int, share: float) -> int:
        """Steps that fit in uniform LoRA's predicted time; a cache is of use from the second epoch on."""
        time = choice.epochs * EPOCH_STEPS or UNIFORM_STEPS
        if not choice.cached:
            return round(time / share)
        later = self.cost.share(choice.layers, rank=rank, uniform_rank=self.setup.rank, prefix_cached=True)
        return cached_steps(time, EPOCH_STEPS, share, later)

    def share(self, choice: Choice, rank: int) -> float:
        """Predicted time of a step against uniform LoRA's, averaged over the schedule; in the first epoch if cached."""
        ranks = {"rank": rank, "uniform_rank": self.setup.rank}
        whole = self.cost.share(choice.layers, **ranks)
        if choice.every == 1:
            return whole
        late = [layer for layer in choice.layers if layer >= choice.cut]
        frozen = self.cost.adapters([layer for layer in choice.layers if layer < choice.cut], rank=rank) / 3
        frozen /= self.cost.uniform(rank=self.setup.rank)  # they still run forward
        return whole / choice.every + (self.cost.share(late, **ranks) + frozen) * (1 - 1 / choice.every)


def module_of(weight: str) -> str:
    """The module that an adapter's weight belongs to."""
    return weight.removeprefix("base_model.model.").partition(".lora_")[0]


if __name__ == "__main__":
    main()
