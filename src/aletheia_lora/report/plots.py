"""A comparison record -> four PNG figures, each with its finding as the title.

Comes in: the dict of ``compare.json``, or bare probe scores. Goes out: PNG bytes, or files of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..files import write_bytes
from .canvas import (
    INK,
    LINE_SPACING,
    MUTED,
    ROLE_COLOURS,
    RULE,
    SMALL_SIZE,
    TEXT_SIZE,
    EndLabel,
    beside,
    canvas,
    drawable,
    empty,
    label_ends,
    png,
    shortened,
    wrapped,
)
from .tables import REFERENCE, SELECTED, Arm, Record, arm_number, arm_role, arm_title, failure, find_arm, probe_seconds
from .tables import step_speed as speed_of
from .words import duration, known, layer_ranges, percent, significant, visible

PLOTS = ("scores", "heldout", "step_time", "pareto")
GRADIENT_NORM = "gradient_norm"
"""The one score whose standard errors the probe knows."""

PASSED, UNTOUCHED = "#9aa7b4", "#dbe1e7"
"""Layers without an adapter: above the lowest adapted one, where backward passes through, and below it."""
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
MARKERS = "osD^v"

Point = tuple[float, float, int]
"""Predicted share of the time, share of the score, number of layers."""


def draw_plots(record: Record) -> dict[str, bytes]:
    """All figures of a comparison, by the names in :data:`PLOTS`."""
    return {
        "scores": plot_scores(record),
        "heldout": plot_heldout(record),
        "step_time": plot_step_time(record),
        "pareto": plot_pareto(record),
    }


def write_plots(record: Record, folder: Path) -> dict[str, Path]:
    """Write ``<name>.png`` for every figure into ``folder``, each whole or not at all.

    Raises:
        OutputError: If the folder cannot be written.
    """
    return {name: write_bytes(Path(folder) / f"{name}.png", image) for name, image in draw_plots(record).items()}


def plot_titles(record: Record) -> dict[str, str]:
    """The finding that each figure shows, in words: its title, and its alternative text."""
    return {
        "scores": _scores_title(record),
        "heldout": _heldout_title(record),
        "step_time": _step_time_title(record),
        "pareto": _pareto_title(record),
    }


# --- scores -----------------------------------------------------------------------------------------------------------


def plot_scores(record: Record) -> bytes:
    """Score of every layer with its standard error; the chosen layers, and where the backward pass stops."""
    probe, selection = record.get("probe") or {}, record.get("selection") or {}
    score = visible((record.get("settings") or {}).get("score") or GRADIENT_NORM)
    errors = (probe.get("standard_errors") or ()) if score == GRADIENT_NORM else ()
    num_batches = known(probe.get("num_batches"))
    whiskers = "No standard errors: they need two batches and the gradient norm as score."
    if any(known(error) is not None for error in errors):
        whiskers = "Whiskers: ±1 standard error" + (f" over {num_batches:.0f} batches." if num_batches else ".")
    strategy = f"Chosen by the strategy “{visible(selection['strategy'])}”. " if selection.get("strategy") else ""
    return plot_probe_scores(
        probe.get("scores") or (),
        errors,
        layers=selection.get("layers"),
        title=_scores_title(record),
        subtitle=strategy + whiskers,
        score=score,
    )


def plot_probe_scores(
    scores: Sequence[float | None],
    standard_errors: Sequence[float | None] | None = None,
    layers: Sequence[int] | None = None,
    title: str = "Score of each layer",
    *,
    subtitle: str = "",
    score: str = GRADIENT_NORM,
) -> bytes:
    """Bars of the layer scores; whiskers are standard errors.

    Args:
        scores: One score per layer; an unknown one leaves a gap that is marked with an en dash.
        standard_errors: As many, or none at all.
        layers: The chosen layers, drawn in colour, with a line where the backward pass stops. None: none chosen yet.
        title: The finding, in words.
        subtitle: One line below it.
        score: Name of the score, for the axis.
    """
    values = [known(value) for value in scores]
    errors = [known(error) for error in standard_errors or ()]
    errors += [None] * (len(values) - len(errors))
    chosen = set(layers or ())
    lowest = min(chosen, default=0)
    with canvas(title, subtitle, body=3.6, left=0.85, right=0.2) as (figure, axes):
        if not any(value is not None for value in values):
            return empty(figure, axes, "The record holds no scores.")
        for layer, (value, error) in enumerate(zip(values, errors, strict=False)):
            if value is None:
                axes.text(layer, 0, "–", ha="center", va="bottom", color=MUTED)
                continue
            colour = ROLE_COLOURS["selected"] if layer in chosen else UNTOUCHED if layer < lowest else PASSED
            axes.bar(layer, value, width=0.78, color=colour)
            if error is not None:
                axes.errorbar(layer, value, yerr=error, color=INK, linewidth=1.0 if len(values) <= 48 else 0.6)
        top = max((value or 0) + (error or 0) for value, error in zip(values, errors, strict=False)) or 1.0
        axes.set_ylim(0, top * (1.08 if layers is None else 1.30))
        axes.set_xlim(-0.7, len(values) - 0.3)
        if layers is not None:
            _mark_depth(axes, len(values), chosen)
        unit = "summed gradient norm" if score == GRADIENT_NORM else visible(score)
        axes.set_ylabel(drawable(f"layer score ({shortened(unit, 30)})"))
        axes.set_xlabel("layer index")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        return png(figure)


def _mark_depth(axes: Axes, num_layers: int, chosen: set[int]) -> None:
    """Say what the colours mean, and draw the line below which nothing needs a gradient."""
    lowest = min(chosen, default=0)
    num_passed = sum(layer > lowest and layer not in chosen for layer in range(num_layers))
    keys = [(f"{len(chosen)} adapted", ROLE_COLOURS["selected"])]
    if num_passed:
        keys.append((f"{num_passed} frozen, backward passes through", PASSED))
    if lowest:
        keys.append((f"{lowest} frozen, forward only", UNTOUCHED))
        axes.axvline(lowest - 0.5, ymax=0.86, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        inside = lowest > num_layers * 0.3
        axes.annotate(
            "backward stops here",
            xy=(lowest - 0.5, 0.83),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if inside else 6, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        )
    parts = []
    for words, colour in keys:
        parts.append(TextArea("■", textprops={"color": colour, "fontsize": TEXT_SIZE + 3}))
        parts.append(TextArea(f" {words}    ", textprops={"color": INK, "fontsize": SMALL_SIZE + 0.5}))
    line = HPacker(children=list(parts), align="center", pad=0, sep=1)
    axes.add_artist(AnchoredOffsetbox("upper left", child=line, frameon=False, pad=0, borderpad=0.1))


def _scores_title(record: Record) -> str:
    selection = record.get("selection") or {}
    layers = selection.get("layers") or ()
    share = known(selection.get("score_share"))
    if not layers:
        return "Score of each layer"
    held = "were chosen" if share is None else f"hold {percent(share)} of the score"
    return f"{len(layers)} of {visible(record.get('num_layers'))} layers ({shortened(layer_ranges(layers), 40)}) {held}"


# --- held-out loss ----------------------------------------------------------------------------------------------------


def plot_heldout(record: Record) -> bytes:
    """Held-out loss against training seconds, for every arm that was trained in full; the probe's time included."""
    arms = [arm for arm in _arms(record) if arm.get("full") and _heldout_points(arm)]
    lost = [arm_title(arm) for arm in _arms(record, failed=True) if arm.get("full", True)]
    subtitle = "Same rows, same order; lower is better. Where there was a probe, its time is included."
    subtitle += f" Failed, not drawn: {', '.join(lost)}." if lost else ""
    with canvas(_heldout_title(record), subtitle, body=max(3.9, 0.64 * len(arms)), left=0.85, right=2.15) as (
        figure,
        axes,
    ):
        if not arms:
            return empty(figure, axes, "No arm was trained in full.")
        base = known(record.get("base_heldout_loss"))
        scale, unit = _time_unit(max(_heldout_points(arm)[-1][0] for arm in arms))
        bottom, top = _loss_limits([loss for arm in arms for _, loss in _heldout_points(arm)], base)
        labels = []
        for arm, (colour, dashes, marker) in zip(arms, _looks(arms), strict=True):
            labels.append(_draw_curve(axes, arm, base, scale, colour, dashes, marker))
        axes.set_ylim(bottom, top)
        axes.set_xlim(0, 1.04 * max(label.x for label in labels) or 1.0)
        if base is not None:
            _mark_base(axes, base, top)
        _mark_probe(axes, max((probe_seconds(arm) for arm in arms if arm_role(arm) == "selected"), default=0), scale)
        label_ends(figure, axes, labels)
        axes.set_xlabel(f"training time, {unit}")
        axes.set_ylabel("held-out loss (nats per token)")
        axes.grid()
        return png(figure)


