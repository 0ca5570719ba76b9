"""Cells that two processes train together, talking by gloo on the CPU; the launchers are real."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import aletheia_lora
from aletheia_lora.campaign.cell import run_cell
from aletheia_lora.campaign.launcher import check_launcher, launch_command, launched
from aletheia_lora.campaign.records import CellFolder
from aletheia_lora.campaign.runner import rows_at_a_time
from aletheia_lora.campaign.spec import cells, load_campaign, resolved
from aletheia_lora.campaign.together import _measure_first, run_part
from aletheia_lora.errors import ConfigError
from test_campaign_cell import VALUES as TRAINING
from tiny_inputs import save_model, save_rows, word_rows

PATIENCE_SECONDS = 300
LAUNCHERS = (b"torch.distributed.run", b"-c")
VALUES = {**TRAINING, "batch_size": 4, "learning_rates": [0.01]}
ACCELERATE = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "mixed_precision": "no"}
ACCELERATE |= {"num_machines": 1, "num_processes": 8, "use_cpu": False, "machine_rank": 0}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a tiny model, rows to learn from and a configuration of accelerate."""
    folder = tmp_path_factory.mktemp("together")
    save_model(folder / "tiny-llama")
    save_rows(folder / "rows.jsonl", word_rows(32))
    (folder / "ddp.yaml").write_text(yaml.safe_dump(ACCELERATE))
    return folder


@pytest.fixture
def spec(ground):
    """Gives the resolved spec with changes."""

    def made(**changed):
        path = ground / "spec.yaml"
        path.write_text(yaml.safe_dump({**VALUES, **changed}))
        return resolved(load_campaign(path), ground)

    return made


