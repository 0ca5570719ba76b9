"""Hidden states of rows <-> a folder on disk that several processes may fill at once.

A process appends states to a data file of its own and then, once the bytes are on disk, one record per row to the
index beside it. Nobody writes to another's files, so there is no lock; a record is never there before its states, so
an interrupted write is never taken for whole. Every record carries a checksum of itself and of its states, the latter
verified at the first read. States are read with ``pread``, one contiguous read per row: a mapped file that somebody
truncates would end the process with SIGBUS, a short read is an answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import OutputError
from ..files import check_writable

MAGIC = b"aletheia-prefix1"
RECORD = struct.Struct("<16sQIIBB16sI")
"""Row id, offset in the data file, tokens, width, dtype on disk, dtype in the model, checksums of states and record."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FREE_BYTES = 1 << 30
"""Disk space that the cache leaves to others."""
FLUSH_SECONDS = 10.0
"""Longest time that states wait for their records; a kill loses no more than these."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the states of one row lie."""

    shard: Shard
    offset: int
    num_tokens: int
    width: int
    dtype: torch.dtype
    """On disk."""
    states_dtype: torch.dtype
    """In the model."""
    checksum: bytes

    @property
    def num_bytes(self) -> int:
        """Length in the data file."""
        return self.num_tokens * self.width * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class Shard:
    """One process's data file, and the index beside it."""

    data: Path
    descriptor: int

    @property
    def index(self) -> Path:
        """The file of records."""
        return self.data.with_suffix(".index")


@dataclass(slots=True)
class StoreCounts:
    """What was read and written, in bytes and seconds."""

    bytes_read: int = 0
    bytes_written: int = 0
    read_seconds: float = 0.0
    write_seconds: float = 0.0
    damaged: list[str] = field(default_factory=list)
    """Files or rows that were refused, each with the reason."""
    full: str | None = None
    """Why no more rows were kept from some point on."""


