import copy

import pytest
import torch
import trl
from peft import PeftModel, get_peft_model

from aletheia_lora.adapter import attach, check_census, lora_config, shared_copy
from aletheia_lora.adapter_options import AdapterOptions
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy
from aletheia_lora.config import aletheia_lora_config, apply_aletheia_lora
from aletheia_lora.data import tokenize
from aletheia_lora.errors import CensusError, ConfigError, PlanError
from aletheia_lora.fast_lora import FastLora
from aletheia_lora.plan_options import PlanOptions
from aletheia_lora.planning import Plan, plan
from aletheia_lora.run_config import configuration
from aletheia_lora.runs import _given_plan, _plan_options
from aletheia_lora.training.run import TrainOptions, train_adapter
from aletheia_lora.training.trainer import SFTTrainer
from families import build, random_batches
from tiny_inputs import word_rows, word_tokenizer

LAYERS = (1, 3)
FAST = None
# What PEFT 0.21 offers and a plan passes on -> why our fast adapters leave it to PEFT.
VARIANTS = {
    "usual": ({}, FAST),
    "dropout": ({"lora_dropout": 0.1}, "its adapter has dropout"),
    "dora": ({"use_dora": True}, "it uses DoraLinearVariant"),
    "rslora": ({"use_rslora": True}, FAST),
    "bias": ({"lora_bias": True}, "its adapter has a bias"),
    "gaussian": ({"init_lora_weights": "gaussian"}, FAST),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, FAST),
    "pissa": ({"init_lora_weights": "pissa"}, FAST),
    "olora": ({"init_lora_weights": "olora"}, FAST),
    "head": ({"modules_to_save": ("lm_head",)}, FAST),
    "several": (
        {"use_dora": True, "use_rslora": True, "modules_to_save": ("model.norm",)},
        "it uses DoraLinearVariant",
    ),
    "pissa_dora": ({"use_dora": True, "init_lora_weights": "pissa"}, "it uses DoraLinearVariant"),
}
# Of a bias PEFT says when it is made that it cannot be merged, and when it is saved that it looks like a shard.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter .default.. .* LoRA tensor.s. have invalid shape"),
]
every_variant = pytest.mark.parametrize("name", list(VARIANTS))


def planned(model, layers=LAYERS, **options):
    found = anatomy(model)
    return found, allocate(found, layers, "asymmetric", AllocationOptions(attention_rank=4, mlp_rank=8, **options))


def gradients(model, batch):
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@every_variant
def test_a_variant_is_what_stock_peft_makes_of_the_same_configuration(name):
    options, reason = VARIANTS[name]
    options, batch = AdapterOptions(**options), random_batches(1)[0]
    found, ranks = planned(build("llama"))
    ours = attach(build("llama"), found, ranks, options, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        stock = get_peft_model(build("llama"), lora_config(found, ranks, options))
    for (key, one), (other_key, other) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert key == other_key and torch.equal(one, other) and one.requires_grad == other.requires_grad
    expected_loss, expected = gradients(stock.train(), batch)
    fast = FastLora(ours.train())
    assert set(fast.skipped.values()) == (set() if reason is FAST else {reason})
    loss, found_gradients = gradients(ours, batch)
    fast.remove()
    torch.testing.assert_close(loss, expected_loss)
    assert found_gradients.keys() == expected.keys()
    for key, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)  # float32


@every_variant
def test_a_variant_trains_by_plan_and_loads_in_stock_peft_with_the_same_logits(name, tmp_path):
    rows, model = tokenize(word_rows(12), word_tokenizer()), build("llama")
    made = plan(
        model, rows, tokenizer=word_tokenizer(), rank=4, probe_batches=2, strategy="last", num_layers=2,
        **VARIANTS[name][0],
    )  # fmt: skip
    assert Plan.from_dict(made.to_dict()).options == made.options
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, bf16=False,
        gradient_checkpointing=False, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = SFTTrainer(model, args, plan=made, train_dataset=rows, processing_class=word_tokenizer())
    trained = sum(p.numel() for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in n)
    assert trained == made.trainable_params
    trainer.train()
    assert trainer.dead_adapters == [] and trainer.lowest_backward_layer == 2
    adapted, batch = trainer.model.eval(), random_batches(1)[0]
    with torch.no_grad():
        logits = adapted(input_ids=batch["input_ids"]).logits
        adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(build("llama"), str(tmp_path / "adapter")).eval()
        again = loaded(input_ids=batch["input_ids"]).logits
        base = build("llama").eval()(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)  # float32
    assert not torch.allclose(base, logits, rtol=1e-3, atol=1e-3)


