"""The files of the prefix cache: damage, interruptions, several writers, a full disk; and what names a row."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch

from aletheia_lora.errors import OutputError
from aletheia_lora.training import prefix_store
from aletheia_lora.training.prefix_identity import batch_rows
from aletheia_lora.training.prefix_store import MAGIC, RECORD, PrefixStore, check_room, in_words

WRITER = """
    import sys, torch
    from pathlib import Path
    from aletheia_lora.training import prefix_store
    prefix_store.FLUSH_SECONDS = 0.0
    start, stop = int(sys.argv[2]), int(sys.argv[3])
    store = prefix_store.PrefixStore(Path(sys.argv[1]), say=print)
    number = start
    while number != stop:
        row = number.to_bytes(16, "little")
        store.write(row, torch.full((50, 64), float(number)), torch.float32)
        print(number, flush=True)
        number += 1
    store.close()
"""


STORES = []


@pytest.fixture(autouse=True)
def all_closed():
    yield
    while STORES:
        STORES.pop().close()


def name(number):
    return number.to_bytes(16, "little")


def states(number, tokens=3, width=4, dtype=torch.float32):
    return torch.full((tokens, width), float(number), dtype=dtype)


def filled(folder, numbers, **options):
    store = PrefixStore(folder, say=lambda _: None, **options)
    for number in numbers:
        assert store.write(name(number), states(number), torch.float32)
    store.close()
    return store


def opened(folder, **options):
    said = []
    STORES.append(PrefixStore(folder, say=said.append, **options))
    return STORES[-1], said


def writer(folder, start, stop):
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(start), str(stop)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def the(folder, pattern):
    (file,) = folder.glob(pattern)
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_written_is_read_back_bit_by_bit_now_and_later(tmp_path, dtype):
    store, _ = opened(tmp_path)
    parts = [torch.randn(tokens, 8).to(dtype) for tokens in (3, 1, 5)]
    for number, part in enumerate(parts):
        store.write(name(number), part, torch.float32)
    for source in (store, None):
        source = source or opened(tmp_path)[0]
        packed, states_dtype = source.read([name(2), name(0), name(2)])
        assert torch.equal(packed, torch.cat([parts[2], parts[0], parts[2]])) and states_dtype == torch.float32
        assert source.read([name(0), name(7)]) is None
        store.flush()
    store.close()


def test_nothing_is_in_the_index_before_its_states_are_published(tmp_path):
    store, _ = opened(tmp_path)
    store.write(name(1), states(1), torch.float32)
    assert the(tmp_path, "*.index").read_bytes() == MAGIC and name(1) not in opened(tmp_path)[0]
    store.flush()
    assert name(1) in opened(tmp_path)[0]


@pytest.mark.parametrize("damage", ["flipped", "cut", "swapped", "empty"])
def test_damaged_states_are_refused_removed_and_written_anew(tmp_path, damage):
    filled(tmp_path, range(4))
    data = the(tmp_path, "*.states")
    content = bytearray(data.read_bytes())
    size = len(content) // 4
    if damage == "flipped":
        content[size + 5] ^= 1
    elif damage == "swapped":
        content[:size], content[size : 2 * size] = content[size : 2 * size], content[:size]
    data.write_bytes(content if damage in ("flipped", "swapped") else content[: -1 if damage == "cut" else 0])
    store, said = opened(tmp_path)
    assert store.read([name(n) for n in range(4)]) is None
    assert len(store) == 0 and len(said) == 1 and "is damaged" in said[0] and not data.exists()
    assert len(store.counts.damaged) == 1
    assert store.write(name(1), states(1), torch.float32)
    assert torch.equal(store.read([name(1)])[0], states(1))


def test_states_cut_while_in_use_are_an_answer_and_no_crash(tmp_path):
    filled(tmp_path, range(4))
    store, _ = opened(tmp_path)
    assert store.read([name(3)]) is not None
    os.truncate(the(tmp_path, "*.states"), 10)
    assert store.read([name(3)]) is None and store.counts.damaged


def test_damage_to_own_states_starts_another_file(tmp_path):
    store, _ = opened(tmp_path)
    store.write(name(1), states(1), torch.float32)
    os.truncate(the(tmp_path, "*.states"), 3)
    assert store.read([name(1)]) is None
    assert store.write(name(1), states(1), torch.float32) and store.read([name(1)]) is not None
    store.close()
    assert opened(tmp_path)[0].read([name(1)]) is not None


@pytest.mark.parametrize("cut", [1, RECORD.size - 1, RECORD.size + 1])
def test_a_torn_index_keeps_its_whole_records(tmp_path, cut):
    filled(tmp_path, range(4))
    index = the(tmp_path, "*.index")
    index.write_bytes(index.read_bytes()[:-cut])
    store, said = opened(tmp_path)
    assert len(store) == 4 - -(-cut // RECORD.size) and said == []


def test_a_garbled_record_hides_itself_and_what_follows(tmp_path):
    filled(tmp_path, range(4))
    index = the(tmp_path, "*.index")
    content = bytearray(index.read_bytes())
    content[len(MAGIC) + RECORD.size + 20] ^= 255
    index.write_bytes(content)
    assert len(opened(tmp_path)[0]) == 1


def test_an_index_of_another_format_is_refused(tmp_path):
    filled(tmp_path, range(2))
    the(tmp_path, "*.index").write_bytes(b"something else, long enough to be a record of its own, or even two of them")
    store, said = opened(tmp_path)
    assert len(store) == 0 and "not one of this format" in said[0]


def test_a_file_that_grows_while_it_is_opened_is_not_taken_for_damaged(tmp_path, monkeypatch):
    writing, _ = opened(tmp_path)
    writing.write(name(1), states(1), torch.float32)
    writing.flush()

    def meanwhile(descriptor):
        status = os.stat(descriptor)
        writing.write(name(2), states(2), torch.float32)
        writing.flush()
        return status

    with monkeypatch.context() as patch:
        patch.setattr(prefix_store.os, "fstat", meanwhile)
        reading, said = opened(tmp_path)
    assert name(1) in reading and said == [] and reading.counts.damaged == []
    assert name(2) in opened(tmp_path)[0]


def test_a_file_that_vanishes_while_the_folder_is_read_is_skipped(tmp_path, monkeypatch):
    filled(tmp_path, [1])
    real = type(tmp_path).glob
    monkeypatch.setattr(type(tmp_path), "glob", lambda *args: [*real(*args), tmp_path / "gone.states"])
    assert name(1) in opened(tmp_path)[0]


def test_two_processes_write_at_once(tmp_path):
    both = [writer(tmp_path, 0, 40), writer(tmp_path, 30, 70)]
    for process in both:
        process.communicate(timeout=120)
        assert process.returncode == 0
    store, said = opened(tmp_path)
    assert len(store) == 70 and said == []
    packed, _ = store.read([name(n) for n in range(70)])
    assert torch.equal(packed.view(70, 50, 64)[:, 7, 7], torch.arange(70.0))


def test_a_kill_while_writing_loses_only_what_was_not_published(tmp_path):
    process = writer(tmp_path, 0, -1)
    for line in process.stdout:
        if int(line) >= 20:
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    store, said = opened(tmp_path)
    assert len(store) >= 20 and said == []
    packed, _ = store.read([name(n) for n in range(len(store))])
    assert torch.equal(packed.view(-1, 50, 64)[:, 49, 63], torch.arange(float(len(store))))
    assert store.write(name(9999), states(1), torch.float32)


def test_a_limit_stops_keeping_and_says_so_once(tmp_path):
    store, said = opened(tmp_path, max_bytes=100)
    assert [store.write(name(n), states(n), torch.float32) for n in range(4)] == [True, True, False, False]
    assert len(said) == 1 and "limit of 100 bytes" in said[0] and store.counts.full in said[0]
    assert store.read([name(0), name(1)]) is not None


def test_a_disk_that_fills_up_stops_keeping(tmp_path, monkeypatch):
    store, said = opened(tmp_path)
    store.write(name(0), states(0), torch.float32)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    assert not store.write(name(1), states(1), torch.float32)
    assert "less than 1.1 GB left" in said[0] and store.read([name(0)]) is not None


def test_an_error_of_the_disk_stops_keeping(tmp_path, monkeypatch):
    store, said = opened(tmp_path)
    monkeypatch.setattr(PrefixStore, "_new_shard", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert not store.write(name(0), states(0), torch.float32)
    assert "No space left" in said[0] and len(store) == 0


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        PrefixStore(tmp_path / "file", say=print)


def test_room_is_checked_where_the_folder_will_be(tmp_path, monkeypatch):
    check_room(tmp_path / "not" / "yet", 10, None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0 if path == tmp_path else 1 << 40))
    with pytest.raises(OutputError, match="the disk has 0 bytes left"):
        check_room(tmp_path / "not" / "yet", 10, None)
    assert [in_words(n) for n in (0, 999, 1000, 2_500_000_000)] == ["0 bytes", "999 bytes", "1.0 kB", "2.5 GB"]


# --- what names a row -----------------------------------------------------------------------------------------------


def names(lines, mask=None, positions=None, regime=b"", independent=True):
    tensors = [None if given is None else torch.tensor(given) for given in (lines, mask, positions)]
    return batch_rows(*tensors, regime=regime, independent=independent)


def test_padding_is_no_part_of_a_row():
    alone = names([[5, 6, 7]]).names
    right, left = names([[5, 6, 7, 0]], [[1, 1, 1, 0]]), names([[9, 5, 6, 7]], [[0, 1, 1, 1]])
    assert right.names == left.names == alone
    assert (right.displaced, left.displaced) == (None, 0)
    assert left.places.tolist() == [1, 2, 3] and left.lengths == (3,)
    assert names([[9, 5, 6, 7]], [[0, 1, 1, 1]], independent=False).names != alone
    assert names([[0, 0]], [[0, 0]]).names == ()


def test_packed_lines_are_cut_where_positions_start_again():
    lines, positions = [[5, 6, 7, 5, 6, 8]], [[0, 1, 2, 0, 1, 0]]
    found = names(lines, positions=positions)
    assert found.lengths == (3, 2, 1) and found.places.tolist() == list(range(6)) and found.displaced == 1
    assert found.names[1] == names([[5, 6]], positions=[[0, 1]]).names[0]
    assert names(lines, positions=positions, independent=False).lengths == (6,)


def test_tokens_positions_and_regime_tell_rows_apart():
    different = [
        names([[5, 6, 7]]),
        names([[5, 7, 6]]),
        names([[5, 6]]),
        names([[5, 6, 7]], positions=[[0, 2, 3]]),
        names([[5, 6, 7]], regime=b"autocast"),
        names([[5, 6, 7, 8]], [[1, 0, 1, 1]]),
    ]
    assert len({found.names for found in different}) == len(different)
    assert names([[5, 6, 7]], positions=[[0, 1, 2]]).names == names([[5, 6, 7]]).names  # what a model makes by itself
