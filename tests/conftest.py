"""What every test stands on: no network, one thread, and small seeded models and rows made on the spot.

The environment is set before torch and the libraries around it are imported, because they read it once.
"""

import os

if not os.environ.get("ALETHEIA_NETWORK"):
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "agg")

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from aletheia_lora.errors import SandboxError
from aletheia_lora.evaluation.sandbox import Sandbox
from tiny_inputs import save_model, save_rows, word_rows

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

CHECKOUT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NUM_SPECIAL_TOKENS = 3
"""Ids 0 to 2 are kept for padding, begin and end; random rows hold none of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, each test with its reason."""
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "all_families": None if os.environ.get("ALETHEIA_ALL_FAMILIES") else "ALETHEIA_ALL_FAMILIES is not set",
        "network": None if os.environ.get("ALETHEIA_NETWORK") else "no network: ALETHEIA_NETWORK is not set",
        "browser": None if any(map(shutil.which, BROWSERS)) else f"no browser: {' or '.join(BROWSERS)} on the PATH",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of benchmark data beside the checkout, or the one that $ALETHEIA_DATA names."""
    folder = Path(os.environ.get("ALETHEIA_DATA") or CHECKOUT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no benchmark data: expected ../shared/data beside the checkout or $ALETHEIA_DATA")
    return folder


class MakeLlama(Protocol):
    """What the `tiny_llama` fixture returns."""

    def __call__(
        self,
        *,
        num_layers: int = 4,
        hidden_size: int = 32,
        vocab_size: int = 256,
        tie_word_embeddings: bool = False,
        seed: int = 0,
    ) -> LlamaForCausalLM: ...


@pytest.fixture(scope="session")
def tiny_llama() -> MakeLlama:
    """Makes a random float32 Llama in eval mode; the same seed gives the same weights, the global generator stands."""

    def make(
        *,
        num_layers: int = 4,
        hidden_size: int = 32,
        vocab_size: int = 256,
        tie_word_embeddings: bool = False,
        seed: int = 0,
    ) -> LlamaForCausalLM:
        config = LlamaConfig(
            num_hidden_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab_size,
            max_position_embeddings=128,
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return make


class MakeRows(Protocol):
    """What the `tokenized_rows` fixture returns."""

    def __call__(
        self,
        num_rows: int = 8,
        *,
        min_length: int = 16,
        max_length: int = 16,
        vocab_size: int = 256,
        num_prompt_tokens: int | None = None,
        seed: int = 0,
    ) -> list[dict[str, Any]]: ...


@pytest.fixture(scope="session")
def tokenized_rows() -> MakeRows:
    """Makes rows of random token ids; with `num_prompt_tokens` also labels, -100 on that many leading tokens."""

    def make(
        num_rows: int = 8,
        *,
        min_length: int = 16,
        max_length: int = 16,
        vocab_size: int = 256,
        num_prompt_tokens: int | None = None,
        seed: int = 0,
    ) -> list[dict[str, Any]]:
        rng = np.random.default_rng(seed)
        rows: list[dict[str, Any]] = []
        for _ in range(num_rows):
            length = int(rng.integers(min_length, max_length + 1))
            input_ids = rng.integers(NUM_SPECIAL_TOKENS, vocab_size, size=length).tolist()
            row: dict[str, Any] = {"input_ids": input_ids, "attention_mask": [1] * length}
            if num_prompt_tokens is not None:
                num_masked = min(num_prompt_tokens, length)
                row["labels"] = [-100] * num_masked + input_ids[num_masked:]
            rows.append(row)
        return rows

    return make


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny saved model and its tokenizer, for commands that take a name."""
    return str(save_model(tmp_path_factory.mktemp("saved") / "tiny-llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """File of 24 rows for that model."""
    return str(save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", word_rows(24)))


@pytest.fixture
def library_logging() -> Iterator[None]:
    """The commands quieten transformers for the rest of the process; tests after these want it as it was."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(verbosity)
    if bars:
        transformers_logging.enable_progress_bar()


# --- boxes for generated programs -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """A sandbox that has proved that it holds; skips where bubblewrap is missing or may make no box."""
    try:
        found = Sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    rights = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    command = [*rights, str(found.bwrap), "--unshare-user", "--unshare-net", "--ro-bind", "/", "/", "true"]
    tried = subprocess.run(command, cwd="/", capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"bubblewrap may make no box on this machine: {tried.stderr.strip()}")
    found.check_self()
    return found
