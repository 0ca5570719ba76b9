"""Several training runs in one process that take turns, step by step, so that all meet the same machine.

A machine speeds up and slows down over minutes; runs timed one after the other compare the minutes, not the methods.
Here each run is a real trainer, and only the run whose turn it is works. A run's clock ticks during its own turns
only, evaluation excluded, and its random numbers are its own. Runs are greenlets of one thread and not threads: each
thread would get memory of its own from the C allocator, and seven runs would hold seven peaks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from greenlet import getcurrent, greenlet

from .random_state import random_state_kept, set_torch_random_state, torch_random_state


class Turn:
    """One run's seat at the table: its clock, its random state, and the way to hand the turn on."""

    def __init__(self, table: greenlet) -> None:
        self._table = table
        self._random_state: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._since = 0.0
        self.seconds = 0.0
        """Wall seconds of this run's own turns so far, pauses excluded."""

    def begin(self) -> None:
        """Take the turn: the clock runs, and random numbers go on where this run left them."""
        if self._random_state is not None:
            set_torch_random_state(self._random_state)
        self.resume()

    def end_of_step(self) -> None:
        """Hand the turn on, and go on from here when it comes back."""
        self.pause()
        self._random_state = torch_random_state()
        self._table.switch()
        self.begin()

    def pause(self) -> None:
        """Stop the clock, e.g. for an evaluation that is not part of training."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._since

    @property
    def elapsed(self) -> float:
        """Seconds of this run's own turns up to this moment; its clock must be running."""
        return self.seconds + time.perf_counter() - self._since

    def resume(self) -> None:
        """Let the clock run on."""
        self._since = time.perf_counter()


def take_turns(runs: Sequence[Callable[[Turn], None]]) -> list[Exception | None]:
    """Run all of them, one step of each in turn, and return each one's error (None where it ended well).

    Each run calls ``turn.begin()`` before it works and ``turn.end_of_step()`` after each step. A run that fails leaves
    the table; the others go on. Ctrl-C ends all of them, their ``finally`` blocks included, and is raised again.

    Args:
        runs: One callable per run, which is given its :class:`Turn`.
    """
    errors: list[Exception | None] = [None] * len(runs)
    table = getcurrent()
    seats = [greenlet(run) for run in runs]
    with random_state_kept():
        try:
            for position, seat in enumerate(seats):
                _one_step(seat, errors, position, Turn(table))
            while not all(seat.dead for seat in seats):
                for position, seat in enumerate(seats):
                    if not seat.dead:
                        _one_step(seat, errors, position)
        finally:
            for seat in seats:
                if not seat.dead:
                    seat.throw()
    return errors


def _one_step(seat: greenlet, errors: list[Exception | None], position: int, *turn: Turn) -> None:
    """Let one run work until it hands the turn on or ends; an error of its own is kept as its outcome."""
    try:
        seat.switch(*turn)
    except Exception as error:
        errors[position] = error
