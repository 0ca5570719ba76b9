"""Simulated studies where nothing differs, and where a loss is at the margin: how often the report is wrong."""

import argparse
import json
import math
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from aletheia_lora.files import write_json
from aletheia_lora.statistics import equivalence, holm, mcnemar, paired_difference

FOLDER = Path(__file__).resolve().parent
ALPHA, MARGIN = 0.05, 0.02
CHANGED = 0.03
"""Share of the answers that turn right, and that turn wrong, where nothing is lost."""
SIZES = {"mmlu": 1140, "gsm8k": 660, "humaneval": 100}
SUBJECTS = np.repeat(np.arange(57), 20)
Pair = tuple[np.ndarray, np.ndarray]


def answers(rng: np.random.Generator, task: str, loss: float) -> Pair:
    """Wrong answers (1) of the selection and of uniform LoRA; the selection's are more by ``loss`` on average."""
    gained, lost = CHANGED, CHANGED + loss
    if task == "mmlu":  # what changes differs from subject to subject
        gained, lost = np.repeat(rng.uniform(0, 2 * np.array([[gained], [lost]]), (2, 57)), 20, axis=1)
    draw = rng.uniform(size=SIZES[task])
    return (draw > 1 - lost).astype(float), (draw < gained).astype(float)


def groups_of(task: str) -> np.ndarray | None:
    return SUBJECTS if task == "mmlu" else None


def p_value(task: str, selected: np.ndarray, uniform: np.ndarray) -> float:
    """As the report has it: McNemar's exact test, or the t test by subjects."""
    if groups_of(task) is None:
        return mcnemar(selected, uniform).p_value
    return paired_difference(selected, uniform, groups=groups_of(task), binary=True).t_p_value


def says_equal(task: str, selected: np.ndarray, uniform: np.ndarray) -> bool:
    return equivalence(selected, uniform, margin=MARGIN, groups=groups_of(task), binary=True, alpha=ALPHA).equivalent


def naive_p(differences: np.ndarray) -> float:
    return float(stats.ttest_1samp(differences, 0).pvalue) if np.ptp(differences) else 1.0


def naive_equal(differences: np.ndarray) -> bool:
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))
    return bool(abs(mean) + stats.t.ppf(1 - ALPHA, len(differences) - 1) * error < MARGIN)


def study(rng: np.random.Generator, loss: float) -> dict[str, bool]:
    """One study of three benchmarks: which statements were made."""
    found = {task: answers(rng, task, loss) for task in SIZES}
    differences = {task: selected - uniform for task, (selected, uniform) in found.items()}
    alarms = holm({task: p_value(task, *pair) for task, pair in found.items()}, alpha=ALPHA).rejected
    return {
        "alarm": bool(alarms),
        "naive alarm": any(naive_p(one) < ALPHA for one in differences.values()),
        **{f"equal, {task}": says_equal(task, *pair) for task, pair in found.items()},
        **{f"naive equal, {task}": naive_equal(one) for task, one in differences.items()},
    }


def simulate(num_studies: int, seed: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    records = []
    for kind, loss in (("one adapter twice", 0.0), ("at the margin", MARGIN)):
        rng = np.random.default_rng(seed)
        studies = [study(rng, loss) for _ in range(num_studies)]
        for statement in studies[0]:
            count = sum(one[statement] for one in studies)
            records.append({"kind": kind, "statement": statement, "count": count, "n": num_studies, "seed": seed})
        say(f"{kind}: {num_studies} studies")
    return records


def table(records: list[dict[str, Any]]) -> str:
    """The records as Markdown, with the exact interval of each share."""
    lines = ["| studies | statement | share | 95 % interval | n |", "| :-- | :-- | --: | --: | --: |"]
    for record in records:
        low, high = stats.binomtest(record["count"], record["n"]).proportion_ci()
        share = record["count"] / record["n"]
        cells = [record["kind"], record["statement"], f"{share:.1%}", f"{low:.1%} to {high:.1%}", f"{record['n']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", help="only print the table of the records")
    arguments = parser.parse_args()
    path = FOLDER / "records.jsonl"
    if not arguments.print:
        records = simulate(arguments.studies, arguments.seed, print)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        packages = {name: version(name) for name in ("numpy", "scipy")}
        write_json(FOLDER / "environment.json", {"python": platform.python_version(), **packages})
    print(table([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]))


if __name__ == "__main__":
    main()
