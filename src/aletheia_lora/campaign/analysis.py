"""Outcomes -> what may be said of a campaign: differences in pairs, tests, equivalence, and answers to its questions.

Comes in: the resolved spec and the outcome of every cell. Goes out: tables, each a list of flat rows with the same
keys. No clock is read here, so that a campaign that was interrupted gives the rows of an undisturbed one.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..statistics import (
    Equivalence,
    Interval,
    PairedDifference,
    equivalence,
    holm,
    paired_difference,
    parameter_matched,
)
from .measures import LOSSES, Items, Measure, finite
from .outcomes import Outcome
from .pairing import UNIFORM, Pairs, Side, matched, role_of, side

ALPHA = 0.05
ROUNDING = 1e-12
"""Relative differences up to here are none."""
SEED = 0
"""Of the bootstrap; each comparison has a generator of its own, so that another one beside it changes nothing."""
NOT_KNOWN, WITHIN = "not known", ", within the margin"
IS_IT_BETTER = {
    "better": "held",
    f"better{WITHIN}": "held",
    "worse": "did not hold",
    f"worse{WITHIN}": "did not hold",
    "equal": "did not hold",
    NOT_KNOWN: NOT_KNOWN,
}
"""Answer by verdict."""
COUNT = {True: " and count", False: ", with other numbers of layers", None: ""}
"""How a question names whether both sides adapt as many layers."""
DOES_IT_KEEP = {**IS_IT_BETTER, "equal": "held", f"worse{WITHIN}": "held"}

Row = dict[str, Any]


# --- comparisons ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Two methods to compare."""

    method: str
    reference: str
    against: str
    """``uniform``, ``control``, ``selected``, or ``parameters``: a reference that trains as many weights."""


def trials(methods: Sequence[Mapping[str, Any]]) -> list[Trial]:
    """Every method against uniform LoRA; what chooses by score also against each control and those of its kind."""
    roles = {str(method["name"]): role_of(method) for method in methods}
    made = []
    for name, role in roles.items():
        if role != "uniform" and UNIFORM in roles:
            made.append(Trial(name, UNIFORM, "uniform"))
        if role == "selected":
            made += [Trial(name, other, "control") for other in roles if roles[other] == "control"]
            before = list(roles)[: list(roles).index(name)]
            made += [Trial(name, other, "selected") for other in before if roles[other] == "selected"]
            alike = [str(other["name"]) for other in methods if other.get("params_of") == name]
            made += [Trial(name, other, "parameters") for other in alike]
    return made


def comparisons(spec: Mapping[str, Any], found: Sequence[Outcome], judged: Sequence[Measure]) -> list[Row]:
    """Every trial on every measure, with a verdict for each, and Holm's correction over each question and over all.

    A question is one selection on one measure at equal steps or time; benchmarks are one measure together. What does
    not choose by a score makes one question together.
    """
    rows: list[Row] = []
    chosen = {str(method["name"]) for method in spec["methods"] if role_of(method) == "selected"}
    questions: dict[tuple[str, ...], list[Row]] = {}
    for match in spec["match"]:
        for measure in judged:
            for trial in trials(spec["methods"]):
                if measure.kind == "evaluation" and trial.against != "uniform":
                    continue
                own, other = (side(found, name, match, measure.kind) for name in (trial.method, trial.reference))
                if own and other:
                    rows.append(_comparison(match, measure, trial, own, other))
                    whose = trial.method if trial.method in chosen else "others"
                    on = measure.name if measure.kind == "run" else "benchmarks"
                    questions.setdefault((match, measure.kind, on, whose), []).append(rows[-1])
    for question in questions.values():
        correct(question, "t_p", "holm_p")
    correct(rows, "t_p", "holm_p_of_all")
    for row in rows:
        row["verdict"] = verdict(row)
        row["missing"] = row.pop("missing")  # the longest comes last
    return rows


def _comparison(match: str, measure: Measure, trial: Trial, own: Side, other: Side) -> Row:
    unlike = _other_parameters if trial.against == "parameters" else other_rows
    pairs = matched(own, other, measure.read, unlike=unlike)
    return {
        "match": match,
        "measure": measure.name,
        "unit": measure.unit,
        "higher_is_better": measure.higher_is_better,
        "method": trial.method,
        "reference": trial.reference,
        "against": trial.against,
        "same_num_layers": _same_num_layers(pairs, own, other),
        **difference(pairs, _label(match, measure.name, trial.method, trial.reference), measure, own, other),
    }


