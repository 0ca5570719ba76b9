"""A model and rows -> the plans of the methods that training benchmarks compare, all made from one probe."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from aletheia_lora.anatomy import ModelAnatomy
from aletheia_lora.data import TokenizedRows, tokenize
from aletheia_lora.embedded import load_embedded_model
from aletheia_lora.plan_options import PlanOptions
from aletheia_lora.planning import Plan, plan_from_probe
from aletheia_lora.probe_result import ProbeResult
from aletheia_lora.probing import probe_rows
from aletheia_lora.rows import load_rows

METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"strategy": "all", "allocation": "uniform"},
    "paper": {"strategy": "top_percent", "percent": 50, "allocation": "asymmetric"},
    "last": {"strategy": "last", "percent": 50, "allocation": "uniform"},
    "budget_80": {"strategy": "budget", "time_budget": 0.8, "allocation": "matched"},
    "budget_70": {"strategy": "budget", "time_budget": 0.7, "allocation": "matched"},
    "budget_50": {"strategy": "budget", "time_budget": 0.5, "allocation": "matched"},
    "budget_quarter": {"strategy": "budget", "time_budget": 0.6, "allocation": "matched"},
    "stride_third": {"strategy": "budget_stride", "percent": 33, "time_budget": 0.8, "allocation": "matched"},
    "random": {"strategy": "random", "allocation": "matched"},
}
"""The options of each plan; what depends on the model is set in :func:`method_plan`."""
NEED_PROBE = ("paper", "budget_80", "budget_70", "budget_50", "budget_quarter")
"""Methods that cannot choose without scores, and therefore pay for the probe."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a benchmark trains, and how its steps look."""

    model: Any
    tokenizer: Any
    rows: TokenizedRows
    model_name: str = "model"
    batch_size: int = 4
    rank: int = 16
    """Of uniform LoRA and of attention in the paper's ranks; the paper's other modules get four times as much."""
    calibrate: bool = False
    """Choose layers and horizons by the probe's timing; without, by counting, and alike on every machine."""

    @property
    def pad(self) -> int:
        """Token to pad with."""
        token = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if token is None else token)


def embedded_setup(data: Path, *, max_rows: int = 4000, max_length: int = 512) -> Setup:
    """SmolLM2-135M-Instruct in float32, and the first rows of a file with the columns of GSM8K or in TRL's formats."""
    model, tokenizer = load_embedded_model()
    rows = load_rows(str(data))[:max_rows]
    columns = {"prompt_column": "question", "completion_column": "answer"} if "question" in rows[0] else {}
    tokenized = tokenize(rows, tokenizer, max_length=max_length, **columns)
    return Setup(model=model, tokenizer=tokenizer, rows=tokenized, model_name="SmolLM2-135M-Instruct")


def probed(setup: Setup, rows: TokenizedRows, train: TokenizedRows, seed: int) -> tuple[ModelAnatomy, ProbeResult]:
    """One probe on ``rows``, whose predictions are for batches of ``train``."""
    options = PlanOptions(
        batch_size=setup.batch_size, calibrate=setup.calibrate, probe_batches=len(rows), rank=setup.rank, seed=seed
    )
    lengths = [len(row.input_ids) for row in train]
    return probe_rows(setup.model, rows, options, tokenizer=setup.tokenizer, row_lengths=lengths)


def cached_steps(time: float, epoch_steps: int, share: float, later: float) -> int:
    """Steps that fit in the time of so many steps of uniform LoRA: first-epoch ones at ``share`` of its step, then
    those with the prefix cache at ``later``; at least one."""
    first = min(epoch_steps, round(time / share))
    return max(first + round((time - first * share) / later), 1)


def method_plan(setup: Setup, name: str, found: ModelAnatomy, measured: ProbeResult, seed: int) -> Plan:
    """The plan of one method.

    Raises:
        PlanError: If its budget or its ranks cannot be met on this model.
    """
    choice = dict(METHODS[name])
    if name == "budget_quarter":
        choice["num_layers"] = max(found.num_layers // 4, 1)
    if name == "random":  # as many layers as ours, and as many weights
        choice["num_layers"] = len(method_plan(setup, "budget_80", found, measured, seed).selection.layers)
    options = PlanOptions(
        batch_size=setup.batch_size,
        calibrate=setup.calibrate,
        rank=setup.rank,
        attention_rank=setup.rank,
        mlp_rank=4 * setup.rank,
        seed=seed,
        **choice,
    )
    return plan_from_probe(found, measured, options)
