"""Kernels of layers -> how alike the layers' gradients are, and the choice of high scores among layers that differ.

Two layers are redundant if their gradients say the same about the rows: if the batches that pull one the same way, and
those that pull it different ways, do so with the other, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import ProbeError
from .probe_result import Kernel

FEWEST_BATCHES = 3
"""With two, every centred kernel is a multiple of the same one."""
ROUNDING = 1e-12
"""So near to 1 a similarity is 1: what is left of it is rounding, and would break ties."""


def similarities(kernels: Sequence[Kernel]) -> NDArray[np.float64]:
    """How alike the kernels are, pair by pair: 1 for one that is a multiple of the other, up to a constant; at least 0.

    The centred alignment of Cortes, Mohri and Rostamizadeh, "Algorithms for Learning Kernels Based on Centered
    Alignment" (JMLR 13, 2012): <H K H, H L H> / (||H K H|| ||H L H||) with H = I - 1/n. Kornblith et al., arXiv
    1905.00414, compare layers by it, as linear CKA, with kernels of activations; ours are of gradients.

    Args:
        kernels: Of each layer, shape (num_batches, num_batches): :attr:`ProbeResult.kernels`.

    Returns:
        Shape (num_layers, num_layers).

    Raises:
        ProbeError: If there are fewer than three batches, or a layer's gradient is the same on all of them.
    """
    table = np.asarray(kernels, dtype=np.float64)
    if table.shape[1] < FEWEST_BATCHES:
        raise ProbeError(
            f"the probe read {table.shape[1]} batches, expected at least {FEWEST_BATCHES}: with fewer the gradients of "
            "all layers look alike. Raise probe_batches, or give more rows to probe."
        )
    centred = table - table.mean(axis=1, keepdims=True) - table.mean(axis=2, keepdims=True)
    centred += table.mean(axis=(1, 2), keepdims=True)
    norms = np.linalg.norm(centred, axis=(1, 2))
    constant = np.flatnonzero(norms <= ROUNDING * np.linalg.norm(table, axis=(1, 2)))
    if constant.size:
        raise ProbeError(
            f"the gradient of layer {constant[0]} is the same on all {table.shape[1]} batches, so it has no likeness "
            "to that of other layers. Probe rows that differ, or choose by a strategy that does not compare layers, "
            "e.g. spread."
        )
    units = (centred / norms[:, None, None]).reshape(len(table), -1)
    alike = np.maximum(units @ units.T, 0.0)
    return np.where(alike > 1 - ROUNDING, 1.0, alike)


def greedy(scores: Mapping[int, float], alike: NDArray[np.float64], count: int) -> list[int]:
    """The best score first; then, one by one, the best score * (1 - its largest similarity to a layer chosen before).

    Args:
        scores: ``{layer_idx: score}`` of every layer, at least 0.
        alike: Similarity of layers in the order of depth, (num_layers, num_layers), 0 to 1.
        count: Layers to choose.

    Returns:
        The chosen layers in ascending order; of equal ones the lower was taken.
    """
    layers = sorted(scores)
    worth = np.array([scores[layer] for layer in layers])
    free, redundancy = np.ones(len(layers), dtype=bool), np.zeros(len(layers))
    for _ in range(count):
        best = int(np.argmax(np.where(free, worth * (1 - redundancy), -1.0)))
        free[best] = False
        redundancy = np.maximum(redundancy, alike[best])
    return [layer for layer, is_free in zip(layers, free, strict=True) if not is_free]
