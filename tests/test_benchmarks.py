import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from aletheia_lora.adapter import attach, shared_copy
from aletheia_lora.allocation import AllocationOptions, allocate
from aletheia_lora.anatomy import anatomy
from aletheia_lora.cost import StepShape, cost_model
from aletheia_lora.data import batches, tokenize
from aletheia_lora.errors import ConfigError
from aletheia_lora.memory import memory_model
from aletheia_lora.planning import Plan
from aletheia_lora.report.tables import check_record
from families import build, random_batches
from tiny_inputs import word_rows, word_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def script(path: str) -> ModuleType:
    """A script of the benchmarks as a module; the search path it sets for itself is put back."""
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def tiny_setup(module: ModuleType):
    tokenizer = word_tokenizer()
    rows = tokenize(word_rows(40), tokenizer)
    return module.Setup(model=build("llama"), tokenizer=tokenizer, rows=rows, rank=4, calibrate=False)


def test_readme_and_findings_show_what_the_committed_records_say():
    module = script("readme_table.py")
    for file, shown in (("README.md", module.table()), ("docs/findings.md", "\n".join(module.campaign_rows()))):
        text = " ".join((BENCHMARKS.parent / file).read_text(encoding="utf-8").split())
        assert " ".join(shown.split()) in text


def test_the_findings_hold_every_difference_from_uniform_lora_at_its_better_rate(capsys):
    script("campaign_smollm2/rates.py").main()
    text = (BENCHMARKS.parent / "docs" / "findings.md").read_text(encoding="utf-8")
    told = {line.split(" | ")[0].strip("| ").partition(",")[0]: line for line in text.splitlines() if " to +" in line}
    printed = [line for line in capsys.readouterr().out.splitlines() if line.count(" to ") == 2]
    assert len(printed) == 13  # ten methods on two tasks, three on the third
    for line in printed:
        method, *intervals = line.strip("| ").split(" | ")
        assert all(interval in told[method] for interval in intervals), line


def test_the_committed_comparison_agrees_with_itself():
    record = json.loads((BENCHMARKS / "step_time" / "compare.json").read_text())
    check_record(record)
    arms = {arm["name"]: arm for arm in record["arms"]}
    losses = [arms[name]["first_loss"] for name in ("uniform", "uniform_trl_fast", "uniform_aletheia", "selected")]
    assert losses == pytest.approx([losses[0]] * 4, abs=2e-4)  # float32; the adapters start at zero
    assert arms["selected"]["lowest_backward_layer"] == min(arms["selected"]["layers"])
    assert arms["uniform"]["lowest_backward_layer"] == 0


# --- rivals of a step -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rivals():
    return script("step_time/rivals.py")


@pytest.fixture(scope="module")
def raced(rivals):
    names = [
        "uniform_trl",
        "uniform_trl_no_checkpointing",
        "paper_ours",
        "last_ours",
        "budget_70",
        "budget_70_cached",
        "dora_trainer",
    ]
    names += ["adalora_trainer", "budget_quarter_cached"]
    return rivals.measure(tiny_setup(rivals), names, rivals.Settings(steps=4, num_batches=2))


def test_rivals_take_the_same_steps_in_turns_and_a_failed_one_keeps_its_reason(rivals, raced):
    records = {record["name"]: record for record in raced[0]}
    assert next(iter(records)) == "uniform_trainer"  # the yardstick, though nobody asked for it
    failed = records.pop("budget_quarter_cached")
    assert "adapts layer 0" in failed["failed"] and failed["step_seconds"] == []
    base = records["uniform_trainer"]
    for record in records.values():
        assert record["failed"] is None
        padded = [shape["tokens"] < 0.95 * shape["rows"] * shape["length"] for shape in record["shapes"]]
        assert any(padded)
        assert [shape["unpadded"] for shape in record["shapes"]] == (
            padded if record["trainer"] == "aletheia" else [False] * 4
        )
        assert record["epochs"] == [0, 0, 1, 1] and min(record["step_seconds"]) > 0
        assert rivals.same_batches(record, base)
        if record["adapter"] != "adalora":  # whose loss has a term for orthogonality
            assert record["first_loss"] == pytest.approx(base["first_loss"], abs=5e-2)  # one runs in bfloat16
    assert records["last_ours"]["lowest_backward_layer"] == 2
    assert records["adalora_trainer"]["lowest_backward_layer"] == 0
    assert records["budget_70_cached"]["prefix_cache"]["replayed_batches"] == 2