def _draw_curve(
    axes: Axes, arm: Arm, base: float | None, scale: float, colour: str, dashes: Any, marker: str
) -> EndLabel:
    points = _heldout_points(arm)
    start = min(probe_seconds(arm), points[-1][0])
    if base is not None:
        points = [(start, base), *(point for point in points if point[0] > start)]
    seconds, losses = [point[0] / scale for point in points], [point[1] for point in points]
    bold = arm.get("name") == SELECTED
    axes.plot(seconds, losses, color=colour, linestyle=dashes, linewidth=2.4 if bold else 1.7, zorder=3 + bold)
    dots: dict[str, Any] = {"marker": marker, "color": colour, "linestyle": ""}
    axes.plot(seconds[:-1], losses[:-1], markersize=3, zorder=3 + bold, **dots)
    axes.plot(seconds[-1:], losses[-1:], markersize=8, zorder=5, clip_on=False, **dots)
    text = f"{wrapped(arm_title(arm))}\n{losses[-1]:.3f} after {duration(points[-1][0])}"
    return EndLabel(seconds[-1], losses[-1], text, colour, bold)


def _mark_base(axes: Axes, base: float, top: float) -> None:
    above = base > top
    axes.text(
        0.985,
        0.975 if above else base,
        f"before training: {base:.3f}" + (" (above the axis)" if above else ""),
        transform=axes.transAxes if above else axes.get_yaxis_transform(),
        ha="right",
        va="top" if above else "center",
        color=MUTED,
        fontsize=SMALL_SIZE,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
    )
    if not above:
        axes.axhline(base, color=RULE, linewidth=1.4, zorder=0.5)


