import pytest
import torch
from peft import PeftModel, get_peft_model

from aletheia_lora.adapter import add_adapters, attach, census, check_census, dead_adapters, lora_config
from aletheia_lora.adapter_options import AdapterOptions
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy
from aletheia_lora.errors import CensusError, PlanError
from aletheia_lora.loss import labelled_loss
from families import CONFIGS, build, random_batches

LAYERS = (1, 3)


def planned(model, strategy="asymmetric", layers=LAYERS, **options):
    found = anatomy(model)
    options = {"rank": 4, "attention_rank": 4, "mlp_rank": 8, **options}
    return found, allocate(found, layers, strategy, AllocationOptions(**options))


@pytest.mark.parametrize("family", CONFIGS)
def test_exactly_the_planned_modules_are_adapted_and_learn_and_survive_saving(family, tmp_path):
    model, batch = build(family), random_batches(1)[0]
    found, ranks = planned(model)
    adapted = attach(model, found, ranks)
    entries = census(adapted)
    assert {entry.name.removesuffix(".weight") for entry in entries} == {entry.name for entry in ranks}
    assert sum(entry.num_params for entry in entries) == sum(entry.num_params for entry in ranks)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == sum(entry.num_params for entry in ranks)
    labelled_loss(adapted, batch).backward()
    assert dead_adapters(adapted) == []
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    adapted.eval()
    with torch.no_grad():
        logits = adapted(input_ids=batch["input_ids"]).logits
        adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(build(family), str(tmp_path)).eval()
        again = loaded(input_ids=batch["input_ids"]).logits
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-6)  # float32; 0 but for Mamba's scan (4e-7)
        base = build(family).eval()(input_ids=batch["input_ids"]).logits
        assert not torch.allclose(logits, base)
        merged = loaded.merge_and_unload().eval()
        torch.testing.assert_close(merged(input_ids=batch["input_ids"]).logits, logits, rtol=1e-4, atol=2e-5)  # float32


def test_layer_1_is_not_layer_11(tiny_llama):
    model = tiny_llama(num_layers=12)
    adapted = attach(model, *planned(model, layers=(1,)))
    assert {entry.name.split(".")[2] for entry in census(adapted)} == {"1"}


def test_attaching_depends_on_its_seed_alone():
    random_state = torch.get_rng_state()
    first = attach((model := build("llama")), *planned(model), seed=5)
    torch.rand(3)
    torch.set_rng_state(random_state)
    second = attach((model := build("llama")), *planned(model), seed=5)
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_census_names_a_missing_an_extra_and_a_wrong_adapter():
    model = build("llama")
    found, ranks = planned(model)
    adapted = get_peft_model(model, lora_config(found, ranks[1:]))
    with pytest.raises(CensusError, match=r"1 missing \(e\.g\. model\.layers\.1\.self_attn\.q_proj\)"):
        check_census(adapted, ranks)
    with pytest.raises(CensusError, match="1 not in the plan"):
        check_census(adapted, ranks[2:])
    adapted.get_submodule(f"base_model.model.{ranks[1].name}").r["default"] = 3
    with pytest.raises(
        CensusError, match=r"another rank or alpha .*planned rank and alpha \(4, 8\.0\), found \(3, 8\.0\)"
    ):
        check_census(adapted, ranks[1:])


def test_the_census_sees_a_weight_that_would_train_besides_the_adapters():
    model = build("llama")
    found, ranks = planned(model)
    adapted = attach(model, found, ranks)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(CensusError, match="embed_tokens"):
        check_census(adapted, ranks)


def test_a_failed_census_gives_the_model_back_without_adapters(monkeypatch):
    model = build("llama")
    names = [name for name, _ in model.named_modules()]
    found, ranks = planned(model)
    monkeypatch.setattr(
        "aletheia_lora.adapter.lora_config", lambda anatomy, ranks, options: lora_config(anatomy, ranks[1:])
    )
    with pytest.raises(CensusError):
        attach(model, found, ranks)
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert anatomy(model) == found


def test_experts_refuse_dropout_by_name():
    model = build("mixtral")
    found, ranks = planned(model)
    with pytest.raises(PlanError, match=r"lora_dropout=0\.1 does not work on stacked experts"):
        lora_config(found, ranks, AdapterOptions(lora_dropout=0.1))


def test_ranks_of_another_model_are_refused():
    with pytest.raises(PlanError, match="not in Phi3ForCausalLM"):
        lora_config(anatomy(build("phi3")), planned(build("llama"))[1])


def test_the_generators_of_all_gpus_are_kept_whatever_the_model_is_on(monkeypatch):
    model = build("llama")
    (found, ranks), (_, further) = planned(model), planned(model, layers=(0,))
    states = {0: torch.tensor([1]), 1: torch.tensor([2])}

    def seed_all(seed):
        states.update({device: torch.tensor([seed]) for device in states})

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    adapted = attach(model, found, ranks, seed=9)
    assert {device: int(state) for device, state in states.items()} == {0: 1, 1: 2}
    add_adapters(adapted, found, ranks, further, seed=9)
    assert {device: int(state) for device, state in states.items()} == {0: 1, 1: 2}
