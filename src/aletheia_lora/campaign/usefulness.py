"""Outcomes -> do layer scores say what a selection will be worth? And the scores of each task, side by side."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..statistics import spearman
from .analysis import Row
from .measures import loss_lowered
from .outcomes import Outcome

NO_DATA = "random"
"""A score that ranks nothing, of a control."""
MIN_POINTS = 4
"""Fewer have no interval of a rank correlation."""

Scores = dict[tuple[str, str, int, str], list[float]]
"""Model, task, seed and name of the score -> the score of each layer."""


def layer_scores(found: Sequence[Outcome]) -> Scores:
    """The scores that the runs that ended well recorded; runs of one seed share their probe."""
    scores: Scores = {}
    for one in found:
        if one.kind == "run" and one.done:
            for name, values in (one.result.get("layer_scores") or {}).items():
                if name != NO_DATA and values and all(isinstance(value, int | float) for value in values):
                    scores.setdefault((one.model, one.task, int(one.content["seed"]), name), values)
    return scores


def mean_scores(scores: Scores) -> list[Row]:
    """Mean over seeds of every layer's score, as a share of the highest in its model and task."""
    rows = []
    for model, task, name in dict.fromkeys((model, task, name) for model, task, _, name in scores):
        own = [values for (a, b, _, c), values in scores.items() if (a, b, c) == (model, task, name)]
        means = [fmean(column) for column in zip(*own, strict=True)]
        top = max(means)
        relative = [mean / top if top > 0 else 0.0 for mean in means]
        names = {"model": model, "task": task, "score": name, "num_seeds": len(own)}
        rows += [
            {**names, "layer": layer, "mean_score": mean, "share_of_highest": share}
            for layer, (mean, share) in enumerate(zip(means, relative, strict=True))
        ]
    return rows


def usefulness(spec: Mapping[str, Any], found: Sequence[Outcome]) -> list[Row]:
    """Spearman's rank correlation of the share of the score that a selection holds with how far it lowered the loss.

    One point is one selection: a method with its layers, over the seeds and draws that chose the same ones. All
    selections together mix where layers are with how many; those of one number of layers do not.
    """
    rows, scores = [], layer_scores(found)
    for match in spec["match"]:
        for model, task, name in dict.fromkeys((model, task, name) for model, task, _, name in scores):
            points = list(_points(found, scores, match, model, task, name))
            sizes = Counter(size for size, _, _ in points)
            scopes: list[tuple[str, int | None]] = [("all selections", None)]
            scopes += [(f"selections of {size} layers", size) for size, count in sizes.items() if count > 1]
            for scope, size in scopes if len(sizes) > 1 else scopes[1:]:
                kept = [(share, gain) for own, share, gain in points if size in (None, own)]
                names = {"match": match, "model": model, "task": task, "score": name, "selections": scope}
                rows.append(names | _correlation(kept))
    return rows


def _points(
    found: Sequence[Outcome], scores: Scores, match: str, model: str, task: str, name: str
) -> Iterator[tuple[int, float, float]]:
    """Number of layers, share of the score, and loss lowered, of each selection of plain LoRA."""
    own: dict[tuple[str, tuple[int, ...]], list[tuple[float, float]]] = {}
    for one in found:
        values = scores.get((one.model, one.task, int(one.content.get("seed", -1)), name))
        place = (one.kind, one.model, one.task, one.content.get("match"))
        plain = one.content["method"].get("adapter", "lora") == "lora"
        if place != ("run", model, task, match) or not (one.done and plain and values and "layers" in one.result):
            continue
        gain, total = loss_lowered(one), math.fsum(values)
        if gain is not None and total > 0:
            layers = tuple(one.result["layers"])
            share = math.fsum(values[layer] for layer in layers) / total
            own.setdefault((one.method, layers), []).append((share, gain))
    for (_, layers), points in own.items():
        yield len(layers), fmean(share for share, _ in points), fmean(gain for _, gain in points)


def _correlation(points: Sequence[tuple[float, float]]) -> Row:
    row: Row = {"n": len(points), "rho": None, "low": None, "high": None, "p": None, "note": ""}
    if len(points) < MIN_POINTS or any(len(set(column)) == 1 for column in zip(*points, strict=True)):
        return row | {"note": "too few" if len(points) < MIN_POINTS else "all alike"}
    result = spearman([share for share, _ in points], [gain for _, gain in points])
    ends = {"rho": result.rho, "low": result.interval.low, "high": result.interval.high, "p": result.p_value}
    return row | ends
