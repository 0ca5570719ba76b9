"""The sandbox on honest programs: values through the pipe, a reason for every end, parity, and refusals."""

import collections
import enum
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from aletheia_lora.errors import DataError, SandboxError
from aletheia_lora.evaluation import box, inside
from aletheia_lora.evaluation.sandbox import REASONS, CodeProblem, Limits, Sandbox

SQUARE = CodeProblem(
    task_id="square",
    prompt='def square(x):\n    """The square of x."""\n',
    test="def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-2) == 4",
    entry_points=("square",),
)
QUICK = Limits(cpu_seconds=1)


def calls(test: str, *names: str) -> CodeProblem:
    return CodeProblem(task_id="made", prompt="", test=test, entry_points=names or ("f",))


# --- problems ---------------------------------------------------------------------------------------------------

MBPP_ROW = {
    "task_id": 900,
    "text": "Write a function to find the area of a circle.",
    "code": "import math\ndef area(r):\r\n  return math.pi * r ** 2",
    "test_setup_code": "",
    "test_list": ["assert math.isclose(area(1), math.pi)", "assert area(0) == 0"],
    "challenge_test_list": [],
}
SANITIZED_ROW = {
    "task_id": 901,
    "prompt": "Write a function that swaps a pair.",
    "code": "def swap(pair):\n  a, b = pair\n  return b, a",
    "test_imports": ["import math"],
    "test_list": ["assert swap((1, 2)) == (2, 1)", "assert [swap(p) for p in [(1, 'a')]] == [('a', 1)]"],
}
CLASS_ROW = {
    "task_id": 902,
    "text": "Write a function to add up a tree.",
    "code": "class Node:\n  def __init__(self, x):\n    self.x = x\ndef total(root):\n  return root.x",
    "test_setup_code": "root = Node(4)",
    "test_list": ["assert total(root) == 4"],
    "challenge_test_list": [],
}


def test_a_humaneval_row_becomes_a_problem():
    row = {"task_id": "HumanEval/0", "prompt": SQUARE.prompt, "test": SQUARE.test, "entry_point": "square"}
    problem = CodeProblem.from_row({**row, "canonical_solution": "    return x * x"})
    assert problem == replace(SQUARE, task_id="HumanEval/0")


def test_a_prompt_that_is_no_whole_code_needs_the_completion_beside_the_test():
    row = {"prompt": "def f(x):\n    return (", "test": "def check(f): ...", "entry_point": "f"}
    assert "no whole code" in CodeProblem.from_row(row).needs_shared


def test_an_mbpp_row_brings_the_modules_that_its_tests_use():
    problem = CodeProblem.from_row(MBPP_ROW)
    assert problem.entry_points == ("area",) and problem.setup == "import math" and not problem.needs_shared
    assert CodeProblem.from_row(SANITIZED_ROW).entry_points == ("swap",)


def test_an_mbpp_test_that_uses_a_class_of_the_program_shares_its_interpreter():
    assert CodeProblem.from_row(CLASS_ROW).needs_shared == "its tests use Node of the program"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"question": "?"}, "got question"),
        ({**MBPP_ROW, "test_list": ["assert True"]}, "call no function"),
        ({**MBPP_ROW, "code": "def area(r: return"}, "are not Python"),
    ],
)
def test_a_row_that_is_no_code_problem_is_refused(row, complaint):
    with pytest.raises(DataError, match=complaint):
        CodeProblem.from_row(row)


# --- values -----------------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    0,
    -(2**53),
    2**9000,
    0.1,
    float("inf"),
    -0.0,
    "a\n\ud800é\0",
    1 - 2j,
    b"\x00\xff",
    [],
    (),
    (1, (2.0, [3])),
    {1, "a"},
    frozenset({(1, 2)}),
    {(1, 2): [True, {}], None: set(), 1.5: ""},
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("exact", [True, False])
def test_plain_values_cross_the_pipe_as_they_are(value, exact):
    back = inside.unpack(json.loads(json.dumps(inside.pack(value, exact=exact))))
    assert back == value and type(back) is type(value) and repr(back) == repr(value)


