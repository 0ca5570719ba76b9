"""Predicted against measured: seconds and peak memory of a training step, for 24 choices of layers on one model."""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "src"))

LAYERS = {
    "all": range(30),
    "last 22": range(8, 30),
    "last 15": range(15, 30),
    "last 8": range(22, 30),
    "middle 15": range(9, 24),
    "every second": range(1, 30, 2),
}
CHOICES = [
    {"name": name, "layers": [*layers], "rank": rank, "checkpointing": checkpointing}
    for checkpointing in (False, True)
    for rank in (8, 32)
    for name, layers in LAYERS.items()
]
SEED, BATCH_SIZE, NUM_ROWS, MAX_LENGTH = 0, 4, 256, 512
SETTINGS = {"probe_batches": 4, "batch_size": BATCH_SIZE, "seed": SEED}


class Arm:
    """One choice, ready to take steps on a batch."""

    def __init__(self, model, found, choice):
        import torch

        from aletheia_lora.adapter import attach, shared_copy
        from aletheia_lora.allocation import AllocationOptions, allocate
        from aletheia_lora.fast_lora import FastLora
        from aletheia_lora.training.truncation import Truncation
        from aletheia_lora.training.unpadded import Unpadded

        ranks = allocate(found, choice["layers"], "uniform", AllocationOptions(rank=choice["rank"]))
        twin = shared_copy(model).train()
        if choice["checkpointing"]:
            twin.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = attach(twin, found, ranks, seed=SEED)
        Truncation(twin, min(choice["layers"]))
        FastLora(self.model)
        self.unpadded = Unpadded(twin)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self, batch):
        """Forward, backward and update; its seconds."""
        import torch

        from aletheia_lora.loss import labelled_loss

        wait = torch.cuda.synchronize if batch["input_ids"].is_cuda else (lambda: None)
        wait()
        started = time.perf_counter()
        labelled_loss(self.model, self.unpadded.batch(self.model, batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait()
        return time.perf_counter() - started


def prepared(device):
    """The embedded model on the device, and its rows in tokens."""
    from aletheia_lora.data import tokenize
    from aletheia_lora.embedded import load_embedded_model, standard_library_rows

    model, tokenizer = load_embedded_model()
    rows = tokenize(standard_library_rows()[:NUM_ROWS], tokenizer, max_length=MAX_LENGTH)
    return model.to(device), rows


def all_batches(rows, device):
    """Every batch of the data, in one order."""
    from aletheia_lora.data import batches

    return [{key: value.to(device) for key, value in batch.items()} for batch in batches(list(rows), BATCH_SIZE, 0)]


def predictions(model, rows):
    """One calibration; what it predicts for every choice, with what counting alone predicts beside it."""
    from aletheia_lora.plan_options import PlanOptions
    from aletheia_lora.planning import probe_rows
    from aletheia_lora.prediction import probe_cost, probe_memory

    found, measured = probe_rows(model, rows, PlanOptions(**SETTINGS))
    memory = probe_memory(found, measured, BATCH_SIZE, model=model)
    costs = {
        name: probe_cost(found, measured, BATCH_SIZE, calibrate=name == "calibrated")
        for name in ("calibrated", "counted")
    }
    made = []
    for choice in CHOICES:
        how = {"rank": choice["rank"], "checkpointing": choice["checkpointing"]}
        calibrated = costs["calibrated"]
        made.append(
            {
                "seconds": calibrated.step(choice["layers"], **how),
                "ratio": calibrated.step(choice["layers"], **how) / calibrated.uniform(),
                "counted_ratio": costs["counted"].step(choice["layers"], **how) / costs["counted"].uniform(),
                "bytes": memory.step(choice["layers"], **how) - memory.weights,
            }
        )
    return found, made, measured.seconds


def peak_bytes(index, device):
    """Highest memory of three steps of one choice on its longest batch, above that of the loaded model alone."""
    import torch

    from aletheia_lora.anatomy import anatomy

    def resident(field):
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

    model, rows = prepared(device)
    longest = max(all_batches(rows, device), key=lambda batch: batch["input_ids"].shape[1])
    with torch.no_grad():  # wake the libraries up and read every weight
        model(longest["input_ids"][:1, :32])
    cuda = longest["input_ids"].is_cuda
    before = torch.cuda.memory_allocated() if cuda else resident("VmRSS")
    arm = Arm(model, anatomy(model), CHOICES[index])
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):  # the optimizer's moments appear with the first
        arm.step(longest)
    return (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before


def measure(arguments):
    """All choices in turns for time, each in a fresh process for memory; one record a choice."""
    from aletheia_lora.environment import environment

    chosen = list(range(len(CHOICES)))[: arguments.choices]
    model, rows = prepared(arguments.device)
    found, predicted, probe_seconds = predictions(model, rows)
    arms = {index: Arm(model, found, CHOICES[index]) for index in chosen}
    batches = all_batches(rows, arguments.device)
    for arm in arms.values():
        arm.step(batches[0])
    seconds = {index: [] for index in chosen}
    for turn in range(arguments.steps):
        batch = batches[turn % len(batches)]
        for index in chosen:
            seconds[index].append(arms[index].step(batch))
    del arms, model
    records = []
    for index in chosen:
        child = [sys.executable, __file__, "--peak", str(index), "--device", arguments.device]
        done = subprocess.run(child, capture_output=True, text=True)
        measured = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        records.append(
            {
                **CHOICES[index],
                "predicted": predicted[index],
                "step_seconds": seconds[index],
                "peak_bytes": measured,
                "failed": done.stderr[-300:] if measured is None else None,
                "probe_seconds": probe_seconds,
            }
        )
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (arguments.output / "records.jsonl").write_text(lines)
    (arguments.output / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


def show(folder):
    """The table and the mean absolute errors, from the records alone."""
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    errors = {"seconds": [], "calibrated ratio": [], "counted ratio": [], "bytes": []}
    # Mean, because the prediction is for the average batch; the yardstick is uniform LoRA of the first choice.
    base = records[0]
    print("| choice | rank | checkpointing | s, predicted | s, measured | MiB, predicted | MiB, measured |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for record in records:
        predicted, measured = record["predicted"], statistics.mean(record["step_seconds"])
        ratio = measured / statistics.mean(base["step_seconds"])
        errors["seconds"].append(predicted["seconds"] / measured - 1)
        for name, key in (("calibrated ratio", "ratio"), ("counted ratio", "counted_ratio")):
            errors[name].append(predicted[key] / base["predicted"][key] / ratio - 1)
        peak = record["peak_bytes"]
        if peak is not None:
            errors["bytes"].append(predicted["bytes"] / peak - 1)
        shown = "failed" if peak is None else f"{peak / 2**20:.0f}"
        print(
            f"| {record['name']} | {record['rank']} | {'on' if record['checkpointing'] else 'off'} "
            f"| {predicted['seconds']:.3f} | {measured:.3f} | {predicted['bytes'] / 2**20:.0f} | {shown} |"
        )
    for name, values in errors.items():
        if values:
            mean = statistics.mean(abs(value) for value in values)
            print(f"{name}: mean absolute error {mean:.1%}, largest {max(map(abs, values)):.1%}, n = {len(values)}")


def main():
    """Measure and show, or one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each choice")
    parser.add_argument("--choices", type=int, default=len(CHOICES), help="only the first so many")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=HERE, help="folder for the records")
    parser.add_argument("--print", action="store_true", help="show the records again, measure nothing")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak is not None:
        print(peak_bytes(arguments.peak, arguments.device))
        return
    if not arguments.print:
        arguments.output.mkdir(parents=True, exist_ok=True)
        measure(arguments)
    show(arguments.output)


if __name__ == "__main__":
    main()
