"""A model and rows -> its anatomy and a probe, with a step of training timed: the part of planning that needs both.

Comes in: a model, rows in any format, and the options of the plan. Goes out: a :class:`ModelAnatomy` and a
:class:`ProbeResult`; everything after them needs neither model nor rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from .anatomy import ModelAnatomy, anatomy
from .calibration import timed_adapters
from .data import TokenizedRow, TokenizedRows, batches, tokenize
from .layers import embedding_of
from .placement import input_device
from .plan_options import PlanOptions
from .prediction import batch_shape, length_profile
from .probe import probe, timed_step
from .probe_result import ProbeResult
from .processes import on_main, together

TIMED_TOKENS = 2048


def probe_rows(
    model: Any,
    rows: TokenizedRows | Sequence[Mapping[str, Any]] | Any,
    options: PlanOptions,
    *,
    tokenizer: Any = None,
    max_length: int = 1024,
    progress: bool = False,
    row_lengths: Sequence[int] | None = None,
) -> tuple[ModelAnatomy, ProbeResult]:
    """The part of planning that needs the model and data: its anatomy, and a probe on rows drawn by the seed.

    A batch as training sees it is timed, unless memory is short by the options (a budget, checkpointing), so that it
    might not fit; with ``options.calibrate`` adapters, too. ``row_lengths`` are the tokens of the rows that training
    will see; those of ``rows`` if left out. In a ``torch.distributed`` group every process calls this and gets one
    result.

    Raises:
        DataError: If the rows cannot be tokenized.
        ProbeError: If the probe cannot be trusted.
        ProcessError: If the processes of a group hold different models or rows.
    """

    def read() -> TokenizedRows:
        return rows if isinstance(rows, TokenizedRows) else tokenize(rows, tokenizer, max_length=max_length)

    def prepare() -> tuple[ModelAnatomy, list[dict[str, Tensor]]]:
        return anatomy(model), probe_batches(tokenized, options, pad)

    pad = getattr(tokenizer, "pad_token_id", None) or 0
    tokenized = together(read, "reading the rows")
    started = time.perf_counter()
    found, drawn = together(prepare, "looking at the model")
    measured = probe(
        model,
        drawn,
        mode=options.probe_mode,
        **options.probe_extras,
        anatomy_=found,
        progress=progress,
    )

    def finish() -> ProbeResult:
        lengths = [len(row.input_ids) for row in tokenized] if row_lengths is None else row_lengths
        complete = replace(measured, row_lengths=length_profile(lengths))
        timing = complete.timing
        if timing is not None:
            if options.memory_budget is None and not options.gradient_checkpointing:  # a whole batch might not fit
                timing = timed_step(model, training_batch(tokenized, options, pad)) or timing
            if options.calibrate:
                num_tokens = batch_shape(complete, options.batch_size).step.num_tokens
                device, dtype = input_device(model), embedding_of(model).weight.dtype
                timing = timed_adapters(found, timing, num_tokens, device=device, dtype=dtype)
            complete = replace(complete, timing=timing)
        return replace(complete, seconds=time.perf_counter() - started)

    return found, on_main(finish, "timing a step")


def probe_batches(rows: TokenizedRows, options: PlanOptions, pad_token_id: int) -> list[dict[str, Tensor]]:
    """The batches that the probe reads: rows drawn by the seed, the same every time.

    Raises:
        DataError: If there are no rows.
    """
    sample = _drawn(rows, options.seed, options.probe_batches * options.probe_batch_size)
    return list(batches(sample, max(min(options.probe_batch_size, len(sample)), 1), pad_token_id))


def training_batch(rows: TokenizedRows, options: PlanOptions, pad_token_id: int) -> dict[str, Tensor]:
    """A batch as training will see it, to be timed; fewer rows where they have more than ``TIMED_TOKENS``."""
    drawn = _drawn(rows, options.seed, options.batch_size)
    while len(drawn) > 1 and len(drawn) * max(len(row.input_ids) for row in drawn) > TIMED_TOKENS:
        drawn.pop()
    return next(iter(batches(drawn, len(drawn), pad_token_id)))


def _drawn(rows: TokenizedRows, seed: int, count: int) -> list[TokenizedRow]:
    """The first ``count`` rows of the seed's order."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[int(index)] for index in order[:count]]
