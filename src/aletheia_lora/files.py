"""Whole files or no file: text, JSON and folders that appear complete or not at all.

Comes in: content and a path. Goes out: the path, written beside itself, flushed to disk, then renamed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import OutputError


def check_writable(folder: Path) -> Path:
    """Make ``folder`` if needed and prove that a file can be written into it.

    Raises:
        OutputError: If the folder cannot be made or written; says which and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write into {str(folder)!r}: {error.strerror or error}. Choose another folder or change its rights."
        ) from error
    return folder


def check_output(output: Path) -> None:
    """Check that the folder can be made and holds nothing yet.

    Raises:
        OutputError: If not; says which and what to do.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{str(output)!r} exists and is not an empty folder. Choose another, or remove it.")
    check_writable(output.parent)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write ``content`` to ``path`` so that a crash leaves the old file or the new one, never a part.

    Raises:
        OutputError: If the disk is full or the folder cannot be written; the old file stands.
    """
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        name = ""
    except OSError as error:
        raise OutputError(
            f"cannot write {str(path)!r}: {error.strerror or error}. The old file, if any, stands."
        ) from error
    finally:
        if name:  # Ctrl-C comes this way, too
            with contextlib.suppress(OSError):
                os.unlink(name)
    _sync_folder(path.parent)
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write ``value`` as indented JSON; a NaN or infinity becomes null, which every reader accepts."""
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    return write_bytes(path, (text + "\n").encode())


def json_text(value: Any) -> str:
    """``value`` as one line of JSON; a NaN or infinity becomes null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that takes its name only if the block ends well.

    An exception (Ctrl-C included) removes it, so what stands at ``path`` is always whole. A folder that was
    there before is replaced.

    Raises:
        OutputError: If the folder cannot be made, or the finished one cannot be renamed.
    """
    check_writable(path.parent)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        staging.chmod(0o755)
        if path.exists():
            path.rename(aside / "old")
        os.replace(staging, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"cannot finish {str(path)!r}: {error.strerror or error}. What stood there stands."
        ) from error
    finally:
        if (aside / "old").exists() and not path.exists():
            (aside / "old").rename(path)
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise OutputError(
            f"a file in {str(folder)!r} was written, but the disk did not confirm its name: {error.strerror or error}. "
            "Read it back before relying on it."
        ) from error
    finally:
        os.close(handle)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
