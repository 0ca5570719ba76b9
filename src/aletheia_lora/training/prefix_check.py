"""When hidden states cannot be kept or replayed, and the comparison that shows whether a replay is right.

Comes in: a model, or the arguments of a forward. Goes out: a reason, or None. Nothing here changes the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

# Tensors that a forward may be given and on which hidden states do not depend, or only through tokens and positions.
HARMLESS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "labels", "shift_labels", "num_items_in_batch", "completion_mask"}
    | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
)
# What asks for more than the states on top, so that every layer has to run.
WANTS_ALL_LAYERS = ("output_hidden_states", "output_attentions", "output_router_logits", "use_cache")
GROWING_ROTARY = ("dynamic", "longrope")
"""Rotary tables that depend on the longest row of the batch."""

CHECKED_LOGITS = 64
"""Tokens whose logits are compared, about: the logits of a whole batch are too large to be held twice."""


def refusal(base_model: Any, below: Sequence[Sequence[nn.Module]], above: Sequence[Sequence[nn.Module]]) -> str | None:
    """Why the hidden states below some layer are not the same at every visit of a row; None if nothing speaks for it.

    Args:
        base_model: The model inside PEFT's wrapper.
        below: Layers whose output would be kept.
        above: The others and what runs after them, which may be random and may train.
    """
    lower = {id(module) for layer in below for block in layer for module in block.modules()}
    upper = {id(module) for layer in above for block in layer for module in block.modules()} - lower
    for name, module in base_model.named_modules():
        if id(module) in upper:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                return f"{name}.{own} trains, and the states that would be kept depend on it"
        for key, value in _random_parts(module).items():
            return f"{key}={value} in {name or type(module).__name__} makes them random at every visit; set it to 0"
    config = base_model.config.get_text_config() if hasattr(base_model, "config") else None
    for key, value in vars(config).items() if config is not None else ():
        if "drop" in key and not key.startswith(("classifier", "summary")) and _positive(value):
            return f"{key}={value} in the model's configuration may make them random at every visit; set it to 0"
    return None


def pass_by_reason(base_model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why this forward must run in full and its states cannot be kept; None if nothing speaks for it."""
    input_ids = args[0] if args else kwargs.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or len(args) > 1:
        return "no token ids of shape (batch, length)"
    if kwargs.get("past_key_values") is not None:
        return "past keys and values"
    config = base_model.config.get_text_config() if hasattr(base_model, "config") else None
    for flag in WANTS_ALL_LAYERS:
        if kwargs.get(flag) if kwargs.get(flag) is not None else getattr(config, flag, False):
            return flag
    for name in ("attention_mask", "position_ids"):
        value = kwargs.get(name)
        if value is not None and not (
            isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == input_ids.shape[1]
        ):
            return f"{name} of another shape than the tokens"
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and name not in HARMLESS:
            return f"{name}, on which hidden states may depend"
    longest = _rotary_limit(config)
    if longest is not None and input_ids.shape[1] > longest:
        return f"more than {longest} tokens in a row, where rotary tables depend on the longest row"
    return None


@contextlib.contextmanager
def observed(
    blocks: Sequence[Sequence[nn.Module]], lowest: int, places: npt.NDArray[np.int64]
) -> Iterator[dict[str, Tensor]]:
    """While open, what enters layer ``lowest`` and what leaves the last layer, at the real tokens: (tokens, width).

    Args:
        blocks: The layers.
        lowest: Lowest adapted layer.
        places: Where the real tokens stand in the batch, counted through rows and columns.
    """
    seen: dict[str, Tensor] = {}

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            seen.setdefault(f"states entering layer {lowest}", _at(hidden, places))

    def leaving(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        if isinstance(hidden, Tensor):
            seen["states leaving the last layer"] = _at(hidden, places)

    handles = [block.register_forward_pre_hook(entering, with_kwargs=True) for block in blocks[lowest]]
    handles += [block.register_forward_hook(leaving) for block in blocks[-1]]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def note_output(seen: dict[str, Tensor], output: Any, shape: Sequence[int], places: npt.NDArray[np.int64]) -> None:
    """Add a model's loss and the logits of some tokens to what was observed, as far as its output has them.

    Args:
        seen: What :func:`observed` gave.
        output: The model's output.
        shape: Rows and columns of the batch.
        places: As there; logits of another shape belong to labelled tokens, all of them real.
    """
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    if isinstance(loss, Tensor):
        seen["loss"] = loss.detach().reshape(1, 1)
    if isinstance(logits, Tensor) and logits.ndim == 3:
        if logits.shape[:2] != tuple(shape):
            places = np.arange(logits.shape[0] * logits.shape[1])
        seen["logits"] = _at(logits, places[:: max(len(places) // CHECKED_LOGITS, 1)])


def difference(got: Tensor | None, expected: Tensor) -> float:
    """Root mean square over tokens of the relative difference ``|got - expected| / |expected|``; infinite if unlike."""
    if got is None or got.shape != expected.shape:
        return float("inf")
    got, expected = got.detach().double(), expected.detach().double()
    norms = expected.norm(dim=-1)
    relative = (got - expected).norm(dim=-1) / norms.clamp(min=float(norms.mean()) * 1e-3 + 1e-30)
    found = float(relative.square().mean().sqrt())
    return found if found == found else float("inf")


def random_state_point() -> Callable[[], None]:
    """Remember torch's random state on all devices; the function returned goes back to it."""
    state = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None

    def rewind() -> None:
        torch.set_rng_state(state)
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)

    return rewind


def _random_parts(module: nn.Module) -> dict[str, float]:
    """Attributes by which a module's forward is random in training, with their values."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return {"dropout": module.p} if module.p > 0 else {}
    return {
        key: value for key, value in vars(module).items() if ("drop" in key or "jitter" in key) and _positive(value)
    }


def _positive(value: Any) -> bool:
    return isinstance(value, float) and value > 0


def _rotary_limit(config: Any) -> int | None:
    """Longest row whose rotary table does not depend on its length; None if no table does."""
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    tables = [rotary, *(value for value in rotary.values() if isinstance(value, Mapping))]
    for table in tables:
        if table.get("rope_type", table.get("type")) in GROWING_ROTARY:
            limit = table.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return int(limit or config.max_position_embeddings)
    return None


def _at(tensor_BTH: Tensor, places: npt.NDArray[np.int64]) -> Tensor:
    """(tokens, width) at the places."""
    flat = tensor_BTH.detach().reshape(-1, tensor_BTH.shape[-1])
    return flat[torch.from_numpy(places).to(flat.device)]
