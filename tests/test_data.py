"""Tokens and labels: what is learned, what is not, and how rows become parts and batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from aletheia_lora.data import TokenizedRow, TokenizedRows, as_batches, batches, collate, split, tokenize
from aletheia_lora.errors import DataError

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<end>"]
WORDS = ["one", "two", "three", "four", "five", "six", "filler", "end"]
PAD, BOS, EOS, UNK, USER, ASSISTANT, END = range(7)
ONE, TWO, THREE, FOUR, FIVE, SIX, FILLER, _ = range(7, 15)

TURNS = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> filler {% endfor %}"
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
CHAT = TURNS + ASK


def made_tokenizer(*, adds: str = "<s> $A", chat_template: str | None = None, eos: str = "</s>") -> Any:
    """One token a word. ``adds`` is what the tokenizer puts around every text."""
    vocab = {word: idx for idx, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(single=adds, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<end>"],
        chat_template=chat_template,
    )


@pytest.fixture
def tokenizer() -> Any:
    return made_tokenizer()


@pytest.fixture
def chat_tokenizer() -> Any:
    return made_tokenizer(chat_template=CHAT)


@pytest.fixture(autouse=True)
def global_random_state_stands() -> Iterator[None]:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index, union-attr]
    yield
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index, union-attr]


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def numbered(count: int) -> TokenizedRows:
    return TokenizedRows(tuple(TokenizedRow((idx, idx + 1, 2), (-100, idx + 1, 2)) for idx in range(count)))


# --- prompt and completion --------------------------------------------------------------------------------------


def test_prompt_has_no_label_and_completion_has() -> None:
    rows = tokenize([{"prompt": "one two", "completion": " three four"}], made_tokenizer())
    assert rows[0] == TokenizedRow((BOS, ONE, TWO, THREE, FOUR, EOS), (-100, -100, -100, THREE, FOUR, EOS))
    assert rows[0].num_labelled == 3
    assert (rows.source_format, rows.num_truncated, rows.num_dropped) == ("prompt/completion", 0, 0)


def test_strings_are_not_wrapped_in_the_chat_template(tokenizer: Any, chat_tokenizer: Any) -> None:
    row = {"prompt": "one", "completion": " two"}
    assert tokenize([row], tokenizer).digest == tokenize([row], chat_tokenizer).digest


def test_named_columns_are_read_as_prompt_and_completion(tokenizer: Any) -> None:
    plain = tokenize([{"prompt": "one", "completion": " two"}], tokenizer)
    named = tokenize(
        [{"question": "one", "answer": " two"}], tokenizer, prompt_column="question", completion_column="answer"
    )
    assert named.rows == plain.rows
    assert named.source_format == "columns question/answer"


def test_named_columns_are_turns_where_there_is_a_chat_template_and_paragraphs_where_not(
    tokenizer: Any, chat_tokenizer: Any
) -> None:
    rows, names = [{"q": "one", "a": "two"}], {"prompt_column": "q", "completion_column": "a"}
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert tokenize(rows, chat_tokenizer, **names).rows == tokenize([{"messages": turns}], chat_tokenizer).rows
    joined = tokenize([{"prompt": "one\n", "completion": "two"}], tokenizer)
    assert tokenize(rows, tokenizer, **names).rows == joined.rows


def test_without_completion_only_every_token_is_a_label(tokenizer: Any) -> None:
    row = tokenize([{"prompt": "one", "completion": " two"}], tokenizer, completion_only=False)[0]
    assert row.labels == row.input_ids == (BOS, ONE, TWO, EOS)
    assert row.num_labelled == 3  # the first is predicted from nothing


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("completion", [" two", " two</s>", " two </s>\n"])
def test_eos_is_supervised_once_and_bos_stands_at_most_once(adds: str, completion: str) -> None:
    row = tokenize([{"prompt": "one", "completion": completion}], made_tokenizer(adds=adds))[0]
    assert [label for label in row.labels if label != -100] == [TWO, EOS]
    assert row.input_ids.count(BOS) == adds.count("<s>")
    assert row.input_ids.count(EOS) == 1


def test_eos_is_supervised_where_it_is_also_the_pad_token() -> None:
    tokenizer = made_tokenizer()
    tokenizer.pad_token = "</s>"
    rows = tokenize([{"text": "one"}, {"text": "one two three"}], tokenizer)
    batch = collate(rows, tokenizer.pad_token_id)
    assert batch["labels"].tolist() == [[BOS, ONE, EOS, -100, -100], [BOS, ONE, TWO, THREE, EOS]]


def test_a_token_that_spans_the_seam_belongs_to_the_completion() -> None:
    rows = tokenize([{"prompt": "one fi", "completion": "ve six"}], made_tokenizer())
    assert rows[0] == TokenizedRow((BOS, ONE, FIVE, SIX, EOS), (-100, -100, FIVE, SIX, EOS))


def test_text_is_all_label(tokenizer: Any) -> None:
    rows = tokenize([{"text": "one two"}], tokenizer)
    assert rows[0].labels == rows[0].input_ids == (BOS, ONE, TWO, EOS)
    assert rows.source_format == "text"


def test_a_special_token_in_text_stays_text(tokenizer: Any) -> None:
    rows = [{"prompt": "one", "completion": " <end> two </s> <s> three"}, {"prompt": "one", "completion": " two"}]
    first = tokenize(rows, tokenizer)[0]
    assert first.input_ids.count(EOS) == first.input_ids.count(BOS) == 1
    assert END not in first.input_ids
    assert tokenizer.backend_tokenizer.encode("<end>").ids == [BOS, END]  # the caller's tokenizer is as it was


def test_special_tokens_in_most_rows_are_announced_and_can_be_parsed(tokenizer: Any) -> None:
    rows = [{"text": "<s><user> one <end> <assistant> two <end></s>"}]
    with pytest.warns(UserWarning, match=r"1 of 1 rows spell out special tokens.*parse_special_tokens=True"):
        plain = tokenize(rows, tokenizer)
    assert USER not in plain[0].input_ids
    parsed = tokenize(rows, tokenizer, parse_special_tokens=True)[0]
    assert parsed.input_ids == (BOS, USER, ONE, END, ASSISTANT, TWO, END, EOS)


# --- conversations ----------------------------------------------------------------------------------------------


def test_labels_are_on_every_assistant_turn_up_to_its_end() -> None:
    rows = tokenize([{"messages": turns("one", "two", "three", "four")}], made_tokenizer(chat_template=CHAT))
    ids = (USER, ONE, END, FILLER, ASSISTANT, TWO, END, FILLER, USER, THREE, END, FILLER, ASSISTANT, FOUR, END, FILLER)
    assert rows[0].input_ids == ids
    labelled = [i for i, label in enumerate(rows[0].labels) if label != -100]
    assert labelled == [5, 6, 13, 14]
    assert all(rows[0].labels[i] == ids[i] for i in labelled)
    assert rows.source_format == "messages"


def test_conversational_prompt_and_completion_label_the_completion_only(chat_tokenizer: Any) -> None:
    messages = turns("one", "two", "three", "four")
    row = tokenize([{"prompt": messages[:3], "completion": messages[3:]}], chat_tokenizer)[0]
    assert [i for i, label in enumerate(row.labels) if label != -100] == [13, 14]


def test_messages_without_completion_only_label_every_token(chat_tokenizer: Any) -> None:
    row = tokenize([{"messages": turns("one", "two")}], chat_tokenizer, completion_only=False)[0]
    assert row.labels == row.input_ids


def test_a_special_token_in_a_message_stays_text(chat_tokenizer: Any) -> None:
    row = tokenize([{"messages": turns("one <end> <assistant> six", "two")}], chat_tokenizer)[0]
    assert [label for label in row.labels if label != -100] == [TWO, END]
    assert row.input_ids.count(ASSISTANT) == 1


def test_a_template_without_end_of_turn_gets_one_eos() -> None:
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}" + ASK
    row = tokenize([{"messages": turns("one", "two")}], made_tokenizer(chat_template=template))[0]
    assert row == TokenizedRow((USER, ONE, ASSISTANT, TWO, EOS), (-100, -100, -100, TWO, EOS))


def test_a_template_that_closes_the_conversation_with_eos_is_followed() -> None:
    template = TURNS + "{% if add_generation_prompt %}<assistant>{% else %}</s>{% endif %}"
    row = tokenize([{"messages": turns("one", "two", "three", "four")}], made_tokenizer(chat_template=template))[0]
    assert row.input_ids.count(EOS) == 1
    assert [label for label in row.labels if label != -100] == [TWO, END, FOUR, END, FILLER, EOS]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    template = (
        "{% for m in messages %}{% if loop.last %}five {% endif %}<{{ m.role }}> {{ m.content }} <end>{% endfor %}"
    )
    rows = [{"messages": turns("one", "two")}]
    with pytest.raises(DataError, match=r"row 1: the chat template does not render message 2 as a continuation"):
        tokenize(rows, made_tokenizer(chat_template=template + ASK))


def test_a_template_that_raises_names_the_row() -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHAT
    rows = [{"messages": turns("one", "two")}, {"messages": turns("one", "two")[1:]}]
    with pytest.raises(DataError, match=r"row 2: the chat template refuses these messages: user first"):
        tokenize(rows, made_tokenizer(chat_template=template))


def test_messages_need_a_chat_template(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"row 1 holds messages, but the tokenizer has no chat template"):
        tokenize([{"messages": turns("one", "two")}], tokenizer)


# --- rows that are tokenized already ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [list, torch.tensor, lambda ids: torch.tensor([ids])])
def test_tokenized_rows_lose_their_padding_and_keep_their_labels(form: Any) -> None:
    row = {"input_ids": [0, 0, 7, 8, 9], "attention_mask": [0, 0, 1, 1, 1], "labels": [0, 0, -100, 8, 9]}
    rows = tokenize([{key: form(value) for key, value in row.items()}], None)
    assert rows[0] == TokenizedRow((7, 8, 9), (-100, 8, 9))
    assert rows.source_format == "tokenized"


def test_tokenized_rows_without_labels_are_all_label() -> None:
    assert tokenize([{"input_ids": [7, 8]}], None)[0].labels == (7, 8)
    masked = {"input_ids": [7, 8, 9], "completion_mask": [0, 0, 1]}
    assert tokenize([masked], None)[0].labels == (-100, -100, 9)
    assert tokenize([masked], None, completion_only=False)[0].labels == (7, 8, 9)


# --- what is cut, dropped and refused ---------------------------------------------------------------------------


def test_cut_and_dropped_rows_are_counted(tokenizer: Any) -> None:
    rows = [
        {"prompt": "one", "completion": " two"},
        {"prompt": "one", "completion": " two three four five"},
        {"prompt": "one two three four five", "completion": " six"},
    ]
    tokenized = tokenize(rows, tokenizer, max_length=4)
    assert [row.input_ids for row in tokenized] == [(BOS, ONE, TWO, EOS), (BOS, ONE, TWO, THREE)]
    assert (len(tokenized), tokenized.num_truncated, tokenized.num_dropped) == (2, 2, 1)


def test_nothing_left_to_learn_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"no row has a supervised token: 1 rows, 1 of them cut to max_length=2\. Raise"
    ):
        tokenize([{"prompt": "one two", "completion": " three"}], tokenizer, max_length=2)
    with pytest.raises(DataError, match=r"no row has a supervised token"):
        tokenize([{"input_ids": [7, 8], "labels": [7, -100]}], None)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"no rows"),
        ([{"text": "one"}], {"max_length": 1}, r"max_length=1, expected at least 2"),
        (
            [{"question": "q", "answer": "a"}],
            {},
            r"columns 'question', 'answer' are no known format, expected `messages`",
        ),
        ([{"text": "a"}], {"prompt_column": "q"}, r"no column 'q', 'completion' for prompt and completion.*are 'text'"),
        ([{"text": "one"}, {"txt": "one"}], {}, r"row 2 lacks 'text', which row 1 has; it has 'txt'"),
        ([{"text": "one"}, {"text": 1}], {}, r"row 2, column 'text' is int 1, expected a string"),
        ([{"prompt": 3, "completion": "a"}], {}, r"row 1, column 'prompt' is int 3, expected a string"),
        ([{"prompt": "a", "completion": None}], {}, r"row 1, column 'completion' is NoneType None"),
        ([{"prompt": "a", "completion": turns("a")}], {}, r"row 1, column 'completion' is list .*expected a string"),
        ([{"text": "a\ud800"}], {}, r"row 1, column 'text' has half a character at 1"),
        ([{"messages": "hello"}], {}, r"row 1, column 'messages' is str 'hello', expected a list of messages"),
        ([{"messages": []}], {}, r"row 1, column 'messages' is list \[\], expected a list of messages"),
        ([{"messages": ["hi"]}], {}, r"row 1, column 'messages\[0\]' is str 'hi', expected role and content"),
        ([{"messages": [{"role": "user"}]}], {}, r"row 1, column 'messages\[0\]\.content' is NoneType"),
        ([{"input_ids": [1, 2.5]}], {}, r"row 1, column 'input_ids' is list \[1, 2\.5\], expected token ids"),
        ([{"input_ids": [1, 2], "labels": [1]}], {}, r"row 1 has 1 labels for 2 input_ids, expected as many"),
    ],
)
def test_rows_that_cannot_be_read_name_the_place(rows: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize(rows, made_tokenizer(chat_template=CHAT), **options)


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = made_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end-of-sequence token .*Set tokenizer\.eos_token"):
        tokenize([{"text": "one"}], tokenizer)


# --- records, parts and batches ---------------------------------------------------------------------------------


def test_tokenized_rows_are_a_sequence_with_a_digest_of_their_content() -> None:
    rows = TokenizedRows(numbered(5).rows, num_truncated=3)
    assert len(rows) == len(list(rows)) == 5
    assert rows[1:3].rows == rows.rows[1:3]
    assert rows[1:3].num_truncated == 3
    assert rows.digest == numbered(5).digest != numbered(4).digest
    other = TokenizedRows((*rows.rows[:4], TokenizedRow(rows[4].input_ids, rows[4].input_ids)))
    assert other.digest != rows.digest


def test_to_dataset_and_back_loses_nothing() -> None:
    rows = numbered(5)
    dataset = rows.to_dataset()
    assert dataset.column_names == ["input_ids", "labels"]
    assert tokenize(dataset, None).rows == rows.rows


def test_parts_are_seeded_disjoint_and_complete() -> None:
    rows = numbered(50)
    parts = split(rows, seed=3, probe=5, validation=10)
    assert [len(part) for part in (parts.probe, parts.train, parts.validation)] == [5, 35, 10]
    assert {*parts.probe, *parts.train, *parts.validation} == set(rows)
    assert split(rows, seed=3, probe=5, validation=10) == parts
    assert split(rows, seed=4, probe=5, validation=10) != parts
    assert split(list(rows), seed=3, probe=0, validation=10).validation.rows == parts.validation.rows


def test_rows_of_one_content_stay_in_one_part() -> None:
    rows = [*numbered(20), *numbered(10), *(TokenizedRow(row.input_ids, row.input_ids) for row in numbered(5))]
    for seed in range(20):
        parts = split(rows, seed=seed, probe=3, validation=7)
        probe, train, validation = (
            {row.input_ids for row in part} for part in (parts.probe, parts.train, parts.validation)
        )
        assert not (probe & train or probe & validation or train & validation)
        assert (len(parts.probe), len(parts.validation)) == (3, 7)


@pytest.mark.parametrize(
    ("rows", "probe", "validation"), [(numbered(10), 5, 5), ([*numbered(1)] * 9, 1, 1), (numbered(9), -1, 2)]
)
def test_too_few_rows_for_the_parts_are_refused(rows: Any, probe: int, validation: int) -> None:
    with pytest.raises(DataError, match=rf"got {len(rows)} rows, .* need {probe} for the probe, {validation} for"):
        split(rows, seed=0, probe=probe, validation=validation)


def test_collate_pads_on_the_right_without_labels() -> None:
    batch = collate([TokenizedRow((5, 6, 7), (-100, 6, 7)), TokenizedRow((8,), (8,))], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_batches_keep_the_order_and_the_rest() -> None:
    rows = numbered(5)
    shapes = [tuple(batch["input_ids"].shape) for batch in batches(rows, 2, 0)]
    assert shapes == [(2, 3), (2, 3), (1, 3)]
    assert torch.cat([batch["input_ids"] for batch in batches(rows, 2, 0)]).tolist() == [
        list(r.input_ids) for r in rows
    ]


@pytest.mark.parametrize("batch_size", [4, 0])
def test_fewer_rows_than_a_batch_are_refused_at_the_call(batch_size: int) -> None:
    with pytest.raises(DataError, match=rf"got 3 rows for batches of {batch_size}"):
        batches(numbered(3), batch_size, 0)


def test_as_batches_draws_what_a_seeded_loader_draws() -> None:
    dataset = numbered(20).to_dataset().with_format("torch")
    loader: Any = DataLoader(
        dataset, batch_size=1, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(7)
    )
    expected = [batch["input_ids"] for batch in loader][:4]
    found = as_batches(dataset, num_batches=4, seed=7)
    assert len(found) == 4
    assert all(torch.equal(batch["input_ids"], ids) for batch, ids in zip(found, expected, strict=True))


def test_as_batches_reads_every_kind_of_rows_alike() -> None:
    rows = numbered(6)
    dataset = rows.to_dataset()
    sources = [rows, rows.rows, list(dataset), dataset, dataset.with_format("torch")]
    sources.append([{key: torch.tensor([value]) for key, value in row.items()} for row in dataset])
    for source in sources:
        found = as_batches(source, num_batches=9, seed=1)
        assert len(found) == 6
        for batch, expected in zip(found, as_batches(rows, num_batches=9, seed=1), strict=True):
            assert batch.keys() == expected.keys() == {"input_ids", "attention_mask", "labels"}
            assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_as_batches_labels_what_the_mask_shows_unless_labels_are_given() -> None:
    row = {"input_ids": [7, 8, 0], "attention_mask": [1, 1, 0]}
    assert as_batches([row], num_batches=1, seed=0)[0]["labels"].tolist() == [[7, 8, -100]]
    given = as_batches([row | {"labels": [-100, 8, 0]}], num_batches=1, seed=0)[0]
    assert given["labels"].tolist() == [[-100, 8, 0]]
    assert given["attention_mask"].tolist() == [[1, 1, 0]]


@pytest.mark.parametrize(
    ("dataset", "num_batches", "message"),
    [
        ([], 1, r"got 0 rows"),
        (Dataset.from_list([{"text": "a", "label": 1}]), 1, r"keys 'text', 'label', expected 'input_ids'"),
        ([3], 1, r"a row that is int 3"),
        ([{"input_ids": [[1, 2], [3, 4]]}], 1, r"shape \(2, 2\) in one row"),
        (iter([]), 1, r"got list_iterator, expected rows with a length"),
        ([{"input_ids": [1]}], 0, r"num_batches=0, expected at least 1"),
    ],
)
def test_as_batches_refuses_what_it_cannot_read(dataset: Any, num_batches: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_batches(dataset, num_batches=num_batches, seed=0)
