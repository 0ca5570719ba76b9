"""What cells have in common: the model that a content names, and files that the first one that needs them makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..run_config import configuration
from ..runs import Say, load_model
from .methods import Method, is_packed
from .records import locked
from .spec import canonical


def model_of(content: Mapping[str, Any], say: Say) -> tuple[Any, Any]:
    """The base model and tokenizer of a cell, packed as its method says.

    Raises:
        UnsupportedModelError: If it cannot be loaded.
        ConfigError: If its device or quantization cannot be had.
    """
    given = {key: content["model"][key] for key in ("model", "dtype", "device")}
    if is_packed(content["method"]):
        given["quantization"] = content["method"]["quantization"]
    return load_model(configuration(given), say)


def method_of(content: Mapping[str, Any]) -> Method:
    """The method of a cell."""
    return Method(**content["method"])


def base_identity(content: Mapping[str, Any]) -> dict[str, Any]:
    """What names the base model of a cell: cells with the same may share what is measured on it."""
    packed = {"quantization": content["method"]["quantization"]} if is_packed(content["method"]) else {}
    return {"model": content["model"], "versions": content["versions"], **packed}


def shared_file(folder: Path, name: str, identity: Mapping[str, Any], write: Callable[[Path], object]) -> Path:
    """A file, or folder, that cells share; written here if it is not there yet. The others wait meanwhile.

    Args:
        folder: Of what cells share.
        name: What it is, and its suffix.
        identity: All that its content depends on, as plain JSON types.
        write: Called with its path; must make it whole or not at all.
    """
    stem, dot, suffix = name.partition(".")
    file = folder / f"{stem}-{sha256(canonical(identity).encode()).hexdigest()[:16]}{dot}{suffix}"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock"), seconds=math.inf):
            if not file.exists():
                write(file)
    return file
