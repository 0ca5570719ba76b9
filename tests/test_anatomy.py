import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from aletheia_lora.anatomy import ModelAnatomy, anatomy, kind_of
from aletheia_lora.errors import PlanError, UnsupportedModelError
from families import CONFIGS, build
from model_zoo import build as build_zoo

WHOLE = {"llama", "gpt2", "gpt_neox", "phi3", "gemma2", "opt", "falcon", "bloom"}


@pytest.mark.parametrize("family", CONFIGS)
def test_every_matrix_of_every_layer_is_adaptable_or_left_out_with_a_reason(family):
    model = build(family)
    found = anatomy(model)
    assert found.num_layers == 4
    assert found.trial_forward == "ran"
    names = {module.name for module in found.modules} | {item.name for item in found.left_out}
    for layer in found.layers:
        block = model.get_submodule(layer.name)
        for name, module in block.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and not leaf.endswith("bias"):
                    full = f"{layer.name}.{name}"
                    assert full in names or f"{full}.{leaf}" in names, f"{full}.{leaf}"
    assert all(item.reason for item in found.left_out)
    assert (found.adaptable_share == 1.0) == (family in WHOLE)
    for module in found.modules:
        assert module.layer_idx == next(int(part) for part in module.name.split(".") if part.isdigit())


@pytest.mark.parametrize("family", CONFIGS)
def test_reading_the_anatomy_leaves_the_model_and_the_random_state_as_found(family):
    model = build(family)
    model.train()
    model.lm_head.eval() if hasattr(model, "lm_head") else None
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    anatomy(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_experts_are_one_stack_per_projection_with_the_share_that_a_token_uses():
    found = anatomy(build("mixtral"))
    stack = next(module for module in found.layers[2].modules if module.name.endswith("experts.gate_up_proj"))
    assert (stack.kind, stack.storage, stack.num_experts) == ("expert", "stacked", 4)
    assert (stack.in_features, stack.out_features) == (32, 128)
    assert stack.active_share == 0.5
    assert stack.adapter_params(8) == 4 * 8 * (32 + 128)
    assert {item.reason for item in found.left_out} == {"router"}


def test_a_dense_first_layer_of_a_mixture_is_read_as_it_is():
    found = anatomy(build("qwen3_moe"))
    assert {module.kind for module in found.layers[0].modules} == {"attention", "mlp"}
    assert {module.kind for module in found.layers[1].modules} == {"attention", "expert"}


def test_matrices_that_are_read_directly_are_left_out():
    reasons = {item.name.rpartition(".")[2]: item.reason for item in anatomy(build("mamba")).left_out}
    for leaf in ("x_proj", "dt_proj", "out_proj"):  # out_proj runs as a module on a CPU, but PEFT refuses it here
        assert "a kernel directly, where an adapter would be dead" in reasons[leaf]


def test_what_only_selects_gets_no_adapter_and_says_so():
    reasons = {item.name.rpartition("indexer.")[2]: item.reason for item in anatomy(build_zoo("deepseek_v32")).left_out}
    assert {leaf for leaf, reason in reasons.items() if "only selects" in reason} == {"wk", "wq_b", "weights_proj"}


def test_checkpointed_layers_are_adapted_all_the_same():
    model = build("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    assert anatomy(model).adaptable_share == 1.0


def test_what_transformers_would_rename_at_loading_gets_no_adapter():
    names = {item.name.split(".", 3)[-1] for item in anatomy(build_zoo("laguna")).left_out if "renames" in item.reason}
    assert names == {f"mlp.shared_experts.{leaf}_proj" for leaf in ("gate", "up", "down")}


def test_a_tower_of_the_same_depth_is_not_the_decoder():
    found = anatomy(build_zoo("git"))  # its image encoder has as many layers, and more weights
    assert all(layer.name.startswith("git.encoder.layer.") for layer in found.layers)


def test_the_trial_keeps_gradients_and_makes_none():
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    anatomy(model)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not weight)


class PackedLinear(nn.Module):
    """A linear map whose weight is a buffer of bytes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 100).to(torch.int8))

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.qweight.to(hidden.dtype) / 100)


def test_the_trial_copies_no_packed_weight(monkeypatch):
    model = build("llama")
    model.model.layers[0].mlp.up_proj = PackedLinear(model.model.layers[0].mlp.up_proj)
    copied, clone = set(), torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **kwargs: copied.add(id(self)) or clone(self, **kwargs))
    assert anatomy(model).trial_forward == "ran"
    buffers = dict(model.named_buffers())
    assert id(buffers.pop("model.layers.0.mlp.up_proj.qweight")) not in copied
    assert buffers and {id(buffer) for buffer in buffers.values()} <= copied


def test_conv1d_has_its_features_the_right_way_round():
    module = next(m for m in anatomy(build("gpt2")).layers[0].modules if m.name.endswith("c_attn"))
    assert (module.storage, module.in_features, module.out_features) == ("conv1d", 32, 96)


def test_a_model_on_the_meta_device_has_the_same_anatomy():
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    assert anatomy(empty).fingerprint == anatomy(build("llama")).fingerprint


def test_the_record_survives_being_written_and_read():
    found = anatomy(build("mixtral"))
    assert ModelAnatomy.from_dict(found.to_dict()) == found


def test_two_shapes_have_two_fingerprints():
    assert anatomy(build("llama")).fingerprint != anatomy(build("phi3")).fingerprint


def test_an_encoder_decoder_model_is_refused_by_name():
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16))
    with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration is an encoder-decoder"):
        anatomy(model)


def test_a_model_without_a_stack_is_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(16, 8)
            self.head = nn.Linear(8, 16)

    with pytest.raises(UnsupportedModelError, match="no list of decoder layers"):
        anatomy(Flat())


@pytest.mark.parametrize(
    ("layers", "message"),
    [([], "no layers"), ([1, 1], "more than once"), ([4], "does not exist"), ([-1], "does not exist")],
)
def test_layers_that_cannot_be_are_refused(layers, message):
    with pytest.raises(PlanError, match=message):
        anatomy(build("llama")).check_layers(layers)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("self_attn.q_proj", "attention"),
        ("attention.dense", "attention"),
        ("mlp.down_proj", "mlp"),
        ("fc1", "mlp"),
        ("mlp.experts.3.w1", "expert"),
        ("mamba.in_proj", "mixer"),
        ("linear_attn.in_proj_qkvz", "mixer"),
        ("gate_proj", "mlp"),
        ("o_proj", "attention"),
    ],
)
def test_the_kind_of_a_matrix_comes_from_its_path(path, kind):
    assert kind_of(path) == kind