def test_a_copy_for_training_keeps_the_callers_weights_where_the_start_rewrites_them(tmp_path):
    rows, model = tokenize(word_rows(12), word_tokenizer()), build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = plan(
        model, rows, tokenizer=word_tokenizer(), rank=4, probe_batches=2, strategy="last", num_layers=1,
        init_lora_weights="pissa",
    )  # fmt: skip
    assert made.rewritten_modules == tuple(entry.name for entry in made.ranks)
    assert "init_lora_weights=pissa; predictions are those of plain LoRA" in str(made)
    train_adapter(model, word_tokenizer(), made, rows, tmp_path / "out", TrainOptions(steps=1, batch_size=4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    twin = shared_copy(model, own=made.rewritten_modules)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert len(shared) == len(list(model.parameters())) - len(made.ranks)


def test_attaching_that_fails_gives_rewritten_weights_and_whole_modules_back(monkeypatch):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    found, ranks = planned(model)
    options = AdapterOptions(init_lora_weights="olora", modules_to_save=("lm_head",))

    def refuse(*_args):
        weight = model.model.layers[1].mlp.up_proj.base_layer.weight
        assert not torch.equal(weight, before["model.layers.1.mlp.up_proj.weight"])
        raise CensusError("no")

    monkeypatch.setattr("aletheia_lora.adapter.check_census", refuse)
    with pytest.raises(CensusError):
        attach(model, found, ranks, options)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


REFUSED = [
    ({"init_lora_weights": "eva"}, "'eva' is not for a plan: it reads data and moves ranks"),
    ({"init_lora_weights": "corda"}, "it reads data"),
    ({"init_lora_weights": "lora_ga"}, "it reads gradients"),
    ({"init_lora_weights": "loftq"}, "replaces the frozen weights by quantized ones"),
    ({"init_lora_weights": "mica"}, "freezes lora_B"),
    ({"init_lora_weights": "pissa_niter_4"}, "draws at random"),
    ({"init_lora_weights": "gausian"}, r"unknown init_lora_weights 'gausian'\. Did you mean 'gaussian'"),
    ({"lora_bias": True, "use_dora": True}, "lora_bias does not work with use_dora"),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias does not work with init_lora_weights='gaussian'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_a_plan_cannot_pass_on_is_refused_by_name(options, message):
    for refuse in (AdapterOptions, PlanOptions, lambda **given: aletheia_lora_config([1], **given)):
        with pytest.raises(PlanError, match=message):
            refuse(**options)
    with pytest.raises(PlanError, match=message):
        _given_plan(configuration(options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, r"lora_dropout=0\.1 does not work on stacked experts"),
        ({"use_dora": True}, "use_dora does not work on stacked experts"),
        ({"lora_bias": True}, "lora_bias does not work on stacked experts"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' does not work on stacked experts"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal' does not work on stacked experts"),
    ],
)
def test_stacked_experts_refuse_by_name_what_peft_does_not_have_for_them(options, message):
    model = build("mixtral")
    found, ranks = planned(model)
    with pytest.raises(PlanError, match=message):
        lora_config(found, ranks, AdapterOptions(**options))
    with pytest.raises(PlanError, match=message):
        apply_aletheia_lora(model, [1], **options)
    attention = [entry for entry in ranks if entry.kind == "attention"]
    attach(model, found, attention, AdapterOptions(**options))


def test_experts_take_a_gaussian_start_and_rslora():
    found, ranks = planned(build("mixtral"))
    options = AdapterOptions(use_rslora=True, init_lora_weights="gaussian")
    adapted = attach(build("mixtral"), found, ranks, options)
    skipped = FastLora(adapted).skipped
    assert set(skipped.values()) == {"stacked experts"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_haed", r"no module 'lm_haed'\. Did you mean 'lm_head'"),
        ("embed_tokens", "is or holds the input embedding"),
        ("model", "is or holds the input embedding|is inside a layer"),
        ("up_proj", "is inside a layer"),
    ],
)
def test_modules_to_save_are_above_the_layers(name, message):
    model = build("llama")
    found, ranks = planned(model)
    with pytest.raises(PlanError, match=message):
        attach(model, found, ranks, AdapterOptions(modules_to_save=(name,)))
    assert anatomy(model) == found


def test_the_census_sees_another_variant():
    found, ranks = planned(build("llama"))
    adapted = attach(build("llama"), found, ranks, AdapterOptions(use_rslora=True))
    with pytest.raises(CensusError, match="use_rslora=True, planned False"):
        check_census(adapted, ranks)
    whole = attach(build("llama"), found, ranks, AdapterOptions(modules_to_save=("lm_head",)))
    with pytest.raises(CensusError, match=r"modules to save on the model: \['lm_head'\], planned \[\]"):
        check_census(whole, ranks)


def test_the_documented_builders_and_the_command_pass_the_options_on():
    given = {"use_dora": True, "use_rslora": True, "init_lora_weights": "gaussian", "modules_to_save": ["lm_head"]}
    for config in (aletheia_lora_config([1], **given), apply_aletheia_lora(build("llama"), [1], **given)):
        assert {key: getattr(config, key) for key in given} == given
    usual = aletheia_lora_config([1])
    assert usual.init_lora_weights is True and usual.modules_to_save is None and not usual.use_dora
    options = _plan_options(configuration(given)).adapter_options
    assert options == AdapterOptions(**{**given, "modules_to_save": ("lm_head",)})
    assert options.in_words() == "use_dora, use_rslora, init_lora_weights=gaussian, modules_to_save=lm_head"
    with pytest.raises(ConfigError, match="unknown key 'use_dorra'"):
        configuration({"use_dorra": True})
