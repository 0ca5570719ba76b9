"""A model -> what a forward over a few tokens tells: which of its maps run, which could learn, and is it causal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .layers import embedding_of
from .placement import input_device
from .quantized import gradients_kept

TRIAL_TOKENS = 8


@dataclass(frozen=True)
class Trial:
    """What one forward over a few tokens showed."""

    called: frozenset[int] | None
    """Ids of the modules whose forward ran; None if the model's could not."""
    learning: frozenset[int] | None
    """Ids of those that a gradient of the output reaches, or whose kernel lets none pass; None if not told."""
    outcome: str
    """"ran", or why it could not."""


def trial_forward(model: nn.Module, candidates: Sequence[nn.Module], text_config: Any) -> Trial:
    """Run the model in train mode on a few tokens, and see which candidates run and which could learn.

    Train mode, because several architectures read weights directly in one mode only. No gradient of a weight is made.
    """
    outputs: dict[int, list[torch.Tensor]] = {}
    for_inference: set[int] = set()  # no gradient passes these kernels: not a choice of the model's, so not left out

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.setdefault(id(module), []).append(output)
        tensors = [value for value in (*args[:1], output) if isinstance(value, torch.Tensor)]
        if torch.is_grad_enabled() and [tensor.requires_grad for tensor in tensors] == [True, False]:
            for_inference.add(id(module))

    handles = [module.register_forward_hook(note) for module in candidates]
    handles.append(embedding_of(model).register_forward_hook(_requiring_gradient))
    try:
        with _trial(model, candidates, training=True), torch.enable_grad():
            input_ids = _trial_tokens(model, text_config)
            result = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
            reached = _reached(_first_output(result), outputs)
            return Trial(frozenset(outputs), None if reached is None else reached | for_inference, "ran")
    except Exception as error:  # whatever a foreign forward raises, the anatomy still stands without the trial
        reason = str(error).splitlines()[0][:120] if str(error) else "no message"
        return Trial(None, None, f"could not run ({type(error).__name__}: {reason})")
    finally:
        for handle in handles:
            handle.remove()


def _reached(result: Any, outputs: dict[int, list[torch.Tensor]]) -> frozenset[int] | None:
    """The modules on whose outputs the result depends, in the graph and so whatever the values."""
    wanted = [
        (module, output)
        for module, calls in outputs.items()
        for output in calls
        if isinstance(output, torch.Tensor) and output.requires_grad
    ]
    try:
        gradients = torch.autograd.grad(result.float().sum(), [output for _, output in wanted], allow_unused=True)
    except Exception:  # kernels without a backward, a result that is no tensor
        return None
    return frozenset(module for (module, _), gradient in zip(wanted, gradients, strict=True) if gradient is not None)


def _requiring_gradient(_module: nn.Module, _args: Any, output: Any) -> Any:
    return output.detach().requires_grad_(True).clone() if isinstance(output, torch.Tensor) else output


def _first_output(result: Any) -> Any:
    return result.logits if hasattr(result, "logits") else result[0]


def sees_later_tokens(model: nn.Module, candidates: Sequence[nn.Module], text_config: Any) -> bool:
    """True if what the model says of a token depends on tokens behind it: measured, where its parts do not deny it.

    Args:
        model: The model.
        candidates: Its linear maps.
        text_config: Configuration of its text model.
    """
    flags = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if flags and all(flags):
        return False
    try:
        with _trial(model, candidates, training=False):
            input_ids = _trial_tokens(model, text_config).repeat(2, 1)
            input_ids[1, -1] = input_ids[0, 0]
            with torch.no_grad():
                output = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
            logits = _first_output(output)[:, :-1]
            rounding = min(1000 * torch.finfo(logits.dtype).eps, 0.02) * logits.abs().max()
            return bool((logits[0] - logits[1]).abs().max() > rounding)
    except Exception:  # without contents, or a foreign forward: nothing was measured
        return False


def modules_after(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that begin only when the last of the layers has ended, with all inside them: final norm and head.

    Seen in a forward over a few tokens; none where it could not run. What is inside a module that runs before counts
    as after only if it runs by itself: a tied weight stays where the embedding has it.
    """
    begun: list[int] = []
    ends: list[int] = []
    handles = [m.register_forward_pre_hook(lambda module, _args: begun.append(id(module))) for m in model.modules()]
    handles += [m.register_forward_hook(lambda *_: ends.append(len(begun))) for m in layers]
    try:
        with _trial(model, (), training=False), torch.no_grad():
            input_ids = _trial_tokens(model, None)
            model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    except Exception:  # whatever a foreign forward raises: nothing was shown
        return []
    finally:
        for handle in handles:
            handle.remove()
    early = set(begun[: ends[-1]]) if ends else set(begun)
    late = {id(inner) for m in model.modules() if id(m) in {*begun} - early for inner in m.modules()}
    return [module for module in model.modules() if id(module) in late - early]


def _trial_tokens(model: nn.Module, text_config: Any) -> torch.Tensor:
    """A row of different token ids, (1, TRIAL_TOKENS), where the input embedding lies."""
    weight = embedding_of(model).weight
    vocab_size = int(getattr(text_config, "vocab_size", 0) or weight.shape[0])
    return (torch.arange(TRIAL_TOKENS, device=input_device(model)) % vocab_size).unsqueeze(0)


@contextlib.contextmanager
def _trial(model: nn.Module, candidates: Sequence[nn.Module], *, training: bool) -> Iterator[None]:
    """Run in one mode; flags, buffers and random generators are put back afterwards.

    Matrices that linear maps keep as buffers are packed weights, which no forward writes to: they are not copied.
    """
    modes = [(module, module.training) for module in model.modules()]
    packed = {id(buffer) for module in candidates for buffer in module.buffers() if buffer.ndim > 1}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in packed]
    devices = [device for device in [embedding_of(model).weight.device] if device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=devices), gradients_kept(model):
            model.train(training)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
