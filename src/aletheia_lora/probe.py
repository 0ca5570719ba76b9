"""A model and a few batches of the user's own data -> gradient statistics per weight, in one backward per batch.

No gradient of a weight matrix outlives the moment it is measured. For a linear map with inputs X (T x in) and output
gradients G (T x out) the gradient is G^T X, and its norm needs no gradient at all (the Gram form):

    ||G^T X||_F^2 = sum((X X^T) * (G G^T))

which is cheaper while T is small, and works on quantized weights as they are. Everything that is not a linear map
(norms, biases, stacked experts) is measured by autograd, tensor by tensor, and dropped at once.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .anatomy import ModelAnatomy, anatomy, is_quantized, linear_shape
from .data import as_batches
from .errors import ProbeError
from .layers import check_placement, layer_blocks
from .loss import full_precision, labelled_loss, num_labelled
from .probe_result import Method, ProbeResult, TensorStatistics
from .routing import Routing
from .stopwatch import Stopwatch

Mode = Literal["auto", "exact", "gram"]
LossFunction = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


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
    found = anatomy(model)
    if num_layers is not None and num_layers != found.num_layers:
        raise ValueError(
            f"num_layers={num_layers}, but {found.architecture} has {found.num_layers} layers. Leave it out."
        )
    batches = as_batches(dataset, num_batches=probe_batches, seed=seed)
    target = torch.device(device) if device is not None else next(model.parameters()).device

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
    loss_fn: LossFunction = labelled_loss,
    device: torch.device | None = None,
    anatomy_: ModelAnatomy | None = None,
    progress: bool = False,
) -> ProbeResult:
    """Measure the gradient norm of every weight in every layer, one forward and backward per batch.

    Dropout is off, no gradient is kept, and the model (flags, gradients, hooks, train mode) and the random number
    generators are exactly as found afterwards, also when the forward raises.

    Args:
        model: Causal language model, in any weight format whose linear maps run as modules.
        batches: Each with ``input_ids``, ``attention_mask`` and ``labels`` of shape (batch, T).
        mode: ``exact`` forms each weight gradient and drops it; ``gram`` never forms one; ``auto`` takes the cheaper
            for each weight: Gram while T * (in / u + out) < in * out, where u maps read the same input.
        taylor: Also measure sum |weight * gradient|, which needs the gradient and so implies ``exact``.
        loss_fn: ``(model, batch) -> scalar loss``; the mean next-token loss over labelled tokens if left out.
        device: Where to put the batches; the model's own device if left out.
        anatomy_: The model's anatomy, if at hand.
        progress: Show a progress bar.

    Raises:
        ValueError: If ``mode`` is unknown or there are no batches.
        ProbeError: If a batch has no labels, or a loss or gradient is NaN or infinite (names layer and batch).
        UnsupportedModelError: If weights are on the meta device, or on several devices without a device map.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}, expected one of {get_args(Mode)}.")
    if not batches:
        raise ValueError("no batches to probe, expected at least one.")
    check_placement(model)
    found = anatomy_ if anatomy_ is not None else anatomy(model)
    target = device if device is not None else next(model.parameters()).device
    started = time.perf_counter()
    memory = _MemoryPeak(target)
    losses: list[float] = []
    with _left_as_found(model):
        clock = Stopwatch(model, target)
        routing = Routing(model, found)
        watch = _Watch(model, found, "exact" if taylor else mode, taylor, clock)
        try:
            for index, batch in enumerate(tqdm(batches, desc="probing", unit="batch", disable=not progress)):
                on_device = {key: value.to(target) for key, value in batch.items()}
                losses.append(_run(model, on_device, index, loss_fn, clock))
                watch.end_of_batch(index)
                routing.end_of_batch()
        finally:
            watch.close()
            routing.close()
            clock.close()
        tensors = watch.statistics()
    return ProbeResult(
        fingerprint=found.fingerprint,
        num_layers=found.num_layers,
        tensors=tensors,
        losses=tuple(losses),
        num_tokens=tuple(int(batch.get("attention_mask", batch["input_ids"] + 1).count_nonzero()) for batch in batches),
        num_labelled_tokens=tuple(int(num_labelled(batch)) for batch in batches),
        batch_size=max(batch["input_ids"].shape[0] for batch in batches),
        seconds=time.perf_counter() - started,
        peak_memory_bytes=memory.peak_bytes(),
        mode=mode,
        timing=clock.timing(),
        expert_loads=routing.loads(),
    )


