"""Every error that is ours, in one tree.

Wrong input is a plain ``ValueError`` (or ``TypeError``) where Python already has the word for it. The
classes below are for what a caller may want to tell apart::

    AletheiaError
    ├── UnsupportedModelError   this model cannot be adapted layer by layer; the message says why
    ├── DataError               rows that cannot be read, tokenized or supervised
    ├── ProbeError              a measurement that cannot be trusted (a NaN, no labels, no gradient)
    ├── PlanError               a plan that does not fit the model, or ranks that do not fit the weights
    ├── AdapterError            an adapter folder that is broken, or belongs to another model
    ├── CensusError             the adapters found on the model are not the adapters of the plan
    ├── NonFiniteLossError      training met a NaN or infinite loss and stopped before the update
    ├── ProcessError            processes that work together differ, or another one of them failed
    ├── SandboxError            generated code cannot be contained here, so none of it is run
    ├── OutputError             a file or folder cannot be written
    ├── PrivacyError            what is about to leave this machine holds a path, a name or a key
    └── ConfigError             an unknown or ill-typed key in a configuration file or flag
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AletheiaError(Exception):
    """Base of every error raised by this package on purpose."""


class UnsupportedModelError(AletheiaError, NotImplementedError):
    """The model has no single stack of decoder layers that can be adapted."""


class DataError(AletheiaError, ValueError):
    """Rows that cannot be read, tokenized or supervised."""


class ProbeError(AletheiaError, ArithmeticError):
    """A probe measurement that cannot be trusted."""


class PlanError(AletheiaError, ValueError):
    """A plan, selection or rank that does not fit the model."""


class AdapterError(AletheiaError, ValueError):
    """An adapter folder that cannot be read, or does not belong to the model."""


class CensusError(AletheiaError, RuntimeError):
    """The adapters attached to the model differ from the plan."""


class NonFiniteLossError(AletheiaError, ArithmeticError):
    """A training loss that is NaN or infinite; no update was made from it."""


class ProcessError(AletheiaError, RuntimeError):
    """Processes that work together hold different things, or another one of them failed."""


class SandboxError(AletheiaError, RuntimeError):
    """Generated code cannot be contained on this machine; it is not run."""


class OutputError(AletheiaError, OSError):
    """A file or folder that cannot be written."""


class PrivacyError(AletheiaError, ValueError):
    """What is about to leave this machine holds something that must not; nothing left."""


class ConfigError(AletheiaError, ValueError):
    """An unknown or ill-typed configuration key."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the known word nearest to ``name``, or lists the known words."""
    words = sorted(str(word) for word in known)
    close = difflib.get_close_matches(name, words, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(words)}."
