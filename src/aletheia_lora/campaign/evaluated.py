"""An evaluation cell's folder -> what its run's adapter answers, beside what the base model answers to the same items.

The base model is asked once for all cells that share it. Every answer stays in ``items.jsonl`` beside the record.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..anatomy import anatomy
from ..environment import environment
from ..errors import AdapterError
from ..evaluation.adapters import adapter_digest
from ..evaluation.evaluate import IDENTITY, Prepared, evaluate, prepare
from ..evaluation.forgetting import first_metrics, paired_scores
from ..evaluation.items import read_items
from ..files import write_json
from ..runs import Say
from .pack import options_of
from .records import CellFolder, faults, read_json, run_folder, trained_run
from .shared import base_identity, model_of, shared_file

ADAPTER = "adapter"
"""Folder of what a run trained, in that of its cell."""
ALIKE = (*IDENTITY, "tasks", "sources")
"""What the records of base and adapter must have in common."""


def evaluated(folder: CellFolder, say: Say) -> dict[str, Any]:
    """Ask the adapter of the run behind this cell; gives the result for the record.

    Its ``evaluation`` holds for each task the score of base and adapter, in all and item by item, as
    :func:`~aletheia_lora.evaluation.forgetting.paired_scores` gives them. After an attempt that ran out of memory half
    as many prompts are read at once.

    Raises:
        AdapterError: If the run's adapter is not there, or not the one that its record names.
        ConfigError, DataError, SandboxError: As :func:`~aletheia_lora.evaluation.evaluate.prepare` and ``evaluate``.
    """
    content = folder.cell.content
    run, (adapter, digest) = trained_run(folder), kept_adapter(folder)
    pack = dict(content["evaluation"])
    pack["eval_batch_size"] = max(pack["eval_batch_size"] // 2 ** faults(folder.events(), "memory"), 1)
    prepared = prepare(options_of(pack, Path.cwd()))
    model, tokenizer = model_of(content, say)
    base, base_items = _of_base(folder, model, tokenizer, prepared, say)
    output = folder.path / "evaluation"
    names = [content["model"]["name"], content["model"]["model"]]
    record = evaluate(
        model, tokenizer, prepared, output, adapters=[adapter], model_names=names, with_base=False, say=say
    )
    shutil.rmtree(output / "answers", ignore_errors=True)  # they are in items.jsonl now
    results = [*read_items(base_items), *read_items(output / "items.jsonl")]
    scores = paired_scores(results, groups=record["groups"], metrics=first_metrics(results, record["groups"]))
    return {
        "evaluation": scores,
        "adapter_digest": digest,
        "fingerprint": anatomy(model).fingerprint,
        "eval_batch_size": pack["eval_batch_size"],
        "rates": [*base["rates"], *record["rates"]],
        "warnings": [*base["warnings"], *record["warnings"], *record["notes"]],
        "sandbox": record["sandbox"],
        "checks": {
            "adapter": list(record["adapters"].values()) == [digest],
            "model": anatomy(model).fingerprint == run["result"]["fingerprint"],
            "base": all(base[key] == record[key] for key in ALIKE),
        },
        "environment": environment(),
    }


def _of_base(
    folder: CellFolder, model: Any, tokenizer: Any, prepared: Prepared, say: Say
) -> tuple[dict[str, Any], Path]:
    """The base model's record and the file of its answers; asked here if no cell has done so yet."""
    content = folder.cell.content

    def write(file: Path) -> None:
        record = evaluate(
            model, tokenizer, prepared, file.with_suffix(""), model_names=[content["model"]["name"]], say=say
        )
        write_json(file, {key: record[key] for key in (*ALIKE, "rates", "warnings")})
        shutil.rmtree(file.with_suffix("") / "answers", ignore_errors=True)

    identity = {**base_identity(content), "evaluation": content["evaluation"]}
    file = shared_file(folder.path.parent.parent / "shared", "evaluation.json", identity, write)
    return read_json(file), file.with_suffix("") / "items.jsonl"


# --- the run behind it ------------------------------------------------------------------------------------------


def kept_adapter(folder: CellFolder) -> tuple[Path, str]:
    """The adapter of that run, and its digest.

    Raises:
        AdapterError: If it is missing, damaged, or another one than the record names; says how to get it back.
    """
    run, wanted = run_folder(folder), trained_run(folder)["result"].get("adapter_digest")
    again = f"Remove the folder {run.path.name!r} and run the campaign with --retry-failed: it is trained again."
    if wanted is None:
        raise AdapterError(f"its run is from before runs kept their adapters. {again}")
    try:
        found = adapter_digest(run.path / ADAPTER)
    except AdapterError as error:
        raise AdapterError(f"the adapter of its run is damaged: {error} {again}") from error
    if found != wanted:
        raise AdapterError(f"the adapter of its run is not the one that was trained: its digest is another. {again}")
    return run.path / ADAPTER, found
