"""Seconds and memory of a training step on the shapes of published models with random weights, on one GPU."""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "src"))

from shapes import FOUR_BIT, SHAPES, TINY, tiny  # noqa: E402

DEVICE_IS_LOST = 3
"""Exit code of a process that recorded a shape after which its device does not answer; a new process may go on."""
GRACE_SECONDS = 30
"""How long after its time a process of measurements may go on before it is ended."""
YARDSTICK = "uniform_peft"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "triton", "bitsandbytes")


def main():
    """Measure and show, or one of the parts."""
    options = parsed()
    if options.inside:
        inside(options)
        return
    if not options.print:
        options.output.mkdir(parents=True, exist_ok=True)
        measure_all(options)
    show(options.output)


def parsed():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--four-bit", action="store_true", help="Qwen2.5-72B in 4 bits instead; needs bitsandbytes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models of these architectures, to try the script")
    parser.add_argument("--length", type=int, choices=(1024, 2048), default=1024, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run")
    parser.add_argument("--without-prefix", action="store_true", help="leave out the replays of a prefix cache")
    parser.add_argument("--limit-seconds", type=float, default=560, help="for everything")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the records")
    parser.add_argument("--print", action="store_true", help="show the records again, measure nothing")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = FOUR_BIT if options.four_bit else SHAPES
    options.only = options.only or [name for name in known if not options.tiny or options.four_bit or name in TINY]
    for name in options.only:
        if name not in known:
            parser.error(f"no shape {name!r}, expected some of: {', '.join(known)}")
    if options.steps < 1:
        parser.error(f"--steps {options.steps}, expected at least 1")
    return options


# --- measuring --------------------------------------------------------------------------------------------------


def measure_all(options):
    """Measure in a process of its own, and in a new one after a shape that takes its process down."""
    until = time.monotonic() + options.limit_seconds
    records = options.output / "records.jsonl"
    records.write_text("")
    left = list(options.only)
    while left:
        seconds = until - time.monotonic()
        ended = "the time of the run was over before it" if seconds <= 0 else child(options, left, seconds)
        done = {record["shape"] for record in read(records)}
        left = [name for name in left if name not in done]
        if left and ended is not None:
            append(records, {"shape": left.pop(0), "failed": ended, "runs": []})


def child(options, names, seconds):
    """Measure these shapes in another process; what went wrong in the first that has no record, None if nothing did."""
    command = [sys.executable, __file__, "--inside", "--only", *names, "--limit-seconds", str(seconds)]
    command += ["--device", options.device, "--length", str(options.length), "--steps", str(options.steps)]
    command += ["--output", str(options.output)]
    for switch in ("four_bit", "tiny", "without_prefix"):
        command += [f"--{switch.replace('_', '-')}"] if getattr(options, switch) else []
    try:
        code = subprocess.run(command, timeout=seconds + GRACE_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return "its process did not stop in time and was ended"
    return None if code == DEVICE_IS_LOST else f"its process ended with exit code {code}"


def inside(options):
    """Measure one shape after the other. A shape may take twice its share of what time is left."""
    from measure import Settings, measured, why_no_device

    until = time.perf_counter() + options.limit_seconds
    records = options.output / "records.jsonl"
    (options.output / "environment.json").write_text(json.dumps(environment(options), indent=1) + "\n")
    length = 32 if options.tiny else options.length
    settings = Settings(options.device, length, options.steps, prefix=not options.without_prefix)
    broken = why_no_device(options.device)
    for number, name in enumerate(options.only):
        shape = (FOUR_BIT if options.four_bit else SHAPES)[name]
        left = until - time.perf_counter()
        if broken or left <= 0:
            failed = f"no device {options.device!r}: {broken}" if broken else "the time of the run was over before it"
            append(records, {"shape": name, "failed": failed, "runs": []})
            continue
        share = min(2 * left / (len(options.only) - number), left)
        record = measured(name, tiny(shape) if options.tiny else shape, settings, share)
        append(records, {**record, "tiny": options.tiny})
        print(f"{name}: {record['wall_seconds']:.0f} s, {record['failed'] or 'done'}", file=sys.stderr, flush=True)
        if why_no_device(options.device):
            sys.exit(DEVICE_IS_LOST)


def environment(options):
    """Versions and hardware, without names of hosts, users or folders."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def found(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    cuda = options.device.startswith("cuda") and torch.cuda.is_available()
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **{package: found(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name(0) if cuda else options.device,
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "limit_seconds": round(options.limit_seconds),
    }


def append(file, record):
    """One more line."""
    with file.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def read(file):
    """All lines; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# --- the report, from the records alone -------------------------------------------------------------------------


def show(folder):
    """A table for each shape, and what half of the layers saves over all of them."""
    records = read(folder / "records.jsonl")
    if not records:
        print("no records: nothing has been measured yet")
        return
    environment_file = folder / "environment.json"
    if environment_file.exists():
        found = json.loads(environment_file.read_text())
        print(f"{found['device']}, torch {found['torch']}, transformers {found['transformers']}, peft {found['peft']}")
    if any(record.get("tiny") for record in records):
        print("tiny models: the figures say only that the script runs")
    for record in records:
        show_shape(record)
    for checkpointing in (False, True):
        show_summary(records, checkpointing)


def show_shape(record):
    """One shape: what it is, the probe, and each run against plain PEFT's uniform LoRA."""
    print(f"\n## {record['shape']}")
    if "num_params" in record:
        of = record["published_layers"]
        cut = "" if record["num_layers"] == of else f" (of {of} as published)"
        print(
            f"{record['num_layers']} layers{cut}, {record['num_params'] / 1e9:.2f}B numbers stored, "
            f"{record['storage']}, {gib(record['weights_bytes'])} GiB; batches of {record['rows']} x {record['length']}"
        )
    if "probe" in record:
        probe = record["probe"]
        plain = seconds_of(record, YARDSTICK, False)
        steps = f", {probe['seconds'] / plain:.1f} steps of plain PEFT" if plain else ""
        print(
            f"probe: {probe['batches']} batches of {probe['rows_per_batch']} in {probe['seconds']:.2f} s{steps}; "
            f"{gib(probe['extra_bytes'])} GiB above the model"
        )
    if record["failed"]:
        print(f"**not finished: {record['failed']}**")
    for checkpointing in (False, True):
        lines = [line for line in record["runs"] if line["checkpointing"] == checkpointing]
        if lines:
            show_runs(record, lines, checkpointing)


def show_runs(record, lines, checkpointing):
    """The table of one shape, with or without checkpointing."""
    print(f"\nactivation checkpointing {'on' if checkpointing else 'off'}\n")
    columns = ("run", "layers", "backward to", "s a step", "n", "rounds won", "speed", "time saved", "peak GiB")
    columns = (*columns, "share of our uniform, predicted", "measured")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    plain = seconds_of(record, YARDSTICK, checkpointing)
    rounds = next((line["step_seconds"] for line in lines if line["run"] == YARDSTICK), [])
    ours = seconds_of(record, "uniform_ours", checkpointing)
    for line in lines:
        seconds = seconds_of(record, line["run"], checkpointing)
        if seconds is None:
            print(f"| {line['run']} | failed: {line['failed']} |" + " |" * (len(columns) - 2))
            continue
        share = line["predicted_share"]["calibrated"]
        won = sum(mine < other for mine, other in zip(line["step_seconds"], rounds, strict=False))
        print(
            f"| {line['run']} | {len(line['layers'])} | {line['lowest_backward_layer']} | {seconds:.4f} "
            f"| {len(line['step_seconds'])} | {won} | {ratio(plain, seconds, '.2f', 'x')} "
            f"| {percent(saved(seconds, plain))} | {gib(line['peak_bytes'])} "
            f"| {share:.2f} | {ratio(seconds, ours, '.2f')} |"
        )
    losses = [line["first_loss"] for line in lines if line.get("first_loss") is not None]
    by = next((line["loss_by"] for line in lines if line["run"] == "uniform_trl" and "loss_by" in line), None)
    if by:
        print(f"\nlogits where labelled: {by}")
    if losses:
        print(f"\nfirst losses, equal but for rounding: {min(losses):.4f} to {max(losses):.4f}")


def show_summary(records, checkpointing):
    """Over all shapes: how much less time a step takes than plain PEFT's uniform LoRA, and on how many it is less."""
    names = list(dict.fromkeys(line["run"] for record in records for line in record["runs"]))
    if not names:
        return
    print(f"\n## All shapes, activation checkpointing {'on' if checkpointing else 'off'}\n")
    print("| run | time saved, mean | least | most | quicker on | of | against our uniform, mean | quicker on | of |")
    print("|" + " --- |" * 9)
    for name in names:
        cells = []
        for base, wanted in ((YARDSTICK, 3), ("uniform_ours", 1)):
            values = []
            for record in records:
                value = saved(seconds_of(record, name, checkpointing), seconds_of(record, base, checkpointing))
                values += [value] if value is not None else []
            of = [statistics.mean(values), min(values), max(values)] if values else [None] * 3
            wins = sum(value > 0 for value in values)
            cells += [*(percent(value) for value in of[:wanted]), str(wins), str(len(values))]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nof {len(records)} shapes; the probe's time, paid once, is not in it and stands above in steps")
    show_prediction_errors(records, checkpointing)


def show_prediction_errors(records, checkpointing):
    """How far the cost model is off, in shares of our uniform LoRA's step, over all runs on our path but that one."""
    errors = {"calibrated": [], "counted": []}
    for record in records:
        ours = seconds_of(record, "uniform_ours", checkpointing)
        for line in record["runs"]:
            seconds = seconds_of(record, line["run"], checkpointing)
            others = line["run"] in ("uniform_ours", "uniform_trl") or line["run"].endswith("_peft")
            if line["checkpointing"] == checkpointing and not others and seconds and ours:
                for source, values in errors.items():
                    values.append(abs(line["predicted_share"][source] / (seconds / ours) - 1))
    for source, values in errors.items():
        if values:
            print(f"share predicted, {source}: mean absolute error {statistics.mean(values):.1%}, n = {len(values)}")


def seconds_of(record, run, checkpointing):
    """Median seconds of a step of this run; None where it failed."""
    for line in record["runs"]:
        if line["run"] == run and line["checkpointing"] == checkpointing and not line["failed"]:
            return statistics.median(line["step_seconds"]) if line["step_seconds"] else None
    return None


def saved(seconds, base):
    """The share of the base's time that is not needed; None where either failed."""
    return None if seconds is None or base is None else 1 - seconds / base


def ratio(seconds, base, form, unit=""):
    """The ratio as text."""
    return "unknown" if seconds is None or not base else f"{seconds / base:{form}}{unit}"


def percent(value):
    """A share as text."""
    return "unknown" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def gib(num_bytes):
    """Bytes as GiB."""
    return "unknown" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


if __name__ == "__main__":
    main()
