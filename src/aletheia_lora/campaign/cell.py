"""A cell's folder -> its record: what the child process of a campaign does, and nothing else does.

The model, the rows and the trainers are those of ``aletheia compare``. What cells may share (the base model's losses,
the probe of a seed, a prefix cache) lies beside them in ``shared/``, made by the first that needs it. Where several
processes train a cell, the child starts them, and alone writes into the folder.
"""

from __future__ import annotations

import errno
import math
import os
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..allocation import mean_ranks
from ..anatomy import ModelAnatomy, anatomy
from ..comparison.arms import Arm, CompareOptions
from ..comparison.compare import all_batches
from ..comparison.runs import run_of
from ..data import Parts, TokenizedRows, split, tokenize
from ..embedded import split_by_module, standard_library_rows
from ..environment import environment
from ..errors import NonFiniteLossError, PlanError
from ..evaluation.adapters import adapter_digest
from ..files import whole_folder, write_json
from ..loss import heldout_loss
from ..plan_options import PlanOptions
from ..planning import Plan, plan_from_probe
from ..prediction import probe_cost
from ..probe_result import ProbeResult
from ..probing import probe_rows
from ..processes import on_main, world_size
from ..rows import load_rows
from ..runs import EMBEDDED, Say
from ..statistics import parameter_matched
from ..training.interleave import take_turns
from .baselines import adapter_of, prepared
from .evaluated import ADAPTER, evaluated
from .executors import EXIT_MACHINE, EXIT_MEMORY
from .methods import METHODS, Method
from .records import CellFolder, LockedError, chosen_rate, faults, read_json
from .runner import driver_workers
from .shared import base_identity, model_of, shared_file

OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""In the plain RuntimeError of torch's allocator on a CPU."""
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.EMFILE, errno.ENFILE}
SPLIT_SEED, GRID_SEED = 0, 1_000_000
"""Held-out rows are the same for every seed; the grid is searched under a seed of its own."""
DRAW_SEEDS = 1_000_003
"""So far apart are the seeds of two draws."""

Outcome = tuple[str, str | None, dict[str, Any]]
"""State, reason and result of a cell."""


def run_cell(path: Path, say: Say) -> int:
    """Run the cell in this folder and write its record; returns the exit code of the process.

    A cell that has a record already is left alone. The working folder is the one that paths in the spec go from.

    Raises:
        DamagedError: If the folder does not hold what its name says.
    """
    folder = CellFolder.open(path)
    try:
        with folder.lock():
            return 0 if folder.record() is not None else _attempted(folder, say)
    except LockedError:
        return EXIT_MACHINE  # a job of an earlier driver is still at it


def _attempted(folder: CellFolder, say: Say) -> int:
    started = time.perf_counter()

    def aside(line: str) -> None:
        say(line)
        folder.append("progress", line=line)

    try:
        folder.append("attempt_started", pid=os.getpid(), environment=environment())
        outcome = _outcome(folder, aside)
        if isinstance(outcome, int):
            return outcome
        state, reason, result = outcome
        folder.finish(state, reason, **result, seconds=time.perf_counter() - started)
    except Exception as error:
        code = exit_code(error)
        traceback.print_exc()
        if code is not None:
            return code
        folder.finish(*failure(error))
    return 0


def exit_code(error: BaseException | None) -> int | None:
    """The exit code for an error that is not the program's; None for one that would come again."""
    while error is not None:
        refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
        if refused or isinstance(error, MemoryError | torch.OutOfMemoryError) or OUT_OF_MEMORY in str(error):
            return EXIT_MEMORY
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            return EXIT_MACHINE
        error = error.__cause__ or error.__context__
    return None


def failure(error: Exception) -> tuple[str, str]:
    """State and reason, in one line, of a cell that the program failed."""
    state = "nan" if isinstance(error, NonFiniteLossError) else "failed"
    return state, f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


