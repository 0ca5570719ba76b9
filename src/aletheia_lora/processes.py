"""Several processes that work together: who this one is, whether all hold the same, and one error for all of them.

Comes in: an initialised ``torch.distributed`` group, or none, which counts as a group of one. Goes out: plain values.
Launchers (``torchrun``, ``accelerate launch``) start the processes; every function here but the first three has to be
called by all of them, in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import AletheiaError, ProcessError

T = TypeVar("T")


def rank() -> int:
    """Number of this process, from 0; 0 without a group."""
    return dist.get_rank() if _in_a_group() else 0


def world_size() -> int:
    """How many processes work together; 1 without a group."""
    return dist.get_world_size() if _in_a_group() else 1


def is_main() -> bool:
    """True on the one process that writes files and prints."""
    return rank() == 0


def gather(work: Callable[[], T], doing: str) -> list[T]:
    """Do the work on every process; what each gave (a picklable value), in the order of ranks, on all of them.

    Args:
        work: Called once. Must not wait for another process.
        doing: What it does, for the message, e.g. ``probing``.

    Raises:
        AletheiaError: Where the work failed, its own error, whatever it is. On the other processes the same error of
            ours with the process named, or a ``ProcessError`` that quotes a foreign one. So no process waits forever.
    """
    if world_size() == 1:
        return [work()]
    value, failure = None, None
    try:
        value = work()
    except Exception as error:
        failure = error
    kind = type(failure) if isinstance(failure, AletheiaError) else ProcessError
    told = None if failure is None else (kind, str(failure) if kind is type(failure) else repr(failure))
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, (value, told))
    if failure is not None:
        raise failure
    for number, (_, broken) in enumerate(found):
        if broken is not None:
            kind, text = broken
            raise kind(f"process {number} of {len(found)} failed while {doing}: {text}")
    return [value for value, _ in found]


def together(work: Callable[[], T], doing: str) -> T:
    """Do the work on every process and go on only if it went well on all; this process's own value.

    Raises:
        AletheiaError: As :func:`gather`.
    """
    kept: list[T] = []
    gather(lambda: kept.append(work()), doing)
    return kept[0]


def on_main(work: Callable[[], T], doing: str) -> T:
    """Do the work on process 0 alone; what it gave, on all of them.

    Raises:
        AletheiaError: As :func:`gather`.
    """
    return gather(lambda: work() if is_main() else None, doing)[0]  # type: ignore[return-value]


def check_same(things: Callable[[], Mapping[str, object]], hint: str) -> None:
    """Check that all processes hold the same things, given by name; nothing is computed without a group.

    Raises:
        ProcessError: On all of them, naming what differs and between which; ``hint`` says what to do.
    """
    if world_size() == 1:
        return
    found = gather(things, "comparing what the processes hold")
    for number, held in enumerate(found):
        for name, value in held.items():
            if value != found[0].get(name):
                raise ProcessError(
                    f"the processes do not hold the same {name}: process 0 has {found[0].get(name)}, process {number} "
                    f"has {value}. {hint}"
                )


def on_any(flag: Tensor | bool) -> bool:
    """True on all processes if the flag is true on one; cheap enough for every step."""
    if world_size() == 1:
        return bool(flag)
    device = flag.device if isinstance(flag, Tensor) else _group_device()
    found = torch.as_tensor(flag).to(device, torch.int32).reshape(())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def digest(tensors: Iterable[tuple[str, Tensor]], *, most: int | None = None) -> str:
    """Sixteen hex digits of names, shapes and values; of ``most`` evenly spread values of each tensor, if given."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().flatten()
            if most is not None:
                flat = flat[:: max(flat.numel() // most, 1)]
            found.update(flat.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def is_sharded(parameter: Tensor) -> bool:
    """True for a weight of which every process holds a part: under FSDP2, or under DeepSpeed's ZeRO-3."""
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


@contextlib.contextmanager
def joined(*, cpu: bool) -> Iterator[None]:
    """Join the group that a launcher prepared, and leave it in the end; nothing happens where none did.

    Args:
        cpu: True if work runs on the CPU: processes then talk by gloo, otherwise by the device's own library.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _in_a_group():
        yield
        return
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    try:
        yield
    finally:
        state.destroy_process_group()


def _in_a_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _group_device() -> torch.device:
    """Where the group's library wants its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
