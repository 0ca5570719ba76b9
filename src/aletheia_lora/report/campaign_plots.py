"""A campaign's tables -> figures, each with its finding as the title.

Comes in: the dict that ``aletheia_lora.campaign.report`` makes from the records. Goes out: PNG bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from .canvas import (
    INK,
    MUTED,
    ROLE_COLOURS,
    EndLabel,
    canvas,
    drawable,
    empty,
    label_ends,
    png,
    shortened,
    wrapped,
)
from .forest import MARGIN_COLOUR, Block, Line, forest
from .forgetting import POINTS, number
from .plots import GRADIENT_NORM
from .words import known, visible

Record = Mapping[str, Any]
Row = Mapping[str, Any]

LOSS, OTHER, UNIFORM = "heldout_loss", "other_loss", "uniform"
NOT_KNOWN = "not known"
MEASURES = {LOSS: "held-out loss", OTHER: "loss on other text"}
COLOURS = {**ROLE_COLOURS, "baseline": ROLE_COLOURS["uniform"]}
HEAT = LinearSegmentedColormap.from_list("score", ["#ffffff", "#9cc7e4", ROLE_COLOURS["selected"], "#002a47"])
MAX_NAME = 24
WHISKERS = "Whiskers: 95 % intervals."


def draw_campaign(record: Record) -> dict[str, bytes]:
    """All figures by name; those of benchmarks only where some were evaluated."""
    figures = {
        "controls": plot_controls(record),
        "deltas": plot_deltas(record, [LOSS]),
        "speedup": plot_speedup(record, ("all", "model")),
        "families": plot_speedup(record, ("family",)),
        "speed_quality": plot_speed_quality(record),
        "scores": plot_score_map(record),
    }
    points, losses = _benchmarks(record)
    if others := _other_losses(record):
        figures["deltas_other"] = plot_deltas(record, others)
    if points:
        figures |= {"deltas_points": plot_deltas(record, points), "benchmarks": plot_benchmarks(record, points)}
    if losses:
        figures["benchmarks_loss"] = plot_benchmarks(record, losses)
    return figures


def campaign_titles(record: Record) -> dict[str, str]:
    """The finding that each figure shows, in words: its title, and its alternative text."""
    points, losses = _benchmarks(record)
    others = _other_losses(record)
    titles = {
        "controls": _controls_title(record),
        "deltas": _deltas_title(record, [LOSS]),
        "speedup": _speedup_title(record),
        "families": _families_title(record),
        "speed_quality": "Speed against held-out loss, both against uniform LoRA at equal steps",
        "scores": _scores_title(record),
    }
    if others:
        titles["deltas_other"] = _deltas_title(record, others)
    if points:
        titles |= {"deltas_points": _deltas_title(record, points), "benchmarks": _benchmarks_title(record, points)}
    if losses:
        titles["benchmarks_loss"] = _benchmarks_title(record, losses)
    return titles


def chosen_methods(record: Record) -> list[str]:
    """The methods that choose layers by a score; the one that headlines are about comes first."""
    names = [method["name"] for method in record["methods"] if method["role"] == "selected"]
    return sorted(names, key=lambda name: name != "paper")


def method_role(record: Record, name: object) -> str:
    """``uniform``, ``baseline``, ``control`` or ``selected``."""
    return next((str(method["role"]) for method in record["methods"] if method["name"] == name), "control")


def kind_of(row: Row) -> str:
    """``better``, ``worse``, ``equal`` or ``not known``: the verdict without what is behind it."""
    return str(row["verdict"]).partition(",")[0]


def tally(rows: Sequence[Row]) -> str:
    """``1 better, 2 not known``: how many rows have each verdict."""
    words = {"better": "better", "worse": "worse", "equal": "equal within the margin", NOT_KNOWN: NOT_KNOWN}
    counts = [(sum(kind_of(row) == key for row in rows), word) for key, word in words.items()]
    return ", ".join(f"{count} {word}" for count, word in counts if count)


def counted(number_of: int, noun: str) -> str:
    """``1 control``, ``2 controls``."""
    return f"{number_of} {noun}" + ("" if number_of == 1 else "s")


def find(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def between(row: Row, unit: str = "", *, digits: int | None = None) -> str:
    """``−0.012 to 0.034``, or why there is no interval."""
    low, high = known(row["low"]), known(row["high"])
    if low is None or high is None:
        return f"n = {row['n']}, no interval"
    words = [number(end, unit) if digits is None else f"{end:.{digits}f}" for end in (low, high)]
    return " to ".join(words)


# --- controls -------------------------------------------------------------------------------------------------------


def plot_controls(record: Record) -> bytes:
    """Held-out loss of every selection minus that of each control, with the margin."""
    blocks: list[Block] = []
    for match in record["match"]:
        for method in chosen_methods(record):
            rows = find(record["tables"]["comparisons"], match=match, method=method, measure=LOSS, against="control")
            if rows:
                lines = [_difference_line(record, row, f"minus {visible(row['reference'])}") for row in rows]
                blocks.append(((_short(method), f"at equal {match}"), lines))
    subtitle = f"Left of the line the selection is better. {_whiskers(record)}"
    return forest(
        _controls_title(record),
        subtitle,
        blocks,
        "held-out loss, selection minus control (nats per token)",
        margin=known(record["margins"].get(LOSS)),
        nothing="No selection was run beside a control.",
        absent="no pair",
    )


def _controls_title(record: Record) -> str:
    for method in chosen_methods(record):
        rows = find(record["tables"]["comparisons"], method=method, measure=LOSS, against="control")
        told = []
        for match in record["match"]:
            asked = [row for row in rows if row["match"] == match]
            if asked:
                told.append(f"against {counted(len(asked), 'control')} at equal {match}: {tally(asked)}")
        if told:
            return f"{visible(method)} {'; '.join(told)}"
    return "No selection was compared with a control"


# --- what training changed --------------------------------------------------------------------------------------------


def plot_deltas(record: Record, measures: Sequence[str]) -> bytes:
    """Change against the base model: uniform LoRA, and every selection at equal steps and at equal time."""
    blocks: list[Block] = []
    rows = record["tables"]["deltas"]
    unit = next((row["unit"] for row in rows if row["measure"] in measures), "")
    for measure in measures:
        own = find(rows, measure=measure)
        wanted = [(UNIFORM, record["match"][0])]
        wanted += [(method, match) for method in chosen_methods(record) for match in record["match"]]
        lines = []
        for method, match in wanted:
            for row in find(own, method=method, match=match):
                name = "uniform LoRA" if method == UNIFORM else f"{visible(method)}, equal {match}"
                text = "" if row["mean"] is None else number(row["mean"], unit, signed=True)
                role = method_role(record, method)
                lines.append(Line(name, row, COLOURS[role], text, hollow=match == "time" and role != "uniform"))
        if lines:
            blocks.append(((_measure(measure), _n_text([line.found for line in lines if line.found])), lines))
    better = "right" if unit == POINTS else "left"
    subtitle = f"After training minus before; {better} of the line is better. Hollow: at equal time. {WHISKERS}"
    words = f"change against the base model ({_short(unit)})"
    title = _deltas_title(record, measures)
    return forest(title, subtitle, blocks, words, nothing="No run ended well.", absent="no run ended well")


def _deltas_title(record: Record, measures: Sequence[str]) -> str:
    rows = record["tables"]["deltas"]
    for measure in measures:
        told = []
        for name in (UNIFORM, *chosen_methods(record)[:1]):
            for row in find(rows, measure=measure, method=name, match=record["match"][0]):
                if row["mean"] is not None:
                    who = "uniform LoRA" if name == UNIFORM else visible(name)
                    told.append(f"{who} by {number(row['mean'], row['unit'], signed=True)}")
        if told:
            unit = _short(find(rows, measure=measure)[0]["unit"])
            return f"Training changed {_measure(measure)}: {', '.join(told)} {unit}"
    return "What training changed against the base model is not known"


def plot_benchmarks(record: Record, measures: Sequence[str]) -> bytes:
    """Benchmarks: every method minus uniform LoRA, in pairs."""
    blocks: list[Block] = []
    rows = record["tables"]["comparisons"]
    unit = next((row["unit"] for row in rows if row["measure"] in measures), "")
    for measure in measures:
        for match in record["match"]:
            found = find(rows, measure=measure, match=match, against="uniform")
            lines = [_difference_line(record, row, visible(row["method"])) for row in found]
            if lines:
                blocks.append(((_measure(measure), f"at equal {match}"), lines))
    better = "Right" if unit == POINTS else "Left"
    subtitle = f"{better} of the line is better than uniform LoRA. {WHISKERS} One pair of runs: over its items."
    words = f"minus uniform LoRA ({_short(unit)})"
    return forest(_benchmarks_title(record, measures), subtitle, blocks, words, absent="no pair")


def _benchmarks_title(record: Record, measures: Sequence[str]) -> str:
    for match, method in itertools.product(record["match"], chosen_methods(record)):
        rows = find(record["tables"]["comparisons"], method=method, against="uniform", match=match)
        own = [row for row in rows if row["measure"] in measures]
        if own:
            return f"{visible(method)} against uniform LoRA on {counted(len(own), 'benchmark')}: {tally(own)}"
    return "No selection was evaluated beside uniform LoRA"


def _difference_line(record: Record, row: Row, name: str) -> Line:
    inner = {"low": row["equivalence_low"], "high": row["equivalence_high"]}
    text = "" if row["mean"] is None else number(row["mean"], row["unit"], signed=True)
    colour = COLOURS[method_role(record, row["method"])]
    return Line(name, {**row, "equivalence": inner}, colour, text, bold=row["verdict"] != NOT_KNOWN)


# --- speed ----------------------------------------------------------------------------------------------------------


def plot_speedup(record: Record, scopes: Sequence[str]) -> bytes:
    """How many times faster than uniform LoRA each method trained at equal steps, the probe paid."""
    blocks: list[Block] = []
    rows = [row for row in record["tables"]["speed"] if row["scope"] in scopes]
    for scope, name in dict.fromkeys((row["scope"], row["name"]) for row in rows):
        found = find(rows, scope=scope, name=name)
        lines = []
        for row in found:
            text = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
            role = method_role(record, row["method"])
            lines.append(Line(visible(row["method"]), {**row, "mean": row["ratio"]}, COLOURS[role], text))
        blocks.append(((_short(name), _n_text(found)), lines))
    title = _families_title(record) if scopes == ("family",) else _speedup_title(record)
    subtitle = f"Right of the line is faster. Seconds of all steps, and of the probe where one is needed. {WHISKERS}"
    words = "training seconds of uniform LoRA over those of the method"
    nothing = "No method was timed beside uniform LoRA."
    return forest(title, subtitle, blocks, words, centre=1.0, nothing=nothing, absent="not timed")


def _speedup_title(record: Record) -> str:
    for method in chosen_methods(record):
        for row in find(record["tables"]["speed"], scope="all", method=method):
            if row["ratio"] is not None:
                return f"{visible(method)}: {row['ratio']:.2f}x as fast as uniform LoRA ({between(row, digits=2)})"
    return "How fast the selections trained is not known"


def _families_title(record: Record) -> str:
    for method in chosen_methods(record):
        rows = [row for row in find(record["tables"]["speed"], scope="family", method=method) if row["ratio"]]
        if rows:
            told = ", ".join(f"{visible(row['name'])} {row['ratio']:.2f}x" for row in rows)
            return f"{visible(method)} against uniform LoRA by model family: {shortened(told, 90)}"
    return "How fast the selections trained by model family is not known"


def plot_speed_quality(record: Record) -> bytes:
    """Speed and held-out loss of each method against uniform LoRA at equal steps."""
    points = []
    for row in find(record["tables"]["speed"], scope="all"):
        losses = find(
            record["tables"]["comparisons"], match="steps", measure=LOSS, method=row["method"], against="uniform"
        )
        if row["ratio"] is not None and losses and losses[0]["mean"] is not None:
            points.append((row, losses[0]))
    subtitle = f"Right: faster, the probe paid. Down: lower held-out loss. Shaded: the margin. {WHISKERS}"
    title = campaign_titles(record)["speed_quality"]
    with canvas(title, subtitle, body=max(3.9, 0.34 * len(points)), left=0.95, right=2.15) as (figure, axes):
        if not points:
            return empty(figure, axes, "No method was timed beside uniform LoRA at equal steps.")
        margin = known(record["margins"].get(LOSS))
        if margin is not None:
            axes.axhspan(-margin, margin, color=MARGIN_COLOUR, linewidth=0, zorder=0)
        axes.axhline(0, color=INK, linewidth=1)
        axes.axvline(1, color=INK, linewidth=1)
        labels = [_draw_point(axes, record, speed, loss) for speed, loss in points]
        ratios, means = [speed["ratio"] for speed, _ in points], [loss["mean"] for _, loss in points]
        _set_limits(axes, [*ratios, 1.0], [*means, 0.0, margin or 0.0, -(margin or 0.0)])
        label_ends(figure, axes, labels)
        axes.set_xlabel("times as fast as uniform LoRA")
        axes.set_ylabel("held-out loss minus uniform LoRA's (nats)")
        axes.grid()
        return png(figure)


def _draw_point(axes: Axes, record: Record, speed: Row, loss: Row) -> EndLabel:
    role = method_role(record, speed["method"])
    x, y, colour = speed["ratio"], loss["mean"], COLOURS[role]
    for along_x, row in ((True, speed), (False, loss)):
        low, high = known(row["low"]), known(row["high"])
        if low is not None and high is not None:
            ends = ([low, high], [y, y]) if along_x else ([x, x], [low, high])
            axes.plot(*ends, color=colour, linewidth=1.1, alpha=0.7, zorder=3)
    axes.plot(x, y, "o", color=colour, markersize=8, zorder=4)
    text = f"{wrapped(visible(speed['method']))}\n{x:.2f}x, {number(y, '', signed=True)}"
    return EndLabel(x, y, text, colour, role == "selected")


def _set_limits(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Around the points; a whisker that is longer is cut at the edge."""
    for setter, values in ((axes.set_xlim, xs), (axes.set_ylim, ys)):
        span = max(max(values) - min(values), 1e-3)
        setter(min(values) - 0.35 * span, max(values) + 0.35 * span)


