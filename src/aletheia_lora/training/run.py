"""A model, a plan and rows -> an adapter folder: weights, configuration, plan, record and model card.

The folder appears whole, when training ended well, or not at all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
import trl
from transformers import TrainerCallback

from ..adapter import census, shared_copy
from ..data import TokenizedRows
from ..errors import ConfigError, DataError, OutputError
from ..files import check_writable, whole_folder, write_bytes, write_json
from ..placement import input_device
from ..planning import Plan
from ..processes import on_main, together, world_size
from .engine import whole_adapters
from .prefix_cache import DTYPE_NAMES, PrefixCacheOptions, check_lowest
from .random_state import random_state_kept
from .rerank import ReRank
from .trainer import SFTTrainer

FORMAT = "aletheia-train/1"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """How an adapter is trained."""

    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 4
    """Rows in a micro-batch of one process."""
    gradient_accumulation: int = 1
    """Micro-batches in a step."""
    learning_rate: float = 2e-3
    """Peak learning rate, decaying linearly to 0."""
    gradient_checkpointing: bool = False
    """Recompute activations from the lowest adapted layer up: less memory, more time."""
    prefix_cache: bool = False
    """Keep the output of the layers below the lowest adapted one, and replay it in later epochs."""
    prefix_cache_dir: Path | None = None
    """Keep it here for later runs; None: a temporary folder."""
    prefix_cache_dtype: Literal["model", "bfloat16"] = "model"
    """Keep it as the model has it (replays are exact), or rounded to bfloat16."""
    rerank_every: int | None = None
    """Probe again every so many steps and report how the ranking of layers moves; None: never."""
    rerank_change: bool = False
    """Train the layers that the plan's rule chooses then."""
    seed: int = 0
    """Seed of the adapters' start and of the order of rows."""

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("steps", "batch_size", "gradient_accumulation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}, expected at least 1.")
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning_rate={self.learning_rate}, expected a positive number.")
        if self.prefix_cache_dtype not in DTYPE_NAMES:
            raise ConfigError(
                f"prefix_cache_dtype={self.prefix_cache_dtype!r}, expected one of {', '.join(DTYPE_NAMES)}."
            )
        if self.rerank_every is not None and self.rerank_every < 1:
            raise ConfigError(f"rerank_every={self.rerank_every}, expected at least 1.")
        if self.rerank_every is None and self.rerank_change:
            raise ConfigError("rerank_change was given without rerank_every. Say after how many steps to probe again.")
        if self.rerank_every is not None and self.prefix_cache:
            raise ConfigError(
                "prefix_cache replays the layers below the lowest adapted one, and rerank_every probes them. "
                "Leave out one of the two."
            )
        if self.prefix_cache_dir is not None and not self.prefix_cache:
            raise ConfigError(
                "prefix_cache_dir was given, but prefix_cache is off. Turn it on, or leave the folder out."
            )


