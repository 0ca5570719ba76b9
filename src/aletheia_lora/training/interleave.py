"""Several training runs in one process that take turns, step by step, so that all meet the same machine.

A machine speeds up and slows down over minutes; runs timed one after the other compare the minutes, not the methods.
Here each run is a real trainer in a thread of its own, but only the run whose turn it is works. A run's clock ticks
during its own turns only, evaluation excluded, and its random numbers are its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch


class Cancelled(BaseException):
    """Raised inside a run when another run failed or the user pressed Ctrl-C."""


class Turn:
    """One run's view of the table: whose turn it is, and this run's clock."""

    def __init__(self, table: _Table, position: int) -> None:
        """Take a seat."""
        self._table, self._position = table, position
        self._random_state: torch.Tensor | None = None
        self._since = 0.0
        self.seconds = 0.0
        """Wall seconds of this run's own turns so far, pauses excluded."""

    def begin(self) -> None:
        """Wait for this run's turn and start its clock."""
        self._table.wait_for(self._position)
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
        self.resume()

    def end_of_step(self) -> None:
        """Hand the turn on and wait for the next one."""
        self.pause()
        self._random_state = torch.get_rng_state()
        self._table.pass_on(self._position)
        self.begin()

    def pause(self) -> None:
        """Stop the clock, e.g. for an evaluation that is not part of training."""
        self.seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """Let the clock run on."""
        self._since = time.perf_counter()


class _Table:
    def __init__(self, count: int) -> None:
        self.condition = threading.Condition()
        self.waiting = list(range(count))
        self.current = 0
        self.cancelled = False

    def wait_for(self, position: int) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.cancelled or self.current == position)
            if self.cancelled:
                raise Cancelled

    def pass_on(self, position: int, *, leave: bool = False) -> None:
        with self.condition:
            place = self.waiting.index(position)
            following = self.waiting[(place + 1) % len(self.waiting)]
            if leave:
                self.waiting.remove(position)
            self.current = following
            self.condition.notify_all()

    def cancel(self) -> None:
        with self.condition:
            self.cancelled = True
            self.condition.notify_all()


def take_turns(runs: Sequence[Callable[[Turn], None]]) -> list[Exception | None]:
    """Run all of them, one step of each in turn, and return each one's error (None where it ended well).

    Each run calls ``turn.begin()`` before it works and ``turn.end_of_step()`` after each step. A run that fails leaves
    the table; the others go on. Ctrl-C stops all at their next step and is raised again.

    Args:
        runs: One callable per run, which is given its :class:`Turn`.
    """
    table = _Table(len(runs))
    errors: list[Exception | None] = [None] * len(runs)
    random_state = torch.get_rng_state()

    def work(position: int) -> None:
        try:
            runs[position](Turn(table, position))
        except Cancelled:
            pass
        except Exception as error:  # kept as this run's outcome; the others go on
            errors[position] = error
        finally:
            with table.condition:
                table.condition.wait_for(lambda: table.cancelled or table.current == position)
            if not table.cancelled:
                table.pass_on(position, leave=True)

    threads = [threading.Thread(target=work, args=(position,), daemon=True) for position in range(len(runs))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(timeout=0.2)
    except BaseException:
        table.cancel()
        for thread in threads:
            thread.join(timeout=60)
        raise
    finally:
        torch.set_rng_state(random_state)
    return errors
