"""The same campaign on a real Ray cluster on this machine; skipped where Ray is not installed."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import campaign_child as child
from aletheia_lora.campaign.executors import EXECUTORS, ray_executor
from aletheia_lora.campaign.records import CellFolder
from aletheia_lora.campaign.report import report_text
from aletheia_lora.campaign.runner import Budget, run_campaign
from aletheia_lora.campaign.spec import cells
from aletheia_lora.errors import ConfigError
from test_campaign_runner import COMMAND, local, spec

BUDGET = Budget(machine_faults=3, first_pause=0.0)


def test_without_ray_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install aletheia-lora\[ray\]"):
        EXECUTORS["ray"]()


def process(pid):
    """State and parent of a process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except FileNotFoundError:
        return ["gone", ""]


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two processors."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_ray_and_local_give_the_same_records(cluster, tmp_path):
    made = spec(child.DONE, child.KILLED_ONCE, child.MEMORY_ONCE, child.RAISES, child.NO_RECORD)
    records = []
    for name, executor in (("local", local), ("ray", ray_executor(COMMAND))):
        run_campaign(made, tmp_path / name, tmp_path, executor=executor, workers=2, budget=BUDGET)
        records.append([CellFolder.of(tmp_path / name, cell).record() for cell in cells(made)])
    assert records[0] == records[1]
    assert report_text(tmp_path / "local") == report_text(tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_killed_worker_is_a_fault_of_the_machine_and_its_cell_ends_with_it(cluster, tmp_path):
    made = spec(child.ENDLESS)
    (place,) = (CellFolder.of(tmp_path / "out", cell) for cell in cells(made))
    started = []

    def kill():
        while True:
            pids = [event["data"]["pid"] for event in place.events() if event["kind"] == "attempt_started"]
            if len(pids) > len(started):
                started.append(pids[-1])
                os.kill(int(process(pids[-1])[1]), signal.SIGKILL)
            if len(started) == 2:
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    budget = Budget(machine_faults=2, first_pause=0.0)
    run_campaign(made, tmp_path / "out", tmp_path, executor=ray_executor(COMMAND), budget=budget)
    thread.join()
    state, reason = place.state()
    assert state == "failed" and "gave up after 2 attempts that the machine ended, the last by SIGKILL" in reason
    assert all(process(pid)[0] in ("gone", "Z") for pid in started)
