"""A spec and a folder -> the records that are still missing: the driver of a campaign.

A cell is an attempt in a process of its own. What the machine does to it (a kill, a full disk, too little memory) is
tried again within a :class:`Budget`; what the program does to it would come again and is its record. Whatever ends the
driver, the next one goes on from the records.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AletheiaError, ConfigError, OutputError
from ..files import check_writable, write_json
from .executors import EXIT_MACHINE, EXIT_MEMORY, Executor, Job
from .outcomes import outcomes
from .records import CellFolder, LockedError, chosen_rate, faults, keep_accepted, locked, now, read_pinned, trained_run
from .spec import Cell, cells, changes, grid_of, run_behind

MACHINE_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
FREE_BYTES = 64 << 20
"""Disk space without which no attempt is started."""
POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How often a cell is tried again."""

    machine_faults: int = 20
    """Attempts that the machine may end."""
    memory_faults: int = 2
    """Attempts that may run out of memory; each further one cuts a step's rows into twice as many micro-batches."""
    first_pause: float = 5.0
    """Seconds after the first fault of the machine; doubled after each further one."""
    longest_pause: float = 300.0
    """Seconds."""


@contextlib.contextmanager
def driver_lock(folder: Path, workers: int | None = None) -> Iterator[None]:
    """Be the one driver of this campaign; the file says who that is, and how many cells it runs at a time.

    Raises:
        LockedError: If there is another one; says which.
    """
    check_writable(folder)
    try:
        with locked(folder / "driver.lock") as handle:
            about = {"pid": os.getpid(), "host": platform.node(), "since": now(), "workers": workers}
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(about).encode(), 0)
            yield
    except LockedError as error:
        raise LockedError(
            f"another driver is at work on {str(folder)!r}: {driver_of(folder)}. Wait for it, or stop it first."
        ) from error


