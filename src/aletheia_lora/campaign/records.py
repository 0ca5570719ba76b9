"""A cell <-> its folder: what it is, what happened to it, and its one record.

``cell.json`` is the cell's content, written once. ``events.jsonl`` is the history of its attempts, one line each with a
number and a checksum; only who holds the folder's lock writes to it. ``record.json`` appears whole, at the end, and
never changes: a cell that has one is not run again. Locks are ``flock``, which ends with the process that holds it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import AletheiaError, OutputError
from ..files import write_json
from .spec import Cell, canonical, grid_of, run_behind

FORMAT = "aletheia-cell/1"
ACCEPTED = "accepted_changes.json"
"""Beside the spec, which is only what it is now."""
STATES = ("planned", "running", "interrupted", "oom", "failed", "nan", "invalid", "done")
"""``planned``: nothing started. ``running``: somebody holds the lock. ``interrupted``: an attempt ended without a
result, and another may follow. ``oom``: out of memory. ``failed``: an error, or too many attempts. ``nan``: a loss
that is not finite. ``invalid``: it ended, but a check did not hold. ``done``: it ended, and all checks held."""
FINAL = ("oom", "failed", "nan", "invalid", "done")
"""States of a record."""
LOCK_SECONDS = 10.0
"""Somebody who only looks holds a lock for an instant; longer than this, it is at work."""


class LockedError(AletheiaError, RuntimeError):
    """Another process is at work in the folder."""


class DamagedError(AletheiaError, ValueError):
    """A file of the records that is not what was written."""


@contextlib.contextmanager
def locked(file: Path, *, seconds: float = 0.0) -> Iterator[int]:
    """Hold a lock file, waiting for it at most so long; gives its descriptor.

    Raises:
        LockedError: If another process holds it.
        OutputError: If the file cannot be opened.
    """
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot open the lock {str(file)!r}: {reason}. Check the folder's rights.") from error
    try:
        ends = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= ends:
                    raise LockedError(f"another process is at work in {str(file.parent)!r}.") from None
                time.sleep(0.05)
        yield handle
    finally:
        os.close(handle)


@dataclass(frozen=True)
class CellFolder:
    """The folder of one cell."""

    path: Path
    cell: Cell

    @classmethod
    def of(cls, campaign: Path, cell: Cell) -> CellFolder:
        """Where a campaign keeps this cell."""
        return cls(campaign / "cells" / cell.folder_name, cell)

    @classmethod
    def open(cls, path: Path) -> CellFolder:
        """A folder that is there.

        Raises:
            DamagedError: If its content is not that of its name.
        """
        cell = Cell(read_json(path / "cell.json"))
        if cell.folder_name != path.name:
            raise DamagedError(f"{path.name!r} holds the cell {cell.folder_name!r}. Remove the folder.")
        return cls(path, cell)

    def make(self) -> None:
        """Make the folder and its ``cell.json``, where they are not there yet."""
        if not (self.path / "cell.json").exists():
            write_json(self.path / "cell.json", self.cell.content)

    # --- lock and events ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one who writes here.

        Raises:
            LockedError: If another process is.
        """
        with locked(self.path / "lock", seconds=LOCK_SECONDS):
            yield

    def is_locked(self) -> bool:
        """True while a process is at work here."""
        if not (self.path / "lock").exists():
            return False
        try:
            with locked(self.path / "lock"):
                return False
        except LockedError:
            return True

    def events(self) -> list[dict[str, Any]]:
        """What happened so far; a last line that was never finished is left out.

        Raises:
            DamagedError: If a finished line is not what was written, or one is missing.
        """
        return self._read()[0]

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The events, and the number of bytes that they take."""
        try:
            content = (self.path / "events.jsonl").read_bytes()
        except FileNotFoundError:
            return [], 0
        whole = content[: content.rfind(b"\n") + 1]
        events = []
        for number, line in enumerate(whole.splitlines()):
            try:
                event = json.loads(line)
                crc = event.pop("crc")
            except (ValueError, AttributeError, KeyError):
                event, crc = {}, None
            if crc != zlib.crc32(canonical(event).encode()) or event.get("seq") != number:
                raise DamagedError(
                    f"line {number + 1} of {self.path.name}/events.jsonl is damaged. Remove the folder to run it again."
                )
            events.append(event)
        return events, len(whole)

    def append(self, kind: str, **data: Any) -> None:
        """Add an event and wait until it is on disk; hold the lock.

        Raises:
            OutputError: If it cannot be written; nothing of it stays.
        """
        events, size = self._read()
        event = {"seq": len(events), "at": now(), "kind": kind, "data": data}
        line = canonical({**event, "crc": zlib.crc32(canonical(event).encode())}) + "\n"
        handle = None
        try:
            handle = os.open(self.path / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(handle, size)  # a line that was never finished never happened
            rest = line.encode()
            while rest:
                written = os.pwrite(handle, rest, size)
                rest, size = rest[written:], size + written
            os.fsync(handle)
        except OSError as error:
            raise OutputError(
                f"cannot write an event of {self.path.name!r}: {error.strerror or error}. What was there stands."
            ) from error
        finally:
            if handle is not None:
                os.close(handle)

    # --- the record ---------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any] | None:
        """The record, if the cell has come to an end.

        Raises:
            DamagedError: If it is not what was written, or of another cell.
        """
        file = self.path / "record.json"
        if not file.exists():
            return None
        record = read_json(file)
        digest = record.pop("sha256", None)
        if digest != sha256(canonical(record).encode()).hexdigest() or record.get("cell") != self.cell.digest:
            raise DamagedError(f"{self.path.name}/record.json is damaged. Remove the folder to run the cell again.")
        return record

    def finish(self, state: str, reason: str | None = None, **result: Any) -> None:
        """Write the record, once; hold the lock.

        Raises:
            OutputError: If it cannot be written; the cell has no record then.
        """
        assert state in FINAL and self.record() is None
        attempts = sum(event["kind"] == "attempt_started" for event in self.events())
        record = json.loads(
            json.dumps(
                {
                    "format": FORMAT,
                    "cell": self.cell.digest,
                    "state": state,
                    "reason": reason,
                    "attempts": attempts,
                    "result": result,
                },
                default=_plain,
            ),
            parse_constant=lambda _word: None,  # an unknown number is null
        )
        digest = sha256(canonical(record).encode()).hexdigest()
        write_json(self.path / "record.json", {**record, "sha256": digest})
        self.append("finished", state=state, reason=reason)

    def retry(self, overtaken: str | None = None) -> bool:
        """Let a cell that ended badly run again; its record is kept beside, and its budgets start anew.

        Args:
            overtaken: Why one that ended well has to, too.

        Returns:
            True if it will run again.
        """
        with self.lock():
            record = self.record()
            if record is None or (record["state"] == "done" and overtaken is None):
                return False
            self.append("retried", state=record["state"], reason=overtaken or record["reason"])
            retries = sum(event["kind"] == "retried" for event in self.events())
            os.replace(self.path / "record.json", self.path / f"record-before-retry-{retries}.json")
            return True

    def state(self) -> tuple[str, str | None]:
        """The state, and why it is that.

        Raises:
            DamagedError: If record or events are not what was written.
        """
        at_work = self.is_locked()
        record = self.record()
        if record is not None:
            return str(record["state"]), record["reason"]
        if at_work:
            return "running", None
        events = self.events()
        if not any(event["kind"] == "attempt_started" for event in events):
            return "planned", None
        last = events[-1]
        return "interrupted", last["data"].get("reason") if last["kind"] == "attempt_ended" else "its process is gone"


def faults(events: list[dict[str, Any]], cause: str) -> int:
    """How many attempts since the last retry ended for this cause."""
    count = 0
    for event in events:
        if event["kind"] == "retried":
            count = 0
        count += event["kind"] == "attempt_ended" and event["data"].get("cause") == cause
    return count


def now() -> str:
    """UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _plain(value: Any) -> Any:
    """NumPy numbers as Python's."""
    return value.item()


