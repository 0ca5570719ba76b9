"""Wall time, probe included, until uniform LoRA's final held-out loss is reached, for every way to choose layers."""

import argparse
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import scipy.stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_methods import NEED_PROBE, Setup, cached_steps, embedded_setup, method_plan, probed

from aletheia_lora.allocation import mean_ranks
from aletheia_lora.anatomy import ModelAnatomy, anatomy
from aletheia_lora.comparison.arms import Arm, CompareOptions
from aletheia_lora.comparison.runs import frozen_weights_put_back, run_of
from aletheia_lora.data import Parts, TokenizedRows, batches, split
from aletheia_lora.environment import environment
from aletheia_lora.errors import AletheiaError, ConfigError
from aletheia_lora.loss import heldout_loss
from aletheia_lora.planning import Plan
from aletheia_lora.prediction import probe_cost
from aletheia_lora.probe_result import ProbeResult
from aletheia_lora.training.interleave import Turn, take_turns

HERE = Path(__file__).resolve().parent
SPLIT_SEED, GRID_SEED = 0, 1000
LEARNING_RATES = (1e-3, 2e-3, 4e-3)


@dataclass(frozen=True)
class Method:
    """One way to train."""

    title: str
    plan: str
    """A key of ``training_methods.METHODS``."""
    rate_from: str
    """The method whose best learning rate this one takes: itself, or one with the same losses step by step."""
    trainer: str = "aletheia"
    cached: bool = False


METHODS = {
    "uniform": Method("uniform, our trainer", "uniform", "uniform"),
    "uniform_trainer": Method("uniform, plain PEFT under Trainer", "uniform", "uniform", trainer="trainer"),
    "paper": Method("paper's half", "paper", "paper"),
    "last": Method("last half", "last", "last"),
    "random": Method("random, as many layers and weights as ours", "random", "random"),
    "budget": Method("ours, budget 0.8", "budget_80", "budget"),
    "budget_cached": Method("ours, budget 0.8, prefix cache", "budget_80", "budget", cached=True),
}
YARDSTICKS = ("uniform", "uniform_trainer")
"""Uniform LoRA through our trainer, and as it is run today; its losses are the same."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is fixed before running."""

    uniform_steps: int = 48
    grid_steps: int = 48
    """Steps of uniform LoRA in a run of the grid; other methods take as many as fit in their time."""
    every: int = 6
    """About so many steps between two looks at the held-out rows."""
    train_rows: int = 96
    heldout_rows: int = 32
    validation_rows: int = 24
    """Rows that choose the learning rate, and nothing else."""
    probe_rows: int = 8
    learning_rates: tuple[float, ...] = LEARNING_RATES


