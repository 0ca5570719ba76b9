"""A name or a few options -> a :class:`Method`: how a cell of a campaign chooses layers, ranks and trainer.

Reading :data:`METHODS` is reading the table of methods. At the same ``percent`` and rank, the controls train as many
layers and weights as ``paper``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..selection import SCORED

HALF = {"percent": 50.0, "allocation": "uniform"}
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"strategy": "all", "allocation": "uniform"},
    "uniform_trainer": {"strategy": "all", "allocation": "uniform", "trainer": "trainer"},
    "paper": {"strategy": "top_percent", **HALF},
    "paper_asymmetric": {"strategy": "top_percent", "percent": 50.0, "allocation": "asymmetric"},
    "above_median": {"strategy": "above_median", "allocation": "matched"},
    "budget": {"strategy": "budget", "time_budget": 0.7, "allocation": "matched"},
    "budget_stride": {"strategy": "budget_stride", "percent": 33.0, "time_budget": 0.8, "allocation": "matched"},
    "last": {"strategy": "last", **HALF},
    "first": {"strategy": "first", **HALF},
    "middle": {"strategy": "middle", **HALF},
    "bottom": {"strategy": "bottom", **HALF},
    "stride": {"strategy": "stride", **HALF},
    "random": {"strategy": "random", **HALF},
    "all_matched_params": {"strategy": "all", "allocation": "uniform", "params_of": "paper"},
    "dora": {"strategy": "all", "allocation": "uniform", "trainer": "trainer", "adapter": "dora"},
    "adalora": {"strategy": "all", "allocation": "uniform", "trainer": "trainer", "adapter": "adalora"},
    "qlora": {"strategy": "all", "allocation": "uniform", "quantization": "nf4"},
}
"""``uniform`` runs through our trainer and ``uniform_trainer`` as plain PEFT under transformers' Trainer; DoRA
(arXiv 2402.09353) and AdaLoRA (arXiv 2303.10512) are PEFT's, on every layer, under transformers' Trainer; QLoRA
(arXiv 2305.14314) is ``uniform`` over a base model in 4-bit NormalFloat."""


class Method(BaseModel):
    """How a cell chooses what to train; the words are those of a plan."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(description="Its name in tables.")
    strategy: str = Field(description="What chooses the layers: a key of STRATEGIES.")
    score: str = Field("gradient_norm", description="What scores a layer: a key of SCORES.")
    percent: float = Field(50.0, ge=1, le=100, description="Share of layers, for strategies that go by number.")
    num_layers: int | None = Field(None, ge=1, description="Number of layers; caps 'budget'.")
    mass: float = Field(0.8, gt=0, le=1, description="Share of the total score to hold, for 'mass'.")
    time_budget: float = Field(0.7, gt=0, le=1, description="Step time as a share of uniform LoRA's, for 'budget'.")
    allocation: str = Field("matched", description="What gives the ranks: a key of ALLOCATIONS.")
    params_of: str | None = Field(
        None, description="Take the rank that trains as many weights as this method of the campaign, or of METHODS."
    )
    trainer: Literal["aletheia", "trainer"] = Field("aletheia", description="Ours, or transformers' Trainer.")
    adapter: Literal["lora", "dora", "adalora"] = Field("lora", description="Kind of adapter.")
    quantization: Literal["none", "nf4", "fp4", "int8"] = Field(
        "none", description="How bitsandbytes packs the base model that it trains on, and is compared with."
    )
    draws: Annotated[int, Field(ge=1)] = Field(1, description="Cells per seed, each with its own random choice.")

    @property
    def needs_probe(self) -> bool:
        """True where layers or ranks follow from a measurement on the data, which is then a part of its cost."""
        return self.strategy in SCORED or self.allocation == "proportional"


def is_packed(method: Mapping[str, Any]) -> bool:
    """True where the method's base model is quantized."""
    return bool(method.get("quantization", "none") != "none")


def has_counted_time(method: Mapping[str, Any]) -> bool:
    """True where counting gives the time of a step: LoRA on plain weights under our trainer."""
    ours = method.get("trainer", "aletheia") == "aletheia"
    return bool(ours and method["adapter"] == "lora" and not is_packed(method))