# --- what a cell works with -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A model and the rows of a task in their parts."""

    content: dict[str, Any]
    shared: Path
    micro_batches: int
    """In a step: as many rows, less memory."""
    model: Any
    tokenizer: Any
    found: ModelAnatomy
    held_out: TokenizedRows
    validation: TokenizedRows
    rest: TokenizedRows

    @classmethod
    def of(cls, content: dict[str, Any], shared: Path, micro_batches: int, say: Say) -> Bench:
        """Load what the cell names.

        Raises:
            UnsupportedModelError: If the model cannot be loaded.
            DataError: If the rows cannot be read, or are too few.
        """
        model, tokenizer = model_of(content, say)
        looked_at = content["heldout_rows"] + content["validation_rows"]
        task = content["task"]
        if task["data"] == EMBEDDED:
            train, other = split_by_module(standard_library_rows(), seed=SPLIT_SEED)
            seen = split(_tokens(other, task, tokenizer), seed=SPLIT_SEED, probe=0, validation=looked_at).validation
            rest = _tokens(train[: task["max_rows"]], task, tokenizer)
        else:
            rows = load_rows(task["data"], split=task["split"])[: task["max_rows"]]
            parts = split(_tokens(rows, task, tokenizer), seed=SPLIT_SEED, probe=0, validation=looked_at)
            seen, rest = parts.validation, parts.train
        count = content["heldout_rows"]
        return cls(content, shared, micro_batches, model, tokenizer, anatomy(model), seen[:count], seen[count:], rest)

    @property
    def pad(self) -> int:
        """Token to pad with."""
        token = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if token is None else token)

    @property
    def rows_digest(self) -> str:
        """SHA-256 over all rows of the task, in their parts: cells that are compared have the same."""
        parts = (self.held_out, self.validation, self.rest)
        return sha256("".join(part.digest for part in parts).encode()).hexdigest()

    def batches(self, rows: TokenizedRows) -> list[dict[str, Tensor]]:
        """All rows, to look at."""
        return all_batches(rows, self.content["batch_size"], self.pad)

    def parts(self, seed: int) -> Parts:
        """The rows that this seed probes and trains on: disjoint, and from none that are looked at."""
        probe = int(self.content["probe_batches"] * self.content["probe_batch_size"])
        parts = split(self.rest, seed=seed, probe=probe, validation=0)
        return replace(parts, train=parts.train[: self.content["train_rows"]])

    def shared_file(self, name: str, identity: dict[str, Any], write: Callable[[Path], object]) -> Path:
        """A file that other cells use, too; written here if it is not there yet. The others wait meanwhile."""
        keys = ("task", "heldout_rows", "validation_rows", "batch_size")
        whole = {**base_identity(self.content), **{key: self.content[key] for key in keys}, **identity}
        return shared_file(self.shared, f"{name}.json", whole, write)

    def base(self, say: Say) -> dict[str, Any]:
        """Losses of the model as it is, and the digest of the rows that they were measured on."""
        other = {key: self.content[key] for key in ("other_text", "other_rows")}

        def write(file: Path) -> None:
            say("measuring the base model")
            rows = self.other_text()
            record = {
                "rows_digest": self.rows_digest,
                "heldout_loss": heldout_loss(self.model, self.batches(self.held_out)),
                "other_digest": None if rows is None else rows.digest,
                "other_loss": None if rows is None else heldout_loss(self.model, self.batches(rows)),
            }
            write_json(file, record)

        return read_json(self.shared_file("base", other, write))

    def other_text(self) -> TokenizedRows | None:
        """The first rows of the other text, if there is one."""
        task = self.content["other_text"]
        if task is None:
            return None
        rows = load_rows(task["data"], split=task["split"])[: task["max_rows"]]
        return _tokens(rows, task, self.tokenizer)[: self.content["other_rows"]]

    def probe(self, method: Method, seed: int, say: Say) -> ProbeResult:
        """The probe of this seed, which all methods that read the same statistics share."""
        keys = ("probe_batches", "probe_batch_size", "train_rows")
        options = self.options(method, seed, 0)
        identity = {"seed": seed, "extra": "+".join(options.extras) or None, **{key: self.content[key] for key in keys}}

        def write(file: Path) -> None:
            say(f"probing with seed {seed}")
            parts = self.parts(seed)
            lengths = [len(row.input_ids) for row in parts.train]
            _, measured = probe_rows(self.model, parts.probe, options, tokenizer=self.tokenizer, row_lengths=lengths)
            measured.save(file)

        return ProbeResult.load(self.shared_file("probe", identity, write))

    def options(self, method: Method, seed: int, draw: int) -> PlanOptions:
        """What a plan of this method is told."""
        keys = ("score", "strategy", "percent", "num_layers", "mass", "time_budget", "allocation")
        settings = ("rank", "alpha_ratio", "batch_size", "prefix_cache", "probe_batches", "probe_batch_size")
        return PlanOptions(
            **{key: getattr(method, key) for key in keys},
            **{key: self.content[key] for key in settings},
            attention_rank=self.content["rank"],
            mlp_rank=4 * self.content["rank"],
            use_dora=method.adapter == "dora",
            seed=seed + DRAW_SEEDS * draw,
        )

    @property
    def matched_method(self) -> Method | None:
        """The method that this cell's is to train as many weights as; None where it has a rank of its own."""
        name = self.content["method"].get("params_of")
        if name is None:
            return None
        return Method(**(self.content.get("matched_method") or {"name": name, **METHODS[name]}))

    def plan(self, method: Method, measured: ProbeResult, seed: int, draw: int, say: Say) -> Plan:
        """The plan of this cell's method.

        Raises:
            PlanError: If its budget or its ranks cannot be met on this model, or no rank trains as many weights as the
                method that it is matched with.
        """
        other, own = self.matched_method, self.options(method, seed, draw)
        if other is None:
            return self._planned(own, measured)
        theirs = self._planned(self.options(other, seed, draw), self.probe(other, seed, say))
        wanted = theirs.trainable_params
        one = self._planned(replace(own, rank=1), measured).trainable_params
        made = self._planned(replace(own, rank=max(round(wanted / one), 1)), measured)
        try:
            parameter_matched(0.0, wanted, 0.0, made.trainable_params)
        except ValueError as error:
            raise PlanError(
                f"{method.name} is to train as many weights as {other.name}, {wanted:,} within 2 %, and the nearest "
                f"rank, {made.options.rank}, trains {made.trainable_params:,}. Raise the campaign's rank, which makes "
                "one rank a smaller part, or give one of the two other layers."
            ) from error
        return made

    def _planned(self, options: PlanOptions, measured: ProbeResult) -> Plan:
        model = self.model if options.score == "weight_snr" else None  # the one score that looks at weights
        return plan_from_probe(self.found, measured, options, model=model)

    def steps_in_equal_time(self, plan: Plan, measured: ProbeResult, steps: int) -> int:
        """Steps that fit in the predicted time of ``steps`` steps of uniform LoRA; counted, alike on every machine."""
        rows, batch_size, rank = len(self.parts(0).train), int(self.content["batch_size"]), int(self.content["rank"])
        cost = probe_cost(self.found, measured, batch_size, calibrate=False)
        layers, ranks = plan.selection.layers, mean_ranks(self.found, plan.ranks)
        share = cost.share(layers, rank=ranks, uniform_rank=rank)
        if not self.content["prefix_cache"] or plan.selection.lowest == 0:
            return max(round(steps / share), 1)
        first = min(-(-rows // batch_size), round(steps / share))
        later = cost.share(layers, rank=ranks, uniform_rank=rank, prefix_cached=True)
        return max(first + round((steps - first * share) / later), 1)


def _tokens(rows: Any, task: dict[str, Any], tokenizer: Any) -> TokenizedRows:
    keys = ("max_length", "completion_only", "prompt_column", "completion_column")
    return tokenize(rows, tokenizer, **{key: task[key] for key in keys})


# --- the run ----------------------------------------------------------------------------------------------------


def _outcome(folder: CellFolder, say: Say) -> Outcome | int:
    """State, reason and result of the cell; or the exit code where the machine ended the processes that trained it."""
    content = folder.cell.content
    if content["kind"] == "evaluation":
        return _judged(evaluated(folder, say))
    if content.get("processes", 1) > 1:
        from .together import train_together  # late: it builds on this room

        return train_together(folder, say)
    return trained_cell(folder, folder.path / ADAPTER, say)


def trained_cell(folder: CellFolder, keep: Path, say: Say) -> Outcome:
    """Train the cell in this process, alone or as one of several; a run's adapter goes to ``keep``."""
    bench = bench_of(folder, say)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers' own advice
        result = _grid(bench, say) if bench.content["kind"] == "grid" else _run(bench, folder, keep, say)
    return _judged(result)


def bench_of(folder: CellFolder, say: Say) -> Bench:
    """What this cell works with; after attempts that ran out of memory with smaller micro-batches."""
    micro_batches = 2 ** faults(folder.events(), "memory")
    return Bench.of(folder.cell.content, folder.path.parent.parent / "shared", micro_batches, say)


def _judged(result: dict[str, Any]) -> Outcome:
    if not all(math.isfinite(look["loss"]) for look in result.get("heldout", ())):
        return "nan", "a held-out loss is not finite", result
    broken = [name for name, holds in result["checks"].items() if not holds]
    return ("invalid", f"checks that do not hold: {', '.join(broken)}", result) if broken else ("done", None, result)


def _grid(bench: Bench, say: Say) -> dict[str, Any]:
    """A short run at one rate, looked at on the validation rows alone."""
    rate, steps = bench.content["learning_rate"], bench.content["steps"]
    _, result = _trained(
        bench,
        learning_rate=rate,
        steps=steps,
        seed=GRID_SEED,
        draw=0,
        match="steps",
        looked_at=bench.validation,
        evaluations=1,
        say=say,
    )
    return {**result, "validation_loss": result["heldout"][-1]["loss"]}


def _run(bench: Bench, folder: CellFolder, keep: Path, say: Say) -> dict[str, Any]:
    """A run at the rate that the grid gave, looked at on the held-out rows and the other text."""
    content = bench.content
    base = bench.base(say)
    rate, grid = chosen_rate(folder)
    adapted, result = _trained(
        bench,
        learning_rate=rate,
        steps=content["steps"],
        seed=content["seed"],
        draw=content["draw"],
        match=content["match"],
        looked_at=bench.held_out,
        evaluations=content["evaluations"],
        say=say,
    )
    result["adapter_digest"] = on_main(lambda: _keep_adapter(adapted, keep), "keeping the adapter")
    other = bench.other_text()
    result["checks"]["rows"] = base["rows_digest"] == bench.rows_digest and all(
        entry["rows_digest"] in (None, bench.rows_digest) for entry in grid
    )
    result["checks"]["other_rows"] = base["other_digest"] == (None if other is None else other.digest)
    return {
        **result,
        "grid": grid,
        "base_heldout_loss": base["heldout_loss"],
        "heldout_loss": result["heldout"][-1]["loss"],
        "base_other_loss": base["other_loss"],
        "other_loss": None if other is None else heldout_loss(adapted, bench.batches(other)),
    }


def _keep_adapter(adapted: Any, folder: Path) -> str:
    """Write the adapter as PEFT does, whole or not at all; gives its digest."""
    with whole_folder(folder) as written:
        adapted.save_pretrained(str(written), save_embedding_layers=False)
    return adapter_digest(folder)


def _trained(
    bench: Bench,
    *,
    learning_rate: float,
    steps: int,
    seed: int,
    draw: int,
    match: str,
    looked_at: TokenizedRows,
    evaluations: int,
    say: Say,
) -> tuple[Any, dict[str, Any]]:
    """Train the method's adapters; gives the adapted model and what was measured."""
    content = bench.content
    method = Method(**content["method"])
    measured = bench.probe(method, seed, say)
    plan = bench.plan(method, measured, seed, draw, say)
    if match == "time":
        steps = bench.steps_in_equal_time(plan, measured, steps)
    cached = bool(content["prefix_cache"] and method.trainer == "aletheia" and plan.selection.lowest > 0)
    arm = Arm(
        method.name,
        method.name,
        "selected",
        method.trainer,
        plan,
        learning_rate,
        steps,
        full=True,
        probe_seconds=measured.seconds if method.needs_probe else 0.0,
        prefix_cache=cached,
        prefix_cache_dir=bench.shared / "prefix" if cached else None,
        gradient_accumulation=bench.micro_batches,
    )
    kept: list[Any] = []

    def adapt(model: Any, plan: Plan, seed: int) -> Any:
        kept.append(adapter_of(method.adapter, steps)(model, plan, seed))
        return kept[0]

    options = CompareOptions(
        steps=steps, batch_size=content["batch_size"], evaluations=min(evaluations, steps), seed=seed
    )
    run = run_of(
        arm,
        bench.model,
        bench.tokenizer,
        bench.parts(seed).train.to_dataset(),
        bench.pad,
        options,
        held_out=bench.batches(looked_at),
        say=say,
        adapt=adapt,
        prepare=prepared(method.adapter),
    )
    (error,) = take_turns([run])
    if error is not None:
        raise error
    (adapted,) = kept
    return adapted, _measured(bench, arm, adapted)


def _measured(bench: Bench, arm: Arm, adapted: Any) -> dict[str, Any]:
    """What came of a run, and whether it was what was planned."""
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    still = [name for name, value in adapted.named_parameters() if "lora_B" in name and not bool(value.detach().any())]
    lowest, workers = arm.plan.selection.lowest, driver_workers(bench.shared.parent)
    return {
        "rows_digest": bench.rows_digest,
        "fingerprint": bench.found.fingerprint,
        "model_type": bench.found.model_type,
        "layer_scores": {arm.plan.options.score: [score for _, score in sorted(arm.plan.scores.items())]},
        "layers": list(arm.plan.selection.layers),
        "ranks": sorted({entry.rank for entry in arm.plan.ranks}),
        "trainable_params": sum(parameter.numel() for parameter in trained),
        "learning_rate": arm.learning_rate,
        "steps": arm.steps,
        "micro_batches": arm.gradient_accumulation,
        "processes": world_size(),
        "lowest_backward_layer": arm.lowest_backward_layer,
        "heldout": arm.heldout,
        "train_losses": arm.train_losses,
        "probe_seconds": arm.probe_seconds,
        "step_seconds": arm.step_seconds,
        "prefix_cache": arm.prefix_cache_record,
        "checks": {
            "steps": len(arm.step_seconds) == arm.steps,
            "adapters_moved": not still,
            "backward_depth": arm.trainer != "aletheia" or arm.lowest_backward_layer == lowest,
        },
        "environment": {**environment(), **({} if workers is None else {"workers": str(workers)})},
    }
