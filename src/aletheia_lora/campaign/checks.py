"""A :class:`~aletheia_lora.campaign.spec.Campaign` -> a refusal, by name, of what no schema can say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, nearest
from .methods import METHODS, Method, has_counted_time
from .pack import CHOICES

if TYPE_CHECKING:
    from .spec import Campaign

READ_WEIGHTS = ("relative", "taylor", "weight_snr")
"""Scores that read the numbers of a weight, which packed ones do not show."""


def check_campaign(campaign: Campaign) -> None:
    """Check what keys and values say together.

    Raises:
        ConfigError: For what would run twice, words that do not exist, and settings that do not work with each other.
    """
    _check_nothing_twice(campaign)
    _check_words(campaign.methods)
    _check_uniform(campaign.methods)
    _check_match(campaign)
    _check_evaluation(campaign)
    _check_processes(campaign)


def _check_nothing_twice(campaign: Campaign) -> None:
    """Refuse what would run twice."""
    for key in ("models", "tasks", "methods"):
        _refuse_twice(key, [entry.name for entry in getattr(campaign, key)])
    for key in ("seeds", "learning_rates", "match"):
        _refuse_twice(key, getattr(campaign, key))
    for key in ("tasks", *CHOICES) if campaign.evaluation is not None else ():
        _refuse_twice(f"evaluation.{key}", getattr(campaign.evaluation, key) or [])
    for key in ("models", "tasks", "methods"):
        seen: list[tuple[dict[str, Any], str]] = []
        for entry in getattr(campaign, key):
            content = entry.model_dump(exclude={"name", "draws"})
            for other, name in seen:
                if other == content:
                    raise ConfigError(f"{key}: {name!r} and {entry.name!r} are the same. Keep one of the two.")
            seen.append((content, entry.name))


def _refuse_twice(key: str, values: Sequence[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{key}: {value!r} is given twice, so its cells would be doubled. Keep one of the two.")


def _check_words(methods: Sequence[Method]) -> None:
    """Each score, strategy and allocation exists."""
    from ..allocation import ALLOCATIONS  # late: these rooms load torch
    from ..scores import SCORES
    from ..selection import STRATEGIES

    tables: dict[str, Mapping[str, Any]] = {
        "score": SCORES,
        "strategy": STRATEGIES,
        "allocation": ALLOCATIONS,
        "params_of": _matchable(methods),
    }
    for method in methods:
        for key, table in tables.items():
            word = getattr(method, key)
            if word is not None and word not in table:
                raise ConfigError(f"method {method.name!r}: unknown {key} {word!r}. {nearest(word, table)}")
        if method.draws > 1 and "random" not in (method.strategy, method.score):
            raise ConfigError(f"method {method.name!r}: {method.draws} draws of a choice that is not random.")
        if method.adapter != "lora" and (method.trainer != "trainer" or method.params_of is not None):
            raise ConfigError(f"method {method.name!r}: {method.adapter} runs under trainer: trainer, at the one rank.")
        if method.params_of is not None and method.allocation != "uniform":
            raise ConfigError(f"method {method.name!r}: params_of finds one rank, so its allocation is uniform.")
        _check_matched(method, methods)
        if method.quantization != "none" and method.score in READ_WEIGHTS:
            raise ConfigError(
                f"method {method.name!r}: the score {method.score!r} reads weights, which quantization="
                f"{method.quantization!r} packs. Choose another score, e.g. gradient_norm, or leave quantization out."
            )
        if method.quantization == "int8" and method.adapter == "dora":
            raise ConfigError(
                f"method {method.name!r}: PEFT's DoRA loses the scales of int8 weights. Take nf4 or fp4, or LoRA."
            )


def _matchable(methods: Sequence[Method]) -> dict[str, Method]:
    """The methods that ``params_of`` may name: those of the campaign come before those of the table."""
    known = {name: Method(name=name, **given) for name, given in METHODS.items()}
    return known | {method.name: method for method in methods}


def _check_matched(method: Method, methods: Sequence[Method]) -> None:
    """What is matched in its number of weights has one of its own."""
    if method.params_of is None:
        return
    other = _matchable(methods)[method.params_of]
    if other.params_of is not None or other.adapter == "adalora":
        why = "has its own from another one" if other.params_of is not None else "changes it along the run"
        raise ConfigError(
            f"method {method.name!r}: params_of={other.name!r}, expected a method whose ranks give its number of "
            f"weights; {other.name!r} {why}. Name another one."
        )


def _check_uniform(methods: Sequence[Method]) -> None:
    """What every report calls uniform LoRA is that."""
    wanted = Method(name="uniform", **METHODS["uniform"])
    given = next((method for method in methods if method.name == wanted.name), wanted)
    for key in ("strategy", "allocation", "params_of", "trainer", "adapter", "quantization"):
        value, meant = getattr(given, key), getattr(wanted, key)
        if value != meant:
            raise ConfigError(
                f"method 'uniform': got {key}={value!r}, expected {meant!r}: by this name reports mean uniform LoRA, "
                "which all others are compared with. Give this one another name, and a strategy of its own."
            )


def _check_match(campaign: Campaign) -> None:
    """Every method has a cell."""
    uncounted = [method.name for method in campaign.methods if not has_counted_time(method.model_dump())]
    if uncounted and "steps" not in campaign.match:
        raise ConfigError(
            f"method {uncounted[0]!r} would never run: match is only 'time', and counting knows the time of LoRA on "
            "plain weights under our trainer alone. Add 'steps' to match, or leave the method out."
        )


def _check_evaluation(campaign: Campaign) -> None:
    """What is chosen for the evaluation is there."""
    pack = campaign.evaluation
    names = [method.name for method in campaign.methods]
    for name in (pack.methods if pack is not None else None) or ():
        if name not in names:
            raise ConfigError(f"evaluation.methods: there is no method {name!r} here. {nearest(name, names)}")
    for match in (pack.match if pack is not None else None) or ():
        if match not in campaign.match:
            raise ConfigError(f"evaluation.match: no run is matched by {match!r}. Add it to match, or leave it out.")


def _check_processes(campaign: Campaign) -> None:
    """Several processes can train what is asked for."""
    count = campaign.processes
    if count == 1 and campaign.accelerate_config is not None:
        raise ConfigError("accelerate_config starts several processes, and processes is 1. Say how many, or drop it.")
    if count == 1:
        return
    if campaign.batch_size % count:
        raise ConfigError(
            f"batch_size={campaign.batch_size} rows of a step cannot be shared out evenly over {count} processes. Make "
            "it a multiple of processes."
        )
    if campaign.prefix_cache:
        raise ConfigError(f"prefix_cache is made for one process, and processes is {count}. Leave out one of the two.")
    refused = next((method for method in campaign.methods if method.adapter == "adalora"), None)
    if refused is not None:
        raise ConfigError(
            f"method {refused.name!r}: PEFT adds AdaLoRA's regularization in every process, so {count} would train "
            "another objective. Give it a campaign of its own with one process."
        )