def _mark_probe(axes: Axes, seconds: float, scale: float) -> None:
    if not seconds:
        return
    colour, place = ROLE_COLOURS["selected"], axes.get_xaxis_transform()
    axes.plot([0, seconds / scale], [0, 0], color=colour, linewidth=6, transform=place, solid_capstyle="butt", zorder=4)
    axes.annotate(
        f"probe {duration(seconds)}",
        xy=(0, 0),
        xycoords="axes fraction",
        xytext=(4, 6),
        textcoords="offset points",
        color=colour,
        fontsize=SMALL_SIZE,
    )


def _loss_limits(losses: Sequence[float], base: float | None) -> tuple[float, float]:
    """Limits of the loss axis; the loss before training is left out where it would flatten everything else."""
    low, high = min(losses), max(losses)
    span = max(high - low, 0.02 * abs(high), 1e-6)
    if base is not None and low - span <= base <= high + 2.5 * span:
        low, high = min(low, base), max(high, base)
        span = max(high - low, 1e-6)
    else:
        high += 0.35 * span
    return low - 0.10 * span, high + 0.10 * span


def _looks(arms: Sequence[Arm]) -> list[tuple[str, Any, str]]:
    """Colour by role; dashes and marker tell arms of one role apart."""
    seen: dict[str, int] = {}
    looks = []
    for arm in arms:
        role = arm_role(arm)
        index = seen[role] = seen.get(role, -1) + 1
        looks.append((ROLE_COLOURS[role], LINE_STYLES[index % len(LINE_STYLES)], MARKERS[index % len(MARKERS)]))
    return looks