def test_results_of_derived_types_arrive_as_their_base():
    colour = enum.IntEnum("colour", ["RED"])
    pair = collections.namedtuple("pair", "a b")
    for value, base in ((colour.RED, 1), (pair(1, 2), (1, 2)), (collections.Counter("aa"), {"a": 2})):
        back = inside.unpack(inside.pack(value, exact=False))
        assert back == base and type(back) is type(base)
        with pytest.raises(inside.NotPlain):
            inside.pack(value, exact=True)


@pytest.mark.parametrize("value", [object(), print, range(3), (x for x in ()), [object()], {1: print}])
def test_other_values_do_not_cross(value):
    with pytest.raises(inside.NotPlain):
        inside.pack(value, exact=False)


@pytest.mark.parametrize(
    "packed", [[1], {"object": []}, {"list": [], "set": []}, {}, {"set": [{"list": []}]}, {"int": "x"}, {"bytes": 1}]
)
def test_what_pack_never_makes_is_refused(packed):
    with pytest.raises((ValueError, TypeError)):
        inside.unpack(packed)


# --- verdicts ---------------------------------------------------------------------------------------------------

ENDS = {
    "    return x * x": "passed",
    "    return x": "wrong",
    "    return None": "wrong",
    "    return abs(None)": "raised",
    "    return (": "syntax",
    "\n1 / 0\n": "raised",
    "\ndel square\n": "no_function",
    "    return object()": "not_plain",
    "    import sys\n    sys.exit(0)": "exited",
    "    import os\n    os._exit(0)": "exited",
    "    import os, signal\n    os.kill(os.getpid(), signal.SIGSEGV)": "killed",
    "    return [0] * 2**30": "raised",  # MemoryError
    "    while True: pass": "time",
    "    import os, time\n    os.closerange(3, 64)\n    time.sleep(20)": "exited",
}


@pytest.mark.parametrize(("completion", "reason"), ENDS.items())
def test_every_end_has_its_reason(sandbox, completion, reason):
    verdict = sandbox._run(SQUARE, completion, QUICK)
    assert (verdict.reason, verdict.passed) == (reason, reason == "passed")
    assert verdict.mode == "split" and verdict.seconds > 0 and (verdict.detail or verdict.passed or reason == "wrong")


def test_every_reason_is_explained(sandbox):
    assert {*ENDS.values(), "output", "broken_reply"} == set(REASONS)


def test_a_sleeping_program_ends_by_the_clock(sandbox):
    verdict = sandbox._run(SQUARE, "    import time\n    time.sleep(60)", Limits(wall_seconds=1.0))
    assert (verdict.reason, verdict.detail) == ("time", "too long by the clock")


def test_printed_text_is_kept_and_decides_nothing(sandbox):
    verdict = sandbox.run(SQUARE, "    print('passed', flush=True)\n    print('n' * 5000 + 'end')\n    return x")
    assert verdict.reason == "wrong"
    assert len(verdict.output_tail) == box.TAIL_BYTES and verdict.output_tail.endswith("nend\n")


def test_a_test_may_expect_an_exception(sandbox):
    test = "try:\n    f(0)\nexcept ZeroDivisionError:\n    pass\nelse:\n    raise AssertionError\nassert f(1) == 1"
    assert sandbox.run(calls(test), "def f(x):\n    return 1 / x").passed
    assert sandbox.run(
        calls(test), "class E(ZeroDivisionError): pass\ndef f(x):\n    if x: return 1\n    raise E"
    ).passed
    assert sandbox.run(calls(test), "def f(x):\n    return 1").reason == "wrong"


def test_an_end_that_the_test_catches_is_still_the_end(sandbox):
    test = "try:\n    f()\nexcept BaseException:\n    pass"
    assert sandbox.run(calls(test), "import os\ndef f():\n    os._exit(0)").reason == "exited"
    assert sandbox.run(calls(test), "def f():\n    return object()").reason == "not_plain"
    assert sandbox.run(calls(test), "def f():\n    raise ValueError").passed


