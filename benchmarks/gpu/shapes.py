"""The shapes of published models, as numbers, and models of these shapes with random weights on a device.

The numbers are those of each model's ``config.json``; what does not change the work of a step (long-context rotary
scaling, special tokens) is left out. Nothing is downloaded.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """One architecture."""

    model_type: str
    numbers: dict[str, Any]
    num_tokens: int
    """Tokens of a batch; rows follow from their length."""
    published_layers: int | None = None
    """Layers of the published model where fewer are built here."""
    four_bit: bool = False

    @property
    def num_layers(self) -> int:
        return self.numbers["num_hidden_layers"]


def sizes(hidden, inner, layers, heads, vocab, **more):
    """The numbers that every configuration has, under transformers' names."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        **more,
    }


def qwen(hidden, inner, layers, heads, key_values, vocab, *, tied=False):
    """A Qwen2.5."""
    return sizes(
        hidden, inner, layers, heads, vocab, num_key_value_heads=key_values, tie_word_embeddings=tied, rms_norm_eps=1e-6
    )


GEMMA_2 = {
    "num_key_value_heads": 8,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
STABLELM_2 = {"num_key_value_heads": 32, "partial_rotary_factor": 0.25, "use_qkv_bias": True}
MIXTRAL = {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}
PYTHIA = {"rotary_pct": 0.25, "use_parallel_residual": True, "max_position_embeddings": 2048}

# Small first: what they leave of their time goes to the large ones.
SHAPES = {
    "Qwen2.5-0.5B": Shape("qwen2", qwen(896, 4864, 24, 14, 2, 151936, tied=True), 4096),
    "TinyLlama-1.1B": Shape("llama", sizes(2048, 5632, 22, 32, 32000, num_key_value_heads=4), 4096),
    "Qwen2.5-1.5B": Shape("qwen2", qwen(1536, 8960, 28, 12, 2, 151936, tied=True), 4096),
    "StableLM-2-1.6B": Shape("stablelm", sizes(2048, 5632, 24, 32, 100352, **STABLELM_2), 4096),
    "Qwen2.5-3B": Shape("qwen2", qwen(2048, 11008, 36, 16, 2, 151936, tied=True), 4096),
    "Phi-3.5-mini": Shape("phi3", sizes(3072, 8192, 32, 32, 32064, num_key_value_heads=32, pad_token_id=0), 4096),
    "Pythia-6.9B": Shape("gpt_neox", sizes(4096, 16384, 32, 32, 50432, **PYTHIA), 2048),
    "Mistral-7B-v0.3": Shape(
        "mistral", sizes(4096, 14336, 32, 32, 32768, num_key_value_heads=8, sliding_window=None), 2048
    ),
    "Qwen2.5-7B": Shape("qwen2", qwen(3584, 18944, 28, 28, 4, 152064), 2048),
    "Llama-3.1-8B": Shape("llama", sizes(4096, 14336, 32, 32, 128256, num_key_value_heads=8), 2048),
    "Gemma-2-9B": Shape("gemma2", sizes(3584, 14336, 42, 16, 256000, **GEMMA_2), 2048),
    "Qwen2.5-14B": Shape("qwen2", qwen(5120, 13824, 48, 40, 8, 152064), 2048),
    # PEFT adds the adapter to a copy of each stack of experts, in bfloat16 2.8 GB a layer that stays until backward.
    "Mixtral-8x7B": Shape("mixtral", sizes(4096, 14336, 8, 32, 32000, **MIXTRAL), 2048, published_layers=32),
}
FOUR_BIT = {"Qwen2.5-72B": Shape("qwen2", qwen(8192, 29568, 80, 64, 8, 152064), 1024, four_bit=True)}
TINY = ("Qwen2.5-0.5B", "Gemma-2-9B", "Mixtral-8x7B")
"""What ``--tiny`` takes: the usual case, one that reworks its logits, and one with stacked experts."""


def tiny(shape: Shape) -> Shape:
    """The same architecture with four layers, 64 wide, on 64 tokens."""
    small = sizes(64, 128, 4, 4, 512, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, num_local_experts=4)
    numbers = {key: small.get(key, value) for key, value in shape.numbers.items()}
    return replace(shape, numbers=numbers, num_tokens=64, published_layers=shape.published_layers or shape.num_layers)


def build(shape: Shape, device: Any) -> Any:
    """A frozen model of this shape in bfloat16, made on the device as transformers initializes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape.model_type, **copy.deepcopy(shape.numbers))
    if shape.four_bit:
        return build_four_bit(config, device)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def build_four_bit(config: Any, device: Any) -> Any:
    """A frozen model whose layers are stored as NF4, quantized one after the other: 16-bit layers never add up.

    Raises:
        RuntimeError: If bitsandbytes is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # it looks for libraries while it is imported
        raise RuntimeError(f"bitsandbytes cannot be imported ({error}): no 4-bit weights without it") from error
    one_layer = copy.deepcopy(config)
    one_layer.num_hidden_layers = 1
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(one_layer, dtype=torch.bfloat16)
        layers = model.model.layers
        quantize(layers[0])
        # The decoder and its parts hold one configuration, which counts the layers and names the attention.
        for key in ("num_hidden_layers", "layer_types", "max_window_layers"):
            if hasattr(config, key):
                setattr(model.config, key, getattr(config, key))
        torch.set_default_dtype(torch.bfloat16)
        try:
            for layer_idx in range(1, config.num_hidden_layers):
                layers.append(quantize(type(layers[0])(model.config, layer_idx)))
        finally:
            torch.set_default_dtype(default)
    model.is_loaded_in_4bit = True  # what PEFT asks before it wraps 4-bit layers
    return model.requires_grad_(False)


def quantize(layer: Any) -> Any:
    """Put every linear map of one layer into NF4, in place; returns the layer."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    linears = [(name, module) for name, module in layer.named_modules() if type(module) is torch.nn.Linear]
    for name, linear in linears:
        with torch.device("meta"):
            packed = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
        weight = linear.weight.detach()
        packed.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=packed).to(weight.device)
        packed.bias = linear.bias
        owner = layer.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], packed)
    return layer
