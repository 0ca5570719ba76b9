"""Adapters that a comparison trained -> what base, uniform and selected answer to standard tasks, and what was lost.

Comes in: the folder that :func:`~aletheia_lora.comparison.compare.compare` kept the adapters in, and tasks that may be
asked. Goes out: the record ``forgetting.json``, beside the answers it was computed from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..evaluation.evaluate import Prepared, evaluate
from ..evaluation.forgetting import first_metrics, forgetting_report
from ..evaluation.items import read_items

AGAIN = "selected, asked again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Margins:
    """The extra forgetting that would not matter, fixed before anything is asked."""

    margin: float = 2.0
    """In points of 100, for scores."""
    loss_margin: float = 0.02
    """In nats per token, for plain text."""

    def __post_init__(self) -> None:
        for name in ("margin", "loss_margin"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}, expected a positive number.")


def forgotten(
    model: Any,
    tokenizer: Any,
    prepared: Prepared,
    adapters: Path,
    output: Path,
    margins: Margins,
    *,
    model_name: str = "model",
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Ask base and adapters the same questions, the selection a second time in other batches, and report.

    Args:
        model: The base model of the comparison; left as found.
        tokenizer: Its tokenizer.
        prepared: Tasks that were loaded and may be run.
        adapters: One folder an arm, named after it; ``uniform`` and ``selected`` are among them.
        output: Folder for ``items.jsonl`` and ``evaluation.json``; the second round lies in ``again`` inside.
        margins: What counts as equal.
        model_name: For the record.
        say: Called with a line of progress now and then.

    Returns:
        The record of :func:`~aletheia_lora.evaluation.forgetting.forgetting_report`.

    Raises:
        As :func:`~aletheia_lora.evaluation.evaluate.evaluate` and ``forgetting_report``.
    """
    folders = sorted(folder for folder in adapters.iterdir() if folder.is_dir())
    names = [model_name, str(getattr(model, "name_or_path", ""))]
    asked = replace(prepared, options=replace(prepared.options, any_base=True))  # they were trained on this very model
    record = evaluate(model, tokenizer, asked, output, adapters=folders, model_names=names, say=say)
    again = replace(asked, options=replace(asked.options, eval_batch_size=_other(asked.options.eval_batch_size)))
    twice = [adapters / "selected"]
    evaluate(model, tokenizer, again, output / "again", adapters=twice, model_names=names, with_base=False, say=say)
    results = read_items(output / "items.jsonl")
    results += [replace(item, label=AGAIN) for item in read_items(output / "again" / "items.jsonl")]
    return forgetting_report(
        results,
        margin=margins.margin,
        loss_margin=margins.loss_margin,
        repeat=AGAIN,
        groups=record["groups"],
        metrics=first_metrics(results, record["groups"]),
        about={"model": model_name, "options": record["options"], "sources": record["sources"]},
    )


def _other(batch_size: int) -> int:
    """Another batch size, so that rows meet other neighbours and other padding."""
    return max(batch_size // 2, 1) if batch_size > 1 else 2