def test_helpers_of_the_prompt_are_there_for_the_test(sandbox):
    prompt = "def twice(x):\n    return 2 * x\ndef thrice(x):\n    '''3x'''\n"
    test = "def check(candidate):\n    assert candidate(2) == twice(3)"
    problem = CodeProblem(task_id="helper", prompt=prompt, test=test, entry_points=("thrice",))
    assert sandbox.run(problem, "    return twice(x) + x").passed
    assert sandbox.run(problem, "    return x\ndef twice(x):\n    return 2").reason == "wrong"  # not the test's twice


def test_values_that_cannot_cross_share_an_interpreter_by_the_tests_choice_alone(sandbox):
    verdict = sandbox.run(calls("assert f(lambda x: x + 1) == 2"), "def f(g):\n    return g(1)")
    assert (verdict.passed, verdict.mode) == (True, "shared")
    verdict = sandbox.run(calls("assert f() == 2"), "def f():\n    return lambda: 2")
    assert (verdict.reason, verdict.mode) == ("not_plain", "split")


@pytest.mark.parametrize("row", [MBPP_ROW, SANITIZED_ROW, CLASS_ROW], ids=lambda row: str(row["task_id"]))
def test_mbpp_rows_pass_with_their_code_and_fail_with_another(sandbox, row):
    problem = CodeProblem.from_row(row)
    good = sandbox.run(problem, row["code"])
    assert (good.passed, good.mode) == (True, "shared" if problem.needs_shared else "split")
    stub = "\n".join(f"def {name}(*args):\n    return None" for name in problem.entry_points)
    assert not sandbox.run(problem, f"{row['code']}\n{stub}").passed


def test_a_problem_that_fails_by_itself_is_an_error_and_no_verdict(sandbox):
    with pytest.raises(DataError, match="made: its own prompt or setup fails: ModuleNotFoundError"):
        sandbox.run(replace(calls("f()"), setup="import no_such_module"), "def f(): ...")


def test_programs_run_side_by_side_keep_their_order(sandbox):
    completions = [f"    return x * x + {number % 2}" for number in range(6)]
    verdicts = sandbox.run_all([(SQUARE, completion) for completion in completions], workers=3)
    assert [verdict.passed for verdict in verdicts] == [True, False] * 3


def test_the_same_program_has_the_same_verdict_twice(sandbox):
    program = "def f():\n    return list({'a', 'b', 'c', 'd', 'e', 'f', 'g'})"
    details = {sandbox.run(calls("got = f()\nassert False, got"), program).detail for _ in range(3)}
    assert len(details) == 1


def stored_programs(shared_data: Path, most: int | None) -> list[tuple[CodeProblem, dict]]:
    lines = (shared_data / "humaneval" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:most]]
    return [(CodeProblem.from_row(row), row) for row in rows]


@pytest.mark.parametrize("mode", ["split", "shared"])
@pytest.mark.parametrize("most", [10, pytest.param(None, marks=pytest.mark.slow)])
def test_canonical_solutions_pass_and_stubs_fail(sandbox, shared_data, mode, most):
    tried = Sandbox(mode=mode)
    tried.checked = sandbox.checked
    stored = stored_programs(shared_data, most)
    solved = tried.run_all([(problem, row["canonical_solution"]) for problem, row in stored])
    stubs = tried.run_all([(problem, "    return None\n") for problem, _ in stored])
    failed = [
        (problem.task_id, verdict) for (problem, _), verdict in zip(stored, solved, strict=True) if not verdict.passed
    ]
    assert not failed and not any(verdict.passed for verdict in stubs)
    assert {verdict.mode for verdict in [*solved, *stubs]} == {mode}


# --- refusals ---------------------------------------------------------------------------------------------------

