"""A mixture-of-experts model under way -> how many tokens each expert received, by hooks at the experts' doors.

Comes in: a model that somebody else runs forward. Goes out: an :class:`ExpertLoad` for each layer with experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import ModelAnatomy
from .probe_result import ExpertLoad


class Routing:
    """Hooks on the modules that hold experts; :meth:`close` removes them.

    What the router chose is read where it arrives: the experts get the index of each token's choices. Padding does
    not count, and neither does what a checkpoint runs again in backward.
    """

    def __init__(self, model: nn.Module, found: ModelAnatomy) -> None:
        self.totals: dict[str, Tensor] = {}
        """Tokens of each expert in the batches so far, by the name of the owner."""
        self.batch: dict[str, Tensor] = {}
        """The same in the batch under way."""
        self.layers: dict[str, int] = {}
        self.mask: Tensor | None = None
        self.handles = [model.register_forward_pre_hook(self._start, with_kwargs=True)]
        for owner, layer_idx, num_experts in _expert_owners(found):
            self.layers[owner] = layer_idx
            self.handles.append(
                model.get_submodule(owner).register_forward_pre_hook(self._note(owner, num_experts), with_kwargs=True)
            )

    def _start(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """A loss may run the model more than once for a batch; the last forward counts."""
        self.batch.clear()
        self.mask = kwargs.get("attention_mask")

    def _note(self, owner: str, num_experts: int) -> Any:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch._C._current_graph_task_id() != -1:  # a checkpoint that recomputes
                return
            counts = _tokens_per_expert([*args, *kwargs.values()], num_experts, self.mask)
            if counts is not None:
                self.batch[owner] = self.batch[owner] + counts if owner in self.batch else counts

        return before

    def end_of_batch(self) -> None:
        """Add the batch to the totals."""
        for owner, counts in self.batch.items():
            self.totals[owner] = self.totals[owner] + counts if owner in self.totals else counts
        self.batch.clear()

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def loads(self) -> tuple[ExpertLoad, ...]:
        """One record per owner of experts whose tokens could be counted, in the order of depth."""
        return tuple(
            ExpertLoad(owner, layer_idx, tuple(int(count) for count in self.totals[owner].tolist()))
            for owner, layer_idx in self.layers.items()
            if owner in self.totals
        )


def _expert_owners(found: ModelAnatomy) -> Iterator[tuple[str, int, int]]:
    """(module that holds stacked experts, layer, number of experts), each once."""
    owners = {
        module.name.rpartition(".")[0]: (module.layer_idx, module.num_experts)
        for module in found.modules
        if module.storage == "stacked"
    }
    for owner, (layer_idx, num_experts) in owners.items():
        yield owner, layer_idx, num_experts


def _tokens_per_expert(inputs: list[Any], num_experts: int, mask: Tensor | None) -> Tensor | None:
    """Tokens that each expert gets, shape (num_experts,), from what its owner was called with; None if it is not told.

    Three forms are known: the index of each token's choices, (tokens, experts per token) integers; the number of
    tokens of each expert, as a list; and a batch of all tokens for each expert, zero where it was not chosen.
    """
    for given in inputs:
        if isinstance(given, Tensor) and given.dtype in (torch.int64, torch.int32) and given.ndim >= 2:
            chosen_TK = given.detach().reshape(-1, given.shape[-1])
            if mask is not None and mask.numel() == chosen_TK.shape[0]:
                chosen_TK = chosen_TK[mask.reshape(-1).to(chosen_TK.device).bool()]
            flat = chosen_TK.reshape(-1)
            return torch.bincount(flat[(flat >= 0) & (flat < num_experts)], minlength=num_experts).cpu()
        if isinstance(given, list) and len(given) == num_experts and all(isinstance(size, int) for size in given):
            return torch.tensor(given)
    hidden = inputs[0] if inputs else None
    if (
        len(inputs) == 1
        and isinstance(hidden, Tensor)
        and hidden.is_floating_point()
        and hidden.numel() % (num_experts * hidden.shape[-1]) == 0
    ):
        rows_ETH = hidden.detach().reshape(num_experts, -1, hidden.shape[-1])
        if mask is not None and mask.numel() == rows_ETH.shape[1]:
            rows_ETH = rows_ETH[:, mask.reshape(-1).to(hidden.device).bool()]
        return rows_ETH.any(dim=-1).sum(dim=1).cpu()
    return None