def train_adapter(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    rows: TokenizedRows,
    output: Path,
    options: TrainOptions,
    *,
    model_name: str = "model",
    probe_rows: TokenizedRows | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Train the plan's adapters on the rows and write the adapter folder.

    In a ``torch.distributed`` group every process has to call this; process 0 writes the folder.

    Args:
        model: Base model; left as found, but for ZeRO-3, which takes the weights themselves apart.
        tokenizer: Its tokenizer, saved beside the adapter.
        plan: What to adapt.
        rows: Rows to train on.
        output: The folder to make; must not hold anything yet.
        options: Steps, rate, checkpointing.
        model_name: The base model's name, for the card.
        probe_rows: Rows to probe on, for ``options.rerank_every``: best those of the plan's probe.
        say: Called with a line of progress now and then.

    Returns:
        The record that is also written as ``record.json``.

    Raises:
        OutputError: If the folder cannot be written or holds files, or the disk is short of room for a prefix cache;
            found out before training.
        PlanError: If a prefix cache is wanted, but the plan adapts layer 0.
        DataError: If there are fewer rows than a batch of all processes.
        ConfigError, ProcessError: As :class:`SFTTrainer`.
        NonFiniteLossError: If a loss is NaN or infinite; nothing is written then.
    """
    on_main(lambda: check_output(output), "looking at the output folder")
    if options.prefix_cache:
        check_lowest(plan.selection.lowest)
    rerank = _rerank(plan, options, probe_rows, tokenizer, say)
    needed = options.batch_size * world_size()
    if len(rows) < needed:
        raise DataError(f"{len(rows)} rows are fewer than a batch of {needed}. Add rows or lower batch_size.")
    with random_state_kept(), tempfile.TemporaryDirectory() as scratch:
        args = _arguments(options, scratch, use_cpu=input_device(model).type == "cpu")
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            trainer = SFTTrainer(
                shared_copy(model, own=plan.rewritten_modules),
                args,
                plan=plan,
                train_dataset=rows,
                processing_class=tokenizer,
                prefix_cache=_prefix_cache(options, say),
                callbacks=[] if rerank is None else [rerank],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.add_callback(_Progress(say))
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
            trained = trainer.plan
            weights = together(lambda: whole_adapters(trainer.model), "gathering the adapters")

            def write() -> dict[str, Any]:
                record = _record(trained, options, trainer, seconds, rows, model_name)
                with whole_folder(output) as folder:
                    trainer.model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
                    tokenizer.save_pretrained(str(folder))
                    trained.save(folder / "plan.json")
                    write_json(folder / "record.json", record)
                    write_bytes(folder / "README.md", model_card(trained, record).encode())
                return record

            return on_main(write, "writing the adapter")
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _arguments(options: TrainOptions, folder: str, *, use_cpu: bool) -> trl.SFTConfig:
    return trl.SFTConfig(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=False,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=options.seed,
        use_cpu=use_cpu,
    )


def _prefix_cache(options: TrainOptions, say: Callable[[str], None]) -> PrefixCacheOptions | None:
    if not options.prefix_cache:
        return None
    return PrefixCacheOptions(folder=options.prefix_cache_dir, dtype=options.prefix_cache_dtype, say=say)


def _rerank(
    plan: Plan, options: TrainOptions, rows: TokenizedRows | None, tokenizer: Any, say: Callable[[str], None]
) -> ReRank | None:
    if options.rerank_every is None:
        return None
    if rows is None:
        raise DataError("rerank_every was given without probe_rows. Hold rows aside to probe on.")
    return ReRank(plan, rows, every=options.rerank_every, change=options.rerank_change, tokenizer=tokenizer, say=say)


def check_output(output: Path) -> None:
    """Check that the folder can be made and holds nothing yet.

    Raises:
        OutputError: If not; says which and what to do.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{str(output)!r} exists and is not an empty folder. Choose another, or remove it.")
    check_writable(output.parent)


class _Progress(TrainerCallback):
    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.started = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """One line per tenth of the way, with the time left."""
        step, total = state.global_step, args.max_steps
        if logs and "loss" in logs and step and (step % max(total // 10, 1) == 0 or step == total):
            left = (time.perf_counter() - self.started) / step * (total - step)
            self.say(f"step {step} of {total}, loss {logs['loss']:.4f}, {left:.0f} s left")


def _record(
    plan: Plan, options: TrainOptions, trainer: SFTTrainer, seconds: float, rows: TokenizedRows, model_name: str
) -> dict[str, Any]:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "format": FORMAT,
        "model": model_name,
        "fingerprint": plan.anatomy.fingerprint,
        "adapter": plan.options.adapter,
        "layers": list(plan.selection.layers),
        "adapters": [{"name": e.name, "rank": e.rank, "alpha": e.alpha} for e in census(trainer.model)],
        "trainable_params": plan.trainable_params,
        "options": {
            name: value.name if isinstance(value := getattr(options, name), Path) else value
            for name in options.__dataclass_fields__
        },
        "train_rows": len(rows),
        "train_digest": rows.digest,
        "seconds": seconds,
        "probe_seconds": plan.probe.seconds if plan.probe is not None else None,
        "lowest_backward_layer": trainer.lowest_backward_layer,
        "dead_adapters": trainer.dead_adapters,
        "slow_adapters": trainer.slow_adapters,
        "padding": trainer.padding_record,
        "engine": {
            "name": trainer.engine.name,
            "num_processes": trainer.engine.num_processes,
            "limits": trainer.engine_limits,
        },
        "prefix_cache": trainer.prefix_cache_record,
        "rerank": next((c.record() for c in trainer.callback_handler.callbacks if isinstance(c, ReRank)), None),
        "losses": losses,
    }


def model_card(plan: Plan, record: dict[str, Any]) -> str:
    """The adapter's README: which layers, why, and what was measured."""
    losses, adapter = record["losses"], record["adapter"]
    return f"""---
library_name: peft
base_model: {record["model"]}
tags: [{adapter}, aletheia-lora]
---

# {"LoRA" if adapter == "lora" else adapter} adapter on {len(plan.selection.layers)} of {plan.anatomy.num_layers} layers

{plan.selection.describe()}.

- strategy {plan.options.strategy} on score {plan.options.score}; ranks {plan.options.allocation}
- {plan.trainable_params:,} trainable weights in {len(plan.ranks)} modules, found there by census before the first step
- backward stopped at layer {record["lowest_backward_layer"]} (measured)
- {record["options"]["steps"]} steps in {record["seconds"]:.0f} s; loss {losses[0]:.4f} first, {losses[-1]:.4f} last
- load with `peft.PeftModel.from_pretrained`; `plan.json` and `record.json` beside this file hold the rest

Whether another choice of layers would have done better is not shown here: `aletheia compare` measures that.
"""