def test_a_replayed_step_has_less_arithmetic_and_checkpointing_more(raced):
    records = {record["name"]: record for record in raced[0]}
    full, cached = records["budget_70"]["operations"], records["budget_70_cached"]["operations"]
    assert cached[:2] == full[:2] and all(a < b for a, b in zip(cached[2:], full[2:], strict=True))
    assert records["uniform_trl"]["operations"][0] > records["uniform_trainer"]["operations"][0]
    no_checkpointing = records["uniform_trl_no_checkpointing"]
    assert no_checkpointing["operations"] == records["uniform_trainer"]["operations"]
    # bf16 stays on: its losses are TRL's as shipped and not those of float32
    assert no_checkpointing["first_loss"] == records["uniform_trl"]["first_loss"]
    assert no_checkpointing["first_loss"] != records["uniform_trainer"]["first_loss"]


def test_the_table_of_rivals_is_made_from_the_records_alone(rivals, raced, tmp_path):
    records, facts, _ = raced
    rivals.write(tmp_path, records, facts)
    read = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    table = rivals.table(read, json.loads((tmp_path / "environment.json").read_text()))
    assert "| uniform, plain PEFT under Trainer | 4 | 0 | 1.00x (1.00-1.00)" in table
    assert "prefix cache, first epoch" in table and "prefix cache, later epochs" in table
    assert "| budget, a quarter, prefix cache | failed: PlanError" in table
    assert "Not comparable" not in table


def test_the_arithmetic_of_a_step_is_what_torch_counts(rivals, raced):
    made: Plan = raced[2]["uniform_trainer"]
    (batch,) = random_batches(count=1, rows=4, length=32)
    model = build("llama")
    model.set_attn_implementation("eager")  # torch counts no fused attention on a CPU
    adapted = attach(model, made.anatomy, made.ranks)
    with FlopCounterMode(display=False) as counter:
        adapted(**batch).loss.backward()
    shape = {"rows": 4, "length": 32, "labelled": 1}
    arm = rivals.arm_of("uniform_trainer", made, 1)
    counted = rivals.operations(made.anatomy, arm, rivals.RIVALS[arm.name], shape, 0, replayed=False)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.03)  # layer 0 needs no gradient of its input
    half = {**shape, "tokens": 64, "squares": 2 * 32**2, "unpadded": True}  # two of four rows were nothing but padding
    ours = rivals.arm_of("uniform_ours", made, 1), rivals.RIVALS["uniform_ours"]
    unpadded, two_rows = (
        rivals.operations(made.anatomy, *ours, of, 0, replayed=False) for of in (half, {**shape, "rows": 2})
    )
    assert unpadded == two_rows < rivals.operations(made.anatomy, *ours, shape, 0, replayed=False)


def test_rivals_stop_when_the_time_is_over(rivals):
    settings = rivals.Settings(steps=50, num_batches=2, time_limit=0.0)
    records, _, _ = rivals.measure(tiny_setup(rivals), ["last_ours"], settings)
    assert [len(record["step_seconds"]) for record in records] == [1, 1]
    assert rivals.table(records, {}).startswith("Nothing to compare")


def test_a_rival_runs_for_its_peak_memory(rivals, raced):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs: peak memory can be reset on Linux only")
    peak = rivals.peak_bytes(tiny_setup(rivals), "last_ours", raced[2]["last_ours"], 2)
    assert isinstance(peak, int)  # its sign means something in a fresh process only: this one also frees memory


# --- time to loss -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def to_loss():
    return script("time_to_loss/run.py")


TINY_RUNS = {"uniform_steps": 6, "grid_steps": 2, "every": 2, "train_rows": 8, "heldout_rows": 4, "probe_rows": 4}
RATES = (1e-3, 1e-2)


