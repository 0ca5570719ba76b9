import json
from dataclasses import replace

import pytest
import torch
import trl
from peft import LoHaConfig, PeftModel, PeftType, get_peft_model

from aletheia_lora.adapter import attach, census, check_census, dead_adapters, lora_config, peft_config
from aletheia_lora.adapter_options import AdapterOptions
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy
from aletheia_lora.comparison import CompareOptions, compare
from aletheia_lora.data import split, tokenize
from aletheia_lora.errors import CensusError, PlanError
from aletheia_lora.loss import labelled_loss
from aletheia_lora.methods import METHODS, with_params
from aletheia_lora.planning import Plan, plan
from aletheia_lora.training.run import TrainOptions, train_adapter
from aletheia_lora.training.trainer import SFTTrainer
from families import CONFIGS, build, random_batches
from tiny_inputs import word_rows, word_tokenizer

OTHERS = [name for name in METHODS if name != "lora"]
LAYERS = (1, 3)
NOT_FOR_CONV1D = {"loha", "lokr", "oft", "hra"}


def planned(model, method, rank=4):
    """Ranks for every module of the layers that the method takes, by what it says of itself."""
    found = anatomy(model)
    ranks = allocate(found, LAYERS, "uniform", AllocationOptions(rank=min(rank, *(m.max_rank for m in found.modules))))
    modules = {module.name: module for module in found.modules}
    rule = METHODS[method]
    taken = [
        entry
        for entry in ranks
        if modules[entry.name].storage in rule.storages and not rule.why_not(modules[entry.name], entry.rank)
    ]
    return found, taken


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("family", CONFIGS)
def test_exactly_the_planned_modules_are_adapted_and_learn_and_survive_saving(family, method, tmp_path):
    if family == "gpt2" and method in NOT_FOR_CONV1D:
        pytest.skip("GPT-2's layers are Conv1D, which this method does not take")
    model, batch = build(family), random_batches(1)[0]
    found, ranks = planned(model, method)
    base = build(family).eval()(input_ids=batch["input_ids"]).logits
    adapted = attach(model, found, ranks, AdapterOptions(adapter=method))
    entries = census(adapted)
    assert {entry.name for entry in entries} == {entry.name for entry in ranks}
    assert {entry.method for entry in entries} == {method}
    counted = {entry.name: entry.num_params for entry in with_params(method, found, ranks)}
    assert {entry.name: entry.num_params for entry in entries} == counted
    adapted.eval()
    start = adapted(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(start, base, rtol=0, atol=2e-6)  # float32; 0 but for HRA's reflections
    labelled_loss(adapted, batch).backward()
    assert dead_adapters(adapted) == []
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        logits = adapted(input_ids=batch["input_ids"]).logits
        assert not torch.allclose(logits, base, atol=1e-4)
        adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(build(family), str(tmp_path)).eval()
        again = loaded(input_ids=batch["input_ids"]).logits
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-6)  # float32; 0 but for Mamba's scan
        merged = loaded.merge_and_unload().eval()
        torch.testing.assert_close(merged(input_ids=batch["input_ids"]).logits, logits, rtol=1e-4, atol=2e-5)  # float32


@pytest.mark.parametrize("method", OTHERS)
def test_what_a_method_cannot_adapt_is_refused_by_name_and_reason(method):
    found = anatomy(build("mixtral"))
    with pytest.raises(PlanError, match=rf"{method} cannot adapt .*mlp\.experts\..*stacked experts by LoRA only"):
        experts = AllocationOptions(rank=4, targets=("gate_up_proj",))
        peft_config(found, allocate(found, LAYERS, "uniform", experts), AdapterOptions(adapter=method))
    found = anatomy(build("gpt2"))
    ranks = allocate(found, LAYERS, "uniform", AllocationOptions(rank=4))
    if method in NOT_FOR_CONV1D:
        with pytest.raises(PlanError, match=rf"h\.1\.attn\.c_attn: PEFT's {method} does not take Conv1D"):
            peft_config(found, ranks, AdapterOptions(adapter=method))
    else:
        assert peft_config(found, ranks, AdapterOptions(adapter=method)).peft_type == PeftType(method.upper())


@pytest.mark.parametrize("method", OTHERS)
def test_four_bit_weights_are_adapted_or_refused(method):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="no bitsandbytes: no 4-bit weights")
    model = build("llama")
    model.is_loaded_in_4bit = True  # as from_pretrained says
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight.data
        packed = bitsandbytes.nn.Linear4bit(32, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=packed)
        layer.mlp.up_proj = packed.to("cpu")
    found = anatomy(model)
    ranks = allocate(found, LAYERS, "uniform", AllocationOptions(rank=4, targets=("up_proj",)))
    if "quantized" not in METHODS[method].storages:
        with pytest.raises(PlanError, match=f"PEFT's {method} does not take quantized weights"):
            peft_config(found, ranks, AdapterOptions(adapter=method))
        return
    adapted = attach(model, found, ranks, AdapterOptions(adapter=method))
    labelled_loss(adapted, random_batches(1)[0]).backward()
    assert dead_adapters(adapted) == [] and len(census(adapted)) == 2


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("oft", r"layers\.1\.self_attn\.q_proj: its 40 inputs do not divide into blocks of 32"),
        ("fourierft", r"layers\.1\.self_attn\.k_proj: it has 800 weights, fewer than 1000 frequencies"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tiny_llama, method, reason):
    found = anatomy(tiny_llama(hidden_size=40))
    with pytest.raises(PlanError, match=reason):
        peft_config(
            found, allocate(found, LAYERS, "uniform", AllocationOptions(rank=2)), AdapterOptions(adapter=method)
        )


