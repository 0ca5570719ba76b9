"""Reading rows: every source gives the same rows, every broken one says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from aletheia_lora.errors import DataError
from aletheia_lora.rows import load_rows

ROWS = [{"prompt": "NA", "completion": "1"}, {"prompt": "größer, «x»", "completion": "zwei\nZeilen"}]


def written(tmp_path: Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        path.write_text('prompt,completion\nNA,1\n"größer, «x»","zwei\nZeilen"\n', encoding="utf-8")
    elif suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text(json.dumps(ROWS) if suffix == ".json" else jsonl(ROWS), encoding="utf-8")
    assert load_rows(path) == ROWS
    assert load_rows(str(path)) == ROWS


def test_a_dataset_and_a_list_give_the_same_rows() -> None:
    assert load_rows(datasets.Dataset.from_list(ROWS)) == ROWS
    assert load_rows(ROWS) == ROWS
    assert load_rows(ROWS)[0] is not ROWS[0]


def test_byte_order_mark_crlf_and_blank_lines_are_not_content(tmp_path: Path) -> None:
    source = written(tmp_path, "rows.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert load_rows(source) == [{"text": "a"}, {"text": "b"}]


def test_a_hub_id_asks_for_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("owner/name") == ROWS
    assert load_rows("owner/name:main", split="test") == ROWS
    assert asked == [("owner/name", None, "train"), ("owner/name", "main", "test")]


def test_lines_of_plain_text_are_rows_and_blank_ones_are_not(tmp_path: Path) -> None:
    content = " = Title = \n \n\nOne line\u2028of text , with \u00e9 .\r\n"
    assert load_rows(written(tmp_path, "text.txt", content)) == [
        {"text": "= Title ="},
        {"text": "One line\u2028of text , with \u00e9 ."},
    ]


def test_a_hub_failure_says_what_was_asked_and_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None, *, split: str) -> datasets.Dataset:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'train' of 'owner/name': ConnectionError: no network.*local"):
        load_rows("owner/name")


@pytest.mark.parametrize("source", ["/no/such/file", "./gone", "gone.jsonl", Path("gone")])
def test_a_missing_file_is_not_taken_for_a_hub_id(source: str | Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*No such file.*Check the path"):
        load_rows(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", r"is empty \(0 bytes\)"),
        ("rows.jsonl", "\n \n", r"has no rows"),
        ("rows.json", "[]", r"has no rows"),
        ("rows.csv", "prompt,completion\n", r"has no rows"),
        ("rows.jsonl", '{"a": 1}\n\n{"a": \n', r"row 3 of .* is not valid JSON: Expecting value: line 1 column 6"),
        ("rows.jsonl", '{"a": 1}\n[1, 2]\n', r"row 2 of .* is list \[1, 2\], expected an object"),
        ("rows.jsonl", "[" * 100_000, r"row 1 of .* is not valid JSON"),
        ("rows.jsonl", '{"a": ' + "9" * 5000 + "}", r"row 1 of .* is not valid JSON: Exceeds the limit"),
        ("rows.json", "[1]", r"row 1 of .* is int 1, expected an object"),
        ("rows.json", '{"data": []}', r"holds one dict with the keys 'data', expected a list of objects"),
        ("rows.json", "[{]", r"is not valid JSON"),
        ("rows.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"is not UTF-8: byte 0xff at byte offset 16"),
        ("rows.json", b'\xef\xbb\xbf["\xc0\xaf"]', r"is not UTF-8: byte 0xc0 at byte offset 5"),
        ("rows.jsonl", '{"a": 1}'.encode("utf-16"), r"is not UTF-8: byte 0xff at byte offset 0"),
        ("rows.csv", b"a\n\xff\n", r"is not UTF-8: byte 0xff at byte offset 2"),
        ("rows.csv", "a,b\n1,2\n1,2,3\n", r"row 2 of .* has 3 cells, expected 2 as in the header"),
        ("rows.csv", 'a,b\n"x"y,2\n', r"is not valid CSV near line 2"),
        ("rows.parquet", "PAR0", r"is not a readable Parquet file"),
        ("rows.txt", " \n\n", r"has no rows"),
        ("rows.doc", "hello", r"is not one of .jsonl, .json, .parquet, .csv, .txt"),
    ],
)
def test_a_broken_file_says_what_and_where(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(written(tmp_path, name, content))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"the list has no rows"),
        ([{"a": 1}, "\x1b[31mred"], r"row 2 of the list is str '\\x1b\[31mred', expected an object"),
        ({"train": []}, r"got dict, expected"),
        (7, r"got int, expected"),
        (iter([]), r"got list_iterator, expected"),
    ],
)
def test_a_source_of_another_type_is_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(source)
