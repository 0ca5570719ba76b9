"""One schema for every command: the keys of ``run.yaml`` and the flags are the same words, described once, here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ConfigError, nearest

GROUPS: dict[str, tuple[str, ...]] = {
    "model": ("model", "dtype", "quantization", "device"),
    "data": (
        "data",
        "split",
        "prompt_column",
        "completion_column",
        "completion_only",
        "max_length",
        "max_rows",
        "validation_rows",
    ),
    "probe": ("score", "probe_batches", "probe_batch_size", "probe_mode", "calibrate", "seed"),
    "plan": (
        "strategy",
        "time_budget",
        "memory_budget",
        "percent",
        "num_layers",
        "mass",
        "allocation",
        "rank",
        "attention_rank",
        "mlp_rank",
        "max_rank",
        "alpha_ratio",
        "targets",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
        "init_lora_weights",
        "modules_to_save",
    ),
    "step": ("batch_size",),
    "checkpointing": ("gradient_checkpointing",),
    "caching": ("prefix_cache",),
    "adapter": ("adapter",),
    "plan_only": ("tflops",),
    "train": ("plan", "steps", "learning_rate"),
    "train_only": (
        "gradient_accumulation",
        "compile_layers",
        "prefix_cache_dir",
        "prefix_cache_dtype",
        "rerank_every",
        "rerank_change",
        "checkpoint_every",
    ),
    "push": ("push_to_hub", "private"),
    "compare": ("uniform_learning_rate", "timed_steps", "evaluations", "controls", "matched_time"),
    "forgetting": ("eval", "margin", "loss_margin"),
    "evaluate": ("adapters", "tasks", "any_base"),
    "asking": (
        "data_dir",
        "limit",
        "num_fewshot",
        "fewshot_seed",
        "eval_batch_size",
        "max_new_tokens",
        "chat_template",
        "fewshot_as_multiturn",
        "allow_code",
    ),
    "output": ("output",),
}


class RunConfig(BaseModel):
    """Everything a command can be told."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field("embedded", description="Hub id or local folder; 'embedded' is SmolLM2-135M-Instruct.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field("auto", description="Weights in memory.")
    quantization: Literal["nf4", "fp4", "int8"] | None = Field(None, description="Pack the base by bitsandbytes.")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', ...")
    data: str = Field("embedded", description="Hub id, or jsonl/json/parquet/csv file; 'embedded' is docstrings.")
    split: str | None = Field(None, description="Split of a hub data set.")
    prompt_column: str | None = Field(None, description="Column with the prompt.")
    completion_column: str | None = Field(None, description="Column with the completion.")
    completion_only: bool = Field(True, description="Loss on completions and assistant turns only.")
    max_length: int = Field(512, ge=2, description="Tokens kept per row.")
    max_rows: int | None = Field(None, ge=1, description="Read at most so many rows.")
    validation_rows: int = Field(64, ge=1, description="Rows held out.")
    score: str = Field("gradient_norm", description="What scores a layer.")
    probe_batches: int = Field(8, ge=1, description="Batches read by the probe.")
    probe_batch_size: int = Field(1, ge=1, description="Rows in a probe batch.")
    probe_mode: Literal["auto", "exact", "gram"] = Field("auto", description="How gradient norms are found.")
    seed: int = Field(0, ge=0, description="Seed of everything random.")
    strategy: str = Field("budget", description="What chooses the layers.")
    time_budget: float = Field(0.8, gt=0, le=1, description="Step time allowed, as a share of uniform LoRA's.")
    memory_budget: str | None = Field(None, description="Memory allowed in a step, e.g. 24GiB.")
    tflops: float | None = Field(None, gt=0, description="10^12 operations a second, for --dry-run; else measured.")
    calibrate: bool = Field(False, description="Choose by what the probe timed on this machine, not by counts.")
    percent: float = Field(50, ge=1, le=100, description="Share of layers, for strategies that go by number.")
    num_layers: int | None = Field(None, ge=1, description="Number of layers; caps 'budget'.")
    mass: float = Field(0.8, gt=0, le=1, description="Share of the total score to hold, for 'mass'.")
    allocation: str = Field("matched", description="What gives the ranks.")
    rank: int = Field(16, description="Rank of uniform LoRA, the yardstick.")
    attention_rank: int = Field(16, description="Rank of attention modules, for 'asymmetric'.")
    mlp_rank: int = Field(64, description="Rank of MLP modules and experts, for 'asymmetric'.")
    max_rank: int | None = Field(None, ge=1, description="Highest rank that 'matched' and 'proportional' may give.")
    alpha_ratio: float = Field(2.0, gt=0, description="lora_alpha / rank, everywhere.")
    targets: list[str] | None = Field(None, description="Module names to adapt; all adaptable ones if left out.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    adapter: str = Field("lora", description="What the chosen layers get: lora, ia3, loha, lokr, vera, oft, ...")
    use_dora: bool = Field(False, description="Weight-decomposed adapters (DoRA).")
    use_rslora: bool = Field(False, description="Scale adapters by alpha / sqrt(rank) (rsLoRA).")
    lora_bias: bool = Field(False, description="Train a bias in lora_B.")
    init_lora_weights: str = Field("default", description="How adapters start: gaussian, orthogonal, pissa, olora.")
    modules_to_save: list[str] | None = Field(None, description="Modules to train whole, e.g. lm_head.")
    plan: Path | None = Field(None, description="A plan.json to use instead of making one.")
    steps: int = Field(40, ge=1, description="Optimizer steps.")
    batch_size: int = Field(4, ge=1, description="Rows in a step.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate, decaying linearly.")
    gradient_accumulation: int = Field(1, ge=1, description="Micro-batches in a step.")
    gradient_checkpointing: bool = Field(False, description="Less memory, more time; from the lowest layer up.")
    compile_layers: bool = Field(False, description="Run each layer through torch.compile.")
    prefix_cache: bool = Field(False, description="Keep what the layers below the adapted ones compute; replay it.")
    prefix_cache_dir: Path | None = Field(None, description="Keep it in this folder for later runs.")
    prefix_cache_dtype: Literal["model", "bfloat16"] = Field("model", description="Keep it exactly, or in bfloat16.")
    rerank_every: int | None = Field(None, ge=1, description="Probe again every so many steps; report the ranking.")
    rerank_change: bool = Field(False, description="Train the layers that are chosen then.")
    checkpoint_every: int | None = Field(None, ge=1, description="Keep checkpoints for a run that is cut off.")
    push_to_hub: str | None = Field(None, description="Push the adapter to this repository, e.g. me/my-adapter.")
    private: bool = Field(False, description="Make that repository a private one.")
    uniform_learning_rate: float | None = Field(None, gt=0, description="Uniform LoRA's own peak learning rate.")
    timed_steps: int = Field(8, ge=1, description="Steps of the runs for their time only: those under TRL.")
    evaluations: int = Field(4, ge=1, description="Held-out evaluations along a run.")
    controls: list[str] = Field([], description="Strategies to train beside the selection, e.g. random, last.")
    matched_time: bool = Field(
        True, description="Also train all and selected layers in our trainer for plain PEFT's time."
    )
    eval: list[str] = Field([], description="Also ask base, uniform and selected these tasks, e.g. gsm8k,wikitext.")
    margin: float = Field(2.0, gt=0, description="Extra forgetting that would not matter, in points.")
    loss_margin: float = Field(0.02, gt=0, description="The same for plain text, in nats per token.")
    adapters: list[str] = Field([], description="Folders of adapters to evaluate beside the model.")
    tasks: list[str] = Field([], description="Tasks of lm-evaluation-harness, e.g. gsm8k,mmlu,humaneval,wikitext.")
    data_dir: Path | None = Field(None, description="Folder with the tasks' rows, so that no network is needed.")
    limit: int | None = Field(None, ge=1, description="First items of each task; all if left out.")
    num_fewshot: int | None = Field(None, ge=0, description="Worked examples in a prompt, if the task has any.")
    fewshot_seed: int = Field(1234, ge=0, description="Seed of the choice of worked examples.")
    eval_batch_size: int = Field(8, ge=1, description="Prompts read at once.")
    max_new_tokens: int | None = Field(None, ge=1, description="Tokens generated at most, where a task allows more.")
    chat_template: bool = Field(False, description="Ask in the tokenizer's chat template.")
    fewshot_as_multiturn: bool = Field(False, description="With a chat template: a turn for each worked example.")
    allow_code: bool = Field(False, description="Agree that programs of the model are run, in a sandbox.")
    any_base: bool = Field(False, description="Take adapters whose base model had another name.")
    output: Path | None = Field(None, description="Folder or file to write.")

    def subset(self, options_class: Any) -> dict[str, Any]:
        """The keys that an options dataclass shares with this configuration."""
        return {
            name: getattr(self, name) for name in options_class.__dataclass_fields__ if name in type(self).model_fields
        }


def resolve(path: Path | None, flags: Mapping[str, Any]) -> RunConfig:
    """A configuration file with flags on top.

    Raises:
        ConfigError: If the file cannot be read, is not a mapping, or has an unknown or ill-typed key; names the
            nearest right key.
    """
    values = {} if path is None else read_yaml(path)
    values.update({key: value for key, value in flags.items() if value is not None})
    return configuration(values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; none for an empty file.

    Raises:
        ConfigError: If the file cannot be read, is not YAML or not a mapping, or gives a key twice.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{str(path)!r} holds a {type(loaded).__name__}, expected keys and values, e.g. `steps: 40`.")
    return loaded or {}


class _StrictLoader(yaml.SafeLoader):
    """YAML as it is meant here: a key given twice is a mistake and not an override."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, after a look at its keys."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            line = node.start_mark.line + 1
            raise ConfigError(f"{twice[0]!r} is given twice in the mapping at line {line}. Keep one of the two.")
        return super().construct_mapping(node, deep=deep)


def configuration(values: Mapping[str, Any]) -> RunConfig:
    """Check keys and values.

    Raises:
        ConfigError: For an unknown key (names the nearest) or a value of the wrong type or range.
    """
    for key, value in values.items():
        if key not in RunConfig.model_fields:
            raise ConfigError(f"unknown key {key!r}. {nearest(str(key), RunConfig.model_fields)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value}, expected a finite number.")
        if isinstance(value, bool) and RunConfig.model_fields[key].annotation is not bool:
            raise ConfigError(f"{key}={value}, expected {RunConfig.model_fields[key].annotation}, not true or false.")
    try:
        return RunConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{key}={first.get('input')!r}: {first['msg'][0].lower()}{first['msg'][1:]}.") from error
