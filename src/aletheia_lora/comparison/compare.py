"""Arms -> trained runs and their record: real trainers that take turns on one machine, over the same frozen weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import TokenizedRows, batches
from ..errors import DataError, PlanError
from ..loss import heldout_loss
from ..planning import Plan
from ..training.interleave import take_turns
from .arms import TWIN, CompareOptions, planned_arms
from .record import make_record
from .runs import frozen_weights_put_back, run_of


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
    keep: Path | None = None,
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
        keep: Save the adapters of full runs here, each in a folder named after its arm; not those of ``TWIN``.
        say: Called with a line of progress now and then.

    Raises:
        DataError: If there are fewer rows than a batch.
        PlanError: If the plan is not for this model, or for another adapter than LoRA.
    """
    plan.check_fits(model)
    if plan.options.adapter != "lora":
        raise PlanError(
            f"the plan's adapter is {plan.options.adapter}, and a comparison is with uniform LoRA. "
            "Compare plan.with_adapter('lora'), or train this plan."
        )
    if len(train) < options.batch_size:
        raise DataError(
            f"{len(train)} training rows are fewer than a batch of {options.batch_size}. Add rows or lower batch_size."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    held_out = all_batches(validation, options.batch_size, pad)
    base_loss = heldout_loss(model, held_out)
    say(f"held-out loss before training {base_loss:.4f} ({len(validation)} rows)")
    arms = planned_arms(plan, options)
    rows = train.to_dataset()
    kept = {arm.name: None if arm.name.startswith(TWIN) else keep for arm in arms}

    with frozen_weights_put_back(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers' own advice, once per arm
        errors = take_turns(
            [
                run_of(arm, model, tokenizer, rows, pad, options, held_out=held_out, keep=kept[arm.name], say=say)
                for arm in arms
            ]
        )
    for arm, error in zip(arms, errors, strict=True):
        if error is not None and arm.name in ("uniform", "selected"):
            raise error  # without these two there is nothing to compare
        if error is not None:
            arm.failed = f"{type(error).__name__}: {error}"
            say(f"{arm.name} failed: {arm.failed}")
    return make_record(plan, options, arms, base_loss, model_name, data_name, train, validation)


def all_batches(rows: TokenizedRows, batch_size: int, pad: int) -> list[dict[str, Tensor]]:
    """Every row, shortest first so that little is padded; the last batch may be smaller."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    return list(batches(ordered, min(batch_size, len(ordered)), pad))
