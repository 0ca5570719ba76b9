import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch.utils.flop_counter import FlopCounterMode

from aletheia_lora.adapter import attach
from aletheia_lora.data import tokenize
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


def test_the_readme_shows_what_the_committed_records_say():
    module = script("readme_table.py")
    readme = " ".join((BENCHMARKS.parent / "README.md").read_text(encoding="utf-8").split())
    assert " ".join(module.table().split()) in readme


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
    names = ["uniform_trl", "paper_ours", "last_ours", "budget_70", "budget_70_cached", "dora_trainer"]
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


def test_rivals_stop_when_the_time_is_over(rivals):
    settings = rivals.Settings(steps=50, num_batches=2, time_limit=0.0)
    records, _, _ = rivals.measure(tiny_setup(rivals), ["last_ours"], settings)
    assert [len(record["step_seconds"]) for record in records] == [1, 1]
    assert rivals.table(records, {}).startswith("Nothing to compare")


def test_peak_memory_of_a_rival_is_more_than_nothing(rivals, raced):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs: peak memory can be reset on Linux only")
    assert rivals.peak_bytes(tiny_setup(rivals), "last_ours", raced[2]["last_ours"], 2) >= 0
