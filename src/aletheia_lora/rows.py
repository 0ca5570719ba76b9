"""A file, a hub id or plain dicts -> rows: a list of dicts, one per example.

Comes in: wherever the user keeps the data. Goes out: rows with named columns, nothing tokenized. What cannot be read
is an error with the place in it; rows are counted from 1, bytes from 0.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError


def load_rows(source: Any, *, split: str | None = None) -> list[dict[str, Any]]:
    """Read rows from wherever they are.

    Args:
        source: A .jsonl, .json, .parquet or .csv file; a .txt file, whose lines that are not blank become rows with the
            column ``text``; a hub id (``name`` or ``name:config``); a
            ``datasets.Dataset``; or a sequence of dicts. Cells of a csv file are text.
        split: Split of a hub data set, ``train`` if left out. Files and sequences have none.

    Returns:
        The rows as dicts, in order, at least one.

    Raises:
        DataError: If the source is missing, empty or broken; says where, and what was expected.
    """
    rows: Iterable[Any]
    if isinstance(source, str | Path):
        name, path = str(source), Path(source).expanduser()
        is_path = isinstance(source, Path) or path.suffix.lower() in READERS or name.startswith(("/", "./", "../", "~"))
        if path.is_file() or (is_path and not path.is_dir()):
            rows, name = _read_file(path), repr(str(path))
        else:
            rows, name = _load_hub(name, split or "train"), repr(name)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable) or not hasattr(source, "__len__"):
        found = f"got {type(source).__name__}, expected a file, a hub id, a datasets.Dataset or a list of dicts"
        raise DataError(f"{found}. Take one split, or some rows, of it.")
    else:
        rows, name = source, f"the {type(source).__name__}"
    checked: list[dict[str, Any]] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} of {name} is {shown(row)}, expected an object with named columns.")
        checked.append(dict(row))
    if not checked:
        raise DataError(f"{name} has no rows, expected at least one. Check the file, or the split.")
    return checked


def _read_file(path: Path) -> list[Any]:
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{str(path)!r} is empty (0 bytes), expected rows. Check how it was written.")
        if path.suffix.lower() not in READERS:
            raise DataError(
                f"{str(path)!r} is not one of {', '.join(READERS)}. Convert it, or name it by what it holds."
            )
        return list(READERS[path.suffix.lower()](path))
    except OSError as error:
        advice = "Check the path; a hub id is written without suffix, as owner/name."
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}. {advice}") from error


def _decoded(content: bytes, path: Path, offset: int = 0) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{content[error.start]:02x} at byte offset {offset + error.start}"
        raise DataError(f"{str(path)!r} is not UTF-8: {where}. Save the file as UTF-8.") from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON: {error}. Correct or remove it.") from error


def _read_jsonl(path: Path) -> Iterator[Any]:
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            text = _decoded(line, path, offset)
            offset += len(line)
            if text.strip():
                row = _parsed(text.strip(), f"row {number} of {str(path)!r}")
                if not isinstance(row, dict):  # said here, because blank lines count too
                    raise DataError(
                        f"row {number} of {str(path)!r} is {shown(row)}, expected an object with named columns."
                    )
                yield row


def _read_text(path: Path) -> Iterator[dict[str, str]]:
    for line in _decoded(path.read_bytes(), path).split("\n"):
        if line.strip():
            yield {"text": line.strip()}


def _read_json(path: Path) -> list[Any]:
    rows = _parsed(_decoded(path.read_bytes(), path), repr(str(path)))
    if isinstance(rows, list):
        return rows
    keys = f" with the keys {listed(rows)}" if isinstance(rows, dict) else ""
    advice = "Save the list alone, or one object a line as .jsonl."
    raise DataError(f"{str(path)!r} holds one {type(rows).__name__}{keys}, expected a list of objects. {advice}")


def _read_csv(path: Path) -> Iterator[dict[str, str]]:
    reader = csv.reader(io.StringIO(_decoded(path.read_bytes(), path), newline=""), strict=True)
    try:
        header = next(reader, [])
        for number, cells in enumerate((cells for cells in reader if cells), 1):
            if len(cells) != len(header):
                expected = f"expected {len(header)} as in the header"
                raise DataError(
                    f"row {number} of {str(path)!r} has {len(cells)} cells, {expected}. Quote cells with commas."
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        advice = "Correct it, or save the rows as .jsonl."
        raise DataError(f"{str(path)!r} is not valid CSV near line {reader.line_num}: {error}. {advice}") from error


def _read_parquet(path: Path) -> list[Any]:
    from pyarrow import parquet  # slow to import, and needed here only

    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's own errors are subclasses of these
        raise DataError(f"{str(path)!r} is not a readable Parquet file: {error}. Write it again.") from error
    return rows


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".txt": _read_text,
}


def _load_hub(name: str, split: str) -> Iterable[Any]:
    import datasets  # slow to import, and needed here only

    path, _, config = name.partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(path, config or None, split=split)
    except Exception as error:  # the hub client raises from many libraries
        advice = f"Check name, config (as name:config) and split, or give a local file ({', '.join(READERS)})."
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot load split {split!r} of {name!r}: {reason}. {advice}") from error
    return rows


def shown(value: Any) -> str:
    """Type and beginning of a value, in plain ASCII so that no terminal code gets out."""
    text = ascii(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def listed(names: Iterable[Any]) -> str:
    """Names in quotes, with commas."""
    return ", ".join(repr(str(name)) for name in names) or "none"
