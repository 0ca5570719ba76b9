"""A model and a batch -> the mean next-token loss, with logits only where a label is, and never all of them at once.

The full logits of a batch (tokens x vocabulary) are the largest tensor of a training step, and most of it is never
looked at: prompts and padding carry no label. Here the output head sees the labelled positions only, a few at a time,
and what is kept for backward is the gradient of its input:

    d(loss)/d(hidden) = (softmax(logits) - onehot(target)) @ W
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .data import NO_LABEL
from .errors import DataError
from .placement import input_device
from .quantized import gradients_kept

# Logits alive at once. Fewer rows make the product slower: the head is read anew for every chunk.
LOGIT_BYTES = {"cpu": 48 << 20, "cuda": 256 << 20}

REWORK_WORDS = ("logit", "softcap", "soft_cap", "lm_head")
"""In names of configuration values by which models rework their logits."""
ROUNDING_STEPS = 4
"""Relative difference of a model's logits from ours, in units of their dtype's precision, that rounding explains."""


@dataclass(frozen=True, slots=True)
class Rework:
    """What a model does to every logit after its head: ``scale * x``, or ``cap * tanh(x / cap)``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Of any shape, computed in the dtype that comes in."""
        return raw * self.scale if self.cap is None else (raw / self.cap).tanh() * self.cap

    def error(self, raw: Tensor, logits: Any) -> float:
        """Largest relative difference from what the model gave, in units of precision; infinite where unlike."""
        if not isinstance(logits, Tensor) or logits.shape != raw.shape:
            return math.inf
        wider = torch.promote_types(logits.dtype, raw.dtype)
        ours, theirs = self(raw).to(wider), logits.detach().to(wider)
        if torch.equal(ours, theirs):
            return 0.0
        limits = torch.finfo(raw.dtype)
        steps = (ours - theirs).abs() / (theirs.abs().clamp(min=limits.tiny) * limits.eps)
        largest = float(steps.masked_fill(ours == theirs, 0).max())
        return math.inf if math.isnan(largest) else largest


AS_THEY_ARE = Rework()
# What a model does to the logits of its head, None if that is not known. Found out at the first batch.
_reworks: WeakKeyDictionary[nn.Module, Rework | None] = WeakKeyDictionary()


def labelled_loss(model: Any, batch: Mapping[str, Tensor], *, num_labels: Tensor | int | None = None) -> Tensor:
    """Mean cross-entropy of the next token over the labelled positions, in nats; the loss that training uses.

    Equal to ``model(**batch).loss`` up to rounding, for every architecture whose head is a module: what the model does
    to its logits afterwards (scaling, soft-capping) is element-wise and still happens. :func:`all_at_once` says where
    the logits of all labelled positions are alive at a time.

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
    count = targets.numel() if num_labels is None else num_labels
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    with _no_needless_mask(model, inputs.get("attention_mask")):
        total = _total_at_the_head(model, inputs, head, keep, targets) if _is_plain(head) else None
        if total is not None:
            return total / _on(total.device, count)
        with head_sees_only(head, keep) as seen:
            logits = _logits(model(**inputs, use_cache=False))
    logits = logits.reshape(-1, logits.shape[-1]) if seen else logits[:, :-1][keep.to(logits.device)]
    total = functional.cross_entropy(full_precision(logits), targets.to(logits.device), reduction="sum")
    return total / _on(total.device, count)


def _on(device: torch.device, count: Tensor | int) -> Tensor | int:
    """A number of labels where the loss is: with a device map the head is not on the device of the batch."""
    return count.to(device) if isinstance(count, Tensor) else count


def all_at_once(model: Any, *, frozen: bool = False) -> str | None:
    """Why the loss has the logits of all labelled positions alive at a time; None where it has a few.

    What a model does to its logits is known after its first batch.

    Args:
        model: Causal language model, possibly wrapped by PEFT.
        frozen: True if the head will be frozen, whatever its flags say now.
    """
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    reason = _why_not_whole(head)
    if reason is not None:
        return reason
    if not frozen and any(parameter.requires_grad for parameter in head.parameters()):
        return "the head trains"
    if _reworks.get(head, AS_THEY_ARE) is None:
        return "the model reworks its logits in a way that is not known"
    return None