# --- scores ---------------------------------------------------------------------------------------------------------


def plot_score_map(record: Record) -> bytes:
    """Score of each layer, a row for every model and task, scaled to the row's highest."""
    rows = _score_rows(record)
    name = _score_name(record)
    same = len({len(values) for values in rows.values()}) == 1
    subtitle = f"Mean over seeds of {visible(name)}; each row is scaled to its highest layer. Darker is higher."
    body = max(0.36 * len(rows), 1.2)
    with canvas(_scores_title(record), subtitle, body=body, left=2.1, right=0.2) as (figure, axes):
        if not rows:
            return empty(figure, axes, "The records hold no scores.")
        for index, values in enumerate(rows.values()):
            width = len(values) if same else 1.0
            extent = (-0.5, width - 0.5, -index - 0.94, -index - 0.06) if same else (0, 1, -index - 0.94, -index - 0.06)
            axes.imshow([values], cmap=HEAT, vmin=0, vmax=1, aspect="auto", extent=extent, interpolation="nearest")
        axes.set_ylim(-len(rows), 0)
        axes.set_xlim((-0.5, len(next(iter(rows.values()))) - 0.5) if same else (0, 1))
        names = [drawable(shortened(f"{visible(model)} · {visible(task)}", 30)) for model, task in rows]
        axes.set_yticks([-index - 0.5 for index in range(len(rows))], names)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=same, min_n_ticks=1))
        axes.set_xlabel("layer index" if same else "depth: 0 is the first layer, 1 the last", color=MUTED)
        return png(figure)


