"""Ranks -> a PEFT configuration; attaches it and takes the census that proves what was adapted.

Beside ``methods.py`` and ``fast_lora.py`` the only room that knows how PEFT spells things. Modules are named in full,
because leaf names reach further than meant: into unselected layers of mixture-of-experts models, vision towers and
shared experts.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .adapter_options import PLAIN, AdapterOptions
from .allocation import ModuleRank
from .anatomy import ModelAnatomy
from .errors import CensusError, PlanError, UnsupportedModelError, nearest
from .layers import embedding_of
from .methods import METHODS, checked_modules, method_config, method_of
from .placement import check_placement
from .quantized import settle_states, state_tensors


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One adapter as found on a model."""

    name: str
    """Full name of the adapted module, or of the parameter for stacked experts."""
    rank: int | None
    """None where the method has none; so is ``alpha``."""
    alpha: float | None
    num_params: int
    method: str = "lora"
    """A key of :data:`~aletheia_lora.methods.METHODS`."""


def peft_config(anatomy: ModelAnatomy, ranks: Sequence[ModuleRank], options: AdapterOptions = PLAIN) -> PeftConfig:
    """An ordinary PEFT configuration that adapts exactly the modules in ``ranks``, by the method of the options.

    Raises:
        ValueError: If no method has this name.
        PlanError: If the method cannot adapt one of them, as :func:`lora_config` and
            :func:`~aletheia_lora.methods.method_config` say.
    """
    if options.adapter == "lora":
        return lora_config(anatomy, ranks, options)
    return method_config(options.adapter, anatomy, ranks)