@pytest.fixture(scope="module")
def timed_to_loss(to_loss, tmp_path_factory):
    folder = tmp_path_factory.mktemp("time_to_loss")
    settings = to_loss.Settings(**TINY_RUNS, validation_rows=4, learning_rates=RATES)
    methods = sys.modules["training_methods"].METHODS
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods["budget_80"], "time_budget", 0.7)  # of four layers 0.8 would leave none below for a cache
        to_loss.measure(tiny_setup(to_loss), settings, [0], folder, lambda _line: None)
    return folder, settings


def test_every_method_runs_at_its_best_rate_and_says_what_it_took(to_loss, timed_to_loss):
    records = to_loss.Records(timed_to_loss[0])
    grid = records.of(kind="grid")
    assert len(grid) == 2 * len({method.rate_from for method in to_loss.METHODS.values()})
    runs = {run["method"]: run for run in records.of(kind="run")}
    assert set(runs) == set(to_loss.METHODS)
    for name, run in runs.items():
        assert run["failed"] is None
        assert run["learning_rate"] == to_loss.best_rate(records, name) == RATES[1]
        assert len(run["step_seconds"]) == run["steps"] == run["heldout"][-1]["step"]
        assert run["heldout"][-1]["seconds"] == pytest.approx(sum(run["step_seconds"]) + run["probe_seconds"])
        assert (run["probe_seconds"] > 0) is (name in ("paper", "budget", "budget_cached"))
        assert run["turns_with"] == list(to_loss.METHODS)
    assert runs["uniform"]["steps"] == 6 and runs["budget"]["steps"] > 6
    assert runs["budget_cached"]["steps"] >= runs["budget"]["steps"]
    assert runs["budget_cached"]["prefix_cache"]["replayed_batches"] > 0
    assert runs["random"]["layers"] != runs["uniform"]["layers"]
    losses = [[look["loss"] for look in runs[name]["heldout"]] for name in ("uniform", "uniform_trainer")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # float32; another trainer, the same run


def test_a_second_start_skips_what_is_there_and_runs_what_is_missing(to_loss, timed_to_loss, tmp_path):
    folder, settings = timed_to_loss
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(line for line in lines if '"method": "last", "title"' not in line))
    to_loss.measure(tiny_setup(to_loss), settings, [0], tmp_path, lambda _line: None)
    kept, again = to_loss.Records(folder), to_loss.Records(tmp_path)
    assert len(again.lines) == len(kept.lines)
    (first,), (second,) = (records.of(kind="run", method="last") for records in (kept, again))
    assert second["train_losses"] == pytest.approx(first["train_losses"], abs=1e-5)  # float32
    assert "Seeds 0 were resumed" in to_loss.table(again.lines)
    assert "resumed" not in to_loss.table(kept.lines)


def test_records_of_other_settings_are_not_mixed(to_loss, timed_to_loss):
    other = to_loss.Settings(**TINY_RUNS, validation_rows=4, learning_rates=(1e-3,))
    with pytest.raises(ConfigError, match="made with another learning_rates"):
        to_loss.measure(tiny_setup(to_loss), other, [0], timed_to_loss[0], lambda _line: None)


def test_the_readme_of_time_to_loss_shows_what_its_records_say(to_loss):
    folder = BENCHMARKS / "time_to_loss"
    assert to_loss.table(to_loss.Records(folder).lines) in (folder / "README.md").read_text()


def made_run(method: str, seed: int, looks: list[tuple[float, float]], probe_seconds: float = 0.0, failed=None):
    heldout = [{"step": step, "seconds": seconds, "loss": loss} for step, (seconds, loss) in enumerate(looks)]
    run = {"kind": "run", "method": method, "seed": seed, "turns_with": [], "failed": failed, "layers": [1, 2]}
    return {**run, "base_heldout_loss": 2.0, "probe_seconds": probe_seconds, "heldout": heldout}


def test_time_to_a_loss_lies_on_the_line_between_two_looks(to_loss):
    run = made_run("paper", 0, [(10.0, 1.5), (20.0, 1.0)], probe_seconds=4.0)
    assert to_loss.seconds_to(1.25, run) == pytest.approx(15.0)
    assert to_loss.seconds_to(1.75, run) == pytest.approx(7.0)  # from the untuned loss, when the probe was over
    assert to_loss.seconds_to(1.0, run) == 20.0
    assert to_loss.seconds_to(0.99, run) is None


