"""A tokenizer that knows every byte, a tiny model for it, and small files of rows, for the rooms of evaluation."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>"]
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; nothing is unknown, and every text comes back."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def byte_model(*, max_length: int = 1024, seed: int = 0, scale: float = 0.2) -> LlamaForCausalLM:
    """A random Llama over bytes, in eval mode, with weights large enough that it does not repeat one token only."""
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        initializer_range=scale,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def write_rows(folder: Path) -> Path:
    """A folder as ``data_dir`` expects it: a few rows of each data set, in its columns."""
    sums = [{"question": f"What is {n} + {n}?", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(12)]
    _write(folder / "gsm8k" / "train.jsonl", sums[:8])
    _write(folder / "gsm8k" / "test.jsonl", sums[8:])
    for split, count in (("dev", 5), ("test", 3)):
        questions = [
            {"question": f"{split} {n} of {subject}?", "subject": subject, "choices": list("wxyz"), "answer": n % 4}
            for subject in ("anatomy", "virology")
            for n in range(count)
        ]
        _write(folder / "mmlu" / f"{split}.jsonl", questions)
    problem = {
        "task_id": "HumanEval/0",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        "entry_point": "double",
    }
    _write(folder / "humaneval" / "test.jsonl", [problem, {**problem, "task_id": "HumanEval/1"}])
    pages = "\n = One = \n \n A first text . \n \n = = Part = = \n \n More . \n \n = Two = \n \n Another , longer . \n"
    (folder / "wikitext2").mkdir(parents=True)
    (folder / "wikitext2" / "valid.raw.txt").write_text(pages)
    return folder


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