NO_BOX = '#!/bin/bash\nwhile [ $# -gt 0 ] && [ "$1" != "--" ]; do shift; done\nshift\n"$@" &\nwait $!\n'


@pytest.fixture
def program_file(tmp_path_factory):
    """Makes an executable that every user may run."""
    folder = tmp_path_factory.mktemp("bin")
    for part in (folder, *list(folder.parents)[: len(folder.parts) - 2]):
        if part.stat().st_uid == os.geteuid() and not part.stat().st_mode & 0o001:
            part.chmod(part.stat().st_mode | 0o011)

    def make(text: str) -> Path:
        path = folder / "bwrap"
        path.write_text(text)
        path.chmod(0o755)
        return path

    return make


def test_without_bubblewrap_there_is_no_sandbox(monkeypatch):
    monkeypatch.setattr(box, "_on_path", lambda name: [])
    monkeypatch.setattr(box, "_in_wheel", lambda: [])
    with pytest.raises(SandboxError, match="apt install bubblewrap"):
        Sandbox()


def test_a_named_bubblewrap_that_is_none_is_refused(tmp_path):
    with pytest.raises(SandboxError, match="no program that this user may run"):
        Sandbox(bwrap=tmp_path / "bwrap")


def test_an_unknown_mode_and_a_missing_limit_are_refused():
    with pytest.raises(ValueError, match="mode='fast', expected one of split, shared"):
        Sandbox(mode="fast")
    with pytest.raises(ValueError, match="memory_bytes=0"):
        Limits(memory_bytes=0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("#!/bin/sh\nexit 0\n", "could not be made"),
        ("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n", "No permissions"),
        ("#!/bin/sh\necho '{\"started\": true}'\nexit 0\n", "could not be made"),
        ("not a program", "could not be"),
    ],
)
def test_a_bubblewrap_that_makes_no_box_is_refused_before_any_program(program_file, text, complaint):
    refused = Sandbox(bwrap=program_file(text))
    for _ in range(2):
        with pytest.raises(SandboxError, match=complaint):
            refused.run(SQUARE, "    return x * x")
    assert refused.checked is None


def test_a_bubblewrap_that_only_runs_the_program_is_found_out(program_file):
    with pytest.raises(SandboxError, match="does not hold") as refusal:
        Sandbox(bwrap=program_file(NO_BOX)).check_self()
    for attack in ("files outside are read", "files outside are written", "the environment is read"):
        assert attack in str(refusal.value)
    for attack in ("the network is reached (wrong: AssertionError: tcp udp unix abstract netlink", "the kernel gives"):
        assert attack in str(refusal.value)
    assert "a byte or a connection came to" in str(refusal.value)


def test_the_filter_is_refused_where_its_numbers_are_not_known():
    with pytest.raises(SandboxError, match="this machine is riscv64"):
        box.system_call_filter("riscv64")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_lets_a_fork_pass_and_no_call_that_is_denied(machine):
    architecture, column = box.ARCHITECTURES[machine]
    program = list(struct.iter_unpack("=HBBI", box.system_call_filter(machine)))

    def answer(number: int, flags: int = 0, architecture: int = architecture) -> int:
        """A slow interpreter of the filter's instructions."""
        data, at, value = {0: number, 4: architecture, 16: flags}, 0, 0
        while True:
            code, if_true, if_false, operand = program[at]
            at += 1
            if code == 0x06:
                return operand
            if code == 0x20:
                value = data[operand]
                continue
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
            at += if_true if holds else if_false

    denied, allowed = 0x00050000 | box.EPERM, 0x7FFF0000
    assert all(answer(numbers[column]) == denied for numbers in box.DENIED.values())
    clone = box.CLONE[column]
    assert answer(clone, flags=17) == allowed and answer(clone, flags=0x10000000 | 17) == denied
    assert answer(box.CLONE3) == 0x00050000 | box.ENOSYS
    assert answer(63) == allowed
    assert answer(63, architecture=0x40000003) == 0x80000000 and answer(0x40000029) == 0x80000000
