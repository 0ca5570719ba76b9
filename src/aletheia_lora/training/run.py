"""A model, a plan and rows -> an adapter folder: weights, configuration, plan, record and model card.

The folder appears whole, when training ended well, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import transformers
import trl
from transformers import TrainerCallback

from .. import __version__
from ..adapter import census, shared_copy
from ..data import TokenizedRows
from ..environment import environment
from ..errors import ConfigError, DataError
from ..files import check_output, whole_folder, write_bytes, write_json
from ..loss import all_at_once
from ..placement import input_device
from ..planning import Plan
from ..processes import digest, on_main, together, world_size
from .checkpoint import Checkpoints
from .compiled import CHECKPOINTED, check_compiles
from .engine import whole_adapters
from .model_card import model_card
from .prefix_cache import DTYPE_NAMES, PrefixCacheOptions, check_lowest
from .random_state import random_state_kept
from .rerank import ReRank
from .trainer import SFTTrainer

FORMAT = "aletheia-train/1"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
    compile_layers: bool = False
    """Run each layer through ``torch.compile``."""
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
    checkpoint_every: int | None = None
    """Keep a checkpoint beside the output every so many steps, for the same call to go on from; None: never."""
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
        for name in ("rerank_every", "checkpoint_every"):
            if (every := getattr(self, name)) is not None and every < 1:
                raise ConfigError(f"{name}={every}, expected at least 1.")
        if self.checkpoint_every is not None and self.rerank_every is not None:
            raise ConfigError("checkpoint_every keeps nothing of what rerank_every finds. Leave out one of the two.")
        if self.checkpoint_every is not None and self.prefix_cache:
            raise ConfigError(
                "a run that goes on from a checkpoint fills the prefix cache anew, from other batches, and so ends "
                "equal to rounding only. Leave out checkpoint_every or prefix_cache."
            )
        if self.compile_layers and self.prefix_cache:
            raise ConfigError(
                "prefix_cache takes the place of layers that compile_layers compiles. Leave out one of them."
            )
        if self.compile_layers and self.gradient_checkpointing:
            raise ConfigError(f"compile_layers: {CHECKPOINTED}")
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
    data_name: str = "rows",
    dataset_id: str | None = None,
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
        model_name: The base model's name, for record and card; of a path its last part is kept.
        data_name: The name of the rows, likewise.
        dataset_id: The name of the rows' data set on the Hub, if they came from there.
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
    _check(model, plan, output, options)
    rerank = _rerank(plan, options, probe_rows, tokenizer, say)
    checkpoints = _checkpoints(model, plan, rows, output, options, say)
    needed = options.batch_size * world_size()
    if len(rows) < needed:
        raise DataError(f"{len(rows)} rows are fewer than a batch of {needed}. Add rows or lower batch_size.")
    with random_state_kept(), _place(checkpoints) as folder:
        args = _arguments(options, folder, use_cpu=input_device(model).type == "cpu")
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            trainer = SFTTrainer(
                shared_copy(model, own=plan.rewritten_modules),
                args,
                plan=plan,
                train_dataset=rows,
                processing_class=tokenizer,
                compile_layers=options.compile_layers,
                prefix_cache=_prefix_cache(options, say),
                callbacks=[*filter(None, (rerank, checkpoints))],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.add_callback(_Progress(say))
            started = time.perf_counter()
            trainer.train(resume_from_checkpoint=None if checkpoints is None else checkpoints.newest())
            seconds = time.perf_counter() - started
            weights = together(lambda: whole_adapters(trainer.model), "gathering the adapters")

            def write() -> dict[str, Any]:
                names = _names(model, model=model_name, data=data_name, dataset_id=dataset_id)
                record = _record(trainer, options, seconds, rows) | names
                return _written(output, record, trainer, tokenizer, weights)

            return on_main(write, "writing the adapter")
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _check(model: Any, plan: Plan, output: Path, options: TrainOptions) -> None:
    """Everything that can be found out before anything is made."""
    on_main(lambda: check_output(output), "looking at the output folder")
    if options.prefix_cache:
        check_lowest(plan.selection.lowest)
    if options.compile_layers:
        check_compiles(model)


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
        save_strategy="no" if options.checkpoint_every is None else "steps",
        save_steps=options.checkpoint_every or 1,
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


def _checkpoints(
    model: Any, plan: Plan, rows: TokenizedRows, output: Path, options: TrainOptions, say: Callable[[str], None]
) -> Checkpoints | None:
    if options.checkpoint_every is None:
        return None
    if world_size() > 1:
        raise ConfigError(f"checkpoint_every is for one process, but {world_size()} were launched. Leave it out.")
    identity = {
        **{name: str(getattr(options, name)) for name in options.__dataclass_fields__ if name != "checkpoint_every"},
        "rows": rows.digest,
        "model": digest(model.named_parameters(), most=64),
        **environment(),
    }
    return Checkpoints(output, plan, identity, say)


@contextlib.contextmanager
def _place(checkpoints: Checkpoints | None) -> Iterator[str]:
    """Where Trainer writes: the folder of checkpoints, which goes when all went well, or one that always goes."""
    if checkpoints is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield scratch
    else:
        yield str(checkpoints.folder)
        checkpoints.remove()


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


def _written(output: Path, record: dict[str, Any], trainer: SFTTrainer, tokenizer: Any, weights: Any) -> dict[str, Any]:
    """Write the folder; gives the record with the digests of what is in it."""
    with whole_folder(output) as folder:
        trainer.model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        tokenizer.save_pretrained(str(folder))
        trainer.plan.save(folder / "plan.json")
        whole = record | _digests(folder)
        write_json(folder / "record.json", whole)
        write_bytes(folder / "README.md", model_card(trainer.plan, whole).encode())
    return whole


def _record(trainer: SFTTrainer, options: TrainOptions, seconds: float, rows: TokenizedRows) -> dict[str, Any]:
    plan, callbacks = trainer.plan, trainer.callback_handler.callbacks
    before = next((callback for callback in callbacks if isinstance(callback, Checkpoints)), None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "format": FORMAT,
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
        "seconds": seconds + (0.0 if before is None else before.seconds),
        "resumed_from": 0 if before is None else before.resumed_from,
        "probe_seconds": plan.probe.seconds if plan.probe is not None else None,
        "lowest_backward_layer": trainer.lowest_backward_layer,
        "dead_adapters": trainer.dead_adapters,
        "slow_adapters": trainer.slow_adapters,
        "padding": trainer.padding_record,
        "all_labelled_logits": all_at_once(trainer.model),
        "engine": {
            "name": trainer.engine.name,
            "num_processes": trainer.engine.num_processes,
            "limits": trainer.engine_limits,
        },
        "prefix_cache": trainer.prefix_cache_record,
        "rerank": next((c.record() for c in callbacks if isinstance(c, ReRank)), None),
        "losses": losses,
        "environment": {"aletheia-lora": __version__, **environment()},
    }


def _names(loaded: Any, **names: str | None) -> dict[str, Any]:
    """What model and rows are called, never by a path, and the revision of a model that came from the Hub."""
    from_hub = getattr(loaded, "name_or_path", None) == names["model"]
    return {
        **{what: None if name is None else _without_folders(name) for what, name in names.items()},
        "revision": getattr(loaded.config, "_commit_hash", None) if from_hub else None,
    }


def _without_folders(name: str) -> str:
    """A name on the Hub as it is; of anything else, which may be a path, the last part."""
    return name if HUB_NAME.fullmatch(name) and not os.path.exists(name) else Path(name).name


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weights, and of the configuration without the base model's name, which may be a path."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config.pop("base_model_name_or_path", None)
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return {
        "weights_sha256": sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "config_sha256": sha256(text.encode()).hexdigest(),
    }
