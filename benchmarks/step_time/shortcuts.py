"""What each shortcut of our trainer is worth: steps with all of them beside steps without one, taking turns."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rivals
from training_methods import Setup, embedded_setup, method_plan, probed

from aletheia_lora.comparison.arms import Arm, CompareOptions
from aletheia_lora.comparison.runs import frozen_weights_put_back, run_of
from aletheia_lora.environment import environment
from aletheia_lora.training.interleave import take_turns

METHODS = {"uniform": "uniform", "budget_80": "budget 0.8", "stride_third": "every third layer, budget 0.8"}
FILE = "shortcuts.json"


class StayPadded(TrainerCallback):
    """Leaves the padding in; added after the trainer's own callback, which takes it out."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unpadded = self.trainer._shortcuts.unpadded
        unpadded.remove()
        unpadded.turned_off = "this benchmark wants padding"


class Noted(TrainerCallback):
    """What was really on while the steps ran."""

    def __init__(self) -> None:
        self.installed: list[str] = []
        self.num_padding_left_out = 0

    def join(self, trainer: Any) -> None:
        """Look at this trainer after each of its steps."""
        self.trainer = trainer
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.installed = [type(shortcut).__name__ for shortcut in self.trainer._shortcuts.installed]
        self.num_padding_left_out = rivals.padding_left_out(self.trainer)


def leave_fast_adapters_out(trainer: Any) -> None:
    """Adapters run as PEFT runs them."""
    trainer._shortcuts.fast_adapters = False


def leave_padding_in(trainer: Any) -> None:
    """Batches are computed as wide as their longest row."""
    trainer.add_callback(StayPadded(trainer))


def leave_the_loss_to_trl(trainer: Any) -> None:
    """Logits of every position by TRL's own head and loss, which need the padding."""
    trainer._computes_the_loss = lambda _device: False


def compile_layers(trainer: Any) -> None:
    """Each layer through torch.compile, the one option that is off by default."""
    trainer._shortcuts.compile_layers = True


@dataclass(frozen=True)
class Variant:
    """Our trainer with one thing changed."""

    title: str
    change: Callable[[Any], None]


AS_IT_IS = "as it is"
VARIANTS = {
    AS_IT_IS: Variant("as it is", lambda _trainer: None),
    "peft_adapters": Variant("without fast adapters", leave_fast_adapters_out),
    "padded": Variant("with the padding left in", leave_padding_in),
    "trl_loss": Variant("with TRL's loss: logits of every position, and padding", leave_the_loss_to_trl),
    "compiled": Variant("with compiled layers", compile_layers),
}


def measured(setup: Setup, steps: int, num_batches: int) -> dict[str, Any]:
    """Every variant of every method in turns: seconds of each step, and the losses that show what was computed."""
    probe_part, train = rivals.rows_of(setup, num_batches)
    found, probe = probed(setup, probe_part, train, rivals.SEED)
    options = CompareOptions(steps=steps, batch_size=setup.batch_size, seed=rivals.SEED)
    arms, notes, runs = [], [], []
    for method in METHODS:
        plan = method_plan(setup, method, found, probe, rivals.SEED)
        for name, variant in VARIANTS.items():
            arm = Arm(name, method, "timed", "aletheia", plan, rivals.LEARNING_RATE, steps, full=False)
            noted = Noted()

            def prepare(trainer: Any, variant: Variant = variant, noted: Noted = noted) -> None:
                noted.join(trainer)
                variant.change(trainer)

            arms.append(arm)
            notes.append(noted)
            rows = train.to_dataset()
            runs.append(run_of(arm, setup.model, setup.tokenizer, rows, setup.pad, options, prepare=prepare))
    with frozen_weights_put_back(setup.model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainer's own advice, once per run
        for error in take_turns(runs):
            if error is not None:
                raise error
    records = [
        {
            "method": arm.title,
            "variant": arm.name,
            "layers": list(arm.plan.selection.layers),
            "installed": noted.installed,
            "num_padding_left_out": noted.num_padding_left_out,
            "step_seconds": arm.step_seconds,
            "train_losses": arm.train_losses,
        }
        for arm, noted in zip(arms, notes, strict=True)
    ]
    return {"environment": environment(), "batch_size": setup.batch_size, "batches": num_batches, "runs": records}


def table(record: dict[str, Any]) -> str:
    """How many times the seconds of a step as it is each variant takes, step by step, and what the layers save.

    The first epoch warms up and is left out.
    """
    runs = {(run["method"], run["variant"]): run for run in record["runs"]}

    def cell(run: dict[str, Any], base: dict[str, Any]) -> str:
        return rivals.in_words(rivals.ratios(run, base, range(record["batches"], len(run["step_seconds"]))))

    shown = [f"| our trainer | {' | '.join(METHODS.values())} |", "| --- |" + " --- |" * len(METHODS)]
    for name, variant in VARIANTS.items():
        cells = [cell(runs[method, AS_IT_IS], runs[method, name]) for method in METHODS]
        shown.append(f"| {variant.title} | {' | '.join(cells)} |")
    faster = [cell(runs[method, AS_IT_IS], runs["uniform", AS_IT_IS]) for method in METHODS]
    chosen = [len(runs[method, AS_IT_IS]["layers"]) for method in METHODS]
    lowest = [min(runs[method, AS_IT_IS]["layers"]) for method in METHODS]
    shown.append(f"| uniform as it is, beside this as it is | {' | '.join(faster)} |")
    shown.append(f"| layers (lowest) | {' | '.join(f'{n} ({low})' for n, low in zip(chosen, lowest, strict=True))} |")
    return "\n".join(shown)


def main() -> None:
    """Measure and print, or print the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--steps", type=int, default=18, help="steps of each run, the first epoch included")
    parser.add_argument("--batches", type=int, default=6, help="batches in an epoch; the first epoch warms up")
    parser.add_argument("--output", type=Path, default=rivals.HERE, help="folder for the record")
    parser.add_argument("--print", action="store_true", help="only print the table of the record")
    arguments = parser.parse_args()
    file = arguments.output / FILE
    if not arguments.print:
        if arguments.data is None:
            parser.error("--data is needed to run: the path of GSM8K's train.jsonl")
        record = measured(embedded_setup(arguments.data), arguments.steps, arguments.batches)
        file.write_text(json.dumps(record, indent=1) + "\n")
    print(table(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
