"""A model and questions -> answers: the harness's own way of asking, with less work for the same numbers.

Comes in: a causal language model and a tokenizer. Goes out: an Answer for every Question, as each is finished.
Tokenization, chat template and truncation are those of the harness's ``HFLM``; what differs is the work:

- the output head sees only positions that are scored, and log-likelihoods are found in float32;
- the choices of an item share one pass over their common context, also where a choice has several tokens;
- a row that has stopped leaves the batch, and a waiting one takes its place;
- all items of all tasks are sorted by length in one pool.

Shape legend: B rows, T columns, N scored positions, V words of the vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from ..errors import ConfigError
from ..loss import full_precision, head_sees_only
from .answer import Answer, Question

LOGIT_BYTES = 512 << 20
"""Logits alive at once where many positions of a row are scored."""
CHUNK = 256
"""Positions whose logits are normalized at a time."""
NEW_TOKENS = 256
"""Tokens generated at most where a task does not say, as in the harness."""
GREEDY_ARGUMENTS = {"until", "do_sample", "temperature", "max_gen_toks", "top_p", "top_k"}
"""Generation arguments that mean something, or nothing, to greedy decoding."""
HARMLESS = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "do_sample",
    "temperature", "top_p", "top_k", "min_p", "typical_p", "max_length", "max_new_tokens", "use_cache",
    "cache_implementation", "trust_remote_code", "_from_model_config",
}  # fmt: skip
"""Defaults of a model's generation that do not change what greedy decoding says; with others that are on (penalties,
say), the model's own ``generate`` runs."""

Pair = tuple[list[int], list[int]]
"""Tokens of a context, and of the continuation to score."""


@dataclass(slots=True)
class Row:
    """One prompt under way."""

    index: int
    ids: list[int]
    until: list[str]
    max_new_tokens: int
    prompt_truncated: bool = False
    tokens: list[int] = field(default_factory=list)
    stop_reason: str | None = None


