"""Ranks -> the configuration of a PEFT method; reading :data:`METHODS` is reading the table of methods.

Comes in: the anatomy and a rank for every module. Goes out: an ordinary PEFT configuration that names every module in
full, or the reason why this method cannot adapt one of them. LoRA's own configuration is made in ``adapter.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from peft import (
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    TaskType,
    VeraConfig,
)
from peft.tuners.lokr.layer import factorization

from .allocation import ModuleRank
from .anatomy import ModelAnatomy, ModuleAnatomy, Storage
from .errors import PlanError, nearest

OFT_BLOCK, FREQUENCIES = 32, 1000
"""PEFT's own block size of OFT, and its number of FourierFT's coefficients per matrix."""
WHY_NOT: dict[Storage, str] = {
    "stacked": "PEFT adapts stacked experts by LoRA only",
    "conv1d": "PEFT's {method} does not take Conv1D",
    "quantized": "PEFT's {method} does not take quantized weights",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to adapt a frozen matrix, as PEFT offers it."""

    config: type[PeftConfig]
    num_params: Callable[[ModuleAnatomy, int], int]
    """Trainable weights of an adapter of this rank on this module."""
    rank: Literal["per module", "one for all", None]
    """Whether it has a rank, and whether modules may differ in it."""
    alpha: bool = False
    """Whether its update is scaled by alpha / rank."""
    storages: frozenset[Storage] = frozenset({"linear"})
    """What it can adapt."""
    why_not: Callable[[ModuleAnatomy, int], str | None] = lambda _module, _rank: None
    """Why it cannot adapt this module at this rank, for other reasons than storage."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration, the same for every model."""


def _lokr_params(module: ModuleAnatomy, rank: int) -> int:
    """w1 (Kronecker) w2, of which w2 is itself of low rank where that is smaller."""
    (out_left, out_right), (in_left, in_right) = factorization(module.out_features), factorization(module.in_features)
    low_rank = rank < max(out_right, in_right) / 2
    return out_left * in_left + (rank * (out_right + in_right) if low_rank else out_right * in_right)


def _whole_blocks(module: ModuleAnatomy, _rank: int) -> str | None:
    left = module.in_features % OFT_BLOCK
    return f"its {module.in_features} inputs do not divide into blocks of {OFT_BLOCK}" if left else None


def _enough_entries(module: ModuleAnatomy, _rank: int) -> str | None:
    few = module.num_params < FREQUENCIES
    return f"it has {module.num_params} weights, fewer than {FREQUENCIES} frequencies" if few else None


def _even(_module: ModuleAnatomy, rank: int) -> str | None:
    return f"only an even rank starts at the frozen model, and its rank is {rank}" if rank % 2 else None


def _scales_input(module: ModuleAnatomy) -> bool:
    """True where (IA)^3 scales the input and not the output: MLP matrices that lead back down (the paper's l_ff)."""
    return module.kind == "mlp" and module.out_features < module.in_features


METHODS: dict[str, Method] = {
    "lora": Method(  # Hu et al., arXiv 2106.09685
        config=LoraConfig,
        num_params=lambda module, rank: module.adapter_params(rank),
        rank="per module",
        alpha=True,
        storages=frozenset({"linear", "conv1d", "quantized", "stacked"}),
    ),
    "ia3": Method(  # Liu et al., arXiv 2205.05638
        config=IA3Config,
        num_params=lambda module, _rank: module.in_features if _scales_input(module) else module.out_features,
        rank=None,
        storages=frozenset({"linear", "conv1d", "quantized"}),
    ),
    "loha": Method(  # Hyeon-Woo et al., arXiv 2108.06098
        config=LoHaConfig,
        num_params=lambda module, rank: 2 * rank * (module.in_features + module.out_features),
        rank="per module",
        alpha=True,
    ),
    "lokr": Method(  # Yeh et al., arXiv 2309.14859
        config=LoKrConfig, num_params=_lokr_params, rank="per module", alpha=True
    ),
    "vera": Method(  # Kopiczko et al., arXiv 2310.11454
        config=VeraConfig,
        num_params=lambda module, rank: module.out_features + rank,
        rank="one for all",
        storages=frozenset({"linear", "conv1d", "quantized"}),
    ),
    "oft": Method(  # Qiu et al., arXiv 2306.07280
        config=OFTConfig,
        num_params=lambda module, _rank: module.in_features * (OFT_BLOCK - 1) // 2,
        rank=None,
        storages=frozenset({"linear", "quantized"}),
        why_not=_whole_blocks,
        settings={"oft_block_size": OFT_BLOCK},
    ),
    "fourierft": Method(  # Gao et al., arXiv 2405.03003; from 0 and not from a normal distribution: at the frozen model
        config=FourierFTConfig,
        num_params=lambda _module, _rank: FREQUENCIES,
        rank=None,
        storages=frozenset({"linear", "conv1d"}),
        why_not=_enough_entries,
        settings={"n_frequency": FREQUENCIES, "init_weights": True},
    ),
    "hra": Method(  # Yuan et al., arXiv 2405.17484
        config=HRAConfig, num_params=lambda module, rank: rank * module.in_features, rank="one for all", why_not=_even
    ),
}


