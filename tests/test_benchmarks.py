import importlib.util
import json
from pathlib import Path

import pytest

from aletheia_lora.report.tables import check_record

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_readme_shows_what_the_committed_records_say():
    spec = importlib.util.spec_from_file_location("readme_table", BENCHMARKS / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
