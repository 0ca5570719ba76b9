"""A model -> what a short forward over a few tokens tells: which of its maps really run, and whether it is causal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .layers import embedding_of

TRIAL_TOKENS = 8


def modules_called(model: nn.Module, candidates: Iterable[nn.Module], text_config: Any) -> tuple[set[int] | None, str]:
    """Ids of the candidates whose forward runs when the model runs in train mode, and a word on the trial.

    Train mode, because several architectures read weights directly in one mode only.
    """
    called: set[int] = set()

    def note(module: nn.Module, *_: object) -> None:
        called.add(id(module))

    handles = [module.register_forward_pre_hook(note) for module in candidates]
    try:
        with _trial(model, training=True):
            input_ids = _trial_tokens(model, text_config)
            model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    except Exception as error:  # whatever a foreign forward raises, the anatomy still stands without the trial
        reason = str(error).splitlines()[0][:120] if str(error) else "no message"
        return None, f"could not run ({type(error).__name__}: {reason})"
    finally:
        for handle in handles:
            handle.remove()
    return called, "ran"


def sees_later_tokens(model: nn.Module, text_config: Any) -> bool:
    """True if what the model says of a token depends on tokens behind it: measured, where its parts do not deny it."""
    flags = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if flags and all(flags):
        return False
    try:
        with _trial(model, training=False):
            input_ids = _trial_tokens(model, text_config).repeat(2, 1)
            input_ids[1, -1] = input_ids[0, 0]
            output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
            logits = (output.logits if hasattr(output, "logits") else output[0])[:, :-1]
            rounding = min(1000 * torch.finfo(logits.dtype).eps, 0.02) * logits.abs().max()
            return bool((logits[0] - logits[1]).abs().max() > rounding)
    except Exception:  # without contents, or a foreign forward: nothing was measured
        return False


def _trial_tokens(model: nn.Module, text_config: Any) -> torch.Tensor:
    """A row of different token ids, (1, TRIAL_TOKENS), where the input embedding lies."""
    weight = embedding_of(model).weight
    vocab_size = int(getattr(text_config, "vocab_size", 0) or weight.shape[0])
    return (torch.arange(TRIAL_TOKENS, device=weight.device) % vocab_size).unsqueeze(0)


@contextlib.contextmanager
def _trial(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run without gradients in one mode; flags, buffers and random generators are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [device for device in [embedding_of(model).weight.device] if device.type == "cuda"]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
