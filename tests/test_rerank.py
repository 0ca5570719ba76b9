import json
import math
from dataclasses import replace

import pytest
import torch
import trl
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from aletheia_lora.adapter import add_adapters, attach, check_census, own_modules
from aletheia_lora.adapter_options import AdapterOptions
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy
from aletheia_lora.comparison.arms import with_layers
from aletheia_lora.data import TokenizedRow, collate, split, tokenize
from aletheia_lora.errors import ConfigError, DataError, PlanError
from aletheia_lora.fast_lora import FastLora
from aletheia_lora.loss import labelled_loss
from aletheia_lora.planning import Plan, plan
from aletheia_lora.probe import probe
from aletheia_lora.training.prefix_cache import PrefixCacheOptions
from aletheia_lora.training.rerank import ReRank
from aletheia_lora.training.run import TrainOptions, train_adapter
from aletheia_lora.training.trainer import SFTTrainer
from families import CONFIGS, GROUPED_MATMUL, build, random_batches
from tiny_inputs import word_rows, word_tokenizer

STEPS = 6


def moved_adapters(model, method="lora"):
    """The model with adapters on layers 1 and 3 that are not at their start."""
    found = anatomy(model)
    ranks = allocate(found, (1, 3), "asymmetric", AllocationOptions(attention_rank=2, mlp_rank=4))
    adapted = attach(model, found, ranks, AdapterOptions(adapter=method))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return found, ranks, adapted


