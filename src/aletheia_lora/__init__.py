"""Find out which layers of a language model are worth adapting, then LoRA-fine-tune only those.

The documented calls::

    layer_scores = gradient_probe(model=model, dataset=train_dataset, probe_batches=5)
    selected_layers = select_layers(layer_scores, top_pct=50)
    peft_config = apply_aletheia_lora(model=model, selected_layers=selected_layers, r=16, lora_alpha=32)

and one call above them: ``plan(model, rows, tokenizer=tokenizer, time_budget=0.6)``. Names load on first use, so that
importing this package is fast and changes nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .anatomy import ModelAnatomy
    from .comparison import CompareOptions, compare
    from .config import aletheia_lora_config, apply_aletheia_lora
    from .errors import AletheiaError
    from .planning import Plan, plan
    from .probe import gradient_probe
    from .probe_result import ProbeResult
    from .selection import LayerSelection, select_layers
    from .training.trainer import SFTTrainer

__version__ = "0.1.2"  # of the public package, whose own tests ask for it and pass unmodified

__all__ = [
    "AletheiaError",
    "CompareOptions",
    "LayerSelection",
    "ModelAnatomy",
    "Plan",
    "ProbeResult",
    "SFTTrainer",
    "aletheia_lora_config",
    "apply_aletheia_lora",
    "compare",
    "gradient_probe",
    "plan",
    "select_layers",
]

_HOMES = {
    "AletheiaError": "errors",
    "CompareOptions": "comparison",
    "LayerSelection": "selection",
    "ModelAnatomy": "anatomy",
    "Plan": "planning",
    "ProbeResult": "probe_result",
    "SFTTrainer": "training.trainer",
    "aletheia_lora_config": "config",
    "apply_aletheia_lora": "config",
    "compare": "comparison",
    "gradient_probe": "probe",
    "plan": "planning",
    "select_layers": "selection",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its room on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*__all__, "__version__"])