def _score_rows(record: Record) -> dict[tuple[str, str], list[float]]:
    """The scaled scores of the first kind of score, by model and task."""
    rows: dict[tuple[str, str], list[float]] = {}
    name = _score_name(record)
    for row in record["tables"]["scores"]:
        if row["score"] == name:
            rows.setdefault((row["model"], row["task"]), []).append(row["share_of_highest"])
    return rows


def _score_name(record: Record) -> str:
    names = [str(row["score"]) for row in record["tables"]["scores"]]
    return GRADIENT_NORM if GRADIENT_NORM in names else names[0] if names else "the score"


def _scores_title(record: Record) -> str:
    rows = _score_rows(record)
    if not rows:
        return "The records hold no scores of layers"
    halves = [sum(values[len(values) // 2 :]) / (sum(values) or 1.0) for values in rows.values()]
    low, high = 100 * min(halves), 100 * max(halves)
    share = f"{low:.0f} %" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f} to {high:.0f} %"
    return f"The upper half of the layers holds {share} of the score"


# --- what there is --------------------------------------------------------------------------------------------------


def _whiskers(record: Record) -> str:
    shaded = " Shaded: the margin." if record["margins"].get(LOSS) else ""
    return f"Thin whiskers: 95 % intervals; thick: 90 %, for equality.{shaded}"


def _other_losses(record: Record) -> list[str]:
    """The loss on other text, and benchmarks in its unit: they move less than the held-out loss."""
    rows = record["tables"]["deltas"]
    unit = next((row["unit"] for row in rows if row["measure"] == LOSS), None)
    return [name for name in dict.fromkeys(row["measure"] for row in rows if row["unit"] == unit) if name != LOSS]


def _benchmarks(record: Record) -> tuple[list[str], list[str]]:
    """Names of the benchmarks in points, and of those in another unit."""
    rows = [row for row in record["tables"]["deltas"] if row["measure"] not in MEASURES]
    points = list(dict.fromkeys(row["measure"] for row in rows if row["unit"] == POINTS))
    return points, list(dict.fromkeys(row["measure"] for row in rows if row["unit"] != POINTS))


def _n_text(rows: Sequence[Row]) -> str:
    """``n = 12 pairs``, or from the fewest to the most."""
    counts = sorted({row["n"] for row in rows})
    return f"n = {' to '.join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))} pairs"


def _measure(name: str) -> str:
    return _short(MEASURES.get(name, name))


def _short(text: object) -> str:
    return shortened(visible(text), MAX_NAME)
