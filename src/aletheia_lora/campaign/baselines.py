"""The name of an adapter -> how it is put on a model, and what its trainer needs: AdaLoRA beside those of a plan.

The baselines adapt the modules of the plan at its rank, as PEFT ships them; LoRA and DoRA are a plan's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

from ..planning import Plan
from ..training.random_state import random_state_kept
from ..training.trainer import attach_plan

Adapt = Callable[[Any, Plan, int], PeftModel]


def adapter_of(name: str, steps: int) -> Adapt:
    """What puts the adapters of this kind on a model, for a training of so many steps.

    AdaLoRA starts at 1.5 times the rank and ends at the rank; it prunes from a tenth to seven tenths of the steps.
    """
    if name != "adalora":
        return attach_plan

    def adapt(model: Any, plan: Plan, seed: int) -> PeftModel:
        lora = plan.lora_config()
        config = AdaLoraConfig(
            init_r=lora.r + lora.r // 2,
            target_r=lora.r,
            tinit=steps // 10,
            tfinal=3 * steps // 10,
            total_step=steps,
            lora_alpha=lora.lora_alpha,
            target_modules=lora.target_modules,
            fan_in_fan_out=lora.fan_in_fan_out,
            task_type=lora.task_type,
        )
        with random_state_kept():
            torch.manual_seed(seed)
            return get_peft_model(model, config)

    return adapt


def prepared(name: str) -> Callable[[Any], None]:
    """What the trainer is given for this kind of adapter."""
    return _allocating if name == "adalora" else lambda _trainer: None


def _allocating(trainer: Any) -> None:
    trainer.add_callback(_Allocate(trainer.model))


class _Allocate(TrainerCallback):
    """AdaLoRA moves its budget after each update, while the gradients are still there."""

    def __init__(self, adapted: PeftModel) -> None:
        self.adapted = adapted

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune by importance."""
        self.adapted.base_model.update_and_allocate(state.global_step)  # type: ignore[operator]