def num_labelled(batch: Mapping[str, Tensor]) -> int:
    """Positions of a batch that enter the loss: the first token of a row is predicted from nothing."""
    return int((batch["labels"][:, 1:] != NO_LABEL).sum())


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@contextlib.contextmanager
def _no_needless_mask(model: Any, mask: Tensor | None) -> Iterator[None]:
    """While open, the decoder gets no mask where padding is on the right: it is causal, no token sees what comes later.

    Without a mask attention may skip what lies above the diagonal, half of its work. Taken away at the decoder's door,
    so that whoever watches the model itself still learns which tokens are padding.
    """
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    needless = (
        isinstance(decoder, nn.Module)
        and mask is not None
        and mask.ndim == 2
        and bool(mask[:, 0].all())
        and bool((mask[:, 1:] <= mask[:, :-1]).all())
    )

    def drop(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": None} if kwargs.get("attention_mask") is mask else kwargs

    handle = decoder.register_forward_pre_hook(drop, with_kwargs=True) if needless else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _logits(output: Any) -> Any:
    return output.logits if hasattr(output, "logits") else output[0]


def _cuda_rng_state(weight: Tensor) -> Tensor | None:
    return torch.cuda.get_rng_state(weight.device) if weight.device.type == "cuda" else None


def _total_at_the_head(
    model: Any, inputs: Mapping[str, Tensor], head: nn.Linear, keep: Tensor, targets: Tensor
) -> Tensor | None:
    """Summed loss, a few logits at a time; None where what the model does to them is not known.

    The first batch may run twice: as if nothing were done to them, and then as the model turned out to do.
    """
    for first in (True, False):
        rework = _reworks.get(head, AS_THEY_ARE)
        if rework is None:
            break
        random_state = torch.get_rng_state(), _cuda_rng_state(head.weight)
        with _loss_at_the_head(head, keep, targets, rework) as at_head:
            logits = _logits(model(**inputs, use_cache=False))
        if at_head.raw is not None:
            if rework.error(at_head.raw, logits) <= (0 if rework == AS_THEY_ARE else ROUNDING_STEPS):
                _reworks[head] = rework
                return at_head.total
            _reworks[head] = _rework(model, at_head.raw, logits) if first else None
        torch.set_rng_state(random_state[0])
        if random_state[1] is not None:
            torch.cuda.set_rng_state(random_state[1], head.weight.device)
        if at_head.raw is None:
            break
    return None


def _rework(model: Any, raw: Tensor, logits: Any) -> Rework | None:
    """What turns the head's output into the model's, with a number of its configuration; None if nothing known does."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = {
        float(value)
        for key, value in (vars(config).items() if hasattr(config, "__dict__") else ())
        if isinstance(value, int | float) and value > 0 and "attn" not in key and any(w in key for w in REWORK_WORDS)
    }
    known = [entry for x in numbers for entry in (Rework(scale=x), Rework(scale=1 / x), Rework(cap=x))]
    best = min(known, key=lambda entry: entry.error(raw, logits), default=AS_THEY_ARE)
    return best if best.error(raw, logits) <= ROUNDING_STEPS else None


def _why_not_whole(head: Any) -> str | None:
    """Why the head is no ``nn.Linear`` whose weight lies here whole: quantized, adapted, wrapped or sharded."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return f"the head runs as {type(head).__name__} and not as a plain Linear"
    if type(head.weight) is not nn.Parameter or head.weight.shape != (head.out_features, head.in_features):
        return "the head's weight does not lie here whole"
    return None


def _is_plain(head: Any) -> bool:
    """True for a whole head that is frozen and has contents."""
    return (
        _why_not_whole(head) is None
        and not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters()))
        and head.weight.device.type != "meta"
    )


class _AtHead:
    """The loss as it was found at the input of the head, and the one position that the head itself still computed."""

    total: Tensor
    seen = False
    raw: Tensor | None = None


