"""Results of items -> the numbers of a table, and how far answers can be trusted.

Comes in: ItemResults. Goes out: plain dicts. Nothing else is read, so whoever has the lines has the numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .items import ItemResult

SUMS = {"loglikelihood", "num_words", "num_bytes"}
"""Scores that are added up over items, not averaged."""
WORTH_SAYING = 0.05
"""Share of empty, truncated or capped answers from which on the summary says so in words."""


def table(items: Iterable[ItemResult], groups: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """One row for each task or group and metric.

    Args:
        items: Results of any number of labels.
        groups: Group -> its tasks; its number is the mean over all their items.

    Returns:
        ``task``, ``metric``, ``num_items`` and ``values``: label -> ``value`` and ``standard_error`` of the mean (None
        where there is one item only, and for perplexities).
    """
    by_task: dict[str, dict[str, list[ItemResult]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        for name in (item.task, *(group for group, members in groups.items() if item.task in members)):
            by_task[name][item.label].append(item)
    rows = []
    for name, by_label in sorted(by_task.items()):
        found = {label: _metrics(members) for label, members in by_label.items()}
        for metric in dict.fromkeys(metric for metrics in found.values() for metric in metrics):
            rows.append(
                {
                    "task": name,
                    "metric": metric,
                    "num_items": max(map(len, by_label.values())),
                    "values": {label: metrics[metric] for label, metrics in found.items() if metric in metrics},
                }
            )
    return rows


def rates(items: Iterable[ItemResult]) -> list[dict[str, Any]]:
    """Shares of answers that are no full answer, for each label and task.

    Returns:
        ``label``, ``task``, ``num_items`` and the shares ``empty`` (nothing but white space was said), ``capped`` (cut
        at the largest number of new tokens), both None where nothing was generated, ``truncated`` (the beginning of
        the prompt was cut off) and ``forgeable`` (program and test shared an interpreter).
    """
    by_key: dict[tuple[str, str], list[ItemResult]] = defaultdict(list)
    for item in items:
        by_key[item.label, item.task].append(item)
    return [
        {
            "label": label,
            "task": task,
            "num_items": len(members),
            "empty": _share(members, lambda item: not item.response.strip()),
            "capped": _share(members, lambda item: item.stop_reason == "length"),
            "truncated": sum(item.prompt_truncated for item in members) / len(members),
            "forgeable": sum(bool(item.details.get("forgeable")) for item in members) / len(members),
        }
        for (label, task), members in sorted(by_key.items())
    ]


def warnings_of(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before believing a number, in words."""
    words = {"empty": "empty answers", "capped": "answers cut at the length limit", "truncated": "truncated prompts"}
    words["forgeable"] = "verdicts that a program could forge"
    return [
        f"{rate['label']}, {rate['task']}: {rate[kind]:.0%} {name}"
        for rate in found
        for kind, name in words.items()
        if rate[kind] is not None and rate[kind] >= WORTH_SAYING
    ]


def _share(members: Sequence[ItemResult], is_so: Any) -> float | None:
    generated = [item for item in members if item.stop_reason != "scored"]
    return sum(map(is_so, generated)) / len(generated) if generated else None


def _metrics(members: Sequence[ItemResult]) -> dict[str, dict[str, float | None]]:
    values: dict[str, list[float]] = defaultdict(list)
    for item in members:
        for name, value in item.scores.items():
            values[name].append(value)
    found = {name: _mean(numbers) for name, numbers in values.items() if name not in SUMS}
    nats = -math.fsum(values["loglikelihood"])
    for metric, unit, scale in (
        ("word_perplexity", "num_words", None),
        ("byte_perplexity", "num_bytes", None),
        ("bits_per_byte", "num_bytes", math.log(2)),
    ):
        if values[unit]:
            per_unit = nats / math.fsum(values[unit])
            value = math.exp(per_unit) if scale is None else per_unit / scale
            found[metric] = {"value": value, "standard_error": None}
    return found


def _mean(numbers: Sequence[float]) -> dict[str, float | None]:
    mean = math.fsum(numbers) / len(numbers)
    if len(numbers) < 2:
        return {"value": mean, "standard_error": None}
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
    return {"value": mean, "standard_error": math.sqrt(variance / len(numbers))}