def difference(pairs: Pairs, label: str, measure: Measure, own: Side, other: Side, *, base: bool = False) -> Row:
    """One line of statistics over pairs; over the items of the one pair where there is no other.

    Args:
        pairs: The numbers.
        label: Seeds the bootstrap.
        measure: What they are, and the margin.
        own: The cells of the method, for their items.
        other: Those of the reference.
        base: The reference is the base model of the same cells.
    """
    items = None
    if len(pairs.keys) == 1:
        (own_cells, other_cells) = own[pairs.keys[0]], other[pairs.keys[0]]
        if measure.kind == "evaluation" and len(own_cells) == len(other_cells) == 1:
            items = measure.items(own_cells[0], other_cells[0], base=base)
    if items is None:
        basis = "models x tasks" if pairs.groups else "pairs" if len(pairs.keys) > 1 else "one pair"
        items = Items(pairs.values, pairs.references, None, pairs.groups, False, 1.0)
    else:
        basis = "items"
    num_groups = len(set(items.groups)) if items.groups else len(items.values)
    found, tost = _statistics(items, label, measure.margin) if _has_spread(items) else (None, None)
    return {
        "n": len(pairs.keys),
        "of": pairs.of,
        "basis": basis if pairs.keys else "none",
        "num_groups": num_groups,
        "mean": math.fsum(pairs.differences) / len(pairs.keys) if pairs.keys else None,
        **_columns(found, items.scale),
        "margin": measure.margin,
        **ends("equivalence_", None if tost is None else tost.interval, items.scale),
        "equivalence_p": None if tost is None else tost.p_value,
        "missing": "; ".join(pairs.missing),
    }


def _has_spread(items: Items) -> bool:
    """False for one pair, and where all differ alike: so do a few coarse scores by chance, and a t test is then sure.

    Right or wrong has a statistic of its own for that.
    """
    apart = [value - reference for value, reference in zip(items.values, items.references, strict=True)]
    size = max(map(abs, (*items.values, *items.references)), default=0.0)
    return len(apart) > 1 and (items.binary or max(apart) - min(apart) > ROUNDING * size)


def _statistics(items: Items, label: str, margin: float | None) -> tuple[PairedDifference, Equivalence | None]:
    """The paired difference, its bootstrap seeded by the label, and the equivalence test where there is a margin."""
    lists = items.values, items.references
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bootstrap of two groups that are alike has no acceleration
        found = paired_difference(
            *lists, groups=items.groups, weights=items.weights, binary=items.binary, rng=generator(label)
        )
    if margin is None:
        return found, None
    small = margin / items.scale
    return found, equivalence(
        *lists, margin=small, groups=items.groups, weights=items.weights, binary=items.binary, alpha=ALPHA
    )


def generator(label: str) -> np.random.Generator:
    """A generator that is the same for the same label."""
    return np.random.default_rng([SEED, zlib.crc32(label.encode())])


def _columns(found: PairedDifference | None, scale: float) -> Row:
    interval, bootstrap = (None, None) if found is None else (found.interval, found.bootstrap)
    effect = None if found is None else found.effect
    return {
        **ends("", interval, scale),
        **ends("bootstrap_", bootstrap, scale),
        "t_p": None if found is None else finite(found.t_p_value),
        "wilcoxon_p": None if found is None else finite(found.wilcoxon_p_value),
        "cohen_d": None if effect is None else finite(effect.cohen_d),
        "hedges_g": None if effect is None else finite(effect.hedges_g),
        "rank_biserial": None if effect is None else finite(effect.rank_biserial),
    }


def ends(prefix: str, interval: Interval | None, scale: float = 1.0) -> Row:
    """The two ends of an interval as columns; empty where there is none."""
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return {f"{prefix}low": finite(low, scale), f"{prefix}high": finite(high, scale)}


def other_rows(one: Outcome, two: Outcome) -> str | None:
    """Losses on other rows are no pair."""
    digests = {digest for digest in (one.result.get("rows_digest"), two.result.get("rows_digest")) if digest}
    return "measured on other rows" if len(digests) > 1 else None


def _other_parameters(one: Outcome, two: Outcome) -> str | None:
    own, other = one.result.get("trainable_params"), two.result.get("trainable_params")
    if own is None or other is None:
        return "trainable parameters not recorded"
    try:
        parameter_matched(0.0, own, 0.0, other)
    except ValueError:
        return f"{own:,} trainable parameters against {other:,}"
    return other_rows(one, two)


def _same_num_layers(pairs: Pairs, own: Side, other: Side) -> bool | None:
    """True where every pair adapts as many layers on both sides; None where that is not known."""
    counts = {
        tuple(len(one.result["layers"]) if "layers" in one.result else None for one in (first, second))
        for key in pairs.keys
        for first in own[key]
        for second in other[key]
    }
    if not counts or any(None in pair for pair in counts):
        return None
    return all(first == second for first, second in counts)


