"""Computes every number of an evaluation anew from its items, with nothing of the package, and compares.

Usage: python scripts/recompute_evaluation.py FOLDER
FOLDER holds evaluation.json and items.jsonl. Exits with 1 and names each number that differs.
"""

import json
import math
import statistics
import sys
from pathlib import Path

TOLERANCE = 1e-9


def number(items, metric):
    """The value of one metric over items."""
    if metric.endswith(("_perplexity", "_per_byte")):
        unit = "num_words" if metric.startswith("word") else "num_bytes"
        nats = -sum(item["scores"]["loglikelihood"] for item in items) / sum(item["scores"][unit] for item in items)
        return nats / math.log(2) if metric == "bits_per_byte" else math.exp(nats)
    return statistics.fmean(item["scores"][metric] for item in items)


def share(items, is_so):
    """Share of the generated answers that are so; None where nothing was generated."""
    generated = [item for item in items if item["stop_reason"] != "scored"]
    return sum(map(is_so, generated)) / len(generated) if generated else None


def differ(left, right):
    """Whether two numbers differ by more than rounding; None equals None only."""
    if left is None or right is None:
        return left is not right
    return not math.isclose(left, right, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def complaints(record, items):
    """Every place where the record does not follow from the items."""
    keys = [(item["label"], item["task"], item["item_id"]) for item in items]
    if len(set(keys)) != len(keys):
        yield "an item is there twice"
    asked = {label: {key[1:] for key in keys if key[0] == label} for label in record["adapters"]}
    if len({frozenset(ids) for ids in asked.values()}) > 1 or set(asked) != {key[0] for key in keys}:
        yield "not every model answered the same items"
    for row in record["table"]:
        tasks = record["groups"].get(row["task"], [row["task"]])
        for label, value in row["values"].items():
            mine = [item for item in items if item["task"] in tasks and item["label"] == label]
            where = f"{label}, {row['task']}, {row['metric']}"
            if len(mine) != row["num_items"]:
                yield f"{where}: {row['num_items']} items in the table, {len(mine)} lines"
            elif differ(number(mine, row["metric"]), value["value"]):
                yield f"{where}: {value['value']} in the table, {number(mine, row['metric'])} from the items"
            elif value["standard_error"] is not None:
                spread = statistics.stdev(item["scores"][row["metric"]] for item in mine) / math.sqrt(len(mine))
                if differ(spread, value["standard_error"]):
                    yield f"{where}: standard error {value['standard_error']} in the table, {spread} from the items"
    for rate in record["rates"]:
        mine = [item for item in items if (item["label"], item["task"]) == (rate["label"], rate["task"])]
        found = {
            "empty": share(mine, lambda item: not item["response"].strip()),
            "capped": share(mine, lambda item: item["stop_reason"] == "length"),
            "truncated": sum(item["prompt_truncated"] for item in mine) / len(mine),
            "forgeable": sum(bool(item["details"].get("forgeable")) for item in mine) / len(mine),
        }
        for kind, value in found.items():
            if differ(value, rate[kind]):
                yield f"{rate['label']}, {rate['task']}: rate {kind} is {rate[kind]}, {value} from the items"


def main():
    folder = Path(sys.argv[1])
    record = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    lines = (folder / "items.jsonl").read_text(encoding="utf-8").split("\n")  # splitlines would cut inside answers
    items = [json.loads(line) for line in lines if line]
    found = list(complaints(record, items))
    print("\n".join(found) or f"{len(record['table'])} rows of the table follow from {len(items)} items")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
