"""Outcomes -> how much faster a method is than uniform LoRA: by the clock, and by counting.

Only the counted rows are the same for a campaign that was interrupted; the others hold what a clock said.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..statistics import SpeedRatio, speed_ratio, win_rate
from .analysis import ALPHA, NOT_KNOWN, Row, correct, ends, generator, p_text
from .outcomes import Outcome
from .pairing import UNIFORM, Pairs, Side, matched, role_of, side

SAME_MACHINE = ("device", "threads")
"""Entries of the environment that have to agree before seconds are compared."""


def counted(spec: Mapping[str, Any], found: Sequence[Outcome]) -> list[Row]:
    """Steps in uniform LoRA's predicted time over uniform LoRA's steps: the speed that counting operations promises."""
    rows = []
    for method in _others(spec):
        for key, members in side(found, method, "time").items():
            model, task, seed = key
            taken = [one.result["steps"] for one in members if one.done and "steps" in one.result]
            steps = fmean(taken) if len(taken) == len(members) else None  # of all draws, or of none
            names = {"model": model, "task": task, "method": method, "seed": seed}
            counts = {"n": len(taken), "of": len(members), "steps": steps, "uniform_steps": spec["steps"]}
            rows.append({**names, **counts, "ratio": None if steps is None else steps / spec["steps"]})
    return rows


def speeds(spec: Mapping[str, Any], found: Sequence[Outcome], families: Mapping[str, str]) -> list[Row]:
    """How many times faster than uniform LoRA at equal steps, the probe paid; over all, by model and by family.

    The logarithms of training seconds are compared pair by pair, the draws of a random method averaged first. Runs on
    other devices, with another number of threads, of cells at a time or of micro-batches are no pair, and none is with
    a run that replayed what another cell had put into the prefix cache.

    Args:
        spec: The resolved spec.
        found: The outcome of every cell.
        families: The family of each model.
    """
    uniform, promised = side(found, UNIFORM, "steps"), counted(spec, found)
    rows = []
    for method in _others(spec):
        own = side(found, method, "steps")
        if not own or not uniform:
            continue
        pairs = matched(uniform, own, _log_seconds, unlike=_other_clock)
        for scope, name, models in _scopes(own, families):
            part = pairs.of_models(models)
            planned = [key for key in own if key[0] in models]
            counts = [row["ratio"] for row in promised if row["method"] == method and row["model"] in models]
            rows.append(
                {
                    "scope": scope,
                    "name": name,
                    "method": method,
                    "n": len(part.keys),
                    "of": len(planned),
                    **_ratio(part, f"speed|{scope}|{name}|{method}"),
                    "counted_ratio": _geometric_mean(counts),
                    "missing": "; ".join(pairs.missing) if scope == "all" else "",
                }
            )
    correct([row for row in rows if row["scope"] == "all"], "t_p", "holm_p")
    for row in rows:
        row["verdict"] = _verdict(row) if row["scope"] == "all" else ""
        row.setdefault("holm_p", None)
    return [{key: row[key] for key in COLUMNS} for row in rows]


def speed_questions(spec: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Is each selection faster than uniform LoRA? ``held``, ``did not hold`` or ``not known``, and why."""
    answers = {"faster": "held", "slower": "did not hold", NOT_KNOWN: NOT_KNOWN}
    chosen = [method["name"] for method in spec["methods"] if role_of(method) == "selected"]
    asked = []
    for row in rows:
        if row["scope"] == "all" and row["method"] in chosen:
            question = f"Is {row['method']} faster than uniform LoRA at equal steps, the probe paid?"
            asked.append({"question": question, "answer": answers[row["verdict"]], "why": _reason(row)})
    return asked


def _reason(row: Mapping[str, Any]) -> str:
    pairs = f"{row['n']} of {row['of']} pairs"
    if row["ratio"] is None:
        return pairs
    if row["low"] is None:
        return f"{row['ratio']:.2f}x, no interval from one pair, {pairs}"
    p_value = f"p {p_text(row['holm_p'])} after Holm's correction ({p_text(row['t_p'])} before)"
    wins = f"faster on {row['faster_models']} of {row['num_models']} models"
    return f"{row['ratio']:.2f}x, 95 % interval {row['low']:.2f} to {row['high']:.2f}, {p_value}, {wins}, {pairs}"


