"""The caller's random state, kept: trainers seed every generator there is."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def torch_random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The states of torch's generators: the CPU's, and one for each GPU once CUDA is in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_torch_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    """Put back what :func:`torch_random_state` gave."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the generators of torch (CPU and GPUs), NumPy and Python back as they were, also on failure."""
    state = torch_random_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        set_torch_random_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
