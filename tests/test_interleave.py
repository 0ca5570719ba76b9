import time

import pytest
import torch

from aletheia_lora.training.interleave import Turn, take_turns
from aletheia_lora.training.random_state import random_state_kept


def test_runs_take_turns_step_by_step_and_shorter_runs_leave():
    order = []

    def run(name, steps):
        def work(turn: Turn):
            turn.begin()
            for step in range(steps):
                order.append((name, step))
                turn.end_of_step()

        return work

    assert take_turns([run("a", 3), run("b", 1), run("c", 2)]) == [None, None, None]
    assert order == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]


def test_each_run_has_random_numbers_of_its_own_and_the_caller_keeps_its_own():
    def draws(others):
        found = []

        def work(turn: Turn):
            turn.begin()
            torch.manual_seed(7)
            for _ in range(3):
                found.append(float(torch.rand(())))
                turn.end_of_step()

        def noise(turn: Turn):
            turn.begin()
            for _ in range(3):
                torch.rand(5)
                turn.end_of_step()

        take_turns([work, *[noise] * others])
        return found

    before = torch.get_rng_state()
    assert draws(0) == draws(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def gpus(monkeypatch):
    """The states of two generators on GPUs that are not there."""
    states = [torch.tensor([1]), torch.tensor([2])]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in states])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda new: states.__setitem__(slice(None), new))
    return states


def test_the_generators_of_gpus_are_kept_too(gpus):
    found = []

    def run(first):
        def work(turn: Turn):
            turn.begin()
            gpus[1] = torch.tensor([first])
            for _ in range(2):
                turn.end_of_step()
                found.append(int(gpus[1]))
                gpus[1] = gpus[1] + 1

        return work

    assert take_turns([run(10), run(20)]) == [None, None]
    assert found == [10, 20, 11, 21]
    with pytest.raises(KeyError), random_state_kept():
        gpus[0] = torch.tensor([7])
        raise KeyError
    assert [int(state) for state in gpus] == [1, 2]


def test_a_clock_ticks_in_its_own_turns_only():
    seconds = {}

    def run(name, nap, pause=0.0):
        def work(turn: Turn):
            turn.begin()
            for _ in range(2):
                time.sleep(nap)
                turn.pause()
                time.sleep(pause)
                turn.resume()
                turn.end_of_step()
            seconds[name] = turn.seconds

        return work

    take_turns([run("slow", 0.05), run("fast", 0.0, pause=0.05)])
    assert seconds["slow"] >= 0.1
    assert seconds["fast"] < 0.05


def test_a_run_that_fails_is_reported_and_the_others_go_on():
    done = []

    def good(turn: Turn):
        turn.begin()
        for _ in range(3):
            turn.end_of_step()
        done.append(True)

    def bad(turn: Turn):
        turn.begin()
        turn.end_of_step()
        raise ValueError("broken")

    errors = take_turns([bad, good])
    assert isinstance(errors[0], ValueError) and errors[1] is None and done == [True]


def test_an_interruption_ends_every_run_and_is_raised():
    stopped = []

    def endless(turn: Turn):
        turn.begin()
        try:
            while True:
                turn.end_of_step()
        finally:
            stopped.append(True)

    def interrupted(turn: Turn):
        turn.begin()
        turn.end_of_step()
        raise KeyboardInterrupt

    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        take_turns([endless, interrupted, endless])
    assert stopped == [True, True]
    assert torch.equal(torch.get_rng_state(), before)
