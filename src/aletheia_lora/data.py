"""Rows -> token batches with labels; probe, train and validation parts, seeded and disjoint.

Comes in: rows in one of TRL's formats. Goes out: :class:`TokenizedRows`, parts of them, and batches of tensors. A row
that cannot be read or supervised is named or counted, never passed over. Shape legend: B rows, T tokens.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .errors import DataError
from .rows import listed, load_rows, shown

__all__ = [
    "Parts",
    "TokenizedRow",
    "TokenizedRows",
    "as_batches",
    "batches",
    "collate",
    "load_rows",
    "split",
    "tokenize",
]

NO_LABEL = -100
FORMATS = "`messages`, `prompt` and `completion`, `text`, or `input_ids`"


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """One example as token ids, with the label of each."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """``labels[i]`` belongs to token i, unshifted; -100 where the loss does not look."""

    @property
    def num_labelled(self) -> int:
        """Labels that enter the loss. The first token is predicted from nothing, so its label never does."""
        return sum(label != NO_LABEL for label in self.labels[1:])


@dataclass(frozen=True)
class TokenizedRows(Sequence[TokenizedRow]):
    """Tokenized examples and what happened on the way. A part or slice keeps the counts of the whole."""

    rows: tuple[TokenizedRow, ...]
    num_truncated: int = 0
    """Rows cut to ``max_length``, whether kept or then dropped."""
    num_dropped: int = 0
    """Rows left out because no label was left to learn from."""
    source_format: str = "tokenized"
    """``messages``, ``prompt/completion``, ``text``, ``tokenized``, or ``columns a/b``."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TokenizedRow]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedRow: ...
    @overload
    def __getitem__(self, index: slice) -> TokenizedRows: ...
    def __getitem__(self, index: int | slice) -> TokenizedRow | TokenizedRows:
        return replace(self, rows=self.rows[index]) if isinstance(index, slice) else self.rows[index]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all ids and labels, in order."""
        content = hashlib.sha256()
        for row in self.rows:
            content.update(np.array([len(row.input_ids), *row.input_ids, *row.labels], dtype="<i8").tobytes())
        return content.hexdigest()

    def to_dataset(self) -> Any:
        """The rows as a ``datasets.Dataset`` with the columns ``input_ids`` and ``labels``."""
        from datasets import Dataset  # slow to import, and needed here only

        columns = {key: [list(getattr(row, key)) for row in self.rows] for key in ("input_ids", "labels")}
        return Dataset.from_dict(columns)


@dataclass(frozen=True, slots=True)
class Parts:
    """Three parts of one data set that share no row content."""

    probe: TokenizedRows
    train: TokenizedRows
    validation: TokenizedRows


# --- tokenizing -------------------------------------------------------------------------------------------------


def tokenize(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    completion_only: bool = True,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    parse_special_tokens: bool = False,
) -> TokenizedRows:
    """Token ids and labels of rows in one of TRL's formats; the first row says which.

    ``messages`` goes through the chat template; labels are on every assistant turn up to its end-of-turn token.
    ``prompt`` and ``completion`` are two strings, joined as they are, or two lists of messages. Two named columns are
    a user's and an assistant's turn where the tokenizer has a chat template, else two paragraphs. ``text`` has no
    prompt. One end-of-sequence token closes a string, and is supervised. Rows that already have ``input_ids`` lose
    what their ``attention_mask`` hides and keep their ``labels``; without labels every token is one.

    Args:
        rows: Rows as :func:`load_rows` gives them.
        tokenizer: Any transformers tokenizer. Not used for rows that already have ``input_ids``.
        max_length: Tokens kept from the start of each row.
        completion_only: Put labels on completions and assistant turns only; otherwise on every token.
        prompt_column: Column with the prompt, where it has another name.
        completion_column: Column with the completion, where it has another name.
        parse_special_tokens: Read special tokens that the data spells out as tokens, for strings that already went
            through a chat template. Otherwise text stays text, with a warning where most rows spell one.

    Returns:
        The rows that have something to learn from, and the counts of those cut and dropped.

    Raises:
        DataError: If a column is missing, a cell has the wrong type, a chat template cannot be followed, or no row is
            left with a label; names the row and column.
    """
    if max_length < 2:
        raise DataError(f"max_length={max_length}, expected at least 2: the first token carries no loss.")
    rows = load_rows(list(rows))
    name, columns = _format_of(rows[0], prompt_column, completion_column)
    text = None if name == "tokenized" else _Text(tokenizer, completion_only, parse_special_tokens)
    kept: list[TokenizedRow] = []
    num_truncated = 0
    for number, row in enumerate(rows, 1):
        missing = [column for column in columns if column not in row]
        if missing:
            raise DataError(f"row {number} lacks {listed(missing)}, which row 1 has; it has {listed(row)}.")
        ids, labels = _read_tokens(row, number, completion_only) if text is None else text.read(row, number, columns)
        num_truncated += len(ids) > max_length
        tokenized = TokenizedRow(tuple(ids[:max_length]), tuple(labels[:max_length]))
        if tokenized.num_labelled:
            kept.append(tokenized)
    if text is not None and len(text.spelled_rows) > len(rows) / 2:  # a few rows may well quote one; most do not
        found = f"{len(text.spelled_rows)} of {len(rows)} rows spell out special tokens, kept as plain text"
        warnings.warn(f"{found}. If a chat template wrote them, pass parse_special_tokens=True.", stacklevel=2)
    if not kept:
        found = f"{len(rows)} rows, {num_truncated} of them cut to max_length={max_length}"
        raise DataError(f"no row has a supervised token: {found}. Raise max_length, or check the completions.")
    return TokenizedRows(tuple(kept), num_truncated, len(rows) - len(kept), name)


def _format_of(row: Mapping[str, Any], prompt: str | None, completion: str | None) -> tuple[str, list[str]]:
    """The name of the format, and the columns that every row then needs."""
    pair = [prompt or "prompt", completion or "completion"]
    if prompt is not None or completion is not None:
        missing = [column for column in pair if column not in row]
        if missing:
            raise DataError(f"no column {listed(missing)} for prompt and completion; the columns are {listed(row)}.")
        return "columns " + "/".join(pair), pair
    known = {"tokenized": ["input_ids"], "messages": ["messages"], "prompt/completion": pair, "text": ["text"]}
    for name, columns in known.items():
        if all(column in row for column in columns):
            return name, columns
    advice = "Name other columns with prompt_column and completion_column (--prompt-column, --completion-column)."
    raise DataError(f"the columns {listed(row)} are no known format, expected {FORMATS}. {advice}")


class _Text:
    """Turns text into ids and labels with one tokenizer, and counts the special tokens that text spells out."""

    def __init__(self, tokenizer: Any, completion_only: bool, parse_special_tokens: bool) -> None:
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise DataError("the tokenizer has no end-of-sequence token to close a text with. Set tokenizer.eos_token.")
        self.tokenizer, self.completion_only, self.parse = tokenizer, completion_only, parse_special_tokens
        self.eos: int = tokenizer.eos_token_id
        self.special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.special |= set(tokenizer.all_special_ids)
        self.ends = self.special - {tokenizer.unk_token_id}
        self.num_added = len(tokenizer("").input_ids)
        self.adds_eos = tokenizer("a").input_ids[-1] == self.eos
        self.spelled_rows: set[int] = set()  # rows whose strings hold the name of a special token

    def read(self, row: Mapping[str, Any], number: int, columns: list[str]) -> tuple[list[int], list[int]]:
        if columns == ["messages"]:
            return self._conversation(_messages(row, number, "messages"), 0, number)
        if columns == ["text"]:
            ids = self._closed(_string(row, number, "text"), number)
            return ids, list(ids)
        if all(isinstance(row[column], list | tuple) for column in columns):
            before, after = (_messages(row, number, column) for column in columns)
            return self._conversation(before + after, len(before), number)
        prompt, completion = (_string(row, number, column) for column in columns)
        if columns != ["prompt", "completion"]:  # plain columns, not written for joining as TRL's are
            if self.tokenizer.chat_template:
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                return self._conversation(turns, 1, number)
            prompt += "\n" if prompt[-1:].strip() and completion[:1].strip() else ""
        ids = self._closed(prompt + completion, number)
        # As TRL: where a token spans the seam, the completion starts with it.
        start = _common(self._encoded(prompt, number), ids) if self.completion_only else 0
        return ids, [NO_LABEL] * start + ids[start:]

    def _closed(self, text: str, number: int) -> list[int]:
        """The ids of a string with one end-of-sequence token, whether the string already spells one or not."""
        eos_text, stripped = self.tokenizer.eos_token, text.rstrip()
        return [
            *self._encoded(stripped.removesuffix(eos_text) if stripped.endswith(eos_text) else text, number),
            self.eos,
        ]

    def _encoded(self, text: str, number: int) -> list[int]:
        """The ids of a string, at most one beginning-of-sequence token before them and nothing after."""
        ids: list[int] = list(self.tokenizer(text, verbose=False).input_ids)
        if not self.parse and sum(token in self.special for token in ids) > self.num_added:
            plain = list(self.tokenizer(text, split_special_tokens=True, verbose=False).input_ids)
            self.tokenizer("")  # puts the tokenizer's mode back
            if plain != ids:
                self.spelled_rows.add(number)
            ids = plain
        if len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
            del ids[0]
        if self.adds_eos:
            del ids[-1]
        return ids

    def _conversation(self, messages: list[Any], first: int, number: int) -> tuple[list[int], list[int]]:
        """Ids of a conversation; labels on the assistant turns from message ``first`` on, or on everything."""
        ids = self._rendered(messages, number)
        labels = [NO_LABEL] * len(ids)
        for idx in range(first, len(messages)):
            if messages[idx]["role"] != "assistant":
                continue
            is_last = idx == len(messages) - 1
            before = self._rendered(messages[:idx], number, add_generation_prompt=True)
            upto = ids if is_last else self._rendered(messages[: idx + 1], number)
            start, end = _common(before, ids), _common(upto, ids)
            # Some templates close an unfinished conversation with one more end-of-sequence token.
            if start < len(before) or end <= start or upto[end:] not in ([], [self.eos]):
                raise DataError(
                    f"row {number}: the chat template does not render message {idx + 1} as a continuation of those "
                    "before it, so the tokens to learn cannot be told apart. Use a template that keeps earlier turns "
                    "unchanged (trl.chat_template_utils.get_training_chat_template knows some), or strings."
                )
            stop = self._end_of_turn(ids, start, end)
            if stop is None and is_last:
                ids, labels, stop = [*ids, self.eos], [*labels, NO_LABEL], end
            end = end if stop is None else stop + 1
            labels[start:end] = ids[start:end]
        return ids, labels if self.completion_only else list(ids)

    def _end_of_turn(self, ids: list[int], start: int, end: int) -> int | None:
        """Position of the token that ends the turn; what a template writes after it is never generated."""
        stops = [i for i in range(start, end) if ids[i] == self.eos]
        stops = stops or [i for i in range(start, end) if ids[i] in self.ends]
        return stops[-1] if stops else None

    def _rendered(self, messages: list[Any], number: int, *, add_generation_prompt: bool = False) -> list[int]:
        if not self.tokenizer.chat_template:
            advice = "Set tokenizer.chat_template, use an instruct model's tokenizer, or give strings."
            raise DataError(f"row {number} holds messages, but the tokenizer has no chat template. {advice}")
        try:
            return list(
                self.tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=add_generation_prompt,
                    return_dict=False,
                    sanitize_control_tokens=not self.parse,
                )
            )
        except Exception as error:  # templates are programs and raise what they like
            advice = "Check the order of the roles: most templates start with system or user."
            raise DataError(f"row {number}: the chat template refuses these messages: {error}. {advice}") from error


def _read_tokens(row: Mapping[str, Any], number: int, completion_only: bool) -> tuple[list[int], list[int]]:
    """Ids and labels of a row that is already tokenized, without what its attention mask hides."""
    ids = _integers(row, number, "input_ids")
    known = ("attention_mask", "labels", "completion_mask")
    columns = {key: _integers(row, number, key) for key in known if row.get(key) is not None}
    for key, values in columns.items():
        if len(values) != len(ids):
            raise DataError(f"row {number} has {len(values)} {key} for {len(ids)} input_ids, expected as many.")
    labels = columns.get("labels", ids)
    if completion_only and "labels" not in columns and "completion_mask" in columns:
        labels = [token if on else NO_LABEL for token, on in zip(ids, columns["completion_mask"], strict=True)]
    seen = columns.get("attention_mask", [1] * len(ids))
    return [t for t, on in zip(ids, seen, strict=True) if on], [t for t, on in zip(labels, seen, strict=True) if on]


def _integers(row: Mapping[str, Any], number: int, column: str) -> list[int]:
    value = row[column].tolist() if hasattr(row[column], "tolist") else row[column]
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        value = value[0]  # shape (1, T)
    if not isinstance(value, list | tuple) or not all(isinstance(item, int) for item in value):
        raise DataError(f"row {number}, column {column!r} is {shown(value)}, expected token ids, (T,) or (1, T).")
    return list(value)


def _string(row: Mapping[str, Any], number: int, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"row {number}, column {column!r} is {shown(value)}, expected a string.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        advice = "Remove the row, or write the character whole."
        raise DataError(f"row {number}, column {column!r} has half a character at {error.start}. {advice}") from error
    return value


def _messages(row: Mapping[str, Any], number: int, column: str) -> list[Any]:
    messages = row[column]
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"row {number}, column {column!r} is {shown(messages)}, expected a list of messages.")
    for idx, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"row {number}, column '{column}[{idx}]' is {shown(message)}, expected role and content.")
        cells = {f"{column}[{idx}].{key}": message.get(key) for key in ("role", "content")}
        for name in cells:
            _string(cells, number, name)
    return list(messages)


def _common(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


# --- parts and batches ------------------------------------------------------------------------------------------


def split(rows: TokenizedRows | Sequence[TokenizedRow], *, seed: int, probe: int, validation: int) -> Parts:
    """Shuffle and cut into parts of ``probe`` and ``validation`` rows; the rest is for training.

    Rows with the same ids go to the same part, so that nothing validated was trained on. The validation part depends
    on its own size and the seed only, not on the size of the probe.

    Raises:
        DataError: If there are too few rows, or too few that differ.
    """
    whole = rows if isinstance(rows, TokenizedRows) else TokenizedRows(tuple(rows))
    groups: dict[tuple[int, ...], list[TokenizedRow]] = {}
    for idx in np.random.default_rng(seed).permutation(len(whole)):
        groups.setdefault(whole[int(idx)].input_ids, []).append(whole[int(idx)])
    wanted = {"validation": validation, "probe": probe, "train": len(whole)}
    parts: dict[str, list[TokenizedRow]] = {name: [] for name in wanted}
    for group in groups.values():
        part = next(name for name, count in wanted.items() if len(parts[name]) + len(group) <= count)
        parts[part].extend(group)
    if len(parts["validation"]) != validation or len(parts["probe"]) != probe or not parts["train"]:
        raise DataError(
            f"got {len(whole)} rows, {len(groups)} of them different; need {probe} for the probe, {validation} for "
            "validation and at least 1 for training, with no content in two parts. Ask for less, or give more rows."
        )
    return Parts(**{name: replace(whole, rows=tuple(part)) for name, part in parts.items()})


def collate(rows: Sequence[TokenizedRow], pad_token_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` of shape (B, T), int64, padded on the right.

    Padding is hidden by the mask and has no label, so ``pad_token_id`` may equal the end-of-sequence token.
    """
    length = max(len(row.input_ids) for row in rows)
    input_ids_BT = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    labels_BT = torch.full_like(input_ids_BT, NO_LABEL)
    mask_BT = torch.zeros_like(input_ids_BT)
    for i, row in enumerate(rows):
        input_ids_BT[i, : len(row.input_ids)] = torch.tensor(row.input_ids, dtype=torch.int64)
        labels_BT[i, : len(row.labels)] = torch.tensor(row.labels, dtype=torch.int64)
        mask_BT[i, : len(row.input_ids)] = 1
    return {"input_ids": input_ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def batches(rows: Sequence[TokenizedRow], batch_size: int, pad_token_id: int) -> Iterator[dict[str, Tensor]]:
    """The rows in order, ``batch_size`` at a time; the last batch may be smaller.

    Raises:
        DataError: If there are fewer rows than one batch. Raised at the call, not at the first batch.
    """
    if batch_size < 1 or len(rows) < batch_size:
        raise DataError(f"got {len(rows)} rows for batches of {batch_size}, expected at least one full batch.")
    return (collate(rows[i : i + batch_size], pad_token_id) for i in range(0, len(rows), batch_size))


def as_batches(dataset: Any, *, num_batches: int, seed: int) -> list[dict[str, Tensor]]:
    """Up to ``num_batches`` batches of one row, drawn as a shuffled ``DataLoader`` seeded with ``seed`` draws them.

    Args:
        dataset: Rows with ``input_ids``, as lists or tensors of shape (T,) or (1, T): a ``datasets.Dataset``, a list
            of dicts, :class:`TokenizedRows`.
        num_batches: Batches wanted; a shorter data set gives what it has.
        seed: Seed of the order. The global random state is not read or moved.

    Returns:
        Batches of ``input_ids``, ``attention_mask`` (ones if absent) and ``labels`` (if absent, the ids that the mask
        does not hide).

    Raises:
        DataError: If there are no rows, or a row lacks ``input_ids``.
    """
    if num_batches < 1:
        raise DataError(f"num_batches={num_batches}, expected at least 1.")
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise DataError(f"got {type(dataset).__name__}, expected rows with a length. Take some into a list first.")
    if len(dataset) == 0:
        raise DataError("got 0 rows, expected at least one. Check the file, or the split.")
    loader: Any = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=1,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=_one_row_batch,
    )
    return list(itertools.islice(loader, num_batches))


def _one_row_batch(rows: Sequence[Any]) -> dict[str, Tensor]:
    row = rows[0]
    if isinstance(row, TokenizedRow):
        row = {"input_ids": row.input_ids, "labels": row.labels}
    if not isinstance(row, Mapping) or "input_ids" not in row:
        keys = f"a row with the keys {listed(row)}" if isinstance(row, Mapping) else f"a row that is {shown(row)}"
        raise DataError(f"got {keys}, expected 'input_ids'. Tokenize the rows first (aletheia_lora.data.tokenize).")
    batch = {key: torch.as_tensor(row[key]) for key in ("input_ids", "attention_mask", "labels") if key in row}
    shape = tuple(batch["input_ids"].shape)
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
        raise DataError(f"got input_ids of shape {shape} in one row, expected (T,) or (1, T).")
    batch = {key: value.reshape(1, -1) for key, value in batch.items()}
    mask = batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    if "labels" not in batch:
        batch["labels"] = batch["input_ids"].masked_fill(mask == 0, NO_LABEL)
    return batch
