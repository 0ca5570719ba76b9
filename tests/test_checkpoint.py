import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from aletheia_lora.cli import main
from aletheia_lora.data import tokenize
from aletheia_lora.errors import ConfigError, OutputError
from aletheia_lora.planning import plan
from aletheia_lora.training import checkpoint as room
from aletheia_lora.training.checkpoint import checkpoints_of, kept_plan
from aletheia_lora.training.run import TrainOptions, train_adapter
from families import build
from tiny_inputs import word_rows, word_tokenizer

STEPS = 10
OPTIONS = {"steps": STEPS, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "seed": 3}


class Killed(BaseException):
    """Stands for a kill: nothing that tidies up may run after it, and nothing does that touches the folder."""


@pytest.fixture(scope="module")
def rows():
    return tokenize(word_rows(16), word_tokenizer())  # 4 steps are an epoch


@pytest.fixture(scope="module")
def made(rows):
    choice = {"strategy": "last", "num_layers": 2, "allocation": "uniform", "lora_dropout": 0.2}
    return plan(build("llama"), rows, rank=4, probe_batches=2, **choice)


def trained(made, rows, output, *, killed_at=None, said=None, **changed):
    def say(line):
        if said is not None:
            said.append(line)
        if killed_at is not None and line.startswith(f"step {killed_at} of"):
            raise Killed

    options = TrainOptions(**{**OPTIONS, **changed})
    return train_adapter(build("llama"), word_tokenizer(), made, rows, output, options, say=say)


@pytest.fixture(scope="module")
def calm(made, rows, tmp_path_factory):
    """The record of a run without checkpoints and without kills."""
    return trained(made, rows, tmp_path_factory.mktemp("calm") / "adapter")


def check_same(record, calm):
    assert record["losses"] == calm["losses"] and len(record["losses"]) == STEPS
    assert record["weights_sha256"] == calm["weights_sha256"]


def cut_off(made, rows, output, step, **changed):
    with pytest.raises(Killed):
        trained(made, rows, output, killed_at=step, checkpoint_every=2, **changed)
    assert not output.exists()


# --- going on ---------------------------------------------------------------------------------------------------


def test_checkpoints_change_nothing_and_leave_nothing(made, rows, tmp_path, calm):
    record = trained(made, rows, tmp_path / "adapter", checkpoint_every=2)
    check_same(record, calm)
    assert record["resumed_from"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("kills", "resumed"),
    [((1,), 0), ((3,), 2), ((5,), 4), ((8,), 6), ((9,), 8), ((3, 6, 9), 8), ((10,), 8)],
    ids=["no checkpoint yet", "epoch 1", "end of epoch 1", "epoch 2", "epoch 3", "three times", "last step"],
)
def test_a_run_that_was_cut_off_ends_as_an_undisturbed_one(made, rows, tmp_path, calm, kills, resumed):
    for step in kills:
        cut_off(made, rows, tmp_path / "adapter", step)
    said = []
    record = trained(made, rows, tmp_path / "adapter", checkpoint_every=2, said=said)
    check_same(record, calm)
    assert record["resumed_from"] == resumed
    assert (f"going on from step {resumed}" in said) == (resumed > 0)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_activation_checkpointing_does_not_change_that(made, rows, tmp_path):
    switched = {"gradient_checkpointing": True}
    undisturbed = trained(made, rows, tmp_path / "calm", **switched)
    cut_off(made, rows, tmp_path / "adapter", 7, **switched)
    check_same(trained(made, rows, tmp_path / "adapter", checkpoint_every=2, **switched), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": ("lm_head",)}, {"adapter": "loha"}],
    ids=lambda kind: next(iter(kind)),
)
def test_another_kind_of_adapter_does_not_change_that(rows, tmp_path, kind):
    made = plan(build("llama"), rows, rank=4, probe_batches=2, strategy="last", num_layers=2, **kind)
    undisturbed = trained(made, rows, tmp_path / "calm")
    cut_off(made, rows, tmp_path / "adapter", 7)
    check_same(trained(made, rows, tmp_path / "adapter", checkpoint_every=2), undisturbed)


def test_a_checkpoint_that_was_cut_off_does_not_count(made, rows, tmp_path, calm, monkeypatch):
    def killed(path, value):
        if value.get("step") == 4:
            raise Killed
        return write(path, value)

    write = room.write_json
    monkeypatch.setattr(room, "write_json", killed)
    with pytest.raises(Killed):
        trained(made, rows, tmp_path / "adapter", checkpoint_every=2)
    monkeypatch.undo()
    record = trained(made, rows, tmp_path / "adapter", checkpoint_every=2)
    check_same(record, calm)
    assert record["resumed_from"] == 2