@dataclass(slots=True)
class State:
    """What a batch has read so far."""

    cache: DynamicCache
    mask_BT: Tensor
    logits_BV: Tensor
    """Of each row's next token."""

    @property
    def can_join(self) -> bool:
        """Whether other rows can be put below these: every layer keeps keys and values of all positions."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)


class LanguageModel(HFLM):  # type: ignore[misc]
    """A language model of the harness (it works in the harness's own loop too) that also answers item by item."""

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int = 8, max_new_tokens: int | None = None, **kwargs: Any
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: A causal language model in eval mode; adapters may be put on it and taken off later.
            tokenizer: Its tokenizer; a copy is used.
            batch_size: Prompts read at once.
            max_new_tokens: Generate at most so many tokens, also where a task allows more.
            kwargs: Passed on to ``HFLM``.
        """
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size, **kwargs
        )
        self.max_new_tokens = max_new_tokens
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        given = model.generation_config.eos_token_id if model.generation_config is not None else None
        eos = {self.tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])}
        self._eos = frozenset(token for token in eos if token is not None)
        self._own_cache = "past_key_values" in inspect.signature(model.forward).parameters and not getattr(
            model, "_is_stateful", False
        )
        defaults = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
        changed = {name for name, value in defaults.items() if value not in (None, False, 0, 1)} - HARMLESS
        self._own_loop = self._own_cache and not changed

    # --- item by item -------------------------------------------------------------------------------------------

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Answer every question, in an order that suits the batches.

        Yields:
            The question's place in the sequence, and its answer, as soon as it is complete.

        Raises:
            ConfigError: If a task wants sampled text, or more new tokens than the model can read.
        """
        scored = {n: question for n, question in enumerate(questions) if question.kind != "generate_until"}
        yield from self._scored(scored)
        rows = []
        for n, question in enumerate(questions):
            if question.kind == "generate_until":
                (prompt, arguments), *_ = question.requests
                rows.append(self._row(n, prompt, arguments))
        yield from self._generated(rows)

    def _scored(self, questions: dict[int, Question]) -> Iterator[tuple[int, Answer]]:
        pairs: list[Pair] = []
        owners: list[tuple[int, int]] = []
        for n, question in questions.items():
            for r, request in enumerate(question.requests):
                rolling = question.kind == "loglikelihood_rolling"
                parts = self._windows(request[0]) if rolling else [self._pair(*request)]
                pairs += parts
                owners += [(n, r)] * len(parts)
        missing: dict[int, int] = defaultdict(int)
        for n, _ in owners:
            missing[n] += 1
        found: dict[int, list[int]] = defaultdict(list)
        scores: dict[int, tuple[float, bool]] = {}
        for index, score in self._score_pairs(pairs):
            n, scores[index] = owners[index][0], score
            found[n].append(index)
            if len(found[n]) == missing[n]:
                mine = sorted(found.pop(n))
                yield n, self._answer(questions[n], [pairs[i] for i in mine], [(owners[i][1], scores[i]) for i in mine])

    def _answer(self, question: Question, pairs: list[Pair], scores: list[tuple[int, tuple[float, bool]]]) -> Answer:
        """The answer to a question whose pairs are all scored; windows of one text are added up."""
        totals = [0.0] * len(question.requests)
        greedy = [True] * len(question.requests)
        for request, (loglikelihood, is_greedy) in scores:
            totals[request] += loglikelihood
            greedy[request] &= is_greedy
        return Answer(
            loglikelihoods=tuple(totals),
            is_greedy=() if question.kind == "loglikelihood_rolling" else tuple(greedy),
            num_prompt_tokens=sum(map(len, {tuple(context) for context, _ in pairs})),
            num_response_tokens=sum(len(continuation) for _, continuation in pairs),
            prompt_truncated=any(len(context) + len(words) > self.max_length + 1 for context, words in pairs),
        )

    # --- the harness's interface --------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each (name, context, continuation), and whether greedy decoding says the same."""
        scores = dict(self._score_pairs([(context, words) for _, context, words in requests]))
        return [scores[index] for index in range(len(requests))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that each prompt is continued with, up to its stop."""
        rows = [self._row(n, *request.args) for n, request in enumerate(requests)]
        texts = {n: answer.response for n, answer in self._generated(rows)}
        return [texts[n] for n in range(len(requests))]

    # --- scoring ------------------------------------------------------------------------------------------------

    def _pair(self, context: str, continuation: str) -> Pair:
        if context:
            context_ids, words = self._encode_pair(context, continuation)
            return context_ids, words
        words = self.tok_encode(continuation, add_special_tokens=False)
        return ([self.prefix_token_id], words) if words[0] != self.prefix_token_id else (words[:1], words[1:])

    def _windows(self, text: str) -> list[Pair]:
        """A text of any length as windows that the model can read; every token is scored once."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _score_pairs(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, tuple[float, bool]]]:
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (context, _) in enumerate(pairs):
            by_context[tuple(context)].append(index)
        whole: dict[tuple[int, ...], list[int]] = defaultdict(list)
        shared = []
        for shared_context, members in by_context.items():
            longest = max(len(pairs[index][1]) for index in members)
            fits = len(shared_context) + longest <= self.max_length + 1
            if self._own_cache and fits and len(members) > 1 and 1 < longest <= len(shared_context):
                shared.append((shared_context, members))
                continue
            for index in members:
                context, words = pairs[index]
                whole[tuple([*context, *words][-(self.max_length + 1) :][:-1])].append(index)
        for batch in self._batches(list(whole.items()), pairs):
            yield from self._score_whole(batch, pairs)
        for batch in self._batches(shared, pairs):
            yield from self._score_shared(batch, pairs)

    def _batches(
        self, rows: list[tuple[tuple[int, ...], list[int]]], pairs: Sequence[Pair]
    ) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
        """Rows by falling length, as many at once as batch size and memory for logits allow."""
        batch: list[tuple[tuple[int, ...], list[int]]] = []
        num_bytes = 0
        for row in sorted(rows, key=lambda row: (-len(row[0]), row[0])):
            needed = 4 * self.model.config.get_text_config().vocab_size * sum(len(pairs[index][1]) for index in row[1])
            if batch and (len(batch) == self.batch_size or num_bytes + needed > LOGIT_BYTES):
                yield batch
                batch, num_bytes = [], 0
            batch.append(row)
            num_bytes += needed
        if batch:
            yield batch

    def _score_whole(
        self, batch: list[tuple[tuple[int, ...], list[int]]], pairs: Sequence[Pair]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Rows that run in one pass; their last positions are scored, for one continuation or several."""
        lengths = [len(ids) for ids, _ in batch]
        width = max(lengths)
        ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in batch], device=self.device)
        tails = [max(len(pairs[index][1]) for index in members) for _, members in batch]
        column_T = torch.arange(width, device=self.device)
        end_B1, tail_B1 = (torch.tensor(numbers, device=self.device)[:, None] for numbers in (lengths, tails))
        keep_BT = (column_T >= end_B1 - tail_B1) & (column_T < end_B1)
        logits_NV = self._logits_at(keep_BT, input_ids=ids_BT, use_cache=False)  # no mask: padding is on the right
        positions: list[int] = []
        targets: list[int] = []
        members_of: list[int] = []
        start = 0
        for (_, members), tail in zip(batch, tails, strict=True):
            for index in members:
                words = pairs[index][1]
                positions += range(start + tail - len(words), start + tail)
                targets += words
                members_of += [index] * len(words)
            start += tail
        yield from _sums(members_of, *_at_targets(logits_NV, positions, targets))

    def _score_shared(
        self, batch: list[tuple[tuple[int, ...], list[int]]], pairs: Sequence[Pair]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Contexts that several longer continuations share: read once, then each continuation after a copy of it."""
        ids_BT, mask_BT = self._left_padded([list(context) for context, _ in batch])
        cache = DynamicCache(config=self.model.config)
        first_BV = self._logits_at(
            _last_column(mask_BT), **self._inputs(ids_BT, mask_BT), past_key_values=cache, use_cache=True
        )
        rows = [(row, index) for row, (_, members) in enumerate(batch) for index in members]
        firsts = [pairs[index][1][0] for _, index in rows]
        values, hits = _at_targets(first_BV, [row for row, _ in rows], firsts)
        owners = [index for _, index in rows]
        rest = [(row, index, pairs[index][1]) for row, index in rows if len(pairs[index][1]) > 1]
        row_R = torch.tensor([row for row, _, _ in rest], device=self.device)
        cache.batch_select_indices(row_R)
        width = max(len(words) for _, _, words in rest) - 1
        fed_RT = torch.tensor([[*words[:-1], *[0] * (width + 1 - len(words))] for *_, words in rest])
        real_RT = torch.tensor([[1] * (len(words) - 1) + [0] * (width + 1 - len(words)) for *_, words in rest])
        real_RT = real_RT.to(self.device)
        mask_RT = torch.cat([mask_BT[row_R], real_RT], dim=1)
        logits_NV = self._logits_at(
            real_RT.bool(),
            **self._inputs(fed_RT.to(self.device), mask_RT),
            past_key_values=cache,
            use_cache=True,
        )
        targets = [token for *_, words in rest for token in words[1:]]
        more, more_hits = _at_targets(logits_NV, range(len(targets)), targets)
        owners += [index for _, index, words in rest for _ in words[1:]]
        yield from _sums(owners, torch.cat([values, more]), torch.cat([hits, more_hits]))

    # --- generation ---------------------------------------------------------------------------------------------

    def _row(self, index: int, prompt: str, arguments: dict[str, Any]) -> Row:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(arguments, NEW_TOKENS))
        foreign = sorted(set(wanted) - GREEDY_ARGUMENTS)
        if wanted.get("do_sample") or foreign:
            odd = ", ".join(foreign) or "do_sample"
            raise ConfigError(
                f"a task asks for generation with {odd}, but answers are greedy here, so that they can be repeated. "
                "Choose a task that does not sample."
            )
        length = min(wanted["max_gen_toks"], self.max_new_tokens or wanted["max_gen_toks"])
        if length >= self.max_length:
            raise ConfigError(
                f"a task asks for up to {length} new tokens, but the model reads {self.max_length} in all. "
                "Give a smaller max_new_tokens."
            )
        ids = self.tok_encode(prompt) or [self.prefix_token_id]
        room = self.max_length - length
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(wanted["until"], eos=eos)
        return Row(index, ids[-room:], [stop for stop in until if stop], length, prompt_truncated=len(ids) > room)

    def _generated(self, rows: list[Row]) -> Iterator[tuple[int, Answer]]:
        rows = sorted(rows, key=lambda row: (-len(row.ids), row.index))
        for row in (self._steps if self._own_loop else self._library_steps)(rows):
            text = self.tok_decode(row.tokens)
            yield (
                row.index,
                Answer(
                    response=postprocess_generated_text(text, stop=row.until, think_end_token=None),
                    num_prompt_tokens=len(row.ids),
                    num_response_tokens=len(row.tokens),
                    stop_reason=row.stop_reason or "length",
                    prompt_truncated=row.prompt_truncated,
                ),
            )

    def _steps(self, queue: list[Row]) -> Iterator[Row]:
        """Decode token by token; a row that stops is given out and leaves, and waiting rows take the free places."""
        rows: list[Row] = []
        state: State | None = None
        while queue or rows:
            if queue and (state is None or (state.can_join and len(rows) <= self.batch_size // 2)):
                free = self.batch_size - len(rows)
                fresh, queue = queue[:free], queue[free:]
                rows, state = rows + fresh, self._prefilled(fresh, state)
            assert state is not None
            next_B = state.logits_BV.argmax(dim=-1)
            for row, token in zip(rows, next_B.tolist(), strict=True):
                self._take(row, token)
            yield from (row for row in rows if row.stop_reason)
            going = [place for place, row in enumerate(rows) if not row.stop_reason]
            if not going:
                rows, state = [], None
                continue
            mask_BT = state.mask_BT
            if len(going) < len(rows):
                place_B = torch.tensor(going, device=self.device)
                rows = [rows[place] for place in going]
                next_B, mask_BT = next_B[place_B], mask_BT[place_B]
                state.cache.batch_select_indices(place_B)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
            inputs = self._inputs(next_B[:, None], mask_BT)
            with torch.no_grad():
                logits_BV = self.model(**inputs, past_key_values=state.cache, use_cache=True).logits[:, -1]
            state = State(state.cache, mask_BT, logits_BV)

    def _prefilled(self, rows: list[Row], state: State | None) -> State:
        """The prompts of new rows, read, below the rows that are under way."""
        ids_BT, mask_BT = self._left_padded([row.ids for row in rows])
        cache = DynamicCache(config=self.model.config)
        logits_BV = self._logits_at(
            _last_column(mask_BT), **self._inputs(ids_BT, mask_BT), past_key_values=cache, use_cache=True
        )
        if state is None:
            return State(cache, mask_BT, logits_BV)
        width = max(state.mask_BT.shape[1], mask_BT.shape[1])
        layers: Any = zip(state.cache.layers, cache.layers, strict=True)
        for mine, other in layers:
            mine.keys = torch.cat([_widened(mine.keys, width), _widened(other.keys, width)])
            mine.values = torch.cat([_widened(mine.values, width), _widened(other.values, width)])
        masks = [functional.pad(mask, (width - mask.shape[1], 0)) for mask in (state.mask_BT, mask_BT)]
        return State(state.cache, torch.cat(masks), torch.cat([state.logits_BV, logits_BV]))

    def _library_steps(self, queue: list[Row]) -> Iterator[Row]:
        """The same with the model's own ``generate``: recurrent models, and models with penalties of their own."""
        for start in range(0, len(queue), self.batch_size):
            rows = queue[start : start + self.batch_size]
            ids_BT, mask_BT = self._left_padded([row.ids for row in rows])
            with torch.no_grad():
                self.model.generate(
                    input_ids=ids_BT,
                    attention_mask=mask_BT,
                    max_new_tokens=max(row.max_new_tokens for row in rows),
                    stopping_criteria=StoppingCriteriaList([_Takes(self, rows)]),
                    pad_token_id=self.tokenizer.pad_token_id,
                    do_sample=False,
                )
            yield from rows

    def _take(self, row: Row, token: int) -> None:
        """One more token of a row; says why it stops, if it does."""
        row.tokens.append(token)
        if token in self._eos:
            row.stop_reason = "eos"
            return
        # A stop ends in the newest token, and no token is shorter than a byte.
        reach = max((len(stop.encode()) for stop in row.until), default=0) + 4
        tail = self.tok_decode(row.tokens[-reach:], skip_special_tokens=False)
        if any(stop in tail for stop in row.until):
            row.stop_reason = "stop"
        elif len(row.tokens) >= row.max_new_tokens:
            row.stop_reason = "length"

    # --- the model ----------------------------------------------------------------------------------------------

    def _left_padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids_BT = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.device)
        mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids_BT, mask_BT

    def _inputs(self, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
        """Tokens that follow what a cache holds, under a mask over both; a row's positions count its own tokens."""
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if self._takes_positions:
            position_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = position_BT[:, -ids_BT.shape[1] :]
        return inputs

    def _logits_at(self, keep_BT: Tensor, **inputs: Any) -> Tensor:
        """Logits at the kept positions only, (N, V), row by row."""
        head = self.model.get_output_embeddings()
        with torch.no_grad(), head_sees_only(head, keep_BT) as seen:
            logits: Tensor = self.model(**inputs).logits
        return logits.reshape(-1, logits.shape[-1]) if seen else logits[keep_BT]


class _Takes(StoppingCriteria):
    """Hands every new token to its row, and tells ``generate`` which rows have stopped."""

    def __init__(self, lm: LanguageModel, rows: list[Row]) -> None:
        self.lm = lm
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Whether each row has stopped, (B,)."""
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.stop_reason:
                self.lm._take(row, token)
        return torch.tensor([row.stop_reason is not None for row in self.rows], device=input_ids.device)


def _widened(state_BHTD: Tensor, width: int) -> Tensor:
    """Keys or values with empty places on the left, which the mask hides."""
    return functional.pad(state_BHTD, (0, 0, width - state_BHTD.shape[2], 0))


def _last_column(mask_BT: Tensor) -> Tensor:
    keep_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
    keep_BT[:, -1] = True
    return keep_BT


def _at_targets(logits_NV: Tensor, positions: Sequence[int], targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probability of each target at its position, in float32, and whether it is the likeliest word there."""
    normalizer, likeliest = [], []
    for chunk in logits_NV.split(CHUNK):
        raised = full_precision(chunk)
        normalizer.append(raised.logsumexp(dim=-1))
        likeliest.append(raised.argmax(dim=-1))
    at, target = (torch.tensor(list(numbers), device=logits_NV.device) for numbers in (positions, targets))
    values = full_precision(logits_NV[at, target]) - torch.cat(normalizer)[at]
    return values.cpu(), (torch.cat(likeliest)[at] == target).cpu()


def _sums(owners: Sequence[int], values: Tensor, hits: Tensor) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Sum of the values and conjunction of the hits of each owner."""
    totals: dict[int, float] = defaultdict(float)
    greedy: dict[int, bool] = defaultdict(lambda: True)
    for owner, value, hit in zip(owners, values.tolist(), hits.tolist(), strict=True):
        totals[owner] += value
        greedy[owner] &= hit
    yield from ((owner, (total, greedy[owner])) for owner, total in totals.items())
