"""Seconds of one optimizer step: our trainer and selections beside the rivals, taking turns on the same rows."""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training_methods import Setup, embedded_setup, method_plan, probed

from aletheia_lora.allocation import mean_ranks
from aletheia_lora.anatomy import ModelAnatomy
from aletheia_lora.calibration import measured_rate
from aletheia_lora.campaign.baselines import prepared
from aletheia_lora.comparison.arms import Arm, CompareOptions
from aletheia_lora.comparison.runs import frozen_weights_put_back, run_of
from aletheia_lora.cost import BACKWARD_PENALTY, HEAD_PENALTY, CostModel, StepShape, cost_model
from aletheia_lora.data import TokenizedRows, split
from aletheia_lora.environment import environment
from aletheia_lora.errors import AletheiaError
from aletheia_lora.padding import trl_skips_unlabelled
from aletheia_lora.planning import Plan
from aletheia_lora.probe_result import ProbeResult
from aletheia_lora.training.interleave import Turn, take_turns
from aletheia_lora.training.trainer import SFTTrainer, attach_plan

HERE = Path(__file__).resolve().parent
SEED, PROBE_ROWS, LEARNING_RATE = 0, 8, 2e-3


@dataclass(frozen=True)
class Rival:
    """One way to take a step."""

    title: str
    method: str
    """A key of ``training_methods.METHODS``."""
    trainer: str
    """As in ``comparison.arms.Arm``."""
    adapter: str = "lora"
    cached: bool = False


RIVALS = {
    "uniform_trainer": Rival("uniform, plain PEFT under Trainer", "uniform", "trainer"),
    "uniform_trl": Rival("uniform, TRL as shipped", "uniform", "trl_as_shipped"),
    "uniform_trl_no_checkpointing": Rival("uniform, TRL, checkpointing off", "uniform", "trl_no_checkpointing"),
    "uniform_trl_fast": Rival("uniform, TRL, checkpointing and bf16 off", "uniform", "trl_fast"),
    "uniform_ours": Rival("uniform, our trainer", "uniform", "aletheia"),
    "paper_trainer": Rival("paper's half, Trainer", "paper", "trainer"),
    "paper_trl": Rival("paper's half, TRL as shipped", "paper", "trl_as_shipped"),
    "paper_trl_fast": Rival("paper's half, TRL, checkpointing and bf16 off", "paper", "trl_fast"),
    "paper_ours": Rival("paper's half, our trainer", "paper", "aletheia"),
    "last_trainer": Rival("last half, Trainer", "last", "trainer"),
    "last_ours": Rival("last half, our trainer", "last", "aletheia"),
    "budget_80": Rival("budget 0.8, our trainer", "budget_80", "aletheia"),
    "budget_70": Rival("budget 0.7, our trainer", "budget_70", "aletheia"),
    "budget_50": Rival("budget 0.5, our trainer", "budget_50", "aletheia"),
    "budget_quarter": Rival("budget, a quarter of the layers, our trainer", "budget_quarter", "aletheia"),
    "budget_70_cached": Rival("budget 0.7, prefix cache", "budget_70", "aletheia", cached=True),
    "budget_50_cached": Rival("budget 0.5, prefix cache", "budget_50", "aletheia", cached=True),
    "budget_quarter_cached": Rival("budget, a quarter, prefix cache", "budget_quarter", "aletheia", cached=True),
    "dora_trainer": Rival("uniform DoRA, Trainer", "uniform", "trainer", adapter="dora"),
    "adalora_trainer": Rival("uniform AdaLoRA, Trainer", "uniform", "trainer", adapter="adalora"),
}
YARDSTICK = "uniform_trainer"
UNIFORM_RIVALS = ("uniform_trainer", "uniform_trl", "uniform_trl_no_checkpointing", "uniform_trl_fast")


# --- what is run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long to look, fixed before running."""

    steps: int = 18
    num_batches: int = 6
    """Batches that are cycled: an epoch is this many steps, its rows shuffled anew for everybody alike."""
    time_limit: float = float("inf")
    """Seconds of taking turns after which no further step begins."""


class UntilTimeIsOver(TrainerCallback):
    """Ends the run when its turn comes back too late; added after the clock, whose call hands the turn on."""

    def __init__(self, over: Callable[[], bool]) -> None:
        self.over = over

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.over():
            control.should_training_stop = True


