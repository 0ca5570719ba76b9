"""The documented builders of a ``peft.LoraConfig`` from a list of layers.

Without a model the configuration names leaf modules and ``layers_to_transform``, which suits Llama-style models. With
a model it names every module in full, on any architecture, and refuses what matches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig

from .adapter import lora_config, peft_arguments
from .adapter_options import AdapterOptions
from .allocation import ModuleRank
from .anatomy import ModuleAnatomy, anatomy, kind_of, matches_target
from .errors import PlanError, nearest

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def aletheia_lora_config(
    selected_layers: Sequence[int],
    target_modules: Sequence[str] | None = None,
    r: int = 16,
    lora_alpha: int = 32,
    attention_r: int | None = None,
    mlp_r: int | None = None,
    attention_alpha: int | None = None,
    mlp_alpha: int | None = None,
    lora_dropout: float = 0.0,
    task_type: str = "CAUSAL_LM",
    *,
    use_dora: bool = False,
    use_rslora: bool = False,
    lora_bias: bool = False,
    init_lora_weights: str = "default",
    modules_to_save: Sequence[str] | None = None,
) -> LoraConfig:
    """A LoRA configuration for the chosen layers of a Llama-style model that is not at hand.

    Args:
        selected_layers: Layers to adapt, each once.
        target_modules: Leaf names to adapt; those of Llama and Qwen if left out.
        r: Rank where no other is given.
        lora_alpha: Alpha where no other is given.
        attention_r: Rank of attention modules.
        mlp_r: Rank of MLP modules.
        attention_alpha: Alpha of attention modules; ``attention_r * lora_alpha / r`` if left out, so that alpha/rank
            is the same everywhere.
        mlp_alpha: Alpha of MLP modules; ``mlp_r * lora_alpha / r`` if left out.
        lora_dropout: Dropout before the adapter.
        task_type: PEFT's task type.
        use_dora: As in :class:`~aletheia_lora.adapter_options.AdapterOptions`, like the next four.
        use_rslora: Scale by alpha / sqrt(rank).
        lora_bias: Train a bias in lora_B.
        init_lora_weights: How the adapters start.
        modules_to_save: Modules to train and save whole.

    Raises:
        PlanError: If a layer is negative or named twice, none is named, or a rank is below 1; or if PEFT cannot
            combine the options.
    """
    layers = _checked_layers(selected_layers)
    options = _adapter_options(lora_dropout, use_dora, use_rslora, lora_bias, init_lora_weights, modules_to_save)
    targets = list(DEFAULT_TARGETS) if target_modules is None else list(target_modules)
    if not targets:
        raise PlanError("target_modules is empty. Leave it out, or name at least one module.")
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for target in targets:
        kind = kind_of(target)
        rank, alpha = _rank_and_alpha(kind, r, lora_alpha, attention_r, mlp_r, attention_alpha, mlp_alpha)
        asked = {"attention": (attention_r, attention_alpha), "mlp": (mlp_r, mlp_alpha)}.get(kind, (None, None))
        if asked[0] is not None:
            rank_pattern[target] = rank
        if asked[1] is not None or alpha != lora_alpha:
            alpha_pattern[target] = alpha
    return LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        **peft_arguments(options),
        target_modules=targets,
        layers_to_transform=layers,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        task_type=task_type,
        bias="none",
    )


def apply_aletheia_lora(
    model: Any,
    selected_layers: Sequence[int],
    target_modules: Sequence[str] | None = None,
    r: int = 16,
    lora_alpha: int = 32,
    attention_r: int | None = None,
    mlp_r: int | None = None,
    attention_alpha: int | None = None,
    mlp_alpha: int | None = None,
    lora_dropout: float = 0.0,
    task_type: str = "CAUSAL_LM",
    *,
    use_dora: bool = False,
    use_rslora: bool = False,
    lora_bias: bool = False,
    init_lora_weights: str = "default",
    modules_to_save: Sequence[str] | None = None,
) -> LoraConfig:
    """A LoRA configuration for the chosen layers of this model; give it to ``peft.get_peft_model``.

    Args:
        model: The model, which is only read; None gives :func:`aletheia_lora_config`.
        selected_layers: Layers to adapt, each once.
        target_modules: Leaf names, or full names, to adapt; every adaptable matrix of the layers if left out.
        r: As in :func:`aletheia_lora_config`, like all further arguments.
        lora_alpha: Alpha where no other is given.
        attention_r: Rank of attention modules, by kind, whatever this architecture calls them.
        mlp_r: Rank of MLP modules and experts.
        attention_alpha: Alpha of attention modules.
        mlp_alpha: Alpha of MLP modules and experts.
        lora_dropout: Dropout before the adapter.
        task_type: PEFT's task type.
        use_dora: As in :func:`aletheia_lora_config`, like the next four.
        use_rslora: Scale by alpha / sqrt(rank).
        lora_bias: Train a bias in lora_B.
        init_lora_weights: How the adapters start.
        modules_to_save: Modules to train and save whole.

    Raises:
        PlanError: If a layer does not exist or is named twice, a target matches nothing, or a rank is below 1 or
            above min(in, out) of its module.
        UnsupportedModelError: If the model has no stack of decoder layers.
    """
    if model is None:
        return aletheia_lora_config(
            selected_layers,
            target_modules,
            r,
            lora_alpha,
            attention_r,
            mlp_r,
            attention_alpha,
            mlp_alpha,
            lora_dropout,
            task_type,
            use_dora=use_dora,
            use_rslora=use_rslora,
            lora_bias=lora_bias,
            init_lora_weights=init_lora_weights,
            modules_to_save=modules_to_save,
        )
    options = _adapter_options(lora_dropout, use_dora, use_rslora, lora_bias, init_lora_weights, modules_to_save)
    found = anatomy(model)
    layers = found.check_layers(list(selected_layers))
    modules = [module for layer in layers for module in found.layer(layer).modules]
    if target_modules is not None:
        modules = matching_targets(modules, target_modules)
    ranks = []
    for module in modules:
        rank, alpha = _rank_and_alpha(module.kind, r, lora_alpha, attention_r, mlp_r, attention_alpha, mlp_alpha)
        if rank > module.max_rank:
            raise PlanError(
                f"rank {rank} on {module.name} ({module.in_features} x {module.out_features}) is above min(in, out) = "
                f"{module.max_rank}. Choose a smaller rank."
            )
        ranks.append(ModuleRank(module.name, module.layer_idx, module.kind, rank, alpha, module.adapter_params(rank)))
    config = lora_config(found, ranks, options)
    config.task_type = task_type
    return config


def matching_targets(modules: Sequence[ModuleAnatomy], targets: Sequence[str]) -> list[ModuleAnatomy]:
    """The modules whose leaf or full name is a target.

    Raises:
        PlanError: If a target matches no module; names the nearest that exists.
    """
    for target in targets:
        if not any(matches_target(module.name, target) for module in modules):
            leaves = {module.name.rpartition(".")[2] for module in modules}
            raise PlanError(
                f"target {target!r} matches no adaptable module of the chosen layers. {nearest(target, leaves)}"
            )
    return [m for m in modules if any(matches_target(m.name, target) for target in targets)]


def _adapter_options(
    lora_dropout: float,
    use_dora: bool,
    use_rslora: bool,
    lora_bias: bool,
    init_lora_weights: str,
    modules_to_save: Sequence[str] | None,
) -> AdapterOptions:
    return AdapterOptions(
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        use_rslora=use_rslora,
        lora_bias=lora_bias,
        init_lora_weights=init_lora_weights,
        modules_to_save=None if modules_to_save is None else tuple(modules_to_save),
    )


def _rank_and_alpha(
    kind: str,
    r: int,
    lora_alpha: float,
    attention_r: int | None,
    mlp_r: int | None,
    attention_alpha: int | None,
    mlp_alpha: int | None,
) -> tuple[int, float]:
    asked_rank, asked_alpha = {
        "attention": (attention_r, attention_alpha),
        "mlp": (mlp_r, mlp_alpha),
        "expert": (mlp_r, mlp_alpha),
    }.get(kind, (None, None))
    rank = r if asked_rank is None else asked_rank
    for value in (r, rank):
        if value < 1:
            raise PlanError(f"rank {value}, expected at least 1.")
    alpha = lora_alpha * rank / r if asked_alpha is None else asked_alpha
    return rank, int(alpha) if alpha == int(alpha) else alpha


def _checked_layers(selected_layers: Sequence[int]) -> list[int]:
    layers = [int(layer) for layer in selected_layers]
    if not layers or min(layers) < 0 or len(set(layers)) != len(layers):
        raise PlanError(f"selected_layers={layers}, expected at least one layer, none negative, each once.")
    return layers
