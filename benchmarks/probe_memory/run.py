"""Highest resident memory of a probe on a model of a billion weights, against forward and backward alone."""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
VARIANTS = ("floor", "exact", "gram")
NUM_TOKENS, ROUNDS = 256, 2
LIMITS = {"exact": 1.20, "gram": 1.10}


def measure(variant: str) -> dict[str, Any]:
    """One run in this process: resident bytes before it, and the highest during it."""
    sys.path.insert(0, str(CHECKOUT / "src"))
    import torch

    from aletheia_lora.loss import labelled_loss
    from aletheia_lora.probe import probe

    model = billion()
    tokens = torch.randint(3, 128_000, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark, proc(5)
    if variant == "floor":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        labelled_loss(model, batch).backward()
    else:
        probe(model, [batch], mode=variant)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    return {"variant": variant, "before_bytes": before, "peak_bytes": resident("VmHWM"), "num_params": num_params}


def billion() -> Any:
    """Llama-3.2-1B's shapes with random weights, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def resident(field: str) -> int:
    """Bytes, from the kernel's account of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def table(records: list[dict[str, Any]]) -> str:
    """The records as lines of a table."""
    peak = {
        variant: statistics.median(r["peak_bytes"] for r in records if r["variant"] == variant) for variant in VARIANTS
    }
    weights = 2 * records[0]["num_params"]
    lines = [
        f"{records[0]['num_params']:,} weights, {weights / 1e9:.2f} GB; medians over rounds",
        "| run | rounds | highest resident GB | against floor | rule |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for variant in VARIANTS:
        rounds = sum(record["variant"] == variant for record in records)
        ratio = peak[variant] / peak["floor"]
        limit = LIMITS.get(variant)
        rule = "" if limit is None else f"below {limit:.2f}: {'holds' if ratio < limit else 'FAILS'}"
        lines.append(f"| {variant} | {rounds} | {peak[variant] / 1e9:.2f} | {ratio:.3f} | {rule} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--print", action="store_true", help="print the table from the records and stop")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    if not arguments.print:
        with (HERE / "records.jsonl").open("w", encoding="utf-8") as stream:
            for round_idx in range(arguments.rounds):
                for variant in VARIANTS:
                    command = [sys.executable, __file__, "--one", variant]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    record = {"round": round_idx, **json.loads(done.stdout.splitlines()[-1])}
                    print(record, file=sys.stderr, flush=True)
                    stream.write(json.dumps(record) + "\n")
                    stream.flush()
        sys.path.insert(0, str(CHECKOUT / "src"))
        from aletheia_lora.environment import environment

        (HERE / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
    print(table([json.loads(line) for line in (HERE / "records.jsonl").read_text().splitlines()]))


if __name__ == "__main__":
    main()
