"""An arm -> a run that takes its turns: the adapted copy of the model, the real trainer around it, its clock."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
import trl
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..adapter import shared_copy
from ..data import TokenizedRow, collate
from ..files import whole_folder
from ..planning import Plan
from ..processes import world_size
from ..training.interleave import Turn
from ..training.prefix_cache import PrefixCacheOptions
from ..training.trainer import SFTTrainer, attach_plan
from .arms import Arm, CompareOptions
from .watch import Pace, Watch

FULL_PRECISION = {"gradient_checkpointing": False, "bf16": False}
"""What ``trl_fast`` and our trainer change of TRL's configuration: the model's own dtype, nothing computed twice."""
TRL_SWITCHES: dict[str, dict[str, Any]] = {
    "trl_as_shipped": {},
    "trl_no_checkpointing": {"gradient_checkpointing": False},
}
"""What other trainers of TRL's change of it; bf16 autocast, its default, stays on."""


def run_of(
    arm: Arm,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    pad: int,
    options: CompareOptions,
    *,
    held_out: list[dict[str, Tensor]] | None = None,
    keep: Path | None = None,
    say: Callable[[str], None] = lambda _line: None,
    adapt: Callable[[Any, Plan, int], PeftModel] = attach_plan,
    prepare: Callable[[Any], None] = lambda _trainer: None,
) -> Callable[[Turn], None]:
    """What ``take_turns`` runs for this arm; seconds, losses and depth of backward are noted in the arm.

    Args:
        arm: What to train, and with which trainer.
        model: Base model; the run trains adapters on a copy that shares its weights.
        tokenizer: Its tokenizer, which TRL wants for padding.
        rows: Tokenized rows.
        pad: Token to pad with.
        options: Batch size, evaluations and seed.
        held_out: Batches to evaluate on, for a full arm.
        keep: Save a full arm's adapter here, in a folder named after the arm.
        say: Called with a line at each evaluation.
        adapt: Puts the adapters on the copy.
        prepare: Called with the trainer before it trains, after the clock's own callback was added.
    """

    def run(turn: Turn) -> None:
        turn.begin()
        try:
            with tempfile.TemporaryDirectory() as folder:
                adapted = adapt(shared_copy(model, own=arm.plan.rewritten_modules), arm.plan, options.seed)
                trainer = make_trainer(arm, adapted, tokenizer, rows, pad, options, folder)
                if arm.pace is not None:
                    trainer.add_callback(Pace(arm))
                watch = Watch(arm, turn, adapted, held_out or [], options.evaluations, say)
                trainer.add_callback(watch)
                prepare(trainer)
                trainer.train()
                arm.lowest_backward_layer = min(watch.reached, default=None)
                arm.train_losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
                arm.prefix_cache_record = getattr(trainer, "prefix_cache_record", None)
                if keep is not None and arm.full:
                    with whole_folder(keep / arm.name) as finished:
                        adapted.save_pretrained(str(finished), save_embedding_layers=False)
        finally:
            arm.ended = True

    return run


def make_trainer(
    arm: Arm, adapted: PeftModel, tokenizer: Any, rows: Dataset, pad: int, options: CompareOptions, folder: str
) -> Any:
    """The trainer that the arm names, around a model that carries its adapters."""
    common: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": arm.steps,
        "per_device_train_batch_size": options.batch_size // arm.gradient_accumulation // world_size(),
        "gradient_accumulation_steps": arm.gradient_accumulation,
        "learning_rate": arm.learning_rate,
        "lr_scheduler_type": "linear" if arm.pace is None else "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": options.seed,
        "data_seed": options.seed,
        "use_cpu": next(adapted.parameters()).device.type == "cpu",
    }
    if arm.trainer == "trainer":
        args = TrainingArguments(**common, remove_unused_columns=False)
        trainer: Any = Trainer(model=adapted, args=args, train_dataset=rows, data_collator=_collator(pad))
    else:
        args = trl.SFTConfig(**common, **TRL_SWITCHES.get(arm.trainer, FULL_PRECISION), max_length=None)
        if arm.trainer == "aletheia":
            trainer = SFTTrainer(
                adapted,
                args,
                plan=arm.plan,
                train_dataset=rows,
                processing_class=copy.deepcopy(tokenizer),
                prefix_cache=PrefixCacheOptions(folder=arm.prefix_cache_dir) if arm.prefix_cache else None,
            )
        else:
            trainer = trl.SFTTrainer(adapted, args, train_dataset=rows, processing_class=copy.deepcopy(tokenizer))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@contextlib.contextmanager
def frozen_weights_put_back(model: nn.Module) -> Iterator[None]:
    """The arms share the model's weights and freeze them; afterwards their flags are as found."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _collator(pad: int) -> Callable[[list[Mapping[str, Any]]], dict[str, Tensor]]:
    return lambda rows: collate([TokenizedRow(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows], pad)
