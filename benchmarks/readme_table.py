"""The tables in README and docs/findings.md, from the committed records alone: `python benchmarks/readme_table.py`."""

import csv
import json
import statistics
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPLIT = ("uniform", "uniform_aletheia", "selected")
MATCHES = ("steps", "time")


def step_rows(record: dict) -> list[str]:
    """One row for each run of the step-time benchmark."""
    arms = {arm["name"]: arm for arm in record["arms"]}
    rows = ["| run | layers | step speed | held-out loss | training time |", "| --- | --- | --- | --- | --- |"]
    for arm in record["arms"]:
        chosen, loss, ranks = arm["layers"], arm["final_heldout_loss"], ", ".join(map(str, arm["ranks"]))
        after = "timed only" if loss is None else f"{loss:.3f} after {arm['steps']} steps"
        time = "" if loss is None else f"{arm['total_seconds'] / arms['uniform']['total_seconds']:.2f} of uniform"
        where = f"{len(chosen)} of {record['num_layers']}, lowest {chosen[0]}, rank {ranks}"
        speed = step_ratio(arms["uniform"], arm)
        rows.append(f"| {arm['title']} | {where} | {speed:.2f}x | {after} | {time} |")
    return rows


def step_ratio(one: dict, other: dict, shared: int = 1 << 30) -> float:
    """Median step of one run over that of another; batches differ in length, so over the steps that both took."""
    shared = min(shared, len(one["step_seconds"]), len(other["step_seconds"]))
    first, second = (statistics.median(arm["step_seconds"][1:shared]) for arm in (one, other))
    return first / second


def split_sentence(record: dict) -> str:
    """What of the speed is the trainer's, and what the selection's."""
    plain, ours, selected = ({arm["name"]: arm for arm in record["arms"]}[name] for name in SPLIT)
    shared = len(ours["step_seconds"])
    both, trainer, selection = (
        step_ratio(one, other, shared) for one, other in ((plain, selected), (plain, ours), (ours, selected))
    )
    return (
        f"Over the {shared - 1} steps that all three were timed on, the selection was {both:.2f}x as fast as plain "
        f"PEFT: {trainer:.2f}x by our trainer alone, {selection:.2f}x by choosing layers."
    )


def probe_sentence(records: list[dict]) -> str:
    """What the probe costs beside the public package's."""
    middle = {
        variant: statistics.median(r["probe_seconds"] for r in records if r["variant"] == variant)
        for variant in {r["variant"] for r in records}
    }
    shares = ", ".join(f"{v} {middle[v] / middle['reference']:.2f}" for v in ("exact", "gram", "auto"))
    return f"The probe takes this share of the public package's time, with the same selection: {shares}."


def campaign_rows(folder: Path = HERE / "campaign_smollm2" / "records") -> list[str]:
    """What each choice of layers learned beside a random one, at equal steps and at equal time, from the report."""
    ranked, runs, counted = (
        list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
        for name in ("ranking", "runs", "counted")
    )
    heads = ("choice", "layers", "lowest", "steps in uniform's time", *(f"loss at equal {match}" for match in MATCHES))
    rows = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for method in dict.fromkeys(row["method"] for row in ranked if row["match"] == MATCHES[0]):
        own = [run for run in runs if run["method"] == method and run["lowest_backward_layer"]]
        lowest = sorted({int(run["lowest_backward_layer"]) for run in own})
        steps = [float(row["steps"]) for row in counted if row["method"] == method and row["steps"]]
        first = next(row for row in ranked if row["method"] == method)
        taken = f"{statistics.fmean(steps):.0f}" if steps else own[0]["steps"] if own else ""
        where = "-".join(str(layer) for layer in dict.fromkeys((lowest[0], lowest[-1]))) if lowest else ""
        losses = [_beside_chance(ranked, method, match) for match in MATCHES]
        rows.append(f"| {method} | {first['num_layers']} | {where} | {taken} | {' | '.join(losses)} |")
    return rows


def _beside_chance(ranked: list[dict], method: str, match: str) -> str:
    """Mean difference from random layers with its interval and verdict; how many pairs where some are missing."""
    row = next(row for row in ranked if (row["method"], row["match"]) == (method, match))
    if not row["low"]:
        return "not run"
    pairs = "" if row["n"] == row["of"] else f", {row['n']} of {row['of']} pairs"
    ends = " to ".join(f"{float(row[key]):+.3f}" for key in ("low", "high"))
    return f"{float(row['mean']):+.3f} ({ends}): {row['verdict']}{pairs}"


def table() -> str:
    """The README's section."""
    record = json.loads((HERE / "step_time" / "compare.json").read_text())
    records = [json.loads(line) for line in (HERE / "probe" / "records.jsonl").read_text().splitlines()]
    return "\n".join([*step_rows(record), "", split_sentence(record), "", probe_sentence(records)])


if __name__ == "__main__":
    print("\n".join([table(), "", *campaign_rows()]))
