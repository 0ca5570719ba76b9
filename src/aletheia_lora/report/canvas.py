"""What all figures share: one style, a frame with the finding on top, labels that do not overlap, PNG bytes.

The style is our own, whatever the user's matplotlibrc says, and pyplot is not imported. Text is drawn as it is:
no mathematics, no TeX, and a box for what the font lacks.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from matplotlib import ft2font, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont

# Blue, vermilion and grey of Okabe and Ito, "Color Universal Design": told apart by every common kind of colour vision.
ROLE_COLOURS = {"selected": "#0072b2", "uniform": "#5a6570", "control": "#d55e00"}
INK, MUTED, RULE = "#1b1f24", "#5a6570", "#dfe3e8"

DPI = 144
WIDTH = 7.4
MARGIN = 0.14
"""Of titles, in inches."""
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 12.5, 10.0, 9.0
TITLE_CHARACTERS, SUBTITLE_CHARACTERS, LABEL_CHARACTERS = 72, 110, 23
"""Characters that fit on a line of each kind of text."""
LINE_HEIGHT, LINE_SPACING = 1.32, 1.2
"""Height of a line over its font size; and what matplotlib calls the same, over the font's own height."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": TEXT_SIZE,
    "text.parse_math": False,
    "text.usetex": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True, slots=True)
class EndLabel:
    """Text beside the axes that belongs to one point in them."""

    x: float
    y: float
    text: str
    colour: str
    bold: bool = False


@contextmanager
def canvas(title: str, subtitle: str, *, body: float, left: float, right: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure with its title and subtitle above one set of axes; all sizes in inches.

    Args:
        title: The finding, in words.
        subtitle: How to read the figure; may be empty.
        body: Height of the axes; the figure grows with its title.
        left: Room for the axis labels.
        right: Room for labels beside the axes.
    """
    heading, note = _balanced(drawable(title), TITLE_CHARACTERS), _balanced(drawable(subtitle), SUBTITLE_CHARACTERS)
    heading_height, note_height = _text_height(heading, TITLE_SIZE), _text_height(note, SMALL_SIZE)
    bottom = 0.62
    height = MARGIN + heading_height + 0.04 + note_height + 0.16 + body + bottom
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes((left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, body / height))
        place: dict[str, Any] = {"va": "top", "ha": "left", "linespacing": LINE_SPACING}
        figure.text(MARGIN / WIDTH, 1 - MARGIN / height, heading, fontsize=TITLE_SIZE, weight="bold", **place)
        below = 1 - (MARGIN + heading_height + 0.04) / height
        figure.text(MARGIN / WIDTH, below, note, fontsize=SMALL_SIZE, color=MUTED, **place)
        yield figure, axes


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def empty(figure: Figure, axes: Axes, reason: str) -> bytes:
    """A figure that says why it shows nothing."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, reason, ha="center", va="center", color=MUTED, transform=axes.transAxes)
    return png(figure)


def label_ends(figure: Figure, axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Write each label to the right of the axes at the height of its point, moved only as far as overlap demands."""
    line = SMALL_SIZE * LINE_HEIGHT / (figure.get_figheight() * 72 * axes.get_position().height)
    bottom, top = axes.get_ylim()
    order = sorted(labels, key=lambda label: (label.y, -label.x))
    heights = [(label.text.count("\n") + 1.55) * line for label in order]
    centres = spread([(label.y - bottom) / (top - bottom) for label in order], heights)
    for label, centre in zip(order, centres, strict=True):
        axes.annotate(
            drawable(label.text),
            xy=(label.x, label.y),
            xytext=(1.035, centre),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            ha="left",
            color=label.colour,
            fontsize=SMALL_SIZE,
            weight="bold" if label.bold else "normal",
            linespacing=LINE_SPACING,
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "linewidth": 0.8,
                "alpha": 0.6,
                "shrinkA": 2,
                "shrinkB": 5,
                "relpos": (0, 0.5),
            },
        )


def spread(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Centres near the wanted ones whose boxes of these heights do not overlap, within 0 to 1 if they fit.

    Args:
        wanted: In ascending order.
        heights: One for each.
    """
    centres = list(wanted)
    floor = 0.0
    for index, height in enumerate(heights):
        centres[index] = max(centres[index], floor + height / 2)
        floor = centres[index] + height / 2
    ceiling = 1.0
    for index in reversed(range(len(heights))):
        centres[index] = min(centres[index], ceiling - heights[index] / 2)
        ceiling = centres[index] - heights[index] / 2
    return centres


def beside(axes: Axes, x: float, y: float, text: str, *, weight: str = "normal", colour: str = INK) -> None:
    """Text to the right of a point."""
    axes.annotate(
        drawable(text),
        xy=(x, y),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        weight=weight,
        annotation_clip=False,
    )


def wrapped(text: str, width: int = LABEL_CHARACTERS) -> str:
    """A label in at most three lines."""
    return "\n".join(textwrap.wrap(text, width, max_lines=3, placeholder=" …")) or "–"


def shortened(text: str, limit: int) -> str:
    """The text cut at ``limit`` characters, an ellipsis in the place of the rest."""
    return text if len(text) <= limit else f"{text[: limit - 2].rstrip(' ,')} …"


def drawable(text: str) -> str:
    """The text with a box for every character the font lacks; a warning per glyph would help nobody."""
    return "".join(character if character == "\n" or ord(character) in _glyphs() else "□" for character in text)


def _balanced(text: str, width: int) -> str:
    """The text in as few lines as ``width`` allows, of about equal length."""
    lines = textwrap.wrap(text, width)
    for narrower in range(width - 1, 0, -1):
        tried = textwrap.wrap(text, narrower)
        if len(tried) > len(lines):
            break
        lines = tried
    return "\n".join(lines)


def _text_height(text: str, size: float) -> float:
    return (text.count("\n") + 1) * size * LINE_HEIGHT / 72 if text else 0.0


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(ft2font.FT2Font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())
