import functools
import json
import warnings

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._dynamo.utils import counters
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from aletheia_lora.adapter import attach, dead_adapters
from aletheia_lora.anatomy import anatomy
from aletheia_lora.data import collate, split, tokenize
from aletheia_lora.errors import ConfigError, DataError, NonFiniteLossError, OutputError, PlanError
from aletheia_lora.loss import labelled_loss
from aletheia_lora.planning import Plan, plan
from aletheia_lora.training.compiled import _compiler_fails, check_compiles
from aletheia_lora.training.engine import Engine
from aletheia_lora.training.rerank import ReRank
from aletheia_lora.training.run import TrainOptions, train_adapter
from aletheia_lora.training.trainer import SFTTrainer
from aletheia_lora.training.truncation import Truncation, backward_depth
from families import build

STEPS = 4


@pytest.fixture
def tokenizer():
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{index}" for index in range(4, 256))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def rows(tokenized_rows, tokenizer):
    return tokenize(tokenized_rows(16, min_length=8, max_length=16, num_prompt_tokens=4), tokenizer)


def made_plan(rows, model=None, **options):
    return plan(
        model if model is not None else build("llama"),
        rows,
        **{"probe_batches": 2, "rank": 4, "allocation": "uniform", **options},
    )


def settings(tmp_path, **changes):
    common = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    common |= {
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "output_dir": str(tmp_path),
        **changes,
    }
    return common


def train_ours(tmp_path, rows, tokenizer, made, model=None, compile_layers=False, callbacks=(), **changes):
    args = trl.SFTConfig(**settings(tmp_path, **{"gradient_checkpointing": False, "bf16": False, **changes}))
    model = build("llama") if model is None else model
    given = {"train_dataset": rows, "processing_class": tokenizer, "callbacks": list(callbacks)}
    trainer = SFTTrainer(model, plan=made, args=args, compile_layers=compile_layers, **given)
    trainer.train()
    return trainer


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_all_layers_at_one_rank_equal_plain_peft_and_plain_trl_loss_for_loss(tmp_path, rows, tokenizer):
    made = made_plan(rows, strategy="all")
    ours = train_ours(tmp_path, rows, tokenizer, made)

    def adapted():
        return attach(build("llama"), made.anatomy, made.ranks, seed=3)

    def collator(batch):
        return collate([rows_by_ids[tuple(row["input_ids"])] for row in batch], 0)

    rows_by_ids = {row.input_ids: row for row in rows}
    args = TrainingArguments(**settings(tmp_path), remove_unused_columns=False)
    plain = Trainer(model=adapted(), args=args, train_dataset=rows.to_dataset(), data_collator=collator)
    plain.train()
    args = trl.SFTConfig(**settings(tmp_path), gradient_checkpointing=False, bf16=False)
    theirs = trl.SFTTrainer(adapted(), args, train_dataset=rows.to_dataset(), processing_class=tokenizer)
    theirs.train()
    assert len(logged(ours)) == STEPS
    assert logged(ours) == pytest.approx(logged(plain), abs=2e-5)  # float32
    assert logged(ours) == pytest.approx(logged(theirs), abs=2e-5)
    for left, right in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)  # float32, after Adam's division
    assert ours.lowest_backward_layer == 0


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointing", "reentrant checkpointing"])
@pytest.mark.parametrize("lowest", [0, 2, 3])
def test_adapter_gradients_equal_those_of_the_untruncated_run(tokenized_rows, rows, lowest, reentrant):
    made = made_plan(rows, strategy="last", num_layers=4 - lowest)
    adapted = attach(build("llama", torch.float64), made.anatomy, made.ranks, seed=1).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    batch = collate(rows[:4], 0)
    labelled_loss(adapted, batch).backward()
    whole = gradients(adapted)
    adapted.zero_grad()
    base = adapted.get_base_model()
    base.enable_input_require_grads()
    if reentrant is not None:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    cut = Truncation(base, lowest, reentrant=bool(reentrant))
    with backward_depth(base) as reached:
        labelled_loss(adapted, batch).backward()
    cut.remove()
    assert min(reached) == lowest
    truncated = gradients(adapted)
    assert truncated.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(truncated[name], whole[name], rtol=1e-6, atol=1e-12)
    checkpointed = [getattr(layer, "gradient_checkpointing", False) for layer in base.model.layers]
    assert checkpointed == [reentrant is not None] * 4
    adapted.zero_grad()
    with backward_depth(base) as reached:
        labelled_loss(adapted, batch).backward()
    assert min(reached) == 0  # without the cut the input-gradient hook sends backward to the bottom


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}, {"bf16": True}]
)
def test_backward_stops_at_the_lowest_adapted_layer_under_every_setting(tmp_path, rows, tokenizer, changes):
    trainer = train_ours(tmp_path, rows, tokenizer, made_plan(rows, strategy="last", num_layers=2), **changes)
    assert trainer.lowest_backward_layer == 2
    assert trainer.dead_adapters == []
    losses = logged(trainer)
    assert losses[-1] < losses[0]
    embedding = trainer.model.get_base_model().get_input_embeddings()
    assert all("detach" not in hook.__name__ for hook in embedding._forward_hooks.values())