def lora_config(anatomy: ModelAnatomy, ranks: Sequence[ModuleRank], options: AdapterOptions = PLAIN) -> LoraConfig:
    """An ordinary LoRA configuration that adapts exactly the modules in ``ranks``.

    Args:
        anatomy: Anatomy of the model the configuration is for.
        ranks: One entry per module to adapt.
        options: Dropout and PEFT's variants of LoRA; the method is not read.

    Raises:
        PlanError: If a module is not in the model, is named twice, or stacked experts meet an option that PEFT does
            not have for them.
    """
    known = {module.name: module for module in checked_modules(anatomy, ranks)}
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
    if parameters:
        _check_for_parameters(parameters[0], options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA with rank_pattern")  # about another way to save
        return LoraConfig(
            r=usual_rank,
            lora_alpha=usual_alpha,  # type: ignore[arg-type]  # PEFT divides by rank: a float will do
            **peft_arguments(options),
            target_modules=modules,
            target_parameters=parameters or None,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            fan_in_fan_out=all(known[entry.name].storage == "conv1d" for entry in ranks),
            task_type=TaskType.CAUSAL_LM,
            bias="none",
        )


def peft_arguments(options: AdapterOptions) -> dict[str, Any]:
    """The options as ``peft.LoraConfig`` takes them."""
    given = asdict(options)
    del given["adapter"]
    given["init_lora_weights"] = True if options.init_lora_weights == "default" else options.init_lora_weights
    given["modules_to_save"] = None if options.modules_to_save is None else list(options.modules_to_save)
    return given


def attach(
    model: Any,
    anatomy: ModelAnatomy,
    ranks: Sequence[ModuleRank],
    options: AdapterOptions = PLAIN,
    *,
    seed: int = 0,
    full_precision: bool = True,
) -> PeftModel:
    """Put the adapters on the model and prove by census that they, and nothing else, are there.

    The random start of the adapters depends on ``seed`` alone; the global random state does not move. Adapters of
    half-precision models are float32 unless ``full_precision`` is off. On failure the model is given back without
    adapters, its weights and ``requires_grad`` flags as found.

    Raises:
        PlanError: As :func:`peft_config`; if PEFT cannot put these adapters on these modules (a storage of weights
            that it does not know); or if a module to save is not there, or not above the layers.
        CensusError: If what was attached is not what was planned.
        UnsupportedModelError: If the model has no configuration, or weights are on the meta device or scattered.
    """
    if getattr(model, "config", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no config, which adapters are saved, loaded and trained by. Expected a "
            "transformers model: subclass PreTrainedModel, with a PreTrainedConfig that has a model_type."
        )
    check_placement(model)
    config = peft_config(anatomy, ranks, options)
    _check_modules_to_save(model, anatomy, options.modules_to_save or ())
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = weights_of(model, [entry.name for entry in ranks]) if options.rewrites_weights else []
    originals = [(weight, weight.detach().clone()) for weight in weights]
    try:
        with torch.random.fork_rng(devices=_gpus()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the census below is stricter than any of PEFT's warnings
            torch.manual_seed(seed)
            peft_model = _get_peft_model(model, config, full_precision)
        check_census(peft_model, ranks, options)
    except BaseException:
        _take_off(model)
        for weight, original in originals:
            weight.data = original
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    return peft_model


def add_adapters(
    peft_model: PeftModel,
    anatomy: ModelAnatomy,
    ranks: Sequence[ModuleRank],
    further: Sequence[ModuleRank],
    options: AdapterOptions = PLAIN,
    *,
    seed: int = 0,
) -> None:
    """Put further adapters, fresh ones, on a model that carries those of ``ranks``; these keep weights and flags.

    The new ones belong to the same adapter, share its settings and dtype, and are saved with it. Their random start
    depends on ``seed`` alone; the global random state does not move.

    Raises:
        PlanError: If the method cannot adapt one of the modules.
        CensusError: If what the model then carries is not ``ranks`` and ``further``.
    """
    tuner: Any = peft_model.base_model
    before = tuner.peft_config["default"]
    together = _retargeted(before, peft_config(anatomy, [*ranks, *further], options))
    flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    had = {id(parameter) for parameter, _ in flags}
    dtype = next(parameter.dtype for _, _, parameters in _adapters(peft_model) for parameter in parameters.values())
    tuner.peft_config["default"] = _retargeted(before, peft_config(anatomy, further, options))
    try:
        with torch.random.fork_rng(devices=_gpus()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in attach
            torch.manual_seed(seed)
            tuner.inject_adapter(tuner.model, "default")
    finally:
        tuner.peft_config["default"] = together
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    for parameter in peft_model.parameters():
        if id(parameter) not in had:
            parameter.data = parameter.data.to(dtype)
    check_census(peft_model, [*ranks, *further], options)


def adapter_weights(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Name of each adapted module -> the adapter's weights, by PEFT's name for them."""
    return {name.removesuffix(".weight"): parameters for name, _, parameters in _adapters(model)}


def own_modules(model: nn.Module) -> dict[str, str]:
    """Path of each module of the model's own -> its name without adapters; the adapters' modules are left out."""
    wrapped = {path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}

    def own(path: str) -> str | None:
        kept, above = [], ""
        for part in path.split("."):
            if above not in wrapped:
                kept.append(part)
            elif part != "base_layer":
                return None
            above = f"{above}.{part}" if above else part
        return ".".join(kept)

    paths = (path for path, _ in model.named_modules() if path not in wrapped)
    return {path: name for path in paths if (name := own(path)) is not None}


def shared_copy(model: nn.Module, *, own: Sequence[str] = ()) -> Any:
    """A copy of the model with modules of its own over the same weights: adapters and hooks of its own, shared memory.

    The weights themselves are the caller's: a ``requires_grad`` flag set on one is set for both.

    Args:
        model: The model; its weights may be packed.
        own: Names of modules whose weights are copied all the same.
    """
    settle_states(model)
    copied = {id(weight) for weight in weights_of(model, own)}
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in copied]
    flags = [tensor.requires_grad for tensor in tensors]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in [*tensors, *state_tensors(model)]})
    for tensor, flag in zip(tensors, flags, strict=True):
        tensor.requires_grad_(flag)
    return twin


def census(model: nn.Module, adapter_name: str = "default") -> tuple[AdapterEntry, ...]:
    """List every adapter that the model really carries, by walking its modules."""
    entries = []
    for name, layer, parameters in _adapters(model, adapter_name):
        rank, alpha = (_setting(layer, keys, adapter_name) for keys in (("r", "hra_r"), ("lora_alpha", "alpha")))
        method = type(layer).__module__.split(".")[2]  # peft.tuners.<method>...
        if method in METHODS and METHODS[method].rank is None:
            rank = None  # OFT's r is a number of blocks
        num_params = sum(parameter.numel() for parameter in parameters.values())
        entries.append(AdapterEntry(name, rank, None if alpha is None else float(alpha), num_params, method))
    return tuple(entries)


def check_census(
    model: nn.Module, ranks: Sequence[ModuleRank], options: AdapterOptions = PLAIN
) -> tuple[AdapterEntry, ...]:
    """Compare the adapters on the model with the plan, module by module.

    Raises:
        CensusError: If any adapter is missing, extra, on the wrong module, of another method, rank or alpha, or of
            another variant of LoRA, or if a weight other than the adapters' would train that is not to.
    """
    found, rule = census(model), method_of(options.adapter)
    other = sorted({entry.method for entry in found} - {options.adapter})
    if other:
        raise CensusError(
            f"the adapters on the model are {other[0]}, and the plan says {options.adapter}. Nothing was trained."
        )
    want: dict[str, tuple[Any, Any]] = {
        entry.name: (None if rule.rank is None else entry.rank, float(entry.alpha) if rule.alpha else None)
        for entry in ranks
    }
    have: dict[str, tuple[Any, Any]] = {
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
    _check_variant(model, options)
    own = {id(parameter) for _, _, parameters in _adapters(model) for parameter in parameters.values()}
    saved = tuple(f"{name}.modules_to_save." for name in options.modules_to_save or ())
    foreign = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and id(weight) not in own and not any(part in f".{name}" for part in saved)
    ]
    if foreign:
        raise CensusError(
            f"{len(foreign)} weights besides the adapters would train, e.g. {foreign[0]}. Freeze them first."
        )
    return found


def dead_adapters(model: nn.Module) -> list[str]:
    """Names of the modules whose adapter trains and got no gradient, or only zeros; call after the first backward.

    Of a gradient that is sharded over processes the part of this process is looked at.
    """
    dead = []
    for name, _, parameters in _adapters(model):
        training = [parameter for parameter in parameters.values() if parameter.requires_grad]
        if training and not any(_has_gradient(weight) for weight in training):
            dead.append(name)
    return dead


def _has_gradient(parameter: nn.Parameter) -> bool:
    gradient: Any = parameter.grad
    return gradient is not None and bool((gradient.to_local() if hasattr(gradient, "to_local") else gradient).any())


def _adapters(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, Any, dict[str, nn.Parameter]]]:
    """Each adapted module's name in the base model, the layer that PEFT put there, and the adapter's own weights."""
    layers: list[tuple[str, Any]] = [(path, m) for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for path, module in layers:
        parameters = {
            key: parameter
            for key, parameter in module.named_parameters()
            if key.startswith(tuple(f"{own}." for own in module.adapter_layer_names))
            and f".{adapter_name}." in f".{key}."
        }
        if parameters:
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            if isinstance(module, ParamWrapper):
                name = f"{name}.{module.parameter_name}"
            yield name, module, parameters


def _retargeted(config: PeftConfig, targets: PeftConfig) -> PeftConfig:
    """A copy of the configuration that adapts the modules of the other one, at its ranks."""
    changed = copy.copy(config)
    for key in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "r", "lora_alpha", "alpha"):
        if hasattr(config, key):
            setattr(changed, key, getattr(targets, key))
    if isinstance(config, IA3Config):
        changed.feedforward_modules = targets.feedforward_modules  # type: ignore[attr-defined]
    return changed


def _gpus() -> list[int]:
    """The devices whose random state seeding moves besides the CPU's, the model's or not: all, once CUDA is in use."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def _setting(layer: Any, keys: Sequence[str], adapter_name: str) -> Any:
    """The first of these attributes that the layer has, for this adapter; None if it has none."""
    return next((getattr(layer, key)[adapter_name] for key in keys if hasattr(layer, key)), None)


# --- what PEFT can, and what it cannot ----------------------------------------------------------------------------


def _get_peft_model(model: Any, config: PeftConfig, full_precision: bool) -> PeftModel:
    """PEFT's own call, with what it says of a module it cannot adapt put into our words."""
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=full_precision)
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PlanError(
            f"PEFT cannot put these adapters on {type(model).__name__}: {reason} If its weights are quantized, load "
            "them unquantized or in a format that trains (bitsandbytes: nf4, fp4, int8); if a variant of LoRA was "
            "asked for, leave it out."
        ) from error


def _check_for_parameters(name: str, options: AdapterOptions) -> None:
    """Refuse what PEFT does not have for adapters on parameters."""
    cannot = {
        f"lora_dropout={options.lora_dropout}": options.lora_dropout > 0,
        "use_dora": options.use_dora,
        "lora_bias": options.lora_bias,
        f"init_lora_weights={options.init_lora_weights!r}": options.init_lora_weights not in ("default", "gaussian"),
    }
    for option, given in cannot.items():
        if given:
            raise PlanError(f"{option} does not work on stacked experts ({name}) in PEFT. Leave it out.")


def _check_modules_to_save(model: nn.Module, anatomy: ModelAnatomy, names: Sequence[str]) -> None:
    """Refuse modules to save that are not there, are in a layer, or feed the layers.

    Raises:
        PlanError: Names the module; below or inside the layers its gradient would need the backward that is left out.
    """
    modules = dict(model.named_modules())
    embedding = embedding_of(model)
    for name in names:
        found = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not found:
            outside = {path for path in modules if not any(path.startswith(layer.name) for layer in anatomy.layers)}
            raise PlanError(f"modules_to_save: no module {name!r}. {nearest(name, outside - {''})}")
        for path in found:
            if any(f"{path}.".startswith(f"{layer.name}.") for layer in anatomy.layers):
                raise PlanError(f"modules_to_save: {path} is inside a layer, and a plan adapts layers. Leave it out.")
            if any(module is embedding for module in modules[path].modules()):
                raise PlanError(
                    f"modules_to_save: {path} is or holds the input embedding. Its gradient needs backward through "
                    "every layer, which is what a selection saves. Leave it out, or train it with stock PEFT."
                )


def _check_variant(model: nn.Module, options: AdapterOptions) -> None:
    """Compare what is on the model besides rank and alpha with the options.

    Raises:
        CensusError: If DoRA, rsLoRA, a bias or a module to save is there unplanned, or planned and not there.
    """
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    saved = set()
    for path, module in modules:
        if isinstance(module, ModulesToSaveWrapper):
            saved.add(path.removeprefix("base_model.model."))
        if not isinstance(module, LoraLayer) or "default" not in module.r:
            continue
        have = {
            "use_dora": bool(module.use_dora.get("default")),
            "use_rslora": bool(module.use_rslora.get("default")),
            "lora_bias": bool(module.lora_bias.get("default")),
        }
        for name, value in have.items():
            if value != getattr(options, name):
                raise CensusError(f"{path} has {name}={value}, planned {getattr(options, name)}. Nothing was trained.")
    planned = set(options.modules_to_save or ())
    if {path for path in saved if not any(path == n or path.endswith(f".{n}") for n in planned)} or (
        planned and not saved
    ):
        raise CensusError(f"modules to save on the model: {sorted(saved)}, planned {sorted(planned)}.")


def weights_of(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The weights of these modules, without those of stacked experts."""
    modules = dict(model.named_modules())
    found: list[nn.Parameter] = []
    for name in names:
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(weight, nn.Parameter):
            found.append(weight)
    return found


def _take_off(model: nn.Module) -> None:
    """Put every adapted or wrapped module's own back in its place, also where PEFT stopped half-way."""
    for path, module in list(model.named_modules()):
        inner: Any = None
        if isinstance(module, BaseTunerLayer):
            inner = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            inner = module.original_module
        if inner is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, inner)
    vars(model).pop("peft_config", None)


def _got(name: str, want: Mapping[str, tuple[Any, Any]], have: Mapping[str, tuple[Any, Any]]) -> str:
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
