import errno
import json
import math
import os
import stat

import numpy as np
import pytest

from aletheia_lora import files
from aletheia_lora.errors import OutputError
from aletheia_lora.files import check_writable, json_text, whole_folder, write_bytes, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def below_a_file(tmp_path):
    """A folder that not even root can make."""
    (tmp_path / "file").write_text("not a folder")
    return tmp_path / "file" / "folder"


# --- one file ---------------------------------------------------------------------------------------------------


def test_a_file_is_written_with_its_folders_and_replaced_whole(tmp_path):
    path = tmp_path / "a" / "b" / "text"
    assert write_bytes(path, b"old") == path
    assert write_bytes(path, b"new and longer") == path
    assert path.read_bytes() == b"new and longer"
    assert names(path.parent) == ["text"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod", "fdopen"])
def test_the_old_file_stands_and_no_temporary_one_is_left_when_a_write_fails(tmp_path, monkeypatch, call):
    path = write_bytes(tmp_path / "text", b"old")
    monkeypatch.setattr(files.os, call, disk_full)
    with pytest.raises(OutputError, match=r"No space left on device\. The old file, if any, stands") as caught:
        write_bytes(path, b"new")
    assert repr(str(path)) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["text"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_no_file_appears_when_the_first_write_fails(tmp_path, monkeypatch, call):
    monkeypatch.setattr(files.os, call, disk_full)
    with pytest.raises(OutputError):
        write_bytes(tmp_path / "text", b"new")
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = write_bytes(tmp_path / "text", b"old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["text"]


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace

    def noted_sync(handle):
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "content")
        sync(handle)

    def noted_replace(source, target):
        calls.append("name")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", noted_sync)
    monkeypatch.setattr(files.os, "replace", noted_replace)
    write_bytes(tmp_path / "text", b"new")
    assert calls == ["content", "name", "folder"]


def test_a_folder_that_cannot_be_made_is_an_output_error(below_a_file):
    with pytest.raises(OutputError, match="cannot write"):
        write_bytes(below_a_file / "text", b"new")
    with pytest.raises(OutputError, match=r"cannot write into .*Choose another folder or change its rights"):
        check_writable(below_a_file)
    with pytest.raises(OutputError, match="cannot write into"), whole_folder(below_a_file / "whole"):
        pytest.fail("the block must not run")


def test_a_folder_in_the_place_of_the_file_is_an_output_error(tmp_path):
    (tmp_path / "text").mkdir()
    with pytest.raises(OutputError):
        write_bytes(tmp_path / "text", b"new")
    assert names(tmp_path) == ["text"]


def test_checking_a_folder_makes_it_and_leaves_it_empty(tmp_path):
    folder = tmp_path / "a" / "b"
    assert check_writable(folder) == folder
    assert check_writable(folder) == folder
    assert names(folder) == []


# --- JSON -------------------------------------------------------------------------------------------------------


def test_nan_and_infinity_become_null_at_any_depth(tmp_path):
    value = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, 2)}], 3: np.float64("nan"), "d": True, "e": None}
    expected = {"a": None, "b": [1.5, None, {"c": [None, 2]}], "3": None, "d": True, "e": None}
    assert json.loads(json_text(value)) == expected
    assert "\n" not in json_text(value)
    path = write_json(tmp_path / "value.json", value)
    assert json.loads(path.read_text(encoding="utf-8")) == expected
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_json_keeps_every_digit_and_every_letter(tmp_path):
    value = {"number": 0.1 + 0.2, "text": "für 层 \u2028\x1b"}
    assert json.loads(json_text(value)) == value
    assert json.loads(write_json(tmp_path / "value.json", value).read_text(encoding="utf-8")) == value


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "value.json", [1])
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == [1]
    assert names(tmp_path) == ["value.json"]


# --- folders ----------------------------------------------------------------------------------------------------


def write_new(folder):
    (folder / "part").mkdir()
    (folder / "part" / "b").write_text("new")
    (folder / "a").write_text("new")


def test_a_folder_takes_its_name_only_when_the_block_ends(tmp_path):
    path = tmp_path / "made" / "whole"
    with whole_folder(path) as folder:
        write_new(folder)
        assert folder.parent == path.parent  # the same disk, so that the rename is one step
        assert not path.exists()
    assert names(path) == ["a", "part"] and (path / "part" / "b").read_text() == "new"
    assert names(path.parent) == ["whole"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("there_before", [False, True])
def test_an_exception_removes_the_unfinished_folder(tmp_path, error, there_before):
    path = tmp_path / "whole"
    if there_before:
        path.mkdir()
        (path / "old").write_text("old")

    def interrupted():
        with whole_folder(path) as folder:
            write_new(folder)
            raise error

    with pytest.raises(error):
        interrupted()
    assert names(tmp_path) == (["whole"] if there_before else [])
    if there_before:
        assert names(path) == ["old"] and (path / "old").read_text() == "old"


def test_an_old_folder_is_replaced_not_merged(tmp_path):
    path = tmp_path / "whole"
    path.mkdir()
    (path / "old").write_text("old")
    with whole_folder(path) as folder:
        write_new(folder)
    assert names(path) == ["a", "part"]
    assert names(tmp_path) == ["whole"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("there_before", [False, True])
def test_a_folder_that_cannot_be_finished_is_an_output_error(tmp_path, monkeypatch, call, there_before):
    path = tmp_path / "whole"
    if there_before:
        path.mkdir()
        (path / "old").write_text("old")
    monkeypatch.setattr(files.os, call, disk_full)

    def write():
        with whole_folder(path) as folder:
            write_new(folder)

    with pytest.raises(OutputError, match=r"cannot finish .*whole.*No space left on device"):
        write()
    assert names(tmp_path) == (["whole"] if there_before else [])
    if there_before:
        assert names(path) == ["old"]


@pytest.mark.parametrize(
    ("error", "seen"), [(OSError(errno.EIO, "broken"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_the_old_folder_stands_when_the_last_rename_fails(tmp_path, monkeypatch, error, seen):
    path = tmp_path / "whole"
    path.mkdir()
    (path / "old").write_text("old")
    replace = os.replace

    def fails_for_the_new_one(source, target):
        if os.fspath(target) == os.fspath(path) and os.path.exists(os.path.join(source, "a")):
            raise error
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fails_for_the_new_one)

    def write():
        with whole_folder(path) as folder:
            write_new(folder)

    with pytest.raises(seen):
        write()
    assert path.is_dir() and names(path) == ["old"]
    assert names(tmp_path) == ["whole"]
