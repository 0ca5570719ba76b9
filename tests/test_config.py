import pytest
from peft import get_peft_model

from aletheia_lora import aletheia_lora_config, apply_aletheia_lora
from aletheia_lora.adapter import census
from aletheia_lora.errors import PlanError
from families import CONFIGS, build


@pytest.mark.parametrize("family", CONFIGS)
def test_the_documented_call_adapts_the_chosen_layers_of_any_model(family):
    model = build(family)
    config = apply_aletheia_lora(model=model, selected_layers=[0, 2], r=4, lora_alpha=8)
    entries = census(get_peft_model(model, config))
    layers = {next(int(part) for part in entry.name.split(".") if part.isdigit()) for entry in entries}
    assert layers == {0, 2}
    assert {(entry.rank, entry.alpha) for entry in entries} == {(4, 8.0)}


def test_ranks_go_by_kind_and_alpha_follows_rank():
    config = apply_aletheia_lora(build("phi3"), [1], r=4, lora_alpha=8, attention_r=4, mlp_r=16)
    entries = {entry.name: entry for entry in census(get_peft_model(build("phi3"), config))}
    assert (entries["model.layers.1.mlp.gate_up_proj"].rank, entries["model.layers.1.mlp.gate_up_proj"].alpha) == (
        16,
        32.0,
    )
    assert (entries["model.layers.1.self_attn.qkv_proj"].rank, entries["model.layers.1.self_attn.qkv_proj"].alpha) == (
        4,
        8.0,
    )
    without_model = aletheia_lora_config([1], r=4, lora_alpha=8, mlp_r=16)
    assert without_model.alpha_pattern == dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 32)


def test_asked_alphas_are_taken_as_given():
    config = aletheia_lora_config([1], r=16, lora_alpha=32, mlp_r=64, mlp_alpha=64)
    assert config.rank_pattern["up_proj"] == 64 and config.alpha_pattern["up_proj"] == 64


def test_targets_may_be_leaf_names_or_full_names():
    config = apply_aletheia_lora(build("llama"), [1, 2], target_modules=["q_proj", "model.layers.2.mlp.up_proj"])
    assert sorted(config.target_modules) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.2.mlp.up_proj",
        "model.layers.2.self_attn.q_proj",
    ]


def test_a_target_that_matches_nothing_is_an_error_that_names_the_nearest():
    with pytest.raises(PlanError, match=r"'qproj' matches no adaptable module .* Did you mean 'q_proj'\?"):
        apply_aletheia_lora(build("llama"), [1], target_modules=["up_proj", "qproj"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"selected_layers": []}, "no layers"),
        ({"selected_layers": [9]}, "layer 9 does not exist"),
        ({"selected_layers": [1, 1]}, "more than once"),
        ({"selected_layers": [1], "r": 0}, "rank 0"),
        ({"selected_layers": [1], "r": 33}, r"above min\(in, out\)"),
        ({"selected_layers": [1], "mlp_r": -2}, "rank -2"),
    ],
)
def test_what_cannot_be_is_refused(kwargs, message):
    with pytest.raises(PlanError, match=message):
        apply_aletheia_lora(build("llama"), **kwargs)


@pytest.mark.parametrize("layers", [[], [-1], [2, 2]])
def test_without_a_model_layers_are_still_checked(layers):
    with pytest.raises(PlanError, match="selected_layers"):
        aletheia_lora_config(layers)
    with pytest.raises(PlanError, match="rank 0"):
        aletheia_lora_config([1], r=0)
