"""Frozen layers below the lowest adapted one run once per row: their output is kept, and replayed in later epochs.

Comes in: the model inside PEFT's wrapper while it trains. Goes out: the same model, whose layers below ``lowest`` are
skipped whenever the states of all rows of a batch are at hand. Nothing is assumed of the architecture: the first
replayed batch is compared with a fresh forward, and a model that passes more than hidden states from layer to layer
turns the cache off, with the reason. Shape legend: B rows, T columns, N real tokens, H width of the states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, PlanError
from ..files import check_writable, write_json
from ..layers import embedding_of, layer_blocks
from ..trial import modules_after
from .prefix_check import difference, note_output, observed, pass_by_reason, random_state_point, refusal
from .prefix_forecast import ExpectedLines, Row
from .prefix_identity import BatchRows, batch_rows, prefix_key, row_name
from .prefix_store import DTYPES, PrefixStore, check_room, in_words

DTYPE_NAMES = ("model", "bfloat16")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative difference that arithmetic of this precision explains (models in float64 keep float32 rotary tables); a
missing side channel is far above."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixCacheOptions:
    """How the prefix cache is kept."""

    folder: Path | None = None
    """Kept here, and shared between runs of the same model, rows and lowest layer; None: a temporary folder."""
    dtype: Literal["model", "bfloat16"] = "model"
    """On disk: as the model has the states, so that replays are exact, or rounded to bfloat16."""
    max_bytes: int | None = None
    """Most bytes on disk; None for as many as the disk takes, less a margin."""
    say: Callable[[str], None] = lambda _line: None
    """Called with a line when there is news."""

    def __post_init__(self) -> None:
        """Check every value."""
        if self.dtype not in DTYPE_NAMES:
            raise ConfigError(f"prefix cache dtype {self.dtype!r}, expected one of {', '.join(DTYPE_NAMES)}.")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(f"prefix cache max_bytes={self.max_bytes}, expected at least 1.")


class PrefixCache:
    """The cache at work on one model; :meth:`remove` puts everything back."""

    def __init__(
        self,
        base_model: Any,
        lowest: int,
        options: PrefixCacheOptions,
        *,
        expected: Sequence[ExpectedLines] | None = None,
        unsupported: str | None = None,
        in_vain: str | None = None,
    ) -> None:
        """Open the folder and stand between the model and its layers.

        Args:
            base_model: The model inside PEFT's wrapper.
            lowest: Lowest adapted layer, m.
            options: Where and how to keep the states.
            expected: What the model will meet, for the forecast; None if not known. Rows are looked up as under the
                autocast that is on now.
            unsupported: A reason of the caller's to leave the cache off.
            in_vain: Why this run will replay nothing of what it writes, if so: said, and kept on record.

        Raises:
            PlanError: If ``lowest`` is 0: there is nothing below.
            OutputError: If the folder cannot be written or the disk is short.
        """
        check_lowest(lowest)
        self._base, self._options, self._lowest = base_model, options, lowest
        self._blocks = layer_blocks(base_model)
        self._store: PrefixStore | None = None
        self._scratch: Path | None = None
        self._restore: list[tuple[nn.Module, Any]] = []
        self._closed: dict[str, Any] = {}
        self._forwards: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._passed_by: Counter[str] = Counter()
        self._checked: dict[bytes, float] = {}
        self._independent: bool | None = None
        self._replay: tuple[Tensor, torch.dtype, BatchRows] | None = None
        self._calls: list[tuple[int, int]] | None = None
        self._states: Tensor | None = None
        self._extras: dict[tuple[int, int], int | None] = {}
        self._stop_below = False
        self.in_vain = in_vain
        self.turned_off: str | None = None
        """Why nothing is cached, or no longer."""
        self._top = [] if unsupported else modules_after(base_model, itertools.chain(*self._blocks))
        reason = unsupported or refusal(base_model, self._blocks[:lowest], [*self._blocks[lowest:], self._top])
        if reason is not None:
            self._turn_off(reason)
            return
        if in_vain is not None:
            options.say(f"prefix cache: {in_vain}")
            if options.folder is None:
                warnings.warn(in_vain, stacklevel=2)
        try:
            self._open(expected)
            self._install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put the model's own forwards back, publish what was kept, and delete a temporary folder."""
        while self._restore:
            module, before = self._restore.pop()
            del module.forward
            if before is not None:
                module.forward = before
        if self._store is not None:
            self._closed = self._store_record(self._store)
            self._store.close()
            self._store = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def record(self) -> dict[str, Any]:
        """What the cache did, as plain JSON types; bytes and wall seconds of this run."""
        return {
            "lowest": self._lowest,
            "dtype": self._options.dtype,
            "shared": self._options.folder is not None,
            "hits": self._rows["hit"],
            "misses": self._rows["miss"],
            "replayed_batches": self._forwards["replayed"],
            "full_batches": self._forwards["full"],
            "passed_by": dict(self._passed_by),
            "rows_independent": self._independent,
            "largest_difference": max(self._checked.values(), default=None),
            "turned_off": self.turned_off,
            "in_vain": self.in_vain,
            **(self._store_record(self._store) if self._store is not None else self._closed),
        }

    # --- setting up -------------------------------------------------------------------------------------------------

    def _open(self, expected: Sequence[ExpectedLines] | None) -> None:
        options = self._options
        if options.folder is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="aletheia-prefix-"))
        root = self._scratch if options.folder is None else check_writable(options.folder)
        assert root is not None
        key = prefix_key(self._base, self._blocks, self._lowest, options.dtype, top=self._top)
        folder = root / key["digest"]
        self._store = PrefixStore(folder, max_bytes=options.max_bytes, keep=options.folder is not None, say=options.say)
        write_json(folder / "key.json", key)
        total = self._store.total_bytes
        if expected is None:
            options.say(
                f"prefix cache below layer {self._lowest}: holds {in_words(total)}; the rows' number is unknown"
            )
            return
        weight = embedding_of(self._base).weight
        width = getattr(getattr(self._base, "config", None), "hidden_size", weight.shape[1])
        token_bytes = width * (2 if options.dtype == "bfloat16" else weight.dtype.itemsize)
        num_tokens = sum(lines.num_tokens() for lines in expected)
        missing = sum(lines.num_tokens(self._held(lines.training)) for lines in expected) if total else num_tokens
        options.say(
            f"prefix cache below layer {self._lowest}: at most {in_words(num_tokens * token_bytes)} for "
            f"{num_tokens:,} tokens in {options.dtype} dtype, {in_words((num_tokens - missing) * token_bytes)} of them "
            "already there"
        )
        check_room(folder, missing * token_bytes, options.max_bytes, held=total)

    def _held(self, training: bool) -> Callable[[Row], bool]:
        """Whether a row's states in this mode are kept already."""
        store, regime = self._opened(), self._regime(training)
        return lambda row: row_name(row, regime=regime) in store

    def _install(self) -> None:
        for depth, layer in enumerate(self._blocks[: self._lowest]):
            for number, block in enumerate(layer):
                self._stand_in(block, functools.partial(self._below, depth, number))
        self._stand_in(self._base, self._forward)

    def _stand_in(self, module: nn.Module, stand_in: Callable[..., Any]) -> None:
        """Give one instance another forward, which is told the one it had; classes are not touched."""
        original = module.forward

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return stand_in(original, *args, **kwargs)

        self._restore.append((module, vars(module).get("forward")))
        module.forward = forward

    # --- a forward of the model -------------------------------------------------------------------------------------

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replay if the states of all rows are at hand, else run all layers and keep what is missing."""
        if self.turned_off is not None:
            return original(*args, **kwargs)
        reason = pass_by_reason(self._base, args, kwargs)
        if reason is not None:
            if not self._passed_by[reason]:
                self._options.say(f"prefix cache: batches with {reason} run in full")
            self._passed_by[reason] += 1
            return original(*args, **kwargs)
        run = functools.partial(original, *args, **kwargs)
        input_ids = args[0] if args else kwargs["input_ids"]
        regime = self._regime(self._base.training)
        name = functools.partial(
            batch_rows, input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"), regime=regime
        )
        rows = name(independent=self._independent is not False)
        if rows.displaced is not None and self._independent is None:
            output, states = self._full(run)
            if states is not None:
                self._independent = self._same_alone(original, input_ids, kwargs.get("position_ids"), rows, states)
                self._keep(name(independent=self._independent), states)
            return output
        return self._answer(run, rows, input_ids.shape, regime)

    def _answer(self, run: Callable[[], Any], rows: BatchRows, shape: Sequence[int], regime: bytes) -> Any:
        store = self._opened()
        found = store.read(rows.names, pin=torch.cuda.is_available()) if rows.names else None
        if found is None:
            output, states = self._full(run)
            if states is not None:
                self._keep(rows, states)
            return output
        self._replay = (*found, rows)
        try:
            kind = regime + (b"displaced" if rows.displaced is not None else b"")
            output = run() if kind in self._checked else self._checked_replay(run, rows, shape, kind)
        finally:
            self._replay = None
        if self.turned_off is None:
            self._rows["hit"] += len(rows.names)
            self._forwards["replayed"] += 1
        return output

    def _full(self, run: Callable[[], Any]) -> tuple[Any, Tensor | None]:
        """All layers run. Returns the output and the states below ``lowest``, (B, T, H), None if they cannot be had."""
        self._forwards["full"] += 1
        with self._watched() as calls:
            output = run()
            states = self._states
        if states is None or len(set(calls)) < len(calls) or calls[-1][0] != self._lowest - 1:
            self._turn_off(
                f"the layers below {self._lowest} of {type(self._base).__name__} do not run once each, one after the "
                "other, from hidden states to hidden states"
            )
            return output, None
        return output, states

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[tuple[int, int]]]:
        """While open, the blocks below ``lowest`` are noted as they run, and the states that the last one gives."""
        calls: list[tuple[int, int]] = []
        self._calls = calls
        try:
            yield calls
        finally:
            self._calls, self._states = None, None

    def _below(self, depth: int, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One block below ``lowest``: runs, noted if asked; or, in a replay, hands on, at the last the kept states."""
        if self._replay is None:
            output = original(*args, **kwargs)
            if self._calls is not None:
                self._calls.append((depth, number))
                self._extras[depth, number] = len(output) - 1 if isinstance(output, tuple) else None
                if depth == self._lowest - 1:
                    self._states = _hidden(output)
                    if self._stop_below and number == len(self._blocks[depth]) - 1:
                        raise _Enough
            return output
        arriving: Tensor = args[0] if args else kwargs["hidden_states"]
        hidden = _placed(*self._replay, arriving) if depth == self._lowest - 1 else arriving
        extra = self._extras[depth, number]
        return hidden if extra is None else (hidden, *[None] * extra)

    def _keep(self, rows: BatchRows, states_BTH: Tensor) -> None:
        """Write the rows that are not there yet, in the dtype of the disk."""
        store, width = self._opened(), states_BTH.shape[-1]
        stops = np.cumsum(rows.lengths)
        missing: dict[bytes, slice] = {}
        for name, length, stop in zip(rows.names, rows.lengths, stops, strict=True):
            if name not in store:
                self._rows["miss"] += 1
                missing[name] = slice(int(stop - length), int(stop))
        if not missing or store.counts.full is not None:
            return
        places = np.concatenate([rows.places[part] for part in missing.values()])
        wanted = states_BTH.reshape(-1, width)[torch.from_numpy(places).to(states_BTH.device)]
        if self._options.dtype == "bfloat16" and wanted.dtype.itemsize > 2:
            wanted = wanted.bfloat16()
        lengths = [part.stop - part.start for part in missing.values()]
        for name, part_NH in zip(missing, wanted.cpu().split(lengths), strict=True):
            if not store.write(name, part_NH, states_BTH.dtype):
                return

    # --- what is not assumed but measured ---------------------------------------------------------------------------

    def _checked_replay(self, run: Callable[[], Any], rows: BatchRows, shape: Sequence[int], kind: bytes) -> Any:
        """The first replay of its kind, beside a fresh forward: the same, or the cache is turned off."""
        rewind = random_state_point()
        replay, self._replay = self._replay, None
        # Watched, since how each block answers is not known yet where an earlier run kept the rows.
        with observed(self._blocks, self._lowest, rows.places) as fresh, self._watched():
            note_output(fresh, run(), shape, rows.places)
        rewind()
        self._replay = replay
        try:
            with observed(self._blocks, self._lowest, rows.places) as replayed:
                output = run()
                note_output(replayed, output, shape, rows.places)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model raises that misses what it expects of its layers
            reason = f"a replay raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            differences = {name: difference(replayed.get(name), value) for name, value in fresh.items()}
            worst = max(differences, key=lambda name: differences[name])
            self._checked[kind] = differences[worst]
            allowed = self._allowed(disk=True)
            if differences[worst] <= allowed:
                return output
            del output
            reason = (
                f"replayed and computed {worst} differ by {differences[worst]:.1e}, and rounding explains "
                f"{allowed:.0e}: {type(self._base).__name__} passes more than hidden states between its layers, or a "
                "label is predicted from padding"
            )
        rewind()
        self._replay = None
        self._turn_off(reason)
        return run()

    def _same_alone(
        self,
        original: Callable[..., Any],
        input_ids_BT: Tensor,
        position_ids: Tensor | None,
        rows: BatchRows,
        states_BTH: Tensor,
    ) -> bool:
        """Does a row that does not begin at column 0 have the states that it has by itself, at column 0?"""
        assert rows.displaced is not None
        start = sum(rows.lengths[: rows.displaced])
        places = torch.from_numpy(rows.places[start : start + rows.lengths[rows.displaced]]).to(input_ids_BT.device)
        alone = {"input_ids": input_ids_BT.reshape(-1)[places][None], "use_cache": False}
        if position_ids is not None:
            alone["position_ids"] = position_ids.expand_as(input_ids_BT).reshape(-1)[places][None]
        states_1NH = None
        self._stop_below = True
        try:
            with self._watched():
                try:
                    original(**alone)
                except _Enough:
                    states_1NH = self._states
        finally:
            self._stop_below = False
        within = states_BTH.reshape(-1, states_BTH.shape[-1])[places.to(states_BTH.device)]
        measured = difference(None if states_1NH is None else states_1NH[0], within)
        same = measured <= self._allowed(disk=False)
        if not same:
            self._options.say(
                f"prefix cache: a row's states depend on where it stands in a batch (by {measured:.1e}); it is "
                "replayed only where it stands as before"
            )
        return same

    def _allowed(self, *, disk: bool) -> float:
        """The relative difference that rounding explains: that of the coarsest precision that states pass through."""
        kind = next(self._base.parameters()).device.type
        passed = {weight.dtype for weight in self._base.parameters()}
        if torch.is_autocast_enabled(kind):
            passed.add(torch.get_autocast_dtype(kind))
        if disk and self._options.dtype == "bfloat16":
            passed.add(torch.bfloat16)
        return max((TOLERANCE[dtype] for dtype in passed & TOLERANCE.keys()), default=TOLERANCE[torch.float32])

    def _regime(self, training: bool) -> bytes:
        """What the states of a row depend on besides its tokens and the key: mode and autocast."""
        kind = next(self._base.parameters()).device.type
        autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off"
        return f"training {training}, autocast {autocast}, ".encode()

    # --- small things -----------------------------------------------------------------------------------------------

    def _turn_off(self, reason: str) -> None:
        self.turned_off = reason
        self._options.say(f"prefix cache turned off: {reason}. Training goes on without it")

    def _opened(self) -> PrefixStore:
        assert self._store is not None
        return self._store

    def _store_record(self, store: PrefixStore) -> dict[str, Any]:
        counts = store.counts
        return {"rows_held": len(store), "bytes_held": store.total_bytes, **dataclasses.asdict(counts)}


