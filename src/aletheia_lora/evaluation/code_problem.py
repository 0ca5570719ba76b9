"""A row of HumanEval or MBPP -> a CodeProblem: trusted code that tests one program.

Comes in: a row as the data set publishes it. Goes out: the prompt that a program continues, the test, and the names of
the functions that the test calls.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeProblem:
    """What a generated program has to do, as code. All of it is trusted; the program is not."""

    task_id: str
    prompt: str
    """Code that the completion continues; empty where the task is told in words (MBPP)."""
    test: str
    """Asserts, or a function ``check(candidate)`` with asserts."""
    entry_points: tuple[str, ...]
    """Functions of the program that the test calls; ``check`` is given the first."""
    setup: str = ""
    """Code that runs before the test."""
    needs_shared: str = ""
    """Why program and test must share an interpreter, such as a class of the program in the test; else empty."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> CodeProblem:
        """The problem of a row of HumanEval, or of MBPP in its full or sanitized form.

        Raises:
            DataError: If columns are missing, or the tests call no function that the reference solution defines.
        """
        if {"prompt", "test", "entry_point"} <= row.keys():
            return cls(
                task_id=str(row.get("task_id", row["entry_point"])),
                prompt=row["prompt"],
                test=row["test"],
                entry_points=(row["entry_point"],),
                needs_shared="" if _is_code(row["prompt"]) else "its prompt is no whole code without a completion",
            )
        if {"code", "test_list"} <= row.keys():
            return _from_mbpp(row)
        raise DataError(
            f"a code problem has the columns prompt, test, entry_point (HumanEval) or code, test_list (MBPP); got "
            f"{', '.join(map(str, row)) or 'none'}."
        )


def _from_mbpp(row: Mapping[str, Any]) -> CodeProblem:
    """MBPP's tests call the function by name, and may use modules and classes of the reference solution."""
    task_id = str(row.get("task_id", "?"))
    setup = "\n".join([*(row.get("test_imports") or []), row.get("test_setup_code") or ""])
    test = "\n".join(row["test_list"])
    try:
        solution = ast.parse(row["code"])
        free = _free_names(ast.parse(f"{setup}\n{test}"))
    except SyntaxError as error:
        raise DataError(f"task {task_id}: its code or tests are not Python: {error}.") from error
    functions = [name for node in solution.body for name in _functions(node) if name in free]
    if not functions:
        raise DataError(f"task {task_id}: its tests call no function of its code; they use {', '.join(sorted(free))}.")
    imports = [ast.unparse(node) for node in solution.body if _imported(node) & free]
    foreign = free - set(functions) - {name for node in solution.body for name in _imported(node)}
    return CodeProblem(
        task_id=task_id,
        prompt="",
        test=test,
        entry_points=tuple(dict.fromkeys(functions)),
        setup="\n".join([*imports, setup]).strip(),
        needs_shared=f"its tests use {', '.join(sorted(foreign))} of the program" if foreign else "",
    )


def _is_code(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _free_names(tree: ast.AST) -> set[str]:
    """Names that the code reads and neither binds nor finds among the builtins."""
    bound: set[str] = set(dir(builtins))
    read: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        bound |= _imported(node)
    return read - bound


def _imported(node: ast.AST) -> set[str]:
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return set()
    return {alias.asname or alias.name.split(".")[0] for alias in node.names}


def _functions(node: ast.stmt) -> Iterator[str]:
    """The names of a top-level function, or of what is assigned at the top level (a lambda, another name of one)."""
    if isinstance(node, ast.FunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))
