"""An adapter folder and a model -> a twin of the model that carries the adapter, proven to be the one in the folder.

Comes in: a loaded base model and folders that PEFT wrote. Goes out: digests, and twins over the base model's weights.
An adapter of another base model is refused: it would load without a word where shapes agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..adapter import shared_copy
from ..adapter_options import REWRITE_WEIGHTS
from ..anatomy import anatomy
from ..errors import AdapterError

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "record.json"
NOT_REPEATED = ("pissa_niter", "corda", "lora_ga", "loftq")
"""Starts that rewrite weights by a random draw, or by data that are not in the folder."""


def adapter_digest(folder: Path) -> str:
    """sha256 over the bytes of an adapter's configuration and weights.

    Raises:
        AdapterError: If the folder has no safetensors adapter.
    """
    _config(folder)
    total = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        total.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()


def labels(folders: Iterable[Path]) -> dict[str, Path]:
    """A name for every adapter: its folder's, with as much of the path as tells them apart.

    Raises:
        AdapterError: If a folder is given twice.
    """
    whole = [folder.resolve() for folder in folders]
    named: dict[str, Path] = {}
    for folder in whole:
        if whole.count(folder) > 1:
            raise AdapterError(f"adapter {str(folder)!r} is given twice. Name each adapter once.")
        depth = 1
        while any(other.parts[-depth:] == folder.parts[-depth:] for other in whole if other != folder):
            depth += 1
        name = "/".join(folder.parts[-depth:])
        named[f"{name} (adapter)" if name == "base" else name] = folder
    return named


def check_base(folder: Path, model: Any, *, model_names: Iterable[str], any_base: bool = False) -> None:
    """Check that an adapter was made for this base model, as far as its folder says.

    Args:
        folder: The adapter's folder.
        model: The loaded base model, without adapters.
        model_names: Every name by which the base may have been recorded.
        any_base: Take an adapter whose base had another name; its shape must fit all the same.

    Raises:
        AdapterError: If the recorded base has another name or another fingerprint.
    """
    config = _config(folder)
    recorded = config.get("base_model_name_or_path")
    names = {_plain(name) for name in model_names if name}
    if recorded and not any_base and _plain(recorded) not in names:
        raise AdapterError(
            f"adapter {folder.name!r} was made for {_last(recorded)!r}, but the model is {_shown(model_names)}. Give "
            "its own base model, or any_base if this is the same model under another name."
        )
    record = folder / RECORD
    fingerprint = json.loads(record.read_text(encoding="utf-8")).get("fingerprint") if record.is_file() else None
    if fingerprint is not None and fingerprint != (found := anatomy(model).fingerprint):
        raise AdapterError(
            f"adapter {folder.name!r} was made for a model with the fingerprint {fingerprint}, but this one has "
            f"{found}: other layers or shapes. Give its own base model."
        )


@contextlib.contextmanager
def with_adapter(model: Any, folder: Path) -> Iterator[Any]:
    """While open, a twin of the model over the same weights that carries the adapter, in eval mode.

    The model itself is not touched; the ``requires_grad`` flags of its weights are put back. Where the adapter's start
    rewrites weights (PiSSA, OLoRA) the twin owns those of the adapted modules.

    Raises:
        AdapterError: If the adapter does not fit the model, what is on the twin is not what is in the file, or loading
            it rewrites weights in a way that cannot be repeated.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        twin = shared_copy(model, own=_rewritten(model, folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the comparison below is stricter than PEFT's warnings
            try:
                peft_model: Any = PeftModel.from_pretrained(twin, str(folder))
            except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
                reason = " ".join(str(error).split())[:300]
                raise AdapterError(
                    f"adapter {folder.name!r} does not fit this model: {reason} Give its own base model."
                ) from error
            if peft_model.active_peft_config.is_prompt_learning:
                raise AdapterError(f"adapter {folder.name!r} learns a prompt, expected one of weights, such as LoRA.")
            _check_loaded(peft_model, folder)
        yield twin.eval()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _rewritten(model: nn.Module, folder: Path) -> list[str]:
    """Names of the modules whose frozen weights PEFT rewrites when it loads this adapter, as when it was made."""
    start = str(_config(folder).get("init_lora_weights", "")).lower()
    if start.startswith(NOT_REPEATED):
        raise AdapterError(
            f"adapter {folder.name!r} starts with init_lora_weights={start!r}, which takes something else out of the "
            "weights each time. Save it again as plain LoRA: path_initial_model_for_weight_conversion of PEFT's "
            "save_pretrained."
        )
    if start not in REWRITE_WEIGHTS:
        return []
    config = PeftConfig.from_pretrained(str(folder))
    every = str(config.target_modules).lower() == "all-linear"
    return [name for name, _ in model.named_modules() if every or check_target_module_exists(config, name)]


def weights_digest(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor of the model's state."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            memory: Any = value.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy()
            total.update(memory)
    return total.hexdigest()


def _check_loaded(peft_model: Any, folder: Path) -> None:
    """What is on the model must be what is in the file: the same tensors, the same values."""
    wanted = load_file(folder / WEIGHTS)
    embeddings = any("embed" in name or "lm_head" in name for name in wanted)
    found = get_peft_model_state_dict(peft_model, save_embedding_layers=embeddings)
    odd = sorted(set(wanted) ^ set(found))
    odd += [name for name in sorted(set(wanted) & set(found)) if not _same(wanted[name], found[name])]
    if odd:
        raise AdapterError(
            f"adapter {folder.name!r}: {len(odd)} of {len(wanted)} tensors of the file are not on the model as they "
            f"are in the file, e.g. {odd[0]}. It was made for another model, or the file is damaged."
        )


def _same(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    return wanted.shape == found.shape and torch.equal(wanted.to(found.dtype), found.detach().cpu())


def _config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, after a look at what else is in the folder."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{str(folder)!r} is no adapter: it has no {CONFIG}. Give a folder that PEFT wrote.")
    if not (folder / WEIGHTS).is_file():
        other = sorted(path.name for path in folder.glob("adapter_model.*"))
        found = f"{other[0]}, which can run code when it is read" if other else "no weights"
        raise AdapterError(f"{str(folder)!r} has {found}, expected {WEIGHTS}. Save the adapter as safetensors.")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{str(folder / CONFIG)!r} is no adapter configuration: {error!r}.") from error
    return config


def _plain(name: str) -> str:
    return _last(name).lower()


def _last(name: str) -> str:
    return str(name).rstrip("/").rpartition("/")[2]


def _shown(names: Iterable[str]) -> str:
    return " / ".join(sorted({repr(_last(name)) for name in names if name}))
