"""A model and a batch -> the mean next-token loss, with logits only where a label is.

The full logits of a batch (tokens x vocabulary) are the largest tensor of a training step, and most of it is never
looked at: prompts and padding carry no label. Here the output head sees the labelled positions only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import NO_LABEL
from .errors import DataError


def labelled_loss(model: nn.Module, batch: Mapping[str, Tensor], *, num_labels: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy of the next token over the labelled positions, in nats; the loss that training uses.

    Equal to ``model(**batch).loss`` up to rounding, for every architecture whose head is a module: what the model does
    to its logits afterwards (scaling, soft-capping) is element-wise and still happens.

    Args:
        model: Causal language model, possibly wrapped by PEFT.
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each of shape (batch, T); ``labels`` unshifted, -100
            where no loss is wanted. Other entries are passed on to the model.
        num_labels: Divide the summed loss by this instead of the batch's own count (gradient accumulation).

    Raises:
        DataError: If no position of the batch carries a label: its mean loss does not exist.
    """
    labels = batch["labels"]
    keep = labels[:, 1:] != NO_LABEL
    targets = labels[:, 1:][keep]
    if targets.numel() == 0 and num_labels is None:
        raise DataError(
            f"a batch of {labels.shape[0]} rows and {labels.numel()} tokens has no labelled token: nothing to learn "
            "from. Check the completion column, or raise max_length if prompts fill it."
        )
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with _head_sees_only(model, keep) as seen:
        output = model(**inputs, use_cache=False)
    logits = output.logits if hasattr(output, "logits") else output[0]
    logits = logits.reshape(-1, logits.shape[-1]) if seen else logits[:, :-1][keep.to(logits.device)]
    total = functional.cross_entropy(full_precision(logits), targets.to(logits.device), reduction="sum")
    return total / (targets.numel() if num_labels is None else num_labels)


def num_labelled(batch: Mapping[str, Tensor]) -> int:
    """Positions of a batch that enter the loss: the first token of a row is predicted from nothing."""
    return int((batch["labels"][:, 1:] != NO_LABEL).sum())


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextlib.contextmanager
def _head_sees_only(model: Any, keep: Tensor) -> Iterator[list[bool]]:
    """While open, the output head gets the labelled positions, (1, labelled, hidden); yields a list, filled then."""
    seen: list[bool] = []
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.ndim != 3 or hidden.shape[1] != keep.shape[1] + 1:
            return None
        seen.append(True)
        return (hidden[:, :-1][keep.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select) if isinstance(head, nn.Module) else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def heldout_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Mean loss per labelled token over all batches, in nats, in eval mode; train flags are put back.

    Raises:
        DataError: If the batches carry no label at all.
    """
    device = next(model.parameters()).device
    training = [(module, module.training) for module in model.modules()]
    total, count = 0.0, 0
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                if num_labelled(batch):
                    on_device = {key: value.to(device) for key, value in batch.items()}
                    total += float(labelled_loss(model, on_device)) * num_labelled(batch)
                    count += num_labelled(batch)
    finally:
        for module, flag in training:
            module.training = flag
    if count == 0:
        raise DataError(f"{len(batches)} held-out batches carry no labelled token. Check the completion column.")
    return total / count
