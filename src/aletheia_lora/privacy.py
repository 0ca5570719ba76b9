"""Text that will leave this machine -> what in it is private: paths, names of people and machines, keys.

Comes in: text or files. Goes out: the text with paths and names in words, or a refusal. What may leave is chosen where
it is made, by lists of what is allowed; this is the last look.
"""

from __future__ import annotations

import contextlib
import getpass
import html
import json
import os
import platform
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PrivacyError

EVERYBODYS = frozenset({"root", "user", "admin", "nobody", "localhost", "ubuntu", "runner"})
"""Names of accounts and machines that say nothing about anybody."""
SHORTEST_USER, SHORTEST_HOST, SHORTEST_SECRET = 4, 2, 6
"""Letters from which on a name or value is looked for: shorter ones turn up in any text."""
SECRET_VARIABLE = re.compile(
    r"TOKEN|SECRET|PASS(?:WORD|WD|PHRASE)|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL|_KEY$|_PWD$|COOKIE",
    re.IGNORECASE,
)
_REST = r"[^\s\"'`<>|,;()\[\]{}]*"
PATH = re.compile(
    r"(?:\bfile:/+"
    r"|(?<![\w.+/<-])/"  # not inside a relative path, a URL, a fraction or base64
    r"|(?<=<)/(?![A-Za-z][\w-]*\s*>)"  # after '<' only if that is no closing tag
    r"|(?<![\w~])~[\w.-]*/"
    r"|(?<![A-Za-z])[A-Za-z]:[\\/]+)"
    r"(?=[\w.~$%@-])" + _REST
)
"""An absolute path, or one from a home folder."""
_QUOTED = re.compile(r"(['\"`])(?:/|~[\w.-]*/|[A-Za-z]:[\\/])(?=[\w.~$%@-])[^'\"`\n]*\1")
KEY = re.compile(
    r"\bhf_[A-Za-z0-9]{10,}"
    r"|\bsk-[A-Za-z0-9_-]{16,}"
    r"|\bgh[oprsu]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|(?i:aws_secret_access_key)\W*[=:]\s*\S+"
    r"|\bxox[abprs]-[\w-]{10,}|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}\."
    r"|\b(?i:bearer)\s+[\w.~+/=-]{6,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/\s\"'@]+@"  # a URL with credentials
)
"""What keys and tokens of well-known services look like."""
PNG_START, PNG_CHUNKS = b"\x89PNG\r\n\x1a\n", frozenset({b"IHDR", b"pHYs", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
"""A picture may hold these parts; others hold text."""
MOST_COMPLAINTS = 5


@dataclass(frozen=True)
class Private:
    """What must not leave this machine."""

    folders: tuple[str, ...] = ()
    """Absolute paths, long ones first."""
    names: tuple[str, ...] = ()
    """Of the user and of the machine, as whole words in any case."""
    secrets: tuple[tuple[str, str], ...] = ()
    """Names and values of environment variables."""


def private_here(*folders: Path, names: Iterable[str] = (), known: Collection[str] = ()) -> Private:
    """What is private on this machine, for this user and in this process.

    Args:
        folders: Folders beside the home and the working folder.
        names: Names beside those of the user and the machine.
        known: Words in lower case that the text holds anyway: a user of such a name could not be told from them.
    """
    places, users = [Path.cwd(), *folders], []
    with contextlib.suppress(RuntimeError):  # a process may have no home
        places.append(Path.home())
        users.append(Path.home().name)
    with contextlib.suppress(KeyError, OSError):  # nor a user
        users.append(getpass.getuser())
    hosts = [name for host in (platform.node(), *names) for name in (host, host.partition(".")[0])]
    found = {user for user in users if len(user) >= SHORTEST_USER} | {h for h in hosts if len(h) >= SHORTEST_HOST}
    spelled = {spelling for place in places for spelling in (place.absolute(), place.resolve())}
    return Private(
        folders=tuple(sorted((str(place) for place in spelled if len(place.parts) > 2), key=len, reverse=True)),
        names=tuple(sorted(name for name in found if name.lower() not in EVERYBODYS and name.lower() not in known)),
        secrets=tuple((name, value) for name, value in sorted(os.environ.items()) if SECRET_VARIABLE.search(name)),
    )


def without_paths(text: str, private: Private) -> str:
    """The text with paths as ``<path>`` and private names as ``<name>``; keys stay, for they are to be refused."""
    text = _QUOTED.sub(r"\1<path>\1", text)
    for folder in private.folders:
        text = re.sub(re.escape(folder) + _REST, "<path>", text)
    text = PATH.sub("<path>", text)
    for name in private.names:
        text = _word(name).sub("<name>", text)
    return text


def json_without_paths(value: Any, private: Private) -> Any:
    """Plain JSON types with every string, keys included, as :func:`without_paths` leaves it."""
    if isinstance(value, str):
        return without_paths(value, private)
    if isinstance(value, dict):
        return {without_paths(str(key), private): json_without_paths(item, private) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_without_paths(item, private) for item in value]
    return value


def check_nothing_private(files: Mapping[str, bytes], private: Private) -> None:
    """Look through files that are about to leave.

    Raises:
        PrivacyError: If one holds a path, a private name, something like a key, or the value of a secret; says where
            and what, but no key and no secret.
    """
    found = [complaint for name, content in files.items() for complaint in _complaints(name, content, private)]
    if found:
        more = f"; {len(found) - MOST_COMPLAINTS} more" if len(found) > MOST_COMPLAINTS else ""
        raise PrivacyError(
            f"this must not leave the machine: {'; '.join(found[:MOST_COMPLAINTS])}{more}. Nothing was written or "
            "sent. Take it out where it came from."
        )


def _complaints(name: str, content: bytes, private: Private) -> Iterator[str]:
    if content.startswith(PNG_START):
        others = sorted(kind.decode("latin-1") for kind in _png_chunks(content) - PNG_CHUNKS)
        if others:
            yield f"{name} holds {', '.join(others)} beside its pixels"
        return
    try:
        text = content.decode()
    except UnicodeDecodeError:
        yield f"{name} is neither text nor a PNG picture"
        return
    for number, line in enumerate(text.splitlines(), 1):
        for what in _found(line, private):
            yield f"{name}, line {number}: {what}"
    for variable, value in private.secrets:
        if any(part in text for part in _spellings(*value.splitlines())):
            yield f"{name}: the value of the environment variable {variable}"


def _found(line: str, private: Private) -> Iterator[str]:
    path = next((folder for folder in private.folders if any(s in line for s in _spellings(folder))), None)
    match = PATH.search(line)
    if path is not None or match is not None:
        yield f"the path {path or (match.group() if match else '')!r}"
    for name in private.names:
        if _word(name).search(line):
            yield f"the name {name!r} of this machine or its user"
    if KEY.search(line):
        yield "what looks like a key or a token"


def _spellings(*values: str) -> set[str]:
    """As text, in JSON and in HTML; short values are left out."""
    long = [value.strip() for value in values if len(value.strip()) >= SHORTEST_SECRET]
    return {text for value in long for text in (value, json.dumps(value)[1:-1], html.escape(value))}


def _word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", re.IGNORECASE)


def _png_chunks(content: bytes) -> set[bytes]:
    """The kinds of the parts of a PNG file, and of what follows its end."""
    kinds, place = set(), len(PNG_START)
    while place < len(content):
        kinds.add(content[place + 4 : place + 8])
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    return kinds