def _heldout_title(record: Record) -> str:
    ends = []
    for name in (SELECTED, REFERENCE):
        arm = find_arm(record, name)
        points = [] if arm is None or arm.get("failed") else _heldout_points(arm)
        if not points:
            return "Held-out loss against training time"
        ends.append(f"{points[-1][1]:.3f} in {duration(points[-1][0])}")
    return f"The selected layers reach a held-out loss of {ends[0]}, uniform LoRA reaches {ends[1]}"


# --- time of a step ---------------------------------------------------------------------------------------------------


def plot_step_time(record: Record) -> bytes:
    """Median seconds of one training step per arm, slowest on top, with its 20th and 80th percentile."""
    timed = [arm for arm in _arms(record) if arm_number(arm, "median_step_seconds") is not None]
    timed.sort(key=lambda arm: -float(arm["median_step_seconds"]))
    failed = _arms(record, failed=True)
    names = [wrapped(arm_title(arm), 30) for arm in (*timed, *failed)]
    heights = [0.42 + 0.18 * name.count("\n") for name in names]
    centres = [-(sum(heights[:index]) + height / 2) for index, height in enumerate(heights)]
    subtitle = "Median of the timed steps, probe not included; whiskers: 20th to 80th percentile. 1.00x is plain PEFT."
    body = max(sum(heights) + 0.15, 1.2)
    with canvas(_step_time_title(record), subtitle, body=body, left=2.45, right=1.5) as (figure, axes):
        if not names:
            return empty(figure, axes, "No arm was timed.")
        for arm, centre in zip(timed, centres, strict=False):
            low, median, high = _percentiles(arm)
            axes.barh(centre, median, height=0.26, color=ROLE_COLOURS[arm_role(arm)])
            axes.errorbar(median, centre, xerr=[[median - low], [high - median]], color=INK, linewidth=1.1, capsize=2.5)
            speed = speed_of(record, arm)
            text = f"{significant(median)} s" + ("" if speed is None else f"   {speed:.2f}x")
            beside(axes, high, centre, text, weight="bold" if arm.get("name") == SELECTED else "normal")
        for arm, centre in zip(failed, centres[len(timed) :], strict=True):
            beside(axes, 0, centre, shortened(f"failed: {failure(arm)}", 56), colour=MUTED)
        axes.set_xlim(0, 1.02 * max((_percentiles(arm)[2] for arm in timed), default=1.0) or 1.0)
        axes.set_ylim(-sum(heights), 0)
        axes.set_yticks(centres, [drawable(name) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.set_xlabel("seconds per training step")
        axes.grid(axis="x")
        return png(figure)


def _percentiles(arm: Arm) -> tuple[float, float, float]:
    median = float(arm["median_step_seconds"])
    low, high = known(arm.get("step_seconds_p20")), known(arm.get("step_seconds_p80"))
    return min(median if low is None else low, median), median, max(median if high is None else high, median)


def _step_time_title(record: Record) -> str:
    selected = arm_number(find_arm(record, SELECTED), "median_step_seconds")
    uniform = arm_number(find_arm(record, REFERENCE), "median_step_seconds")
    if selected is None or uniform is None:
        return "Time of one training step"
    return (
        f"A training step takes {significant(selected)} s on the selected layers, "
        f"{significant(uniform)} s with uniform LoRA under plain PEFT"
    )


# --- score kept against time ------------------------------------------------------------------------------------------


def plot_pareto(record: Record) -> bytes:
    """Share of the score kept against the predicted share of the time; the choices that no other beats, and ours."""
    selection = record.get("selection") or {}
    frontier = _frontier(record.get("pareto") or ())
    time, score = known(selection.get("predicted_time_share")), known(selection.get("score_share"))
    here = None if time is None or score is None else (time, score)
    subtitle = (
        "Predicted before training: the choices that no other beats, some with their number of layers. Above the "
        "dotted line a choice keeps a larger share of the score than it takes of the time."
    )
    with canvas(_pareto_title(record), subtitle, body=3.9, left=0.85, right=0.3) as (figure, axes):
        if not frontier and here is None:
            return empty(figure, axes, "No curve was computed for this selection.")
        times, kept = [point[0] for point in frontier], [point[1] for point in frontier]
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        axes.plot(times, kept, "-o", color=INK, linewidth=1.4, markersize=4.5 if len(times) <= 40 else 2.5)
        axes.set_xlim(0, 1.03 * max([1.0, here[0] if here else 0.0, *times]))
        axes.set_ylim(0, 1.07 * max([1.0, here[1] if here else 0.0, *kept]))
        _label_frontier(axes, frontier, here)
        if here is not None:
            _mark_choice(axes, here, len(selection.get("layers") or ()))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=6))
            axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
        axes.set_xlabel("predicted time of a training step (all layers = 100 %)")
        axes.set_ylabel("share of the score kept")
        axes.grid()
        return png(figure)


