"""The key ``evaluation`` of a campaign -> what every run's adapter is asked later, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

LIBRARIES = ("lm_eval", "datasets")
CHOICES = ("methods", "match")
"""Keys that say which runs are evaluated, and nothing about how."""

Positive = Annotated[int, Field(ge=1)]


class Evaluation(BaseModel):
    """What is asked of the base model and of every run's adapter, in the words of ``EvaluationOptions``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    tasks: list[str] = Field(min_length=1, description="Tasks of lm-evaluation-harness, e.g. gsm8k, mmlu, wikitext.")
    data_dir: str | None = Field(None, description="Folder with the tasks' rows, relative to the spec; else the hub.")
    limit: Positive | None = Field(None, description="First items of each task; all if left out.")
    num_fewshot: int | None = Field(None, ge=0, description="Worked examples in a prompt, if the task has any.")
    fewshot_seed: int = Field(1234, ge=0, description="Seed of the choice of worked examples.")
    eval_batch_size: Positive = Field(8, description="Prompts read at once.")
    max_new_tokens: Positive | None = Field(None, description="Tokens generated at most, where a task allows more.")
    chat_template: bool = Field(False, description="Ask in the tokenizer's chat template.")
    fewshot_as_multiturn: bool = Field(False, description="With a chat template: a turn for each worked example.")
    allow_code: bool = Field(False, description="Agree that programs of the model are run, in a sandbox.")
    methods: list[str] | None = Field(None, min_length=1, description="Evaluate these methods' runs; all if left out.")
    match: list[Literal["steps", "time"]] | None = Field(None, min_length=1, description="Likewise, by 'match'.")


def options_of(pack: Mapping[str, Any], base: Path) -> Any:
    """The pack as :class:`~aletheia_lora.evaluation.evaluate.EvaluationOptions`; its folder goes from ``base``.

    Raises:
        ConfigError: If an option is out of range.
    """
    from ..evaluation.evaluate import EvaluationOptions  # late: it loads torch

    given = {key: pack[key] for key in EvaluationOptions.__dataclass_fields__ if key in pack}
    folder = None if pack["data_dir"] is None else base / pack["data_dir"]
    # By name a run's own base model may look like another one: it is known by its weights.
    return EvaluationOptions(**{**given, "tasks": tuple(pack["tasks"]), "data_dir": folder, "any_base": True})


def resolved_pack(evaluation: Evaluation, base: Path) -> dict[str, Any]:
    """The pack as plain JSON types, with the digests of its files and the versions of its libraries.

    The tasks are loaded, and the sandbox is tried where they run programs, so that nothing of it fails later.

    Raises:
        ConfigError: If a task is unknown, or runs programs and there is no consent.
        DataError: If the rows of a task cannot be had.
        SandboxError: If programs would have to run and cannot be contained.
    """
    from ..evaluation.evaluate import prepare  # late: it loads torch

    record = evaluation.model_dump(mode="json")
    loaded = prepare(options_of(record, base)).loaded
    # What the hub's fingerprints stand for is not the same everywhere: cells compare the prompts that were asked.
    sources = {} if evaluation.data_dir is None else dict(sorted(loaded.sources.items()))
    return {**record, "sources": sources, "versions": {name: version(name) for name in LIBRARIES}}
