"""Names of tasks -> the harness's own tasks, their rows from the hub or from a local folder.

Comes in: names, and optionally a folder. Goes out: tasks as lm-evaluation-harness defines them; prompts, metrics and
filters are its own. With a folder, nothing is asked of a network.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, nearest
from ..rows import READERS, listed, load_rows
from .items import digest

FOLDERS = ("gsm8k", "humaneval", "mbpp", "mmlu/default", "wikitext")
"""Where the harness keeps the tasks that are asked for most: reading its whole list takes long."""
SPLITS = {"train": "train", "test": "test", "dev": "dev", "val": "validation", "valid": "validation"}
SPLITS |= {"validation": "validation"}
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
FIRST_HEADING = re.compile(r" ?= (?!=).*(?<!=) = ?")
MEANS = {"mean"}
PERPLEXITIES = {"word_perplexity": "num_words", "byte_perplexity": "num_bytes", "bits_per_byte": "num_bytes"}
"""Metrics that come from sums over items: metric -> what the summed log-likelihood is divided by."""


@dataclass(frozen=True)
class Source:
    """Where the rows of a data set of the hub lie in a local folder."""

    folder: str
    columns: tuple[str, ...] = ()
    """Columns that the tasks read; checked in every row."""
    config_column: str | None = None
    """Column that says to which configuration a row belongs, where one file holds all of them."""
    stands_in: Mapping[str, str] = field(default_factory=dict)
    """Split -> the split that is taken where there is no file of the first; said in the record."""


SOURCES = {
    "gsm8k": Source("gsm8k", ("question", "answer")),
    "mmlu": Source("mmlu", ("question", "subject", "choices", "answer"), config_column="subject"),
    "openai_humaneval": Source("humaneval", ("task_id", "prompt", "test", "entry_point")),
    "mbpp": Source("mbpp", ("task_id", "text", "code", "test_list")),
    "wikitext_document_level": Source("wikitext2", ("page",), stands_in={"test": "validation", "train": "validation"}),
}
"""Last part of a data set's name on the hub -> its source; another one lies in a folder of that name."""


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks, ready to ask."""

    tasks: Mapping[str, Any]
    """Leaf task -> the harness's task object."""
    groups: Mapping[str, tuple[str, ...]]
    """Group -> its leaf tasks; only groups whose score is the mean over all items."""
    definitions: Mapping[str, str]
    """Leaf task -> digest of its definition and version."""
    sources: Mapping[str, str]
    """Where the rows come from -> sha256 of the file, or the hub's fingerprint."""
    notes: tuple[str, ...]
    """What a reader of the scores must know about the rows."""

    @property
    def code_tasks(self) -> list[str]:
        """Tasks whose answers are programs to be run."""
        return [name for name, task in self.tasks.items() if getattr(task, "UNSAFE_CODE", False)]


def load_tasks(names: Sequence[str], *, data_dir: Path | None = None, num_fewshot: int | None = None) -> LoadedTasks:
    """Load tasks and groups of the harness by name.

    Args:
        names: Tasks or groups of lm-evaluation-harness.
        data_dir: Folder with one folder a data set (``gsm8k/test.jsonl``, ...); None: the hub.
        num_fewshot: Worked examples in a prompt; None: as the task says.

    Raises:
        ConfigError: If a name is unknown (the nearest is named), given twice, or its metric is not supported.
        DataError: If the rows cannot be had, or have other columns than the task reads.
    """
    if not names:
        raise ConfigError("no task was given. Name some, e.g. gsm8k,mmlu,humaneval,wikitext.")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"task {doubled[0]!r} is given twice. Name each task once.")
    with quiet():
        manager = _manager(names)
    local = None if data_dir is None else LocalData(data_dir)
    try:
        with quiet(), _replaced(local):
            loaded = manager.load(list(names))
    except (ConfigError, DataError):
        raise
    except Exception as error:  # a task raises whatever its definition, or the hub's client, raises
        advice = "Check the network, or give local files with data_dir." if local is None else "Check the files."
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"cannot load {', '.join(names)}: {reason}. {advice}") from error
    tasks = dict(sorted(loaded["tasks"].items()))
    for name, task in tasks.items():
        _set_fewshot(task, num_fewshot)
        _check_metrics(name, task)
    return LoadedTasks(
        tasks=tasks,
        groups={name: _leaves(group) for name, group in loaded["groups"].items() if group.has_aggregation},
        definitions={name: digest(_definition(task)) for name, task in tasks.items()},
        sources=local.files if local is not None else {name: _fingerprint(task) for name, task in tasks.items()},
        notes=tuple(local.notes) if local is not None else (),
    )


def _manager(names: Sequence[str]) -> Any:
    from lm_eval import tasks as harness

    root = Path(next(iter(harness.__path__)))
    small = harness.TaskManager(include_path=[root / folder for folder in FOLDERS], include_defaults=False)
    if all(name in small.all_tasks for name in names):
        return small
    full = harness.TaskManager()
    for name in names:
        if name not in full.all_tasks:
            raise ConfigError(f"unknown task {name!r}. {nearest(name, full.all_tasks)}")
    return full


def _leaves(group: Any) -> tuple[str, ...]:
    return tuple(sorted(task.task_name for task in group.get_all_tasks()))


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """As the harness does: a task that says 0 keeps it."""
    default = task.get_config("num_fewshot")
    if default is None or (num_fewshot is not None and default != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)


