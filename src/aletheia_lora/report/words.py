"""Numbers and names -> the words that tables, figures and page share.

Comes in: a value of a record, or None. Goes out: text that is safe to print (control characters are visible) and
honest about what is missing (an en dash with the reason, never a 0).
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

DASH = "–"
EQUAL_SHARE = 0.0005
"""Two losses closer than this share of the older one print as equal: below what three decimals show."""

_NAMED_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def known(value: object) -> float | None:
    """The number, or None where there is none: missing, null, NaN, infinite, or not a number at all."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def visible(value: object) -> str:
    r"""The text on one line, with control, format and surrogate characters spelled out (``\x1b``, ``\u202e``)."""
    text = str(value)
    return text if text.isprintable() else "".join(map(_visible_character, text))


def unknown(reason: str) -> str:
    """How a missing value prints: an en dash and why."""
    return f"{DASH} ({reason})"


def significant(value: float, digits: int = 3) -> str:
    """``value`` to three significant digits without an exponent: ``0.0812``, ``1.39``, ``12.3``, ``1,234``."""
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(decimals, 0), 9)}f}"


def duration(seconds: float | None, reason: str = "not measured") -> str:
    """Seconds in words of a fitting size: ``0.812 s``, ``58.2 s``, ``12.4 min``, ``3.10 h``."""
    if seconds is None:
        return unknown(reason)
    if seconds < 600:
        return f"{significant(seconds)} s"
    return f"{significant(seconds / 60)} min" if seconds < 7200 else f"{significant(seconds / 3600)} h"


def percent(share: float | None, reason: str = "not known") -> str:
    """A share as a percentage without decimals: ``61 %``."""
    return unknown(reason) if share is None else f"{100 * share:.0f} %"


def loss_text(loss: float | None, reason: str = "not measured") -> str:
    """A loss to three decimals."""
    return unknown(reason) if loss is None else f"{loss:.3f}"


def loss_difference(loss: float, reference: float) -> str:
    """How far ``loss`` lies from ``reference``, in words: ``1.1 % worse``, ``0.4 % better``, ``equal``."""
    if reference == 0:
        return "worse" if loss > 0 else "equal"
    share = loss / reference - 1
    if abs(share) < EQUAL_SHARE:
        return f"equal within {100 * EQUAL_SHARE:g} %"
    return f"{100 * abs(share):.1f} % {'worse' if share > 0 else 'better'}"


def speed_text(ratio: float) -> str:
    """A ratio of seconds in words: ``1.71x faster``, ``1.20x slower``, ``equally fast``."""
    if f"{ratio:.2f}" == "1.00":
        return "equally fast"
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"


def layer_ranges(layers: Sequence[int]) -> str:
    """Layer numbers as runs: ``0–3, 7, 19–29``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def _visible_character(character: str) -> str:
    if unicodedata.category(character) not in _INVISIBLE:
        return character
    code = ord(character)
    width, letter = (2, "x") if code < 0x100 else (4, "u") if code < 0x10000 else (8, "U")
    return _NAMED_ESCAPES.get(character) or f"\\{letter}{code:0{width}x}"
