"""Batch -> its rows, each named by what its hidden states depend on; model -> the name of its frozen prefix.

Neither data set nor collator has to cooperate: a row is its real tokens and their positions, read from the batch.
Shape legend: B rows of a batch, T columns, N real tokens of a batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

FORMAT = "aletheia-prefix-cache/1"
# Configuration that says where a model came from or what comes out at its top, not what its lower layers compute.
IRRELEVANT = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "use_cache", "output_attentions", "dtype", "torch_dtype"}
    | {"output_hidden_states", "return_dict", "problem_type", "id2label", "label2id", "quantization_config"}
)


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The rows of a batch."""

    names: tuple[bytes, ...]
    """One per row; equal names mean equal hidden states."""
    lengths: tuple[int, ...]
    """Real tokens of each."""
    places: npt.NDArray[np.int64]
    """Where each real token stands in the batch, row after row, (N,), counted through B and T."""
    displaced: int | None
    """Number of the longest row that does not begin at column 0, if any: whether that matters must be measured."""


def batch_rows(
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor | None,
    position_ids: Tensor | None,
    *,
    regime: bytes,
    independent: bool,
) -> BatchRows:
    """Cut a batch into rows and name them.

    A row is the real tokens of one line of the batch. Without a mask and with positions that start again at 0, a
    line holds several (packing, padding-free batches).

    Args:
        input_ids_BT: Token ids.
        attention_mask_BT: Not 0 at real tokens; None if all are.
        position_ids: As given to the model, (B, T) or (1, T); None if the model makes its own.
        regime: Everything else that the states depend on, e.g. autocast; a part of every name.
        independent: True if a row has the same states wherever it stands and whatever stands beside it. False makes
            the columns a part of the name, and leaves packed lines whole.
    """
    ids_BT = input_ids_BT.cpu().numpy().astype(np.int64)
    mask_BT = np.ones(ids_BT.shape, bool) if attention_mask_BT is None else attention_mask_BT.cpu().numpy() != 0
    columns_BT = np.broadcast_to(np.arange(ids_BT.shape[1]), ids_BT.shape)
    positions_BT = columns_BT if position_ids is None else np.broadcast_to(position_ids.cpu().numpy(), ids_BT.shape)
    packed = attention_mask_BT is None and position_ids is not None and independent
    names, rows = [], []
    for line in range(ids_BT.shape[0]):
        columns = np.flatnonzero(mask_BT[line])
        starts = np.flatnonzero(positions_BT[line, columns][1:] == 0) + 1
        for row in np.split(columns, starts if packed else []):
            if len(row):
                where = row - row[0] if independent and position_ids is None else positions_BT[line, row]
                # At column 0 a model's own positions are the same as given ones; elsewhere it may count otherwise.
                own = position_ids is None and row[0] > 0 and not independent
                places = None if independent else row
                names.append(_name(ids_BT[line, row], where, places, regime=regime, own=own))
                rows.append(row + line * ids_BT.shape[1])
    lengths = tuple(len(row) for row in rows)
    moved = [number for number, row in enumerate(rows) if row[0] % ids_BT.shape[1]]
    return BatchRows(
        names=tuple(names),
        lengths=lengths,
        places=np.concatenate(rows) if rows else np.zeros(0, np.int64),
        displaced=max(moved, key=lambda number: lengths[number], default=None),
    )


def row_name(ids_N: npt.NDArray[np.int64], *, regime: bytes) -> bytes:
    """The name that :func:`batch_rows` gives a row whose states do not depend on where it stands."""
    return _name(ids_N, np.arange(len(ids_N)), None, regime=regime, own=False)


def _name(
    ids_N: npt.NDArray[np.int64],
    positions_N: npt.NDArray[Any],
    columns_N: npt.NDArray[Any] | None,
    *,
    regime: bytes,
    own: bool,
) -> bytes:
    parts = [regime, b" own " if own else b" given ", len(ids_N).to_bytes(8, "little"), ids_N.tobytes()]
    parts.append(positions_N.astype(np.int64).tobytes())
    parts.append(b"" if columns_N is None else columns_N.astype(np.int64).tobytes())
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def prefix_key(
    base_model: Any,
    blocks: Sequence[Sequence[nn.Module]],
    lowest: int,
    storage: str,
    *,
    top: Sequence[nn.Module] = (),
) -> dict[str, Any]:
    """What the hidden states below layer ``lowest`` depend on, besides the rows; equal records share a cache.

    Args:
        base_model: The model inside PEFT's wrapper.
        blocks: Its layers, as ``layers.layer_blocks`` finds them.
        lowest: Lowest adapted layer; the weights from there up do not matter.
        storage: The dtype on disk.
        top: What runs after the last layer only, head and final norm: it does not matter either.

    Returns:
        A record of plain JSON types; its ``digest`` is the digest of all the rest.
    """
    config = base_model.config.to_dict() if hasattr(base_model, "config") else {}
    relevant = {key: value for key, value in config.items() if key not in IRRELEVANT}
    record = {
        "format": FORMAT,
        "architecture": type(base_model).__name__,
        "config": hashlib.blake2b(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:32],
        "attention": str(getattr(getattr(base_model, "config", None), "_attn_implementation", None)),
        "weights": _weights_digest(base_model, blocks[:lowest], [*blocks[lowest:], top]),
        "device": next(base_model.parameters()).device.type,
        "lowest": lowest,
        "storage": storage,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {**record, "digest": hashlib.blake2b(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]}


def _weights_digest(
    base_model: nn.Module, below: Sequence[Sequence[nn.Module]], above: Sequence[Sequence[nn.Module]]
) -> str:
    """Of the bytes of every tensor that is not in ``above`` alone: weights, buffers, quantization constants."""
    upper, lower = (
        {id(module) for layer in part for block in layer for module in block.modules()} for part in (above, below)
    )
    names = tuple(f"{name}." for name, module in base_model.named_modules() if id(module) in upper - lower)
    tensors: Mapping[str, Any] = {**dict(base_model.named_buffers()), **base_model.state_dict(keep_vars=True)}
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(name for name in tensors if not name.startswith(names)):
        if isinstance(tensors[name], Tensor):
            whole.update(name.encode() + b"\0" + _tensor_digest(tensors[name]))
    return whole.hexdigest()


_DIGESTS = WeakTensorKeyDictionary()  # tensor -> (sum of its words, digest): hashing is ten times slower than adding


def _tensor_digest(tensor: Tensor) -> bytes:
    """Dtype, shape and bytes; remembered while the sum of the bits stays, since ``.data`` can be changed unseen."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = flat.view(torch.int32) if flat.numel() % 4 == 0 and flat.storage_offset() % 4 == 0 else flat
    place = torch.arange(1, 1025, device=flat.device)  # so that two swapped words are seen, too
    cut = words.numel() // 1024 * 1024
    check = int((words[:cut].view(-1, 1024).sum(0) * place).sum()) ^ int(words[cut:].sum(dtype=torch.int64))
    known: tuple[int, bytes] | None = _DIGESTS.get(tensor)
    if known is None or known[0] != check:
        digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=16)
        memory: Any = flat.cpu().numpy()
        digest.update(memory)
        known = (check, digest.digest())
        _DIGESTS[tensor] = known
    return known[1]
