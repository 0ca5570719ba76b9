"""Ranks -> a ``peft.LoraConfig``; attaches it and takes the census that proves what was adapted.

Beside ``fast_lora.py`` the only room that knows how PEFT spells things. Modules are named in full, because leaf names
reach further than meant: into unselected layers of mixture-of-experts models, vision towers and shared experts.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .allocation import ModuleRank
from .anatomy import ModelAnatomy
from .errors import CensusError, PlanError, nearest
from .layers import embedding_of
from .quantized import settle_states, state_tensors

REWRITE_WEIGHTS = frozenset({"pissa", "olora"})
"""Initializations that take what the adapter starts with out of the frozen weight."""
INITIALIZATIONS = frozenset({"default", "gaussian", "orthogonal"}) | REWRITE_WEIGHTS
REFUSED_INITIALIZATIONS = {
    "eva": "it reads data and moves ranks between modules, which the plan has settled",
    "corda": "it reads data through a configuration of its own",
    "lora_ga": "it reads gradients through a configuration of its own",
    "loftq": "it replaces the frozen weights by quantized ones through a configuration of its own",
    "mica": "it freezes lora_B, so half of the planned weights would not train",
    "pissa_niter": "it draws at random from the weights, so a saved adapter does not load as it was; pissa does",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterOptions:
    """What an adapter is besides its rank and alpha, in the words of ``peft.LoraConfig``."""

    lora_dropout: float = 0.0
    """Dropout before the adapter, 0 to 1."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353): the norm of each row of the weight is learned beside the adapter."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)."""
    lora_bias: bool = False
    """Train a bias in lora_B."""
    init_lora_weights: str = "default"
    """One of :data:`INITIALIZATIONS`; ``default`` is PEFT's ``True``."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules above the decoder layers to train and save whole, by leaf or full name, e.g. ``lm_head``."""

    def __post_init__(self) -> None:
        """Check what PEFT would find out late, or not at all."""
        name = self.init_lora_weights
        refused = next((key for key in REFUSED_INITIALIZATIONS if str(name).startswith(key)), None)
        if refused is not None:
            raise PlanError(
                f"init_lora_weights={name!r} is not for a plan: {REFUSED_INITIALIZATIONS[refused]}. Use stock PEFT for "
                f"it, or one of {sorted(INITIALIZATIONS)}."
            )
        if name not in INITIALIZATIONS:
            raise PlanError(f"unknown init_lora_weights {name!r}. {nearest(str(name), INITIALIZATIONS)}")
        if self.lora_bias and (self.use_dora or name != "default"):
            other = "use_dora" if self.use_dora else f"init_lora_weights={name!r}"
            raise PlanError(f"lora_bias does not work with {other} in PEFT. Leave out one of the two.")

    @property
    def rewrites_weights(self) -> bool:
        """Attaching changes the frozen weights of the adapted modules."""
        return self.init_lora_weights in REWRITE_WEIGHTS

    def in_words(self) -> str:
        """The options that are not as usual, e.g. ``use_dora, init_lora_weights=pissa``; empty if all are."""
        usual = AdapterOptions()
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return ", ".join(
            name if value is True else f"{name}={value if isinstance(value, str | float) else '+'.join(value)}"
            for name, value in given.items()
            if value != getattr(usual, name)
        )


PLAIN = AdapterOptions()


@dataclass(frozen=True, slots=True)
class AdapterEntry:
    """One adapter as found on a model."""

    name: str
    """Full name of the adapted module, or of the parameter for stacked experts."""
    rank: int
    alpha: float
    num_params: int


def lora_config(anatomy: ModelAnatomy, ranks: Sequence[ModuleRank], options: AdapterOptions = PLAIN) -> LoraConfig:
    """An ordinary LoRA configuration that adapts exactly the modules in ``ranks``.

    Args:
        anatomy: Anatomy of the model the configuration is for.
        ranks: One entry per module to adapt.
        options: Dropout and PEFT's variants of LoRA.

    Raises:
        PlanError: If a module is not in the model, is named twice, or stacked experts meet an option that PEFT does
            not have for them.
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
        PlanError: As :func:`lora_config`; if PEFT cannot put these adapters on these modules (a storage of weights
            that it does not know); or if a module to save is not there, or not above the layers.
        CensusError: If what was attached is not what was planned.
    """
    config = lora_config(anatomy, ranks, options)
    _check_modules_to_save(model, anatomy, options.modules_to_save or ())
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = _weights_of(model, [entry.name for entry in ranks]) if options.rewrites_weights else []
    originals = [(weight, weight.detach().clone()) for weight in weights]
    devices = [model.device] if getattr(getattr(model, "device", None), "type", "") == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
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


def shared_copy(model: nn.Module, *, own: Sequence[str] = ()) -> Any:
    """A copy of the model with modules of its own over the same weights: adapters and hooks of its own, shared memory.

    The weights themselves are the caller's: a ``requires_grad`` flag set on one is set for both.

    Args:
        model: The model; its weights may be packed.
        own: Names of modules whose weights are copied all the same.
    """
    settle_states(model)
    copied = {id(weight) for weight in _weights_of(model, own)}
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if id(tensor) not in copied]
    flags = [tensor.requires_grad for tensor in tensors]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in [*tensors, *state_tensors(model)]})
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


def check_census(
    model: nn.Module, ranks: Sequence[ModuleRank], options: AdapterOptions = PLAIN
) -> tuple[AdapterEntry, ...]:
    """Compare the adapters on the model with the plan, module by module.

    Raises:
        CensusError: If any adapter is missing, extra, on the wrong module, of another rank or alpha, or of another
            variant of LoRA, or if a weight other than the adapters' would train that is not to.
    """
    found = census(model)
    have = {entry.name.removesuffix(".weight"): (entry.rank, entry.alpha) for entry in found}
    want: Mapping[str, tuple[int, float]] = {entry.name: (entry.rank, float(entry.alpha)) for entry in ranks}
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
    saved = tuple(f"{name}.modules_to_save." for name in options.modules_to_save or ())
    foreign = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" not in name and not (saved and any(part in f".{name}" for part in saved))
    ]
    if foreign:
        raise CensusError(
            f"{len(foreign)} weights besides the adapters would train, e.g. {foreign[0]}. Freeze them first."
        )
    return found


def dead_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters whose ``lora_B`` has no gradient or a zero one; call after the first backward.

    Of a gradient that is sharded over processes the part of this process is looked at.
    """
    return [
        name.removeprefix("base_model.model.")
        for name, parameter in model.named_parameters()
        if "lora_B" in name and parameter.requires_grad and not _has_gradient(parameter)
    ]


def _has_gradient(parameter: nn.Parameter) -> bool:
    gradient: Any = parameter.grad
    return gradient is not None and bool((gradient.to_local() if hasattr(gradient, "to_local") else gradient).any())


# --- what PEFT can, and what it cannot ----------------------------------------------------------------------------


def _get_peft_model(model: Any, config: LoraConfig, full_precision: bool) -> PeftModel:
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


def _weights_of(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
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
        if isinstance(module, LoraLayer):
            inner = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            inner = module.original_module
        if inner is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, inner)
    vars(model).pop("peft_config", None)
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
