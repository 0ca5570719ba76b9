"""A campaign's folder -> a bundle of evidence that can be handed on: tables, a summary, figures, and what they mean.

Made from the records alone. What goes in is named here, column by column and key by key; whatever else a record holds
stays behind. Of an error only its class is told, and a last look refuses what is still private.
"""

from __future__ import annotations

import builtins
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from .. import errors
from ..files import check_output, whole_folder
from ..privacy import Private, check_nothing_private, json_without_paths, private_here
from ..report.campaign_plots import draw_campaign
from ..rows import READERS
from .methods import Method
from .outcomes import NO_RATE, OTHER_RATE, Outcome, outcomes
from .records import CellFolder
from .report import campaign_record, csv_text, means
from .runner import driver_host
from .spec import LIBRARIES, Margins, canonical, cells
from .status import pinned_spec

FORMAT = "aletheia-evidence/1"
SUMMARY, README = "summary.json", "README.md"
RUN_COLUMNS = {
    "cell": "start of the SHA-256 of everything that the result depends on",
    "model": "name of the base model",
    "task": "name of the data that was learned: the domain",
    "method": "how layers, ranks and trainer were chosen; the spec in summary.json says it in full",
    "match": "`steps`: as many optimizer steps as every other method; `time`: as many as fit in the predicted time of "
    "uniform LoRA",
    "seed": "seed of the rows, the probe and the adapters' start",
    "draw": "number of the random choice, for methods that make one",
    "state": "`done`: it ended and all checks held; everything else is a gap and in no mean",
    "attempts": "processes that it took; more than one where the machine interrupted it",
    "num_layers": "layers that carry adapters",
    "layers": "their numbers, from 0",
    "learning_rate": "peak learning rate, the best of the method's own grid",
    "steps": "optimizer steps",
    "micro_batches": "parts that a step was cut into for want of memory",
    "lowest_backward_layer": "the layer at which backward was measured to end",
    "trainable_params": "weights that were trained",
    "base_heldout_loss": "mean loss of the base model on the held-out rows, in nats per token",
    "heldout_loss": "the same after training",
    "base_other_loss": "mean loss of the base model on the other text, in nats per token",
    "other_loss": "the same after training",
    "seconds": "wall seconds of the last attempt, loading and looking included",
    "training_seconds": "wall seconds of all optimizer steps",
    "median_step_seconds": "median wall seconds of a step, the first left out",
    "probe_seconds": "wall seconds of the probe; 0 for methods that need none",
    "rows_digest": "SHA-256 over all rows of the task in their parts; runs that are compared have the same",
    "fingerprint": "the model's shape",
    "environment": "number of the entry of `environments` in summary.json",
    "record_sha256": "SHA-256 of the record that this line was made from",
    "reason": "why it is no result: the class of the error, or words of this tool; messages are left out",
}
MEASURES = (
    "base_heldout_loss",
    "heldout_loss",
    "base_other_loss",
    "other_loss",
    "trainable_params",
    "training_seconds",
    "probe_seconds",
)
MEAN_COLUMNS = {
    "n": "runs in the means",
    "of": "runs that were asked for; where n is smaller, a mean is over others than its neighbour's",
    **{f"mean_{measure}": f"mean of `{measure}` over these runs" for measure in MEASURES},
    "gaps": "runs that are in no mean, by state",
}
SUMMARIES = {
    "model_summary.csv": ("model", "match", "method"),
    "domain_summary.csv": ("task", "match", "method"),
}
"""What each summary has a line for; its means are over all that is not named."""
TEST_COLUMNS = {
    "match": RUN_COLUMNS["match"],
    "measure": "a loss, or a benchmark and the task that was learned before it was asked",
    "unit": "of the differences",
    "method": "the one that is judged",
    "reference": "the one beside it",
    "n": "pairs of runs",
    "of": "pairs that were asked for",
    "basis": "what the statistics count: pairs of runs, groups of them, or the items of the one pair",
    "mean": "mean difference, method minus reference",
    "low": "lower end of its 95 % t interval",
    "high": "upper end of it",
    "bootstrap_low": "lower end of the 95 % bootstrap interval",
    "bootstrap_high": "upper end of it",
    "t_p": "p of the paired t test",
    "wilcoxon_p": "p of Wilcoxon's signed-rank test",
    "hedges_g": "effect size",
    "margin": "the largest difference that would not matter; fixed before the first run unless `accepted_changes` in "
    "summary.json has it",
    "equivalence_p": "p of the two one-sided tests against that margin",
    "missing": "pairs that could not be made",
}
COMPARED_COLUMNS = {
    **TEST_COLUMNS,
    "holm_p": "`t_p` after Holm's correction over the comparisons of its question",
    "holm_p_of_all": "the same over all comparisons of the campaign",
    "verdict": "what follows from interval, correction and margin",
}
BASE_COLUMNS = {
    key: TEST_COLUMNS[key]
    for key in (
        *("match", "measure", "unit", "method", "n", "of", "basis", "mean", "low", "high"),
        *("bootstrap_low", "bootstrap_high", "missing"),
    )
}
COMPARED = {
    "comparisons.csv": ("comparisons", COMPARED_COLUMNS, "Methods in pairs"),
    "base_changes.csv": ("deltas", BASE_COLUMNS, "Every method minus the base model"),
}
"""File -> table of the report, its columns, and what it is."""
EVALUATION_KEYS = (
    "tasks",
    "limit",
    "num_fewshot",
    "fewshot_seed",
    "eval_batch_size",
    "max_new_tokens",
    "chat_template",
    "fewshot_as_multiturn",
    "allow_code",
    "methods",
    "match",
)
SPEC_KEYS = (
    "seeds",
    "learning_rates",
    "steps",
    "grid_steps",
    "match",
    "batch_size",
    "rank",
    "alpha_ratio",
    "probe_batches",
    "probe_batch_size",
    "train_rows",
    "validation_rows",
    "heldout_rows",
    "evaluations",
    "other_rows",
    "prefix_cache",
    "processes",
)
PACKERS = ("bitsandbytes",)
"""What packs a base model."""
MODEL_KEYS = ("name", "dtype", "digest")
TASK_KEYS = (
    "name",
    "split",
    "prompt_column",
    "completion_column",
    "completion_only",
    "max_length",
    "max_rows",
    "digest",
)
ENVIRONMENT_KEYS = ("python", *LIBRARIES, "threads", "device")
DRAWN_TABLES = ("comparisons", "deltas", "speed", "scores")
"""What figures are drawn from."""
_CHECK = "(?:steps|adapters_moved|backward_depth|rows|other_rows)"
OUR_REASONS = re.compile(
    "|".join(
        (
            *(re.escape(phrase) for phrase in (OTHER_RATE, NO_RATE)),
            rf"checks that do not hold(?:: {_CHECK}(?:, {_CHECK})*)?",
            "a held-out loss is not finite",
            "no learning rate of the grid ended well",
            "out of memory(?: with [0-9]+ rows at a time)?",
            "gave up after [0-9]+ attempts that the machine ended",
            r"no record from the process \(exit code -?[0-9]+\)",
            "its (?:driver ended|process is gone)",
            "SIG(?:KILL|TERM|HUP|INT)",
        )
    )
)
"""How reasons begin that this tool words itself; what follows may hold anything."""
ERRORS = frozenset(
    name
    for room in (builtins, errors)
    for name, found in vars(room).items()
    if isinstance(found, type) and issubclass(found, BaseException)
) | {"DamagedError", "LockedError", "OutOfMemoryError", "SafetensorError", "HfHubHTTPError"}
"""Classes that may be named."""
OTHER_REASON = "another reason"
FILE_SUFFIXES = (*READERS, ".arrow", ".tsv", ".gz", ".zip", ".gguf", ".safetensors", ".bin", ".pt", ".pth")
"""What ends so is a file, wherever it lies."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
Row = dict[str, Any]


def export(folder: Path, output: Path, *beside: Path) -> dict[str, str]:
    """Write the bundle of a campaign's folder, whole or not at all; gives the SHA-256 of each file but the summary.

    Args:
        folder: The campaign's.
        output: The folder to make; must not hold anything yet.
        *beside: Further folders whose names must not get into the bundle.

    Raises:
        ConfigError: If there is no campaign in the folder.
        DamagedError: If a record is not what was written.
        OutputError: If the bundle's folder holds something or cannot be written.
        PrivacyError: If a file would hold a path, a name of the machine or its user, or something like a key.
    """
    check_output(output)
    words = {word.lower() for word in re.findall(r"\w+", _readme("", []))}
    private = private_here(folder, output, *beside, names=[driver_host(folder)], known=words)
    files = bundle(folder, private)
    check_nothing_private(files, private)
    with whole_folder(output) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)
    return {name: sha256(content).hexdigest() for name, content in files.items() if name != SUMMARY}


def bundle(folder: Path, private: Private) -> dict[str, bytes]:
    """The files of the bundle by name, the same for the same records."""
    spec, record = pinned_spec(folder), campaign_record(folder)
    made = record["tables"]
    runs, environments = _runs(folder, made)
    figures = _figures(record, _margins(spec), private)
    files = {
        "aggregate_runs.csv": _csv(runs, tuple(RUN_COLUMNS)),
        **{name: _csv(means(runs, keys, MEASURES), (*keys, *MEAN_COLUMNS)) for name, keys in SUMMARIES.items()},
        **{
            name: _csv(_columns(json_without_paths(made[table], private), columns), tuple(columns))
            for name, (table, columns, _) in COMPARED.items()
        },
        **figures,
        README: _readme(spec["name"], list(figures)).encode(),
    }
    summary = {
        "format": FORMAT,
        "name": spec["name"],
        "spec": _spec(spec),
        "margins": _margins(spec),
        "accepted_changes": _accepted(record["accepted_changes"], _margins(spec)),
        "states": _states(outcomes(folder, spec)),
        "means": made["methods"],
        "versions": _versions(spec),
        "environments": environments,
        "files": {name: sha256(content).hexdigest() for name, content in files.items()},
    }
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    return {**files, SUMMARY: f"{text}\n".encode()}


def _figures(record: Mapping[str, Any], margins: Mapping[str, Any], private: Private) -> dict[str, bytes]:
    """The figures of the campaign's report, by file name, drawn from words without paths and names.

    Raises:
        PrivacyError: If something like a key would be drawn.
    """
    tables = {name: record["tables"][name] for name in DRAWN_TABLES}
    allowed = {"match": record["match"], "methods": record["methods"], "margins": margins, "tables": tables}
    drawn = json_without_paths(allowed, private)
    check_nothing_private({"figures": json.dumps(drawn, indent=0).encode()}, private)
    return {f"{name}.png": picture for name, picture in draw_campaign(drawn).items()}


def _runs(folder: Path, made: Mapping[str, list[Row]]) -> tuple[list[Row], list[dict[str, Any]]]:
    """A row for every run, and the environments that its column of that name counts through."""
    places = [CellFolder.of(folder, cell) for cell in cells(pinned_spec(folder))]
    times = {row["cell"]: row for row in made["times"]}
    environments: list[dict[str, Any]] = []
    rows = []
    runs = [place for place in places if place.cell.content["kind"] == "run"]
    for place, run in zip(runs, made["runs"], strict=True):
        record = place.record()
        result = {} if record is None else record["result"]
        known = {
            **{key: result.get(key) for key in ("micro_batches", "rows_digest", "fingerprint")},
            **times[place.path.name],
            **run,
            "cell": place.cell.digest[:12],
            "layers": " ".join(str(layer) for layer in result.get("layers", ())),
            "environment": _index(environments, result.get("environment")),
            "record_sha256": None if record is None else sha256(canonical(record).encode()).hexdigest(),
            "reason": _reason(run["reason"] or ""),
        }
        rows.append({column: known[column] for column in RUN_COLUMNS})
    return rows, environments


def _reason(text: str) -> str:
    """Of a reason what says nothing of rows, paths and names; empty where there is none."""
    ours, name = OUR_REASONS.match(text), text.partition(":")[0]
    if ours is not None:
        return ours.group()
    return name if name in ERRORS or not text else OTHER_REASON


def _index(environments: list[dict[str, Any]], environment: Any) -> int | None:
    """The number of this environment, which is added if it is new."""
    if not isinstance(environment, Mapping):
        return None
    allowed = {key: environment[key] for key in ENVIRONMENT_KEYS if key in environment}
    if allowed not in environments:
        environments.append(allowed)
    return environments.index(allowed)


def _states(found: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """How many cells of each kind are in which state, as the report counts them."""
    kinds = dict.fromkeys(one.kind for one in found)
    return {kind: dict(Counter(one.state for one in found if one.kind == kind)) for kind in kinds}


def _columns(rows: Sequence[Row], columns: Iterable[str]) -> list[Row]:
    """Rows cut down to these columns."""
    return [{column: row.get(column) for column in columns} for row in rows]


def _accepted(changes: Sequence[Mapping[str, Any]], margins: Iterable[str]) -> list[dict[str, Any]]:
    """Each accepted change of the spec: what became of the margins, and how many other settings changed."""
    starts = tuple(f"margins.{key}: " for key in margins)
    told = []
    for change in changes:
        lines = [line for line in change["changes"] if line.startswith(starts)]
        counts = {"num_cells": change["num_cells"], "num_other_changes": len(change["changes"]) - len(lines)}
        told.append({**counts, "margins": lines})
    return told


def _versions(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Of the libraries, and of what packed a base model where one was packed."""
    found = {key: spec["versions"].get(key) for key in ("aletheia-lora", *LIBRARIES)}
    return found | _chosen(spec.get("packed_versions", {}), PACKERS)