def method_of(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: If there is none; names the nearest.
    """
    if name not in METHODS:
        raise ValueError(f"unknown adapter {name!r}. {nearest(name, METHODS)}")
    return METHODS[name]


def with_params(name: str, anatomy: ModelAnatomy, ranks: Sequence[ModuleRank]) -> tuple[ModuleRank, ...]:
    """The same ranks, each with the number of weights that this method trains there."""
    method, modules = method_of(name), {module.name: module for module in anatomy.modules}
    return tuple(replace(entry, num_params=method.num_params(modules[entry.name], entry.rank)) for entry in ranks)


def checked_modules(anatomy: ModelAnatomy, ranks: Sequence[ModuleRank]) -> list[ModuleAnatomy]:
    """The modules that the ranks are for, in their order.

    Raises:
        PlanError: If there are none, or one is not in the model or named twice.
    """
    if not ranks:
        raise PlanError("no module was given a rank. Choose at least one layer and one target.")
    known = {module.name: module for module in anatomy.modules}
    unknown = [entry.name for entry in ranks if entry.name not in known]
    if unknown:
        raise PlanError(
            f"{len(unknown)} modules are not in {anatomy.architecture}, e.g. {unknown[0]!r}. Make a new plan for it."
        )
    if len({entry.name for entry in ranks}) != len(ranks):
        raise PlanError("a module is named twice in the ranks. Give each module one rank.")
    return [known[entry.name] for entry in ranks]


def method_config(name: str, anatomy: ModelAnatomy, ranks: Sequence[ModuleRank]) -> PeftConfig:
    """A configuration of a method other than LoRA that adapts exactly the modules in ``ranks``.

    Methods without a rank read the names only. What the configuration does not say is PEFT's default.

    Args:
        name: A key of :data:`METHODS`.
        anatomy: Anatomy of the model the configuration is for.
        ranks: One entry per module to adapt.

    Raises:
        ValueError: If there is no such method.
        PlanError: If a module is unknown, named twice, or cannot be adapted so; says which and why.
    """
    method, modules = method_of(name), checked_modules(anatomy, ranks)
    _refuse(name, method, modules, ranks)
    settings: dict[str, Any] = {
        "task_type": TaskType.CAUSAL_LM,
        "target_modules": [module.name for module in modules],
        **method.settings,
    }
    if method.rank is not None:
        settings["r"] = ranks[0].rank
    if method.alpha:
        settings["alpha"] = ranks[0].alpha
    if method.rank == "per module":
        settings["rank_pattern"] = {entry.name: entry.rank for entry in ranks if entry.rank != ranks[0].rank}
        settings["alpha_pattern"] = {entry.name: entry.alpha for entry in ranks if entry.alpha != ranks[0].alpha}
    if "conv1d" in method.storages:
        settings["fan_in_fan_out"] = all(module.storage == "conv1d" for module in modules)
    if name == "ia3":
        settings["feedforward_modules"] = [module.name for module in modules if _scales_input(module)]
    return method.config(**settings)


def _refuse(name: str, method: Method, modules: Sequence[ModuleAnatomy], ranks: Sequence[ModuleRank]) -> None:
    refused: dict[str, list[str]] = {}
    for module, entry in zip(modules, ranks, strict=True):
        reason = method.why_not(module, entry.rank)
        if module.storage not in method.storages:
            reason = WHY_NOT[module.storage].format(method=name)
        if reason is not None:
            refused.setdefault(reason, []).append(module.name)
    if refused:
        reason, names = next(iter(refused.items()))
        number = sum(map(len, refused.values()))
        raise PlanError(
            f"{name} cannot adapt {number} of {len(modules)} modules, e.g. {names[0]}: {reason}. "
            "Name others with targets, or adapt by lora."
        )
    different = sorted({entry.rank for entry in ranks})
    if method.rank == "one for all" and len(different) > 1:
        raise PlanError(
            f"{name} has one rank for all modules, and the plan gives {', '.join(map(str, different))}. "
            "Plan with allocation='uniform'."
        )
