"""A YAML file -> a checked :class:`Campaign`, and its cells: every run that it asks for, named by content.

Two cells with the same content are the same run; whatever could change its result is part of the content, the digests
of local files and the versions of the libraries included. A setting that came later is a part of it only where it is
not as it always was, so that the cells from before it keep their names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .. import __version__
from ..errors import ConfigError, nearest
from ..run_config import read_yaml
from .checks import check_campaign
from .launcher import check_launcher
from .methods import METHODS, Method, has_counted_time, is_packed
from .pack import CHOICES, Evaluation, resolved_pack

FORMAT = "aletheia-campaign/1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")
SHARED = (
    "batch_size",
    "rank",
    "alpha_ratio",
    "probe_batches",
    "probe_batch_size",
    "train_rows",
    "validation_rows",
    "heldout_rows",
    "prefix_cache",
    "versions",
)
"""What the content of every cell holds, beside its model, task and method."""
LATER = ("processes", "accelerate_config")
"""The same, where they are not as they always were: one process without a launcher."""


def _plain_name(name: str) -> str:
    if not NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{name[:80]!r} is no plain name: expected letters, digits, '.', '_' and '-', at most 64")
    return name


def _number(value: Any) -> Any:
    """YAML reads 5e-4 as text: it has no dot."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