def _frontier(choices: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The choices that no other beats: walking up in time, those that raise the score."""
    points = []
    for choice in choices:
        time, score = known(choice.get("predicted_time_share")), known(choice.get("score_share"))
        if time is not None and score is not None:
            points.append((time, score, int(known(choice.get("num_layers")) or 0)))
    frontier: list[Point] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not frontier or point[1] > frontier[-1][1]:
            frontier.append(point)
    return frontier


def _label_frontier(axes: Axes, frontier: Sequence[Point], here: tuple[float, float] | None) -> None:
    """Number of layers beside some points of the frontier: not too close to each other, nor to the chosen one."""
    taken = [] if here is None else [here]
    for time, score, num_layers in reversed(frontier):
        if any(abs(time - x) < 0.055 and abs(score - y) < 0.09 for x, y in taken):
            continue
        axes.annotate(
            f"{num_layers} layers" if time == frontier[-1][0] else str(num_layers),
            xy=(time, score),
            xytext=(-4, 6),
            textcoords="offset points",
            ha="right",
            color=MUTED,
            fontsize=SMALL_SIZE,
        )
        taken.append((time, score))


def _mark_choice(axes: Axes, here: tuple[float, float], num_layers: int) -> None:
    """The chosen point with its numbers beside it, or in the empty corner where there is no room beside it."""
    colour, roomy = ROLE_COLOURS["selected"], here[0] < 0.7 and here[1] > 0.3
    axes.plot(*here, "o", color=colour, markersize=12, zorder=4, markeredgecolor="white", markeredgewidth=1.5)
    axes.annotate(
        f"chosen: {num_layers} layers\n{percent(here[1])} of the score\n{percent(here[0])} of the time",
        xy=here,
        xytext=(16, -12) if roomy else (0.98, 0.05),
        textcoords="offset points" if roomy else "axes fraction",
        color=colour,
        weight="bold",
        ha="left" if roomy else "right",
        va="top" if roomy else "bottom",
        linespacing=LINE_SPACING,
        arrowprops=None if roomy else {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkB": 8},
    )


def _pareto_title(record: Record) -> str:
    selection = record.get("selection") or {}
    time, score = known(selection.get("predicted_time_share")), known(selection.get("score_share"))
    if time is None or score is None:
        return "Score kept against predicted time"
    return f"The chosen layers keep {percent(score)} of the score for a predicted {percent(time)} of the time"


# --- reading the record -----------------------------------------------------------------------------------------------


def _arms(record: Record, *, failed: bool = False) -> list[Arm]:
    return [arm for arm in record.get("arms") or [] if bool(arm.get("failed")) == failed]


def _heldout_points(arm: Arm) -> list[tuple[float, float]]:
    pairs = [(known(point.get("seconds")), known(point.get("loss"))) for point in arm.get("heldout") or []]
    return sorted((seconds, loss) for seconds, loss in pairs if seconds is not None and loss is not None)


def _time_unit(seconds: float) -> tuple[float, str]:
    return (1.0, "seconds") if seconds < 600 else (60.0, "minutes") if seconds < 7200 else (3600.0, "hours")
