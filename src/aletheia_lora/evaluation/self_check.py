"""A sandbox -> proof that it holds here and now: programs that must pass or fail, and attacks that must get nothing.

Comes in: a function that runs one program. Goes out: each attack and how it ended, or an error that names what got
through. A missing, broken or false bubblewrap, a kernel without user namespaces, and a filter that does not filter all
end in that error.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..errors import SandboxError
from .box import ENVIRONMENT, Limits, process_limits
from .code_problem import CodeProblem

ATTACKS = Path(__file__).with_name("attacks.py")
DEEPEST_FOLDER = 80
"""Bytes of a path below which a socket still gets a name: a system's names of sockets end at 108."""


class Outcome(Protocol):
    """The part of a verdict that is read here."""

    @property
    def passed(self) -> bool:
        """Whether the test ran to its end."""

    @property
    def reason(self) -> str:
        """One word for how it ended."""

    @property
    def detail(self) -> str:
        """What is behind the reason."""


RunProgram = Callable[[CodeProblem, str, Limits], Outcome]
"""Runs one program in the sandbox that is checked."""


@dataclass(frozen=True, slots=True)
class Canaries:
    """Things outside that no program in a box may reach; each could be reached by its user without the box."""

    folder: str
    file: str
    socket_path: str
    port: int
    marker: str
    """An argument of a process that is left behind."""
    listeners: tuple[socket.socket, ...]

    def touched(self) -> str:
        """What was done to them, as seen from outside; empty where nothing was."""
        found = [name for name in os.listdir(self.folder) if name not in self._own()]
        reached, _, _ = select.select(self.listeners, [], [], 0)
        found += [f"a byte or a connection came to {listener.getsockname()!r}" for listener in reached]
        return ", ".join([*found, *processes_with(self.marker)])

    def _own(self) -> set[str]:
        return {os.path.basename(self.file), os.path.basename(self.socket_path)}


@contextlib.contextmanager
def laid_out() -> Iterator[Canaries]:
    """Canaries in a folder of their own; gone afterwards."""
    deep = len(os.fsencode(tempfile.gettempdir())) > DEEPEST_FOLDER
    place = tempfile.TemporaryDirectory(prefix="canaries-", dir="/tmp" if deep else None)
    with place as folder, contextlib.ExitStack() as stack:
        os.chmod(folder, 0o777)  # the box is to stop the attack, not the folder's rights
        file, path = os.path.join(folder, "secret"), os.path.join(folder, "socket")
        Path(file).write_text("a secret of somebody else")
        os.chmod(file, 0o666)
        tcp, udp, unix, abstract = (
            stack.enter_context(socket.socket(family, kind))
            for family, kind in (
                (socket.AF_INET, socket.SOCK_STREAM),
                (socket.AF_INET, socket.SOCK_DGRAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
            )
        )
        tcp.bind(("127.0.0.1", 0))
        udp.bind(tcp.getsockname())
        unix.bind(path)
        os.chmod(path, 0o777)
        abstract.bind("\0" + path)
        for listener in (tcp, unix, abstract):
            listener.listen()
        for listener in (tcp, udp, unix, abstract):
            listener.setblocking(False)
        yield Canaries(folder, file, path, tcp.getsockname()[1], f"canary-{folder}", (tcp, udp, unix, abstract))


def processes_with(argument: str) -> list[str]:
    """The processes of this machine that were started with this argument."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if argument.encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(f"process {process.name}")
    return found


@dataclass(frozen=True, slots=True)
class Attack:
    """A call of a function of the attacking program, what it may return, and which ends are as good as that."""

    function: str
    arguments: tuple[Any, ...]
    held: str
    """The box held where this is true of ``got``, what the function returned."""
    end: str = ""
    """The reason with which the box is to end the program, where it is to end it."""

    def problem(self) -> CodeProblem:
        """The attack as a problem: its test passes where the box held."""
        test = f"got = {self.function}(*{self.arguments!r})\nassert {self.held}, got"
        return CodeProblem(task_id=self.function, prompt="", test=test, entry_points=(self.function,))


def attacks(canaries: Canaries, limits: Limits) -> dict[str, Attack]:
    """The attacks by name; those at the end use up what a box has."""
    nothing = "not got"
    memory = limits.memory_bytes
    return {
        "files outside are read": Attack("read_files", (canaries.file,), nothing),
        "files outside are written": Attack("write_files", (canaries.folder,), nothing),
        "the environment is read": Attack("read_secrets", ([*ENVIRONMENT, "PWD"],), nothing),
        "descriptors are inherited": Attack("find_descriptors", (5,), nothing),
        "the network is reached": Attack("connect", (canaries.port, canaries.socket_path), nothing),
        "the kernel gives rights": Attack("call_kernel", (0,), nothing),
        "limits are lifted": Attack("raise_limits", (process_limits(limits),), nothing),
        "processes": Attack("fork", (4 * limits.num_processes,), f"got < {limits.num_processes}"),
        "memory": Attack("allocate", (2 * memory,), f"got < {memory}"),
        "files": Attack("fill", ("/tmp", 2 * limits.tmp_bytes), f"got <= {limits.tmp_bytes}"),
        "shared memory": Attack("fill", ("/dev/shm", 2 * limits.shm_bytes), f"got <= {limits.shm_bytes}"),
        "open files": Attack("open_files", (2 * limits.num_open_files,), f"got < {limits.num_open_files}"),
        "output": Attack("flood", (4 * limits.output_bytes,), "False", end="output"),
        "processor time": Attack("loop", (limits.cpu_seconds + 2.0,), "False", end="time"),
        "a process is left behind": Attack("stay", (canaries.marker,), "got"),
    }


VERDICTS = {
    "a right program passes": ("    return x + 1", "passed"),
    "a wrong program fails": ("    return x", "wrong"),
    "an exit with code 0 fails": ("    import os\n    os._exit(0)", "exited"),
}
PROBLEM = CodeProblem(
    task_id="successor",
    prompt='def successor(x):\n    """The next number."""\n',
    test="def check(candidate):\n    assert candidate(1) == 2",
    entry_points=("successor",),
    needs_shared="",
)
SMALL = {"cpu_seconds": 1, "memory_bytes": 2**28, "tmp_bytes": 2**23, "shm_bytes": 2**22, "output_bytes": 2**20}


def attack(run: RunProgram, limits: Limits) -> dict[str, str]:
    """Run the programs that must pass or fail, then all attacks, with limits small enough to be met quickly.

    Raises:
        SandboxError: If one of them got through or ended otherwise than it has to; nothing else may be run then.
    """
    limits = replace(limits, **SMALL)
    ended = {name: run(PROBLEM, program, limits).reason for name, (program, _) in VERDICTS.items()}
    missed = [f"{name} (it ended as {ended[name]})" for name, (_, due) in VERDICTS.items() if ended[name] != due]
    program = ATTACKS.read_text(encoding="utf-8")
    with laid_out() as canaries, ThreadPoolExecutor(4) as pool:
        tried = attacks(canaries, limits)
        outcomes = pool.map(lambda one: run(one.problem(), program, limits), tried.values())
        for (name, one), outcome in zip(tried.items(), outcomes, strict=True):
            ended[name] = f"ended: {outcome.reason}" if one.end else "held"
            if not (outcome.reason == one.end if one.end else outcome.passed):
                missed.append(f"{name} ({outcome.reason}: {outcome.detail})")
        if touched := canaries.touched():
            missed.append(f"something outside was touched ({touched})")
    if missed:
        raise SandboxError(f"the sandbox does not hold on this machine: {'; '.join(missed)}. No program was run.")
    return ended
