"""The same campaign on a real Ray cluster on this machine, and as jobs of submitit; skipped where these are missing."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import campaign_child as child
from aletheia_lora.campaign.executors import EXECUTORS, ray_executor, slurm_executor
from aletheia_lora.campaign.records import CellFolder
from aletheia_lora.campaign.report import report_text
from aletheia_lora.campaign.runner import Budget, run_campaign
from aletheia_lora.campaign.spec import cells
from aletheia_lora.errors import ConfigError
from test_campaign_runner import COMMAND, local, spec

BUDGET = Budget(machine_faults=3, first_pause=0.0)


@pytest.mark.parametrize(("name", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_without_its_library_an_executor_says_how_to_get_it(monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"pip install aletheia-lora\[{name}\]"):
        EXECUTORS[name]({})


def test_the_local_executor_has_no_options():
    with pytest.raises(ConfigError, match="'local' has no options, got num_gpus"):
        EXECUTORS["local"]({"num_gpus": 1})


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


SEEDS = (child.DONE, child.KILLED_ONCE, child.MEMORY_ONCE, child.RAISES, child.NO_RECORD)
ENDS = spec(*SEEDS, evaluation={"tasks": ["gsm8k"], "eval_batch_size": 4})


def records(folder, executor):
    """What comes of every way to end."""
    run_campaign(ENDS, folder, folder.parent, executor=executor, workers=2, budget=BUDGET)
    return [CellFolder.of(folder, cell).record() for cell in cells(ENDS)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_ray_and_local_give_the_same_records(cluster, tmp_path):
    assert records(tmp_path / "local", local) == records(tmp_path / "ray", ray_executor({}, COMMAND))
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
    run_campaign(made, tmp_path / "out", tmp_path, executor=ray_executor({}, COMMAND), budget=budget)
    thread.join()
    state, reason = place.state()
    assert state == "failed" and "gave up after 2 attempts that the machine ended, the last by SIGKILL" in reason
    assert all(process(pid)[0] in ("gone", "Z") for pid in started)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_jobs_of_submitit_and_local_ones_give_the_same_records(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed")
    jobs = slurm_executor({"cluster": "local", "timeout_min": 5}, COMMAND)
    assert records(tmp_path / "local", local) == records(tmp_path / "slurm", jobs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_job_that_the_cluster_ends_is_a_fault_of_the_machine_and_its_cell_ends_with_it(tmp_path):
    pytest.importorskip("submitit", reason="submitit is not installed")
    (cell,) = cells(spec(child.ENDLESS))
    place = CellFolder.of(tmp_path, cell)
    place.make()
    job = slurm_executor({"cluster": "local"}, COMMAND)(place.path, tmp_path)
    while not any(event["kind"] == "attempt_started" for event in place.events()):
        assert job.poll() is None
        time.sleep(0.05)
    os.kill(int(process(place.events()[0]["data"]["pid"])[1]), signal.SIGKILL)
    while job.poll() is None:
        time.sleep(0.05)
    assert job.poll() == -signal.SIGKILL
    with place.lock():  # waits for the cell to end
        pass