def read_json(file: Path) -> dict[str, Any]:
    """The contents of a file that was written whole.

    Raises:
        DamagedError: If it is not a JSON object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file.parent.name}/{file.name} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{file.parent.name}/{file.name} holds a {type(found).__name__}, expected keys and values.")
    return found


def read_pinned(folder: Path) -> Mapping[str, Any] | None:
    """The resolved spec that a campaign's folder was started with; None for a new one.

    Raises:
        DamagedError: If the file is not what was written.
        OutputError: If the folder holds something else.
    """
    file = folder / "campaign.json"
    if file.exists():
        return read_json(file)
    if folder.exists() and (not folder.is_dir() or any(path.name != "driver.lock" for path in folder.iterdir())):
        raise OutputError(f"{str(folder)!r} holds no campaign and is not empty. Choose another --output.")
    return None


def accepted_changes(folder: Path) -> list[dict[str, Any]]:
    """Every change of the spec that was accepted: ``at``, ``num_cells`` that had a record by then, and ``changes``.

    Raises:
        DamagedError: If the file is not what was written.
    """
    file = folder / ACCEPTED
    found = read_json(file).get("accepted") if file.exists() else []
    if not isinstance(found, list):
        raise DamagedError(f"{folder.name}/{ACCEPTED} holds no list of changes. Put it back as it was written.")
    return found


def keep_accepted(folder: Path, changes: Sequence[str]) -> None:
    """Add a change, in lines; cells whose record a retry put aside count, too.

    Raises:
        OutputError: If it cannot be written.
    """
    ended = {file.parent for file in folder.glob("cells/*/record*.json")}
    change = {"at": now(), "num_cells": len(ended), "changes": list(changes)}
    write_json(folder / ACCEPTED, {"accepted": [*accepted_changes(folder), change]})


def chosen_rate(folder: CellFolder) -> tuple[float, list[dict[str, Any]]]:
    """The rate of the grid with the lowest validation loss, and the whole grid.

    Raises:
        AletheiaError: If no run of the grid ended well, or one has not ended yet.
    """
    grid = list(_grid_entries(folder))
    if not grid:
        return float(folder.cell.content["learning_rates"][0]), []
    well = [(entry["validation_loss"], entry["learning_rate"]) for entry in grid if entry["state"] == "done"]
    if not well:
        raise AletheiaError(f"no learning rate of the grid ended well; the first: {grid[0]['reason']}")
    return min(well)[1], grid


def _grid_entries(folder: CellFolder) -> Iterator[dict[str, Any]]:
    for cell in grid_of(folder.cell):
        record = CellFolder(folder.path.parent / cell.folder_name, cell).record()
        if record is None:
            raise AletheiaError(f"{cell.folder_name} of the grid has no record yet. Run the campaign first.")
        yield {
            "learning_rate": cell.content["learning_rate"],
            "state": record["state"],
            "reason": record["reason"],
            "validation_loss": record["result"].get("validation_loss"),
            "rows_digest": record["result"].get("rows_digest"),
        }


def run_folder(folder: CellFolder) -> CellFolder:
    """The folder of the run whose adapter this evaluation asks."""
    run = run_behind(folder.cell)
    return CellFolder(folder.path.parent / run.folder_name, run)


def trained_run(folder: CellFolder) -> dict[str, Any]:
    """The record of the run whose adapter this evaluation asks.

    Raises:
        AletheiaError: If it has none yet, or did not end well; gives its reason.
    """
    run = run_folder(folder)
    record = run.record()
    if record is None:
        raise AletheiaError(f"its run {run.path.name!r} has no record yet. Run the campaign first.")
    if record["state"] != "done":
        raise AletheiaError(f"its run ended as {record['state']}: {record['reason']}")
    return record
