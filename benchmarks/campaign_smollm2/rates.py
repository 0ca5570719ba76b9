"""What a learning rate decides, beside what a choice of layers does: uniform LoRA at 2e-3 where the grid chose 4e-3."""

import csv
import json
import statistics
from pathlib import Path

from scipy import stats

HERE = Path(__file__).resolve().parent
CAMPAIGNS = {"gsm8k": HERE / "records", "instruct": HERE / "confirmation"}
MATCHES = ("steps", "time")  # uniform LoRA takes the same steps in both, so it was made again once


def at_2e3(task):
    """Seed -> held-out loss of uniform LoRA made again."""
    found = {}
    for file in sorted((HERE / "rates" / task).glob("cells/run-*/record.json")):
        seed = json.loads(file.with_name("cell.json").read_text())["seed"]
        found[seed] = json.loads(file.read_text())["result"]["heldout_loss"]
    return found


def losses(folder):
    """(match, task, method, seed) -> held-out loss, the mean over draws."""
    found = {}
    for row in csv.DictReader((folder / "runs.csv").read_text().splitlines()):
        key = (row["match"], row["task"], row["method"], int(row["seed"]))
        found.setdefault(key, []).append(float(row["heldout_loss"]))
    return {key: statistics.fmean(values) for key, values in found.items()}


def interval(differences):
    """Mean and 95 % t interval."""
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return f"{statistics.fmean(differences):+.3f} ({low:+.3f} to {high:+.3f})"


def main():
    """Uniform LoRA at both rates, run by run; then every method beside it at the better one."""
    print("| task | seed | uniform at the grid's 4e-3 | at 2e-3 | at 2e-3, minus random layers at equal steps |")
    print("| --- | --- | --- | --- | --- |")
    for task, folder in CAMPAIGNS.items():
        known = losses(folder)
        for seed, loss in at_2e3(task).items():
            before, chance = (known["steps", task, method, seed] for method in ("uniform", "random"))
            print(f"| {task} | {seed} | {before:.4f} | {loss:.4f} | {loss - chance:+.4f} |")
    for task, folder in CAMPAIGNS.items():
        known = losses(folder)
        yardstick = {(task, seed): loss for seed, loss in at_2e3(task).items()}
        if task == "gsm8k":  # on code the grid had chosen 2e-3
            yardstick |= {("code", seed): known["steps", "code", "uniform", seed] for _, seed in yardstick}
        tasks = " and ".join(dict.fromkeys(name for name, _ in yardstick))
        print(f"\n| minus uniform at 2e-3, {tasks} | equal steps | equal time |\n| --- | --- | --- |")
        for method in dict.fromkeys(key[2] for key in known if key[2] != "uniform"):
            shown = [
                interval([known[match, name, method, seed] - loss for (name, seed), loss in yardstick.items()])
                for match in MATCHES
            ]
            print(f"| {method} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
