"""A model -> its anatomy: the ordered decoder layers and every weight matrix in them that can be adapted.

Comes in: any decoder-only model. Goes out: a :class:`ModelAnatomy`, a plain record that can be saved, read and
compared. What cannot be adapted is in it too, with the reason; nothing is left out silently.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import PlanError, UnsupportedModelError
from .layers import embedding_of, layer_blocks
from .quantized import plain_tensors
from .trial import Trial, sees_later_tokens, trial_forward

Kind = Literal["attention", "mlp", "expert", "mixer"]
Storage = Literal["linear", "conv1d", "quantized", "stacked"]

ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate", "wg", "gating", "router_proj"})


@dataclass(frozen=True, slots=True)
class ModuleAnatomy:
    """One weight matrix (or one stack of expert matrices) that can carry an adapter."""

    name: str
    """Full dotted name, e.g. ``model.layers.3.mlp.up_proj``; of the parameter where ``storage`` is ``stacked``."""
    layer_idx: int
    kind: Kind
    storage: Storage
    in_features: int
    out_features: int
    num_experts: int = 1
    """Matrices in the stack; 1 for everything that is not a stack of experts."""
    active_share: float = 1.0
    """Share of these weights that one token passes through: experts per token over experts."""

    @property
    def num_params(self) -> int:
        """Weights in the frozen matrix."""
        return self.num_experts * self.in_features * self.out_features

    @property
    def max_rank(self) -> int:
        """Largest rank that still means something, min(in, out)."""
        return min(self.in_features, self.out_features)

    def adapter_params(self, rank: int) -> int:
        """Trainable weights of a LoRA adapter of this rank: rank * (in + out), per expert."""
        return self.num_experts * rank * (self.in_features + self.out_features)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A matrix inside a layer that gets no adapter, and why."""

    name: str
    layer_idx: int
    num_params: int
    reason: str


@dataclass(frozen=True, slots=True)
class LayerAnatomy:
    """One block of the decoder stack."""

    layer_idx: int
    name: str
    """Full dotted name of the block, e.g. ``model.layers.3``."""
    num_params: int
    """All weights of the block, norms and biases included."""
    modules: tuple[ModuleAnatomy, ...]

    def targeted(self, targets: Sequence[str] | None) -> tuple[ModuleAnatomy, ...]:
        """Its modules that one of these names (see :func:`matches_target`); all where there are none."""
        if targets is None:
            return self.modules
        return tuple(m for m in self.modules if any(matches_target(m.name, target) for target in targets))


@dataclass(frozen=True, slots=True)
class ModelAnatomy:
    """The ordered layers of a decoder, what can be adapted in each, and what is left out."""

    architecture: str
    model_type: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerAnatomy, ...]
    left_out: tuple[LeftOut, ...]
    num_params: int
    """All weights of the model."""
    trial_forward: str
    """"ran", or why the trial forward that finds unused matrices could not run."""

    @property
    def num_layers(self) -> int:
        """Number of blocks, L."""
        return len(self.layers)

    @property
    def modules(self) -> tuple[ModuleAnatomy, ...]:
        """Every adaptable matrix, in order of depth."""
        return tuple(module for layer in self.layers for module in layer.modules)

    @property
    def adaptable_share(self) -> float:
        """Share of the matrix weights inside the layers that can carry an adapter, 0 to 1."""
        adaptable = sum(module.num_params for module in self.modules)
        matrices = adaptable + sum(item.num_params for item in self.left_out)
        return adaptable / matrices if matrices else 0.0

    @property
    def left_out_reasons(self) -> dict[str, int]:
        """Weights that get no adapter, by the reason."""
        reasons: Counter[str] = Counter()
        for item in self.left_out:
            reasons[item.reason] += item.num_params
        return dict(reasons)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that two models share only if a plan for one fits the other."""
        shape = [
            self.architecture,
            [(m.name, m.storage, m.num_experts, m.in_features, m.out_features) for m in self.modules],
        ]
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]

    def layer(self, layer_idx: int) -> LayerAnatomy:
        """The block at this depth.

        Raises:
            PlanError: If the model has no such layer.
        """
        if not 0 <= layer_idx < self.num_layers:
            raise PlanError(
                f"layer {layer_idx} does not exist: {self.architecture} has {self.num_layers} layers, "
                f"0 to {self.num_layers - 1}."
            )
        return self.layers[layer_idx]

    def check_layers(self, layers: Iterator[int] | list[int] | tuple[int, ...]) -> tuple[int, ...]:
        """The same layers in order, after checking that each exists, once.

        Raises:
            PlanError: If the list is empty, names a layer twice, or names one that the model lacks.
        """
        given = [int(layer) for layer in layers]
        if not given:
            raise PlanError("no layers were chosen. Choose at least one.")
        twice = sorted(layer for layer, count in Counter(given).items() if count > 1)
        if twice:
            raise PlanError(f"layers {twice} are named more than once in {given}. Name each layer once.")
        for layer in given:
            self.layer(layer)
        return tuple(sorted(given))

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON types, with ``fingerprint`` for readers."""
        return {**asdict(self), "fingerprint": self.fingerprint}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ModelAnatomy:
        """Read back what :meth:`to_dict` wrote."""
        fields = {key: value for key, value in record.items() if key != "fingerprint"}
        fields["layers"] = tuple(
            LayerAnatomy(**{**layer, "modules": tuple(ModuleAnatomy(**module) for module in layer["modules"])})
            for layer in record["layers"]
        )
        fields["left_out"] = tuple(LeftOut(**item) for item in record["left_out"])
        return cls(**fields)