@contextlib.contextmanager
def _loss_at_the_head(head: nn.Linear, keep: Tensor, targets: Tensor, rework: Rework) -> Iterator[_AtHead]:
    """While open, the loss is found where the head gets its input, and the head sees one position only."""
    found = _AtHead()

    def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        labelled = _labelled_positions(args[0], keep)
        if labelled is None or labelled.shape[0] == 0:
            return None
        found.seen = True
        found.total = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            labelled, head.weight, head.bias, targets.to(labelled.device), rework
        )
        return (labelled[:1].detach().unsqueeze(0), *args[1:])

    def after(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if found.seen:
            found.raw = output.detach()

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def head_sees_only(head: Any, keep: Tensor) -> Iterator[list[bool]]:
    """While open, the output head gets the kept positions only, (1, kept, hidden); yields a list, filled then.

    Args:
        head: The model's output embeddings; anything but a module is left alone, and the list stays empty.
        keep: Which positions, (batch, T), or (batch, T - 1) where the last one is never wanted.
    """
    seen: list[bool] = []

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        labelled = _labelled_positions(args[0], keep)
        if labelled is None:
            return None
        seen.append(True)
        return (labelled.unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select) if isinstance(head, nn.Module) else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def _labelled_positions(hidden: Tensor, keep: Tensor) -> Tensor | None:
    """(batch, T, hidden) -> (labelled, hidden); None where the head gets something else than every position."""
    rows, columns = keep.shape
    if hidden.ndim != 3 or hidden.shape[0] != rows or hidden.shape[1] - columns not in (0, 1):
        return None
    return hidden[:, :columns][keep.to(hidden.device)]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of a frozen linear head and what comes after it; gradients are formed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, rework: Rework
    ) -> Tensor:
        """Loss, a scalar in float32 (float64 for a float64 model)."""
        wanted = ctx.needs_input_grad[0]
        num_bytes = LOGIT_BYTES.get(hidden_NH.device.type, LOGIT_BYTES["cuda"])
        buffers = 1 if rework.cap is None else 2  # the slope of the cap is as large as the logits
        chunk = max(num_bytes // (4 * buffers * weight_VH.shape[0]), 1)
        gradient_NH = torch.empty_like(hidden_NH) if wanted else None
        total = torch.zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32), device=hidden_NH.device)
        plain = total.dtype == hidden_NH.dtype == weight_VH.dtype and not torch.is_autocast_enabled(total.device.type)
        rows = min(chunk, hidden_NH.shape[0])
        buffer_CV = hidden_NH.new_empty(rows, weight_VH.shape[0]) if plain else None
        for start in range(0, hidden_NH.shape[0], chunk):
            hidden_CH, targets_C1 = hidden_NH[start : start + chunk], targets_N[start : start + chunk, None]
            if buffer_CV is None:
                logits_CV = full_precision(functional.linear(hidden_CH, weight_VH, bias_V))
            else:
                logits_CV = torch.mm(hidden_CH, weight_VH.T, out=buffer_CV[: hidden_CH.shape[0]])
                if bias_V is not None:
                    logits_CV += bias_V
            slope: float | Tensor = rework.scale
            if rework.cap is not None:
                logits_CV.div_(rework.cap).tanh_()
                slope = logits_CV.square().neg_().add_(1) if wanted else 1.0
                logits_CV *= rework.cap
            elif rework != AS_THEY_ARE:
                logits_CV *= rework.scale
            largest_C1 = logits_CV.amax(dim=1, keepdim=True)
            logits_CV -= largest_C1
            at_target_C1 = logits_CV.gather(1, targets_C1)
            sum_C1 = logits_CV.exp_().sum(dim=1, keepdim=True)
            total += (sum_C1.log() - at_target_C1).sum()
            if gradient_NH is not None:
                logits_CV /= sum_C1
                logits_CV.scatter_add_(1, targets_C1, torch.full_like(at_target_C1, -1))
                if rework != AS_THEY_ARE:
                    logits_CV *= slope
                gradient_NH[start : start + chunk] = logits_CV.to(weight_VH.dtype) @ weight_VH
        ctx.save_for_backward(gradient_NH)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        """Scale what forward kept."""
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * gradient, None, None, None, None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without gradients and in eval mode; each module's mode is put back afterwards, also on failure."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), gradients_kept(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


def heldout_loss(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Mean loss per labelled token over all batches, in nats, in eval mode; train flags are put back.

    Raises:
        DataError: If the batches carry no label at all.
    """
    device = input_device(model)
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            if num_labelled(batch):
                on_device = {key: value.to(device) for key, value in batch.items()}
                total += float(labelled_loss(model, on_device)) * num_labelled(batch)
                count += num_labelled(batch)
    if count == 0:
        raise DataError(f"{len(batches)} held-out batches carry no labelled token. Check the completion column.")
    return total / count