def test_ratios_to_loss_have_the_t_interval_of_their_logarithms(to_loss):
    runs = [made_run("uniform", seed, [(100.0, 1.0)]) for seed in range(3)]
    runs += [made_run("budget", seed, [(seconds, 1.0)]) for seed, seconds in enumerate((50.0, 70.0, 60.0))]
    found, failed = to_loss.outcomes(runs, "budget")
    assert [outcome.ratio for outcome in found] == pytest.approx([0.5, 0.7, 0.6]) and failed == []
    interval = stats.ttest_1samp(np.log([0.5, 0.7, 0.6]), 0.0).confidence_interval(0.95)
    low, high = np.exp([interval.low, interval.high])
    assert to_loss.summary(found) == f"0.59 ({low:.2f} to {high:.2f}), n = 3"
    assert to_loss.summary(found[:1]) == "0.50, n = 1"
    runs += [made_run("uniform_trainer", seed, [(200.0, 1.0)]) for seed in range(3)]
    against_trainer, _ = to_loss.outcomes(runs, "budget", "uniform_trainer")
    assert [outcome.ratio for outcome in against_trainer] == pytest.approx([0.25, 0.35, 0.3])


def test_runs_that_never_get_there_or_fail_stay_in_the_table(to_loss):
    runs = [made_run("uniform", seed, [(100.0, 1.0)]) for seed in range(3)]
    runs += [made_run("last", 0, [(50.0, 0.9)]), made_run("last", 1, [(120.0, 1.1)])]
    runs += [made_run("last", 2, [], failed="RuntimeError: out of luck")]
    table = to_loss.table(runs)
    assert "never in 1.20 (1.1000)" in table
    assert "seed 2 failed: RuntimeError: out of luck" in table
    assert "1 of 2 reached it; 1 failed" in table


# --- depth for a fixed time -------------------------------------------------------------------------------------


@pytest.fixture
def depth(monkeypatch):
    module = script("depth/run.py")
    for name, value in {"UNIFORM_STEPS": 6, "EPOCH_STEPS": 3, "HELD_OUT": 4}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_each_choice_of_depth_gets_uniform_loras_time(depth):
    bench = depth.Bench(tiny_setup(depth))
    whole, upper, rare = (
        bench.run(depth.Choice(*how), 0) for how in (((0, 1, 2, 3),), ((2, 3),), ((0, 1, 2, 3), 2, 3))
    )
    assert whole["steps"] == len(whole["train_losses"]) == 6 < rare["steps"] < upper["steps"]
    assert whole["train_losses"][0] == upper["train_losses"][0]  # one batch; the adapters start at zero
    two, cached = (bench.run(depth.Choice((2, 3), cached=on, epochs=2), 0) for on in (False, True))
    assert two["steps"] == upper["steps"] < cached["steps"]


def test_a_cached_choice_of_depth_has_the_losses_of_a_fresh_one(depth, monkeypatch):
    bench = depth.Bench(tiny_setup(depth))
    monkeypatch.setattr(bench, "steps", lambda *_: 9)
    fresh, cached = (bench.run(depth.Choice((2, 3), cached=on, epochs=2), 0) for on in (False, True))
    assert cached["train_losses"] == pytest.approx(fresh["train_losses"], abs=1e-5)  # float32
    rows = bench.rows(depth.Choice((2, 3), epochs=2), 0, 9)
    epochs = [sorted(row.input_ids for row in rows[start : start + 12]) for start in (0, 12, 24)]
    assert epochs[0] == epochs[1] == epochs[2]