COLUMNS = (
    *("scope", "name", "method", "n", "of", "num_groups", "ratio", "low", "high", "bootstrap_low", "bootstrap_high"),
    *("t_p", "holm_p", "verdict", "faster_models", "num_models", "faster_low", "faster_high", "counted_ratio"),
    "missing",
)


def seconds_of(one: Outcome) -> float | None:
    """What a run took: all of its steps, and the probe where its method needs one."""
    steps, probe = one.result.get("step_seconds"), one.result.get("probe_seconds")
    return sum(steps) + probe if steps and probe is not None else None


def _log_seconds(one: Outcome) -> float | None:
    seconds = seconds_of(one)
    return math.log(seconds) if seconds else None


def _other_clock(one: Outcome, two: Outcome) -> str | None:
    """Why the seconds of two runs are no pair; what an older record does not say counts as alike."""
    first, second = ((run.result.get("environment") or {}) for run in (one, two))
    if any(first.get(key) != second.get(key) for key in SAME_MACHINE):
        return "measured on another device"
    if len({found["workers"] for found in (first, second) if "workers" in found}) > 1:
        return "measured with another number of cells at a time"
    if one.result.get("micro_batches", 1) != two.result.get("micro_batches", 1):
        return "steps cut into other micro-batches"
    filled = next((run.method for run in (one, two) if _found_filled(run)), None)
    return None if filled is None else f"{filled} found its prefix cache filled"


def _found_filled(run: Outcome) -> bool:
    """True where a run replayed from a cache that held rows before it: another cell paid for them."""
    cache = run.result.get("prefix_cache") or {}
    return bool(cache.get("hits") and cache["bytes_held"] > cache["bytes_written"])


def _ratio(pairs: Pairs, label: str) -> Row:
    """Ratio with its intervals; the ratio alone where there is one pair."""
    found = None if len(pairs.keys) < 2 else _speed(pairs, label)
    wins = None
    if pairs.keys:
        by_model: dict[str, list[float]] = {}
        for (model, _, _), gained in zip(pairs.keys, pairs.differences, strict=True):
            by_model.setdefault(model, []).append(gained)
        wins = win_rate([fmean(gains) for gains in by_model.values()])
    return {
        "num_groups": 0 if not pairs.keys else 1 if found is None else found.num_models,
        "ratio": math.exp(fmean(pairs.differences)) if pairs.keys else None,
        **ends("", None if found is None else found.interval),
        **ends("bootstrap_", None if found is None else found.bootstrap),
        "t_p": None if found is None else found.t_p_value,
        "faster_models": None if wins is None else wins.wins,
        "num_models": None if wins is None else wins.num_models,
        **ends("faster_", None if wins is None else wins.interval),
    }


def _speed(pairs: Pairs, label: str) -> SpeedRatio:
    slow, fast = ([math.exp(value) for value in column] for column in (pairs.values, pairs.references))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bootstrap of two groups that are alike has no acceleration
        return speed_ratio(slow, fast, models=pairs.groups, rng=generator(label))


def _verdict(row: Row) -> str:
    if row["holm_p"] is None or row["holm_p"] >= ALPHA:
        return NOT_KNOWN
    return "faster" if row["ratio"] > 1 else "slower"


def _scopes(own: Side, families: Mapping[str, str]) -> list[tuple[str, str, set[str]]]:
    """All models, each model, and the models of each family."""
    models = list(dict.fromkeys(key[0] for key in own))
    made = [("all", "all models", set(models)), *(("model", model, {model}) for model in models)]
    for family in dict.fromkeys(families[model] for model in models):
        made.append(("family", family, {model for model in models if families[model] == family}))
    return made


def _others(spec: Mapping[str, Any]) -> list[str]:
    return [str(method["name"]) for method in spec["methods"] if method["name"] != UNIFORM]


def _geometric_mean(ratios: Sequence[float | None]) -> float | None:
    """None where one is not known."""
    known = [math.log(ratio) for ratio in ratios if ratio]
    return math.exp(fmean(known)) if known and len(known) == len(ratios) else None