Name = Annotated[str, AfterValidator(_plain_name)]
Rate = Annotated[float, BeforeValidator(_number), Field(gt=0)]
Margin = Annotated[float, BeforeValidator(_number), Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelEntry(_Strict):
    """A model to train."""

    name: Name = Field(description="Its name in tables.")
    model: str = Field(description="Hub id, or a folder relative to the spec; 'embedded' is SmolLM2-135M-Instruct.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field("auto", description="Weights in memory.")
    device: str = Field("auto", description="'auto', 'cpu', 'cuda', ...")


class Task(_Strict):
    """Rows to learn from, or to look at."""

    name: Name = Field(description="Its name in tables.")
    data: str = Field(description="Hub id, or a data file relative to the spec.")
    split: str | None = Field(None, description="Split of a hub data set.")
    prompt_column: str | None = Field(None, description="Column with the prompt.")
    completion_column: str | None = Field(None, description="Column with the completion.")
    completion_only: bool = Field(True, description="Loss on completions and assistant turns only.")
    max_length: int = Field(512, ge=2, description="Tokens kept per row.")
    max_rows: int | None = Field(None, ge=1, description="Read at most so many rows.")


class Margins(_Strict):
    """Differences that count as none, fixed before anything runs; tasks of ``evaluation`` may be named beside these.

    Those are in points of 100, for plain text in nats per token.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Margin]

    heldout_loss: Margin = Field(description="In nats per token, on the task.")
    other_loss: Margin | None = Field(None, description="In nats per token, on the other text.")


class Campaign(_Strict):
    """Everything a campaign can be told."""

    name: Name = Field(description="Its name, and that of its folder.")
    models: list[ModelEntry] = Field(min_length=1)
    tasks: list[Task] = Field(min_length=1)
    methods: list[Method] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    learning_rates: list[Rate] = Field(min_length=1, description="The grid; each method takes its best.")
    steps: int = Field(40, ge=1, description="Optimizer steps of a run.")
    grid_steps: int = Field(16, ge=1, description="Optimizer steps of a run of the grid.")
    match: list[Literal["steps", "time"]] = Field(
        ["steps"], min_length=1, description="Equal steps; or as many as fit in uniform LoRA's predicted time."
    )
    batch_size: int = Field(4, ge=1, description="Rows in a step.")
    rank: int = Field(16, ge=1, description="Rank of uniform LoRA; 'asymmetric' gives the MLP four times as much.")
    alpha_ratio: float = Field(2.0, gt=0, description="lora_alpha / rank, everywhere.")
    probe_batches: int = Field(8, ge=1, description="Batches read by the probe.")
    probe_batch_size: int = Field(1, ge=1, description="Rows in a probe batch.")
    train_rows: int | None = Field(None, ge=1, description="Rows to train on; all that are left if left out.")
    validation_rows: int = Field(24, ge=1, description="Rows that choose the learning rate, and nothing else.")
    heldout_rows: int = Field(32, ge=1, description="Rows that the results are measured on, and nothing else.")
    evaluations: int = Field(4, ge=1, description="Looks at the held-out rows along a run.")
    other_text: Task | None = Field(None, description="Another text whose loss is measured at the end of a run.")
    other_rows: int = Field(64, ge=1, description="Rows of it.")
    prefix_cache: bool = Field(False, description="Keep frozen layers' output on disk, shared by cells.")
    processes: int = Field(1, ge=1, description="Processes that train a cell together; they share a step's rows.")
    accelerate_config: str | None = Field(None, description="Start them by accelerate launch; relative to the spec.")
    evaluation: Evaluation | None = Field(None, description="Standard tasks that every run's adapter is asked.")
    margins: Margins


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


# --- reading ----------------------------------------------------------------------------------------------------


def campaign_folder(path: Path, output: Path | None) -> Path:
    """Where a spec's campaign lies: the folder given, else one of its name beside the spec.

    Raises:
        ConfigError: If the spec cannot be read or has no plain name.
    """
    if output is not None:
        return output
    try:
        return path.parent / _plain_name(str(read_yaml(path).get("name", "")))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"name: {error}.") from error


def load_campaign(path: Path) -> Campaign:
    """Read and check a spec.

    Raises:
        ConfigError: If the file cannot be read, has an unknown key (names the nearest) or value, a method that does
            not exist, an unsafe name, or anything twice.
    """
    values = read_yaml(path)
    for key, short in (("models", _model), ("tasks", None), ("methods", _method)):
        entries = values.get(key)
        if entries is None:
            continue
        if not isinstance(entries, list):
            raise ConfigError(f"{key} is a {type(entries).__name__}, expected a list.")
        values[key] = [entry if short is None else short(entry) for entry in entries]
    _check_margins(values)
    campaign = _checked(values)
    check_campaign(campaign)
    return campaign


def _check_margins(values: Mapping[str, Any]) -> None:
    """Beside its own keys `margins` has the tasks of the evaluation, and no others."""
    margins, pack = values.get("margins"), values.get("evaluation")
    tasks = pack.get("tasks") if isinstance(pack, dict) else None
    known = [*Margins.model_fields, *(tasks if isinstance(tasks, list) else ())]
    for key in margins if isinstance(margins, dict) else ():
        if key not in known:
            raise ConfigError(f"unknown key 'margins.{key}'. {nearest(str(key), known)}")


def _checked(values: Mapping[str, Any]) -> Campaign:
    try:
        return Campaign(**values)
    except ValidationError as error:
        first = min(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")  # a wrong key explains most
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _fields_at(first["loc"][:-1])
            raise ConfigError(f"unknown key {where!r}. {nearest(str(first['loc'][-1]), known)}") from error
        if first["type"] == "missing":
            raise ConfigError(f"{where} is missing: {_description(first['loc'])}") from error
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}={repr(first.get('input'))[:80]}: {message[0].lower()}{message[1:]}.") from error


def _fields_at(place: Sequence[Any]) -> list[str]:
    """The keys that may stand at this place of the file."""
    entry: dict[Any, type[BaseModel]] = {
        "models": ModelEntry,
        "tasks": Task,
        "methods": Method,
        "other_text": Task,
        "margins": Margins,
        "evaluation": Evaluation,
    }
    return list((entry[place[0]] if place else Campaign).model_fields)


def _description(place: Sequence[Any]) -> str:
    """What a key is for."""
    field = Campaign.model_fields.get(str(place[0])) if len(place) == 1 else None
    return (field.description if field is not None else None) or "expected a value."


def _model(entry: Any) -> Any:
    """A model may be given as its name alone."""
    if not isinstance(entry, str):
        return entry
    return {"name": entry.rstrip("/").rpartition("/")[2], "model": entry}


def _method(entry: Any) -> Any:
    """A method may be given by its name alone, or as a known one with changes, or as a strategy of its own."""
    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict):
        raise ConfigError(f"methods holds {entry!r}, expected a name such as 'paper', or keys and values.")
    name = given.get("name")
    if isinstance(name, str) and name in METHODS:
        return {**METHODS[name], **given}
    if "strategy" not in given:
        raise ConfigError(
            f"there is no method {name!r}. {nearest(str(name), METHODS)} Another one needs a name and a strategy."
        )
    try:
        _plain_name(str(name))
    except ValueError as error:
        raise ConfigError(f"methods: {error}.") from error
    return given


# --- what is fixed when a campaign starts -----------------------------------------------------------------------


def resolved(campaign: Campaign, base: Path) -> dict[str, Any]:
    """The campaign as plain JSON types, with digests of local models and data, and the versions of the libraries.

    Args:
        campaign: The checked spec.
        base: Folder that paths are relative to: that of the spec.

    Raises:
        ConfigError: If a task of the evaluation, a quantization or a launcher's configuration cannot be had.
        DataError, SandboxError: As :func:`~aletheia_lora.campaign.pack.resolved_pack`.
    """
    record = campaign.model_dump(mode="json")
    for entry in record["models"]:
        entry["digest"] = digest_of(base / entry["model"])
    for entry in [*record["tasks"], *filter(None, [record["other_text"]])]:
        entry["digest"] = digest_of(base / entry["data"])
    record["versions"] = {"aletheia-lora": __version__, **{name: version(name) for name in LIBRARIES}}
    later = _resolved_later(campaign, record, base)
    return {"format": FORMAT, **record, **later}


def _resolved_later(campaign: Campaign, record: dict[str, Any], base: Path) -> dict[str, Any]:
    """The settings that a record holds only where they are not as they always were; they are taken out of it."""
    for key in (*LATER, "evaluation"):
        del record[key]
    found: dict[str, Any] = {}
    for entry in record["methods"]:
        if entry["quantization"] == "none":
            del entry["quantization"]
        else:
            found["packed_versions"] = _packed_versions(entry["quantization"])
    if campaign.processes > 1:
        found["processes"] = campaign.processes
    if campaign.accelerate_config is not None:
        file = check_launcher(base / campaign.accelerate_config)
        found["accelerate_config"] = {"file": campaign.accelerate_config, "digest": digest_of(file)}
    if campaign.evaluation is not None:
        found["evaluation"] = resolved_pack(campaign.evaluation, base)
    return found


def _packed_versions(quantization: str) -> dict[str, str]:
    """Versions of what packs a base model; refused where it is not installed."""
    from ..quantized import quantization_config  # late: it loads torch

    quantization_config(quantization)
    return {"bitsandbytes": version("bitsandbytes")}


def digest_of(path: Path) -> str | None:
    """SHA-256 of a file, or of names and contents of the files of a folder; None where there is neither.

    What a hub id stands for is not known before it is loaded: cells compare the rows and the shape they found instead.
    """
    if not path.exists():
        return None
    content = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    for file in files:
        if file != path:
            content.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
    return content.hexdigest()


def changes(old: Any, new: Any, place: str = "") -> list[str]:
    """The differences of two plain records, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        pairs = [(f"{place}.{key}" if place else str(key), old.get(key), new.get(key)) for key in keys]
    elif isinstance(old, list) and isinstance(new, list) and _named(old) and _named(new):
        by_name = [{entry["name"]: entry for entry in entries} for entries in (old, new)]
        return changes(by_name[0], by_name[1], place)
    else:
        return [] if old == new else [f"{place}: {json.dumps(old)} -> {json.dumps(new)}"]
    return [line for where, before, after in pairs for line in changes(before, after, where)]


def _named(entries: list[Any]) -> bool:
    return all(isinstance(entry, dict) and "name" in entry for entry in entries)


# --- cells ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run of a campaign."""

    content: dict[str, Any]
    """Everything that its result depends on, as plain JSON types."""

    def __hash__(self) -> int:
        return hash(self.digest)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(canonical(self.content).encode()).hexdigest()

    @functools.cached_property
    def folder_name(self) -> str:
        """Readable beginning, unique end."""
        content = self.content
        words = [content["kind"], content["model"]["name"], content["task"]["name"], content["method"]["name"]]
        words.append(f"{content['learning_rate']:g}" if content["kind"] == "grid" else f"s{content['seed']}")
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words))
        return f"{slug[:100]}-{self.digest[:12]}"

    @property
    def group(self) -> tuple[str, str, str]:
        """Model, task and method: the cells that share a grid of learning rates."""
        return self.content["model"]["name"], self.content["task"]["name"], self.content["method"]["name"]


