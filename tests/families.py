"""One tiny random model per family that needs something of its own; shared by the rooms' tests."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

SMALL = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
ROTARY = {
    **SMALL,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
GPT2 = {"vocab_size": 256, "n_embd": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**ROTARY),
    "gpt2": lambda: GPT2Config(**GPT2, resid_pdrop=0.1, attn_pdrop=0.1, embd_pdrop=0.1),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL, intermediate_size=64, bos_token_id=1, eos_token_id=2),
    "phi3": lambda: Phi3Config(**ROTARY),
    "gemma2": lambda: Gemma2Config(**ROTARY, head_dim=8),
    "mixtral": lambda: MixtralConfig(**ROTARY, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **ROTARY, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0]
    ),
    "gpt_oss": lambda: GptOssConfig(**ROTARY, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "mamba": lambda: MambaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=4, bos_token_id=1, eos_token_id=2),
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=2),
    "falcon": lambda: FalconConfig(**SMALL, bos_token_id=1, eos_token_id=2),
    "bloom": lambda: BloomConfig(vocab_size=256, hidden_size=32, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2),
}
GROUPED_MATMUL = {"mixtral", "qwen3_moe", "gpt_oss"}
"""Families whose expert kernel has no float64 form."""


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The family's tiny model; the global random state does not move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(CONFIGS[name]()).to(dtype)


def random_batches(count: int = 2, rows: int = 2, length: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches with a masked prompt, and padding in the second row."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        input_ids = torch.randint(3, 256, (rows, length), generator=generator)
        labels, mask = input_ids.clone(), torch.ones_like(input_ids)
        labels[:, :4] = -100
        if rows > 1:
            mask[1, -3:], labels[1, -3:] = 0, -100
        made.append({"input_ids": input_ids, "attention_mask": mask, "labels": labels})
    return made
