"""Answers before and after tuning -> what was forgotten, task by task, with intervals and a test of equivalence.

Comes in: the ItemResults of the base model, uniform LoRA and the selection, on the same items with the same prompts.
Goes out: the record ``forgetting.json``; table, figures and page are made from it alone. Differences are taken item
by item. What a label has not answered is named or refused, never averaged over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from ..errors import DataError
from ..statistics import equivalence, holm, mcnemar, paired_difference
from .items import BASE, ItemResult

FORMAT = "aletheia-forgetting/1"
POINTS, NATS = "points", "nats per token"
LOGLIKELIHOOD = "loglikelihood"
"""The score of plain text: its loss per token is the sum of these over the sum of the tokens."""
MISSING = {
    "refuse": "items that one label has not answered are an error",
    "leave_out": "they are left out for every label, and the record says how many",
}

Key = tuple[str, str]
"""Task and item."""
Answers = dict[Key, ItemResult]


@dataclass(frozen=True)
class _Rules:
    """What the caller has decided, the same for every benchmark."""

    arms: list[str]
    uniform: str
    missing: str
    margins: dict[str, float | None]
    confidence: float
    alpha: float
    repeat: str | None
    repeated: str | None


@dataclass(frozen=True)
class _Costs:
    """What each item cost each label: 1 - score, or loss per token. Shapes (items,)."""

    unit: str
    metric: str
    scale: float
    by_label: dict[str, np.ndarray[Any, Any]]
    weights: np.ndarray[Any, Any] | None
    groups: list[str] | None
    binary: bool


def forgetting_report(
    results: Iterable[ItemResult],
    *,
    margin: float,
    loss_margin: float | None = None,
    uniform: str = "uniform",
    selected: str = "selected",
    repeat: str | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    metrics: Mapping[str, str] | None = None,
    missing: str = "refuse",
    confidence: float = 0.95,
    alpha: float = 0.05,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How much each adapter has forgotten, and whether the selection has forgotten more than uniform LoRA.

    Forgetting is the score of the base model minus the score after tuning, in points of 100; on plain text the loss
    after tuning minus the loss before, in nats per token. *Extra* forgetting is that of the selection minus that of
    uniform LoRA. P-values of extra forgetting are McNemar's where items are right or wrong and stand alone, else those
    of a t test with the leaf tasks as groups; Holm's correction is over the benchmarks.

    Args:
        results: Of ``base``, ``uniform``, ``selected`` and any controls; every other label is one more arm.
        margin: The extra forgetting, in points, that would not matter. Fix it before looking.
        loss_margin: The same for plain text, in nats per token; needed if there is plain text.
        uniform: Label of the reference.
        selected: Label of the selection.
        repeat: Label of a second evaluation of one of these adapters, in another order and batch size: the noise floor.
        groups: Benchmark -> its leaf tasks (``mmlu`` -> ``mmlu_anatomy``, ...). Items of one leaf may move together.
            A leaf of several groups counts in the largest; a task of none is a benchmark of its own.
        metrics: Benchmark -> the score to use, where its items have several. Higher is better, 0 to 1.
        missing: A key of ``MISSING``.
        confidence: Of the intervals.
        alpha: Of the tests.
        about: Where the record says what was evaluated: ``model``, ``data``, ``environment`` and the like.

    Returns:
        The record, as plain JSON types.

    Raises:
        DataError: If there is nothing to compare, a label or an item is missing or doubled, a prompt or an adapter
            differs where it must be the same, or a score cannot be read.
        ValueError: If a margin is not above 0.
    """
    if missing not in MISSING:
        raise ValueError(f"missing={missing!r}, expected one of {', '.join(MISSING)}.")
    answers = _by_label(results)
    rules = _Rules(
        arms=_arms(answers, uniform, selected, repeat),
        uniform=uniform,
        missing=missing,
        margins={POINTS: margin, NATS: loss_margin},
        confidence=confidence,
        alpha=alpha,
        repeat=repeat,
        repeated=_check_adapters(answers, repeat),
    )
    _check_prompts(answers)
    tasks = []
    for name, own in _by_benchmark(answers, groups or {}).items():
        tasks.append(_task(name, own, _metric(name, own, (metrics or {}).get(name)), rules))
    _correct(tasks, selected, alpha)
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **(about or {}),
        "uniform": uniform,
        "selected": selected,
        "settings": {
            "margin": margin,
            "loss_margin": loss_margin,
            "confidence": confidence,
            "alpha": alpha,
            "missing": missing,
        },
        "adapters": {label: next(iter(found.values())).adapter_digest for label, found in answers.items()},
        "tasks": tasks,
    }