def matches_target(name: str, target: str) -> bool:
    """True if the target is the module's full name, or the end of it in whole words."""
    return name == target or name.endswith(f".{target}")


def anatomy(model: nn.Module) -> ModelAnatomy:
    """Read the anatomy of a decoder-only model; the model is left exactly as found.

    The stack of layers is found by structure (:func:`~aletheia_lora.layers.layer_blocks`). One short trial forward
    tells which matrices really run as modules: an adapter on one that is read directly would be dead.

    Args:
        model: A transformers causal language model, or anything shaped like one, on any device (``meta`` included).

    Raises:
        UnsupportedModelError: For an encoder-decoder model, one that sees later tokens, one that already carries
            adapters, or one with no single stack of decoder layers; the message names the model and what was found.
    """
    architecture = type(model).__name__
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{architecture} is an encoder-decoder model; expected a decoder-only language model. "
            "Layer selection over two stacks is not defined here."
        )
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError(
            f"{architecture} already carries adapters. Call merge_and_unload() or unload() first, "
            "or pass the base model."
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    blocks = layer_blocks(model)
    maps = [module for module in model.modules() if linear_shape(module) is not None]
    trial = trial_forward(model, maps, text_config)
    if trial.outcome == "ran" and sees_later_tokens(model, maps, text_config):
        raise UnsupportedModelError(
            f"{architecture} sees later tokens: what it says of a token depends on those behind it, so a next-token "
            "loss means nothing. Set is_decoder=True in its configuration (BERT's family), or pass a causal model."
        )
    context = _Context(
        names={id(module): name for name, module in model.named_modules()},
        owners={id(child): type(module) for module in model.modules() for child in module.children()},
        trial=trial,
        renamings=_renamings(model),
        shared=_shared_weights(model),
        text_config=text_config,
    )
    model_type = str(getattr(text_config, "model_type", architecture))
    layers: list[LayerAnatomy] = []
    left_out: list[LeftOut] = []
    for layer_idx, block in enumerate(blocks):
        modules, skipped = _layer_matrices(block, layer_idx, context)
        left_out.extend(skipped)
        layers.append(LayerAnatomy(layer_idx, context.names[id(block[0])], _num_params(block), modules))
    if not any(layer.modules for layer in layers):
        reasons = sorted({item.reason for item in left_out})
        raise UnsupportedModelError(
            f"{architecture} has {len(layers)} layers but no matrix that can be adapted: {'; '.join(reasons)}."
        )
    return ModelAnatomy(
        architecture=architecture,
        model_type=model_type,
        hidden_size=int(getattr(text_config, "hidden_size", 0) or embedding_of(model).weight.shape[1]),
        vocab_size=int(embedding_of(model).weight.shape[0]),
        layers=tuple(layers),
        left_out=tuple(left_out),
        num_params=_num_params([model]),
        trial_forward=trial.outcome,
    )


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear map in any storage, or None if the module is not one."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(in_features, int) and isinstance(out_features, int) and not any(True for _ in module.children()):
        return in_features, out_features
    return None


def is_quantized(module: nn.Module) -> bool:
    """True for a linear map whose weight is not stored as plain floating-point numbers of its own shape."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not all(
        kept.is_floating_point() and kept.itemsize > 1 for kept in plain_tensors(weight)
    ):
        return True
    shape = linear_shape(module)
    return shape is None or weight.numel() != shape[0] * shape[1]


# --- reading one layer --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Context:
    """What is known of the whole model when one of its layers is read."""

    names: Mapping[int, str]
    """Full name of each module, by its id."""
    owners: Mapping[int, type[nn.Module]]
    """Class of the module that holds each module, by its id."""
    trial: Trial
    renamings: list[Any]
    """How transformers renames weights when it loads them."""
    shared: set[int]
    """Ids of the parameters that several places use."""
    text_config: Any


def _layer_matrices(
    blocks: list[nn.Module], layer_idx: int, context: _Context
) -> tuple[tuple[ModuleAnatomy, ...], list[LeftOut]]:
    modules: list[ModuleAnatomy] = []
    left_out: list[LeftOut] = []
    for block in blocks:
        block_name = context.names[id(block)]
        # Where none is reached, the layer hides its graph (reversible, checkpointed), and nothing can be told.
        learns = any(id(module) in (context.trial.learning or ()) for module in block.modules())
        for module in block.modules():
            name = context.names[id(module)]
            path = name[len(block_name) :].lstrip(".")
            shape = linear_shape(module)
            weight = getattr(module, "weight", None)
            if shape is not None and (weight is not None or is_quantized(module)):
                reason = _why_left_out(module, path, context, learns)
                if reason is not None:
                    left_out.append(LeftOut(name, layer_idx, shape[0] * shape[1], reason))
                    continue
                storage: Storage = (
                    "quantized" if is_quantized(module) else "conv1d" if isinstance(module, Conv1D) else "linear"
                )
                modules.append(ModuleAnatomy(name, layer_idx, kind_of(path), storage, shape[0], shape[1]))
                continue
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2 or parameter_name.endswith("bias"):
                    continue
                full = f"{name}.{parameter_name}"
                num_experts = _num_experts(module, parameter, context.text_config)
                if num_experts is None:
                    kind = "convolution kernel" if "conv" in path.lower() else "bare parameter"
                    reason = "router" if _is_router(path) else f"{kind}, read directly by its owner"
                    left_out.append(LeftOut(full, layer_idx, parameter.numel(), reason))
                elif id(parameter) in context.shared:
                    left_out.append(LeftOut(full, layer_idx, parameter.numel(), "tied to another layer"))
                else:
                    active = min(float(_experts_per_token(context.text_config)) / num_experts, 1.0)
                    first, second = int(parameter.shape[1]), int(parameter.shape[2])
                    if not getattr(module, "is_transposed", False):
                        first, second = second, first
                    modules.append(
                        ModuleAnatomy(full, layer_idx, "expert", "stacked", first, second, num_experts, active)
                    )
    return tuple(modules), left_out


def _why_left_out(module: nn.Module, path: str, context: _Context, learns: bool) -> str | None:
    leaf = path.rpartition(".")[2]
    if _is_router(path):
        return "router"
    weight = getattr(module, "weight", None)
    if weight is not None and id(weight) in context.shared:
        return "tied to another layer"
    owner: Any = context.owners.get(id(module))
    if owner is not None and _reads_weight_of(owner, leaf):
        return "its owner hands the weight to a kernel directly, where an adapter would be dead"
    if context.trial.called is not None and "expert" not in path:
        if id(module) not in context.trial.called:
            return "its forward does not run: unused, or read directly by its owner; an adapter would be dead"
        if learns and id(module) not in (context.trial.learning or ()):
            return "no gradient reaches it: what it computes only selects"
    if _is_renamed(context.names[id(module)], context.renamings):
        return "PEFT could not load an adapter on it again: transformers renames what is loaded under its name"
    return None


def _renamings(model: nn.Module) -> list[Any]:
    """How transformers renames weights of this model when it loads them; PEFT renames adapters likewise."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        return [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]  # type: ignore[arg-type]
    except (ImportError, AttributeError):  # another transformers, or a model of another make
        return []


def _is_renamed(name: str, renamings: list[Any]) -> bool:
    """True if an adapter saved under this name would be looked for under another one, a cut prefix aside."""
    saved = key = f"{name}.lora_A.weight"
    for renaming in renamings:
        key = renaming.rename_source_key(key)[0]
    return key != saved and not saved.endswith(key)


def _is_router(path: str) -> bool:
    """True for a router and all its parts; by whole words, since many a gate is none."""
    return not ROUTER_NAMES.isdisjoint(path.split("."))


@functools.cache
def _reads_weight_of(owner: type[nn.Module], leaf: str) -> bool:
    """True if the owner's code uses ``self.<leaf>.weight`` itself, whichever of its kernels does; by its source."""
    for kind in owner.__mro__[: owner.__mro__.index(nn.Module)]:
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):  # no source at hand: the trial forward has to tell
            continue
        if re.search(rf"\bself\.{re.escape(leaf)}\.weight\b(?!\.|\[|\s*=[^=])", source):
            return True
    return False