def test_the_two_newest_are_kept_and_a_damaged_one_is_put_aside(made, rows, tmp_path, calm):
    cut_off(made, rows, tmp_path / "adapter", 9)
    folder = checkpoints_of(tmp_path / "adapter")
    found = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert found == ["checkpoint-6", "checkpoint-8"]
    kept = shutil.copytree(folder, tmp_path / "kept")
    for file in sorted(path for path in (kept / "checkpoint-8").rglob("*") if path.is_file()):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        damaged = folder / "checkpoint-8" / file.name
        damaged.write_bytes(damaged.read_bytes()[:-2])
        opened = room.Checkpoints(tmp_path / "adapter", made, identity_of(folder), print)
        assert opened.newest() == str(folder / "checkpoint-6"), file.name
        assert opened.resumed_from == 6
        assert [path.name[:20] for path in folder.glob("damaged-*")] == ["damaged-checkpoint-8"]
    record = trained(made, rows, tmp_path / "adapter", checkpoint_every=2)
    check_same(record, calm)
    assert record["resumed_from"] == 6


def identity_of(folder):
    return {key: value for key, value in json.loads((folder / room.IDENTITY).read_text()).items() if key != "plan"}


# --- what is refused --------------------------------------------------------------------------------------------


def test_where_all_are_damaged_nothing_starts_over_unasked(made, rows, tmp_path):
    cut_off(made, rows, tmp_path / "adapter", 5)
    for file in checkpoints_of(tmp_path / "adapter").glob("checkpoint-*/optimizer.pt"):
        file.write_bytes(b"")
    with pytest.raises(OutputError, match="are damaged"):
        trained(made, rows, tmp_path / "adapter", checkpoint_every=2)


def test_another_run_does_not_go_on_from_these(made, rows, tmp_path):
    cut_off(made, rows, tmp_path / "adapter", 5)
    with pytest.raises(OutputError, match=r"of another run \(learning_rate: 0.01 -> 0.02\)"):
        trained(made, rows, tmp_path / "adapter", checkpoint_every=2, learning_rate=2e-2)
    with pytest.raises(OutputError, match="of another run \\(rows: "):
        trained(made, rows[:12], tmp_path / "adapter", checkpoint_every=2)
    other = plan(build("llama"), rows, rank=8, probe_batches=2, strategy="last", num_layers=2)
    with pytest.raises(OutputError, match="of another run \\(plan: "):
        trained(other, rows, tmp_path / "adapter", checkpoint_every=2)
    assert kept_plan(tmp_path / "adapter").to_dict()["ranks"] == made.to_dict()["ranks"]


def test_what_cannot_go_on_is_said_before_training():
    with pytest.raises(ConfigError, match="rerank_every"):
        TrainOptions(checkpoint_every=2, rerank_every=2)
    with pytest.raises(ConfigError, match="prefix_cache"):
        TrainOptions(checkpoint_every=2, prefix_cache=True)
    with pytest.raises(ConfigError, match="checkpoint_every=0"):
        TrainOptions(checkpoint_every=0)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("library_logging")
def test_the_same_command_goes_on_without_probing_again(tmp_path, monkeypatch, capsys, model, data):
    output = tmp_path / "adapter"
    small = ["--validation-rows", "4", "--probe-batches", "2", "--rank", "4", "--time-budget", "0.9"]
    short = ["--batch-size", "4", "--steps", "6", "--checkpoint-every", "2"]
    command = ["aletheia", "train", model, data, *small, *short, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)

    def say(line):
        if line.startswith("step 5 of"):
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("aletheia_lora.cli._say", say)
        with pytest.raises(Killed):
            main()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", [*command, "--rank", "8"])
        with pytest.raises(SystemExit):
            main()
        assert "rank: 4 -> 8" in capsys.readouterr().err
    monkeypatch.setattr("aletheia_lora.runs.probe_rows", None)  # would raise if called
    main()
    record = json.loads((output / "record.json").read_text())
    assert record["resumed_from"] == 4 and len(record["losses"]) == 6
    assert "going on from step 4" in capsys.readouterr().err


PROGRAM = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    from test_checkpoint import build, plan, tokenize, trained, word_rows, word_tokenizer

    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    rows = tokenize(word_rows(16), word_tokenizer())
    made = plan(build("llama"), rows, rank=4, probe_batches=2, strategy="last", num_layers=2, lora_dropout=0.2)
    rng, kills = random.Random(seed), 0
    while not (folder / "adapter").exists():
        pid = os.fork()
        if not pid:
            code = 1
            try:
                trained(made, rows, folder / "adapter", checkpoint_every=2)
                code = 0
            finally:
                os._exit(code)
        if kills < 6:
            time.sleep(rng.uniform(0.05, 1.5))
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    calm = trained(made, rows, folder / "calm")
    record = json.loads((folder / "adapter" / "record.json").read_text())
    same = all(record[key] == calm[key] for key in ("losses", "weights_sha256"))
    print(json.dumps({"same": same, "kills": kills, "resumed_from": record["resumed_from"]}))
"""


@pytest.mark.slow
def test_a_process_killed_at_random_times_ends_as_an_undisturbed_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, program, tmp_path, "7"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["kills"] > 0, f"{found} with {signal.SIGKILL.name}"