def check_lowest(lowest: int) -> None:
    """Refuse a cache of nothing.

    Raises:
        PlanError: If ``lowest`` is 0.
    """
    if lowest == 0:
        raise PlanError(
            "the plan adapts layer 0, so no layer lies below and a prefix cache has nothing to keep. Leave it out, "
            "or choose layers further up."
        )


class _Enough(Exception):
    """Ends a forward whose layers above are not needed."""


def _hidden(output: Any) -> Tensor | None:
    """The hidden states in a block's output, (B, T, H), if that is what it gives."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    fits = isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.dtype in DTYPES
    return hidden.detach() if fits else None


def _placed(packed_NH: Tensor, dtype: torch.dtype, rows: BatchRows, arriving: Tensor) -> Tensor:
    """Kept states in the shape of the batch; padding keeps what arrives, finite and hidden by the mask."""
    packed_NH = packed_NH.to(arriving.device, non_blocking=True).to(dtype)
    num_rows, length = arriving.shape[:2]
    if packed_NH.shape[0] == num_rows * length:
        return packed_NH.view(num_rows, length, -1)
    filled = arriving.detach().to(dtype, copy=True).reshape(num_rows * length, -1)
    if filled.shape[1] != packed_NH.shape[1]:
        filled = packed_NH.new_zeros(num_rows * length, packed_NH.shape[1])
    filled[torch.from_numpy(rows.places).to(arriving.device)] = packed_NH
    return filled.view(num_rows, length, -1)