def kind_of(path: str) -> Kind:
    """The kind of a matrix from its path inside the layer, e.g. ``self_attn.q_proj`` -> ``attention``.

    Whole words of the path decide, from the outside in; the leaf name decides only where no owner says more.
    """
    owners, _, leaf = path.lower().rpartition(".")
    if "expert" in owners:
        return "expert"
    for owner in owners.split("."):
        if any(
            word in owner for word in ("mamba", "ssm", "mixer", "linear_attn", "recurrent", "rglru", "conv", "temporal")
        ):
            return "mixer"
        if "attn" in owner or "attention" in owner:
            return "attention"
        if any(
            word in owner
            for word in ("mlp", "ffn", "feed_forward", "feedforward", "moe", "ff", "output", "intermediate")
        ):
            return "mlp"
    if any(
        word in leaf
        for word in (
            "qkv",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "out_proj",
            "c_attn",
            "query",
            "key",
            "value",
            "attn",
        )
    ):
        return "attention"
    if any(
        word in leaf for word in ("fc", "up_", "down", "gate", "ffn", "mlp", "w1", "w2", "w3", "lin1", "lin2", "4h")
    ):
        return "mlp"
    return "mixer"


def _num_experts(module: nn.Module, parameter: torch.Tensor, text_config: Any) -> int | None:
    if parameter.ndim != 3:
        return None
    counts = {
        getattr(source, name, None)
        for source in (module, text_config)
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    }
    if type(module).__name__.endswith("Experts") or int(parameter.shape[0]) in counts:
        return int(parameter.shape[0])
    return None


def _experts_per_token(text_config: Any) -> int:
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"):
        value = getattr(text_config, name, None)
        if isinstance(value, int):
            return value
    return 1


def _shared_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that more than one place of the model uses."""
    seen: Counter[int] = Counter()
    for module_name, module in model.named_modules(remove_duplicate=False):
        del module_name
        seen.update(id(parameter) for parameter in module.parameters(recurse=False))
    return {key for key, count in seen.items() if count > 1}


def _num_params(roots: list[nn.Module]) -> int:
    """Number of weights, also where packed storage shows fewer; shared ones once."""
    seen: set[int] = set()
    total = 0
    for module in {id(module): module for root in roots for module in root.modules()}.values():
        shape = linear_shape(module)
        packed = shape is not None and is_quantized(module)
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        seen.update(id(parameter) for parameter in own)
        if shape is not None and packed and (own or not list(module.parameters(recurse=False))):
            total += shape[0] * shape[1]
        total += sum(parameter.numel() for parameter in own if not packed or parameter.ndim == 1)
    return total