class PrefixStore:
    """States by row id. Not for threads; any number of processes."""

    def __init__(
        self, folder: Path, *, max_bytes: int | None = None, keep: bool = True, say: Callable[[str], None]
    ) -> None:
        """Open a folder and read every index in it.

        Args:
            folder: Made if needed.
            max_bytes: Most bytes of states that the folder may hold; None for as many as the disk takes.
            keep: True to force states and records to disk, for later runs; False for a folder that will be removed.
            say: Called with a line when something is refused.

        Raises:
            OutputError: If the folder cannot be written.
        """
        self.folder = check_writable(folder)
        self.counts = StoreCounts()
        self._max_bytes, self._keep, self._say = max_bytes, keep, say
        self._entries: dict[bytes, Entry] = {}
        self._verified: set[bytes] = set()
        self._shards: list[Shard] = []
        self._own: tuple[Shard, BinaryIO, BinaryIO] | None = None
        self._end = 0
        self._waiting: list[bytes] = []
        self._flushed = time.monotonic()
        self._total_bytes = 0
        for data in sorted(folder.glob("*.states")):
            self._open(data)

    def __contains__(self, row: bytes) -> bool:
        return row in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def total_bytes(self) -> int:
        """Bytes of states in the folder, as far as this process knows."""
        return self._total_bytes

    def read(self, rows: Sequence[bytes], *, pin: bool = False) -> tuple[Tensor, torch.dtype] | None:
        """The states of these rows one after the other, (tokens, width), on the CPU, and their dtype in the model.

        Args:
            rows: Row ids, repeated or not.
            pin: Read into page-locked memory, from which a GPU can fetch while the CPU goes on.

        Returns:
            None if a row is not there, or turns out damaged: it is forgotten, to be computed again.
        """
        if any(row not in self._entries for row in rows):
            return None
        started = time.perf_counter()
        entries = [self._entries[row] for row in rows]
        first = entries[0]
        if any((e.width, e.dtype, e.states_dtype) != (first.width, first.dtype, first.states_dtype) for e in entries):
            return None
        packed = torch.empty(sum(e.num_tokens for e in entries), first.width, dtype=first.dtype, pin_memory=pin)
        target = _bytes_of(packed)
        start = 0
        for row, entry in zip(rows, entries, strict=True):
            part = target[start : start + entry.num_bytes]
            if not self._filled(row, entry, part):
                return None
            start += entry.num_bytes
        self.counts.bytes_read += start
        self.counts.read_seconds += time.perf_counter() - started
        return packed, first.states_dtype

    def write(self, row: bytes, states: Tensor, states_dtype: torch.dtype) -> bool:
        """Keep the states of one row, (tokens, width), contiguous and on the CPU; False if there is no room.

        Args:
            row: Its id.
            states: In the dtype that they shall have on disk.
            states_dtype: Their dtype in the model.
        """
        started = time.perf_counter()
        content = _bytes_of(states.contiguous())
        if self.counts.full is None and self._has_room(len(content)):
            try:
                self._append(row, content, states, states_dtype)
            except OSError as error:
                self._stop(f"cannot write into the prefix cache: {error.strerror or error}")
        self.counts.write_seconds += time.perf_counter() - started
        return self.counts.full is None

    def flush(self) -> None:
        """Publish the records of all states written so far, after forcing the states to disk."""
        self._flushed = time.monotonic()
        if self._own is None or not self._waiting:
            return
        _, data, index = self._own
        try:
            if self._keep:
                os.fsync(data.fileno())
            index.write(b"".join(self._waiting))
            self._waiting.clear()
            if self._keep:
                os.fsync(index.fileno())
        except OSError as error:
            self._stop(f"cannot write into the prefix cache: {error.strerror or error}")

    def close(self) -> None:
        """Publish what is there and close all files."""
        self.flush()
        if self._own is not None:
            for stream in self._own[1:]:
                stream.close()
        for shard in self._shards:
            os.close(shard.descriptor)
        self._own, self._shards, self._entries = None, [], {}

    # --- reading ----------------------------------------------------------------------------------------------------

    def _open(self, data: Path) -> None:
        """Read the index beside a data file; a torn end is somebody's unfinished write, and is left alone.

        The index first: what it names was in the data file by then, so of a file that grows none is missed.
        """
        try:
            shard = Shard(data, os.open(data, os.O_RDONLY))
            self._shards.append(shard)
            content = shard.index.read_bytes()
        except FileNotFoundError:  # another process has removed it, or is about to write it
            return
        size = os.fstat(shard.descriptor).st_size
        if content and not content.startswith(MAGIC):
            self._refuse(shard, "its index is not one of this format")
            return
        found = dict(_records(content, shard))
        if any(entry.offset + entry.num_bytes > size for entry in found.values()):
            self._refuse(shard, "states that its index names are missing")
            return
        self._entries.update(found)
        self._total_bytes += size

    def _filled(self, row: bytes, entry: Entry, target: memoryview) -> bool:
        """Read one row into ``target``; at the first time also verify it."""
        got = os.preadv(entry.shard.descriptor, [target], entry.offset)
        if got == len(target) and (row in self._verified or _checksum(row, target) == entry.checksum):
            self._verified.add(row)
            return True
        self._refuse(entry.shard, "a row's states are not what was written")
        return False

    def _refuse(self, shard: Shard, reason: str) -> None:
        """Forget a damaged file and remove it, so that nobody reads it again; its rows will be computed anew."""
        self.counts.damaged.append(f"{shard.data.name}: {reason}")
        self._say(f"prefix cache: {shard.data.name} is damaged ({reason}); it was removed, its rows are computed again")
        self._entries = {row: entry for row, entry in self._entries.items() if entry.shard is not shard}
        if self._own is not None and self._own[0] is shard:
            for stream in self._own[1:]:
                stream.close()
            self._own, self._waiting = None, []
        for file in (shard.index, shard.data):
            with contextlib.suppress(OSError):
                file.unlink()

    # --- writing ----------------------------------------------------------------------------------------------------

    def _append(self, row: bytes, content: memoryview, states: Tensor, states_dtype: torch.dtype) -> None:
        if self._own is None:
            self._own = self._new_shard()
            self._end = 0
        shard, data, _ = self._own
        checksum = _checksum(row, content)
        left = content
        while left:
            left = left[data.write(left) :]
        entry = Entry(shard, self._end, states.shape[0], states.shape[1], states.dtype, states_dtype, checksum)
        self._end += len(content)
        self._total_bytes += len(content)
        self.counts.bytes_written += len(content)
        self._entries[row] = entry
        self._verified.discard(row)
        self._waiting.append(_record(row, entry))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _new_shard(self) -> tuple[Shard, BinaryIO, BinaryIO]:
        path = self.folder / f"{uuid.uuid4().hex}.states"
        data = path.open("xb", buffering=0)
        index = path.with_suffix(".index").open("xb", buffering=0)
        index.write(MAGIC)
        shard = Shard(path, os.open(path, os.O_RDONLY))
        self._shards.append(shard)
        return shard, data, index

    def _has_room(self, num_bytes: int) -> bool:
        if self._max_bytes is not None and self._total_bytes + num_bytes > self._max_bytes:
            self._stop(f"the prefix cache has reached its limit of {in_words(self._max_bytes)}")
        elif shutil.disk_usage(self.folder).free - num_bytes < FREE_BYTES:
            self._stop(f"the disk of the prefix cache has less than {in_words(FREE_BYTES)} left")
        return self.counts.full is None

    def _stop(self, reason: str) -> None:
        self.counts.full = reason
        self._say(f"{reason}; rows kept so far are used, others are computed each time")