def test_early_layers_move_at_every_so_manieth_step_only(depth):
    bench = depth.Bench(tiny_setup(depth))
    choice = depth.Choice((0, 1, 2, 3), cut=2, every=3)
    ranks = allocate(bench.found, choice.layers, "uniform", AllocationOptions(rank=4))
    layer_of = {entry.name: entry.layer_idx for entry in ranks}
    weights = []
    for taken in (1, 3, 4):
        adapted = attach(shared_copy(bench.setup.model), bench.found, ranks)
        rows = list(batches(bench.rows(choice, 0, taken), bench.setup.batch_size, bench.setup.pad))
        bench.train_on(rows, adapted, choice, layer_of, steps=8)
        named = {name: weight.detach() for name, weight in adapted.named_parameters() if "lora_B" in name}
        weights.append({name: named[name] for name in sorted(named)})
    for name, one, three, four in zip(weights[0], *(each.values() for each in weights), strict=True):
        early = layer_of[depth.module_of(name)] < choice.cut
        assert torch.equal(one, three) is early and not torch.equal(three, four)


@pytest.mark.parametrize("file", ["records.jsonl", "records_code.jsonl"])
def test_the_readme_of_depth_shows_what_its_records_say(depth, file):
    folder = BENCHMARKS / "depth"
    records = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    assert depth.table(records) in (folder / "README.md").read_text()


# --- the shortcuts of our trainer -------------------------------------------------------------------------------


def test_each_shortcut_is_left_out_by_itself_and_no_loss_changes(monkeypatch):
    module = script("step_time/shortcuts.py")
    monkeypatch.delitem(module.VARIANTS, "compiled")  # compiling is slow, and tried in its own tests
    record = module.measured(tiny_setup(module), steps=4, num_batches=2)
    runs = {(run["method"], run["variant"]): run for run in record["runs"]}
    assert len(runs) == len(module.METHODS) * len(module.VARIANTS)
    for (method, variant), run in runs.items():
        assert len(run["step_seconds"]) == 4
        assert run["train_losses"] == pytest.approx(runs[method, module.AS_IT_IS]["train_losses"], abs=1e-4)  # float32
        assert ("FastLora" in run["installed"]) is (variant != "peft_adapters")
        assert (run["num_padding_left_out"] > 0) is (variant not in ("padded", "trl_loss"))
    shown = module.table(record)
    assert "| as it is | 1.00x (1.00-1.00) | 1.00x (1.00-1.00) | 1.00x (1.00-1.00) |" in shown


def test_the_readme_of_step_time_shows_what_the_shortcuts_record_says():
    module = script("step_time/shortcuts.py")
    record = json.loads((BENCHMARKS / "step_time" / "shortcuts.json").read_text())
    assert module.table(record) in (BENCHMARKS / "step_time" / "README.md").read_text()
    first = [run["train_losses"][0] for run in record["runs"]]
    assert first == pytest.approx([first[0]] * len(first), abs=2e-4)  # float32; the adapters start at zero


# --- predictions of a step --------------------------------------------------------------------------------------


def test_costs_are_predicted_for_the_very_batches_that_are_run(monkeypatch):
    module = script("cost_model/run.py")
    layers = [{"name": "last 2", "layers": [2, 3], "rank": 8, "checkpointing": on} for on in (False, True)]
    monkeypatch.setattr(module, "CHOICES", layers)
    model, rows = build("llama"), tokenize(word_rows(16), word_tokenizer())
    short, long = module.all_batches(rows, "cpu")[0], random_batches(count=1, rows=4, length=64)[0]
    long["attention_mask"][1:, 8:], long["labels"][1:, 8:] = 0, -100  # one long row, three short ones
    assert module.computed(long) == (64 + 3 * 8, round((64**2 + 3 * 8**2) / 88), long["labels"][:, 1:].ne(-100).sum())
    _, brief, _ = module.predictions(model, rows, [short], short)
    found, made, _ = module.predictions(model, rows, [short, long], long)
    assert made[0]["operations"] > brief[0]["operations"] and made[0]["bytes"] > brief[0]["bytes"]
    shape = module.computed(short)
    counted = cost_model(found, StepShape(num_tokens=shape[0], sequence_length=shape[1], num_labelled_tokens=shape[2]))
    assert brief[0]["operations"] == counted.step([2, 3], rank=8)
    assert made[1]["seconds"] > made[0]["seconds"] > 0


