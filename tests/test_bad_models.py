"""Models and plans that cannot be used: each is refused by name, with what was found and the next step."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel, LlamaConfig

from aletheia_lora.adapter import attach
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy
from aletheia_lora.errors import PlanError, ProbeError, UnsupportedModelError
from aletheia_lora.placement import check_placement
from aletheia_lora.planning import Plan, plan
from aletheia_lora.probe import probe
from families import CONFIGS, build, random_batches


def stack(depth=2):
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))


class Custom(nn.Module):
    """A language model of nobody's class: embedding, one stack or more of linear layers, head."""

    def __init__(self, **stacks):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        for name, layers in stacks.items():
            setattr(self, name, layers)
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden = self.embedding(input_ids)
        for layers in self.children():
            for layer in layers if isinstance(layers, nn.ModuleList) else ():
                hidden = layer(hidden)
        return SimpleNamespace(logits=self.head(hidden))


def test_two_stacks_without_a_configuration_are_ambiguous():
    with pytest.raises(UnsupportedModelError, match=r"'right' \(3 layers\), 'left' \(2 layers\)") as error:
        anatomy(Custom(left=stack(), right=stack(3)))
    assert "give it a configuration with num_hidden_layers" in str(error.value)


def test_two_stacks_of_the_configured_depth_in_different_places_are_ambiguous():
    model = build("llama")
    model.model.other = nn.Module()
    model.model.other.config = LlamaConfig()
    model.model.other.layers = build("llama", seed=1).model.layers
    with pytest.raises(UnsupportedModelError, match=r"several stacks .*'model.layers' .*'model.other.layers'"):
        anatomy(model)


def test_a_custom_class_without_a_config_can_be_read_and_probed_but_not_adapted():
    model = Custom(layers=stack())
    found = anatomy(model)
    assert found.num_layers == 2 and found.trial_forward == "ran"
    assert min(probe(model, random_tokens(), anatomy_=found).values()) > 0
    ranks = allocate(found, [0, 1], "uniform", AllocationOptions(rank=2))
    with pytest.raises(UnsupportedModelError, match=r"Custom has no config, .*subclass PreTrainedModel"):
        attach(model, found, ranks)
    assert all(parameter.requires_grad for parameter in model.parameters())


def random_tokens():
    batch = random_batches(1)[0]
    return [{**batch, "input_ids": batch["input_ids"] % 16, "labels": batch["labels"].clamp(max=15)}]


def test_a_model_that_sees_later_tokens_is_refused():
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**size, intermediate_size=64, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match=r"BertLMHeadModel sees later tokens.*is_decoder=True"):
        anatomy(BertLMHeadModel(config))
    config.is_decoder = True
    assert anatomy(BertLMHeadModel(config)).num_layers == 2


def test_weights_on_the_meta_device_are_read_but_neither_probed_nor_adapted():
    with torch.device("meta"):
        model = type(build("llama"))(CONFIGS["llama"]())
    found = anatomy(model)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM are on the meta device.*Load them first"):
        probe(model, random_batches(1))
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        attach(model, found, allocate(found, [1], "uniform", AllocationOptions(rank=2)))


def test_a_few_weights_left_on_the_meta_device_are_counted_and_named():
    model = build("llama")
    model.model.layers[2].mlp.to("meta")
    with pytest.raises(UnsupportedModelError, match=r"3 weights .*e\.g\. model\.layers\.2\.mlp\.gate_proj\.weight"):
        probe(model, random_batches(1))


def test_weights_on_several_devices_need_a_device_map():
    weights = [SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda:0")]
    model = SimpleNamespace(
        named_parameters=lambda: [(str(index), weight) for index, weight in enumerate(weights)],
        parameters=lambda: weights,
        modules=lambda: [object()],
        named_modules=lambda: [],
    )
    with pytest.raises(UnsupportedModelError, match=r"lie on cpu and cuda:0.*model\.to\(\.\.\.\), or .* device_map"):
        check_placement(model)
    model.modules = lambda: [SimpleNamespace(hf_device_map={"": 0})]
    check_placement(model)


def test_layers_outside_autograd_are_named(monkeypatch):
    model = build("llama")
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", torch.no_grad()(forward))
    with pytest.raises(ProbeError, match="outside autograd"):
        probe(model, random_batches(1))


@pytest.fixture(scope="module")
def made():
    rows = [{"input_ids": list(range(3, 15)), "labels": list(range(3, 15))} for _ in range(4)]
    return plan(build("llama"), rows, probe_batches=2, rank=2, strategy="last", num_layers=2)


def test_a_plan_for_another_model_names_both(made):
    other = build("phi3")
    with pytest.raises(PlanError, match=r"made for LlamaForCausalLM \(\w{16}\), .* Phi3ForCausalLM \(\w{16}\)"):
        made.check_fits(other)


def test_a_plan_with_layers_that_the_model_lacks_is_refused(made):
    record = json.loads(json.dumps(made.to_dict()))
    record["selection"]["layers"] = [3, 9]
    with pytest.raises(PlanError, match=r"layers=\(3, 9\): expected layers between 0 and 3"):
        Plan.from_dict(record)


def test_a_plan_whose_ranks_name_a_module_that_the_model_lacks_is_refused(made):
    record = json.loads(json.dumps(made.to_dict()))
    record["ranks"][0]["name"] = "model.layers.9.mlp.up_proj"
    with pytest.raises(PlanError, match=r"not in LlamaForCausalLM, e\.g\. 'model\.layers\.9\.mlp\.up_proj'"):
        Plan.from_dict(record)
