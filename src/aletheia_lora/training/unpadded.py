"""A padded batch -> the same rows one after the other, without padding, and attention that keeps them apart.

Rows of real data differ in length, and a batch is as long as its longest row: every layer computes the padding, too.
Laid end to end, with positions that start again at 0 and attention row by row, the same rows give the same loss and
gradients, and nothing but their tokens is computed. Shape legend: B rows, T columns, N real tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..data import NO_LABEL
from ..loss import evaluating, labelled_loss
from ..padding import ROW_BY_ROW, configs_of

WORTH_IT = 0.05
"""Share of padding in a batch below which it is left as it is."""
TRIED_ROWS = 2
"""Rows that go through the model both ways, in eval mode."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative difference of a mean loss that rounding explains; rows that see each other are far above."""


class Unpadded:
    """Takes the padding out of batches, if the model computes the same without it; :meth:`remove` puts all back."""

    def __init__(self, base_model: nn.Module, *, unsupported: str | None = None) -> None:
        """Let the model's attention run row by row.

        Args:
            base_model: The model inside PEFT's wrapper.
            unsupported: A reason of the caller's to leave batches as they are.
        """
        self.num_tokens, self.num_padding = 0, 0
        self.turned_off = unsupported
        """Why batches stay padded."""
        self._checked = False
        self._configs = [c for c in configs_of(base_model) if getattr(c, "_attn_implementation", None) == "sdpa"]
        self._longest_line, self._longest_row = _longest(base_model)
        if self.turned_off is None and not self._configs:
            self.turned_off = "attention does not run as sdpa"
        if self.turned_off is None:
            ALL_ATTENTION_FUNCTIONS.register(ROW_BY_ROW, _row_by_row)
            ALL_MASK_ATTENTION_FUNCTIONS.register(ROW_BY_ROW, sdpa_mask)
            self._set("sdpa", ROW_BY_ROW)

    def remove(self) -> None:
        """Give the model its own attention back."""
        self._set(ROW_BY_ROW, "sdpa")

    def record(self) -> dict[str, Any]:
        """What was left out, in tokens, as plain JSON types."""
        return {"num_tokens": self.num_tokens, "num_padding": self.num_padding, "turned_off": self.turned_off}

    def batch(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without padding; as it is, where padding is rare or the model needs it.

        The first time, two rows of the batch go through the model both ways. Where the losses differ by more than
        rounding, batches stay padded from then on and ``turned_off`` says so. What two short rows do not show is read
        from the configuration: a batch stays padded if its line is longer than a chunk of attention, or one of its rows
        longer than a sliding window.
        """
        if self.turned_off is not None or not _has_rows(batch):
            return batch
        mask = batch["attention_mask"]
        padding = int(mask.numel() - mask.count_nonzero())
        if padding <= WORTH_IT * mask.numel():
            return batch
        if mask.numel() - padding > self._longest_line or int(mask.sum(dim=1).max()) > self._longest_row:
            return batch
        if not self._checked:
            if mask.shape[0] == 1:
                return batch  # nothing to compare it with
            self._checked = True
            self.turned_off = _difference(model, batch)
            if self.turned_off is not None:
                self.remove()
                return batch
        self.num_tokens += mask.numel() - padding
        self.num_padding += padding
        return without_padding(batch)

    def _set(self, before: str, after: str) -> None:
        for config in self._configs:
            if config._attn_implementation == before:
                config._attn_implementation_internal = after


def without_padding(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Lay the rows of a batch end to end.

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T), padded on either side.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, each (1, N), and the borders of the rows under the names that
        transformers uses. The first token of a row has no label: nothing predicts it.
    """
    real_BT = batch["attention_mask"].bool()
    lengths = real_BT.sum(dim=1)
    lengths = lengths[lengths > 0]
    position_ids = (real_BT.cumsum(dim=1) - 1)[real_BT][None]
    borders = functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    return {
        "input_ids": batch["input_ids"][real_BT][None],
        "labels": batch["labels"][real_BT][None].masked_fill(position_ids == 0, NO_LABEL),
        "position_ids": position_ids,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _has_rows(batch: Mapping[str, Any]) -> bool:
    """True for a batch of tokens, mask and labels and nothing else that says something of single tokens."""
    tokens = {key for key, value in batch.items() if isinstance(value, Tensor) and value.ndim > 0}
    return tokens == {"input_ids", "attention_mask", "labels"} and batch["attention_mask"].ndim == 2


def _longest(model: nn.Module) -> tuple[float, float]:
    """Most tokens of a line, and of a row, for which the model's masks say no more than who precedes whom.

    Chunks of attention, and a scale that grows with the position, are counted along the line and not along the row.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = (getattr(text_config, name, None) for name in ("attention_chunk_size", "floor_scale", "sliding_window"))
    chunk, floor, window = (value if isinstance(value, int) and value > 0 else math.inf for value in values)
    return min(chunk, floor - 1), window


def _difference(model: nn.Module, batch: Mapping[str, Tensor]) -> str | None:
    """Why the model does not compute the same without padding, tried on the two shortest rows; None if it does."""
    lengths = batch["attention_mask"].sum(dim=1)
    rows = lengths.argsort(descending=True)[-TRIED_ROWS:]
    width = int(lengths[rows].max())
    real = batch["attention_mask"][rows].bool()
    columns = slice(0, width) if bool(real[:, 0].all()) else slice(real.shape[1] - width, None)
    few = {key: batch[key][rows][:, columns] for key in ("input_ids", "attention_mask", "labels")}
    if not bool((without_padding(few)["labels"] != NO_LABEL).any()):
        few["labels"] = few["input_ids"].masked_fill(few["attention_mask"] == 0, NO_LABEL)
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):
            padded = float(labelled_loss(model, few))
            bare = float(labelled_loss(model, without_padding(few)))
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"the model cannot run without padding: {' '.join(str(error).split())[:200]}"
    allowed = TOLERANCE[next(model.parameters()).dtype]
    if torch.is_autocast_enabled(batch["input_ids"].device.type):
        allowed = max(allowed, TOLERANCE[torch.get_autocast_dtype(batch["input_ids"].device.type)])
    if not abs(bare - padded) <= allowed * abs(padded):  # so that a NaN is a difference
        return f"without padding the loss of two rows is {bare:.6g} and not {padded:.6g}: its layers mix rows"
    return None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # how many rows there are differs by batch
def _row_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each row with itself; transformers' sdpa for batches that are not laid end to end.

    ``query`` is (1, heads, N, width), ``key`` and ``value`` (1, key-value heads, N, width); out (1, N, heads, width).
    """
    borders = [] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    longest = max((stop - start for start, stop in itertools.pairwise(borders)), default=0)
    special = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    beyond = sliding_window is not None and longest > sliding_window
    if not borders or not causal or special or beyond or query.shape[0] != 1 or query.shape[2] != borders[-1]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    rows = [
        functional.scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
        )
        for start, stop in itertools.pairwise(borders)
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None