def driver_of(folder: Path) -> str:
    """Who holds, or last held, the lock."""
    try:
        about = json.loads((folder / "driver.lock").read_text())
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def driver_workers(folder: Path) -> int | None:
    """How many cells the last driver ran at a time; None where nothing tells."""
    try:
        return int(json.loads((folder / "driver.lock").read_text())["workers"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def driver_host(folder: Path) -> str:
    """The machine that the last driver ran on; empty where nothing tells."""
    try:
        return str(json.loads((folder / "driver.lock").read_text())["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def pin(spec: Mapping[str, Any], folder: Path, *, accept_change: bool) -> None:
    """Keep the resolved spec, or compare it with the one that is kept; what is accepted stays on record.

    Raises:
        ConfigError: If the folder is another campaign's, or the spec changed and that was not accepted.
        OutputError: If the folder holds something else.
    """
    kept = read_pinned(folder)
    if kept is not None and kept.get("name") != spec["name"]:
        raise ConfigError(f"{str(folder)!r} holds the campaign {kept.get('name')!r}. Choose another --output.")
    changed = [] if kept is None else changes(dict(kept), dict(spec))
    if changed and not accept_change:
        raise ConfigError(
            f"the spec is not the one that {str(folder)!r} was started with: {'; '.join(changed)}. Put it back, choose "
            "another --output, or give --accept-change: cells whose content changed then run anew."
        )
    if changed:
        keep_accepted(folder, changed)
    if kept is None or changed:
        write_json(folder / "campaign.json", spec)


@dataclass
class Driver:
    """A campaign under way."""

    folder: Path
    base: Path
    executor: Executor
    workers: int
    budget: Budget
    say: Callable[[str], None]
    waiting: dict[Cell, float] = field(default_factory=dict)
    """Cells without a record, and the earliest time to start each."""
    jobs: dict[Cell, Job] = field(default_factory=dict)
    oom_kills: int = 0

    def run(self, wanted: Sequence[Cell]) -> None:
        """Attempt every cell until it has a record.

        Raises:
            OutputError: If the disk is full.
        """
        self.oom_kills = oom_kills()
        for cell in wanted:
            place = self.place(cell)
            place.make()
            if place.record() is None:
                self._note_what_was_cut_off(place)
                self.waiting[cell] = 0.0
        self.say(f"{len(self.waiting)} of {len(wanted)} cells to run, {self.workers} at a time")
        try:
            while self.waiting or self.jobs:
                for cell in [cell for cell, job in self.jobs.items() if job.poll() is not None]:
                    self._ended(cell, self.jobs.pop(cell))
                self._start()
                time.sleep(POLL_SECONDS)
        finally:
            for job in self.jobs.values():
                job.stop()
            for cell in self.jobs:
                with contextlib.suppress(AletheiaError):  # the next driver notes it
                    self._note_what_was_cut_off(self.place(cell))

    def reopen(self, spec: Mapping[str, Any], *, failed: bool) -> bool:
        """Let what was overtaken run again, and if asked what ended badly; True if there is any of it."""
        pairs = zip(cells(spec), outcomes(self.folder, spec), strict=True)
        asked = [(cell, one) for cell, one in pairs if one.overtaken or (failed and one.attempts is not None)]
        reopened = [self.place(cell).retry(one.reason if one.overtaken else None) for cell, one in asked]
        return any(reopened)

    def place(self, cell: Cell) -> CellFolder:
        """The cell's folder."""
        return CellFolder.of(self.folder, cell)

    def _start(self) -> None:
        for cell, not_before in list(self.waiting.items()):
            if len(self.jobs) >= self.workers:
                return
            place = self.place(cell)
            if time.monotonic() < not_before or not self._has_what_it_needs(place) or place.is_locked():
                continue
            free = shutil.disk_usage(self.folder).free
            if free < FREE_BYTES:
                raise OutputError(
                    f"{free >> 20} MiB are free where {str(self.folder)!r} lies, expected {FREE_BYTES >> 20}. "
                    "Nothing is lost: make room and run the campaign again."
                )
            del self.waiting[cell]
            if place.record() is None:
                self._note_what_was_cut_off(place)
                self.jobs[cell] = self._job(place)

    def _job(self, place: CellFolder) -> Job:
        try:
            return self.executor(place.path, self.base)
        except OSError as error:
            raise OutputError(
                f"cannot start {place.path.name!r}: {error.strerror or error}. Nothing is lost: see to it and run the "
                "campaign again."
            ) from error

    def _has_what_it_needs(self, place: CellFolder) -> bool:
        """True when the cells that this one builds on are there: a run's grid, an evaluation's run.

        A cell whose own ended badly fails here, with their reason.
        """
        kind = place.cell.content["kind"]
        if kind == "grid":
            return True
        needed = [run_behind(place.cell)] if kind == "evaluation" else grid_of(place.cell)
        if any(cell in self.waiting or cell in self.jobs for cell in needed):
            return False
        try:
            trained_run(place) if kind == "evaluation" else chosen_rate(place)
        except AletheiaError as error:
            with place.lock():
                if place.record() is None:
                    place.finish("failed", str(error))
            del self.waiting[place.cell]
            self.say(f"{place.path.name}: failed: {error}")
            return False
        return True

    def _ended(self, cell: Cell, job: Job) -> None:
        """Judge how an attempt ended."""
        place, code = self.place(cell), job.poll()
        assert code is not None
        try:
            with place.lock():
                if place.record() is None:
                    pause = self._without_record(place, code)
                    if pause is not None:
                        self.waiting[cell] = time.monotonic() + pause
                        return
        except LockedError:  # it is not quite gone yet
            self.waiting[cell] = 0.0
            return
        state, reason = place.state()
        self.say(f"{place.path.name}: {state}{f': {reason}' if reason else ''}; {len(self.waiting)} to start")

    def _without_record(self, place: CellFolder, code: int) -> float | None:
        """Note why there is no record; gives the pause before the next attempt, None if there will be none."""
        before, self.oom_kills = self.oom_kills, oom_kills()
        if code == EXIT_MEMORY or (code == -signal.SIGKILL and self.oom_kills > before):
            place.append("attempt_ended", cause="memory", code=code, reason="out of memory")
            count = faults(place.events(), "memory")
            batch_size = rows_at_a_time(place.cell)
            if count <= self.budget.memory_faults and batch_size % 2**count == 0:
                self.say(f"{place.path.name}: out of memory; again with {batch_size // 2**count} rows at a time")
                return 0.0
            place.finish("oom", f"out of memory with {batch_size // 2 ** (count - 1)} rows at a time")
            return None
        if code == EXIT_MACHINE or -code in MACHINE_SIGNALS:
            what = _last_line(place.path / "log.txt") if code > 0 else signal.Signals(-code).name
            place.append("attempt_ended", cause="machine", code=code, reason=what)
            count = faults(place.events(), "machine")
            if count < self.budget.machine_faults:
                pause = float(min(self.budget.first_pause * 2 ** (count - 1), self.budget.longest_pause))
                self.say(f"{place.path.name}: ended by the machine ({what}); again in {pause:.0f} s")
                return pause
            place.finish("failed", f"gave up after {count} attempts that the machine ended, the last by {what}")
            return None
        what = _last_line(place.path / "log.txt") if code >= 0 else f"ended by {signal.Signals(-code).name}"
        place.append("attempt_ended", cause="program", code=code, reason=what)
        place.finish("failed", f"no record from the process (exit code {code}): {what}")
        return None

    def _note_what_was_cut_off(self, place: CellFolder) -> None:
        """An attempt whose driver ended counts for no budget."""
        if place.is_locked():
            return
        with place.lock():
            events = place.events()
            last = events[-1]["kind"] if events else None
            if place.record() is None and last in ("attempt_started", "progress"):
                place.append("attempt_ended", cause="driver", reason="its driver ended")


def run_campaign(
    spec: Mapping[str, Any],
    folder: Path,
    base: Path,
    *,
    executor: Executor,
    workers: int = 1,
    budget: Budget | None = None,
    accept_change: bool = False,
    retry_failed: bool = False,
    say: Callable[[str], None] = lambda _line: None,
) -> None:
    """Run every cell of a resolved spec that has no record yet.

    Args:
        spec: As :func:`~aletheia_lora.campaign.spec.resolved` gives it.
        folder: The campaign's folder, new or from before.
        base: Folder that paths in the spec go from.
        executor: What starts a cell's process.
        workers: Cells at a time.
        budget: How often a cell is tried again.
        accept_change: Go on with a spec that is not the one the folder was started with.
        retry_failed: First reopen the cells that ended badly; then the runs that trained at another rate than their
            grid gives now, and their evaluations.
        say: Called with a line when there is news.

    Raises:
        ConfigError: If the folder is another campaign's, or the spec changed.
        LockedError: If another driver is at work.
        OutputError: If the folder cannot be written or the disk is full; the next start goes on from here.
        KeyboardInterrupt: On Ctrl-C, SIGTERM and SIGHUP, when all processes were stopped.
    """
    if workers < 1:
        raise ConfigError(f"workers={workers}, expected at least 1.")
    read_pinned(folder)  # says what is wrong with the folder before anything is written into it
    with driver_lock(folder, workers), signals_interrupt():
        pin(spec, folder, accept_change=accept_change)
        wanted = cells(spec)
        driver = Driver(folder, base, executor, workers, budget or Budget(), say)
        if retry_failed:
            driver.reopen(spec, failed=True)
        driver.run(wanted)
        if retry_failed and driver.reopen(spec, failed=False):  # the grid may give another rate only now
            driver.run(wanted)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP mean what Ctrl-C means, in the main thread, which alone is told of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def rows_at_a_time(cell: Cell) -> int:
    """Rows that a process of this cell takes at once: of a step, or prompts of an evaluation."""
    content = cell.content
    if content["kind"] == "evaluation":
        return int(content["evaluation"]["eval_batch_size"])
    return int(content["batch_size"]) // int(content.get("processes", 1))


def oom_kills() -> int:
    """How many processes of this control group the kernel killed for memory; 0 where that cannot be known."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        counts = Path(f"/sys/fs/cgroup{group}/memory.events").read_text().split()
        return int(counts[counts.index("oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return 0


def _last_line(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1][:300]
    except (OSError, IndexError):
        return "it said nothing"
