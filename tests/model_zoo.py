"""A tiny random model of every causal-LM type that transformers knows, made from the type's default configuration.

One table of small sizes serves most types; what a type needs besides stands in ``SPECIAL``.
"""

from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, EXPERTS = 4, 6


def _sizes(size: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


# Size of each field that is larger, or not said, in the default configuration.
SMALL: dict[str, int] = {
    **_sizes(256, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    **_sizes(32, "hidden_size d_model n_embd dim_model emb_dim input_embedding_size output_embedding_size"),
    **_sizes(64, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dim_ff dff ffn_hidden_size"),
    **_sizes(LAYERS, "num_hidden_layers n_layer num_layers n_layers decoder_layers num_decoder_layers encoder_layers"),
    **_sizes(4, "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads"),
    **_sizes(4, "num_decoder_attention_heads num_encoder_attention_heads attention_heads"),
    **_sizes(2, "num_key_value_heads num_kv_heads kv_n_heads num_global_key_value_heads"),
    **_sizes(
        8, "head_dim global_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim rotary_dim kv_channels dim_head"
    ),
    **_sizes(8, "kv_lora_rank q_lora_rank o_lora_rank"),
    **_sizes(128, "max_position_embeddings n_positions n_ctx max_seq_len context_length position_embedding_size"),
    # experts
    **_sizes(EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_sizes(2, "num_experts_per_tok moe_k moe_topk top_k_experts moe_top_k"),
    **_sizes(16, "moe_intermediate_size expert_ffn_hidden_size router_hidden_size moe_shared_expert_intermediate_size"),
    **_sizes(16, "shared_expert_intermediate_size shared_experts_intermediate_size"),
    **_sizes(32, "shared_intermediate_size intermediate_size_mlp"),
    **_sizes(1, "n_group topk_group"),
    "zero_expert_num": 2,
    # state-space and linear-attention mixers: hidden size * 2 = 4 heads of 16
    **_sizes(64, "mamba_d_ssm"),
    **_sizes(4, "mamba_n_heads mamba_num_heads n_mamba_heads linear_num_heads linear_num_value_heads"),
    **_sizes(8, "mamba_d_state ssm_state_size state_size linear_head_dim linear_key_head_dim linear_value_head_dim"),
    **_sizes(2, "linear_num_key_heads"),
    **_sizes(1, "n_groups mamba_n_groups mamba_ngroups o_groups"),
    **_sizes(16, "chunk_size mamba_chunk_size mamba_head_dim"),
    # sparse and sliding attention
    **_sizes(8, "index_head_dim swa_head_dim index_topk"),
    **_sizes(2, "index_n_heads swa_num_key_value_heads"),
    **_sizes(4, "swa_num_attention_heads"),
    # smaller parts
    **_sizes(4, "laurel_rank adapter_rank hc_lowrank gated_norm_rank"),
    **_sizes(8, "hidden_size_per_layer_input shape_embed_dim pronunciation_embed_dim"),
    # vision and audio towers
    **_sizes(1, "depth num_global_layers conf_num_hidden_layers num_blocks"),
    **_sizes(32, "out_hidden_size projection_hidden_dim text_hidden_size projector_output_dim"),
    **_sizes(4, "conf_num_attention_heads"),
    **_sizes(16, "mm_embed_dim mm_posemb_size nemo_conv_channels encoder_hash_byte_group_vocab"),
    "image_size": 28,
    "patch_size": 14,
}
UNSAID = {"head_dim", "num_key_value_heads", "num_local_experts", "n_routed_experts", "num_experts_per_tok"}
"""Fields that are set where the default says None, too."""
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN4_EXP = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # of itself it turns to this on short rows, and stays there
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}, "rope_parameters": ROPE},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {f"swa_{name}": 8 for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layers_block_type": ["mamba", "attention"] * 2},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen4_exp_text": QWEN4_EXP,
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local", "lsh"] * 2},
    "xlm": {"causal": True},
    "xlnet": {"d_inner": 64, "attn_type": "uni"},
    "xlstm": {"chunk_size": 4},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def small_fields(kind: Any, **special: Any) -> dict[str, Any]:
    """Arguments that make a configuration of this class tiny."""
    defaults = {field.name: field.default for field in fields(kind)}
    made: dict[str, Any] = {name: value for name, value in TOKENS.items() if name in defaults}
    for name, size in SMALL.items():
        default = defaults.get(name, MISSING)
        if isinstance(default, int) or (default is None and name in UNSAID):
            made[name] = size
    if "kv_lora_rank" in defaults:  # keys and values of every head from one latent
        made["num_key_value_heads"] = made["num_attention_heads"]
    subs = {name: sub for name, sub in getattr(kind, "sub_configs", {}).items() if name not in special}
    default = kind() if AutoConfig in subs.values() else None
    for name, sub in subs.items():
        if sub is AutoConfig:
            sub = type(getattr(default, name))
        if sub is not type(None):
            made[name] = {**small_fields(sub), "model_type": sub.model_type}
    return made | special


def small_config(model_type: str) -> Any:
    kind = CONFIG_MAPPING[model_type]
    return kind(**small_fields(kind, **SPECIAL.get(model_type, {})))


def build(model_type: str, seed: int = 0) -> Any:
    auto = AutoModelForCausalLM if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(small_config(model_type)).float()
        with torch.no_grad():  # so that nothing is zero, which would keep gradients from what is behind it
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model


@dataclass(frozen=True)
class Expected:
    """What a family's tiny model is known to show."""

    num_layers: int = LAYERS
    layers: tuple[int, ...] = (1, LAYERS - 1)
    """Layers that the matrix adapts."""
    silent_layers: tuple[int, ...] = ()
    dead: tuple[str, ...] = ()


NOT_BUILT: dict[str, str] = {
    "dots3_note": "its default configuration numbers layers that a small one lacks; dots3_note_text is its decoder",
    "gemma3n": "its vision tower needs the timm library; gemma3n_text is its decoder",
    "gemma4_assistant": "a draft model: it runs on the hidden states of another model only",
    "gemma4_unified_assistant": "a draft model: it runs on the hidden states of another model only",
    "musicgen": "predicts audio codes, not text",
    "musicgen_melody": "predicts audio codes, not text",
    "qwen4_exp": "the default configuration of its vision tower cannot be built; qwen4_exp_text is its decoder",
}
REFUSED: dict[str, str] = {
    "cpmant": "sees later tokens",
    "blt": "several stacks of layers",
    "hrm_text": "Which stack to select from is unclear",
    "reformer": "run outside autograd",
}
KNOWN: dict[str, Expected] = {
    "mllama": Expected(layers=(1, 2), silent_layers=(3,)),  # layer 3 attends to images, and there are none
}
FAMILIES = {
    name: KNOWN.get(name, Expected()) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_BUILT | REFUSED
}
