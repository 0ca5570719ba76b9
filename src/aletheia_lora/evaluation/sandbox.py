"""A CodeProblem and a generated program -> a Verdict, with the program shut in a box.

Comes in: a trusted test and an untrusted program. Goes out: whether the test passed, or why not.

In split mode the test runs in a box of its own and calls the program through pipes (see :mod:`.inside`). A program
passes only by the checker's line with the nonce of this run, which the program's box never sees: nothing that it
prints, no exit code and no object that it returns can stand for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import DataError, SandboxError
from .box import INSTALL, Box, Limits, find_bwrap, find_interpreter
from .code_problem import CodeProblem
from .self_check import attack

__all__ = ["CodeProblem", "Limits", "Sandbox", "Verdict"]

Mode = Literal["split", "shared"]

REASONS = {
    "passed": "the test ran to its end",
    "wrong": "the test failed",
    "raised": "the program raised an exception",
    "syntax": "the program is not Python",
    "no_function": "the program lacks a function that the test calls",
    "not_plain": "a function returned a value that cannot be passed by pipe",
    "exited": "the program ended before it had answered all calls",
    "time": "over the limit of processor or wall time",
    "output": "over the limit of printed text",
    "killed": "the program was killed, by a fault of its own or for memory",
    "broken_reply": "what came back was no answer to a call",
}
START_SECONDS = 60.0  # for two boxes, on a machine that has much else to do
RESULT_BYTES = 64 * 1024  # a checker says less


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of one program."""

    passed: bool
    reason: str
    """A word of ``REASONS``."""
    detail: str = ""
    """The error or exit code behind the reason."""
    mode: Mode
    """``split``: the program never shared an interpreter with its test. ``shared``: it did."""
    seconds: float
    """Wall time of the whole run, box included."""
    output_tail: str
    """The end of what the program printed."""

    @property
    def forgeable(self) -> bool:
        """Whether the program could have made this verdict itself: count such ones, and say how many there are."""
        return self.mode == "shared"


class Sandbox:
    """Runs generated programs in boxes made by bubblewrap, and refuses where it cannot contain them.

    Args:
        bwrap: The bubblewrap to use; found where it is None.
        limits: What one program may use.
        mode: ``split``, which falls back to ``shared`` for problems whose values cannot cross a pipe, or ``shared``.
            Which problems fall back depends on the problem alone, never on the program.

    Raises:
        SandboxError: If bubblewrap is missing; the message has the line that installs it.
        ValueError: If there is no such mode.
    """

    def __init__(self, *, bwrap: str | Path | None = None, limits: Limits | None = None, mode: Mode = "split") -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r}, expected one of {', '.join(get_args(Mode))}.")
        self.bwrap = find_bwrap(bwrap)
        self.interpreter = find_interpreter()
        self.limits = limits or Limits()
        self.mode: Mode = mode
        self.checked: dict[str, str] | None = None
        """What :meth:`check_self` found, once it has."""

    def check_self(self) -> dict[str, str]:
        """Attack boxes in all the ways of :mod:`.self_check`; to be called before anything is generated.

        Returns:
            Each attack and how it ended.

        Raises:
            SandboxError: If the box cannot be made, or an attack got through. No program is run then.
        """
        self.checked = None
        self.checked = attack(self._run, self.limits)
        return self.checked

    def describe(self) -> dict[str, Any]:
        """What a record needs to say of this sandbox: versions, limits, and what :meth:`check_self` found."""
        return {
            "bwrap": _version(self.bwrap),
            "interpreter": _version(self.interpreter.executable),
            "mode": self.mode,
            "limits": asdict(self.limits),
            "checked": self.checked,
        }

    def run(self, problem: CodeProblem, completion: str) -> Verdict:
        """Test one program: the problem's prompt, continued by ``completion``.

        The first run checks the sandbox, if nobody has.

        Raises:
            SandboxError: If the box cannot be made, or did not hold when checked. What a program does is a verdict,
                never an error.
            DataError: If the problem's own prompt or setup fails.
        """
        if self.checked is None:
            self.check_self()
        return self._run(problem, completion)

    def run_all(self, programs: Iterable[tuple[CodeProblem, str]], *, workers: int = 2) -> list[Verdict]:
        """Test several programs, ``workers`` at a time; the verdicts come in the order of the programs.

        Raises:
            SandboxError: As :meth:`run`.
            DataError: As :meth:`run`.
        """
        if self.checked is None:
            self.check_self()
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda program: self._run(*program), programs))

    def _run(self, problem: CodeProblem, completion: str, limits: Limits | None = None) -> Verdict:
        limits = limits or self.limits
        if self.mode == "split" and not problem.needs_shared:
            verdict = self._one_run(problem, completion, "split", limits)
            if verdict.reason != "needs_shared":
                return verdict
        return self._one_run(problem, completion, "shared", limits)

    def _one_run(self, problem: CodeProblem, completion: str, mode: Mode, limits: Limits) -> Verdict:
        started = time.monotonic()
        with contextlib.closing(_Run(self, problem, completion, mode, limits)) as run:
            reason, detail = run.outcome()
        if reason == "broken_problem":
            raise DataError(f"problem {problem.task_id}: its own prompt or setup fails: {detail}.")
        return Verdict(
            passed=reason == "passed",
            reason=reason,
            detail=detail,
            mode=mode,
            seconds=time.monotonic() - started,
            output_tail=run.program.tail.decode(errors="replace"),
        )