def rows_of(setup: Setup, num_batches: int) -> tuple[TokenizedRows, TokenizedRows]:
    """Rows for the probe, and the few that training cycles through."""
    parts = split(setup.rows, seed=SEED, probe=PROBE_ROWS, validation=0)
    return parts.probe, parts.train[: num_batches * setup.batch_size]


def adapter_of(kind: str, steps: int) -> Callable[[Any, Plan, int], PeftModel]:
    """What puts the adapters on: ours for LoRA, PEFT's own configurations for its relatives."""
    if kind == "lora":
        return attach_plan

    def adapt(model: Any, plan: Plan, seed: int) -> PeftModel:
        config = plan.lora_config()
        if kind == "dora":
            config.use_dora = True
        else:  # starts at 1.5 times the rank that it ends with, as PEFT's defaults do
            config = AdaLoraConfig(
                init_r=config.r * 3 // 2,
                target_r=config.r,
                lora_alpha=config.lora_alpha,
                target_modules=config.target_modules,
                total_step=steps,
                task_type=config.task_type,
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, config)

    return adapt


def run_for(
    arm: Arm, seen: list[dict[str, int]], setup: Setup, rows: Any, over: Callable[[], bool]
) -> Callable[[Turn], None]:
    """What takes the turns of one rival; ``seen`` fills with each batch's rows, padded length, predicted labels, real
    tokens and sum of squared row lengths, and with whether its step was seen to leave padding out."""
    rival = RIVALS[arm.name]

    def prepare(trainer: Any) -> None:
        take_step = trainer.training_step

        def noted(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            num_rows, length = inputs["input_ids"].shape
            labelled = int((inputs["labels"][:, 1:] != -100).sum())
            lengths = inputs["attention_mask"].sum(dim=1)
            tokens = {"tokens": int(lengths.sum()), "squares": int(lengths.square().sum())}
            seen.append({"rows": num_rows, "length": length, "labelled": labelled, **tokens})
            before = padding_left_out(trainer)
            loss = take_step(model, inputs, *rest, **named)
            seen[-1]["unpadded"] = padding_left_out(trainer) > before
            return loss

        trainer.training_step = noted
        trainer.add_callback(UntilTimeIsOver(over))
        prepared(rival.adapter)(trainer)

    options = CompareOptions(steps=arm.steps, batch_size=setup.batch_size, seed=SEED)
    adapt = adapter_of(rival.adapter, arm.steps)
    return run_of(arm, setup.model, setup.tokenizer, rows, setup.pad, options, adapt=adapt, prepare=prepare)


def padding_left_out(trainer: Any) -> int:
    """Tokens of padding that this trainer did not compute so far; of other trainers than ours 0."""
    unpadded = trainer._shortcuts.unpadded if isinstance(trainer, SFTTrainer) else None
    return 0 if unpadded is None else int(unpadded.num_padding)


def arm_of(name: str, plan: Plan, steps: int) -> Arm:
    """The arm of this rival."""
    rival = RIVALS[name]
    return Arm(
        name, rival.title, "timed", rival.trainer, plan, LEARNING_RATE, steps, full=False, prefix_cache=rival.cached
    )


def planned(
    setup: Setup, names: Sequence[str], found: ModelAnatomy, measured: ProbeResult
) -> tuple[dict[str, Plan], dict[str, str]]:
    """The plan of each rival, and the reason of each that has none."""
    plans, failed = {}, {}
    for name in names:
        try:
            plans[name] = method_plan(setup, RIVALS[name].method, found, measured, SEED)
        except AletheiaError as error:
            failed[name] = f"{type(error).__name__}: {error}"
    return plans, failed


def measure(
    setup: Setup, names: Sequence[str], settings: Settings
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Plan]]:
    """All rivals in turns: their records, what these stand on, and the plans."""
    names = [name for name in RIVALS if name in names or name == YARDSTICK]
    probe_part, train = rows_of(setup, settings.num_batches)
    found, measured = probed(setup, probe_part, train, SEED)
    plans, failed = planned(setup, names, found, measured)
    arms = {name: arm_of(name, plan, settings.steps) for name, plan in plans.items()}
    seen: dict[str, list[dict[str, int]]] = {name: [] for name in names}
    rates: list[tuple[float, float]] = []
    started = time.perf_counter()

    def over() -> bool:
        return time.perf_counter() - started > settings.time_limit

    rows = train.to_dataset()
    runs = [run_for(arm, seen[name], setup, rows, over) for name, arm in arms.items()]
    with frozen_weights_put_back(setup.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers' own advice, once per run
        errors = take_turns([rate_run(rates, found, train, setup.batch_size, settings.steps, over), *runs])
    if errors[0] is not None:
        raise errors[0]
    failed |= {name: f"{type(e).__name__}: {e}" for name, e in zip(arms, errors[1:], strict=True) if e is not None}
    epoch = -(-len(train) // setup.batch_size)
    records = [record_of(name, arms.get(name), seen[name], found, epoch, failed.get(name)) for name in names]
    facts = {
        **environment(),
        "model": setup.model_name,
        "steps": settings.steps,
        "batch_size": setup.batch_size,
        "num_rows": len(train),
        "train_digest": train.digest,
        "probe_seconds": measured.seconds,
        "square_operations_per_second": [square for square, _ in rates],
        "shapes_operations_per_second": [shapes for _, shapes in rates],
    }
    return records, facts, plans


def write(folder: Path, records: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Records and what they stand on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")


def record_of(
    name: str, arm: Arm | None, seen: list[dict[str, int]], found: ModelAnatomy, epoch: int, failed: str | None
) -> dict[str, Any]:
    """One rival as plain JSON types; where there is no plan, the reason alone."""
    rival = RIVALS[name]
    record: dict[str, Any] = {
        "name": name,
        "title": rival.title,
        "method": rival.method,
        "trainer": rival.trainer,
        "adapter": rival.adapter,
        "cached": rival.cached,
        "failed": failed,
    }
    if arm is None:
        return {**record, "step_seconds": [], "epochs": []}
    steps = range(len(arm.step_seconds))
    lowest = arm.plan.selection.lowest if arm.lowest_backward_layer is None else arm.lowest_backward_layer
    return {
        **record,
        "layers": list(arm.plan.selection.layers),
        "ranks": sorted({entry.rank for entry in arm.plan.ranks}),
        "trainable_params": arm.plan.trainable_params,
        "lowest_backward_layer": arm.lowest_backward_layer,
        "step_seconds": arm.step_seconds,
        "epochs": [step // epoch for step in steps],
        "shapes": seen,
        "operations": [
            operations(found, arm, rival, seen[step], lowest, replayed=rival.cached and step >= epoch) for step in steps
        ],
        "first_loss": arm.train_losses[0] if arm.train_losses else None,
        "prefix_cache": arm.prefix_cache_record,
        "peak_bytes": None,
    }


# --- the arithmetic ---------------------------------------------------------------------------------------------


def bare_counts(found: ModelAnatomy, shape: StepShape) -> CostModel:
    """Operations alone: the cost model without its penalties for what is not a matrix product."""
    counted = cost_model(found, shape)
    return replace(
        counted,
        backward=tuple(part / BACKWARD_PENALTY for part in counted.backward),
        head=counted.head / HEAD_PENALTY,
        head_all_tokens=counted.head_all_tokens / HEAD_PENALTY,
        adapter_fixed=(0.0,) * found.num_layers,
    )


def operations(
    found: ModelAnatomy, arm: Arm, rival: Rival, shape: dict[str, int], lowest: int, *, replayed: bool
) -> float:
    """Floating-point operations of one step of this rival, on this batch, down to the layer that backward reached."""
    tokens, length = shape["rows"] * shape["length"], shape["length"]
    if shape.get("unpadded"):  # each token meets those of its own row
        tokens, length = shape["tokens"], round(shape["squares"] / shape["tokens"])
    labelled = max(shape["labelled"], 1)
    counts = bare_counts(
        found, StepShape(num_tokens=tokens, num_labelled_tokens=labelled, sequence_length=max(length, 1))
    )
    checkpointing = rival.trainer == "trl_as_shipped"
    everywhere = rival.trainer == "trainer" or (
        rival.trainer.startswith("trl") and not trl_skips_unlabelled(torch.device("cpu"))
    )
    base = counts.without_adapters(lowest, checkpointing=checkpointing, prefix_cached=replayed, all_logits=everywhere)
    ranks = mean_ranks(found, arm.plan.ranks)
    return base + counts.adapters(arm.plan.selection.layers, rank=ranks, checkpointing=checkpointing)


def shapes_rate(found: ModelAnatomy, num_tokens: int) -> float:
    """Operations a second of the model's own matrix products on this many tokens, each shape as often as it occurs."""
    shapes = [(module.in_features, module.out_features) for module in found.modules]
    total, seconds = 0.0, 0.0
    for sides in sorted(set(shapes)):
        weight, inputs = torch.ones(*sides), torch.ones(num_tokens, sides[0])
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            inputs @ weight
            taken.append(time.perf_counter() - started)
        total += shapes.count(sides) * 2.0 * num_tokens * sides[0] * sides[1]
        seconds += shapes.count(sides) * min(taken)
    return total / seconds


def rate_run(
    rates: list[tuple[float, float]],
    found: ModelAnatomy,
    train: TokenizedRows,
    batch_size: int,
    turns: int,
    over: Callable[[], bool],
) -> Callable[[Turn], None]:
    """A seat at the table for plain matrix products, so that the limit is of the same minutes as the steps."""
    num_tokens = batch_size * max(sum(len(row.input_ids) for row in train) // len(train), 1)

    def run(turn: Turn) -> None:
        turn.begin()
        for _ in range(turns):
            rates.append((measured_rate("cpu"), shapes_rate(found, num_tokens)))
            if over():
                return
            turn.end_of_step()

    return run


# --- memory -----------------------------------------------------------------------------------------------------


def resident_bytes(entry: str) -> int:
    """One entry of this process's memory, ``VmRSS`` (now) or ``VmHWM`` (highest)."""
    match = re.search(rf"{entry}:\s+(\d+)", Path("/proc/self/status").read_text())
    if match is None:
        raise OSError(f"/proc/self/status has no {entry}: peak memory can be measured on Linux only.")
    return int(match.group(1)) * 1024


def peak_bytes(setup: Setup, name: str, plan: Plan, num_batches: int) -> int:
    """Highest resident memory of one epoch of one rival, above that of the loaded model; needs a fresh process."""
    _, train = rows_of(setup, num_batches)
    with torch.no_grad():  # wake the libraries up and read every weight
        setup.model(torch.tensor([train[0].input_ids[:32]]))
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    arm = arm_of(name, plan, num_batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (error,) = take_turns([run_for(arm, [], setup, train.to_dataset(), lambda: False)])
    if error is not None:
        raise error
    return resident_bytes("VmHWM") - before


def add_memory(records: list[dict[str, Any]], plans: dict[str, Plan], arguments: argparse.Namespace) -> None:
    """Run each rival in a process of its own and note its peak, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        for record in records:
            if record["name"] not in plans:
                continue
            plan_file = plans[record["name"]].save(Path(folder) / f"{record['name']}.json")
            command = [sys.executable, __file__, "--peak", record["name"], "--plan", str(plan_file)]
            command += ["--data", str(arguments.data), "--batches", str(arguments.batches)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                record["peak_bytes"] = int(done.stdout.splitlines()[-1])
            else:
                record["peak_failed"] = done.stderr.strip()[-300:] or f"ended with {done.returncode}"


# --- the report -------------------------------------------------------------------------------------------------


def parts_of(record: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """The rows of the table that a record gives, each with its steps; the very first step warms up."""
    epochs = record["epochs"]
    if not record["cached"]:
        return [(record["title"], list(range(1, len(epochs))))]
    return [
        (f"{record['title']}, first epoch", [step for step in range(1, len(epochs)) if epochs[step] == 0]),
        (f"{record['title']}, later epochs", [step for step in range(1, len(epochs)) if epochs[step] > 0]),
    ]


def ratios(record: dict[str, Any], base: dict[str, Any], steps: Sequence[int]) -> list[float]:
    """How many times faster than ``base``, on each of these steps that both took."""
    shared = min(len(record["step_seconds"]), len(base["step_seconds"]))
    return [base["step_seconds"][step] / record["step_seconds"][step] for step in steps if step < shared]


def in_words(values: Sequence[float]) -> str:
    """Median and the 20th to 80th percentile."""
    if not values:
        return "no steps"
    low, middle, high = np.quantile(values, [0.2, 0.5, 0.8])
    return f"{middle:.2f}x ({low:.2f}-{high:.2f})"


def table(records: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Every rival against plain PEFT, against the fastest uniform rival, and against the arithmetic."""
    by_name = {record["name"]: record for record in records}
    base = by_name[YARDSTICK]
    if len(base["step_seconds"]) < 2:
        return f"Nothing to compare: {YARDSTICK} took fewer than two steps ({base['failed'] or 'its time was over'})."
    uniform = [by_name[name] for name in UNIFORM_RIVALS if name in by_name and len(by_name[name]["step_seconds"]) > 1]
    fastest = max(uniform, key=lambda record: statistics.median(ratios(record, base, parts_of(record)[0][1])))
    rate = max(statistics.median(facts[f"{kind}_operations_per_second"]) for kind in ("square", "shapes"))
    lines = [
        "| step | layers | backward to | against plain PEFT | against the fastest uniform | of the limit | MiB | n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        if record["failed"] is not None:
            lines.append(f"| {record['title']} | failed: {record['failed'].splitlines()[0]} | | | | | | |")
            continue
        peak = "failed" if "peak_failed" in record else ""
        if record["peak_bytes"] is not None:
            peak = f"{record['peak_bytes'] / 2**20:.0f}"
        for title, steps in parts_of(record):
            shares = [record["operations"][step] / rate / record["step_seconds"][step] for step in steps]
            limit = f"{statistics.median(shares):.0%}" if shares else ""
            lines.append(
                f"| {title} | {len(record['layers'])} | {record['lowest_backward_layer']} "
                f"| {in_words(ratios(record, base, steps))} | {in_words(ratios(record, fastest, steps))} "
                f"| {limit} | {peak} | {len(steps)} |"
            )
    lines += ["", f"Fastest uniform rival: {fastest['title']}. Limit: {rate / 1e9:.0f} billion operations a second."]
    odd = [record["name"] for record in records if not same_batches(record, base)]
    if odd:
        lines.append(f"Not comparable, their batches differ from plain PEFT's: {', '.join(odd)}.")
    return "\n".join(lines)


def same_batches(record: dict[str, Any], base: dict[str, Any]) -> bool:
    """True if both met batches of the same shapes, step by step, as far as both went."""
    shared = min(len(record["step_seconds"]), len(base["step_seconds"]))
    keys = ("rows", "length", "labelled")
    ours, theirs = ([[shape[key] for key in keys] for shape in each["shapes"][:shared]] for each in (record, base))
    return not shared or ours == theirs


def main() -> None:
    """Measure and show, or one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="steps of each rival, the first included")
    parser.add_argument("--batches", type=int, default=Settings.num_batches, help="batches in an epoch")
    parser.add_argument("--only", nargs="+", choices=RIVALS, default=list(RIVALS), help="only these, and plain PEFT")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds of taking turns")
    parser.add_argument("--memory", action="store_true", help="also run each in a process of its own for its peak")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the records")
    parser.add_argument("--print", action="store_true", help="show the records again, measure nothing")
    parser.add_argument("--peak", choices=RIVALS, help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.print and arguments.data is None:
        parser.error("--data is needed to measure: the path of GSM8K's train.jsonl")
    if arguments.peak:
        setup = embedded_setup(arguments.data)
        print(peak_bytes(setup, arguments.peak, Plan.load(arguments.plan), arguments.batches))
        return
    if not arguments.print:
        settings = Settings(steps=arguments.steps, num_batches=arguments.batches, time_limit=arguments.time_limit)
        records, facts, plans = measure(embedded_setup(arguments.data), arguments.only, settings)
        write(arguments.output, records, facts)  # before the memory runs, which may take as long again
        if arguments.memory:
            add_memory(records, plans, arguments)
            write(arguments.output, records, facts)
    kept = (arguments.output / "records.jsonl").read_text().splitlines()
    print(table([json.loads(line) for line in kept], json.loads((arguments.output / "environment.json").read_text())))


if __name__ == "__main__":
    main()