def _check_metrics(name: str, task: Any) -> None:
    for metric, aggregation in task.aggregation().items():
        if metric not in PERPLEXITIES and getattr(aggregation, "__name__", "") not in MEANS:
            raise ConfigError(
                f"metric {metric!r} of task {name!r} is not a mean over items, and cannot be computed from them one by "
                "one. Choose another task."
            )


def _definition(task: Any) -> dict[str, Any]:
    """What the task's file says, functions by name; where its rows and its functions lie is not a part of it."""
    said = {key: ADDRESS.sub("", str(value)) for key, value in task.dump_config().items()}
    return {"version": task.VERSION, **said}


def _fingerprint(task: Any) -> str:
    return str(getattr(task.eval_docs, "_fingerprint", ""))


# --- rows from a folder -----------------------------------------------------------------------------------------


class LocalData:
    """Stands in for ``datasets.load_dataset``: the same splits, read from a folder."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"data_dir {str(folder)!r} is not a folder. Give one with a folder for each data set.")
        self.folder = folder
        self.files: dict[str, str] = {}
        self.notes: list[str] = []
        self._rows: dict[Path, list[dict[str, Any]]] = {}

    def __call__(self, path: str, name: str | None = None, **_options: Any) -> Any:
        """All splits of a data set that have a file, as a ``datasets.DatasetDict``.

        Raises:
            DataError: If there is no folder or no file for it, or a column is missing.
        """
        import datasets

        source = SOURCES.get(path.rpartition("/")[2], Source(path.rpartition("/")[2]))
        folder = self.folder / source.folder
        if not source.config_column and name and (folder / name).is_dir():
            folder /= name
        splits = self._splits(folder)
        if not splits:
            found = listed(sorted(entry.name for entry in self.folder.iterdir()))
            raise DataError(
                f"no rows of {path!r} under {str(self.folder)!r}: expected {source.folder}/test.jsonl or the like, and "
                f"found {found}. Put the file there, or leave data_dir out."
            )
        rows = {split: self._read(file, source, name) for split, file in splits.items()}
        for split, other in source.stands_in.items():
            if split not in rows and other in rows:
                rows[split] = rows[other]
                note = f"{source.folder}: the {other} split stands in for {split}, which has no file"
                self.notes += [note] if note not in self.notes else []
        return datasets.DatasetDict({split: datasets.Dataset.from_list(some) for split, some in rows.items()})

    def _splits(self, folder: Path) -> dict[str, Path]:
        """Split -> file; of two files of a split, the one marked ``raw``."""
        files: dict[str, Path] = {}
        for file in sorted(folder.glob("*"), key=lambda file: (".raw." in file.name, file.name)):
            stem, _, mark = file.stem.partition(".")
            if stem in SPLITS and mark in ("", "raw") and file.suffix in {*READERS, ".txt"}:
                files[SPLITS[stem]] = file
        return files

    def _read(self, file: Path, source: Source, name: str | None) -> list[dict[str, Any]]:
        if file not in self._rows:
            self.files[str(file.relative_to(self.folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
            text = file.suffix == ".txt"
            self._rows[file] = documents(file.read_text(encoding="utf-8")) if text else load_rows(file)
            for number, row in enumerate(self._rows[file], 1):
                if missing := [column for column in source.columns if column not in row]:
                    raise DataError(
                        f"row {number} of {str(file)!r} has the columns {listed(row)}, expected {listed(missing)} too. "
                        "Rename its columns to those of the hub's data set."
                    )
        rows = self._rows[file]
        if source.config_column and name:
            rows = [row for row in rows if row[source.config_column] == name]
            if not rows:
                raise DataError(f"{str(file)!r} has no row with {source.config_column}={name!r}. Take a fuller file.")
        return rows


def documents(text: str) -> list[dict[str, Any]]:
    """WikiText cut before each heading of the first level (`` = Title = ``), one row a document."""
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if FIRST_HEADING.fullmatch(line) and any(map(str.strip, pages[-1])):
            pages.append([])
        pages[-1].append(line)
    return [{"page": "\n".join(lines)} for lines in pages]


# --- the harness, kept quiet and away from the network ----------------------------------------------------------


class _Judged:
    """Stands in for the metric ``code_eval``, which would run a program unprotected and comes from the hub."""

    loading = True

    def compute(self, **_inputs: Any) -> tuple[dict[str, float], dict[str, Any]]:
        """Answers the trial that a task makes while it is loaded, and refuses everything later."""
        if not self.loading:
            raise ConfigError("a program was about to run outside the sandbox. Use `aletheia eval` for such a task.")
        return {"pass@1": 0.0}, {}


@contextlib.contextmanager
def _replaced(local: LocalData | None) -> Iterator[None]:
    """While open, rows come from the folder, if there is one, and no task gets hold of ``code_eval``."""
    import datasets
    import evaluate

    judged = _Judged()
    before = set(sys.modules)
    kept = datasets.load_dataset, evaluate.load
    if local is not None:
        datasets.load_dataset = local
    evaluate.load = lambda name, *args, **kwargs: judged if name == "code_eval" else kept[1](name, *args, **kwargs)
    try:
        yield
    finally:
        datasets.load_dataset, evaluate.load = kept
        judged.loading = False
        for name in set(sys.modules) - before:  # whoever uses the harness later gets its own modules
            if name.startswith("lm_eval.tasks.") and judged in vars(sys.modules[name]).values():
                del sys.modules[name]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar, log line or warning of the harness; errors come through."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
