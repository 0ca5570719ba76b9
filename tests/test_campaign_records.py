import json
import os

import pytest

from aletheia_lora.campaign.records import CellFolder, DamagedError, LockedError, faults, locked, read_pinned
from aletheia_lora.campaign.spec import Cell
from aletheia_lora.errors import OutputError

CONTENT = {
    "kind": "run",
    "model": {"name": "m"},
    "task": {"name": "t"},
    "method": {"name": "paper"},
    "seed": 0,
    "batch_size": 4,
}


@pytest.fixture
def folder(tmp_path):
    made = CellFolder.of(tmp_path, Cell(CONTENT))
    made.make()
    return made


def lines(folder):
    return (folder.path / "events.jsonl").read_text().splitlines()


def test_a_cell_goes_from_planned_to_done(folder):
    assert folder.state() == ("planned", None)
    with folder.lock():
        folder.append("attempt_started", pid=1)
        assert folder.state() == ("running", None)
    assert folder.state() == ("interrupted", "its process is gone")
    with folder.lock():
        folder.append("attempt_ended", cause="machine", reason="SIGKILL")
    assert folder.state() == ("interrupted", "SIGKILL")
    with folder.lock():
        folder.append("attempt_started", pid=2)
        folder.finish("done", loss=float("nan"), layers=(1, 2))
    assert folder.state() == ("done", None)
    record = folder.record()
    assert (record["attempts"], record["result"]) == (2, {"loss": None, "layers": [1, 2]})
    assert [event["seq"] for event in folder.events()] == [0, 1, 2, 3]


def test_a_folder_is_opened_by_its_name_and_content(folder):
    assert CellFolder.open(folder.path).cell.digest == folder.cell.digest
    (folder.path / "cell.json").write_text(json.dumps({**CONTENT, "seed": 1}))
    with pytest.raises(DamagedError, match="holds the cell"):
        CellFolder.open(folder.path)


def test_only_one_process_writes(folder):
    with folder.lock(), pytest.raises(LockedError, match="another process"), locked(folder.path / "lock"):
        pass
    assert not folder.is_locked()


@pytest.mark.parametrize("torn", [b"{", b'{"seq":1,"at"', b"\xff\xfe"], ids=repr)
def test_a_last_line_that_was_never_finished_never_happened(folder, torn):
    folder.append("attempt_started", pid=1)
    with (folder.path / "events.jsonl").open("ab") as stream:
        stream.write(torn)
    assert len(folder.events()) == 1
    folder.append("progress", line="on")
    assert [event["kind"] for event in folder.events()] == ["attempt_started", "progress"]
    assert len(lines(folder)) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: [kept[0].replace("attempt_started", "attempt_stopped"), *kept[1:]],
        lambda kept: [kept[1], *kept[1:]],
        lambda kept: kept[1:],
        lambda kept: [*kept, "{}"],
        lambda kept: [*kept, "3"],
        lambda kept: [*kept, ""],
    ],
    ids=["changed", "twice", "gap", "no event", "a number", "empty"],
)
def test_a_finished_line_that_is_not_what_was_written_is_refused(folder, damage):
    for number in range(3):
        folder.append("attempt_started", pid=number)
    (folder.path / "events.jsonl").write_text("".join(f"{line}\n" for line in damage(lines(folder))))
    with pytest.raises(DamagedError, match=r"events.jsonl is damaged"):
        folder.state()


def test_a_record_that_is_not_what_was_written_is_refused(folder):
    folder.finish("done", heldout_loss=2.5)
    file = folder.path / "record.json"
    whole = file.read_text()
    for broken in (whole.replace("2.5", "1.5"), whole[:-10], "[]", whole.replace(folder.cell.digest, "0" * 64)):
        file.write_text(broken)
        with pytest.raises(DamagedError):
            folder.record()


def test_a_record_is_written_once(folder):
    folder.finish("failed", "no reason")
    with pytest.raises(AssertionError):
        folder.finish("done")


def test_a_full_disk_leaves_the_events_as_they_were(folder, monkeypatch):
    folder.append("attempt_started", pid=1)

    def full(handle, content, offset):
        os.write(handle, b"")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left"):
        folder.append("progress", line="on")
    monkeypatch.undo()
    assert len(folder.events()) == 1


def test_only_what_ended_badly_is_opened_again_and_its_budget_starts_anew(folder):
    with folder.lock():
        folder.append("attempt_started", pid=1)
        folder.append("attempt_ended", cause="machine", reason="SIGKILL")
        folder.finish("failed", "gave up")
    assert faults(folder.events(), "machine") == 1
    folder.retry()
    assert folder.record() is None and faults(folder.events(), "machine") == 0
    assert json.loads((folder.path / "record-before-retry-1.json").read_text())["reason"] == "gave up"
    with folder.lock():
        folder.finish("done")
    folder.retry()
    assert folder.state()[0] == "done"


def test_a_folder_of_something_else_is_refused(tmp_path):
    assert read_pinned(tmp_path / "new") is None and read_pinned(tmp_path) is None
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="holds no campaign"):
        read_pinned(tmp_path)
    (tmp_path / "campaign.json").write_text("{")
    with pytest.raises(DamagedError, match=r"campaign\.json cannot be read"):
        read_pinned(tmp_path)