def _version(program: Path) -> str:
    """What the program answers to ``--version``."""
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()


class _Run:
    """The boxes of one run, the pipes between them, and what has come out so far."""

    def __init__(self, sandbox: Sandbox, problem: CodeProblem, completion: str, mode: Mode, limits: Limits) -> None:
        self.mode, self.limits = mode, limits
        self.nonce = secrets.token_hex(16)
        self.results = b""
        self.silent = False
        """Whether the checker's pipe is at its end."""
        self.boxes: list[Box] = []
        """The checker's, and in split mode the program's."""
        self.task = {
            "nonce": self.nonce,
            "source": f"{problem.prompt}{completion}",
            "prompt": problem.prompt,
            "setup": problem.setup,
            "test": problem.test,
            "entry_points": problem.entry_points,
        }
        orders, self.orders_fd = os.pipe()
        self.results_fd, results = os.pipe()
        pipes = [orders, results]
        if mode == "split":
            requests, replies = os.pipe(), os.pipe()
            pipes += [replies[0], requests[1], requests[0], replies[1]]
        try:
            box = (sandbox.bwrap, sandbox.interpreter, limits)
            self.boxes.append(Box(*box, role="checker", pipes=pipes[:4]))
            if mode == "split":
                self.boxes.append(Box(*box, role="candidate", pipes=pipes[4:]))
        except BaseException:
            self.close()
            raise
        finally:
            for descriptor in pipes:
                os.close(descriptor)

    @property
    def program(self) -> Box:
        """The box that the program is in."""
        return self.boxes[-1]

    def outcome(self) -> tuple[str, str]:
        """Reason and detail: what the checker says, or what ended the run before it said anything.

        The program's time begins when the boxes are there, however long a busy machine takes to make them.
        """
        deadline = time.monotonic() + START_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self.results_fd, selectors.EVENT_READ)
            for box in self.boxes:
                selector.register(box.output_fd, selectors.EVENT_READ, box)
            while True:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                ready = ready or selector.select(0)  # if this process was stopped meanwhile, what came counts
                heard = False
                for key, _ in ready:
                    if key.data is None:
                        chunk = os.read(self.results_fd, RESULT_BYTES)
                        if not self.results and chunk:
                            self._begin()
                            deadline = time.monotonic() + self.limits.wall_seconds
                        self.results += chunk
                        self.silent, heard = not chunk, True
                    elif not key.data.read_output():
                        selector.unregister(key.fd)
                if heard and (outcome := self._verdict()):
                    return outcome
                if self.program.num_printed > self.limits.output_bytes:
                    return "output", f"over {self.limits.output_bytes} bytes"
                if time.monotonic() >= deadline and not heard:
                    return self._unfinished("time", "too long by the clock")

    def _begin(self) -> None:
        """The boxes are there: give the checker its task, and with it the program."""
        for box in self.boxes:
            box.hold()
        with contextlib.suppress(BrokenPipeError), open(self.orders_fd, "wb") as orders:  # its end will be heard
            self.orders_fd = -1
            orders.write(json.dumps(self.task).encode())

    def _verdict(self) -> tuple[str, str] | None:
        """The checker's verdict: its second line. None while that line is not there yet."""
        lines = self.results.split(b"\n", 2)
        if len(lines) == 3:
            reason, detail = self._believed(lines[1])
            return self._ended(self.program, detail) if reason == "died" else (reason, detail)
        if self.silent or len(self.results) > RESULT_BYTES:
            who = "the checker" if self.mode == "split" else "it"
            return self._unfinished(*self._ended(self.boxes[0], f"{who} ended without a verdict"))
        return None

    def _believed(self, line: bytes) -> tuple[str, str]:
        """The line, if it is the checker's: it has the nonce, and a word that means something here."""
        known = {*REASONS, "died"} | ({"needs_shared", "broken_problem"} if self.mode == "split" else set())
        try:
            said = json.loads(line)
            if said["nonce"] == self.nonce and said["outcome"] in known:
                return said["outcome"], str(said["detail"])
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        return "broken_reply", "a verdict without the nonce of this run"

    def _unfinished(self, reason: str, detail: str) -> tuple[str, str]:
        """An end without a verdict; an error where the program had not been started."""
        if b"\n" in self.results:
            return reason, detail
        self.close()
        said = " ".join(box.tail.decode(errors="replace").strip() for box in self.boxes).strip()
        raise SandboxError(f"the box could not be made: {said or detail}. {INSTALL}")

    @staticmethod
    def _ended(box: Box, detail: str) -> tuple[str, str]:
        """The reason behind the end of a box's program, by its exit code."""
        code = box.exit_code(wait_seconds=1.0)
        if code is None:
            return "exited", f"{detail}; it closed its pipe"
        if code == 128 + signal.SIGXCPU:
            return "time", f"{detail}; over the limit of processor time"
        if code > 128:
            return "killed", f"{detail}; signal {code - 128}"
        return "exited", f"{detail}; exit code {code}"

    def close(self) -> None:
        """End all boxes, and with them every process in them."""
        for box in reversed(self.boxes):  # the checker's last, so that the other does not see it go
            box.close()
        for descriptor in (self.orders_fd, self.results_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self.orders_fd = self.results_fd = -1
