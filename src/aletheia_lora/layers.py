"""A model -> its decoder layers, in order of depth, found by structure and not by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .errors import UnsupportedModelError


def layer_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of each layer, in order of depth: one block, or several where a model zips parallel lists.

    The stack is found by structure, not by name: among the outermost ``nn.ModuleList``s whose every entry holds a
    matrix, those built from the text model's configuration under the smallest ancestor of the input embedding; of
    these the one as long as ``num_hidden_layers``, then the heaviest. Where another one might be meant, none is taken.

    Raises:
        UnsupportedModelError: If there is no such stack, or it is not clear which one is the decoder's.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return _find_layers(model, text_config, type(model).__name__)


def embedding_of(model: nn.Module) -> Any:
    """The input embedding, as the model names it or the first ``nn.Embedding``.

    Raises:
        UnsupportedModelError: If there is none.
    """
    getter: Callable[[], Any] | None = getattr(model, "get_input_embeddings", None)
    if getter is not None:
        try:
            embedding = getter()
        except (NotImplementedError, AttributeError):
            embedding = None
        if embedding is not None and getattr(embedding, "weight", None) is not None:
            return embedding
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no input embedding; expected a language model over token ids."
    )


def _find_layers(model: nn.Module, text_config: Any, architecture: str) -> list[list[nn.Module]]:
    """The stack as a list of layers; each layer is a list of blocks (one, or several zipped parallel lists)."""
    embedding_name = next((n for n, m in model.named_modules() if m is embedding_of(model)), "")
    stacks = _stacks_of_the_text_model(model, _outermost_stacks(model), text_config)
    candidates: dict[str, nn.ModuleList] = {}
    ancestor = embedding_name
    while not candidates:
        ancestor = ancestor.rpartition(".")[0]
        prefix = f"{ancestor}." if ancestor else ""
        candidates = {name: stack for name, stack in stacks.items() if name.startswith(prefix)}
        if not ancestor:
            break
    if not candidates:
        raise UnsupportedModelError(
            f"{architecture} has no list of decoder layers: expected an nn.ModuleList whose entries all hold a weight "
            f"matrix; found {sorted(stacks) or 'none'}."
        )
    depth = getattr(text_config, "num_hidden_layers", None)
    weights = {name: sum(math.prod(_shape(p)) for p in stack.parameters()) for name, stack in stacks.items()}
    fitting = [name for name in candidates if len(candidates[name]) == depth]
    best = max(fitting or candidates, key=lambda name: weights[name])
    parent = best.rpartition(".")[0]
    chosen = [name for name in candidates if name == best or (name in fitting and name.rpartition(".")[0] == parent)]
    rivals = [name for name in fitting or stacks if name not in chosen and (fitting or depth is None)]
    if sum(weights[name] for name in rivals) > 0.1 * sum(weights[name] for name in chosen):
        described = ", ".join(f"{name!r} ({len(stacks[name])} layers)" for name in [best, *rivals])
        raise UnsupportedModelError(
            f"{architecture} has several stacks of layers that could be the decoder's: {described}. Which stack to "
            "select from is unclear: pass the one language model, or give it a configuration with num_hidden_layers."
        )
    if not fitting and depth is not None:
        total = sum(math.prod(_shape(parameter)) for parameter in model.parameters())
        embeddings = sum(math.prod(_shape(p)) for p in {id(p): p for p in _embedding_parameters(model)}.values())
        share = weights[best] / max(total - embeddings, 1)
        if share < 0.9:
            raise UnsupportedModelError(
                f"{architecture} has {depth} layers by its configuration, but its longest stack {best!r} has "
                f"{len(candidates[best])} and holds {share:.0%} of the weights. Which stack to select from is unclear."
            )
    return [list(blocks) for blocks in zip(*(candidates[name] for name in chosen), strict=True)]


def _outermost_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer in stacks):
            continue
        if all(any(len(_shape(p)) >= 2 or not p.is_floating_point() for p in entry.parameters()) for entry in module):
            stacks[name] = module
    return stacks


def _stacks_of_the_text_model(
    model: nn.Module, stacks: dict[str, nn.ModuleList], text_config: Any
) -> dict[str, nn.ModuleList]:
    """Without the stacks of towers: what is built from another configuration than the text model's is not text."""

    def config_above(name: str) -> Any:
        while name:
            name = name.rpartition(".")[0]
            config = getattr(model.get_submodule(name), "config", None)
            if config is not None:
                return config
        return None

    own = {name: stack for name, stack in stacks.items() if type(config_above(name)) is type(text_config)}
    return own or stacks


def _shape(parameter: nn.Parameter) -> Sequence[int]:
    """The shape of a weight, also of one that ZeRO-3 has taken apart: its own is empty between uses."""
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    found = list(embedding_of(model).parameters())
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return found + (list(head.parameters()) if head is not None else [])
