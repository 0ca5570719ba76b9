"""The README's table of results, made from the committed records alone: `python benchmarks/readme_table.py`."""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).resolve().parent


def step_rows(record: dict) -> list[str]:
    """One row for each run of the step-time benchmark."""
    arms = {arm["name"]: arm for arm in record["arms"]}
    rows = ["| run | layers | step speed | held-out loss | training time |", "| --- | --- | --- | --- | --- |"]
    for arm in record["arms"]:
        chosen, loss = arm["layers"], arm["final_heldout_loss"]
        shared = min(len(arm["step_seconds"]), len(arms["uniform"]["step_seconds"]))  # batches differ in length
        base, own = (statistics.median(one["step_seconds"][1:shared]) for one in (arms["uniform"], arm))
        after = "timed only" if loss is None else f"{loss:.3f} after {arm['steps']} steps"
        time = "" if loss is None else f"{arm['total_seconds'] / arms['uniform']['total_seconds']:.2f} of uniform"
        where = f"{len(chosen)} of {record['num_layers']}, lowest {chosen[0]}"
        rows.append(f"| {arm['title']} | {where} | {base / own:.2f}x | {after} | {time} |")
    return rows


def probe_sentence(records: list[dict]) -> str:
    """What the probe costs beside the public package's."""
    middle = {
        variant: statistics.median(r["probe_seconds"] for r in records if r["variant"] == variant)
        for variant in {r["variant"] for r in records}
    }
    shares = ", ".join(f"{v} {middle[v] / middle['reference']:.2f}" for v in ("exact", "gram", "auto"))
    return f"The probe takes this share of the public package's time, with the same selection: {shares}."


def table() -> str:
    """The whole section."""
    record = json.loads((HERE / "step_time" / "compare.json").read_text())
    records = [json.loads(line) for line in (HERE / "probe" / "records.jsonl").read_text().splitlines()]
    return "\n".join([*step_rows(record), "", probe_sentence(records)])


if __name__ == "__main__":
    print(table())
