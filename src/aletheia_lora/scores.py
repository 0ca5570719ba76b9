"""A probe's statistics -> one score per layer; the higher, the more the layer is worth adapting.

Comes in: a :class:`ProbeResult` (and for the data-free control the model). Goes out: ``{layer_idx: score}``. Reading
:data:`SCORES` is reading the table of scores; the last two entries do not look at the data and serve as controls.

"Adaptable" below means the tensors that an adapter can sit on; norms, biases and routers are not. A layer that has
none scores 0 everywhere but in ``gradient_norm`` and ``random``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .anatomy import ModuleAnatomy, anatomy
from .errors import ProbeError, nearest
from .probe_result import ProbeResult, TensorStatistics

# For normally distributed numbers the distance between the quartiles is 1.349 standard deviations.
QUARTILE_DISTANCE = 1.349


class ScoreFunction(Protocol):
    """The one shape of every score."""

    def __call__(
        self, probe: ProbeResult, *, model: nn.Module | None = None, rng: np.random.Generator | None = None
    ) -> dict[int, float]:
        """Score every layer of the probed model."""


def layer_scores(
    name: str, probe: ProbeResult, *, model: nn.Module | None = None, rng: np.random.Generator | None = None
) -> dict[int, float]:
    """Score every layer by the function of this name in :data:`SCORES`.

    Args:
        name: A key of :data:`SCORES`.
        probe: What the probe measured.
        model: The probed model; only ``weight_snr`` reads it.
        rng: Source of randomness; only ``random`` draws from it.

    Raises:
        ValueError: If no score has this name, or the score needs ``model`` or ``rng`` and got none.
        ProbeError: If a layer's score is not a finite number, or the probe lacks what the score is made of.
    """
    if name not in SCORES:
        raise ValueError(f"unknown score {name!r}. {nearest(name, SCORES)}")
    scores = SCORES[name](probe, model=model, rng=rng)
    for layer_idx, score in scores.items():
        if not math.isfinite(score):
            raise ProbeError(
                f"layer {layer_idx}: the {name} score is {score}, expected a finite number. "
                "Look for a NaN or infinite gradient in the probe, or probe in float32."
            )
    return scores


def gradient_norm(
    probe: ProbeResult, *, model: nn.Module | None = None, rng: np.random.Generator | None = None
) -> dict[int, float]:
    """The paper's score: sum over batches and over all tensors of the layer of ||dLoss/dp||_2.

    Saket, "Aletheia", arXiv 2604.15351, the layer score. Norms, biases and routers count, as they do there.
    """
    return dict(probe)


def gradient_norm_rms(
    probe: ProbeResult, *, model: nn.Module | None = None, rng: np.random.Generator | None = None
) -> dict[int, float]:
    """Root mean square gradient entry: sqrt(sum of ||dW||^2 / (parameters * batches)), adaptable tensors only.

    A plain norm grows with the width of a layer; this one lets wide and narrow layers compare.
    """
    squares, params = dict.fromkeys(probe, 0.0), dict.fromkeys(probe, 0)
    for tensor in _adaptable(probe):
        squares[tensor.layer_idx] += _sum_of_squares(tensor)
        params[tensor.layer_idx] += tensor.num_params
    return {
        layer: math.sqrt(squares[layer] / (params[layer] * probe.num_batches)) if params[layer] else 0.0
        for layer in probe
    }


def relative(
    probe: ProbeResult, *, model: nn.Module | None = None, rng: np.random.Generator | None = None
) -> dict[int, float]:
    """Gradient against weight: sum over batches and adaptable tensors of ||dW|| / ||W||.

    Raises:
        ProbeError: If the norm of a weight is unknown (quantized storage hides it) or 0; names the tensor.
    """

    def ratio(tensor: TensorStatistics) -> float:
        if tensor.weight_norm is None:
            raise ProbeError(
                f"{tensor.name} has no weight norm, which the relative score divides by: quantized storage hides it. "
                "Use gradient_norm or gradient_norm_rms, or probe the unquantized model."
            )
        if tensor.weight_norm == 0:
            raise ProbeError(f"{tensor.name} is all zeros, so ||dW|| / ||W|| has no value. Use gradient_norm.")
        return math.fsum(tensor.grad_norm) / tensor.weight_norm

    return _sum_over_adaptable(probe, ratio)


def fisher(
    probe: ProbeResult, *, model: nn.Module | None = None, rng: np.random.Generator | None = None
) -> dict[int, float]:
    """Sum over batches and adaptable tensors of ||dW||^2, the trace of the empirical Fisher information.

    Gradients are of a batch's mean token loss, not of single examples, so this is the batched estimate of the trace.
    """
    return _sum_over_adaptable(probe, _sum_of_squares)


def taylor(
    probe: ProbeResult, *, model: nn.Module | None = None, rng: np.random.Generator | None = None
) -> dict[int, float]:
    """Sum over batches and adaptable tensors of sum |W * dW|: the first-order change of the loss without each weight.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771), the first-order
    criterion, with the absolute value where they square.

    Raises:
        ProbeError: If the probe did not take the product of a tensor with its gradient; names the tensor.
    """

    def change(tensor: TensorStatistics) -> float:
        if tensor.taylor is None:
            raise ProbeError(
                f"{tensor.name} was measured without sum |weight * gradient|, which the taylor score is made of: "
                "probe again with taylor=True, which implies mode='exact'; quantized weights never have it."
            )
        return math.fsum(tensor.taylor)

    return _sum_over_adaptable(probe, change)


def adapter_descent(
    probe: ProbeResult, *, model: nn.Module | None = None, rng: np.random.Generator | None = None
) -> dict[int, float]:
    """What the first Adam step of fresh adapters lowers the loss by: sum over adaptable tensors of sum |dL/dB|.

    Ours. Adam's first step has the length of the learning rate in every entry of B, against the sign of its gradient,
    so to first order the loss falls by the learning rate times this sum. The gradient is the mean over all batches:
    what they do not agree on cancels, which no norm of single batches shows.

    Raises:
        ProbeError: If the probe did not take it of a tensor; names the tensor.
    """

    def change(tensor: TensorStatistics) -> float:
        if tensor.descent is None:
            raise ProbeError(
                f"{tensor.name} was measured without its adapter's gradient, which the adapter_descent score is made "
                "of: probe again with descent=True; stacked experts never have it."
            )
        return tensor.descent

    return _sum_over_adaptable(probe, change)


def weight_snr(
    probe: ProbeResult, *, model: nn.Module | None = None, rng: np.random.Generator | None = None
) -> dict[int, float]:
    """Data-free control: mean over the layer's matrices of the singular values' signal-to-noise ratio.

    Hartford et al. 2024, "Spectrum" (arXiv 2406.06623), pseudocode of section 4. Their estimate of the noise (quartile
    distance / 1.349) is kept as published, though singular values of noise are not normally distributed. They rank
    matrices of one type across layers; the mean over a layer's matrices is ours. Of a stack of experts, the mean.

    Raises:
        ValueError: If ``model`` is missing.
        ProbeError: If the model is not the probed one, or a weight is quantized, without data (meta device) or has no
            spread of singular values; names the tensor.
    """
    if model is None:
        raise ValueError("weight_snr reads the weights themselves: expected model, got None. Pass the probed one.")
    anatomy_of_model = anatomy(model)
    if anatomy_of_model.fingerprint != probe.fingerprint:
        raise ProbeError(
            f"the probe is of another model: its fingerprint is {probe.fingerprint}, that of the given "
            f"{anatomy_of_model.architecture} is {anatomy_of_model.fingerprint}. Pass the model that was probed."
        )
    scores = {}
    for layer in anatomy_of_model.layers:
        ratios = [_signal_to_noise(_plain_weight(model, module), module.name) for module in layer.modules]
        scores[layer.layer_idx] = math.fsum(ratios) / len(ratios) if ratios else 0.0
    return scores


def random(
    probe: ProbeResult, *, model: nn.Module | None = None, rng: np.random.Generator | None = None
) -> dict[int, float]:
    """Control without information: a uniform number in [0, 1) for each layer.

    Raises:
        ValueError: If ``rng`` is missing.
    """
    if rng is None:
        raise ValueError("the random score draws numbers: expected rng, got None. Pass np.random.default_rng(seed).")
    return {layer: float(rng.random()) for layer in probe}


SCORES: dict[str, ScoreFunction] = {
    "gradient_norm": gradient_norm,
    "gradient_norm_rms": gradient_norm_rms,
    "relative": relative,
    "fisher": fisher,
    "taylor": taylor,
    "adapter_descent": adapter_descent,
    "weight_snr": weight_snr,
    "random": random,
}


def _adaptable(probe: ProbeResult) -> Iterator[TensorStatistics]:
    return (tensor for tensor in probe.tensors if tensor.adaptable)


def _sum_over_adaptable(probe: ProbeResult, value: Callable[[TensorStatistics], float]) -> dict[int, float]:
    parts: dict[int, list[float]] = {layer: [] for layer in probe}
    for tensor in _adaptable(probe):
        parts[tensor.layer_idx].append(value(tensor))
    # An exact sum would refuse an infinity beside its negative; a plain one passes it on to the check for finiteness.
    return {layer: float(sum(values)) for layer, values in parts.items()}


def _sum_of_squares(tensor: TensorStatistics) -> float:
    return float(np.square(np.asarray(tensor.grad_norm, dtype=np.float64)).sum())


def _plain_weight(model: nn.Module, module: ModuleAnatomy) -> Tensor:
    """The weight as ordinary numbers, shape (rows, columns) or (experts, rows, columns)."""
    if module.storage == "quantized":
        raise ProbeError(
            f"{module.name} is stored quantized, so its singular values cannot be read. "
            "Use a gradient score, or pass the unquantized model."
        )
    name = module.name if module.storage == "stacked" else f"{module.name}.weight"
    weight = model.get_parameter(name)
    if weight.is_meta:
        raise ProbeError(f"{name} is on the meta device and has no values. Load the weights first.")
    return weight.detach().float()


def _signal_to_noise(weight: Tensor, name: str) -> float:
    """Sum of the singular values above the noise edge over the sum of the others.

    The edge is sigma * (1 + sqrt(short side / long side)), the Marchenko-Pastur edge. If no value lies below it, the
    ratio is of the sum to the edge.

    Args:
        weight: Shape (rows, columns), or (experts, rows, columns) for the mean over experts.
        name: Name of the weight, for errors.
    """
    if weight.ndim == 3:
        return math.fsum(_signal_to_noise(expert, name) for expert in weight) / len(weight)
    values = torch.linalg.svdvals(weight)
    sigma = (torch.quantile(values, 0.75) - torch.quantile(values, 0.25)) / QUARTILE_DISTANCE
    edge = float(sigma) * (1 + math.sqrt(min(weight.shape) / max(weight.shape)))
    if not edge > 0:
        raise ProbeError(f"{name}: the quartiles of its singular values coincide, so no noise edge can be placed.")
    above = float(values[values > edge].sum())
    below = float(values[values <= edge].sum())
    return above / below if below > 0 else above / edge
