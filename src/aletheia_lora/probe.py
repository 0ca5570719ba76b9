"""A model and a few batches of the user's own data -> gradient statistics per weight, in one backward per batch.

``gradient_watch.py`` measures; here the batches run, in one process or shared out over several, and the model is left
as it was.
"""

from __future__ import annotations

import contextlib
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .anatomy import ModelAnatomy, anatomy
from .data import as_batches
from .errors import ProbeError
from .gradient_watch import GradientWatch, measured_by_autograd
from .layers import embedding_of, layer_blocks
from .loss import labelled_loss, num_labelled
from .placement import check_placement, in_memory, input_device
from .probe_result import Mode, ProbeResult, StepTiming, merged
from .processes import check_same, digest, gather, is_main, is_sharded, rank, together, world_size
from .quantized import check_gradients_pass, gradients_kept
from .routing import Routing
from .stopwatch import Stopwatch

LossFunction = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
TIMED_RUNS = 3


def gradient_probe(
    model: nn.Module,
    dataset: Any,
    num_layers: int | None = None,
    probe_batches: int = 5,
    chunk_size: int = 8,
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype = torch.float16,
    seed: int = 42,
) -> ProbeResult:
    """Score every layer by its gradient norm on a few rows of tokenized data; the documented entry point.

    Draws ``probe_batches`` single rows and calls :func:`probe` with exact gradients, whose float32 norms are those of
    the public package. (The Gram form is nearer to float64: torch's norm of a large float32 tensor with outliers is
    off by up to 1e-4.) The loss is the one that training will use: labels as given; without labels every token but
    padding.

    Args:
        model: Causal language model on its device. Left exactly as found.
        dataset: Rows with ``input_ids`` and, if given, ``attention_mask`` and ``labels`` (lists or tensors).
        num_layers: May be left out. If given it must be the model's own number of layers.
        probe_batches: Rows to draw.
        chunk_size: Accepted for compatibility. One pass measures all layers, so it changes nothing.
        device: Where to put the batches; the model's own device if left out.
        compute_dtype: Autocast dtype, used on CUDA only.
        seed: Seed of the draw; the same rows as a shuffled ``DataLoader`` with this generator.

    Returns:
        A mapping ``layer_idx -> score`` that also carries the statistics.

    Raises:
        ValueError: If a count is not positive, or ``num_layers`` is not the model's.
        ProbeError: If a gradient or the loss is NaN or infinite, or nothing carries a label.
    """
    for name, value in (("num_layers", num_layers), ("probe_batches", probe_batches), ("chunk_size", chunk_size)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}={value}, expected a positive number.")
    found = together(lambda: anatomy(model), "looking at the model")
    if num_layers is not None and num_layers != found.num_layers:
        raise ValueError(
            f"num_layers={num_layers}, but {found.architecture} has {found.num_layers} layers. Leave it out."
        )
    batches = together(lambda: as_batches(dataset, num_batches=probe_batches, seed=seed), "drawing batches")
    target = torch.device(device) if device is not None else input_device(model)

    def loss_fn(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.autocast("cuda", dtype=compute_dtype, enabled=target.type == "cuda"):
            return labelled_loss(model, batch)

    return probe(model, batches, mode="exact", loss_fn=loss_fn, anatomy_=found, device=target)


def probe(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    mode: Mode = "auto",
    taylor: bool = False,
    descent: bool = False,
    kernels: bool = False,
    loss_fn: LossFunction = labelled_loss,
    device: torch.device | None = None,
    anatomy_: ModelAnatomy | None = None,
    names: Mapping[str, str] | None = None,
    progress: bool = False,
) -> ProbeResult:
    """Measure the gradient norm of every weight in every layer, one forward and backward per batch.

    Dropout is off, no gradient is kept, and the model (flags, gradients, hooks, train mode) and the random number
    generators are exactly as found afterwards, also when the forward raises.

    In a ``torch.distributed`` group every process has to call this with the same model and batches. They share the
    batches out, and all return one result, that of a single process.

    Args:
        model: Causal language model, in any weight format whose linear maps run as modules; whole on every process.
        batches: Each with ``input_ids``, ``attention_mask`` and ``labels`` of shape (batch, T).
        mode: ``exact`` forms each weight gradient and drops it; ``gram`` never forms one; ``auto`` takes the cheaper
            for each weight: Gram while T * (in / u + out) < in * out, where u maps read the same input. Quantized
            weights are measured in the Gram form in every mode: their gradient would be many times their size.
        taylor: Also measure sum |weight * gradient|, which needs the gradient and so implies ``exact``.
        descent: Also measure what an adapter on each linear map could do at once (``TensorStatistics.descent``).
        kernels: Also measure how the layers' gradients on different batches go together (``ProbeResult.kernels``).
        loss_fn: ``(model, batch) -> scalar loss``; the mean next-token loss over labelled tokens if left out.
        device: Where to put the batches; the model's own device if left out.
        anatomy_: The model's anatomy, if at hand.
        names: For a model that carries adapters: path of each module of its own -> its name in the anatomy
            (``adapter.own_modules``). The gradients are those of its own weights, in the function that model and
            adapters compute together; the adapters' weights are not measured.
        progress: Show a progress bar.

    Raises:
        ValueError: If ``mode`` is unknown or there are no batches.
        UnsupportedModelError: If no gradient passes a linear map (its kernel, or how it is packed, is for inference),
            or weights are on the meta device, or on several devices without a device map, or with ``kernels`` a layer
            has no linear map.
        ProbeError: If a batch has no labels, or a loss or gradient is NaN or infinite (names layer and batch), or the
            weights are sharded over processes.
        ProcessError: If the processes of a group hold different models, batches or devices.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}, expected one of {get_args(Mode)}.")
    if not batches:
        raise ValueError("no batches to probe, expected at least one.")
    _check_whole(model)
    check_placement(model)
    check_gradients_pass(model)
    found = anatomy_ if anatomy_ is not None else together(lambda: anatomy(model), "looking at the model")
    target = device if device is not None else input_device(model)

    def held() -> dict[str, object]:
        return {
            "model": found.fingerprint,
            "weights": digest(model.named_parameters(), most=64),
            "batches": digest((name, tensor) for batch in batches for name, tensor in sorted(batch.items())),
            "kind of device": target.type,
            "mode": (mode, taylor, descent, kernels),
        }

    check_same(held, "Load one model, and draw the same rows with the same seed, on every process.")
    share = list(enumerate(batches))[rank() :: world_size()]

    def measure() -> tuple[ProbeResult, dict[str, Tensor], list[Tensor]]:
        shown = tqdm(share, desc="probing", unit="batch", disable=not (progress and is_main()))
        return _measured(model, shown, found, target, mode, taylor, descent, kernels, loss_fn, names)

    parts, sums, sketches = zip(*gather(measure, "probing"), strict=True)
    result = _with_descents(merged(parts), sums) if descent else merged(parts)
    return _with_kernels(result, sketches) if kernels else result


def timed_step(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    loss_fn: LossFunction = labelled_loss,
    seconds: float = 1.0,
) -> StepTiming | None:
    """Where the time of forward and backward on a batch as training sees it goes; no weight gets a gradient.

    The batch runs until ``seconds`` are over, at most :data:`TIMED_RUNS` times. The model is left as found.

    Args:
        model: Causal language model.
        batch: ``input_ids``, ``attention_mask`` and ``labels`` of shape (batch, T).
        loss_fn: As for :func:`probe`.
        seconds: About how long this may take, once the batch ran.

    Returns:
        The seconds of each run, or None where they cannot be told: without a label or, with a warning, where a whole
        batch does not run (on a GPU it may not fit).
    """
    if not num_labelled(batch):
        return None
    target = input_device(model)
    on_device = {key: value.to(target) for key, value in batch.items()}
    with _left_as_found(model), contextlib.ExitStack() as hooks:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        hooks.callback(embedding_of(model).register_forward_hook(_begins_a_graph).remove)
        hooks.callback((clock := Stopwatch(model, target)).close)
        ends = time.perf_counter() + seconds
        try:
            while len(clock.batches) < TIMED_RUNS and (not clock.batches or time.perf_counter() < ends):
                _forward_backward(model, on_device, loss_fn, clock)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(
                f"a batch of {tuple(batch['input_ids'].shape)} tokens could not be timed, so predicted seconds stand "
                f"on the probe's small ones and may be a third too high: {reason}",
                stacklevel=2,
            )
            return None
        return clock.timing()


def _begins_a_graph(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_(True).clone()  # a copy, for models that scale it in place


def _with_descents(result: ProbeResult, sums: Sequence[Mapping[str, Tensor]]) -> ProbeResult:
    """The result with ``descent`` of each tensor from the processes' sums of adapter gradients."""
    totals: dict[str, Tensor] = {}
    for name, gradient in (item for part in sums for item in part.items()):
        totals[name] = totals[name] + gradient if name in totals else gradient
    descents = {name: float(total.abs().sum()) / result.num_batches for name, total in totals.items()}
    return replace(
        result, tensors=tuple(replace(tensor, descent=descents.get(tensor.name)) for tensor in result.tensors)
    )


def _with_kernels(result: ProbeResult, parts: Sequence[Sequence[Tensor]]) -> ProbeResult:
    """The result with its layers' kernels, from each process's sketches of its batches, (num_layers, size, size)."""
    batches = [parts[batch % len(parts)][batch // len(parts)] for batch in range(result.num_batches)]
    rows_LBS = torch.stack(batches, dim=1).flatten(2).double()
    kernels: list[list[list[float]]] = (rows_LBS @ rows_LBS.mT).tolist()
    return replace(result, kernels=tuple(tuple(map(tuple, kernel)) for kernel in kernels))


def _measured(
    model: nn.Module,
    share: Iterable[tuple[int, Mapping[str, Tensor]]],
    found: ModelAnatomy,
    target: torch.device,
    mode: Mode,
    taylor: bool,
    descent: bool,
    kernels: bool,
    loss_fn: LossFunction,
    names: Mapping[str, str] | None,
) -> tuple[ProbeResult, dict[str, Tensor], list[Tensor]]:
    """The result of some of the batches, each with its number; of none, if this process has none.

    Beside it, where asked for and on the CPU: the adapters' gradients, sums over these batches; and for each batch the
    sketched gradients of the layers.
    """
    started = time.perf_counter()
    memory = _MemoryPeak(target)
    seen: list[Mapping[str, Tensor]] = []
    losses: list[float] = []
    with _left_as_found(model), in_memory(measured_by_autograd(model, found, names)):
        with contextlib.ExitStack() as hooks:
            hooks.callback((clock := Stopwatch(model, target)).close)
            hooks.callback((routing := Routing(model, found)).close)
            watch = GradientWatch(model, found, "exact" if taylor else mode, taylor, descent, kernels, clock, names)
            hooks.callback(watch.close)
            for index, batch in share:
                on_device = {key: value.to(target) for key, value in batch.items()}
                losses.append(_run(model, on_device, index, loss_fn, clock))
                watch.end_of_batch(index)
                routing.end_of_batch()
                seen.append(batch)
        tensors = watch.statistics()
    result = ProbeResult(
        fingerprint=found.fingerprint,
        num_layers=found.num_layers,
        tensors=tensors,
        losses=tuple(losses),
        num_tokens=tuple(int(batch.get("attention_mask", batch["input_ids"] + 1).count_nonzero()) for batch in seen),
        num_labelled_tokens=tuple(int(num_labelled(batch)) for batch in seen),
        batch_size=max((batch["input_ids"].shape[0] for batch in seen), default=0),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=memory.peak_bytes(),
        mode=mode,
        timing=clock.timing(),
        expert_loads=routing.loads(),
    )
    return result, {name: total.cpu() for name, total in watch.adapter_gradients.items()}, watch.sketches


def _check_whole(model: nn.Module) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ProbeError("got a DistributedDataParallel model, expected the model inside it: probe model.module.")
    sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if sharded:
        raise ProbeError(
            f"{len(sharded)} weights are sharded over processes, e.g. {sharded[0]}, and the probe needs them whole. "
            "Probe before the model is sharded, or in one process with device_map, and train by the saved plan."
        )


def _run(model: nn.Module, batch: Mapping[str, Tensor], index: int, loss_fn: LossFunction, clock: Stopwatch) -> float:
    """Forward and backward of one batch, timed; its loss. The graph is gone when this returns."""
    if not num_labelled(batch):
        raise ProbeError(f"batch {index} has no labelled token, so no gradient. Check the labels of its rows.")

    def check(loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            layer = _first_bad_layer(model, batch, loss_fn)
            raise ProbeError(f"the loss is {float(loss.detach())} on batch {index}; {layer}. It is never made a score.")
        if not loss.requires_grad:
            raise ProbeError(
                f"no gradient leads from the loss on batch {index} to any layer: the layers of {type(model).__name__} "
                "run outside autograd while their weights are frozen (reversible layers do), so LoRA cannot train it."
            )

    return _forward_backward(model, batch, loss_fn, clock, check)


def _forward_backward(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    loss_fn: LossFunction,
    clock: Stopwatch,
    check: Callable[[Tensor], None] = lambda loss: None,
) -> float:
    """Both passes of one batch on the clock, ``check`` between them; its loss."""
    with torch.enable_grad():
        clock.start()
        loss = loss_fn(model, batch)
        check(loss)
        clock.turn()
        loss.backward()
        clock.stop(batch)
    return float(loss.detach())


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Run in eval mode with empty gradients; put flags, modes, gradients and random state back afterwards."""
    # By name: where weights are offloaded, every forward puts new parameters into the modules.
    found = [(m, name, p.requires_grad, p.grad) for m in model.modules() for name, p in m.named_parameters("", False)]
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), gradients_kept(model):
        try:
            model.zero_grad(set_to_none=True)
            model.eval()
            yield
        finally:
            for module, name, flag, gradient in found:
                parameter = module.get_parameter(name)
                parameter.requires_grad_(flag)
                parameter.grad = gradient
            for module, training in modes:
                module.training = training


def _first_bad_layer(model: nn.Module, batch: Mapping[str, Tensor], loss_fn: LossFunction) -> str:
    """Which layer first puts out a number that is not finite, in words."""
    bad: list[int] = []

    def look(layer_idx: int) -> Callable[..., None]:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple | list) else output
            if isinstance(hidden, Tensor) and not bool(torch.isfinite(hidden).all()):
                bad.append(layer_idx)

        return after

    handles = [
        block.register_forward_hook(look(index)) for index, part in enumerate(layer_blocks(model)) for block in part
    ]
    try:
        with torch.no_grad():
            loss_fn(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return (
        f"layer {min(bad)} is the first to put out a number that is not finite"
        if bad
        else "every layer's output is finite"
    )


class _MemoryPeak:
    """Highest memory since construction, above that at construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            # Writing 5 resets the high-water mark of this process's resident set (Linux, proc(5)).
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as stream:
                stream.write("5")
            self.before = _resident_bytes("VmRSS") or 0

    def peak_bytes(self) -> int | None:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device)) - self.before
        peak = _resident_bytes("VmHWM")
        return None if peak is None else max(peak - self.before, 0)


def _resident_bytes(field: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            match = re.search(rf"^{field}:\s+(\d+) kB", stream.read(), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) * 1024 if match else None


def _extract_layer_idx(name: str, max_layers: int) -> int | None:
    """Layer number in a parameter name (``...layers.5...``, ``...h.5...``), or None; kept for callers of 0.1.

    Names are a guess; :func:`aletheia_lora.anatomy.anatomy` reads the structure and is what the probe uses.
    """
    match = re.search(r"\.(?:layers|h|block|blocks)\.(\d+)\.", name)
    layer_idx = int(match.group(1)) if match else max_layers
    return layer_idx if layer_idx < max_layers else None