def test_the_profile_of_a_step_makes_the_table_of_its_readme():
    module = script("step_time/profile_step.py")
    folder = BENCHMARKS / "step_time"
    shown = module.table(json.loads((folder / "profile.json").read_text()))
    assert shown in (folder / "README.md").read_text()
    shares = [float(cell.strip(" %")) for line in shown.splitlines()[2:] for cell in line.split("|")[2:-1]]
    assert sum(shares) == pytest.approx(300, abs=2)
    kinds = {name: module.kind_of(name) for name in ("aten::addmm_", "aten::add_", "aten::mm", "aten::_fused_adamw_")}
    assert list(kinds.values()) == ["matrix products", "additions", "matrix products", "optimizer"]


def test_the_lowest_error_of_bytes_is_shown(tmp_path, capsys):
    module = script("cost_model/run.py")
    choice = {"name": "all", "rank": 8, "checkpointing": False, "step_seconds": [2.0]}
    peak = {"alive": 100, "resident": 200}
    records = [
        {**choice, "predicted": {"seconds": 2.0, "operations": 1.0, "bytes": size}, "peak_bytes": peak}
        for size in (108, 94)
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    module.show(tmp_path)
    shown = capsys.readouterr().out
    assert "\nbytes: mean absolute error 7.0%, largest 8.0%, lowest -6.0%, n = 2" in shown
    assert "resident bytes: mean absolute error 49.5%" in shown


def test_bytes_that_are_alive_are_those_that_a_step_keeps():
    module = script("cost_model/run.py")
    model, batch = build("llama"), random_batches(count=1, rows=4, length=64)[0]
    found = anatomy(model)
    few, many = (
        module.alive_bytes(module.Arm(model, found, {"layers": layers, "rank": 8, "checkpointing": False}), batch)
        for layers in ([3], [0, 1, 2, 3])
    )
    kept = memory_model(found, num_rows=4, length=64, num_labelled=1, model=model).layers[0].saved
    assert many - few > 3 * kept > 0


# --- packed bases and the memory of a probe ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quantized", "probe_memory"])
def test_the_committed_records_make_their_table(name):
    module = script(f"{name}/run.py")
    records = [json.loads(line) for line in (BENCHMARKS / name / "records.jsonl").read_text().splitlines()]
    lines = module.table(records).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert set(json.loads((BENCHMARKS / name / "environment.json").read_text())) > {"torch", "transformers"}
    if name == "quantized":
        measured = [record for record in records if "spearman" in record]
        failed = {record["format"] for record in measured if not module.holds(record)}
        assert failed == {"hqq_int4"}  # as its README says
        assert {record["num_modules"] for record in measured} == {210}
        assert all(record["shapes"] == records[0]["shapes"] for record in measured)


# --- sandbox ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def boxed():
    return script("sandbox/run.py")


def test_the_sandboxs_readme_shows_what_its_records_say(boxed):
    folder = BENCHMARKS / "sandbox"
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    facts = json.loads((folder / "environment.json").read_text())
    assert boxed.table(records, facts) in (folder / "README.md").read_text()


def test_a_program_with_another_verdict_in_the_box_is_listed(boxed):
    names = [f"HumanEval/{number}" for number in range(4)]
    of = {"plain": ["passed", 0.1], "split": ["passed", 0.3, "split"], "shared": ["passed", 0.2, "shared"]}
    records = [{"task_id": name, "program": "canonical", **of} for name in names]
    records[2] = {**records[2], "split": ["not_plain", 0.3, "split"]}
    facts = {"checked": {"a": "held"}, "self_check_seconds": 2, "cores": 2, "load_average": 1.0}
    table = boxed.table(records, {**facts, "bwrap": "", "interpreter": ""})
    assert "split: 1 of 4 verdicts differ from the plain process. HumanEval/2 canonical (passed, not_plain)" in table
    assert "shared: 0 of 4" in table and "| extra seconds, median | 0 | 0.200 | 0.100 |" in table


@pytest.mark.parametrize("body", ["    return x + 1\n", "    return 3\n", "    return x < 1\n"])
def test_a_mutant_is_another_program(boxed, body):
    row = {"prompt": 'def f(x):\n    """Doc."""\n', "canonical_solution": body, "entry_point": "f"}
    changed = boxed.mutant(row)
    assert ast.dump(ast.parse(row["prompt"] + body)) != ast.dump(ast.parse(changed))
