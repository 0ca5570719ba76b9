"""Ranks -> a ``peft.LoraConfig``; attaches it and takes the census that proves what was adapted.

Beside ``fast_lora.py`` the only room that knows how PEFT spells things. Modules are named in full, because leaf names
reach further than meant: into unselected layers of mixture-of-experts models, vision towers and shared experts.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from .allocation import ModuleRank
from .anatomy import ModelAnatomy
from .errors import CensusError, PlanError, UnsupportedModelError
from .layers import check_placement


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One adapter as found on a model."""

    name: str
    """Full name of the adapted module, or of the parameter for stacked experts."""
    rank: int
    alpha: float
    num_params: int


def lora_config(anatomy: ModelAnatomy, ranks: Sequence[ModuleRank], *, lora_dropout: float = 0.0) -> LoraConfig:
    """An ordinary LoRA configuration that adapts exactly the modules in ``ranks``.

    Args:
        anatomy: Anatomy of the model the configuration is for.
        ranks: One entry per module to adapt.
        lora_dropout: Dropout before the adapter, 0 to 1.

    Raises:
        PlanError: If a module is not in the model, is named twice, or dropout meets stacked experts, which PEFT
            cannot do.
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
    rewritten = _leaf_names_peft_rewrites(anatomy.model_type)
    modules, parameters = [], []
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    # PEFT warns of patterns that name parameters as if they were ignored, so let the experts' rank be the usual one.
    stacked = [entry for entry in ranks if known[entry.name].storage == "stacked"]
    usual_rank, usual_alpha = Counter((entry.rank, entry.alpha) for entry in stacked or ranks).most_common(1)[0][0]
    for entry in ranks:
        target = entry.name
        if known[entry.name].storage == "stacked":
            parameters.append(target)
        elif target.rpartition(".")[2] in rewritten:
            target = f"{target}.weight"
            parameters.append(target)
        else:
            modules.append(target)
        if entry.rank != usual_rank:
            rank_pattern[target] = entry.rank
        if entry.alpha != usual_alpha:
            alpha_pattern[target] = entry.alpha
    if parameters and lora_dropout:
        raise PlanError(f"lora_dropout={lora_dropout} does not work on stacked experts ({parameters[0]}). Set it to 0.")
    return LoraConfig(
        r=usual_rank,
        lora_alpha=usual_alpha,  # type: ignore[arg-type]  # PEFT divides by rank: a float will do
        lora_dropout=lora_dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        fan_in_fan_out=all(known[entry.name].storage == "conv1d" for entry in ranks),
        task_type=TaskType.CAUSAL_LM,
        bias="none",
    )


def attach(
    model: Any, anatomy: ModelAnatomy, ranks: Sequence[ModuleRank], *, lora_dropout: float = 0.0, seed: int = 0
) -> PeftModel:
    """Put the adapters on the model and prove by census that they, and nothing else, are there.

    The random start of the adapters depends on ``seed`` alone; the global random state does not move. On failure the
    model is given back without adapters, its ``requires_grad`` flags as found.

    Raises:
        PlanError: As :func:`lora_config`.
        CensusError: If what was attached is not what was planned.
        UnsupportedModelError: If the model has no configuration, or weights are on the meta device or scattered.
    """
    if getattr(model, "config", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config, which adapters are saved, loaded and trained by. Expected a "
            "transformers model: subclass PreTrainedModel, with a PreTrainedConfig that has a model_type."
        )
    check_placement(model)
    config = lora_config(anatomy, ranks, lora_dropout=lora_dropout)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = [model.device] if getattr(getattr(model, "device", None), "type", "") == "cuda" else []
    peft_model = None
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the census below is stricter than any of PEFT's warnings
            torch.manual_seed(seed)
            peft_model = get_peft_model(model, config)
        check_census(peft_model, ranks)
    except BaseException:
        if peft_model is not None:
            peft_model.unload()
            vars(model).pop("peft_config", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return peft_model


def shared_copy(model: nn.Module) -> Any:
    """A copy of the model with modules of its own over the same weights: adapters and hooks of its own, shared memory.

    The weights themselves are the caller's: a ``requires_grad`` flag set on one is set for both.
    """
    tensors = [*model.parameters(), *model.buffers()]
    flags = [tensor.requires_grad for tensor in tensors]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for tensor, flag in zip(tensors, flags, strict=True):
        tensor.requires_grad_(flag)
    return twin


def census(model: nn.Module, adapter_name: str = "default") -> tuple[AdapterEntry, ...]:
    """List every adapter that the model really carries, by walking its modules."""
    entries = []
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    for path, module in modules:
        if not isinstance(module, LoraLayer) or adapter_name not in module.r:
            continue
        name = path.removeprefix("base_model.model.").replace(".base_layer", "")
        if isinstance(module, ParamWrapper):
            name = f"{name}.{module.parameter_name}"
        num_params = sum(
            parameter.numel()
            for key, parameter in module.named_parameters()  # type: ignore[attr-defined]
            if f".{adapter_name}." in f".{key}." and ".base_layer." not in f".{key}" and key.startswith("lora_")
        )
        entries.append(
            AdapterEntry(name, int(module.r[adapter_name]), float(module.lora_alpha[adapter_name]), num_params)
        )
    return tuple(entries)


def check_census(model: nn.Module, ranks: Sequence[ModuleRank]) -> tuple[AdapterEntry, ...]:
    """Compare the adapters on the model with the plan, module by module.

    Raises:
        CensusError: If any adapter is missing, extra, on the wrong module, or of another rank or alpha, or if a
            weight other than the adapters' would train.
    """
    found = census(model)
    want: Mapping[str, tuple[int, float]] = {entry.name: (entry.rank, float(entry.alpha)) for entry in ranks}
    have = {
        entry.name if entry.name in want else entry.name.removesuffix(".weight"): (entry.rank, entry.alpha)
        for entry in found
    }
    missing, extra = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    wrong = sorted(name for name in set(want) & set(have) if want[name] != have[name])
    if missing or extra or wrong:
        details = [
            f"{len(names)} {word} (e.g. {names[0]}{_got(names[0], want, have)})"
            for names, word in ((missing, "missing"), (extra, "not in the plan"), (wrong, "of another rank or alpha"))
            if names
        ]
        raise CensusError(
            f"the adapters on the model are not those of the plan: {', '.join(details)}. Nothing was trained."
        )
    foreign = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_" not in name]
    if foreign:
        raise CensusError(
            f"{len(foreign)} weights besides the adapters would train, e.g. {foreign[0]}. Freeze them first."
        )
    return found


def dead_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters whose ``lora_B`` has no gradient or a zero one; call after the first backward."""
    return [
        name.removeprefix("base_model.model.")
        for name, parameter in model.named_parameters()
        if "lora_B" in name and parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.any()))
    ]


def _got(name: str, want: Mapping[str, tuple[int, float]], have: Mapping[str, tuple[int, float]]) -> str:
    if name in want and name in have:
        return f": planned rank and alpha {want[name]}, found {have[name]}"
    return ""


def _leaf_names_peft_rewrites(model_type: str) -> frozenset[str]:
    """Leaf names that PEFT turns into expert parameters of every layer on this model type (PEFT 0.19 and later)."""
    try:
        from peft.utils import transformers_weight_conversion as conversion

        base = str(conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type))
        return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(base, {}))
    except (ImportError, AttributeError):
        return frozenset()  # another PEFT: the census still refuses whatever it rewrites
