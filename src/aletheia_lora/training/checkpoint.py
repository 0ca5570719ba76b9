"""A run under way <-> a folder beside its output that the same call goes on from, after whatever ended it.

Trainer writes a checkpoint file by file. One counts from the moment its ``commit.json`` is there, which is written last
and knows the SHA-256 of every file; a run goes on from the newest whose files still have theirs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..errors import OutputError
from ..files import check_writable, write_json
from ..planning import Plan

COMMIT, IDENTITY, PLAN = "commit.json", "run.json", "plan.json"
KEPT = 2
"""Checkpoints; the older one is there for the case that the newer one is damaged."""


def checkpoints_of(output: Path) -> Path:
    """The folder of the checkpoints of the adapter that is to be written there."""
    whole = output.absolute()
    return whole.with_name(f"{whole.name}-checkpoints")


def kept_plan(output: Path) -> Plan | None:
    """The plan of a run that was cut off; None where there is none.

    Raises:
        PlanError: If its file is damaged.
    """
    file = checkpoints_of(output) / PLAN
    return Plan.load(file) if file.exists() else None


class Checkpoints(TrainerCallback):
    """Commits what Trainer saves, keeps the two newest, and finds the one to go on from."""

    def __init__(self, output: Path, plan: Plan, identity: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Open the folder of this run, new or from before.

        Raises:
            OutputError: If it is another run's, says what differs; or cannot be written.
        """
        self.folder, self.say = checkpoints_of(output), say
        self.resumed_from = 0
        """Optimizer steps that were done before."""
        self.seconds = 0.0
        """Wall seconds of those."""
        self._started = time.perf_counter()
        check_writable(self.folder)
        identity = json.loads(json.dumps({**identity, "plan": _digest(json.dumps(plan.to_dict()).encode())}))
        file = self.folder / IDENTITY
        if not file.exists():
            plan.save(self.folder / PLAN)
            write_json(file, identity)
        before = _read(file)
        changed = sorted(key for key in {*before, *identity} if before.get(key) != identity.get(key))
        if changed:
            what = "; ".join(f"{key}: {before.get(key)} -> {identity.get(key)}" for key in changed)
            raise OutputError(
                f"{str(self.folder)!r} holds checkpoints of another run ({what}). Run the same command again, or "
                "remove the folder to start over."
            )

    def newest(self) -> str | None:
        """The checkpoint to go on from; None at the start. What is not whole is put aside.

        Raises:
            OutputError: If there are checkpoints, but all of them are damaged.
        """
        for path in self.folder.glob("checkpoint-*"):
            if not (path / COMMIT).exists():  # cut off while it was written
                shutil.rmtree(path)
        committed = list(self._committed())
        for commit, path in committed:
            if _files(path) == commit.get("files"):
                self.resumed_from, self.seconds = commit["step"], commit["seconds"]
                self.say(f"going on from step {self.resumed_from}")
                return str(path)
            path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
        if committed:
            raise OutputError(f"all checkpoints in {str(self.folder)!r} are damaged. Remove the folder to start over.")
        return None

    def _committed(self) -> Iterator[tuple[dict[str, Any], Path]]:
        """Commits with their folders, the newest first; one that cannot be read counts as the newest."""
        found = [(_read(path / COMMIT), path) for path in self.folder.glob("checkpoint-*") if (path / COMMIT).exists()]
        return iter(sorted(found, key=lambda entry: -entry[0].get("step", math.inf)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock of this attempt starts."""
        self._started = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Commit what was saved; Trainer calls this when all files are written."""
        path = self.folder / f"checkpoint-{state.global_step}"
        if state.global_step >= state.max_steps:  # Trainer would take a step more from here
            shutil.rmtree(path)
            return
        for file in path.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        seconds = self.seconds + time.perf_counter() - self._started
        write_json(path / COMMIT, {"step": state.global_step, "seconds": seconds, "files": _files(path)})
        for _, older in list(self._committed())[KEPT:]:
            (older / COMMIT).unlink()
            shutil.rmtree(older)

    def remove(self) -> None:
        """The adapter is whole: nothing to go on from is needed."""
        shutil.rmtree(self.folder)


def _files(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but its commit."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != COMMIT)
    return {str(file.relative_to(path)): _digest(file.read_bytes()) for file in files}


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is none, which then fits nothing."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