def cells(spec: Mapping[str, Any]) -> list[Cell]:
    """The cells of a resolved spec, in the order they run: the runs seed after seed, and a task's grids before them.

    The methods of a seed run one after the other: what is compared meets the same hour of the machine, and a campaign
    that is cut short has whole seeds. Evaluations come last. PEFT's other adapters, transformers' Trainer and packed
    base models have no predicted time, so they have no cell at equal time.
    """
    runs = list(_runs(spec))
    grids: dict[tuple[str, str], list[Cell]] = {}
    for run in runs:
        grids.setdefault(run.group[:2], []).extend(grid_of(run))
    trained = dict.fromkeys(cell for run in runs for cell in [*grids[run.group[:2]], run])
    pack = spec.get("evaluation")
    return [*trained, *(evaluation_of(run, pack) for run in runs if pack is not None and _is_asked(run, pack))]


def _runs(spec: Mapping[str, Any]) -> Iterator[Cell]:
    common = {key: spec[key] for key in (*SHARED, *LATER) if key in spec}
    keys = ("learning_rates", "grid_steps", "steps", "evaluations", "other_text", "other_rows")
    measured = {key: spec[key] for key in keys}
    places = [(match, model, task) for match in spec["match"] for model in spec["models"] for task in spec["tasks"]]
    for match, model, task in places:
        for seed in spec["seeds"]:
            for method in spec["methods"]:
                if match != "steps" and not has_counted_time(method):
                    continue
                versions = spec["packed_versions"] if is_packed(method) else {}
                for draw in range(method["draws"]):
                    yield Cell(
                        {
                            "kind": "run",
                            **common,
                            **measured,
                            "versions": {**spec["versions"], **versions},
                            "model": model,
                            "task": task,
                            "method": _without_draws(method),
                            **_matched_method(method, spec["methods"]),
                            "match": match,
                            "seed": seed,
                            "draw": draw,
                        }
                    )


