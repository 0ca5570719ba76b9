"""Verdicts and seconds of the same programs in a plain process and in the box, in turns."""

import argparse
import ast
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "src"))

from aletheia_lora.evaluation.sandbox import CodeProblem, Sandbox  # noqa: E402

MODES = ("plain", "split", "shared")
TURNED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt}
TURNED |= {ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.Mod: ast.Add, ast.And: ast.Or}


def mutant(row: dict) -> str:
    """The canonical solution with one thing changed, as a whole function."""
    tree = ast.parse(row["prompt"] + row["canonical_solution"])
    (body,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == row["entry_point"]]
    for node in ast.walk(body):
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in TURNED:
            node.op = TURNED[type(node.op)]()
            break
        if isinstance(node, ast.Compare) and type(node.ops[0]) in TURNED:
            node.ops[0] = TURNED[type(node.ops[0])]()
            break
    else:
        for node in ast.walk(ast.Module(body.body[1:], [])):
            if isinstance(node, ast.Constant):
                node.value = "other" if isinstance(node.value, str) else 7
                break
    return "\n" + ast.unparse(body) + "\n"


def plainly(sandbox: Sandbox, problem: CodeProblem, completion: str) -> tuple[str, float]:
    """The program and its test in one ordinary process: how it ended, and its seconds."""
    program = f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_points[0]})\n"
    command = [str(sandbox.interpreter.executable), "-s", "-S", "-B", "-c", program]
    started = time.monotonic()
    try:
        environ = {"PYTHONHASHSEED": "0", "PATH": "/usr/bin"}
        done = subprocess.run(command, env=environ, capture_output=True, timeout=sandbox.limits.wall_seconds)
        end = "passed" if done.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        end = "time"
    return end, time.monotonic() - started


def measure(rows: list[dict]) -> tuple[list[dict], dict]:
    """A record for each program, and what the machine was."""
    boxes = {mode: Sandbox(mode=mode) for mode in ("split", "shared")}
    started = time.monotonic()
    checked = [box.check_self() for box in boxes.values()]
    check_seconds = (time.monotonic() - started) / len(checked)
    records = []
    for row in rows:
        problem = CodeProblem.from_row(row)
        programs = {"canonical": row["canonical_solution"], "stub": "    return None\n", "mutant": mutant(row)}
        for name, completion in programs.items():
            end, seconds = plainly(boxes["split"], problem, completion)
            record = {"task_id": row["task_id"], "program": name, "plain": [end, round(seconds, 4)]}
            for mode, box in boxes.items():
                verdict = box.run(problem, completion)
                record[mode] = [verdict.reason, round(verdict.seconds, 4), verdict.mode]
            records.append(record)
            print(record["task_id"], name, record["split"][0], file=sys.stderr)
    facts = {**boxes["split"].describe(), "self_check_seconds": round(check_seconds, 2)}
    facts.pop("mode")
    facts["load_average"] = round(os.getloadavg()[2], 1)  # of the last 15 minutes
    return records, {**facts, "cores": os.cpu_count(), "machine": platform.machine(), "kernel": platform.release()}


def table(records: list[dict], facts: dict) -> str:
    """Parity, agreement and cost, from the records alone."""
    lines = ["| | " + " | ".join(MODES) + " |", "| --- | ---: | ---: | ---: |"]
    for program in ("canonical", "stub", "mutant"):
        of = [record for record in records if record["program"] == program]
        passed = [sum(record[mode][0] == "passed" for record in of) for mode in MODES]
        lines.append(f"| {program}: passed of {len(of)} | {' | '.join(map(str, passed))} |")
    canonical = [record for record in records if record["program"] == "canonical"]
    medians = [statistics.median(record[mode][1] for record in canonical) for mode in MODES]
    lines.append(f"| median seconds, canonical | {' | '.join(f'{seconds:.3f}' for seconds in medians)} |")
    extra = {mode: [record[mode][1] - record["plain"][1] for record in canonical] for mode in MODES}
    for name, at in (("median", 4), ("9 of 10 below", 8)):
        cells = [f"{statistics.quantiles(extra[mode], n=10)[at]:.3f}" for mode in MODES[1:]]
        lines.append(f"| extra seconds, {name} | 0 | {' | '.join(cells)} |")
    fallen_back = [record["task_id"] for record in canonical if record["split"][2] != "split"]
    lines += ["", f"Problems that need shared mode: {', '.join(fallen_back) or 'none'}."]
    for mode in MODES[1:]:
        apart = [r for r in records if (r[mode][0] == "passed") is not (r["plain"][0] == "passed")]
        named = ", ".join(f"{r['task_id']} {r['program']} ({r['plain'][0]}, {r[mode][0]})" for r in apart)
        lines.append(f"{mode}: {len(apart)} of {len(records)} verdicts differ from the plain process. {named}".strip())
    checks = len(facts["checked"])
    where = f"{facts['cores']} cores, load average {facts['load_average']}, {facts['bwrap']}, {facts['interpreter']}"
    return "\n".join([*lines, f"Self-check: {checks} checks in {facts['self_check_seconds']} s. {where}."])


def main() -> None:
    """Run the programs, or print the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="HumanEval's rows, one JSON object a line")
    parser.add_argument("--print", action="store_true", help="only print the table of the records")
    options = parser.parse_args()
    if not options.print:
        if options.data is None:
            parser.error("--data is needed to run; --print needs none")
        records, facts = measure([json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()])
        (HERE / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (HERE / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    records = [json.loads(line) for line in (HERE / "records.jsonl").read_text().splitlines()]
    print(table(records, json.loads((HERE / "environment.json").read_text())))


if __name__ == "__main__":
    main()
