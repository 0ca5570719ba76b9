"""A resolved configuration -> what a command does, as a plain record: doctor, probe, plan, train, compare.

Commands differ from library calls only in that they load the model and the data by name and write files.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from .activations import without_contents
from .allocation import ALLOCATIONS
from .anatomy import ModelAnatomy, anatomy
from .calibration import measured_rate
from .comparison import CompareOptions, compare
from .comparison.forgotten import Margins, forgotten
from .data import Parts, TokenizedRows, split, tokenize
from .embedded import load_embedded_model, split_by_module, standard_library_rows
from .errors import ConfigError, UnsupportedModelError, nearest
from .evaluation.evaluate import EvaluationOptions, Prepared, evaluate, prepare
from .files import check_output, check_writable, write_bytes, write_json
from .memory import device_memory, parse_bytes
from .methods import METHODS
from .outlook import OutlookOptions, auto_class, model_from_config, outlook, outlook_text
from .plan_options import PlanOptions
from .planning import Plan, allocation_options, plan_from_probe
from .probing import probe_rows
from .processes import on_main, together, world_size
from .quantized import plain_tensors, quantization_config
from .report.page import finding, write_page
from .report.plots import plot_pareto, plot_probe_scores
from .rows import load_rows
from .run_config import GROUPS, RunConfig
from .scores import SCORES, layer_scores
from .selection import STRATEGIES
from .training.checkpoint import checkpoints_of, kept_plan
from .training.push import check_can_push, push
from .training.run import TrainOptions, train_adapter

Say = Callable[[str], None]
EMBEDDED = "embedded"
WEIGHT_FILES = frozenset({".safetensors", ".bin", ".gguf", ".pt"})
EMBEDDED_NAMES = {"model": "SmolLM2-135M-Instruct", "data": "docstrings of the Python standard library"}


def run_doctor(config: RunConfig, say: Say) -> dict[str, Any]:
    """What can be adapted in this model, what not, and why.

    Weights that lie at hand are loaded, and so checked; of a hub id or a folder with no more than a ``config.json`` the
    configuration alone is read, unless it says that weights are quantized.
    """
    found, read_from = _examine(config, say)
    return {
        "read_from": read_from,
        "architecture": found.architecture,
        "model_type": found.model_type,
        "num_layers": found.num_layers,
        "num_params": found.num_params,
        "fingerprint": found.fingerprint,
        "adaptable_share": found.adaptable_share,
        "modules_per_kind": dict(Counter(module.kind for module in found.modules)),
        "storage": dict(Counter(module.storage for module in found.modules)),
        "left_out": found.left_out_reasons,
        "trial_forward": found.trial_forward,
        "layers": [
            {
                "layer_idx": layer.layer_idx,
                "num_params": layer.num_params,
                "modules": [module.name.removeprefix(f"{layer.name}.") for module in layer.modules],
                "left_out": {
                    item.name.removeprefix(f"{layer.name}."): item.reason
                    for item in found.left_out
                    if item.layer_idx == layer.layer_idx
                },
            }
            for layer in found.layers
        ],
    }


def run_probe(config: RunConfig, say: Say) -> dict[str, Any]:
    """Probe and score; writes ``scores.json`` and ``scores.png`` into the output folder, if one is given."""
    folder = on_main(lambda: _folder(config), "making the output folder")
    _given_plan(config)
    model, tokenizer, parts = _model_and_data(config, say)
    say(f"probing {config.probe_batches} batches")
    _, measured = probe_rows(model, parts.probe, _plan_options(config), tokenizer=tokenizer, progress=True)

    def finish() -> dict[str, Any]:
        scores = layer_scores(config.score, measured, model=model, rng=np.random.default_rng(config.seed))
        record = measured.to_dict()
        if config.score != "gradient_norm":  # spread, errors and overlap are of the gradient norms
            derived = ("scores", "standard_errors", "spread", "split_half_overlap")
            record["gradient_norm"] = {key: record.pop(key) for key in derived}
        record["score"], record["scores"] = config.score, [scores[layer] for layer in sorted(scores)]
        if folder is not None:
            record["files"] = [str(write_json(folder / "scores.json", record))]
            errors = measured.standard_errors().tolist() if config.score == "gradient_norm" else None
            picture = plot_probe_scores(record["scores"], errors, score=config.score)
            record["files"].append(str(write_bytes(folder / "scores.png", picture)))
        return record

    return on_main(finish, "scoring")


def run_plan(config: RunConfig, say: Say) -> dict[str, Any]:
    """Plan what to adapt; writes ``plan.json`` and ``plan.png``, the Pareto plot, to the output, if one is given."""
    target = config.output
    if target is not None:
        target = target if target.suffix == ".json" else target / "plan.json"
        folder = target.parent
        on_main(lambda: check_writable(folder), "making the output folder")
    given = _given_plan(config)
    made = _plan(config, say, given, *_model_and_data(config, say))
    if target is not None:
        file, picture = target, target.with_suffix(".png")
        on_main(lambda: (made.save(file), write_bytes(picture, _pareto_picture(made))), "writing the plan")
        say(f"wrote {file} and {picture.name}")
    return {**made.to_dict(), "text": str(made), "file": None if target is None else str(target)}


def _pareto_picture(made: Plan) -> bytes:
    record = made.to_dict()
    points = [{**point, "num_layers": len(point["layers"])} for point in record["pareto"]]
    return plot_pareto({"selection": record["selection"], "pareto": points})


def preview_plan(config: RunConfig, say: Say) -> dict[str, Any]:
    """What training would take, from the model's configuration alone: no weights, no data, no scores.

    Raises:
        UnsupportedModelError: If the configuration is not one of a causal language model.
        ConfigError: If the device cannot be used, or for int8 weights, which are not predicted.
        PlanError: If ``memory_budget`` is not a number of bytes, a target matches nothing, or a rank is too large.
    """
    transformers_logging.set_verbosity_error()
    _given_plan(config)
    if config.quantization == "int8":
        raise ConfigError("quantization='int8': a dry run predicts bfloat16 and 4-bit weights. Leave it out.")
    budget = parse_bytes(config.memory_budget)
    unpacked = config.model_copy(update={"quantization": None})
    model = model_from_config(load_model(unpacked, say)[0].config if config.model == EMBEDDED else config.model)
    try:
        device = device_of(config)
        if config.tflops is None:
            say(f"measuring the rate of {device}")
        rate = measured_rate(device, _rate_dtype(device)) if config.tflops is None else config.tflops * 1e12
        options = OutlookOptions(
            batch_size=config.batch_size,
            max_length=config.max_length,
            allocation=config.allocation,
            ranks=allocation_options(_plan_options(config), None),
            operations_per_second=rate,
            rate_from="measured" if config.tflops is None else "given",
            memory_bytes=device_memory(device) if budget is None else budget,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    record = outlook(model, options)
    return {**record, "run": config.model_dump(mode="json"), "text": outlook_text(record)}


def run_train(config: RunConfig, say: Say) -> dict[str, Any]:
    """Train the planned adapters and write the adapter folder; push a copy of it if that was asked for.

    Raises:
        ConfigError: If there is no output folder, or the repository cannot be the one that was asked for.
        OutputError: If the folder cannot be written or the repository not pushed to; found out before training, as far
            as it can be.
    """
    if config.output is None:
        raise ConfigError("output is missing: say which folder to write the adapter to, e.g. --output my-adapter.")
    output = config.output
    on_main(lambda: check_output(output), "looking at the output folder")
    options = TrainOptions(**config.subset(TrainOptions))
    given = _plan_to_go_on_with(config, output, _given_plan(config))
    repository = _repository(config, output)
    model, tokenizer, parts = _model_and_data(config, say)
    made = _plan(config, say, given, model, tokenizer, parts)
    record = train_adapter(
        model,
        tokenizer,
        made,
        parts.train,
        output,
        options,
        model_name=_shown(config, "model"),
        data_name=_shown(config, "data"),
        dataset_id=None if config.data == EMBEDDED or Path(config.data).exists() else config.data,
        probe_rows=parts.probe,
        say=say,
    )
    pushed = None
    if repository is not None:
        say(f"pushing to {repository}")
        pushed = on_main(lambda: push(output, repository, private=config.private), "pushing the adapter")
    return {**record, "text": str(made), "output": str(output), "pushed": pushed}


def _plan_to_go_on_with(config: RunConfig, output: Path, given: Plan | None) -> Plan | None:
    """The plan that was given; else that of a run which was cut off, and which the same command goes on with.

    Raises:
        ConfigError: If that run was told otherwise; says what differs.
    """
    kept = kept_plan(output) if config.checkpoint_every is not None else None
    if given is not None or kept is None:
        return given
    had, wanted = asdict(kept.options), asdict(_plan_options(config))
    changed = [f"{key}: {had[key]} -> {wanted[key]}" for key in had if had[key] != wanted[key]]
    if changed:
        raise ConfigError(
            f"{str(checkpoints_of(output))!r} holds checkpoints of another run ({'; '.join(changed)}). Run the same "
            "command again, or remove the folder to start over."
        )
    return kept


def _repository(config: RunConfig, output: Path) -> str | None:
    """The repository to push to, which is there and can be written; None where nothing is to be pushed."""
    name = config.push_to_hub
    if name is None:
        if config.private:
            raise ConfigError("private was given without push_to_hub. Say which repository, or leave it out.")
        return None
    return on_main(lambda: check_can_push(name, output, private=config.private), "asking the Hub")


def run_compare(config: RunConfig, say: Say) -> dict[str, Any]:
    """Compare the selection with uniform LoRA; writes ``compare.json``, plots and a page into the output folder.

    Raises:
        ConfigError: If several processes were launched: arms take turns in one process, on one clock.
    """
    if world_size() > 1:
        raise ConfigError(
            f"compare runs in one process, but {world_size()} were launched. Start it without a launcher."
        )
    folder = check_writable(config.output if config.output is not None else Path("aletheia-compare"))
    options = CompareOptions(**{**config.subset(CompareOptions), "controls": tuple(config.controls)})
    given = _given_plan(config)
    if config.adapter != "lora":
        raise ConfigError(f"adapter={config.adapter!r}: a comparison is with uniform LoRA. Leave it out, or train.")
    prepared = _prepared(config, config.eval, say) if config.eval else None
    keep = None if prepared is None else folder / "adapters"
    if keep is not None:
        check_output(keep)
    model, tokenizer, parts = _model_and_data(config, say)
    made = _plan(config, say, given, model, tokenizer, parts)
    say(str(made))
    record = compare(
        model,
        tokenizer,
        made,
        parts.train,
        parts.validation,
        options,
        model_name=_shown(config, "model"),
        data_name=_shown(config, "data"),
        keep=keep,
        say=say,
    )
    write_json(folder / "compare.json", record)
    if prepared is not None and keep is not None:
        margins, name = Margins(**config.subset(Margins)), _shown(config, "model")
        lost = forgotten(model, tokenizer, prepared, keep, folder / "evaluation", margins, model_name=name, say=say)
        record = {**record, "forgetting": lost}
        write_json(folder / "compare.json", record)
    made.save(folder / "plan.json")
    page = write_page(record, folder)
    say(finding(record))
    return {**record, "page": str(page)}


def run_eval(config: RunConfig, say: Say) -> dict[str, Any]:
    """Evaluate the model and its adapters; writes ``items.jsonl`` and ``evaluation.json`` into the output folder."""
    folder = config.output if config.output is not None else Path("aletheia-eval")
    prepared = _prepared(config, config.tasks, say)
    model, tokenizer = load_model(config, say)
    record = evaluate(
        model,
        tokenizer,
        prepared,
        folder,
        adapters=[Path(adapter) for adapter in config.adapters],
        model_names=[_shown(config, "model"), config.model, model.name_or_path],
        say=say,
    )
    return {**record, "output": str(folder)}


def _prepared(config: RunConfig, named: Sequence[str], say: Say) -> Prepared:
    """The tasks, loaded; consent and the box for programs are settled then, before a model is there."""
    tasks = tuple(name.strip() for entry in named for name in entry.split(",") if name.strip())
    prepared = prepare(EvaluationOptions(**{**config.subset(EvaluationOptions), "tasks": tasks}))
    for note in prepared.loaded.notes:
        say(note)
    return prepared


def _examine(config: RunConfig, say: Say) -> tuple[ModelAnatomy, str]:
    """The anatomy, and what it was read from: ``weights`` or ``config.json``."""
    transformers_logging.set_verbosity_error()
    source = Path(config.model)
    weights = source.is_dir() and any(file.suffix in WEIGHT_FILES for file in source.iterdir())
    if config.model != EMBEDDED and not weights:
        try:
            described = AutoConfig.from_pretrained(source.parent if source.suffix == ".json" else config.model)
        except (OSError, ValueError):
            described = None  # loading says what is wrong
        if described is not None and getattr(described, "quantization_config", None) is None:
            say(f"reading the configuration of {_shown(config, 'model')}")
            model, mode = without_contents(model_from_config(described))
            with mode:
                return anatomy(model), "config.json"
    return anatomy(load_model(config, say, with_tokenizer=False)[0]), "weights"


def load_model(config: RunConfig, say: Say, *, with_tokenizer: bool = True) -> tuple[Any, Any]:
    """The model and tokenizer that the configuration names, on their device.

    Raises:
        UnsupportedModelError: If nothing of that name can be loaded as a causal language model.
        ConfigError: If the device cannot be used, or the quantization cannot be had.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    say(f"loading {_shown(config, 'model')}")
    device = device_of(config)
    if config.model == EMBEDDED:
        dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        model, tokenizer = load_embedded_model(dtype=dtype, packing=_packing(config, dtype, device))
    else:
        model, tokenizer = _load_by_name(config, device, with_tokenizer=with_tokenizer)
    try:
        if getattr(model, "hf_quantizer", None) is None:  # packed weights are on their device
            model = model.to(device)
        for parameter in model.parameters():  # a mapped file is read when touched: now, not in what is timed later
            for kept in plain_tensors(parameter.detach()):
                kept.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()  # float8 has no sum
        return model, tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device!r} cannot be used: {' '.join(str(error).split())}") from error


