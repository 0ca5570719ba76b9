"""What happens around each step of a run in a comparison: its clock, its evaluations, its turn, its end."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from ..loss import heldout_loss
from ..training.interleave import Turn
from ..training.truncation import backward_depth
from .arms import Arm


class Watch(TrainerCallback):
    """Times each step by the run's own clock, evaluates beside it, and hands the turn on."""

    def __init__(
        self,
        arm: Arm,
        turn: Turn,
        adapted: PeftModel,
        held_out: list[dict[str, Tensor]],
        evaluations: int,
        say: Callable[[str], None],
    ) -> None:
        self.arm, self.turn, self.adapted = arm, turn, adapted
        self.held_out, self.evaluations, self.say = held_out, evaluations, say
        self.reached: list[int] = []
        self.depth: Any = None
        self.before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock of the first step starts here: building a trainer is not a training step."""
        self.depth = backward_depth(self.adapted.get_base_model())
        self.reached = self.depth.__enter__()
        self._hand_on()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step's seconds, evaluate if due, and let the others have their step."""
        self.turn.pause()
        self.arm.step_seconds.append(self.turn.seconds - self.before)
        self.turn.resume()
        if self.depth is not None:
            self.depth.__exit__(None, None, None)
            self.depth = None
        if self.arm.pace is not None:
            self._hand_on()
        if is_over(self.arm):
            control.should_training_stop = True
        if self.arm.full and self._evaluation_is_due():
            self.turn.pause()
            loss = heldout_loss(self.adapted, self.held_out)
            step, seconds = state.global_step, self.arm.total_seconds
            self.arm.heldout.append({"step": step, "seconds": seconds, "loss": loss})
            self.say(f"{self.arm.name}: step {step}, {seconds:.0f} s, held-out loss {loss:.4f}")
            self.turn.resume()
        if self.arm.pace is None:
            self._hand_on()

    def _evaluation_is_due(self) -> bool:
        return progress(self.arm) >= (len(self.arm.heldout) + 1) / self.evaluations or is_over(self.arm)

    def _hand_on(self) -> None:
        """Hand the turn on; a run that keeps pace with another waits while it is ahead and goes on while it is not."""
        pace = self.arm.pace
        if pace is None:
            self.turn.end_of_step()
        while pace is not None and not pace.ended and self.arm.total_seconds >= pace.total_seconds:
            self.turn.end_of_step()
        self.before = self.turn.elapsed


class Pace(TrainerCallback):
    """The learning rate of a run that ends by the clock: linear decay over the time it has, not over its steps."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rate of this update."""
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = args.learning_rate * max(1 - progress(self.arm), 0.0)


def progress(arm: Arm) -> float:
    """How much of its run an arm has behind it, 0 to 1: by steps, or by the seconds that its pacemaker will take."""
    if arm.pace is None:
        return len(arm.step_seconds) / arm.steps
    done = len(arm.pace.step_seconds)
    allowed = arm.pace.total_seconds * arm.pace.steps / done if done else float("inf")
    return min(arm.total_seconds / allowed, 1.0)


def is_over(arm: Arm) -> bool:
    """True when the run has had its steps, or another one would take it past its time."""
    if arm.pace is None:
        return len(arm.step_seconds) >= arm.steps
    next_step = median(arm.step_seconds[1:] or arm.step_seconds)
    return arm.pace.ended and arm.total_seconds + next_step > arm.pace.total_seconds
