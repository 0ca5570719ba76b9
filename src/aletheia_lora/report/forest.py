"""Means with their intervals -> one figure of points and whiskers, grouped under headings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .canvas import INK, MUTED, RULE, SMALL_SIZE, beside, canvas, drawable, empty, png, wrapped
from .words import known

MARGIN_COLOUR = "#e6eef5"
HEADING_HEIGHT, ROW_HEIGHT, GAP = 0.36, 0.30, 0.14
"""Inches of a heading, of a line below it, and between groups."""
LONGEST = 5.0
"""A whisker longer than so many usual ones is cut at the edge: it would flatten all others."""


@dataclass(frozen=True)
class Line:
    """One point with its whiskers."""

    name: str
    found: Mapping[str, Any] | None
    """``mean``, ``low``, ``high``, ``n``, and ``equivalence`` with ``low`` and ``high``; None: there is none."""
    colour: str
    text: str
    bold: bool = False
    hollow: bool = False


Block = tuple[tuple[str, str], Sequence[Line]]
"""Heading, a note beside it, and the lines below."""


def forest(
    title: str,
    subtitle: str,
    blocks: Sequence[Block],
    words: str,
    *,
    margin: float | None = None,
    centre: float = 0.0,
    nothing: str = "No benchmark was evaluated.",
    absent: str = "not evaluated",
) -> bytes:
    """Points with whiskers, grouped under headings.

    Args:
        title: The finding, in words.
        subtitle: How to read the figure.
        blocks: The groups.
        words: Label of the axis.
        margin: Shaded on both sides of ``centre``.
        centre: Where there is no difference.
        nothing: What the figure says if there are no blocks.
        absent: What a line without a mean says.
    """
    height = sum(HEADING_HEIGHT + ROW_HEIGHT * len(lines) + GAP for _, lines in blocks)
    with canvas(title, subtitle, body=max(height, 1.2), left=2.1, right=1.0) as (figure, axes):
        if not blocks:
            return empty(figure, axes, nothing)
        axes.set_ylim(-height, 0)
        limits = _limits([line for _, lines in blocks for line in lines], centre, margin or 0.0)
        if margin is not None:
            axes.axvspan(centre - margin, centre + margin, color=MARGIN_COLOUR, linewidth=0, zorder=0)
        axes.axvline(centre, color=INK, linewidth=1)
        centres, names = [], []
        y = 0.0
        for (heading, note), lines in blocks:
            y -= HEADING_HEIGHT / 2 + GAP / 2
            _write_heading(axes, y, heading, note)
            y -= HEADING_HEIGHT / 2
            for line in lines:
                _draw_line(axes, y - ROW_HEIGHT / 2, line, limits, centre, absent)
                centres.append(y - ROW_HEIGHT / 2)
                names.append(drawable(wrapped(line.name, 30)))
                y -= ROW_HEIGHT
            y -= GAP / 2
        axes.set_xlim(*limits)
        axes.set_yticks(centres, names)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        axes.set_xlabel(words)
        axes.grid(axis="x")
        return png(figure)


def _limits(lines: Sequence[Line], centre: float, margin: float) -> tuple[float, float]:
    """Limits that hold every point, and every whisker but those far longer than usual."""
    means, whiskers = [0.0], []
    for line in lines:
        mean, low, high = (known((line.found or {}).get(key)) for key in ("mean", "low", "high"))
        if mean is not None:
            means.append(mean - centre)
            if low is not None and high is not None:
                whiskers += [(low - centre, mean - low), (high - centre, high - mean)]
    usual = LONGEST * median(length for _, length in whiskers) if whiskers else 0.0
    ends = [end for end, length in whiskers if length <= usual]
    lowest, highest = min([*means, *ends, -margin]), max([*means, *ends, margin])
    reach = max(-lowest, highest) or 1.0
    return centre + min(lowest, -0.35 * reach) - 0.05 * reach, centre + max(highest, 0.35 * reach) + 0.05 * reach


def _write_heading(axes: Axes, y: float, heading: str, note: str) -> None:
    place = axes.get_yaxis_transform()
    axes.axhline(y + HEADING_HEIGHT / 2, xmin=-2, color=RULE, linewidth=0.8, clip_on=False)
    axes.annotate(
        drawable(heading), (0, y), (-141, 0), place, "offset points", va="center", weight="bold", annotation_clip=False
    )
    axes.text(
        1.0,
        y,
        drawable(note),
        transform=place,
        va="center",
        ha="right",
        color=MUTED,
        fontsize=SMALL_SIZE,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
    )


def _draw_line(axes: Axes, y: float, line: Line, limits: tuple[float, float], centre: float, absent: str) -> None:
    mean = known((line.found or {}).get("mean"))
    if line.found is None or mean is None:
        beside(axes, centre, y, absent, colour=MUTED)
        return
    low, high = known(line.found.get("low")), known(line.found.get("high"))
    if low is not None and high is not None:
        axes.plot([low, high], [y, y], color=line.colour, linewidth=1.3, zorder=3, solid_capstyle="butt")
        for end in (low, high):
            axes.plot([end, end], [y - 0.05, y + 0.05], color=line.colour, linewidth=1.3, zorder=3)
    inner = line.found.get("equivalence") or {}
    if known(inner.get("low")) is not None:
        axes.plot([inner["low"], inner["high"]], [y, y], color=line.colour, linewidth=4, zorder=3, alpha=0.55)
    face = "white" if line.hollow else line.colour
    axes.plot(mean, y, "o", color=line.colour, markerfacecolor=face, markersize=7, zorder=4)
    text = line.text if low is not None else f"{line.text}  (n = {line.found.get('n', 0)})"
    right = min(mean if high is None else max(high, mean), limits[1])
    beside(axes, right, y, text, weight="bold" if line.bold else "normal")
