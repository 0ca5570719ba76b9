"""The words of a page and its figures -> HTML: one Jinja environment, one style, everything escaped.

Comes in: the name of a template and what it shows. Goes out: HTML that loads nothing and runs nothing.
"""

from __future__ import annotations

import base64
import re
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def html(template: str, **shown: Any) -> str:
    """The template of this folder, filled in."""
    return _environment().get_template(template).render(**shown)


def image(title: str, png: bytes | None) -> dict[str, str]:
    """A figure inside the page: its finding as the alternative text, its bytes as a data URI; empty if not drawn."""
    source = "" if png is None else f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return {"alt": f"{title}.", "source": source}


def title_parts(sentence: str) -> list[str]:
    """A finding as the two lines it is read in, cut at the first semicolon."""
    first, semicolon, rest = sentence.partition("; ")
    return [f"{first};", rest] if semicolon else [first]


@cache
def _environment() -> Environment:
    folder = resources.files(__package__)
    jinja = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["tied"] = _tied
    return jinja


def _tied(text: str) -> str:
    """The text with a number and its unit kept on one line."""
    return re.sub(r"(?<=\d) (?=(?:%|s|min|h|MiB|points?|nats)(?!\w))", "\u00a0", text)