def _margins(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The margins of losses, and of the tasks that were asked."""
    asked = (spec.get("evaluation") or {}).get("tasks", ())
    return {key: spec["margins"].get(key) for key in (*Margins.model_fields, *asked)}


def _spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, without paths."""
    others = [_chosen(spec["other_text"], TASK_KEYS, "data")] if spec.get("other_text") else []
    return {
        "models": [_chosen(entry, MODEL_KEYS, "model") for entry in spec["models"]],
        "tasks": [_chosen(entry, TASK_KEYS, "data") for entry in spec["tasks"]],
        "methods": [_chosen(entry, tuple(Method.model_fields)) for entry in spec["methods"]],
        "other_text": others[0] if others else None,
        "evaluation": _chosen(spec["evaluation"], EVALUATION_KEYS) if spec.get("evaluation") else None,
        **{key: spec[key] for key in SPEC_KEYS if key in spec},
    }


def _chosen(entry: Mapping[str, Any], keys: Sequence[str], source: str | None = None) -> dict[str, Any]:
    """The allowed keys of an entry; of where it comes from, a hub id or the word for it."""
    chosen = {key: entry[key] for key in keys if key in entry}
    if source is not None:
        value = str(entry[source])
        local = entry.get("digest") is not None or value.lower().endswith(FILE_SUFFIXES)
        on_hub = not local and HUB_ID.fullmatch(value) is not None
        chosen["source"] = value if on_hub or value == "embedded" else "local"
    return chosen


def _csv(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    return (csv_text(rows) or f"{','.join(columns)}\n").encode()


def _readme(name: str, figures: Sequence[str]) -> str:
    """What every file and column is."""
    lines = [
        f"# Evidence of the campaign {name}",
        "",
        "Made by `aletheia campaign export` from the records of the runs alone; nothing was run or measured for it.",
        "Paths, names of people and machines, and the text of data are left out.",
        "",
        "## summary.json",
        "",
        "What was asked for and with which margins, and in `accepted_changes` what of it was changed after how many",
        "cells had run; how many cells ended in which state; the mean of each method with its n and its gaps;",
        "versions, the environments that the runs met, and the SHA-256 of every other file here.",
        "",
        "## aggregate_runs.csv",
        "",
        "A line for every run that was asked for. What could not be known is empty.",
        "",
        *(f"- `{column}`: {meaning}" for column, meaning in RUN_COLUMNS.items()),
        "",
    ]
    for file, keys in SUMMARIES.items():
        named = ", ".join(f"`{key}`" for key in keys)
        lines += [f"## {file}", "", f"Means over the runs that are `done`, for each {named}.", ""]
        lines += [f"- `{column}`: {RUN_COLUMNS[column]}" for column in keys]
        lines += [*(f"- `{column}`: {meaning}" for column, meaning in MEAN_COLUMNS.items()), ""]
    for file, (_, columns, what) in COMPARED.items():
        lines += [f"## {file}", "", f"{what}.", ""]
        lines += [*(f"- `{column}`: {meaning}" for column, meaning in columns.items()), ""]
    if figures:
        lines += ["## Figures", "", *(f"- `{figure}`" for figure in figures), ""]
    return "\n".join(lines)
