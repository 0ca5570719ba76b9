import json

import numpy as np
import pytest
import torch

from aletheia_lora.anatomy import anatomy
from aletheia_lora.loss import labelled_loss
from aletheia_lora.probe import probe
from aletheia_lora.probe_result import ExpertLoad, ProbeResult
from aletheia_lora.routing import _tokens_per_expert
from families import build, random_batches

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")


def tokens_by_router(model, batches):
    """(layers with experts, experts): the top choices of each router's logits, padding left out."""
    totals = None
    for batch in batches:
        with torch.no_grad():
            output = model.eval()(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
            )
        real = batch["attention_mask"].flatten().bool()
        chosen = [logits[real].topk(model.config.num_experts_per_tok).indices for logits in output.router_logits]
        counts = np.array([torch.bincount(layer.flatten(), minlength=4).tolist() for layer in chosen])
        totals = counts if totals is None else totals + counts
    return totals


@pytest.mark.parametrize("family", MIXTURES)
def test_the_tokens_of_each_expert_are_those_its_router_chose(family):
    model, batches = build(family), random_batches(3)
    loads = probe(model, batches).expert_loads
    assert [list(load.num_tokens) for load in loads] == tokens_by_router(model, batches).tolist()
    with_experts = [
        layer.layer_idx for layer in anatomy(model).layers if any(m.kind == "expert" for m in layer.modules)
    ]
    assert [load.layer_idx for load in loads] == with_experts
    for load in loads:
        assert sum(load.num_tokens) == 3 * 21 * 2  # batches, tokens without padding, experts per token
        assert sum(load.share) == pytest.approx(1) and 1 <= load.effective_experts <= 4


@pytest.mark.parametrize("family", MIXTURES)
def test_the_gradient_norm_of_each_expert_is_that_of_its_slice_of_the_stack(family):
    model, batches = build(family), random_batches(2)
    measured = {t.name: t for t in probe(model, batches).tensors if t.expert_grad_norm is not None}
    assert set(measured) == {m.name for m in anatomy(model).modules if m.storage == "stacked"}
    parameters = dict(model.named_parameters())
    expected = dict.fromkeys(measured, 0)
    for batch in batches:
        model.zero_grad()
        labelled_loss(model.eval(), batch).backward()
        for name in measured:
            expected[name] = expected[name] + parameters[name].grad.flatten(1).norm(dim=1)
    for name, tensor in measured.items():
        assert tensor.expert_grad_norm == pytest.approx(expected[name].tolist(), rel=1e-5, abs=1e-9)  # float32


def test_an_expert_that_gets_no_token_has_no_share_and_no_gradient():
    model = build("mixtral")
    gate = model.model.layers[1].mlp.gate

    def never_the_last(_module, _args, output):
        logits, weights, index = output
        return logits, weights, torch.where(index == 3, 0, index)

    handle = gate.register_forward_hook(never_the_last)
    result = probe(model, random_batches(2))
    handle.remove()
    load = next(load for load in result.expert_loads if load.layer_idx == 1)
    assert load.num_tokens[3] == 0 and load.share[3] == 0
    stack = next(t for t in result.tensors if t.name == "model.layers.1.mlp.experts.down_proj")
    assert stack.expert_grad_norm[3] == 0 and min(stack.expert_grad_norm[:3]) > 0


def test_routers_are_named_and_measured_but_get_no_adapter():
    routers = [tensor for tensor in probe(build("mixtral"), random_batches(2)).tensors if tensor.kind == "router"]
    assert [tensor.name for tensor in routers] == [f"model.layers.{layer}.mlp.gate.weight" for layer in range(4)]
    assert all(min(tensor.grad_norm) > 0 and not tensor.adaptable for tensor in routers)


def test_a_loss_that_runs_the_model_twice_counts_its_tokens_once():
    def twice(model, batch):
        with torch.no_grad():
            labelled_loss(model, batch)
        return labelled_loss(model, batch)

    batches = random_batches(2)
    assert probe(build("mixtral"), batches, loss_fn=twice).expert_loads == probe(build("mixtral"), batches).expert_loads


def test_a_checkpoint_that_recomputes_counts_its_tokens_once():
    def checkpointed(model, batch):
        model.train()
        return labelled_loss(model, batch)

    model, batches = build("mixtral"), random_batches(2)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert probe(model, batches, loss_fn=checkpointed).expert_loads == probe(build("mixtral"), batches).expert_loads


def test_a_dense_model_has_no_loads():
    assert probe(build("llama"), random_batches(1)).expert_loads == ()


def test_hooks_are_gone_afterwards_also_on_failure():
    model, batches = build("mixtral"), random_batches(1)
    probe(model, batches)
    batches[0]["input_ids"][0, 0] = 10_000
    with pytest.raises(IndexError):
        probe(model, batches)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_loads_survive_being_saved_and_an_old_record_is_still_read(tmp_path):
    result = probe(build("mixtral"), random_batches(2))
    path = result.save(tmp_path / "scores.json")
    again = ProbeResult.load(path)
    assert again.expert_loads == result.expert_loads and again.tensors == result.tensors
    record = json.loads(path.read_text())
    del record["expert_loads"]
    for tensor in record["tensors"]:
        del tensor["expert_grad_norm"]
    old = ProbeResult.from_dict(record)
    assert old.expert_loads == () and all(tensor.expert_grad_norm is None for tensor in old.tensors)
    assert dict(old) == dict(result)


def test_effective_experts_runs_from_one_to_all():
    assert ExpertLoad("experts", 0, (5, 5, 5, 5)).effective_experts == pytest.approx(4)
    assert ExpertLoad("experts", 0, (20, 0, 0, 0)).effective_experts == pytest.approx(1)
    assert np.isnan(ExpertLoad("experts", 0, (0, 0)).effective_experts)


def test_three_ways_to_hand_tokens_to_experts_are_understood():
    mask = torch.tensor([[1, 1, 1, 0]])
    index = torch.tensor([[0, 2], [2, 1], [0, 2], [3, 3]])
    hidden = torch.ones(4, 8)
    assert _tokens_per_expert([hidden, index, hidden], 5, mask).tolist() == [2, 1, 3, 0, 0]
    assert _tokens_per_expert([hidden, [1, 0, 3]], 3, mask).tolist() == [1, 0, 3]
    dense = torch.zeros(2, 4, 8)
    dense[0, :2], dense[1, 1:] = 1, 1
    assert _tokens_per_expert([dense.reshape(-1, 8)], 2, mask).tolist() == [2, 2]
    assert _tokens_per_expert([hidden, hidden], 5, mask) is None
