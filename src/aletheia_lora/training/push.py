"""An adapter folder -> a repository on the Hub, through huggingface_hub and the login that it keeps.

What is sent is a copy: weights, configuration, plan, record and card, their paths taken out. The copy stays on disk if
it cannot be sent.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..errors import AletheiaError, ConfigError, OutputError, PrivacyError
from ..files import check_output, whole_folder, write_bytes, write_json
from ..privacy import check_nothing_private, json_without_paths, private_here

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLAN, RECORD, CARD = "plan.json", "record.json", "README.md"
LOGIN = "Run `hf auth login` with a token that may write"


def check_can_push(repo_id: str, output: Path, *, private: bool = False) -> str:
    """Find out before training that the adapter can be pushed afterwards; makes the repository where there is none.

    Returns:
        The repository's whole name.

    Raises:
        ConfigError: If no repository can have this name, or it is public and ``private`` was asked for.
        OutputError: If nobody is logged in, the repository cannot be written, or the Hub cannot be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub={repo_id!r}: {error} Expected a name such as me/my-adapter.") from error
    check_output(_copy_of(output))
    hub = HfApi()
    with _said(f"cannot push to {repo_id!r}"):
        hub.whoami()
        whole = hub.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        hub.auth_check(whole, write=True)
        if private and not hub.repo_info(whole).private:
            raise ConfigError(
                f"{whole!r} exists and is public. Make it private, choose another, or leave out --private."
            )
    return whole


def push(folder: Path, repo_id: str, *, private: bool = False) -> str:
    """Send a copy of the adapter folder; gives the address of the repository.

    Raises:
        PrivacyError: If what would be sent holds something that looks like a key; nothing is sent.
        OutputError: If it cannot be sent; says the line that sends the copy later.
    """
    whole = f"The adapter is whole in {str(folder)!r}."
    try:
        copy = _clean_copy(folder)
    except PrivacyError as error:
        raise PrivacyError(f"{error} {whole}") from error
    try:
        with _said(f"pushing to {repo_id!r} failed"):
            HfApi().upload_folder(repo_id=repo_id, folder_path=copy, commit_message="Adapter by aletheia-lora")
    except OutputError as error:
        line = shlex.join(["hf", "upload", repo_id, str(copy), ".", *(["--private"] if private else [])])
        raise OutputError(f"{error} {whole} Push it later by: {line}") from error
    shutil.rmtree(copy)
    return f"{HfApi().endpoint}/{repo_id}"


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Whatever goes wrong between here and the Hub, in words."""
    try:
        yield
    except AletheiaError:
        raise
    except LocalTokenNotFoundError as error:
        raise OutputError(f"{what}: nobody is logged in. {LOGIN}.") from error
    except OfflineModeIsEnabled as error:
        raise OutputError(f"{what}: HF_HUB_OFFLINE is set. Unset it, or leave out --push-to-hub.") from error
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())
        next_step = f"{LOGIN}, or choose another repository." if error.response.status_code in (401, 403) else ""
        raise OutputError(f"{what}: {reason} {next_step}".rstrip()) from error
    except Exception as error:  # clients of HTTP raise what they like
        reason = " ".join(str(error).split()) or "no reason given"
        raise OutputError(f"{what}: the Hub cannot be reached: {type(error).__name__}: {reason}") from error


def _copy_of(folder: Path) -> Path:
    whole = folder.absolute()
    return whole.with_name(f"{whole.name}-to-push")


def _clean_copy(folder: Path) -> Path:
    """The files that are sent, in a folder of their own, without paths.

    Raises:
        PrivacyError: If something that looks like a key is left, or the value of a secret; there is no copy then.
    """
    private = replace(private_here(folder), names=())  # a repository is named after its owner anyway
    values = {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in (CONFIG, PLAN, RECORD)}
    values[CONFIG]["base_model_name_or_path"] = values[RECORD]["model"]
    copy = _copy_of(folder)
    with whole_folder(copy) as staging:
        for name, value in values.items():
            write_json(staging / name, json_without_paths(value, private))
        write_bytes(staging / CARD, (folder / CARD).read_bytes())
        check_nothing_private({file.name: file.read_bytes() for file in staging.iterdir()}, private)
        shutil.copyfile(folder / WEIGHTS, staging / WEIGHTS)
    return copy
