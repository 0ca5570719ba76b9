"""Arguments -> the functions of ``runs.py`` -> printed lines; no logic of its own.

Flags are made from the fields of ``RunConfig``, so a flag, a key of the configuration file and a field of the record
are always the same word.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .errors import AletheiaError
from .run_config import GROUPS, RunConfig, resolve

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find the layers worth adapting, LoRA-fine-tune only those, and prove what that saved and cost.",
)
_PLANNING = ("data", "probe", "plan")
DEMO: dict[str, Any] = {
    "probe_batches": 5,
    "steps": 44,
    "max_length": 128,
    "validation_rows": 32,
    "timed_steps": 5,
    "evaluations": 3,
}


def main() -> None:
    """Entry point of the command ``aletheia``."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels that nothing here misses
    try:
        code = app(standalone_mode=False)
        if code == 130:
            _fail("interrupted; nothing half-written was left behind", code=130)
        if isinstance(code, int) and code:
            sys.exit(code)
    except AletheiaError as error:
        _fail(str(error))
    except (ValueError, FileNotFoundError, NotImplementedError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written was left behind", code=130)
    except typer.Abort:
        _fail("interrupted", code=130)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error of the parser
            if error.format_message():
                _fail(error.format_message(), code=int(error.exit_code))
            sys.exit(int(error.exit_code))  # no command: the help was printed
        raise


def _fail(message: str, code: int = 1) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _command(
    name: str,
    help_text: str,
    groups: tuple[str, ...],
    arguments: tuple[str, ...],
    run: str,
    show: Callable[[dict[str, Any]], None],
    preview: str | None = None,
) -> None:
    """Register a command whose flags are the fields of the given groups; ``preview`` runs instead on a dry run."""
    fields = [key for group in groups for key in GROUPS[group]]

    def command(**flags: Any) -> None:
        config = resolve(flags.pop("config"), {k: v for k, v in flags.items() if k not in ("dry_run", "as_json")})
        dry_run = flags["dry_run"] and preview is None
        chosen = preview if flags["dry_run"] and preview is not None else run
        _execute(config, chosen, dry_run=dry_run, as_json=flags["as_json"], show=show)

    parameters = []
    for key in (*arguments, *(key for key in fields if key not in arguments)):
        field = RunConfig.model_fields[key]
        default = field.default if field.default not in (None, []) else "none"
        text = f"{field.description} (default: {default})"
        kind = (
            typer.Argument(help=field.description) if key in arguments else typer.Option(help=text, show_default=False)
        )
        parameters.append(_parameter(key, Annotated[_optional(field.annotation), kind]))
    dry = "Print the resolved run and stop." if preview is None else "Predict from the model's config.json, and stop."
    parameters += [
        _parameter("config", Annotated[Path | None, typer.Option(help="A run.yaml; flags go on top.")]),
        _parameter("dry_run", Annotated[bool, typer.Option("--dry-run", help=dry)], False),
        _parameter(
            "as_json", Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")], False
        ),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=help_text)(command)


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _optional(annotation: Any) -> Any:
    text = str(annotation)
    if "Literal" in text:
        return str | None
    return annotation if "None" in text else annotation | None


def _execute(
    config: RunConfig, run: str, *, dry_run: bool, as_json: bool, show: Callable[[dict[str, Any]], None]
) -> None:
    if dry_run:
        print(config.model_dump_json(indent=None if as_json else 1))
        return
    from . import runs  # late: it loads torch
    from .processes import is_main, joined

    with joined(cpu=runs.device_of(config) == "cpu"):
        record = getattr(runs, run)(config, _say if is_main() else lambda _line: None)
        shown = is_main()
    if not shown:
        return
    if as_json:
        from .files import json_text

        print(json_text(record))
    else:
        show(record)


# --- how each record is shown to a person -----------------------------------------------------------------------------


def _show_doctor(record: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{record['architecture']}: {record['num_layers']} layers, {record['num_params']:,} weights")
    console.print(
        f"can be adapted: {record['adaptable_share']:.1%} of the layers' matrix weights, {record['modules_per_kind']}"
    )
    for reason, count in record["left_out"].items():
        paths = {path for layer in record["layers"] for path, why in layer["left_out"].items() if why == reason}
        console.print(f"left out: {count:,} weights of {', '.join(sorted(paths))}: {reason}", markup=False)
    if record["read_from"] != "weights":
        console.print(f"read from {record['read_from']} alone; no weights were loaded", markup=False)
    if record["trial_forward"] != "ran":
        console.print(f"the trial forward {record['trial_forward']}: unused matrices may be among them", markup=False)


def _show_probe(record: dict[str, Any]) -> None:
    top = max(record["scores"]) or 1.0
    for layer, score in enumerate(record["scores"]):
        print(f"{layer:4d} {score:12.5g} {'█' * round(40 * score / top)}")
    norms = record.get("gradient_norm", record)
    print(
        f"{record['seconds']:.1f} s, {'' if norms is record else 'of the gradient norms: '}spread "
        f"{norms['spread']:.2f}, split-half overlap {norms['split_half_overlap']:.2f}"
    )
    for load in record["expert_loads"]:
        shares = [count / max(sum(load["num_tokens"]), 1) for count in load["num_tokens"]]
        print(
            f"layer {load['layer_idx']}: its {len(shares)} experts got {min(shares):.1%} to {max(shares):.1%} of tokens"
        )
    for file in record.get("files", []):
        print(f"wrote {file}")


def _show_plan(record: dict[str, Any]) -> None:
    print(record["text"])


def _show_train(record: dict[str, Any]) -> None:
    print(record["text"])
    print(f"{record['options']['steps']} steps in {record['seconds']:.0f} s, last loss {record['losses'][-1]:.4f}")
    print(f"backward stopped at layer {record['lowest_backward_layer']} (measured in the first step)")
    print(f"wrote {record['output']}")
    if record["pushed"] is not None:
        print(f"pushed to {record['pushed']}")


def _show_compare(record: dict[str, Any]) -> None:
    from .report.page import finding
    from .report.tables import comparison_table, markdown

    print(markdown(comparison_table(record)))
    print(finding(record))
    print(f"page: {record['page']}")


def _show_eval(record: dict[str, Any]) -> None:
    labels = list(record["adapters"])
    asked = {name.strip() for entry in record["options"]["tasks"] for name in entry.split(",")}
    rows = [["task", "metric", "items", *labels]]
    for row in record["table"]:
        if row["task"] in asked:
            cells = [_with_error(row["values"].get(label)) for label in labels]
            rows.append([row["task"], row["metric"], str(row["num_items"]), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    for line in [*record["notes"], *record["warnings"]]:
        print(line)
    print(f"wrote {record['output']}/evaluation.json, and every answer to items.jsonl beside it")


def _with_error(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    error = value["standard_error"]
    return f"{value['value']:.4g}" if error is None else f"{value['value']:.4f} ± {error:.4f}"


_command(
    "doctor", "What can be adapted in a model, what not and why.", ("model",), ("model",), "run_doctor", _show_doctor
)
_command(
    "probe",
    "Score every layer on your data; --output FOLDER keeps scores.json and a picture.",
    ("model", "data", "probe", "output"),
    ("model", "data"),
    "run_probe",
    _show_probe,
)
_command(
    "plan",
    "Choose layers and ranks, and predict what that saves; --output plan.json keeps it, --dry-run needs no weights.",
    ("model", *_PLANNING, "adapter", "step", "checkpointing", "caching", "plan_only", "output"),
    ("model", "data"),
    "run_plan",
    _show_plan,
    "preview_plan",
)
_command(
    "train",
    "Train an adapter by plan; --output FOLDER takes it.",
    ("model", *_PLANNING, "adapter", "step", "checkpointing", "caching", "train", "train_only", "push", "output"),
    ("model", "data"),
    "run_train",
    _show_train,
)
_command(
    "compare",
    "Selected layers against uniform LoRA (and --controls): same rows, order and steps; a table and a page.",
    ("model", *_PLANNING, "step", "train", "compare", "forgetting", "asking", "output"),
    ("model", "data"),
    "run_compare",
    _show_compare,
)
_command(
    "eval",
    "Score the model, and each adapter on it, on standard tasks: --tasks gsm8k,mmlu; every answer is kept.",
    ("model", "evaluate", "asking", "output"),
    ("model", "adapters"),
    "run_eval",
    _show_eval,
)


@app.command("demo")
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the page, plots and records.")] = Path("aletheia-demo"),
    steps: Annotated[int, typer.Option(help="Optimizer steps of each full run.")] = DEMO["steps"],
    as_json: Annotated[bool, typer.Option("--json", help="Print nothing but the JSON object.")] = False,
) -> None:
    """The whole story on the embedded model and data; the last line printed is one JSON object."""
    from . import runs
    from .files import json_text

    record = runs.run_compare(resolve(None, {**DEMO, "steps": steps, "output": output}), _say)
    if not as_json:
        _show_compare(record)
    print(json_text({**record["summary"], "page": record["page"]}))


# --- campaigns --------------------------------------------------------------------------------------------------------

campaign = typer.Typer(no_args_is_help=True, help="Many runs from one file: interrupted, resumed, never counted twice.")
app.add_typer(campaign, name="campaign")
_Spec = Annotated[Path, typer.Argument(help="The campaign's YAML file.")]
_Output = Annotated[Path | None, typer.Option(help="Its folder; one of its name beside the file if left out.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")]


@campaign.command("run")
def campaign_run(
    spec: _Spec,
    output: _Output = None,
    workers: Annotated[int, typer.Option(help="Cells at a time.")] = 1,
    executor: Annotated[str, typer.Option(help="Where cells run: local, ray or slurm.")] = "local",
    executor_option: Annotated[list[str] | None, typer.Option(help="For it, as key=value; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells with predicted time and disk.")] = False,
    accept_change: Annotated[bool, typer.Option("--accept-change", help="Go on with a spec that changed.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run again what ended badly or was overtaken.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Run every cell that has no record yet; exit code 3 if some did not end well."""
    from .campaign import commands

    if dry_run:
        record = commands.preview(spec, _say)
    else:
        record = commands.run(
            spec,
            output,
            workers=workers,
            executor=executor,
            executor_options=executor_option or [],
            accept_change=accept_change,
            retry_failed=retry_failed,
            say=_say,
        )
    _show_campaign(record, as_json)
    if not dry_run and set(record["states"]) != {"done"}:
        raise typer.Exit(3)


@campaign.command("status")
def campaign_status(
    spec: _Spec,
    output: _Output = None,
    live: Annotated[bool, typer.Option("--live", help="Show it anew every two seconds.")] = False,
    as_json: _Json = False,
) -> None:
    """How far a campaign is, and the time left; also while it runs."""
    from .campaign import commands

    while live and commands.shown_live(spec, output):
        pass
    if not live:
        _show_campaign(commands.status_of(spec, output), as_json)


@campaign.command("report")
def campaign_report(spec: _Spec, output: _Output = None, as_json: _Json = False) -> None:
    """Comparisons, figures and a page from the records alone, written into the campaign's folder; prints the tables."""
    from .campaign import commands

    _show_campaign(commands.report_of(spec, output), as_json)


@campaign.command("export")
def campaign_export(
    spec: _Spec,
    output: _Output = None,
    bundle: Annotated[Path | None, typer.Option(help="Folder to make; beside the campaign's if left out.")] = None,
    as_json: _Json = False,
) -> None:
    """Tables, summary and figures to hand on: no paths, no names of people or machines, no keys."""
    from .campaign import commands

    _show_campaign(commands.export_of(spec, output, bundle), as_json)


@campaign.command("cell", hidden=True)
def campaign_cell(folder: Path, base: Path) -> None:
    """One attempt at a cell, in the process of its own that a driver starts."""
    from .campaign.executors import end_with_parent

    end_with_parent()
    os.chdir(base)
    from .campaign.cell import run_cell  # late: it loads torch

    raise typer.Exit(run_cell(folder, _say))


@campaign.command("part", hidden=True)
def campaign_part(folder: Path, place: Path) -> None:
    """One of several processes that train a cell, as a launcher starts them."""
    from .campaign.executors import end_with_parent

    end_with_parent()
    from .campaign.together import run_part  # late: it loads torch

    raise typer.Exit(run_part(folder, place))


def _show_campaign(record: dict[str, Any], as_json: bool) -> None:
    from .files import json_text

    print(json_text({key: value for key, value in record.items() if key != "text"}) if as_json else record["text"])
