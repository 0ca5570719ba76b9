"""Arms -> trained runs and their record: real trainers that take turns on one machine, over the same frozen weights."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import transformers
import trl
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..adapter import attach, shared_copy
from ..data import TokenizedRow, TokenizedRows, batches, collate
from ..errors import DataError
from ..loss import heldout_loss
from ..planning import Plan
from ..training.interleave import Turn, take_turns
from ..training.trainer import SFTTrainer
from .arms import Arm, CompareOptions, planned_arms
from .record import make_record
from .watch import Pace, Watch


def compare(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    train: TokenizedRows,
    validation: TokenizedRows,
    options: CompareOptions,
    *,
    model_name: str = "model",
    data_name: str = "data",
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Train every arm and return the record; the caller's model is left as found.

    The arms share the frozen weights of ``model``; each has modules and adapters of its own.

    Args:
        model: Base model.
        tokenizer: Its tokenizer, which TRL wants for padding.
        plan: The selection under test.
        train: Rows to train on, in the order of the seed.
        validation: Held-out rows, disjoint from ``train``.
        options: Steps, rates, controls.
        model_name: For the record.
        data_name: For the record.
        say: Called with a line of progress now and then.

    Raises:
        DataError: If there are fewer rows than a batch.
        PlanError: If the plan is not for this model.
    """
    plan.check_fits(model)
    if len(train) < options.batch_size:
        raise DataError(
            f"{len(train)} training rows are fewer than a batch of {options.batch_size}. Add rows or lower batch_size."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    held_out = _all_batches(validation, options.batch_size, pad)
    base_loss = heldout_loss(model, held_out)
    say(f"held-out loss before training {base_loss:.4f} ({len(validation)} rows)")
    arms = planned_arms(plan, options)
    rows = train.to_dataset()

    with _frozen_weights_put_back(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers' own advice, once per arm
        errors = take_turns([_run_of(arm, model, tokenizer, rows, held_out, pad, options, say) for arm in arms])
    for arm, error in zip(arms, errors, strict=True):
        if error is not None and arm.name in ("uniform", "selected"):
            raise error  # without these two there is nothing to compare
        if error is not None:
            arm.failed = f"{type(error).__name__}: {error}"
            say(f"{arm.name} failed: {arm.failed}")
    return make_record(plan, options, arms, base_loss, model_name, data_name, train, validation)


@contextlib.contextmanager
def _frozen_weights_put_back(model: nn.Module) -> Iterator[None]:
    """The arms share the model's weights and freeze them; afterwards their flags are as found."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _run_of(
    arm: Arm,
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    held_out: list[dict[str, Tensor]],
    pad: int,
    options: CompareOptions,
    say: Callable[[str], None],
) -> Callable[[Turn], None]:
    def run(turn: Turn) -> None:
        turn.begin()
        try:
            with tempfile.TemporaryDirectory() as folder:
                plan = arm.plan
                adapted = attach(
                    shared_copy(model), plan.anatomy, plan.ranks, lora_dropout=plan.lora_dropout, seed=options.seed
                )
                trainer = _trainer(arm, adapted, tokenizer, rows, pad, options, folder)
                if arm.pace is not None:
                    trainer.add_callback(Pace(arm))
                watch = Watch(arm, turn, adapted, held_out, options.evaluations, say)
                trainer.add_callback(watch)
                trainer.train()
                arm.lowest_backward_layer = min(watch.reached, default=None)
                arm.train_losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        finally:
            arm.ended = True

    return run


def _trainer(
    arm: Arm, adapted: PeftModel, tokenizer: Any, rows: Dataset, pad: int, options: CompareOptions, folder: str
) -> Any:
    common: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": arm.steps,
        "per_device_train_batch_size": options.batch_size,
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
        fast: dict[str, Any] = (
            {} if arm.trainer == "trl_as_shipped" else {"gradient_checkpointing": False, "bf16": False}
        )
        args = trl.SFTConfig(**common, **fast, max_length=None)
        if arm.trainer == "aletheia":
            trainer = SFTTrainer(
                adapted, args, plan=arm.plan, train_dataset=rows, processing_class=copy.deepcopy(tokenizer)
            )
        else:
            trainer = trl.SFTTrainer(adapted, args, train_dataset=rows, processing_class=copy.deepcopy(tokenizer))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _collator(pad: int) -> Callable[[list[Mapping[str, Any]]], dict[str, Tensor]]:
    return lambda rows: collate([TokenizedRow(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows], pad)


def _all_batches(rows: TokenizedRows, batch_size: int, pad: int) -> list[dict[str, Tensor]]:
    """Every row, shortest first so that little is padded; the last batch may be smaller."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    return list(batches(ordered, min(batch_size, len(ordered)), pad))
