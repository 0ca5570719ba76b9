"""Outcomes -> every method beside a random choice, ranked by the held-out loss that it reached.

This is where a score or strategy shows that it chooses better than chance: against the same random method, at equal
steps and at equal time apart, with Holm's correction over all that were tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .analysis import Row, correct, difference, other_rows, verdict
from .measures import LOSSES, Measure
from .outcomes import Outcome
from .pairing import matched, role_of, side


def chance_of(spec: Mapping[str, Any]) -> str | None:
    """The method that stands for chance: the first that draws its layers; None where none does."""
    drawn = (method for method in spec["methods"] if "random" in (method.get("strategy"), method.get("score")))
    return next((str(method["name"]) for method in drawn), None)


def ranking(spec: Mapping[str, Any], found: Sequence[Outcome], judged: Sequence[Measure]) -> list[Row]:
    """The methods by mean difference from chance over their pairs, the lowest first; empty where nothing was drawn.

    Each row has the mean, its interval, p-values and verdict of the method minus chance, and how many layers it
    adapted.
    """
    chance, rows = chance_of(spec), []
    (loss,) = (measure for measure in judged if measure.name == LOSSES[0])
    for match in spec["match"] if chance is not None else ():
        reference, tried = side(found, str(chance), match), []
        for method in spec["methods"]:
            own = side(found, method["name"], match)
            if method["name"] == chance or not own or not reference:
                continue
            pairs = matched(own, reference, loss.read, unlike=other_rows)
            label = "|".join(("ranking", match, method["name"]))
            names = {"match": match, "method": method["name"], "role": role_of(method), "chance": chance}
            tried.append({**names, "num_layers": _num_layers(own), **difference(pairs, label, loss, own, reference)})
        correct(tried, "t_p", "holm_p")
        for row in tried:
            row["verdict"] = verdict({**row, "higher_is_better": loss.higher_is_better})
        rows += sorted(tried, key=lambda row: math.inf if row["mean"] is None else row["mean"])
    return [{key: row[key] for key in COLUMNS} for row in rows]


COLUMNS = (
    *("match", "method", "role", "chance", "num_layers", "n", "of", "mean", "low", "high", "t_p", "holm_p", "tried"),
    *("hedges_g", "margin", "equivalence_p", "verdict", "missing"),
)


def _num_layers(own: Mapping[Any, Sequence[Outcome]]) -> str:
    """``15``, or ``14 to 15`` where seeds and tasks differ; empty where none is known."""
    counts = sorted({len(one.result["layers"]) for cells in own.values() for one in cells if "layers" in one.result})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))) if counts else ""