def paired_scores(
    results: Iterable[ItemResult],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    metrics: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """The scores of the base model and of one adapter on the same items, benchmark by benchmark.

    Args:
        results: Of ``base`` and of one other label.
        groups: As in :func:`forgetting_report`.
        metrics: As there.

    Returns:
        For each benchmark ``metric``, ``unit`` (points of 100, or nats per token of plain text), ``higher_is_better``,
        ``base`` and ``value``, and item by item ``base_items`` and ``items``, in the same unit. The whole is the mean
        over items; of plain text, weighted by the tokens in ``weights``. An item of a group is named after its leaf
        task, too: ``mmlu_anatomy/0123456789abcdef``.

    Raises:
        DataError: As :func:`forgetting_report`, and if there are other than two labels.
    """
    answers = _by_label(results)
    if BASE not in answers or len(answers) != 2:
        raise DataError(f"results of {', '.join(answers) or 'none'}, expected those of base and of one adapter.")
    (label,) = (name for name in answers if name != BASE)
    _check_prompts(answers)
    found = {}
    for name, own in _by_benchmark(answers, groups or {}).items():
        keys = _shared_items(name, own, [BASE, label], "refuse")
        answered = {which: [own[which][key] for key in keys] for which in (BASE, label)}
        costs = _costs(name, answered, _metric(name, own, (metrics or {}).get(name)))
        ids = [item if leaf == name else f"{leaf}/{item}" for leaf, item in keys]
        entry: dict[str, Any] = {
            "metric": costs.metric,
            "unit": costs.unit,
            "higher_is_better": costs.unit == POINTS,
            "base": _score(costs, BASE),
            "value": _score(costs, label),
            "items": dict(zip(ids, _item_scores(costs, label), strict=True)),
            "base_items": dict(zip(ids, _item_scores(costs, BASE), strict=True)),
        }
        if costs.weights is not None:
            entry["weights"] = dict(zip(ids, costs.weights.tolist(), strict=True))
        found[name] = entry
    return found


def first_metrics(results: Iterable[ItemResult], groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """For each benchmark whose items have several scores, the one that its task names first."""
    group_of = {leaf: name for name, leaves in groups.items() for leaf in leaves}
    found: dict[str, str] = {}
    for item in results:
        if len(item.scores) > 1:
            found.setdefault(group_of.get(item.task, item.task), next(iter(item.scores)))
    return found


# --- what must be the same --------------------------------------------------------------------------------------------


def _by_label(results: Iterable[ItemResult]) -> dict[str, Answers]:
    answers: dict[str, Answers] = {}
    for item in results:
        own = answers.setdefault(item.label, {})
        if (item.task, item.item_id) in own:
            raise DataError(
                f"{item.label} answers item {item.item_id} of {item.task} twice. Each item counts once: remove one "
                "line, or give a second evaluation a label of its own and name it in repeat."
            )
        own[item.task, item.item_id] = item
    return answers


def _by_benchmark(answers: Mapping[str, Answers], groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Answers]]:
    """The answers of every label, benchmark by benchmark, in order of appearance."""
    by_size = sorted(groups, key=lambda group: len(groups[group]))
    benchmark_of = {leaf: group for group in by_size for leaf in groups[group]}
    split: dict[str, dict[str, Answers]] = {}
    for label, found in answers.items():
        for key, item in found.items():
            own = split.setdefault(benchmark_of.get(item.task, item.task), {name: {} for name in answers})
            own[label][key] = item
    return split


def _arms(answers: Mapping[str, Answers], uniform: str, selected: str, repeat: str | None) -> list[str]:
    """The labels to compare: base, uniform and selected first, then controls."""
    wanted = [BASE, uniform, selected, *([] if repeat is None else [repeat])]
    absent = [label for label in wanted if label not in answers]
    if absent:
        raise DataError(f"no results of {', '.join(absent)}; there are {', '.join(answers) or 'none'}. Evaluate them.")
    if len(set(wanted)) < len(wanted):
        raise DataError(f"labels {', '.join(wanted)}: each must be another one.")
    return wanted[:3] + [label for label in answers if label not in wanted]


def _check_adapters(answers: Mapping[str, Answers], repeat: str | None) -> str | None:
    """One adapter to a label, another to each, none to the base; the label that ``repeat`` repeats."""
    seen: dict[str | None, str] = {}
    for label in sorted(answers, key=lambda label: label == repeat):
        digests = {item.adapter_digest for item in answers[label].values()}
        if len(digests) > 1:
            raise DataError(f"{label} mixes the answers of {len(digests)} adapters. Evaluate one adapter per label.")
        digest = digests.pop()
        if label == repeat:
            if digest not in seen:
                raise DataError(f"{label} repeats none of {', '.join(seen.values())}: its adapter is another one.")
            return seen[digest]
        if (label == BASE) != (digest is None):
            raise DataError(f"{label} was evaluated {'without' if digest is None else 'with'} an adapter.")
        if digest in seen:
            raise DataError(f"{label} and {seen[digest]} are the same adapter. Name one of them in repeat.")
        seen[digest] = label
    return None


def _check_prompts(answers: Mapping[str, Answers]) -> None:
    asked: dict[Key, ItemResult] = {}
    differing = []
    for found in answers.values():
        for key, item in found.items():
            first = asked.setdefault(key, item)
            if first.prompt_sha256 != item.prompt_sha256:
                differing.append((first.label, item))
    if differing:
        label, item = differing[0]
        raise DataError(
            f"{len(differing)} prompts differ between labels, the first at item {item.item_id} of {item.task} "
            f"({label} against {item.label}). Evaluate all with the same task version, shots, seed and chat template."
        )


def _shared_items(name: str, own: Mapping[str, Answers], evaluated: Sequence[str], missing: str) -> list[Key]:
    """The items that all evaluated labels have answered, in order."""
    every = dict.fromkeys(key for label in evaluated for key in own[label])
    shared = [key for key in every if all(key in own[label] for label in evaluated)]
    if len(shared) < len(every) and missing == "refuse":
        gaps = {label: [key for key in every if key not in own[label]] for label in evaluated}
        label, lost = max(gaps.items(), key=lambda gap: len(gap[1]))
        raise DataError(
            f"{label} has not answered {len(lost)} of {len(every)} items of {name}, such as {' / '.join(lost[0])}. "
            "Evaluate them, or pass missing='leave_out' to compare the rest; the record then says how many."
        )
    if not shared:
        raise DataError(f"no item of {name} was answered by all of {', '.join(evaluated)}. Evaluate the same items.")
    return shared


# --- one benchmark ----------------------------------------------------------------------------------------------------


def _metric(name: str, own: Mapping[str, Answers], wanted: str | None) -> str:
    found = list(dict.fromkeys(metric for items in own.values() for item in items.values() for metric in item.scores))
    if wanted is None and LOGLIKELIHOOD in found:
        return LOGLIKELIHOOD
    if wanted in found or (wanted is None and len(found) == 1):
        return wanted or found[0]
    asked = "" if wanted is None else f", not {wanted}"
    raise DataError(
        f"items of {name} have the scores {', '.join(found) or 'none'}{asked}. Name one: metrics={{{name!r}: ...}}."
    )


def _task(name: str, own: Mapping[str, Answers], metric: str, rules: _Rules) -> dict[str, Any]:
    """One benchmark of the record: an entry per arm, with None where it was not evaluated."""
    evaluated = [label for label in rules.arms if own[label]]
    keys = _shared_items(name, own, evaluated, rules.missing)
    answered = {label: [own[label][key] for key in keys] for label in evaluated}
    costs = _costs(name, answered, metric)
    margin = rules.margins[costs.unit]
    if margin is None:
        raise DataError(f"{name} is plain text: give loss_margin, the extra loss in nats per token that is no matter.")
    entries = []
    for label in rules.arms:
        entry: dict[str, Any] = {"label": label, "n": len(answered.get(label, ()))}
        if label in answered:
            entry |= {
                "num_left_out": len(own[label]) - len(keys),
                "score": _score(costs, label),
                "num_answers_cut": sum(item.stop_reason == "length" for item in answered[label]),
                "num_prompts_cut": sum(item.prompt_truncated for item in answered[label]),
            }
        for key, reference in (("forgetting", BASE), ("extra", rules.uniform)):
            comparable = label not in (BASE, reference) and {label, reference} <= answered.keys()
            entry[key] = _difference(costs, label, reference, rules.confidence) if comparable else None
        if entry["extra"] is not None:
            entry["extra"]["equivalence"] = _equivalence(costs, label, rules.uniform, margin, rules.alpha)
        entries.append(entry)
    return {
        "task": name,
        "metric": metric,
        "unit": costs.unit,
        "margin": margin,
        "n": len(keys),
        "num_groups": None if costs.groups is None else len(set(costs.groups)),
        "arms": entries,
        "noise": _noise(name, own, metric, rules),
    }


def _costs(name: str, answered: Mapping[str, Sequence[ItemResult]], metric: str) -> _Costs:
    """What the items cost, lower is better; refuses scores that are no share and token counts that differ."""
    first = next(iter(answered.values()))
    leaves = [item.task for item in first]
    groups = leaves if len(set(leaves)) > 1 else None
    for label, items in answered.items():
        lacking = next((item for item in items if metric not in item.scores), None)
        if lacking is not None:
            raise DataError(f"item {lacking.item_id} of {lacking.task} ({label}) has no score {metric!r}.")
    scores = {label: np.array([item.scores[metric] for item in items]) for label, items in answered.items()}
    if metric == LOGLIKELIHOOD:
        weights = np.array([float(item.num_response_tokens) for item in first])
        for label, items in answered.items():
            if (weights != [item.num_response_tokens for item in items]).any() or weights.min() <= 0:
                raise DataError(f"texts of {name} have other numbers of tokens under {label}, or none. Score it again.")
        losses = {label: -sums / weights for label, sums in scores.items()}
        return _Costs(NATS, metric, 1.0, losses, weights, groups, binary=False)
    values = np.concatenate(list(scores.values()))
    if values.min() < 0 or values.max() > 1:
        raise DataError(
            f"{metric} of {name} goes from {values.min():g} to {values.max():g}; points need 0 to 1. "
            f"Name another score: metrics={{{name!r}: ...}}."
        )
    wrong = {label: 1 - score for label, score in scores.items()}
    return _Costs(POINTS, metric, 100.0, wrong, None, groups, binary=bool(np.isin(values, (0, 1)).all()))


def _score(costs: _Costs, label: str) -> float:
    """The number that people know: percent right, or nats per token."""
    mean = float(np.average(costs.by_label[label], weights=costs.weights))
    return 100 * (1 - mean) if costs.unit == POINTS else mean


def _item_scores(costs: _Costs, label: str) -> list[float]:
    """The same of every item."""
    values = costs.by_label[label]
    return [float(value) for value in (100 * (1 - values) if costs.unit == POINTS else values)]


def _difference(costs: _Costs, label: str, reference: str, confidence: float) -> dict[str, Any]:
    """How much more ``label`` costs than ``reference``, in the unit; no interval from one item or one group."""
    own, other = costs.by_label[label], costs.by_label[reference]
    found: dict[str, Any] = {
        "mean": costs.scale * float(np.average(own - other, weights=costs.weights)),
        "low": None,
        "high": None,
        "n": len(own),
        "num_worse": int((own > other).sum()),
        "num_better": int((own < other).sum()),
        "p_value": None,
        "test": None,
    }
    if len(own) > 1:
        paired = paired_difference(
            own, other, groups=costs.groups, weights=costs.weights, binary=costs.binary, confidence=confidence
        )
        exact = costs.binary and costs.groups is None
        found |= {
            "low": costs.scale * paired.interval.low,
            "high": costs.scale * paired.interval.high,
            "p_value": mcnemar(own, other).p_value if exact else paired.t_p_value,
            "test": "McNemar, exact" if exact else "t" if costs.groups is None else "t, clustered",
        }
    return found


def _equivalence(costs: _Costs, label: str, reference: str, margin: float, alpha: float) -> dict[str, Any] | None:
    own, other = costs.by_label[label], costs.by_label[reference]
    if len(own) < 2:
        return None
    found = equivalence(
        own,
        other,
        margin=margin / costs.scale,
        groups=costs.groups,
        weights=costs.weights,
        binary=costs.binary,
        alpha=alpha,
    )
    return {
        "margin": margin,
        "low": costs.scale * found.interval.low,
        "high": costs.scale * found.interval.high,
        "confidence": found.interval.confidence,
        "p_value": found.p_value,
        "equivalent": found.equivalent,
    }


def _noise(name: str, own: Mapping[str, Answers], metric: str, rules: _Rules) -> dict[str, Any] | None:
    """What a second evaluation of one adapter changed, on the items that it answered again."""
    repeat, repeated = rules.repeat, rules.repeated
    if repeat is None or repeated is None:
        return None
    keys = [key for key in own[repeat] if key in own[repeated]]
    if not keys:
        return None
    answered = {label: [own[label][key] for key in keys] for label in (repeated, repeat)}
    costs = _costs(name, answered, metric)
    found = _difference(costs, repeat, repeated, rules.confidence)
    texts = [(first.response, second.response) for first, second in zip(*answered.values(), strict=True)]
    changed = sum(first != second for first, second in texts) if any(map(any, texts)) else None
    return {"label": repeated, "num_responses_changed": changed, **found}


def _correct(tasks: Sequence[dict[str, Any]], selected: str, alpha: float) -> None:
    """Write Holm's p-values and the verdicts on the selection beside its extra forgetting."""
    found = {}
    for task in tasks:
        extra = next(entry["extra"] for entry in task["arms"] if entry["label"] == selected)
        if extra is not None and extra["p_value"] is not None:
            found[task["task"]] = extra
    if not found:
        return
    corrected = holm({name: extra["p_value"] for name, extra in found.items()}, alpha=alpha)
    for name, extra in found.items():
        extra["adjusted_p_value"] = corrected.adjusted[name]
        different = "more" if extra["mean"] > 0 else "less"
        alike = extra["equivalence"]["equivalent"]
        extra["verdict"] = "equivalent" if alike else different if name in corrected.rejected else "undecided"
