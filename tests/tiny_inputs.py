"""A tokenizer of 256 whole words and rows of such words, in memory or as files; shared by the rooms' tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from families import build

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Knows the words ``w4`` to ``w255``, each one token, and has no chat template."""
    words = [*SPECIAL, *(f"w{index}" for index in range(len(SPECIAL), 256))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def word_rows(num_rows: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of four to eight random words, all with the same completion, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    prompts = [" ".join(f"w{word}" for word in rng.integers(4, 256, size=rng.integers(4, 9))) for _ in range(num_rows)]
    return [{"prompt": prompt, "completion": " w7 w8 w9 w10"} for prompt in prompts]


def save_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_model(folder: Path, model: Any = None) -> Path:
    """A tiny model, a Llama if none is given, beside the tokenizer, as ``save_pretrained`` writes them."""
    (build("llama") if model is None else model).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
