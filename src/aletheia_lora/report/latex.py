"""Rows of text -> a LaTeX ``tabular`` that any engine sets, whatever the text holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .words import DASH, visible

SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\char34{}",
    "'": r"\char39{}",
    "`": r"\char96{}",
    "[": "{[}",  # after the end of a row, a bracket or a star would be taken for its option
    "]": "{]}",
    "*": "{*}",
    "-": "{-}",  # two would be a dash
    DASH: "--",
    "−": r"\ensuremath{-}",
    "×": r"\ensuremath{\times}",
    "·": r"\ensuremath{\cdot}",
    "…": r"\ldots{}",
    "“": "``",
    "”": "''",
}
_ESCAPES = str.maketrans(SPECIAL)


def latex(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as a ``tabular``, one column a key, the first row of heads; plain LaTeX, no package is needed."""
    if not rows:
        return "% nothing to show\n"
    heads = list(rows[0])
    lines = [heads, *([row[head] for head in heads] for row in rows)]
    body = [f"{' & '.join(map(escaped, cells))} \\\\" for cells in lines]
    begin = f"\\begin{{tabular}}{{{'l' * len(heads)}}}"
    return "\n".join([begin, r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}"]) + "\n"


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is; letters beyond ASCII that only some fonts have become their code point."""
    told = visible(text).translate(_ESCAPES)
    return told if told.isascii() else "".join(sign if sign.isascii() else f"U+{ord(sign):04X}" for sign in told)