def test_ranks_that_a_method_cannot_hold_are_refused():
    found = anatomy(build("llama"))
    several = allocate(found, LAYERS, "asymmetric", AllocationOptions(attention_rank=4, mlp_rank=8))
    for method in ("vera", "hra"):
        with pytest.raises(PlanError, match=f"{method} has one rank for all modules, and the plan gives 4, 8"):
            peft_config(found, several, AdapterOptions(adapter=method))
    with pytest.raises(PlanError, match="only an even rank starts at the frozen model, and its rank is 3"):
        peft_config(found, allocate(found, LAYERS, "uniform", AllocationOptions(rank=3)), AdapterOptions(adapter="hra"))
    with pytest.raises(PlanError, match="LoRA's own, and the adapter is loha"):
        peft_config(found, several, AdapterOptions(adapter="loha", lora_dropout=0.1))


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_each_module_has_its_own_rank_and_alpha(method):
    model = build("llama")
    found = anatomy(model)
    ranks = allocate(found, LAYERS, "asymmetric", AllocationOptions(attention_rank=4, mlp_rank=8))
    entries = check_census(
        attach(model, found, ranks, AdapterOptions(adapter=method)), ranks, AdapterOptions(adapter=method)
    )
    assert {entry.name: (entry.rank, entry.alpha) for entry in entries} == {
        entry.name: (entry.rank, entry.alpha) for entry in ranks
    }


def test_the_census_sees_another_method_and_a_leak_to_another_layer():
    model = build("llama")
    found, ranks = planned(model, "loha")
    adapted = get_peft_model(model, lora_config(found, ranks))
    with pytest.raises(CensusError, match="the adapters on the model are lora, and the plan says loha"):
        check_census(adapted, ranks, AdapterOptions(adapter="loha"))
    leaf_names = LoHaConfig(r=4, alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(build("llama"), leaf_names)
    queries = [entry for entry in ranks if entry.name.endswith("q_proj")]
    with pytest.raises(CensusError, match=r"2 not in the plan \(e\.g\. model\.layers\.0\.self_attn\.q_proj\)"):
        check_census(adapted, queries, AdapterOptions(adapter="loha"))


# --- plan, trainer, folder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs():
    tokenizer = word_tokenizer()
    parts = split(tokenize(word_rows(24), tokenizer), seed=0, probe=2, validation=2)
    made = plan(
        build("llama"), parts.probe, probe_batches=2, strategy="last", num_layers=2, allocation="uniform", rank=4
    )
    return tokenizer, parts, made


def test_a_plan_says_its_adapter_and_keeps_it_in_the_file(inputs, tmp_path):
    _, _, made = inputs
    other = made.with_adapter("loha")
    assert other.selection == made.selection and other.trainable_params == 2 * made.trainable_params
    assert "adapter: loha; predictions are for LoRA of rank 4" in str(other) and "adapter" not in str(made)
    assert Plan.load(other.save(tmp_path / "plan.json")) == other
    record = json.loads((tmp_path / "plan.json").read_text())
    del record["options"]["adapter"]  # a plan from before there was a choice
    assert Plan.from_dict(record) == made
    with pytest.raises(ValueError, match=r"unknown adapter 'lohe'. Did you mean 'loha'\?"):
        made.with_adapter("lohe")
    (weights,) = [line for line in str(made.with_adapter("ia3")).splitlines() if "trainable weights" in line]
    assert "rank" not in weights


@pytest.mark.parametrize("method", OTHERS)
def test_our_trainer_takes_the_plan_and_stops_backward_at_its_lowest_layer(inputs, method, tmp_path):
    tokenizer, parts, made = inputs
    if method == "fourierft":  # the key and value matrices are too small for it
        ranks = tuple(entry for entry in made.ranks if "k_proj" not in entry.name and "v_proj" not in entry.name)
        made = replace(made, ranks=ranks)
    model, made = build("llama"), made.with_adapter(method)
    record = train_adapter(model, tokenizer, made, parts.train, tmp_path / "a", TrainOptions(steps=3))
    assert record["adapter"] == method and record["lowest_backward_layer"] == made.selection.lowest
    assert record["dead_adapters"] == []
    assert set(record["slow_adapters"]) == {entry.name for entry in made.ranks}
    assert all(f"PEFT runs it as {method}." in reason for reason in record["slow_adapters"].values())
    loaded = PeftModel.from_pretrained(build("llama"), str(tmp_path / "a"))
    check_census(loaded, made.ranks, AdapterOptions(adapter=method))
    batch = random_batches(1)[0]
    assert not torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert Plan.load(tmp_path / "a" / "plan.json").options.adapter == method


def test_a_model_that_carries_another_method_is_refused(inputs, tmp_path):
    tokenizer, parts, made = inputs
    model = build("llama")
    adapted = attach(model, made.anatomy, made.ranks, AdapterOptions(adapter="vera"))
    args = trl.SFTConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    with pytest.raises(CensusError, match="are vera, and the plan says loha"):
        SFTTrainer(adapted, args, plan=made.with_adapter("loha"), train_dataset=parts.train, processing_class=tokenizer)


def test_a_comparison_is_of_lora(inputs):
    tokenizer, parts, made = inputs
    with pytest.raises(PlanError, match="the plan's adapter is ia3, and a comparison is with uniform LoRA"):
        compare(
            build("llama"), tokenizer, made.with_adapter("ia3"), parts.train, parts.validation, CompareOptions(steps=1)
        )