@pytest.mark.parametrize("mode", ["exact", "gram"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_probe_under_adapters_measures_the_frozen_weights_in_the_function_of_both(family, mode):
    dtype = torch.float32 if family in GROUPED_MATMUL else torch.float64
    found, _, adapted = moved_adapters(build(family, dtype))
    base, batches = adapted.get_base_model().eval(), random_batches(2)
    measured = probe(base, batches, mode=mode, anatomy_=found, names=own_modules(base))
    bare = probe(build(family, dtype), batches, mode=mode)
    assert [(t.name, t.kind, t.num_params) for t in measured.tensors] == [
        (t.name, t.kind, t.num_params) for t in bare.tensors
    ]
    names = {t.name: t for t in measured.tensors}
    wanted = {}
    for path, module in base.named_modules():
        name = own_modules(base).get(path)
        for leaf, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(name is not None and parameter.is_floating_point())
            wanted[name if leaf == "weight" and name in names else f"{name}.{leaf}"] = parameter
    for index, batch in enumerate(batches):
        base.zero_grad()
        labelled_loss(base, batch).backward()
        for name, tensor in names.items():
            gradient = wanted[name].grad
            expected = 0.0 if gradient is None else float(gradient.norm())
            assert tensor.grad_norm[index] == pytest.approx(expected, rel=2e-3, abs=1e-6), name  # float32 Gram norms


def test_the_probe_under_adapters_leaves_everything_as_found():
    found, _, adapted = moved_adapters(build("gpt2"))  # has dropout
    adapted.train()
    adapted.get_base_model().transformer.h[0].eval()
    labelled_loss(adapted, random_batches(1)[0]).backward()
    base = adapted.get_base_model()

    def state():
        return (
            [(name, p.requires_grad, p.detach().clone(), p.grad) for name, p in adapted.named_parameters()],
            [(module.training, len(module._forward_hooks), list(vars(module))) for module in adapted.modules()],
            torch.get_rng_state(),
        )

    weights, modules, random_state = state()
    probe(base, random_batches(1, seed=5), anatomy_=found, names=own_modules(base))
    for (name, flag, value, grad), (_, flag_now, now, grad_now) in zip(weights, state()[0], strict=True):
        assert flag == flag_now and torch.equal(value, now) and grad is grad_now, name
    assert state()[1] == modules and torch.equal(state()[2], random_state)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs():
    tokenizer = word_tokenizer()
    return tokenizer, split(tokenize(word_rows(40), tokenizer), seed=0, probe=3, validation=2)


def made_plan(parts, **options):
    defaults = {"strategy": "top_percent", "num_layers": 2, "probe_batches": 3, "allocation": "uniform", "rank": 4}
    return plan(build("llama"), parts.probe, **{**defaults, **options})


def elsewhere(made):
    """The plan with the layers that it leaves out."""
    return with_layers(made, "bottom", sorted(set(made.scores) - set(made.selection.layers)), "uniform")


@pytest.fixture
def choose(monkeypatch):
    """Every choice from now on is this plan, whatever the probe measures."""
    return lambda made: monkeypatch.setattr(
        "aletheia_lora.training.rerank.plan_from_probe", lambda *args, **kwargs: made
    )


def settings(tmp_path, **changes):
    return {
        "output_dir": str(tmp_path),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **changes,
    }


class Watch(TrainerCallback):
    """Copies of the adapters' weights and of the optimizer's state at the end of each step."""

    def __init__(self):
        self.weights, self.steps_of, self.rates, self.trains = [], [], [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {id(p): n for n, p in model.named_parameters()}
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
        self.trains.append({n for n, p in model.named_parameters() if p.requires_grad})
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(grouped) == len({id(p) for p in grouped})
        assert set(optimizer.state) <= set(grouped)
        self.steps_of.append(
            {names[id(p)]: int(optimizer.state[p]["step"]) if optimizer.state.get(p) else 0 for p in grouped}
        )
        self.rates.append(optimizer.param_groups[0]["lr"])


def train(tmp_path, inputs, made, callbacks=(), model=None, **changes):
    tokenizer, parts = inputs
    args = trl.SFTConfig(**settings(tmp_path, gradient_checkpointing=False, bf16=False, **changes))
    watch = Watch()
    model = build("llama") if model is None else model
    trainer = SFTTrainer(
        model,
        args,
        plan=made,
        train_dataset=parts.train,
        processing_class=tokenizer,
        callbacks=[*callbacks, watch],
    )
    trainer.train()
    return trainer, watch


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("change", [False, True])
def test_a_run_whose_choice_does_not_move_is_the_run_without_the_callback_bit_by_bit(tmp_path, inputs, change):
    model = build("gpt2")  # dropout: a moved random state would show
    made = plan(model, inputs[1].probe, strategy="last", num_layers=2, probe_batches=3, rank=4)
    without, watch_without = train(tmp_path, inputs, made, model=build("gpt2"))
    state = torch.get_rng_state()
    rerank = ReRank(made, inputs[1].probe, every=2, change=change, say=lambda line: None)
    with_, watch_with = train(tmp_path, inputs, made, [rerank], model=build("gpt2"))
    assert torch.equal(torch.get_rng_state(), state)
    assert losses(with_) == losses(without)
    for left, right in zip(watch_with.weights, watch_without.weights, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in right) and left.keys() == right.keys()
    assert [event["step"] for event in rerank.events] == [2, 4, 6]
    assert not any(event["changed"] or event["entered"] or event["left"] for event in rerank.events)
    assert with_.plan == made and with_.slow_adapters == without.slow_adapters


def test_the_first_probe_finds_the_plan_and_later_ones_a_ranking_that_moves(tmp_path, inputs):
    made, said = made_plan(inputs[1]), []
    rerank = ReRank(made, inputs[1].probe, every=1, say=said.append)
    trainer, _ = train(tmp_path, inputs, made, [rerank], max_steps=3, learning_rate=1e-7)
    assert rerank.events[0]["scores"] == pytest.approx([made.scores[layer] for layer in sorted(made.scores)], rel=1e-3)
    assert rerank.events[0]["spearman"] == rerank.events[0]["kendall"] == 1
    assert len(said) == 3 and said[0].startswith("step 1: ranking against the first: Spearman 1.00, Kendall 1.00; the")
    assert [entry["rerank_kendall"] for entry in trainer.state.log_history if "rerank_kendall" in entry] == [1, 1, 1]
    rerank.first_scores = {layer: -score for layer, score in made.scores.items()}
    assert rerank._agreement(made.scores)["spearman"] == -1
    rerank.first_scores = dict.fromkeys(made.scores, 1.0)
    assert math.isnan(rerank._agreement(made.scores)["kendall"])


def test_a_memory_budget_is_that_of_the_bare_model(tmp_path, inputs):
    made = made_plan(inputs[1], strategy="budget", num_layers=None, time_budget=1.0, memory_budget="700KiB")
    assert 0 < len(made.selection.layers) < 4
    rerank = ReRank(made, inputs[1].probe, every=1, change=True, say=lambda line: None)
    trainer, _ = train(tmp_path, inputs, made, [rerank], max_steps=2, learning_rate=1e-7)
    assert [event["layers"] for event in rerank.events] == [list(made.selection.layers)] * 2
    check_census(trainer.model, made.ranks)


def test_layers_that_leave_are_frozen_and_layers_that_enter_start_fresh(tmp_path, inputs, choose):
    best = made_plan(inputs[1])
    made = elsewhere(best)
    choose(best)
    rerank = ReRank(made, inputs[1].probe, every=2, change=True, say=lambda line: None)
    trainer, watch = train(tmp_path, inputs, made, [rerank])
    (change,) = [event for event in rerank.events if event["changed"]]
    assert change["step"] == 2 and change["entered"] == list(best.selection.layers)
    assert change["left"] == list(made.selection.layers)
    old, new = set(watch.weights[0]), set(watch.weights[-1]) - set(watch.weights[0])
    assert watch.trains[0] == old and watch.trains[2] == new == watch.trains[-1]
    for name in old:  # frozen at their value, which is not their start
        assert torch.equal(watch.weights[1][name], watch.weights[-1][name])
    assert all(steps == 3 for name, steps in watch.steps_of[2].items() if name in old) and set(watch.steps_of[2]) == new
    assert set(watch.steps_of[2].values()) == {1} and set(watch.steps_of[-1].values()) == {STEPS - 2}
    assert all(torch.equal(watch.weights[1][n], torch.zeros_like(watch.weights[1][n])) for n in new if "lora_B" in n)
    assert any(watch.weights[-1][name].any() for name in new if "lora_B" in name)
    assert watch.rates == pytest.approx([1e-2 * (1 - step / STEPS) for step in range(1, STEPS + 1)])  # goes on
    assert trainer.lowest_layer == trainer.lowest_backward_layer == min(best.selection.layers)
    assert trainer.dead_adapters == [] and trainer.slow_adapters == {}
    assert trainer.plan.selection.layers == (0, 1, 2, 3) and trainer.plan.history == rerank.plan.history
    assert rerank.record()["frozen"] == list(made.selection.layers)


def test_a_layer_that_stays_keeps_its_state_and_one_that_comes_back_its_adapter(tmp_path, inputs, choose):
    best = made_plan(inputs[1])
    order = sorted(best.scores, key=best.scores.__getitem__, reverse=True)
    made = with_layers(best, "half", sorted([order[0], order[3]]), "uniform")
    choose(best)
    rerank = ReRank(made, inputs[1].probe, every=2, change=True, say=lambda line: None)

    class Back(TrainerCallback):
        """Wants the layer back that left."""

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 3:
                with rerank._paused():
                    rerank._change(model, optimizer, made, 3, 0)
                    rerank._moved()
                rerank.every = 100

    _, watch = train(tmp_path, inputs, made, [rerank, Back()])
    stays, leaves = f"layers.{order[0]}.", f"layers.{order[3]}."
    assert [{n for n in watch.steps_of[step] if stays in n} != set() for step in range(STEPS)] == [True] * STEPS
    assert {steps for n, steps in watch.steps_of[-1].items() if stays in n} == {STEPS}
    assert {steps for n, steps in watch.steps_of[-1].items() if leaves in n} == {STEPS - 3}
    left_at = {n: value for n, value in watch.weights[1].items() if leaves in n}
    assert all(torch.equal(watch.weights[2][n], value) for n, value in left_at.items())
    assert any(not torch.equal(watch.weights[3][n], value) for n, value in left_at.items())
    assert [change.left for change in rerank.plan.history] == [(order[3],), (order[1],)]


def test_the_saved_adapter_holds_every_layer_and_its_files_say_so(tmp_path, inputs, choose):
    tokenizer, parts = inputs
    best, model, said = made_plan(parts), build("llama"), []
    made = elsewhere(best)
    choose(best)
    options = TrainOptions(steps=5, rerank_every=2, rerank_change=True)
    folder = tmp_path / "adapter"
    record = train_adapter(
        model, tokenizer, made, parts.train, folder, options, probe_rows=parts.probe, say=said.append
    )
    saved = Plan.load(folder / "plan.json")
    assert saved.selection.layers == (0, 1, 2, 3) == tuple(record["layers"])
    assert [(change.step, change.left) for change in saved.history] == [(2, made.selection.layers)]
    assert json.loads((folder / "record.json").read_text())["rerank"]["events"] == record["rerank"]["events"]
    assert sum("ranking against the first" in line for line in said) == 2
    loaded = PeftModel.from_pretrained(build("llama"), str(folder))
    check_census(loaded, saved.ranks)
    assert anatomy(model) == made.anatomy
    weights = {name: p for name, p in loaded.named_parameters() if "lora_B" in name}
    assert {name.split(".layers.")[1][0] for name, p in weights.items() if p.any()} == {"0", "1", "2", "3"}


def test_the_adapter_saved_after_a_change_gives_the_same_logits_in_stock_peft(tmp_path, inputs, choose):
    best = made_plan(inputs[1])
    made = elsewhere(best)
    choose(best)
    rerank = ReRank(made, inputs[1].probe, every=2, change=True, say=lambda line: None)
    trainer, _ = train(tmp_path, inputs, made, [rerank])
    trainer.model.save_pretrained(str(tmp_path / "saved"), save_embedding_layers=False)
    ids = random_batches(1)[0]["input_ids"]
    loaded = PeftModel.from_pretrained(build("llama"), str(tmp_path / "saved")).eval()
    assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_the_trainer_of_transformers_takes_it(tmp_path, inputs, choose):
    tokenizer, parts = inputs
    best = made_plan(parts)
    made = elsewhere(best)
    choose(best)
    rerank = ReRank(made, parts.probe, every=2, change=True, tokenizer=tokenizer, say=lambda line: None)
    adapted = attach(build("llama"), made.anatomy, made.ranks)

    def collator(rows):
        return collate([TokenizedRow(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows], 0)

    watch = Watch()
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(**settings(tmp_path), remove_unused_columns=False),
        train_dataset=parts.train.to_dataset(),
        data_collator=collator,
        callbacks=[rerank, watch],
    )
    trainer.train()
    assert [event["changed"] for event in rerank.events] == [True, False, False]
    assert set(watch.steps_of[-1].values()) == {STEPS - 2} and len(rerank.plan.ranks) == 2 * len(made.ranks)


@pytest.mark.parametrize("method", ["ia3", "loha", "lokr", "oft"])
def test_layers_can_be_added_to_other_methods(method, tmp_path):
    found, ranks, adapted = moved_adapters(build("llama"), method)
    further = allocate(found, (0,), "uniform", AllocationOptions(rank=2))
    ids = random_batches(1)[0]["input_ids"]
    before, state = adapted.eval()(input_ids=ids).logits, torch.get_rng_state()
    weights = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    add_adapters(adapted, found, ranks, further, AdapterOptions(adapter=method), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(dict(adapted.named_parameters())[name], value) for name, value in weights.items())
    torch.testing.assert_close(adapted.eval()(input_ids=ids).logits, before, rtol=0, atol=1e-6)  # float32
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(build("llama"), str(tmp_path)).eval()
    check_census(loaded, [*ranks, *further], AdapterOptions(adapter=method))
    torch.testing.assert_close(loaded(input_ids=ids).logits, before, rtol=0, atol=1e-6)  # float32


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "mamba"])
def test_layers_can_be_added_on_other_families(family):
    found, ranks, adapted = moved_adapters(build(family))
    further = allocate(found, (0,), "uniform", AllocationOptions(rank=2))
    add_adapters(adapted, found, ranks, further)  # takes the census
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    labelled_loss(adapted, random_batches(1)[0]).backward()
    assert all(torch.equal(p, before[name]) for name, p in adapted.named_parameters() if name in before)
    assert sum(p.grad is not None for p in adapted.parameters()) == len(before)


def test_a_frozen_adapter_gets_no_gradient_from_the_fast_path():
    _, _, adapted = moved_adapters(build("llama"))
    for name, parameter in adapted.named_parameters():
        if "layers.3." in name:
            parameter.requires_grad_(False)
    batch = random_batches(1)[0]
    labelled_loss(adapted, batch).backward()
    usual = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    fast = FastLora(adapted)
    labelled_loss(adapted, batch).backward()
    fast.remove()
    found = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    assert found.keys() == usual.keys() and not any("layers.3." in name for name in found)
    for name in usual:
        torch.testing.assert_close(found[name], usual[name], rtol=1e-4, atol=1e-7)  # float32


def test_what_cannot_be_re_ranked_is_refused_with_the_reason(tmp_path, inputs):
    tokenizer, parts = inputs
    made = made_plan(parts, strategy="last")
    with pytest.raises(ValueError, match="every=0"):
        ReRank(made, parts.probe, every=0)
    with pytest.raises(PlanError, match="score is random"):
        ReRank(replace(made, options=replace(made.options, score="random")), parts.probe, every=1)
    with pytest.raises(PlanError, match="vera has one rank for all modules"):
        ReRank(made.with_adapter("vera"), parts.probe, every=1, change=True)
    rewriting = replace(made, options=replace(made.options, init_lora_weights="pissa"))
    with pytest.raises(PlanError, match="init_lora_weights='pissa' would rewrite the frozen weights"):
        ReRank(rewriting, parts.probe, every=1, change=True)
    assert ReRank(rewriting, parts.probe, every=1).every == 1
    rerank = ReRank(made, parts.probe, every=1, change=True, say=lambda line: None)
    args = trl.SFTConfig(**settings(tmp_path, gradient_checkpointing=False, bf16=False))
    trainer = SFTTrainer(
        build("llama"),
        args,
        plan=made,
        train_dataset=parts.train,
        processing_class=tokenizer,
        prefix_cache=PrefixCacheOptions(),
        callbacks=[rerank],
    )
    with pytest.raises(PlanError, match="a prefix cache replays the layers below"):
        trainer.train()
    for kwargs in ({"rerank_change": True}, {"rerank_every": 0}, {"rerank_every": 2, "prefix_cache": True}):
        with pytest.raises(ConfigError, match="rerank_every"):
            TrainOptions(**kwargs)
    with pytest.raises(DataError, match="without probe_rows"):
        train_adapter(build("llama"), tokenizer, made, parts.train, tmp_path / "a", TrainOptions(rerank_every=1))


@pytest.mark.parametrize("change", [False, True])
def test_sharded_weights_are_refused_before_the_first_step(inputs, change):
    made, model = made_plan(inputs[1]), build("llama")
    adapted = attach(model, made.anatomy, made.ranks)
    model.model.layers[0].mlp.up_proj.weight.ds_id = 0  # what ZeRO-3 marks its weights by
    with pytest.raises(PlanError, match=r"sharded over processes, e\.g\. .*layers\.0\.mlp\.up_proj"):
        ReRank(made, inputs[1].probe, every=1, change=change).on_train_begin(None, None, None, model=adapted)


def test_a_choice_that_cannot_be_made_is_said_and_training_goes_on(tmp_path, inputs, monkeypatch):
    made = made_plan(inputs[1])

    def nothing(*args, **kwargs):
        raise PlanError("no layers fit")

    monkeypatch.setattr("aletheia_lora.training.rerank.plan_from_probe", nothing)
    said = []
    rerank = ReRank(made, inputs[1].probe, every=3, change=True, say=said.append)
    trainer, _ = train(tmp_path, inputs, made, [rerank])
    assert len(losses(trainer)) == STEPS and trainer.plan == made
    assert all("no choice can be made (no layers fit), layers stay" in line for line in said) and len(said) == 2
