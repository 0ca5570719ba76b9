"""Held-out loss after the same predicted time: all layers, upper parts, bands, spread choices, rare early updates."""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "src"), str(HERE.parent)]

UNIFORM_STEPS, BATCH_SIZE, HELD_OUT, MAX_LENGTH, RATE = 30, 4, 48, 320, 2e-3
EPOCH_STEPS = 15
EPOCH_ROWS = EPOCH_STEPS * BATCH_SIZE


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
    """Of uniform LoRA over ``EPOCH_ROWS`` rows, in whose time this trains; 0: ``UNIFORM_STEPS`` on new rows."""

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
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--print", action="store_true", help="only print the table of the records")
    options = parser.parse_args()
    records_file = HERE / "records.jsonl"
    records = [json.loads(line) for line in records_file.read_text().splitlines()] if records_file.exists() else []
    if not options.print:
        done = {(record["choice"], record["seed"]) for record in records}
        bench = Bench(options.data)
        (HERE / "environment.json").write_text(json.dumps(bench.environment(), indent=1) + "\n")
        for seed in options.seeds:
            for name in options.choices:
                if (name, seed) in done:
                    continue
                record = {"choice": name, "seed": seed, **bench.run(CHOICES[name], seed)}
                records.append(record)
                print(json.dumps({k: record[k] for k in ("choice", "seed", "steps", "heldout_loss")}), file=sys.stderr)
                with records_file.open("a") as stream:
                    stream.write(json.dumps(record) + "\n")
    report(records)


def report(records: list[dict]) -> None:
    """The table, best first, as differences to uniform LoRA of the same seed."""
    losses = {(record["choice"], record["seed"]): record["heldout_loss"] for record in records}
    rows = []
    for name in dict.fromkeys(record["choice"] for record in records):
        against = CHOICES[name].against
        uniform = {seed: loss for (choice, seed), loss in losses.items() if choice == against}
        mine = [record for record in records if record["choice"] == name and record["seed"] in uniform]
        gains = [record["heldout_loss"] / uniform[record["seed"]] - 1 for record in mine]
        if mine:
            rows.append((statistics.mean(gains), name, mine, gains))
    print(f"{'choice':26s} {'rank':>4s} {'lowest':>6s} {'time share':>10s} {'steps':>5s}  held-out loss, by seed")
    for _, name, mine, gains in sorted(rows, key=lambda row: (CHOICES[row[1]].epochs, row[0])):
        first = mine[0]
        print(
            f"{name:26s} {first['rank']:4d} {first['lowest']:6d} {first['time_share']:10.2f} {first['steps']:5d}  "
            + ", ".join(
                f"{record['heldout_loss']:.4f} ({100 * gain:+.1f} %)" for record, gain in zip(mine, gains, strict=True)
            )
        )


class Bench:
    """The model and the rows, loaded once."""

    def __init__(self, data: Path) -> None:
        from aletheia_lora.anatomy import anatomy
        from aletheia_lora.cost import StepShape, cost_model
        from aletheia_lora.data import batches, split, tokenize
        from aletheia_lora.embedded import load_embedded_model
        from aletheia_lora.rows import load_rows

        self.model, tokenizer = load_embedded_model()
        self.pad = tokenizer.pad_token_id
        rows = tokenize(
            load_rows(str(data), split=None)[:4000],
            tokenizer,
            max_length=MAX_LENGTH,
            prompt_column="question",
            completion_column="answer",
        )
        parts = split(rows, seed=0, probe=0, validation=HELD_OUT)
        self.train = list(parts.train)
        held_out = sorted(parts.validation, key=lambda row: len(row.input_ids))
        self.held_out = list(batches(held_out, BATCH_SIZE, self.pad))
        self.found = anatomy(self.model)
        sample = self.train[:200]
        tokens = sum(len(row.input_ids) for row in sample) // 200 * BATCH_SIZE
        labelled = sum(sum(label != -100 for label in row.labels) for row in sample) // 200 * BATCH_SIZE
        shape = StepShape(num_tokens=tokens, num_labelled_tokens=labelled, sequence_length=max(tokens // BATCH_SIZE, 1))
        self.cost = cost_model(self.found, shape)

    def environment(self) -> dict[str, str]:
        """Versions and hardware."""
        from aletheia_lora.environment import environment

        return environment()

    def run(self, choice: Choice, seed: int) -> dict:
        """Train one choice for uniform LoRA's time and look at the held-out rows."""
        import numpy as np
        import torch

        from aletheia_lora.adapter import attach, shared_copy
        from aletheia_lora.allocation import AllocationOptions, allocate
        from aletheia_lora.data import batches
        from aletheia_lora.fast_lora import FastLora
        from aletheia_lora.loss import heldout_loss, labelled_loss

        ranks = allocate(self.found, choice.layers, "matched", AllocationOptions(rank=16))
        rank = max(entry.rank for entry in ranks)
        share = self.share(choice, rank)
        steps = self.steps(choice, rank, share)
        adapted = attach(shared_copy(self.model), self.found, ranks, seed=seed)
        FastLora(adapted)
        draw = np.random.default_rng(seed)
        order = draw.permutation(len(self.train))
        if choice.epochs:
            order = np.concatenate([draw.permutation(order[:EPOCH_ROWS]) for _ in range(-(-steps // EPOCH_STEPS))])
        rows = [self.train[int(index)] for index in order[: steps * BATCH_SIZE]]
        weights = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        layer_of = {entry.name: entry.layer_idx for entry in ranks}
        early = [p for n, p in weights.items() if _layer(n, layer_of) < choice.cut]
        optimizer = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=0.0)
        losses = []
        adapted.train()
        for step, batch in enumerate(batches(rows, BATCH_SIZE, self.pad)):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            for parameter in early:
                parameter.requires_grad_(step % choice.every == 0)
            loss = labelled_loss(adapted, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return {
            "layers": list(choice.layers),
            "rank": rank,
            "lowest": min(choice.layers),
            "time_share": share,
            "steps": steps,
            "train_losses": losses,
            "heldout_loss": heldout_loss(adapted, self.held_out),
        }

    def steps(self, choice: Choice, rank: int, share: float) -> int:
        """Steps that fit in uniform LoRA's predicted time; a cache is of use from the second epoch on."""
        time = choice.epochs * EPOCH_STEPS or UNIFORM_STEPS
        if not choice.cached:
            return round(time / share)
        from training_methods import cached_steps

        return cached_steps(time, EPOCH_STEPS, share, self.cost.share(choice.layers, rank=rank, prefix_cached=True))

    def share(self, choice: Choice, rank: int) -> float:
        """Predicted time of a step against uniform LoRA's, averaged over the schedule; in the first epoch if cached."""
        whole = self.cost.share(choice.layers, rank=rank)
        if choice.every == 1:
            return whole
        late = [layer for layer in choice.layers if layer >= choice.cut]
        frozen = self.cost.adapters([layer for layer in choice.layers if layer < choice.cut], rank=rank) / 3
        shallow = self.cost.share(late, rank=rank) + frozen / self.cost.uniform(rank=16)  # they still run forward
        return whole / choice.every + shallow * (1 - 1 / choice.every)


def _layer(name: str, layer_of: dict[str, int]) -> int:
    module = name.removeprefix("base_model.model.").partition(".lora_")[0]
    return layer_of[module]


if __name__ == "__main__":
    main()