class Records:
    """The lines of ``records.jsonl``; each run is written when it ends, and found again by a later start."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "records.jsonl"
        self.lines: list[dict[str, Any]] = []
        if self.file.exists():
            self.lines = [json.loads(line) for line in self.file.read_text().splitlines()]

    def add(self, record: dict[str, Any]) -> None:
        self.lines.append(record)
        with self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        """Those that have these values."""
        return [line for line in self.lines if all(line.get(key) == value for key, value in wanted.items())]


class Bench:
    """The model, the rows in their parts, and one probe a seed, kept as a file so that a resumed run plans alike."""

    def __init__(self, setup: Setup, settings: Settings, folder: Path, say: Callable[[str], None]) -> None:
        self.setup, self.settings, self.folder, self.say = setup, settings, folder, say
        self.found: ModelAnatomy = anatomy(setup.model)
        parts = split(setup.rows, seed=SPLIT_SEED, probe=0, validation=settings.heldout_rows + settings.validation_rows)
        self.held_out = self.batches_of(parts.validation[: settings.heldout_rows])
        self.validation = self.batches_of(parts.validation[settings.heldout_rows :])
        self.rest = parts.train

    def batches_of(self, rows: TokenizedRows) -> list[dict[str, Any]]:
        """All rows, shortest first so that little is padded."""
        ordered = sorted(rows, key=lambda row: len(row.input_ids))
        return list(batches(ordered, min(self.setup.batch_size, len(ordered)), self.setup.pad))

    def parts(self, seed: int) -> Parts:
        """The rows that this seed probes and trains on: disjoint, and from none that are looked at."""
        return split(self.rest, seed=seed, probe=self.settings.probe_rows, validation=0)

    def train(self, seed: int) -> TokenizedRows:
        """The rows that every method of this seed trains on."""
        return self.parts(seed).train[: self.settings.train_rows]

    def probe(self, seed: int) -> ProbeResult:
        """The probe of this seed, from its file if there is one."""
        file = self.folder / f"probe-{seed}.json"
        if not file.exists():
            self.say(f"seed {seed}: probing")
            _, measured = probed(self.setup, self.parts(seed).probe, self.train(seed), seed)
            measured.save(file)
        return ProbeResult.load(file)

    def horizon(self, method: Method, plan: Plan, uniform_steps: int, measured: ProbeResult) -> int:
        """Steps that fit in the predicted time of ``uniform_steps`` steps of uniform LoRA."""
        cost = probe_cost(self.found, measured, self.setup.batch_size, calibrate=self.setup.calibrate)
        how = {"rank": mean_ranks(self.found, plan.ranks), "uniform_rank": self.setup.rank}
        share = cost.share(plan.selection.layers, **how)
        if not method.cached:
            return max(round(uniform_steps / share), 1)
        later = cost.share(plan.selection.layers, prefix_cached=True, **how)
        return cached_steps(uniform_steps, -(-self.settings.train_rows // self.setup.batch_size), share, later)

    def arm(self, name: str, seed: int, learning_rate: float, uniform_steps: int) -> Arm:
        """A run of this method.

        Raises:
            PlanError: If its plan cannot be made.
        """
        method, measured = METHODS[name], self.probe(seed)
        plan = method_plan(self.setup, method.plan, self.found, measured, seed)
        return Arm(
            name,
            method.title,
            "trained",
            method.trainer,
            plan,
            learning_rate,
            self.horizon(method, plan, uniform_steps, measured),
            full=True,
            probe_seconds=measured.seconds if method.plan in NEED_PROBE else 0.0,
            prefix_cache=method.cached,
        )

    def run(self, arm: Arm, seed: int, looked_at: list[dict[str, Any]], evaluations: int) -> Callable[[Turn], None]:
        """What takes the turns of this arm."""
        options = CompareOptions(
            steps=arm.steps, batch_size=self.setup.batch_size, evaluations=max(evaluations, 1), seed=seed
        )
        rows = self.train(seed).to_dataset()
        return run_of(
            arm,
            self.setup.model,
            self.setup.tokenizer,
            rows,
            self.setup.pad,
            options,
            held_out=looked_at,
            say=self.say,
        )


# --- the runs ---------------------------------------------------------------------------------------------------


def say_aside(line: str) -> None:
    """Progress, beside the tables."""
    print(line, file=sys.stderr, flush=True)


def measure(
    setup: Setup,
    settings: Settings,
    seeds: Sequence[int],
    folder: Path,
    say: Callable[[str], None] = say_aside,
) -> None:
    """Everything that is missing from the records: the grid first, then each seed's runs in turns.

    Raises:
        ConfigError: If the folder holds records of other settings.
    """
    records = Records(folder)
    bench = Bench(setup, settings, folder, say)
    fixed = {"model": setup.model_name, "batch_size": setup.batch_size, "rank": setup.rank, **asdict(settings)}
    fixed = json.loads(json.dumps({**fixed, "rows_digest": setup.rows.digest}))
    facts_file = folder / "environment.json"
    if records.lines and facts_file.exists():
        kept = json.loads(facts_file.read_text())["fixed"]
        changed = sorted(key for key in fixed if kept.get(key) != fixed[key])
        if changed:
            raise ConfigError(
                f"the records in {str(folder)!r} were made with another {', '.join(changed)}. Give another --output."
            )
    facts_file.write_text(json.dumps({**environment(), "fixed": fixed}, indent=1) + "\n")
    with frozen_weights_put_back(setup.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers' own advice, once per run
        search_rates(bench, records)
        for seed in seeds:
            run_seed(bench, records, seed)


def search_rates(bench: Bench, records: Records) -> None:
    """A short run of each method at each learning rate, looked at on the validation rows alone."""
    for name in dict.fromkeys(method.rate_from for method in METHODS.values()):
        for rate in bench.settings.learning_rates:
            key = {"kind": "grid", "method": name, "seed": GRID_SEED, "learning_rate": rate}
            if records.of(**key):
                continue
            try:
                arm = bench.arm(name, GRID_SEED, rate, bench.settings.grid_steps)
                (error,) = take_turns([bench.run(arm, GRID_SEED, bench.validation, 1)])
                if error is not None:
                    raise error
            except AletheiaError as error:  # a rate at which training breaks, or a plan that cannot be made
                records.add({**key, "validation_loss": None, "failed": f"{type(error).__name__}: {error}"})
            else:
                loss = arm.heldout[-1]["loss"]
                records.add({**key, "steps": arm.steps, "validation_loss": loss, "failed": None})


def best_rate(records: Records, name: str) -> float | None:
    """The rate of the grid with the lowest validation loss; None if no run of the method ended well."""
    tried = [
        (record["validation_loss"], record["learning_rate"])
        for record in records.of(kind="grid", method=METHODS[name].rate_from)
        if record["validation_loss"] is not None and math.isfinite(record["validation_loss"])
    ]
    return min(tried)[1] if tried else None


def run_seed(bench: Bench, records: Records, seed: int) -> None:
    """The methods that this seed still lacks, in turns; each is written down as soon as it ends."""
    missing = [name for name in METHODS if not records.of(kind="run", method=name, seed=seed)]
    if not missing:
        return
    base_loss = heldout_loss(bench.setup.model, bench.held_out)
    arms, waiting = {}, []
    for name in missing:
        rate = best_rate(records, name)
        try:
            if rate is None:
                raise AletheiaError("no learning rate of the grid ended well")
            arms[name] = bench.arm(name, seed, rate, bench.settings.uniform_steps)
        except AletheiaError as error:
            records.add(run_record(name, None, seed, base_loss, missing, f"{type(error).__name__}: {error}"))
    for arm in arms.values():
        run = bench.run(arm, seed, bench.held_out, round(arm.steps / bench.settings.every))
        waiting.append(written(arm, run, records, seed, base_loss, list(arms)))
    take_turns(waiting)


def written(
    arm: Arm, run: Callable[[Turn], None], records: Records, seed: int, base_loss: float, together: list[str]
) -> Callable[[Turn], None]:
    """The same run, which writes its record when it ends, well or not."""

    def run_and_write(turn: Turn) -> None:
        failed = None
        try:
            run(turn)
        except Exception as error:  # whatever a trainer raises is this run's outcome; the others go on
            failed = f"{type(error).__name__}: {error}"
        records.add(run_record(arm.name, arm, seed, base_loss, together, failed))

    return run_and_write


def run_record(
    name: str, arm: Arm | None, seed: int, base_loss: float, together: list[str], failed: str | None
) -> dict[str, Any]:
    """One finished run as plain JSON types; ``turns_with`` names those that it shared the machine with."""
    record: dict[str, Any] = {
        "kind": "run",
        "method": name,
        "title": METHODS[name].title,
        "seed": seed,
        "turns_with": together,
        "base_heldout_loss": base_loss,
        "failed": failed,
    }
    if arm is None:
        return {**record, "heldout": []}
    return {
        **record,
        "layers": list(arm.plan.selection.layers),
        "ranks": sorted({entry.rank for entry in arm.plan.ranks}),
        "trainable_params": arm.plan.trainable_params,
        "lowest_backward_layer": arm.lowest_backward_layer,
        "learning_rate": arm.learning_rate,
        "steps": arm.steps,
        "probe_seconds": arm.probe_seconds,
        "step_seconds": arm.step_seconds,
        "heldout": arm.heldout,
        "train_losses": arm.train_losses,
        "prefix_cache": arm.prefix_cache_record,
    }


# --- the report -------------------------------------------------------------------------------------------------


def seconds_to(loss: float, record: dict[str, Any]) -> float | None:
    """When the held-out loss first falls to ``loss``, on straight lines between two looks; None if it never does."""
    before = {"seconds": record.get("probe_seconds", 0.0), "loss": record["base_heldout_loss"]}
    for look in record["heldout"]:
        if look["loss"] <= loss:
            fallen = before["loss"] - look["loss"]
            share = 1.0 if fallen <= 0 else max((before["loss"] - loss) / fallen, 0.0)
            return float(before["seconds"] + share * (look["seconds"] - before["seconds"]))
        before = look
    return None


@dataclass(frozen=True)
class Outcome:
    """One run against uniform LoRA of the same seed."""

    seed: int
    ratio: float
    """Of the time to uniform's final loss to uniform's time to it; where never reached, of the time it was given."""
    reached: bool
    final_loss: float

    def __str__(self) -> str:
        if self.reached:
            return f"{self.ratio:.2f}"
        return f"never in {self.ratio:.2f} ({self.final_loss:.4f})"


def outcomes(
    records: Sequence[dict[str, Any]], name: str, yardstick: str = YARDSTICKS[0]
) -> tuple[list[Outcome], list[str]]:
    """What came of a method on each seed, and what failed."""
    uniform = {record["seed"]: record for record in records if record["method"] == yardstick and not record["failed"]}
    found, failed = [], []
    for record in records:
        if record["method"] != name:
            continue
        base = uniform.get(record["seed"])
        if record["failed"] or base is None:
            failed.append(f"seed {record['seed']} failed: {record['failed'] or 'uniform LoRA did'}")
            continue
        target = base["heldout"][-1]["loss"]
        taken, own = seconds_to(target, record), seconds_to(target, base)
        assert own is not None  # its last look is the target
        last = record["heldout"][-1]
        spent = last["seconds"] if taken is None else taken
        found.append(Outcome(record["seed"], spent / own, taken is not None, last["loss"]))
    return sorted(found, key=lambda outcome: outcome.seed), failed


def summary(found: Sequence[Outcome]) -> str:
    """Geometric mean with its 95 % t interval over log ratios; a bound where a run never got there."""
    if not found:
        return "none"
    logs = [math.log(outcome.ratio) for outcome in found]
    mean = statistics.mean(logs)
    num_reached = sum(outcome.reached for outcome in found)
    if num_reached < len(found):
        return f"over {math.exp(mean):.2f}, {num_reached} of {len(found)} reached it"
    if len(found) == 1:
        return f"{math.exp(mean):.2f}, n = 1"
    half = float(scipy.stats.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.2f} ({math.exp(mean - half):.2f} to {math.exp(mean + half):.2f}), n = {len(found)}"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The grid and the times to uniform's loss, from the records alone."""
    runs = [line for line in lines if line["kind"] == "run"]
    grid = [line for line in lines if line["kind"] == "grid"]
    rates = sorted({line["learning_rate"] for line in grid})
    shown = ["Validation loss of the grid:", "", f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    shown.append("| --- |" + " --- |" * len(rates))
    for name in dict.fromkeys(line["method"] for line in grid):
        losses = {line["learning_rate"]: line["validation_loss"] for line in grid if line["method"] == name}
        cells = ["" if rate not in losses else _loss(losses[rate]) for rate in rates]
        shown.append(f"| {name} | {' | '.join(cells)} |")
    for yardstick in YARDSTICKS:
        title = METHODS[yardstick].title
        shown += ["", f"Time to the final held-out loss of {title}, probe included, as a share of its own:", ""]
        shown += ["| method | lowest layer | by seed | geometric mean |", "| --- | --- | --- | --- |"]
        for name in [name for name in METHODS if any(run["method"] == name for run in runs)]:
            found, failed = outcomes(runs, name, yardstick)
            lowest = sorted({min(run["layers"]) for run in runs if run["method"] == name and run.get("layers")})
            cells = [*map(str, found), *failed]
            mean = summary(found) + (f"; {len(failed)} failed" if failed else "")
            shown.append(f"| {METHODS[name].title} | {', '.join(map(str, lowest))} | {'; '.join(cells)} | {mean} |")
    apart = sorted({run["seed"] for run in runs if len(_tables_of(runs, run["seed"])) > 1})
    if apart:
        shown += ["", f"Seeds {', '.join(map(str, apart))} were resumed: not all of their runs took turns together."]
    return "\n".join(shown)


def _loss(loss: float | None) -> str:
    return "failed" if loss is None else f"{loss:.4f}"


def _tables_of(runs: Sequence[dict[str, Any]], seed: int) -> set[tuple[str, ...]]:
    return {tuple(run["turns_with"]) for run in runs if run["seed"] == seed and run["heldout"]}


def main() -> None:
    """Run what is missing, or print the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the records")
    parser.add_argument("--print", action="store_true", help="only print the tables of the records")
    arguments = parser.parse_args()
    if not arguments.print:
        if arguments.data is None:
            parser.error("--data is needed to run: the path of GSM8K's train.jsonl")
        measure(embedded_setup(arguments.data), Settings(), arguments.seeds, arguments.output)
    print(table(Records(arguments.output).lines))


if __name__ == "__main__":
    main()