@pytest.fixture(autouse=True)
def environment(ground, monkeypatch, library_logging):
    """In which processes are started: the spec's folder, one thread, no GPU."""
    monkeypatch.chdir(ground)
    monkeypatch.setenv("PYTHONPATH", str(Path(aletheia_lora.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def start(ground, tmp_path):
    """Starts a cell by the command; whatever is left of it is ended afterwards."""
    started = []

    def command(place):
        program = [sys.executable, "-m", "aletheia_lora", "campaign", "cell", str(place.path), str(ground)]
        with (tmp_path / "said.txt").open("w") as said:
            options = {"stdin": subprocess.PIPE, "stdout": said, "stderr": subprocess.STDOUT, "start_new_session": True}
            started.append(subprocess.Popen(program, **options))
        return started[-1]

    yield command
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdin.close()
        process.wait()


def attempt(folder, cell):
    """One attempt at the cell; gives its folder."""
    place = CellFolder.of(folder, cell)
    place.make()
    assert run_cell(place.path, print) == 0
    return place


def test_the_probe_of_a_matched_method_is_there_before_the_processes_start(spec, tmp_path):
    mine = {"name": "mine", "strategy": "top_percent", "score": "taylor", "allocation": "uniform"}
    same = {"name": "same", "strategy": "all", "allocation": "uniform", "params_of": "mine"}
    place = CellFolder.of(tmp_path, cells(spec(methods=[mine, same], processes=2))[1])
    place.make()
    _measure_first(place, print)
    assert len(list((tmp_path / "shared").glob("probe-*.json"))) == 2


@pytest.mark.parametrize("method", ["last", pytest.param("uniform_trainer", marks=pytest.mark.slow)])
def test_two_processes_train_the_step_of_one(spec, tmp_path, method):
    (alone,), (both,) = cells(spec(methods=[method])), cells(spec(methods=[method], processes=2))
    assert "processes" not in alone.content and both.content["processes"] == 2
    one = attempt(tmp_path, alone).record()
    two = attempt(tmp_path, both)
    record = two.record()
    assert (record["state"], record["reason"]) == ("done", None)
    assert (one["result"]["processes"], record["result"]["processes"]) == (1, 2)
    assert record["result"]["heldout_loss"] == pytest.approx(one["result"]["heldout_loss"], rel=1e-4)
    assert record["result"]["train_losses"] == pytest.approx(one["result"]["train_losses"], rel=1e-4)
    assert record["result"]["adapter_digest"] and (two.path / "adapter" / "adapter_config.json").exists()
    news = [event["data"]["line"] for event in two.events() if event["kind"] == "progress"]
    assert any("held-out loss" in line for line in news)


@pytest.mark.slow
def test_accelerate_launch_starts_the_processes_and_not_one_without_a_word(spec, tmp_path):
    (cell,) = cells(spec(processes=2, accelerate_config="ddp.yaml"))
    assert set(cell.content["accelerate_config"]) == {"file", "digest"}
    record = attempt(tmp_path, cell).record()
    assert (record["state"], record["reason"], record["result"]["processes"]) == ("done", None, 2)


def test_fewer_processes_than_asked_for_are_an_error(spec, tmp_path):
    (cell,) = cells(spec(processes=2))
    place = CellFolder.of(tmp_path, cell)
    place.make()
    assert run_part(place.path, tmp_path) == 1
    assert "1 processes were started, expected 2" in (tmp_path / "failed-0.json").read_text()


@pytest.mark.slow
def test_an_error_on_one_process_is_the_cells_own(spec, tmp_path):
    (cell,) = cells(spec(processes=2, learning_rates=[1e30]))
    record = attempt(tmp_path, cell).record()
    assert record["state"] == "nan" and record["reason"]


def parts(marker):
    """Processes that a launcher started with this word."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"part" in words and str(marker).encode() in words and not any(word in words for word in LAUNCHERS):
            found.append(int(file.parent.name))
    return found


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def until(holds, process=None):
    ends = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < ends
        assert process is None or process.poll() is None
        time.sleep(0.02)


PART = """
import time
from aletheia_lora.campaign.executors import end_with_parent
end_with_parent()
print("news: up", flush=True)
time.sleep(600)
"""
CELL = """
import sys
from aletheia_lora.campaign.cell import run_cell
from aletheia_lora.campaign.launcher import launched
print("ended", launched(sys.argv[1:], print))
"""


@pytest.mark.parametrize("who", ["cell", "launcher", "part"])
def test_processes_of_a_launcher_end_with_it_and_with_who_started_it(tmp_path, who):
    (tmp_path / "part.py").write_text(PART)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", *launcher, str(tmp_path / "part.py"), "part", str(tmp_path)]
    options = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    cell = subprocess.Popen([sys.executable, "-c", CELL, *command], **options)
    try:
        until(lambda: len(parts(tmp_path)) == 2)
        victims = parts(tmp_path)
        os.kill({"cell": cell.pid, "launcher": parent_of(victims[0]), "part": victims[0]}[who], signal.SIGKILL)
        said, _ = cell.communicate(timeout=PATIENCE_SECONDS)
        if who == "cell":
            until(lambda: not parts(tmp_path))
        else:  # it waited for all of them, and says how the first one ended
            assert not parts(tmp_path) and said.splitlines()[-1] == "ended -9"
    finally:
        for pid in parts(tmp_path):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["driver", "cell", "launcher", "part"])
def test_whoever_is_killed_leaves_no_process_behind(spec, start, tmp_path, who):
    (cell,) = cells(spec(processes=2, steps=100_000, evaluations=1))
    place = CellFolder.of(tmp_path, cell)
    place.make()
    process = start(place)
    until(lambda: len(parts(place.path)) == 2, process)
    victims = parts(place.path)
    if who == "driver":
        process.stdin.close()  # what its end does
    elif who == "cell":
        process.kill()
    else:
        os.kill(victims[0] if who == "part" else parent_of(victims[0]), signal.SIGKILL)
    process.wait(timeout=PATIENCE_SECONDS)
    until(lambda: not parts(place.path))
    assert process.returncode == -signal.SIGKILL  # for the driver a fault of the machine: it is tried again
    assert place.record() is None and not place.is_locked()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"processes": 3}, "batch_size=4 rows of a step cannot be shared out evenly over 3"),
        ({"processes": 0}, "processes=0"),
        ({"processes": 2, "prefix_cache": True}, "prefix_cache is made for one process"),
        ({"processes": 2, "methods": ["adalora"]}, "PEFT adds AdaLoRA's regularization in every process"),
        ({"accelerate_config": "ddp.yaml"}, "starts several processes, and processes is 1"),
        ({"processes": 2, "accelerate_config": "none.yaml"}, "cannot read the configuration"),
    ],
    ids=str,
)
def test_what_several_processes_cannot_do_is_refused_by_name(spec, changed, message):
    with pytest.raises(ConfigError, match=message):
        spec(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"distributed_type": "NO"}, "accelerate launch starts one process"),
        ({"distributed_type": "MULTI_CPU"}, "accelerate launch starts one process"),
        ({"use_cpu": True}, "accelerate launch starts one process"),
        ({"distributed_type": "FSDP"}, "asks for distributed_type: FSDP. Cells train under DDP"),
        ({"distributed_type": "DEEPSPEED"}, "asks for distributed_type: DEEPSPEED"),
        ({"num_machines": 2}, "asks for 2 machines"),
    ],
    ids=str,
)
def test_a_launcher_that_would_start_something_else_is_refused(tmp_path, changed, message):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**ACCELERATE, **changed}))
    with pytest.raises(ConfigError, match=message):
        check_launcher(tmp_path / "a.yaml")


def test_rows_at_a_time_are_those_of_one_process(spec):
    (cell,) = cells(spec(processes=2))
    assert rows_at_a_time(cell) == 2
    assert launch_command(cell.content, ["x"])[-2:] == ["part", "x"]


def test_a_launcher_that_ends_by_a_signal_says_so():
    assert launched([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], print) == -9
    heard = []
    program = "print('news: one'); print('exitcode  : -6 (pid: 3)'); raise SystemExit(1)"
    assert launched([sys.executable, "-c", program], heard.append) == -6
    assert heard == ["one"]
