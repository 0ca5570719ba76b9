"""A program for the box: each function tries one way out and returns what it got, or nothing where it was refused.

Comes in: where the canaries are that the self-check has laid out. Goes out: text. Sent to the box as a program like any
other, so it imports the standard library alone. Each attack is bounded by itself, too, should it meet no limit.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from typing import Any

X86_64 = platform.machine() == "x86_64"
CLONE_NEWUSER = 0x10000000


def read_files(path: str) -> str:
    """Read a file outside, or see the folders that hold such files."""
    with contextlib.suppress(OSError), open(path) as stream:
        return stream.read()
    return " ".join({"home", "root", "proc", "sys", "var", "run"} & set(os.listdir("/")))


def write_files(folder: str) -> str:
    """Write somewhere else than the box's own temporary folders, link from there, or change rights."""
    got = []
    for place in (folder, "/", "/usr", "/usr/bin", "/dev", "/etc", sys.prefix, os.path.dirname(sys.executable)):
        path = os.path.join(place, f"written-{os.getpid()}")
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            got.append(place)
            os.unlink(path)
    with contextlib.suppress(OSError):
        link = os.path.join("/tmp", f"link-{os.getpid()}")
        os.link(sys.executable, link)
        got.append("hard link")
        os.unlink(link)
    with contextlib.suppress(OSError):
        os.chmod(sys.executable, os.stat(sys.executable).st_mode)  # succeeds where another mode would, too
        got.append("rights")
    return " ".join(got)


def read_secrets(known: list[str]) -> str:
    """Find variables of another environment, in ours or in that of a process above."""
    got = sorted(set(os.environ) - set(known))
    for pid in ("1", "self", str(os.getppid())):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ") as stream:
            got.append(stream.read())
    return " ".join(got)


def find_descriptors(known: int) -> str:
    """Find a descriptor that was not meant for us: more than output, input and the pipes."""
    found = []
    for number in range(1024):
        with contextlib.suppress(OSError):
            os.fstat(number)
            found.append(number)
    return "" if len(found) <= known else f"descriptors {found}"


def connect(port: int, path: str) -> str:
    """Reach a listener outside, by every family of sockets, or have a name looked up."""
    got = []
    targets: list[tuple[str, int, int, Any]] = [
        ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port)),
        ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", port)),
        ("unix", socket.AF_UNIX, socket.SOCK_STREAM, path),
        ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, "\0" + path),
        ("netlink", socket.AF_NETLINK, socket.SOCK_RAW, (0, 0)),
    ]
    for name, family, kind, address in targets:
        with contextlib.suppress(OSError), socket.socket(family, kind) as link:
            link.settimeout(1)
            if name == "netlink":
                link.bind(address)
            else:
                link.connect(address)
                link.send(b"out")
            got.append(name)
    with contextlib.suppress(OSError):
        got.append(str(socket.getaddrinfo("localhost.localdomain", 80)))
    return " ".join(got)


def call_kernel(_: int) -> str:
    """Make the system calls that lead to privileges, to other processes, or to memory that nothing counts."""
    libc = ctypes.CDLL(None, use_errno=True)
    calls: dict[str, tuple[Any, ...]] = {
        "user namespace": ((272, 97), CLONE_NEWUSER),
        "cloned namespace": ((56, 220), CLONE_NEWUSER | 17, 0, 0, 0, 0),
        "mount": ((165, 40), b"none", b"/tmp", b"tmpfs", 0, 0),
        "ptrace": ((101, 117), 16, os.getppid(), 0, 0),
        "other memory": ((310, 270), os.getppid(), 0, 0, 0, 0, 0),
        "keyring": ((250, 219), 0, -3, 0),  # the id of the session's keyring
        "shared memory": ((29, 194), 0, 4096, 0o1600),
        "memory file": ((319, 279), b"name", 0),
        "io_uring": ((425, 425), 1, 0),
        "bpf": ((321, 280), 0, 0, 0),
        "root": ((105, 146), 0),
    }
    got = []
    for name, (numbers, *arguments) in calls.items():
        answer = libc.syscall(numbers[0] if X86_64 else numbers[1], *arguments)
        if answer == 0 and name == "cloned namespace":
            os._exit(0)  # the child
        if answer != -1 and name == "shared memory":
            libc.syscall(31 if X86_64 else 195, answer, 0, 0)  # remove it again
        if answer != -1 or ctypes.get_errno() not in (errno.EPERM, errno.EINVAL, errno.ENOSYS):
            got.append(name)
    return " ".join(got)


def raise_limits(limits: dict[str, int]) -> str:
    """Have no limit, or lift it."""
    got = []
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        soft, hard = resource.getrlimit(kind)
        if soft == resource.RLIM_INFINITY or soft > most or hard > most + 1:
            got.append(name)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (hard + 1, hard + 1))
            got.append(f"{name} raised")
    return " ".join(got)


# --- bombs: each returns how far it came ------------------------------------------------------------------------


def fork(most: int) -> int:
    """Children at one time, up to ``most``; they sleep and end by themselves."""
    children = []
    with contextlib.suppress(OSError):
        for _ in range(most):
            pid = os.fork()
            if pid == 0:
                time.sleep(2)
                os._exit(0)
            children.append(pid)
    return len(children)


def allocate(most: int) -> int:
    """Bytes of memory held at one time, up to ``most``."""
    held = []
    step = 2**24
    with contextlib.suppress(MemoryError):
        for _ in range(most // step):
            held.append(bytearray(step))
    return len(held) * step


def fill(folder: str, most: int) -> int:
    """Bytes written into files of a folder at one time, up to ``most``; they are removed again."""
    written, paths = 0, []
    for number in range(64):
        path = f"{folder}/fill-{os.getpid()}-{number}"
        with contextlib.suppress(OSError), open(path, "wb", buffering=0) as stream:
            paths.append(path)
            for _ in range(16):
                if written < most:
                    written += stream.write(bytes(2**20))
    for path in paths:
        os.unlink(path)
    return written


def open_files(most: int) -> int:
    """Files open at one time, up to ``most``."""
    held = []
    with contextlib.suppress(OSError):
        for _ in range(most):
            held.append(os.open("/dev/null", os.O_RDONLY))
    for descriptor in held:
        os.close(descriptor)
    return len(held)


def flood(most: int) -> int:
    """Bytes printed, up to ``most``."""
    return sum(os.write(1, bytes(2**16)) for _ in range(most // 2**16))


def loop(seconds: float) -> bool:
    """Run for so long, without a look at the clock by anybody else."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return True


def stay(marker: str) -> bool:
    """Leave a process behind that has no parent, no session and no open file in common with us."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            program = "import sys, time; time.sleep(20)"
            subprocess.Popen([sys.executable, "-S", "-c", program, marker], close_fds=True, start_new_session=True)
        os._exit(0)
    time.sleep(0.2)
    return True
