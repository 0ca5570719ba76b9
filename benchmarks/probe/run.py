"""Time and memory of the probe, ours against the public package, in alternating fresh processes."""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
VARIANTS = ("reference", "exact", "gram", "auto", "floor")
NUM_ROWS, NUM_TOKENS = 5, 256


def measure(variant: str, text: Path) -> dict[str, object]:
    """One probe in this process: its seconds, its extra memory, its scores."""
    import contextlib
    import io
    import re
    import time

    import torch

    sys.path.insert(0, str(CHECKOUT / "src"))
    if variant != "reference":
        sys.path = [entry for entry in sys.path if entry != os.environ.get("REFERENCE")]
    model, rows = prepared(text)

    def resident(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(found.group(1)) * 1024

    if variant == "reference":
        for name in [name for name in sys.modules if name.startswith("aletheia_lora")]:
            del sys.modules[name]
        sys.path.insert(0, os.environ["REFERENCE"])
        from aletheia_lora import gradient_probe

        def call() -> dict[int, float]:
            return gradient_probe(model=model, dataset=rows, num_layers=30, probe_batches=NUM_ROWS)
    elif variant == "floor":
        from aletheia_lora.data import as_batches
        from aletheia_lora.loss import labelled_loss

        batches = as_batches(rows, num_batches=NUM_ROWS, seed=42)
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))

        def call() -> None:
            for batch in batches:
                labelled_loss(model, batch).backward()
    else:
        from aletheia_lora.data import as_batches
        from aletheia_lora.probe import probe

        batches = as_batches(rows, num_batches=NUM_ROWS, seed=42)

        def call() -> dict[int, float]:
            return probe(model, batches, mode=variant)

    with torch.no_grad():  # wake the threads and the allocator up, the same for everyone
        model(rows[0]["input_ids"][None, :32])
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        scores = call()
    seconds = time.perf_counter() - started
    return {
        "variant": variant,
        "probe_seconds": seconds,
        "peak_extra_bytes": resident("VmHWM") - before,
        "scores": None if scores is None else [float(scores[layer]) for layer in range(30)],
    }


def prepared(text: Path):
    """The embedded model and rows of tokens."""
    from aletheia_lora.embedded import load_embedded_model

    model, tokenizer = load_embedded_model()
    ids = tokenizer(text.read_text(encoding="utf-8")[:20_000], return_tensors="pt").input_ids[0]
    rows = [ids[start : start + NUM_TOKENS] for start in range(0, NUM_ROWS * NUM_TOKENS, NUM_TOKENS)]
    return model, [{"input_ids": row, "attention_mask": row * 0 + 1} for row in rows]


def report(records: list[dict]) -> None:
    """The ratios, from the records alone."""
    by = {v: [record for record in records if record["variant"] == v] for v in VARIANTS}
    middle = {v: statistics.median(record["probe_seconds"] for record in by[v]) for v in VARIANTS}
    memory = {v: statistics.median(record["peak_extra_bytes"] for record in by[v]) for v in VARIANTS}
    reference = by["reference"][0]["scores"]
    half = set(sorted(range(30), key=lambda layer: -reference[layer])[:15])
    print(
        f"{'variant':10s} {'seconds':>8s} {'of reference':>13s} {'extra MB':>9s} {'score difference':>17s}  same half"
    )
    for v in VARIANTS:
        scores = by[v][0]["scores"]
        ratio = middle[v] / middle["reference"]
        if scores is None:
            print(f"{v:10s} {middle[v]:8.2f} {ratio:13.3f} {memory[v] / 1e6:9.0f}")
            continue
        worst = max(abs(a - b) / b for a, b in zip(scores, reference, strict=True))
        same = set(sorted(range(30), key=lambda layer: -scores[layer])[:15]) == half
        print(f"{v:10s} {middle[v]:8.2f} {ratio:13.3f} {memory[v] / 1e6:9.0f} {worst:17.1e}  {same}")
    print(f"{len(by['reference'])} rounds; medians")


def main() -> None:
    """Run the rounds, or print the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", type=Path, help="folder of `pip install --no-deps --target` of the package")
    parser.add_argument(
        "--text", type=Path, default=CHECKOUT.parent / "shared" / "data" / "wikitext2" / "valid.raw.txt"
    )
    parser.add_argument("--print", action="store_true", help="only print the ratios of the records")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    records_file = HERE / "records.jsonl"
    if options.one:
        print(json.dumps(measure(options.one, options.text)))
        return
    if not options.print:
        sys.path.insert(0, str(CHECKOUT / "src"))
        from aletheia_lora.environment import environment

        environ = {**os.environ, "REFERENCE": str(options.reference.resolve())}
        records = []
        for round_number in range(options.rounds):
            for variant in VARIANTS:
                command = [sys.executable, __file__, "--one", variant, "--text", str(options.text)]
                output = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
                records.append({"round": round_number, **json.loads(output.splitlines()[-1])})
                print(f"{round_number} {variant} {records[-1]['probe_seconds']:.2f} s", file=sys.stderr)
        records_file.write_text("".join(json.dumps(record) + "\n" for record in records))
        (HERE / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    report([json.loads(line) for line in records_file.read_text().splitlines()])


if __name__ == "__main__":
    main()