def test_what_defeats_the_cut_is_said_once(tmp_path, rows, tokenizer):
    model = build("llama")

    def wants_gradient(_module, args, kwargs):
        return (args[0].detach().requires_grad_(True), *args[1:]), kwargs

    model.model.layers[1].register_forward_pre_hook(wants_gradient, with_kwargs=True)
    made = made_plan(rows, model, strategy="last", num_layers=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = train_ours(tmp_path, rows, tokenizer, made, model)
    text = "backward ran down to layer 1, though the lowest adapted layer is 3"
    assert sum(text in str(warning.message) for warning in said) == 1
    assert trainer.lowest_backward_layer == 1


def test_what_zero_3_takes_from_the_cut_is_said_once_and_recorded(tmp_path, rows, tokenizer, monkeypatch):
    assert "truncation" not in Engine("ZeRO-3", 2).limits(reentrant=False)
    said_there = Engine("ZeRO-3", 2).limits(reentrant=True)["truncation"]
    limits = Engine.limits

    def as_zero_3(_engine, *, reentrant):
        found = limits(Engine("ZeRO-3", 2), reentrant=reentrant)
        return {"truncation": found["truncation"]} if reentrant else {}

    monkeypatch.setattr(Engine, "limits", as_zero_3)
    made = made_plan(rows, strategy="last", num_layers=2)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = train_ours(tmp_path, rows, tokenizer, made, **reentrant)
    assert sum(str(warning.message) == said_there for warning in said) == 1
    assert trainer.engine_limits == {"truncation": said_there}


def test_accumulation_changes_no_gradient(tmp_path, rows, tokenizer):
    made = made_plan(rows, strategy="last", num_layers=2)
    whole = train_ours(tmp_path, rows, tokenizer, made)
    parts = train_ours(tmp_path, rows, tokenizer, made, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert logged(whole) == pytest.approx(logged(parts), abs=2e-5)


def test_raw_rows_are_tokenized_with_the_loss_on_the_completion(tmp_path, tokenizer):
    raw = [{"prompt": f"w{10 + i} w20", "completion": f" w{30 + i} w31 w32"} for i in range(8)]
    made = made_plan(tokenize(raw, tokenizer))
    args = trl.SFTConfig(**settings(tmp_path, max_steps=1), gradient_checkpointing=False, bf16=False)
    trainer = SFTTrainer(build("llama"), args, plan=made, train_dataset=raw, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"][:, :2] == -100).all() and (batch["labels"][:, 2:] != -100).any()


def test_a_nan_loss_stops_before_the_update(tmp_path, rows, tokenizer):
    made = made_plan(rows, strategy="last", num_layers=2)
    args = trl.SFTConfig(**settings(tmp_path), gradient_checkpointing=False, bf16=False)
    trainer = SFTTrainer(build("llama"), args, plan=made, train_dataset=rows, processing_class=tokenizer)
    before = {}

    class Poison(trl.trainer.sft_trainer.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                before.update(
                    {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
                )
                trainer.model.get_base_model().lm_head.weight.data[5] = float("nan")

    trainer.add_callback(Poison())
    with pytest.raises(NonFiniteLossError, match="loss of step 3 is nan; training stopped before the update"):
        trainer.train()
    assert before
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert not trainer._shortcuts.installed


@pytest.mark.parametrize(("scale", "overflows_in"), [(8.0, {1}), (1.0, {1, 2, 3})])
def test_a_loss_scaler_skips_an_overflow_until_its_scale_is_not_the_reason(
    tmp_path, rows, tokenizer, scale, overflows_in
):
    made = made_plan(rows, strategy="last", num_layers=2)
    args = trl.SFTConfig(**settings(tmp_path, max_grad_norm=0.0), gradient_checkpointing=False, bf16=False)
    trainer = SFTTrainer(build("llama"), args, plan=made, train_dataset=rows, processing_class=tokenizer)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)  # as fp16 sets it up on a GPU
    weight = next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)
    found = []

    class Look(trl.trainer.sft_trainer.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            found.append(weight.detach().clone())

    weight.register_hook(lambda g: torch.full_like(g, torch.inf) if trainer.state.global_step in overflows_in else g)
    trainer.add_callback(Look())
    if len(overflows_in) == 1:
        trainer.train()
        assert len(logged(trainer)) == STEPS and trainer.accelerator.scaler.get_scale() == scale / 2
        assert torch.equal(found[1], found[2]) and not torch.equal(found[2], found[3])
    else:
        with pytest.raises(NonFiniteLossError, match=r"the gradient of .* in step 3 is not finite"):
            trainer.train()


def test_a_plan_for_another_model_is_refused(tmp_path, rows, tokenizer):
    made = made_plan(rows)
    with pytest.raises(PlanError, match="this plan was made for LlamaForCausalLM"):
        SFTTrainer(build("phi3"), plan=made, train_dataset=rows, processing_class=tokenizer)


def test_a_trainer_that_cannot_be_made_gives_rewritten_weights_back(tmp_path, rows, tokenizer):
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = made_plan(rows, init_lora_weights="olora")
    args = trl.SFTConfig(**settings(tmp_path), gradient_checkpointing=False, bf16=False)
    with pytest.raises(TypeError, match="no_such_argument"):
        SFTTrainer(model, args, plan=made, train_dataset=rows, processing_class=tokenizer, no_such_argument=1)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_dead_adapters_are_named():
    model = build("llama")
    found = anatomy(model)
    made = made_plan(split_rows := tokenize([{"input_ids": [4, 5, 6, 7]}] * 2, None), model)
    assert len(split_rows) == 2
    adapted = attach(model, found, made.ranks)
    assert len(dead_adapters(adapted)) == len(made.ranks)
    labelled_loss(adapted, collate(split_rows, 0)).backward()
    assert dead_adapters(adapted) == []


def test_training_writes_a_whole_adapter_folder_that_stock_peft_loads(tmp_path, rows, tokenizer):
    model = build("llama")
    parts = split(rows, seed=0, probe=2, validation=2)
    made = plan(model, parts.probe, rank=4, time_budget=0.7)
    record = train_adapter(model, tokenizer, made, parts.train, tmp_path / "adapter", TrainOptions(steps=3))
    assert anatomy(model) == made.anatomy  # given back without adapters
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "plan.json", "record.json", "README.md"} <= files
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert json.loads((tmp_path / "adapter" / "record.json").read_text())["losses"] == record["losses"]
    assert record["lowest_backward_layer"] == made.selection.lowest
    assert Plan.load(tmp_path / "adapter" / "plan.json").ranks == made.ranks
    loaded = PeftModel.from_pretrained(build("llama"), str(tmp_path / "adapter"))
    assert {p.shape for n, p in loaded.named_parameters() if "lora_A" in n} == {
        (made.ranks[0].rank, 32),
        (made.ranks[0].rank, 64),
    }


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing_that_looks_whole(tmp_path, rows, tokenizer, interruption, monkeypatch):
    model = build("llama")
    made = made_plan(rows, strategy="last", num_layers=1)

    def stop(*args, **kwargs):
        raise interruption

    monkeypatch.setattr("aletheia_lora.training.run.write_bytes", stop)  # the last file of the folder
    with pytest.raises(interruption):
        train_adapter(model, tokenizer, made, rows, tmp_path / "adapter", TrainOptions(steps=1))
    assert list(tmp_path.iterdir()) == []
    assert anatomy(model) == made.anatomy


def test_an_output_that_cannot_be_is_found_before_training(tmp_path, rows, tokenizer, monkeypatch):
    monkeypatch.setattr("aletheia_lora.training.run.SFTTrainer", None)  # would raise if training were set up
    made, options = made_plan(rows), TrainOptions(steps=1)
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below", tmp_path):
        with pytest.raises(OutputError):
            train_adapter(build("llama"), tokenizer, made, rows, output, options)


def test_fewer_rows_than_a_batch_is_an_error(tmp_path, rows, tokenizer):
    with pytest.raises(DataError, match="2 rows are fewer than a batch of 4"):
        train_adapter(build("llama"), tokenizer, made_plan(rows), rows[:2], tmp_path / "a", TrainOptions())


@pytest.mark.parametrize(
    "kwargs", [{"steps": 0}, {"batch_size": 0}, {"learning_rate": float("nan")}, {"learning_rate": -1.0}]
)
def test_options_that_cannot_be_are_refused(kwargs):
    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        TrainOptions(**kwargs)


def test_a_dataset_with_labels_is_taken_as_it_is(tmp_path, rows, tokenizer):
    made = made_plan(rows)
    args = trl.SFTConfig(**settings(tmp_path, max_steps=1), gradient_checkpointing=False, bf16=False)
    data = Dataset.from_dict({"input_ids": [list(r.input_ids) for r in rows], "labels": [list(r.labels) for r in rows]})
    trainer = SFTTrainer(build("llama"), args, plan=made, train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(rows)


# --- compiled layers --------------------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """Counts of what was compiled since the test began."""
    torch.compiler.reset()
    counters.clear()
    yield counters
    torch.compiler.reset()


of_torch = pytest.mark.filterwarnings("ignore")
"""torch warns of what it does itself when it compiles an autograd function."""


@pytest.fixture
def no_code_generator(monkeypatch):
    """Graphs are found as always, then run as they are."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@of_torch
@pytest.mark.parametrize("changes", [{}, {"bf16": True}])
@pytest.mark.usefixtures("no_code_generator")
def test_compiled_layers_train_as_they_are(tmp_path, rows, tokenizer, graphs, changes):
    made = made_plan(rows, strategy="last", num_layers=2)
    plain = train_ours(tmp_path, rows, tokenizer, made, **changes)
    assert not graphs["stats"]["unique_graphs"]
    trainer = train_ours(tmp_path, rows, tokenizer, made, compile_layers=True, **changes)
    assert graphs["stats"]["unique_graphs"] > 0
    assert logged(trainer) == pytest.approx(logged(plain), abs=2e-2 if "bf16" in changes else 2e-5)
    assert (trainer.lowest_backward_layer, trainer.dead_adapters) == (2, [])
    assert trainer.padding_record == plain.padding_record
    assert all("forward" not in vars(layer) for layer in trainer.model.get_base_model().model.layers)


@of_torch
@pytest.mark.usefixtures("no_code_generator")
def test_layers_alike_share_what_is_compiled(tmp_path, tokenized_rows, tokenizer, graphs, tiny_llama):
    rows = tokenize(tokenized_rows(8, min_length=8, max_length=8, num_prompt_tokens=4), tokenizer)
    counts = []
    for num_layers in (4, 8):
        torch.compiler.reset()
        graphs.clear()
        model = tiny_llama(num_layers=num_layers)
        made = made_plan(rows, model, strategy="last", num_layers=num_layers // 2)
        train_ours(tmp_path, rows, tokenizer, made, model, compile_layers=True, max_steps=2)
        counts.append(graphs["stats"]["unique_graphs"])
    assert 0 < counts[1] < counts[0] + 4  # attention splits each in two, so four layers more would be eight more


@of_torch
@pytest.mark.usefixtures("no_code_generator")
def test_a_probe_between_steps_runs_on_layers_as_they_are(tmp_path, tokenized_rows, tokenizer):
    rows = tokenize(tokenized_rows(16, min_length=8, max_length=8, num_prompt_tokens=4), tokenizer)
    made = made_plan(rows, strategy="last", num_layers=2)
    events = []
    for compile_layers in (False, True):
        rerank = ReRank(made, rows, every=2, change=False, tokenizer=tokenizer, say=lambda _line: None)
        train_ours(tmp_path, rows, tokenizer, made, compile_layers=compile_layers, callbacks=[rerank])
        events.append([score for event in rerank.record()["events"] for score in event["scores"]])
    assert events[0] == pytest.approx(events[1], rel=1e-3)


@of_torch
@pytest.mark.slow
def test_the_code_generator_of_torch_changes_nothing_either(tmp_path, rows, tokenizer, graphs):
    try:
        check_compiles(build("llama"))
    except ConfigError as error:
        pytest.skip(str(error))
    made = made_plan(rows, strategy="last", num_layers=2)
    plain = train_ours(tmp_path, rows, tokenizer, made)
    trainer = train_ours(tmp_path, rows, tokenizer, made, compile_layers=True)
    assert graphs["inductor"]
    assert logged(trainer) == pytest.approx(logged(plain), abs=2e-5)


def test_where_nothing_compiles_it_is_said_before_training(tmp_path, rows, tokenizer, monkeypatch):
    def no_compiler(_function):
        raise RuntimeError("no C++ compiler on the PATH")

    monkeypatch.setattr(torch, "compile", no_compiler)
    _compiler_fails.cache_clear()
    model = build("llama")
    before, own = {name: p.requires_grad for name, p in model.named_parameters()}, set(vars(model))
    reason = r"does not work on cpu: no C\+\+ compiler on the PATH Install what it names"
    with pytest.raises(ConfigError, match=reason):
        train_ours(tmp_path, rows, tokenizer, made_plan(rows), model, compile_layers=True)
    options = TrainOptions(compile_layers=True, checkpoint_every=2)
    with pytest.raises(ConfigError, match=reason):
        train_adapter(model, tokenizer, made_plan(rows), rows, tmp_path / "adapter", options)
    _compiler_fails.cache_clear()
    assert not list(tmp_path.glob("adapter*"))  # no checkpoints of a run that never was, so it can start without
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before and set(vars(model)) == own


def test_what_does_not_go_with_compiled_layers_is_refused(tmp_path, rows, tokenizer):
    for other in ("prefix_cache", "gradient_checkpointing"):
        with pytest.raises(ConfigError, match="Leave out one of"):
            TrainOptions(compile_layers=True, **{other: True})
    made = made_plan(rows)
    with pytest.raises(ConfigError, match="checkpointing runs the layers as they are"):
        train_ours(tmp_path, rows, tokenizer, made, compile_layers=True, gradient_checkpointing=True)
    model = build("llama")
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": 0}
    with pytest.raises(ConfigError, match="one process and one device"):
        check_compiles(model)
