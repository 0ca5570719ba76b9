"""A cell's folder -> a process that runs the cell, here or elsewhere: the dict :data:`EXECUTORS`.

Every executor ends up with the same command in a process of its own. The process reads from a pipe that nothing is ever
written to: when whoever started it is gone, however that came, the pipe ends and so does the process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

EXIT_MACHINE, EXIT_MEMORY = 75, 76
"""How a child ends without a record: the machine failed it, or memory was short."""


class Job(Protocol):
    """One attempt at a cell."""

    def poll(self) -> int | None:
        """Exit code, negative for the signal that ended it; None while it runs."""

    def stop(self) -> None:
        """End it at once; records are whole or not there."""


Executor = Callable[[Path, Path], Job]
"""Starts an attempt, given the cell's folder and the folder that the spec's paths go from."""


class LocalJob:
    """A child process of this one, with its own session, log and scratch folder."""

    command: Sequence[str] = (sys.executable, "-m", "aletheia_lora", "campaign", "cell")
    """Takes the cell's folder and the folder that paths go from."""

    def __init__(self, folder: Path, base: Path) -> None:
        scratch = folder / "scratch"
        scratch.mkdir(exist_ok=True)
        self._scratch = scratch
        with (folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command, str(folder.resolve()), str(base.resolve())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(scratch.resolve())},
            )

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, once it ended."""
        code = self._process.poll()
        if code is not None:
            self._tidy()
        return code

    def wait(self) -> int:
        """Exit code, when it ends."""
        try:
            return self._process.wait()
        finally:
            self._tidy()

    def stop(self) -> None:
        """Kill it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait()

    def _tidy(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def end_with_parent() -> None:
    """End this process, at once, when the one that holds the other end of its standard input is gone."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


EXECUTORS: dict[str, Callable[[], Executor]] = {"local": lambda: LocalJob}
"""Makes an executor, by name."""