def check_room(folder: Path, num_bytes: int, max_bytes: int | None, *, held: int = 0) -> None:
    """Refuse a cache that will not fit, before anything is computed.

    Args:
        folder: Where it will be; need not exist yet.
        num_bytes: Bytes still to be written; if there are none, nothing is refused.
        max_bytes: The caller's limit on all that the folder holds, if any.
        held: Bytes that it holds already.

    Raises:
        OutputError: If ``num_bytes`` would take the folder over the limit, or leave the disk less than ``FREE_BYTES``.
    """
    if num_bytes == 0:
        return
    advice = "Store bfloat16 (prefix_cache_dtype), train on fewer or shorter rows, or name another folder."
    if max_bytes is not None and held + num_bytes > max_bytes:
        besides = f" besides the {in_words(held)} that it holds" if held else ""
        raise OutputError(
            f"the prefix cache needs {in_words(num_bytes)}{besides}, the limit is {in_words(max_bytes)}. {advice} "
            "Or raise the limit."
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free - FREE_BYTES:
        raise OutputError(
            f"the prefix cache needs {in_words(num_bytes)} and leaves {in_words(FREE_BYTES)} to others; the disk has "
            f"{in_words(free)} left. {advice}"
        )


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, any dtype."""
    memory: Any = tensor.view(torch.uint8).numpy()
    return memoryview(memory).cast("B")


def in_words(num_bytes: int) -> str:
    """Bytes for people, e.g. ``1.2 GB``."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def _records(content: bytes, shard: Shard) -> Iterator[tuple[bytes, Entry]]:
    """The whole records of an index, up to the first that is torn."""
    for start in range(len(MAGIC), len(content) - RECORD.size + 1, RECORD.size):
        packed = content[start : start + RECORD.size]
        row, offset, num_tokens, width, dtype, states_dtype, checksum, own = RECORD.unpack(packed)
        if own != zlib.crc32(packed[:-4]) or max(dtype, states_dtype) >= len(DTYPES):
            return
        yield row, Entry(shard, offset, num_tokens, width, DTYPES[dtype], DTYPES[states_dtype], checksum)


def _record(row: bytes, entry: Entry) -> bytes:
    codes = DTYPES.index(entry.dtype), DTYPES.index(entry.states_dtype)
    packed = RECORD.pack(row, entry.offset, entry.num_tokens, entry.width, *codes, entry.checksum, 0)[:-4]
    return packed + struct.pack("<I", zlib.crc32(packed))


def _checksum(row: bytes, content: memoryview) -> bytes:
    """Of the states and of whose they are: states under another row's id are damage, too."""
    return hashlib.blake2b(content, digest_size=16, key=row).digest()