def correct(rows: Sequence[Row], p_value: str, corrected: str) -> None:
    """Holm's correction over all rows, ``tried``; one that gave no p-value was tried all the same, and counts as 1."""
    tried = {str(index): 1.0 if row[p_value] is None else row[p_value] for index, row in enumerate(rows)}
    adjusted = holm(tried, alpha=ALPHA).adjusted if tried else {}
    for index, row in enumerate(rows):
        row.setdefault("tried", len(rows))
        row[corrected] = None if row[p_value] is None else adjusted[str(index)]


def verdict(row: Mapping[str, Any]) -> str:
    """``better`` or ``worse`` (with ``within the margin`` behind it), else ``equal``, else ``not known``.

    Better and worse: a t test after Holm's correction over the question. Within the margin, and equal: two one-sided
    tests, each comparison by itself.
    """
    within = row["equivalence_p"] is not None and row["equivalence_p"] < ALPHA
    if row["holm_p"] is None or row["holm_p"] >= ALPHA or row["higher_is_better"] is None:
        return "equal" if within else NOT_KNOWN
    kind = "better" if (row["mean"] > 0) == row["higher_is_better"] else "worse"
    return kind + WITHIN if within else kind


def _label(*words: str) -> str:
    return "|".join(words)


# --- against the base model -------------------------------------------------------------------------------------


def deltas(spec: Mapping[str, Any], found: Sequence[Outcome], judged: Sequence[Measure]) -> list[Row]:
    """What training changed against the base model, method by method."""
    rows = []
    for measure in judged:
        for match in spec["match"]:
            for method in spec["methods"]:
                own = side(found, method["name"], match, measure.kind)
                if not own:
                    continue
                pairs = matched(own, own, measure.read, read_other=measure.base)
                label = _label("delta", match, measure.name, method["name"])
                made = difference(pairs, label, measure, own, own, base=True)
                keys = ("n", "of", "basis", "num_groups", "mean", "low", "high", "bootstrap_low", "bootstrap_high")
                names = {"measure": measure.name, "unit": measure.unit, "match": match, "method": method["name"]}
                rows.append(names | {key: made[key] for key in (*keys, "missing")})
    return rows


# --- questions --------------------------------------------------------------------------------------------------


def questions(spec: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """What the campaign was run to find out, each with ``held``, ``did not hold`` or ``not known``, and why."""
    chosen = [str(method["name"]) for method in spec["methods"] if role_of(method) == "selected"]
    asked = []
    for row in rows:
        if row["method"] not in chosen or row["measure"] not in LOSSES:
            continue
        own, other, match = row["method"], row["reference"], f"at equal {row['match']}"
        heldout = row["measure"] == "heldout_loss"
        if row["against"] == "uniform":
            what = "the held-out loss" if heldout else "the loss on other text"
            asked.append(_asked(f"Does {own} keep {what} of uniform LoRA {match}?", row, DOES_IT_KEEP))
            if row["match"] == "time" and heldout:
                asked.append(_asked(f"Is {own} better than uniform LoRA {match}?", row, IS_IT_BETTER))
        elif row["against"] == "parameters" and heldout:
            asked.append(_asked(f"Is {own} better than {other}, with as many parameters, {match}?", row, IS_IT_BETTER))
        elif heldout:
            match += COUNT[row["same_num_layers"]]
            asked.append(_asked(f"Is {own} better than {other} {match}?", row, IS_IT_BETTER))
    return asked


def _asked(question: str, row: Row, answers: Mapping[str, str]) -> Row:
    names = {key: row[key] for key in ("method", "reference", "match", "measure")}
    return {"question": question, "answer": answers[row["verdict"]], "why": reason(row), **names}


def reason(row: Mapping[str, Any]) -> str:
    """The numbers behind a verdict, in words."""
    if row["mean"] is None:
        return f"0 of {row['of']} pairs"
    said = [f"difference {row['mean']:+.4f} {row['unit']}"]
    if row["low"] is None:
        said.append(f"no interval from {'one pair' if row['n'] == 1 else 'pairs that all differ alike'}")
    else:
        said.append(f"95 % interval {row['low']:+.4f} to {row['high']:+.4f}")
        corrected = f"p {p_text(row['holm_p'])} after Holm's correction for {row['tried']}"
        said.append(f"{corrected} ({p_text(row['t_p'])} before)")
    if row["margin"] is not None and row["equivalence_p"] is not None:
        inside = "inside" if row["equivalence_p"] < ALPHA else "not shown to be inside"
        said.append(f"{inside} the margin of {row['margin']:g} (p {p_text(row['equivalence_p'])})")
    said.append(f"{row['n']} of {row['of']} pairs")
    return ", ".join(said)


def p_text(p_value: float) -> str:
    """``= 0.042``, or ``< 0.001``."""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"
