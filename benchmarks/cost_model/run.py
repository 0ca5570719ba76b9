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
SETTINGS = {"probe_batches": 4, "batch_size": BATCH_SIZE, "calibrate": True, "seed": SEED}


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


def longest_of(batches):
    """The batch that memory is measured on: the most columns."""
    return max(batches, key=lambda batch: batch["input_ids"].shape[1])


def computed(batch):
    """Tokens that a step computes of this batch, how many of a row each of them meets, and labels to predict.

    Rows are laid end to end where ``Unpadded`` finds that worth it; then a token meets those of its own row.
    """
    from aletheia_lora.training.unpadded import WORTH_IT

    lengths = batch["attention_mask"].sum(dim=1)
    tokens, length = batch["input_ids"].numel(), batch["input_ids"].shape[1]
    if tokens - int(lengths.sum()) > WORTH_IT * tokens:
        tokens, length = int(lengths.sum()), round(float(lengths.square().sum() / lengths.sum()))
    return tokens, length, max(int((batch["labels"][:, 1:] != -100).sum()), 1)


def predictions(model, rows, run_on, longest):
    """One calibration; what it predicts for every choice, with what counting alone predicts beside it.

    Args:
        model: The base model.
        rows: Rows to probe.
        run_on: The batches whose steps are timed, each as often as it is taken: predicted is the mean over them.
        longest: The batch that memory is measured on.
    """
    from aletheia_lora.calibration import calibrated_cost
    from aletheia_lora.cost import StepShape, cost_model
    from aletheia_lora.memory import memory_model
    from aletheia_lora.plan_options import PlanOptions
    from aletheia_lora.probing import probe_rows

    found, measured = probe_rows(model, rows, PlanOptions(**SETTINGS))
    shapes = [
        StepShape(num_tokens=tokens, sequence_length=length, num_labelled_tokens=labels)
        for tokens, length, labels in map(computed, run_on)
    ]
    calibrated = [calibrated_cost(found, shape, measured.timing) for shape in shapes]
    counted = [cost_model(found, shape) for shape in shapes]
    tokens, _, labels = computed(longest)
    num_rows = len(longest["input_ids"])
    memory = memory_model(
        found, num_rows=num_rows, length=-(-tokens // num_rows), num_labelled=labels, model=model
    )  # rows of equal length, together as many tokens as the step computes
    made = []
    for choice in CHOICES:
        how = {"rank": choice["rank"], "checkpointing": choice["checkpointing"]}
        made.append(
            {
                "seconds": statistics.mean(cost.step(choice["layers"], **how) for cost in calibrated),
                "operations": statistics.mean(cost.step(choice["layers"], **how) for cost in counted),
                "bytes": memory.step(choice["layers"], **how) - memory.weights,
            }
        )
    return found, made, measured.seconds


def alive_bytes(arm, batch):
    """Highest bytes of tensors that are alive at a time in a step, above those of the loaded model."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        arm.step(batch)
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = highest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        highest = max(highest, alive)
    trained = sum(parameter.numel() for parameter in arm.model.parameters() if parameter.requires_grad)
    return highest + 12 * trained  # themselves and their moments were there before, in float32


def peak_bytes(index, device):
    """Highest bytes of tensors, and highest memory of the process, in steps of one choice on its longest batch.

    Both above those of the loaded model alone; on a GPU both are the tensors'.
    """
    import torch

    from aletheia_lora.anatomy import anatomy

    def resident(field):
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

    model, rows = prepared(device)
    longest = longest_of(all_batches(rows, device))
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
    if cuda:
        tensors = torch.cuda.max_memory_allocated() - before
        return {"alive": tensors, "resident": tensors}
    highest = resident("VmHWM") - before
    return {"alive": alive_bytes(arm, longest), "resident": highest}


def measure(arguments):
    """All choices in turns for time, each in a fresh process for memory; one record a choice."""
    from aletheia_lora.environment import environment

    chosen = list(range(len(CHOICES)))[: arguments.choices]
    model, rows = prepared(arguments.device)
    batches = all_batches(rows, arguments.device)
    run_on = [batches[turn % len(batches)] for turn in range(arguments.steps)]
    found, predicted, probe_seconds = predictions(model, rows, run_on, longest_of(batches))
    arms = {index: Arm(model, found, CHOICES[index]) for index in chosen}
    for arm in arms.values():
        arm.step(batches[0])
    seconds = {index: [] for index in chosen}
    for turn, batch in enumerate(run_on):
        first = turn % len(chosen)  # whoever comes first pays for what a new shape of batch costs
        for index in [*chosen[first:], *chosen[:first]]:
            seconds[index].append(arms[index].step(batch))
    padded = {index: arms[index].unpadded.turned_off for index in chosen}
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
                "stays_padded": padded[index],
                "peak_bytes": measured,
                "failed": done.stderr[-300:] if measured is None else None,
                "probe_seconds": probe_seconds,
            }
        )
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (arguments.output / "records.jsonl").write_text(lines)
    (arguments.output / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")


def show(folder):
    """The table and the errors, from the records alone; the lowest says how much too low a prediction was at worst."""
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    errors = {"seconds": [], "calibrated ratio": [], "counted ratio": [], "bytes": [], "resident bytes": []}
    # Means over the same batches; the yardstick is uniform LoRA of the first choice.
    base = records[0]
    print("| choice | rank | checkpointing | s, predicted | measured | MiB, predicted | alive | resident |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for record in records:
        predicted, measured = record["predicted"], statistics.mean(record["step_seconds"])
        ratio = measured / statistics.mean(base["step_seconds"])
        errors["seconds"].append(predicted["seconds"] / measured - 1)
        for name, key in (("calibrated ratio", "seconds"), ("counted ratio", "operations")):
            errors[name].append(predicted[key] / base["predicted"][key] / ratio - 1)
        peak = record["peak_bytes"]
        if peak is not None:
            errors["bytes"].append(predicted["bytes"] / peak["alive"] - 1)
            errors["resident bytes"].append(predicted["bytes"] / peak["resident"] - 1)
        shown = "failed | " if peak is None else f"{peak['alive'] / 2**20:.0f} | {peak['resident'] / 2**20:.0f}"
        print(
            f"| {record['name']} | {record['rank']} | {'on' if record['checkpointing'] else 'off'} "
            f"| {predicted['seconds']:.3f} | {measured:.3f} | {predicted['bytes'] / 2**20:.0f} | {shown} |"
        )
    for name, values in errors.items():
        if values:
            mean = statistics.mean(abs(value) for value in values)
            print(
                f"{name}: mean absolute error {mean:.1%}, largest {max(map(abs, values)):.1%}, "
                f"lowest {min(values):+.1%}, n = {len(values)}"
            )


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
        print(json.dumps(peak_bytes(arguments.peak, arguments.device)))
        return
    if not arguments.print:
        arguments.output.mkdir(parents=True, exist_ok=True)
        measure(arguments)
    show(arguments.output)


if __name__ == "__main__":
    main()
