"""Where the time of an optimizer step goes: each operation's own seconds under the profiler, by kind."""

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
from training_methods import embedded_setup, method_plan, probed

from aletheia_lora.comparison.arms import CompareOptions
from aletheia_lora.comparison.runs import run_of
from aletheia_lora.environment import environment
from aletheia_lora.training.interleave import take_turns

KINDS = {
    "matrix products": r"aten::(mm|addmm_?|bmm|baddbmm|linear|matmul)$",
    "attention": r"attention|sdp",
    "softmax and loss": r"softmax|log|exp|amax|nll|cross_entropy|gather|scatter|sum",
    "gates and norms": r"silu|sigmoid|rsqrt|pow|mean|mul|div|neg",
    "copies and casts": r"copy_|clone|contiguous|to\b|cat|fill_|zero_|empty|index",
    "additions": r"add",
    "optimizer": r"[Oo]ptimizer|adam|_foreach",
}
"""Kinds of operations, and what their names hold; an operation is of the first kind that fits."""
ELSE = "everything else"


class Profiled(TrainerCallback):
    """Watches every step but the first, which warms up."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.steps = 0

    def join(self, trainer: Any) -> None:
        """Watch this trainer."""
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = profile(activities=[ProfilerActivity.CPU]) if state.global_step else None
        if self.seen is not None:
            self.seen.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seen is None:
            return
        self.seen.__exit__(None, None, None)
        self.steps += 1
        for event in self.seen.key_averages():
            self.seconds[event.key] += event.self_cpu_time_total / 1e6


def kind_of(name: str) -> str:
    """The kind of an operation."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name)), ELSE)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each rival under the profiler: seconds of a step, and of every operation by itself."""
    setup = embedded_setup(arguments.data)
    probe_part, train = rivals.rows_of(setup, arguments.steps)
    found, probe = probed(setup, probe_part, train, rivals.SEED)
    options = CompareOptions(steps=arguments.steps, batch_size=setup.batch_size, seed=rivals.SEED)
    record: dict[str, Any] = {"environment": environment(), "rivals": {}}
    for name in arguments.only:
        plan = method_plan(setup, rivals.RIVALS[name].method, found, probe, rivals.SEED)
        arm = rivals.arm_of(name, plan, arguments.steps)
        watch = Profiled()
        rows = train.to_dataset()
        run = run_of(arm, setup.model, setup.tokenizer, rows, setup.pad, options, prepare=watch.join)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the trainer's own advice
            (error,) = take_turns([run])
        if error is not None:
            raise error
        seconds = {operation: total / watch.steps for operation, total in watch.seconds.most_common()}
        record["rivals"][name] = {"steps": watch.steps, "seconds": seconds}
    return record


def table(record: dict[str, Any]) -> str:
    """Share of each kind, one column a rival."""
    runs = record["rivals"]
    shown = [f"| kind | {' | '.join(rivals.RIVALS[name].title for name in runs)} |", "| --- |" + " --- |" * len(runs)]
    for kind in [*KINDS, ELSE]:
        cells = []
        for run in runs.values():
            of_kind = sum(seconds for operation, seconds in run["seconds"].items() if kind_of(operation) == kind)
            cells.append(f"{of_kind / sum(run['seconds'].values()):.1%}")
        shown.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(shown)


def main() -> None:
    """Measure and print, or print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument(
        "--only", nargs="+", choices=rivals.RIVALS, default=["uniform_trainer", "uniform_ours", "budget_70"]
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, default=rivals.HERE, help="folder for the record")
    parser.add_argument("--print", action="store_true", help="only print the table of the record")
    arguments = parser.parse_args()
    file = arguments.output / "profile.json"
    if not arguments.print:
        if arguments.data is None:
            parser.error("--data is needed to run: the path of GSM8K's train.jsonl")
        file.write_text(json.dumps(measured(arguments), indent=1) + "\n")
    print(table(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
