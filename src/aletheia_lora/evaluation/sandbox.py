"""A CodeProblem and a generated program -> a Verdict, with the program shut in a box.

Comes in: trusted tests and untrusted text. Goes out: whether the tests passed, or the reason why not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import SandboxError
from .code_problem import CodeProblem

__all__ = ["CodeProblem", "Sandbox", "Verdict"]

Mode = Literal["split", "shared"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What became of one program."""

    passed: bool
    reason: str
    """``passed``, or one word for why not."""
    detail: str = ""
    """The error or exit code behind the reason."""
    mode: Mode
    """``split``: the program never shared an interpreter with its test. ``shared``: it did, so the verdict is
    forgeable by a program written to do so."""
    seconds: float
    """Wall time of the whole run, box included."""
    output_tail: str
    """The end of what the program printed."""


class Sandbox:
    """Runs generated programs in boxes made by bubblewrap; refuses where it cannot contain them."""

    def __init__(self, *, bwrap: Path | None = None, mode: Mode = "split") -> None:
        self.bwrap = bwrap
        self.mode = mode

    def check_self(self) -> dict[str, str]:
        """Attack a box in about 15 ways, in a few seconds; to be called before anything is generated.

        Returns:
            Each attack and how it was stopped.

        Raises:
            SandboxError: If bubblewrap is missing or broken, or an attack got through. Nothing may be run then.
        """
        raise SandboxError("this sandbox has no box yet.")

    def run(self, problem: CodeProblem, completion: str) -> Verdict:
        """Test one program: the problem's prompt, continued by ``completion``.

        Raises:
            SandboxError: If the box cannot be made. A program that fails is a verdict, never an error.
        """
        raise SandboxError("this sandbox has no box yet.")

    def run_all(self, programs: Iterable[tuple[CodeProblem, str]], *, workers: int = 2) -> list[Verdict]:
        """Test several programs, ``workers`` at a time; the verdicts come in the order of the programs."""
        raise SandboxError("this sandbox has no box yet.")
