"""What an adapter is besides where it sits and its rank: the method, and LoRA's variants that a plan takes."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import PlanError, nearest

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
    """What an adapter is besides its rank and alpha; all but the first are LoRA's, in the words of PEFT."""

    adapter: str = "lora"
    """A key of :data:`~aletheia_lora.methods.METHODS`."""
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
        if self.adapter != "lora" and self.in_words():
            raise PlanError(f"{self.in_words()}: LoRA's own, and the adapter is {self.adapter}. Leave it out.")
        if self.lora_bias and (self.use_dora or name != "default"):
            other = "use_dora" if self.use_dora else f"init_lora_weights={name!r}"
            raise PlanError(f"lora_bias does not work with {other} in PEFT. Leave out one of the two.")

    @property
    def rewrites_weights(self) -> bool:
        """Attaching changes the frozen weights of the adapted modules."""
        return self.init_lora_weights in REWRITE_WEIGHTS

    def in_words(self) -> str:
        """LoRA's options that are not as usual, e.g. ``use_dora, init_lora_weights=pissa``; empty if all are."""
        given = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "adapter"}
        return ", ".join(
            name if value is True else f"{name}={value if isinstance(value, str | float) else '+'.join(value)}"
            for name, value in given.items()
            if value != self.__dataclass_fields__[name].default
        )


PLAIN = AdapterOptions()