def _load_by_name(config: RunConfig, device: str, *, with_tokenizer: bool) -> tuple[Any, Any]:
    """Model and tokenizer of a hub id or folder; packed weights are put on their device."""
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        found = AutoConfig.from_pretrained(config.model)
        packing = _packing(config, found.dtype if dtype == "auto" else dtype, device)
        if getattr(found, "quantization_config", None) is not None:
            if packing:
                raise ConfigError(
                    f"quantization={config.quantization!r}, but {config.model!r} is quantized already. Leave it out."
                )
            packing = {"device_map": {"": device}}
        model = auto_class(found).from_pretrained(config.model, dtype=dtype, **packing)
        return model, AutoTokenizer.from_pretrained(config.model) if with_tokenizer else None
    except ConfigError:
        raise
    except Exception as error:  # broken weights raise what the format's reader raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"cannot load {config.model!r} as a causal language model: {reason} "
            "Expected a hub id, or a folder that save_pretrained wrote."
        ) from error


def _packing(config: RunConfig, dtype: torch.dtype | None, device: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load the weights packed; none unless that was asked for."""
    if config.quantization is None:
        return {}
    return {"quantization_config": quantization_config(config.quantization, dtype), "device_map": {"": device}}


def device_of(config: RunConfig) -> str:
    """The device that the configuration names, ``auto`` resolved; of several GPUs that of this process is current."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device


def _rate_dtype(device: str) -> torch.dtype:
    """What training multiplies in: half precision on a GPU; many CPUs are slower in it than in float32."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def load_parts(config: RunConfig, tokenizer: Any, say: Say) -> Parts:
    """Tokenized rows in three disjoint parts: to probe with, to train on, held out.

    Every command cuts the same parts, also one that needs two of them: a plan made first must not have been probed on
    rows that a comparison holds out later.

    Raises:
        DataError: If the data cannot be read, tokenized, or split.
    """
    say(f"reading {_shown(config, 'data')}")
    probe_rows = config.probe_batches * config.probe_batch_size

    def tokens(rows: Any) -> TokenizedRows:
        found = tokenize(
            rows,
            tokenizer,
            max_length=config.max_length,
            completion_only=config.completion_only,
            prompt_column=config.prompt_column,
            completion_column=config.completion_column,
        )
        if found.num_truncated or found.num_dropped:
            say(
                f"{found.num_truncated} of {len(found) + found.num_dropped} rows were cut to max_length="
                f"{config.max_length}, {found.num_dropped} left out because no label was left to learn from"
            )
        return found

    if config.data == EMBEDDED:
        train_rows, validation_rows = split_by_module(standard_library_rows(), seed=config.seed)
        validation = tokens(validation_rows[: config.validation_rows])
        parts = split(tokens(train_rows[: config.max_rows]), seed=config.seed, probe=probe_rows, validation=0)
        return Parts(probe=parts.probe, train=parts.train, validation=validation)
    rows = load_rows(config.data, split=config.split)[: config.max_rows]
    return split(tokens(rows), seed=config.seed, probe=probe_rows, validation=config.validation_rows)


def _model_and_data(config: RunConfig, say: Say) -> tuple[Any, Any, Parts]:
    def load() -> tuple[Any, Any, Parts]:
        model, tokenizer = load_model(config, say)
        return model, tokenizer, load_parts(config, tokenizer, say)

    return together(load, "loading the model and the data")


def _given_plan(config: RunConfig) -> Plan | None:
    """The plan to use instead of making one; every name and file is checked before anything is loaded.

    Raises:
        ConfigError: If a flag answers what the plan already says, or names no known table entry.
        PlanError: If the file is not a plan.
    """
    for key, table in (("score", SCORES), ("strategy", STRATEGIES), ("allocation", ALLOCATIONS), ("adapter", METHODS)):
        name = getattr(config, key)
        if name not in table:
            raise ConfigError(f"unknown {key} {name!r}. {nearest(name, table)}")
    parse_bytes(config.memory_budget)
    _plan_options(config)
    if config.plan is None:
        return None
    beside = sorted(config.model_fields_set & {*GROUPS["probe"], *GROUPS["plan"], *GROUPS["adapter"]} - {"seed"})
    if beside:
        raise ConfigError(f"{beside[0]} was given beside a plan, which already says it. Leave out one of the two.")
    return Plan.load(config.plan)


def _plan(config: RunConfig, say: Say, given: Plan | None, model: Any, tokenizer: Any, parts: Parts) -> Plan:
    if given is not None:
        given.check_fits(model)
        return given
    say(f"probing {config.probe_batches} batches")
    options = _plan_options(config)
    lengths = [len(row.input_ids) for row in parts.train]
    found, measured = probe_rows(
        model, parts.probe, options, tokenizer=tokenizer, progress=True, row_lengths=lengths or None
    )
    return on_main(lambda: plan_from_probe(found, measured, options, model=model), "planning")


def _plan_options(config: RunConfig) -> PlanOptions:
    names = {
        key: None if (given := getattr(config, key)) is None else tuple(given) for key in ("targets", "modules_to_save")
    }
    return PlanOptions(**{**config.subset(PlanOptions), **names})


def _folder(config: RunConfig) -> Path | None:
    return None if config.output is None else check_writable(config.output)


def _shown(config: RunConfig, what: str) -> str:
    """A name for people: the last part of a path, never the path."""
    value = str(getattr(config, what))
    return EMBEDDED_NAMES[what] if value == EMBEDDED else Path(value).name if Path(value).exists() else value
