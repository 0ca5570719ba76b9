"""A cell that several processes train -> its outcome: the side of the one that starts them, and that of each of them.

What cells share is measured by the one that starts them: a probe is the same however many train, and processes that
wait for each other must not wait for a lock. The others write into a folder of this attempt alone, so that one that is
slow to end harms nobody.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import traceback
from pathlib import Path

import torch

from ..errors import ProcessError
from ..files import whole_folder, write_json
from ..processes import is_main, joined, world_size
from ..run_config import configuration
from ..runs import Say, device_of
from .cell import GRID_SEED, Outcome, bench_of, exit_code, failure, trained_cell
from .evaluated import ADAPTER
from .launcher import NEWS, launch_command, launched
from .records import CellFolder, read_json
from .shared import method_of

OUTCOME = "outcome.json"


def train_together(folder: CellFolder, say: Say) -> Outcome | int:
    """Start the processes, wait until all of them are gone, and take over what they wrote.

    Returns:
        State, reason and result; or the exit code where the machine was short of something. Where a process was killed
        this one ends in the same way.

    Raises:
        ProcessError: If the processes ended without a word.
    """
    _measure_first(folder, say)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        code = launched(launch_command(folder.cell.content, [str(folder.path), name]), say)
        failures = [read_json(file) for file in sorted(place.glob("failed-*.json"))]
        by_machine = [entry["code"] for entry in failures if entry["code"] is not None]
        if by_machine:
            return int(max(by_machine))
        if failures:  # the others only say that one of them failed
            first = min(failures, key=lambda entry: entry["reason"].startswith(ProcessError.__name__))
            return first["state"], first["reason"], {}
        if code < 0:
            os.kill(os.getpid(), -code)
        if code or not (place / OUTCOME).exists():
            raise ProcessError(f"the processes ended with exit code {code} and without a result. Look into log.txt.")
        if (place / ADAPTER).exists():
            with whole_folder(folder.path / ADAPTER) as kept:
                shutil.copytree(place / ADAPTER, kept, dirs_exist_ok=True)
        state, reason, result = read_json(place / OUTCOME)["outcome"]
        return state, reason, result


def _measure_first(folder: CellFolder, say: Say) -> None:
    """Make what cells share, and forget the model."""
    content = folder.cell.content
    bench = bench_of(folder, say)
    if content["kind"] == "run":
        bench.base(say)
    for method in filter(None, (method_of(content), bench.matched_method)):
        bench.probe(method, GRID_SEED if content["kind"] == "grid" else content["seed"], say)
    del bench
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_part(path: Path, place: Path) -> int:
    """Train the cell in this folder as one of several processes; what came of it goes to ``place``.

    Returns:
        The exit code of this process: the launcher ends the others if it is not 0.
    """
    try:
        folder = CellFolder.open(path)
        content = folder.cell.content
        with joined(cpu=device_of(configuration({"device": content["model"]["device"]})) == "cpu"):
            if world_size() != content["processes"]:
                raise ProcessError(f"{world_size()} processes were started, expected {content['processes']}.")
            outcome = trained_cell(folder, place / ADAPTER, _news if is_main() else lambda _line: None)
            if is_main():
                write_json(place / OUTCOME, {"outcome": outcome})
    except Exception as error:
        traceback.print_exc()
        state, reason = failure(error)
        number = os.environ.get("RANK", "0")
        write_json(place / f"failed-{number}.json", {"code": exit_code(error), "state": state, "reason": reason})
        return 1
    return 0


def _news(line: str) -> None:
    print(f"{NEWS.decode()}{line}", flush=True)
