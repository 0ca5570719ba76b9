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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError

EXIT_MACHINE, EXIT_MEMORY = 75, 76
"""How a child ends without a record: the machine failed it, or memory was short."""

CELL = (sys.executable, "-m", "aletheia_lora", "campaign", "cell")
"""The command of an attempt; it is given the cell's folder and the folder that paths go from."""
STOP_SECONDS = 30.0
"""Longest wait for a worker to end."""


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

    def __init__(self, folder: Path, base: Path, command: Sequence[str] = CELL) -> None:
        scratch = folder / "scratch"
        scratch.mkdir(exist_ok=True)
        self._scratch = scratch
        with (folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, str(folder.resolve()), str(base.resolve())],
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


# --- Ray --------------------------------------------------------------------------------------------------------


class RayJob:
    """A task on a Ray cluster, whose worker starts the command and waits for it."""

    def __init__(self, task: Any, folder: Path, base: Path, command: Sequence[str]) -> None:
        import ray

        self._ray = ray
        self._result = task.remote(str(folder.resolve()), str(base.resolve()), tuple(command))

    def poll(self) -> int | None:
        """Exit code of the command; a worker that is gone counts as killed."""
        ready, _ = self._ray.wait([self._result], timeout=0)
        if not ready:
            return None
        errors = self._ray.exceptions
        try:
            return int(self._ray.get(self._result))
        except errors.OutOfMemoryError:
            return EXIT_MEMORY
        except errors.RayTaskError:
            raise  # the command could not even be started: that is no cell's fault
        except errors.RayError:
            return -signal.SIGKILL

    def stop(self) -> None:
        """End the worker, and with it the command."""
        self._ray.cancel(self._result, force=True)
        self._ray.wait([self._result], timeout=STOP_SECONDS)


def ray_executor(options: Mapping[str, Any], command: Sequence[str] = CELL) -> Executor:
    """Cells as tasks on the Ray cluster of $RAY_ADDRESS, or on this machine.

    The campaign's folder has to be one that all machines of the cluster see. Ray itself tries nothing again.

    Args:
        options: Of ``ray.remote``; by default one processor, and one GPU where there are any.
        command: What a worker starts.

    Raises:
        ConfigError: If Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed. Get it with `pip install aletheia-lora[ray]`.") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    needs = {"num_cpus": 1, "num_gpus": 1 if ray.cluster_resources().get("GPU") else 0}
    task = ray.remote(**{**needs, **options, "max_retries": 0})(_attempt)
    return lambda folder, base: RayJob(task, folder, base, command)


def _attempt(folder: str, base: str, command: Sequence[str]) -> int:
    """What a worker does."""
    return LocalJob(Path(folder), Path(base), command).wait()


# --- Slurm ------------------------------------------------------------------------------------------------------


class SlurmJob:
    """A job that submitit handed to Slurm; it goes on when the driver ends, and the next driver waits for it."""

    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        """Exit code of the command; a job that Slurm ended counts as killed."""
        from submitit.core.utils import FailedJobError, UncompletedJobError

        if not self._job.done():
            return None
        try:
            return int(self._job.result())
        except FailedJobError:
            raise  # the command could not even be started: that is no cell's fault
        except UncompletedJobError:
            return EXIT_MEMORY if "MEMORY" in str(self._job.state) else -signal.SIGKILL

    def stop(self) -> None:
        """Cancel it."""
        self._job.cancel(check=False)
        ends = time.monotonic() + STOP_SECONDS
        while not self._job.done() and time.monotonic() < ends:
            time.sleep(0.1)


def slurm_executor(options: Mapping[str, Any], command: Sequence[str] = CELL) -> Executor:
    """Cells as jobs of a Slurm cluster, whose nodes see the campaign's folder.

    Args:
        options: Of submitit's ``AutoExecutor.update_parameters``, e.g. ``slurm_partition``, ``gpus_per_node``,
            ``timeout_min`` (a day if left out); ``cluster: local`` runs the jobs on this machine.
        command: What a job starts.

    Raises:
        ConfigError: If submitit is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("submitit is not installed. Get it with `pip install aletheia-lora[slurm]`.") from error
    given = {"timeout_min": 24 * 60, **options}
    cluster = given.pop("cluster", None)

    def start(folder: Path, base: Path) -> SlurmJob:
        executor = submitit.AutoExecutor(folder=folder / "submitit", cluster=cluster)
        executor.update_parameters(name=folder.name[:60], **given)
        return SlurmJob(executor.submit(_attempt, str(folder.resolve()), str(base.resolve()), tuple(command)))

    return start


def local_executor(options: Mapping[str, Any], command: Sequence[str] = CELL) -> Executor:
    """Cells as child processes of this one.

    Raises:
        ConfigError: If there are options: it has none.
    """
    if options:
        raise ConfigError(f"the executor 'local' has no options, got {', '.join(options)}. Leave them out.")
    return lambda folder, base: LocalJob(folder, base, command)


EXECUTORS: dict[str, Callable[[Mapping[str, Any]], Executor]] = {
    "local": local_executor,
    "ray": ray_executor,
    "slurm": slurm_executor,
}
"""Makes an executor from its options, by name."""