def _without_draws(method: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in method.items() if key != "draws"}


def _matched_method(method: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entry that ``params_of`` names, as a part of the content; nothing where METHODS has the same."""
    name = method.get("params_of")
    given = next((_without_draws(entry) for entry in methods if entry["name"] == name), None)
    if given is None or (name in METHODS and Method(**given) == Method(name=name, **METHODS[name])):
        return {}
    return {"matched_method": given}


def grid_of(run: Cell) -> list[Cell]:
    """The cells whose outcome gives a run its learning rate; none where only one rate is allowed."""
    keys = (*SHARED, *LATER, "model", "task", "method", "matched_method")
    shared = {key: run.content[key] for key in keys if key in run.content}
    shared["steps"] = run.content["grid_steps"]
    rates = run.content["learning_rates"]
    return [Cell({"kind": "grid", **shared, "learning_rate": rate}) for rate in rates if len(rates) > 1]


def evaluation_of(run: Cell, pack: Mapping[str, Any]) -> Cell:
    """The cell that asks a run's adapter what the pack says."""
    asked = {key: value for key, value in pack.items() if key not in CHOICES}
    return Cell({**run.content, "kind": "evaluation", "evaluation": asked})


def run_behind(evaluation: Cell) -> Cell:
    """The run whose adapter an evaluation asks."""
    content = {key: value for key, value in evaluation.content.items() if key != "evaluation"}
    return Cell({**content, "kind": "run"})


def _is_asked(run: Cell, pack: Mapping[str, Any]) -> bool:
    named = {"methods": run.content["method"]["name"], "match": run.content["match"]}
    return all(pack.get(key) is None or name in pack[key] for key, name in named.items())
