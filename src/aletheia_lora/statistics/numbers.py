"""Lists of numbers -> checked arrays.

Comes in: what a caller has measured, pair by pair. Goes out: arrays of finite numbers, or an error that says which
number is none, which list is too short, and what to do.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]
Numbers = Sequence[float] | Floats
Groups = Sequence[Hashable] | npt.NDArray[Any]


def finite(name: str, values: Numbers) -> Floats:
    """The numbers as float64, shape (n,), n at least 1.

    Raises:
        ValueError: If there are none, or one is NaN or infinite.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"{name} of shape {numbers.shape}, expected a list of at least one number.")
    broken = np.flatnonzero(~np.isfinite(numbers))
    if len(broken):
        raise ValueError(
            f"{name}[{broken[0]}] is {numbers[broken[0]]} ({len(broken)} of {len(numbers)} are no finite number). "
            "Leave out the pairs of a failed measurement and say how many are left."
        )
    return numbers


def pairs(values: Numbers, references: Numbers) -> tuple[Floats, Floats]:
    """Both lists, checked, of one length.

    Raises:
        ValueError: If a list is empty, holds what is no finite number, or is longer than the other.
    """
    first, second = finite("values", values), finite("references", references)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} numbers against {len(second)}, expected pairs. Match them by run or item.")
    return first, second


def binary_pairs(values: Numbers, references: Numbers) -> tuple[Floats, Floats]:
    """Both lists, checked, of zeros and ones.

    Raises:
        ValueError: As :func:`pairs`, and if a number is neither 0 nor 1.
    """
    first, second = pairs(values, references)
    odd = [numbers[(numbers != 0) & (numbers != 1)] for numbers in (first, second)]
    if len(odd[0]) or len(odd[1]):
        raise ValueError(
            f"a score of {(*odd[0], *odd[1])[0]:g}, expected 1 (right) or 0 (wrong). Treat such scores as any number."
        )
    return first, second


def group_codes(groups: Groups | None, num_pairs: int) -> Codes:
    """0, 1, ... for each pair, by its group in order of appearance; None: every pair by itself.

    Raises:
        ValueError: If there is not one group per pair.
    """
    if groups is None:
        return np.arange(num_pairs)
    if len(groups) != num_pairs:
        raise ValueError(f"{len(groups)} groups for {num_pairs} pairs, expected one for each.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.intp)


def at_least_two(count: int, what: str) -> None:
    """Refuse what cannot say anything about its own spread.

    Raises:
        ValueError: If ``count`` is below 2.
    """
    if count < 2:
        raise ValueError(f"n = {count}: no interval from one {what}. Show the number itself, or measure more {what}s.")
