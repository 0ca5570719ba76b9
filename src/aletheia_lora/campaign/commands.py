"""What ``aletheia campaign`` does, as plain records with a ``text`` for people."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ..errors import ConfigError, nearest
from .executors import EXECUTORS
from .records import FINAL
from .runner import run_campaign
from .spec import campaign_folder, load_campaign, resolved
from .status import status, status_text

Say = Callable[[str], None]
LIVE_SECONDS = 2.0


def preview(path: Path, say: Say) -> dict[str, Any]:
    """The cells with predicted time and disk; nothing is written."""
    from .forecast import forecast, forecast_text  # late: it loads models

    spec = resolved(load_campaign(path), path.parent)
    with _working_in(path.parent):
        record = forecast(spec, say)
    return {**record, "text": forecast_text(record)}


def run(
    path: Path,
    output: Path | None,
    *,
    workers: int,
    executor: str,
    executor_options: Sequence[str],
    accept_change: bool,
    retry_failed: bool,
    say: Say,
) -> dict[str, Any]:
    """Run what is missing; gives the status at the end.

    Raises:
        ConfigError: If the spec is wrong or changed, or there is no such executor.
    """
    if executor not in EXECUTORS:
        raise ConfigError(f"unknown executor {executor!r}. {nearest(executor, EXECUTORS)}")
    folder = campaign_folder(path, output)
    run_campaign(
        resolved(load_campaign(path), path.parent),
        folder,
        path.parent,
        executor=EXECUTORS[executor](_options(executor_options)),
        workers=workers,
        accept_change=accept_change,
        retry_failed=retry_failed,
        say=say,
    )
    return status_of(path, output)


def status_of(path: Path, output: Path | None) -> dict[str, Any]:
    """How far the campaign is."""
    record = status(campaign_folder(path, output))
    return {**record, "text": status_text(record)}


def shown_live(path: Path, output: Path | None) -> bool:
    """Show the status on a fresh screen and wait a little; False when nothing is left to do."""
    record = status_of(path, output)
    console = Console()
    console.clear()
    console.print(record["text"], markup=False)
    if all(state in FINAL for state in record["states"]):
        return False
    time.sleep(LIVE_SECONDS)
    return True


def report_of(path: Path, output: Path | None) -> dict[str, Any]:
    """The tables, written beside the records with figures and a page."""
    from .report import campaign_record, save_report  # late: it draws

    folder = campaign_folder(path, output)
    record = campaign_record(folder)
    return {**record["tables"], "text": save_report(record, folder)}


def export_of(path: Path, output: Path | None, bundle: Path | None) -> dict[str, Any]:
    """The bundle of evidence, beside the campaign's folder where nothing else is said."""
    from .export import export  # late: it draws

    folder = campaign_folder(path, output)
    whole = folder.absolute()
    target = whole.with_name(f"{whole.name}-evidence") if bundle is None else bundle
    files = export(folder, target, path.parent)
    text = "\n".join([f"wrote {target}", *(f"{digest}  {name}" for name, digest in sorted(files.items()))])
    return {"bundle": str(target), "files": files, "text": text}


def _options(given: Sequence[str]) -> dict[str, Any]:
    """``key=value`` as a mapping; values are read as YAML, so that 1 is a number."""
    options = {}
    for entry in given:
        key, equals, value = entry.partition("=")
        if not key or not equals:
            raise ConfigError(f"executor option {entry!r}, expected key=value, e.g. num_gpus=1.")
        options[key] = yaml.safe_load(value)
    return options


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """Paths go from this folder meanwhile."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