def _run(model: nn.Module, batch: Mapping[str, Tensor], index: int, loss_fn: LossFunction, clock: Stopwatch) -> float:
    """Forward and backward of one batch, timed; its loss. The graph is gone when this returns."""
    if not num_labelled(batch):
        raise ProbeError(f"batch {index} has no labelled token, so no gradient. Check the labels of its rows.")
    with torch.enable_grad():
        clock.start()
        loss = loss_fn(model, batch)
        if not bool(torch.isfinite(loss)):
            layer = _first_bad_layer(model, batch, loss_fn)
            raise ProbeError(f"the loss is {float(loss.detach())} on batch {index}; {layer}. It is never made a score.")
        if not loss.requires_grad:
            raise ProbeError(
                f"no gradient leads from the loss on batch {index} to any layer: the layers of {type(model).__name__} "
                "run outside autograd while their weights are frozen (reversible layers do), so LoRA cannot train it."
            )
        clock.turn()
        loss.backward()
        clock.stop(batch)
    return float(loss.detach())


class _Watch:
    """The hooks of one probe: which tensor is measured how, and the norms as they come in."""

    def __init__(self, model: nn.Module, found: ModelAnatomy, mode: Mode, taylor: bool, clock: Stopwatch) -> None:
        self.mode, self.taylor, self.clock = mode, taylor, clock
        self.device_type = next(model.parameters()).device.type
        self.handles: list[Any] = []
        self.kinds: dict[str, str] = {module.name: module.kind for module in found.modules}
        self.stacks = {module.name for module in found.modules if module.storage == "stacked"}
        self.squares: dict[str, float] = {}
        """Squared norm of each tensor in the batch under way."""
        self.norms: dict[str, list[float]] = {}
        self.taylors: dict[str, list[float]] = {}
        self.experts: dict[str, Tensor] = {}
        """Norm of each expert's gradient in a stack, summed over the batches so far."""
        self.owners: dict[str, tuple[int, int, Method, float | None]] = {}
        """name -> (layer, weights, method, norm of the weight)."""
        self.linears: dict[str, nn.Module] = {}
        self.calls: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        """Inputs and output gradients of each linear map's calls in the batch under way."""
        self.input_grams: dict[int, tuple[Tensor, Tensor]] = {}
        self.input_users: dict[int, int] = {}
        self.in_backward = False
        adaptable = set(self.kinds)
        for item in found.left_out:
            if item.reason == "router":
                self.kinds[item.name] = self.kinds[f"{item.name}.weight"] = "router"
        names = {id(module): name for name, module in model.named_modules()}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer_idx, block in enumerate(layer_blocks(model)):
            for module in (module for part in block for module in part.modules()):
                name = names[id(module)]
                hooked = name in adaptable and linear_shape(module) is not None
                if hooked:
                    self._watch_linear(name, module, layer_idx)
                for leaf, parameter in module.named_parameters(recurse=False):
                    if not (hooked and leaf == "weight") and parameter.is_floating_point():
                        self._watch_parameter(f"{name}.{leaf}", parameter, layer_idx)

    # --- linear maps -------------------------------------------------------------------------------------------

    def _watch_linear(self, name: str, module: nn.Module, layer_idx: int) -> None:
        shape = linear_shape(module)
        assert shape is not None
        self.linears[name] = module
        norm = None if is_quantized(module) else float(full_precision(torch.as_tensor(module.weight).detach()).norm())
        self.owners[name] = (layer_idx, shape[0] * shape[1], "formed", norm)

        def after_forward(owner: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            calls = self.calls.setdefault(name, [])
            if self.in_backward and calls:  # a checkpoint recomputes: the first call already has its hook
                return None
            if not output.requires_grad:
                output.requires_grad_(True)
            position, key = len(calls), id(args[0])
            calls.append((args[0].detach(), None))
            self.input_users[key] = self.input_users.get(key, 0) + 1

            def with_gradient(gradient: Tensor) -> None:  # lives as long as the graph: it must not hold the inputs
                self.in_backward = True
                calls[position] = (calls[position][0], gradient)
                if all(grad is not None for _, grad in calls):
                    self._measure(name, owner, key)

            output.register_hook(with_gradient)
            return output

        self.handles.append(module.register_forward_hook(after_forward))

    def _measure(self, name: str, module: nn.Module, input_key: int) -> None:
        """Norm of d(loss)/d(weight) from all calls of one linear map, then forget them."""
        with self.clock.paused(), torch.autocast(self.device_type, enabled=False):
            self._measure_in_full_precision(name, module, input_key)

    def _measure_in_full_precision(self, name: str, module: nn.Module, input_key: int) -> None:
        calls = self.calls[name]
        layer_idx, num_params, _, norm = self.owners[name]
        shape = linear_shape(module)
        assert shape is not None
        in_features, out_features = shape
        num_rows = sum(inputs.numel() // in_features for inputs, _ in calls)
        users = self.input_users.get(input_key, 1) if len(calls) == 1 else 1
        cheaper = num_rows * (in_features / users + out_features) < in_features * out_features
        use_gram = self.mode == "gram" or (self.mode == "auto" and cheaper)
        x_TI = _stacked([inputs for inputs, _ in calls], in_features)
        g_TO = _stacked([gradient for _, gradient in calls if gradient is not None], out_features)
        if use_gram:
            gram_TT = self._input_gram(x_TI, calls[0][0], input_key if users > 1 else None)
            self.squares[name] = max(float(torch.dot(gram_TT.flatten(), (g_TO @ g_TO.T).flatten())), 0.0)
        else:
            grad_OI = g_TO.T @ x_TI
            self.squares[name] = float(grad_OI.norm()) ** 2
            if self.taylor and norm is not None:
                weight = torch.as_tensor(module.weight).detach()
                weight_OI = weight if weight.shape == grad_OI.shape else weight.T
                self.taylors.setdefault(name, []).append(float((grad_OI * weight_OI).abs().sum()))
        self.owners[name] = (layer_idx, num_params, "gram" if use_gram else "formed", norm)
        calls.clear()

    def _input_gram(self, x_TI: Tensor, inputs: Tensor, key: int | None) -> Tensor:
        """X X^T, computed once for all maps that read the same input (query, key and value; gate and up)."""
        if key is None:
            return x_TI @ x_TI.T
        kept = self.input_grams.get(key)
        if kept is None or kept[0].data_ptr() != inputs.data_ptr():
            self.input_grams.clear()
            kept = (inputs, x_TI @ x_TI.T)
            self.input_grams[key] = kept
        return kept[1]

    # --- everything else -----------------------------------------------------------------------------------------

    def _watch_parameter(self, name: str, parameter: nn.Parameter, layer_idx: int) -> None:
        if parameter.requires_grad:  # tied to a layer that is watched already
            return
        self.owners[name] = (layer_idx, parameter.numel(), "autograd", float(full_precision(parameter.detach()).norm()))
        parameter.requires_grad_(True)

        def after_accumulation(leaf: Tensor) -> None:
            assert leaf.grad is not None
            with self.clock.paused():
                gradient = full_precision(leaf.grad)
                self.squares[name] = float(gradient.norm()) ** 2
                if name in self.stacks:
                    norms_E = gradient.flatten(1).norm(dim=1)
                    self.experts[name] = self.experts[name] + norms_E if name in self.experts else norms_E
                if self.taylor:
                    self.taylors.setdefault(name, []).append(float((leaf.grad * leaf.detach()).float().abs().sum()))
                leaf.grad = None

        self.handles.append(parameter.register_post_accumulate_grad_hook(after_accumulation))

    # --- the record ----------------------------------------------------------------------------------------------

    def end_of_batch(self, index: int) -> None:
        """Move the batch's norms to the record; a tensor that the loss does not reach counts as zero.

        Raises:
            ProbeError: If a norm is NaN or infinite, or every one is zero.
        """
        for name, calls in self.calls.items():  # some calls of a map may not reach the loss: their gradient is zero
            calls[:] = [call for call in calls if call[1] is not None]
            if calls:
                self._measure(name, self.linears[name], 0)
        for name, (layer_idx, *_) in self.owners.items():
            square = self.squares.get(name, 0.0)
            if not square < float("inf"):
                raise ProbeError(
                    f"the gradient of {name} (layer {layer_idx}) is not finite on batch {index}. It is never made a "
                    "score; look at that row, or probe in bfloat16 or float32."
                )
            self.norms.setdefault(name, []).append(square**0.5)
        if not any(self.squares.values()):
            raise ProbeError(f"batch {index} gave no gradient in any layer: the loss does not depend on the layers.")
        self.squares.clear()
        self.calls.clear()
        self.input_grams.clear()
        self.input_users.clear()
        self.in_backward = False

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def statistics(self) -> tuple[TensorStatistics, ...]:
        """One record per tensor, in the order of depth."""
        records = [
            TensorStatistics(
                name=name,
                layer_idx=layer_idx,
                kind=self.kinds.get(name, "other"),
                num_params=num_params,
                method=method,
                grad_norm=tuple(self.norms[name]),
                taylor=tuple(self.taylors[name]) if len(self.taylors.get(name, ())) == len(self.norms[name]) else None,
                weight_norm=norm,
                expert_grad_norm=tuple(self.experts[name].tolist()) if name in self.experts else None,
            )
            for name, (layer_idx, num_params, method, norm) in self.owners.items()
        ]
        return tuple(sorted(records, key=lambda record: record.layer_idx))


def _stacked(tensors: Sequence[Tensor], features: int) -> Tensor:
    """All rows of the tensors, (rows, features), in float32 or better; no copy where there is one such tensor."""
    flat = [full_precision(tensor.reshape(-1, features)) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Run in eval mode with empty gradients; put flags, modes, gradients and random state back afterwards."""
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for parameter in parameters:
                parameter.grad = None
            model.eval()
            yield
        finally:
            for parameter, flag, gradient in zip(parameters, flags, gradients, strict=True):
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
