"""A campaign whose drivers and cells are forks of this process, killed at random: many kills in little time.

Run as a program: SPEC, output folder, number of kills, seed, and ``cell`` for real cells or ``stand_in`` for ones that
compute next to nothing. Runs the campaign once undisturbed (``calm``) and once with kills (``killed``).
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from aletheia_lora.campaign.executors import end_with_parent
from aletheia_lora.campaign.records import CellFolder, LockedError, chosen_rate, trained_run
from aletheia_lora.campaign.runner import Budget, run_campaign
from aletheia_lora.campaign.spec import load_campaign, resolved

LOCKED = 7
BUDGET = Budget(machine_faults=1000, first_pause=0.0)


def stand_in(path, _say):
    """A cell whose result follows from its content alone and takes a moment."""
    folder = CellFolder.open(path)
    with folder.lock():
        if folder.record() is not None:
            return 0
        folder.append("attempt_started", pid=os.getpid())
        for step in range(3):
            time.sleep(0.005)
            folder.append("progress", line=f"step {step}")
        loss = int(hashlib.sha256(folder.cell.digest.encode()).hexdigest()[:8], 16) / 1e9
        if folder.cell.content["kind"] == "grid":
            result = {"validation_loss": loss, "rows_digest": "same"}
        elif folder.cell.content["kind"] == "evaluation":
            assert trained_run(folder)["state"] == "done"
            result = {"evaluation": {"gsm8k": {"value": loss}}}
        else:
            rate, grid = chosen_rate(folder)
            result = {"learning_rate": rate, "grid": grid, "heldout_loss": loss, "layers": [0], "steps": 3}
        folder.finish("done", **result, seconds=0.02)
    return 0


class ForkedJob:
    """A job as the local executor's, by fork instead of a new interpreter."""

    run = staticmethod(stand_in)

    def __init__(self, folder, base):
        read, self.end = os.pipe()
        self.code = None
        self.pid = os.fork()
        if self.pid:
            os.close(read)
            return
        code = 1
        try:
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for number, handle in enumerate((read, log, log)):
                os.dup2(handle, number)
            os.closerange(3, 1024)  # the driver's lock, the pipes of other cells
            end_with_parent()
            os.chdir(base)
            wait_for_the_gate(folder.parent.parent)
            code = self.run(folder.resolve(), print)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self):
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                os.close(self.end)
        return self.code

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)


def start_driver(output, workers):
    """Fork a driver."""
    driver = os.fork()
    if driver:
        return driver
    code = 1
    try:
        run_campaign(SPEC, output, BASE, executor=ForkedJob, workers=workers, budget=BUDGET)
        code = 0
    except LockedError:
        code = LOCKED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def children(parent):
    """Processes of this parent."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[1] == str(parent) and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def num_records(output):
    return len(list(output.glob("cells/*/record.json")))


def wait_for_the_gate(output):
    """The last two cells wait until all kills were made: a campaign must not end before them."""
    num_cells = len(list(output.glob("cells/*")))
    while num_records(output) >= num_cells - 2 and not gate(output).exists():
        time.sleep(0.005)


def calm(output):
    """Undisturbed; gives the seconds."""
    started = time.monotonic()
    gate(output).touch()
    _, status = os.waitpid(start_driver(output, 1), 0)
    assert status == 0, status
    return time.monotonic() - started


def killed(output, num_kills, seed, cell_seconds, num_cells):
    """With kills of driver or cells, spread over the campaign; gives how many hit which."""
    rng = random.Random(seed)
    due = sorted(rng.randrange(num_cells - 2) for _ in range(num_kills))
    hits = {"driver": 0, "cell": 0}
    driver = start_driver(output, rng.choice([1, 2]))
    while True:
        pid, status = os.waitpid(driver, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            if code == 0:
                return hits
            assert code in (LOCKED, -signal.SIGKILL), code
            driver = start_driver(output, rng.choice([1, 2]))
        if due and num_records(output) >= due[0]:
            time.sleep(rng.random() * cell_seconds)
            victims = [driver, *children(driver)]
            victim = rng.choice(victims)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                hits["driver" if victim == driver else "cell"] += 1
                due.pop(0)
        if not due and not gate(output).exists():
            gate(output).touch()
        time.sleep(0.001)


def gate(output):
    return output.with_suffix(".gate")


def main():
    global SPEC, BASE
    path, output = Path(sys.argv[1]), Path(sys.argv[2])
    SPEC, BASE = resolved(load_campaign(path), path.parent), path.parent
    if sys.argv[5] == "stand_in":  # without loading the tasks, which the stand-in does not look at
        SPEC["evaluation"] = {"tasks": ["gsm8k"], "eval_batch_size": 8, "methods": ["random"], "match": None}
    num_kills, seed = int(sys.argv[3]), int(sys.argv[4])
    if sys.argv[5] == "cell":
        from aletheia_lora.campaign.cell import run_cell  # once, for all forks

        ForkedJob.run = staticmethod(run_cell)
    seconds = calm(output / "calm")
    num_cells = num_records(output / "calm")
    hits = killed(output / "killed", num_kills, seed, seconds / num_cells, num_cells)
    print(json.dumps({"num_cells": num_cells, **hits}))


if __name__ == "__main__":
    main()
