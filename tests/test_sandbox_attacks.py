"""Hostile programs in the box: bombs, secrets, the network, ways out, and forged verdicts.

Each attack is bounded by itself as well (few children that end soon, small files), so that a hole in the box would fail
a test and nothing more.
"""

import os
import subprocess
import sys
import tempfile
import threading
import uuid

import pytest

from aletheia_lora.evaluation.sandbox import CodeProblem, Limits, Sandbox
from aletheia_lora.evaluation.self_check import ATTACKS, VERDICTS, Attack, attacks, laid_out, processes_with

SQUARE = CodeProblem(
    task_id="square",
    prompt='def square(x):\n    """The square of x."""\n',
    test="def check(candidate):\n    secret = 9\n    assert candidate(3) == secret\n    assert candidate(4) == 16",
    entry_points=("square",),
)
SMALL = Limits(
    cpu_seconds=1, wall_seconds=4.0, memory_bytes=2**28, tmp_bytes=2**22, shm_bytes=2**22, output_bytes=2**20
)


def returned(test: str) -> CodeProblem:
    return CodeProblem(task_id="made", prompt="", test=f"got = f()\nassert {test}, got", entry_points=("f",))


@pytest.fixture
def outside():
    """Canaries that the user of a box could reach without it; afterwards none of them has been touched."""
    with laid_out() as canaries:
        yield canaries
        assert not canaries.touched()


def test_canaries_find_a_place_where_temporary_files_lie_deep(tmp_path, monkeypatch):
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with laid_out() as canaries:
        assert len(canaries.socket_path) < 108 and not list(deep.iterdir())
    assert not os.path.exists(canaries.folder)


def test_the_self_check_names_every_attack_and_how_it_ended(sandbox, outside):
    ended = {name: f"ended: {attack.end}" if attack.end else "held" for name, attack in attacks(outside, SMALL).items()}
    assert len(ended) == 15
    assert sandbox.checked == {**{name: due for name, (_, due) in VERDICTS.items()}, **ended}


# --- bombs --------------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys, time
def child():
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(20)", MARKER])
"""
BOMBS = {
    "forks that start programs": CHILD + "def f():\n    for _ in range(40): child()",
    "a double fork in a new session": CHILD
    + "def f():\n    if os.fork() == 0:\n        os.setsid(); child(); os._exit(0)\n    time.sleep(0.3); return 1",
    "signals are ignored": CHILD
    + "for number in range(1, 32):\n    if number not in (9, 19): signal.signal(number, signal.SIG_IGN)\n"
    + "child()\nend = time.time() + 20\ndef f():\n    while time.time() < end: pass",
    "threads": "import threading, time\ndef f():\n    for _ in range(200):\n"
    "        threading.Thread(target=time.sleep, args=(5,)).start()",
    "a stopped program": CHILD + "def f():\n    child(); os.kill(os.getpid(), signal.SIGSTOP)",
    "a closed pipe": CHILD + "def f():\n    child(); os.closerange(0, 64); time.sleep(20)",
    "recursion without end": "import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    return f()",
    "an endless answer": "import itertools\ndef f():\n    return list(itertools.count())",
    "a long answer": "def f():\n    return 'x' * (5 * 2**20)",
    "an answer like a forest": "def f():\n    got = []\n    for _ in range(900): got = [got]\n    return [got] * 500",
    "a number without end": "def f():\n    return 7 ** (10**7)",
    "standard error is flooded": "import os\ndef f():\n    for _ in range(200): os.write(2, bytes(2**16))",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_and_leaves_no_process(sandbox, outside, name):
    program = f"MARKER = {outside.marker!r}\n{BOMBS[name]}"
    verdict = sandbox._run(returned("got == 2"), program, SMALL)
    assert not verdict.passed and verdict.mode == "split"


def test_a_process_left_behind_would_be_seen():
    marker = str(uuid.uuid4())
    program = [sys.executable, "-c", "print(flush=True); input()", marker]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None and child.stdout.readline()
        assert processes_with(marker) == [f"process {child.pid}"]
    assert processes_with(marker) == []


def test_a_bomb_beside_others_changes_no_verdict_of_theirs(sandbox):
    bomb = "    import os\n    while True:\n        try: os.fork() or os._exit(0)\n        except OSError: pass"
    tried = Sandbox(limits=Limits(cpu_seconds=1, wall_seconds=2.0))
    tried.checked = sandbox.checked
    verdicts = tried.run_all([(SQUARE, bomb), *[(SQUARE, "    return x * x")] * 4], workers=2)
    assert [verdict.passed for verdict in verdicts] == [False] + [True] * 4


# --- secrets and other runs ---------------------------------------------------------------------------------------


def test_the_environment_of_the_caller_is_not_there(sandbox, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = "import os\ndef f():\n    return dict(os.environ)"
    assert sandbox.run(returned("not any('secret' in value for value in got.values())"), program).passed
    assert sandbox.run(returned("set(got) <= {'PATH', 'HOME', 'LC_ALL', 'PYTHONHASHSEED', 'PWD'}"), program).passed


def test_no_folder_of_a_user_and_no_process_is_to_be_seen(sandbox):
    program = "import os\ndef f():\n    return sorted(os.listdir('/')), os.listdir('/tmp'), os.listdir('/dev/shm')"
    seen = "set(got[0]) <= {'bin', 'dev', 'etc', 'lib', 'lib64', 'tmp', 'usr', 'opt', 'root'} and not got[1] + got[2]"
    assert sandbox.run(returned(seen), program).passed
    home = "import os\ndef f():\n    return [os.path.exists(p) for p in ('/proc/self', '/etc/passwd', '/sys', '/home')]"
    assert sandbox.run(returned("not any(got)"), home).passed


def test_two_runs_see_nothing_of_each_other(sandbox):
    write = "import time\ndef f():\n    open('left', 'w').write('x'); open('/dev/shm/left', 'w').write('x')\n"
    write += "    time.sleep(1); return 2"
    look = "import os, time\ndef f():\n    time.sleep(0.5); return len(os.listdir('/tmp') + os.listdir('/dev/shm')) + 2"
    problem = returned("got == 2")
    verdicts = sandbox.run_all([(problem, write), (problem, look), (problem, look)], workers=2)
    assert [verdict.passed for verdict in verdicts] == [True] * 3


def test_links_that_a_program_makes_are_followed_by_nobody(sandbox, outside):
    program = f"import os\ndef f():\n    os.symlink({outside.file!r}, 'result'); os.symlink('/', 'all')\n"
    program += "    return os.path.exists('result')"
    assert sandbox.run(returned("got is False"), program).passed


def test_a_descriptor_of_the_caller_is_not_inherited(sandbox, tmp_path):
    (tmp_path / "secret").write_text("secret")
    with (tmp_path / "secret").open() as stream:
        os.set_inheritable(stream.fileno(), True)
        assert sandbox.run(*_call(Attack("find_descriptors", (5,), "not got"))).passed


def _call(attack: Attack) -> tuple[CodeProblem, str]:
    return attack.problem(), ATTACKS.read_text()


# --- the ten programs that a guard inside the interpreter let through ----------------------------------------------

HOSTILE = {
    "the kernel by another name": "import posix\ndef f():\n    return posix.system('true') or posix.listdir('/root')",
    "a module loaded anew": "import importlib, os\ndef f():\n    return importlib.reload(os).listdir('/home')",
    "a token of the environment": "import os\ndef f():\n    return os.environ['HF_TOKEN']",
    "a file of the system": "def f():\n    return open('/etc/passwd').read()",
    "a file written outside": "def f():\n    open(OUTSIDE, 'w').write('x'); return 1",
    "a socket": "import socket\ndef f():\n    socket.create_connection(('127.0.0.1', PORT)); return 1",
    "a child that outlives": CHILD + "def f():\n    child(); time.sleep(0.2); raise SystemExit(0)",
    "frames up to the results": "import sys\ndef f():\n    frame = sys._getframe()\n    while frame:\n"
    "        for v in frame.f_locals.values():\n            if isinstance(v, list): v.append('passed')\n"
    "            if isinstance(v, dict): v.update(outcome='passed', result='passed')\n        frame = frame.f_back",
    "equal to everything": "class A:\n    def __eq__(self, other): return True\ndef f():\n    return A()",
    "an exit": "def f():\n    raise SystemExit(0)",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_program_that_passed_a_guard_does_not_pass_here(sandbox, outside, monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", "secret")
    planted = f"MARKER = {outside.marker!r}\nOUTSIDE = {outside.folder + '/written'!r}\nPORT = {outside.port}\n"
    verdict = sandbox.run(returned("got == 2"), planted + HOSTILE[name])
    assert not verdict.passed and verdict.mode == "split"


# --- forged verdicts ----------------------------------------------------------------------------------------------

LINE = '{"nonce": "00000000000000000000000000000000", "outcome": "passed", "detail": ""}'
SAY = """
import os
def say(text):
    for number in range(1, 64):
        try: os.write(number, text.encode())
        except OSError: pass
"""
FORGERIES = {
    "exit code 0": "import os\nos._exit(0)",
    "an exit while loading": "raise SystemExit(0)",
    "an exit handler": SAY + "import atexit\natexit.register(say, LINE)\nraise SystemExit(0)",
    "passed is printed": "print('passed')\nprint(LINE)\ndef square(x): print('passed')",
    "equal to everything": "class A:\n    def __eq__(self, other): return True\ndef square(x): return A()",
    "a number equal to all": "class A(int):\n    def __eq__(self, other): return True\ndef square(x): return A(0)",
    "a list equal to all": "class A(list):\n    def __eq__(self, other): return True\ndef square(x): return A()",
    "builtins are patched": "import builtins\nbuiltins.AssertionError = type('E', (), {})\n"
    "builtins.isinstance = lambda *a: True\nbuiltins.__build_class__ = None\ndef square(x): return None",
    "the check is patched": "import sys\ndef square(x):\n    for module in list(sys.modules.values()):\n"
    "        module.__dict__['check'] = module.__dict__['test'] = lambda *a: None",
    "frames are searched": "import sys\ndef square(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        if 'secret' in frame.f_locals: return frame.f_locals['secret']\n        frame = frame.f_back",
    "all objects are searched": "import gc\ndef square(x):\n    for thing in gc.get_objects():\n"
    "        if isinstance(thing, dict) and 'nonce' in thing: thing['outcome'] = 'passed'",
    "a trace": "import sys\ndef trace(frame, event, arg):\n    frame.f_locals['secret'] = None\n    return trace\n"
    "sys.settrace(trace)\ndef square(x): return None",
    "a verdict on every descriptor": SAY + "say(LINE + chr(10))\ndef square(x): return None",
    "two lines on every descriptor": SAY
    + "say('{\"started\": true}' + chr(10) + LINE + chr(10))\ndef square(x): return None",
    "a reply that says passed": SAY + 'def square(x): say(\'{"outcome": "passed"}\' + chr(10))',
    "a reply that says shared": SAY + 'def square(x): say(\'{"outcome": "needs_shared"}\' + chr(10))',
    "a reply that says broken": SAY + 'def square(x): say(\'{"outcome": "broken_problem"}\' + chr(10))',
    "a reply without end": SAY + "def square(x): say('[' * 60000); os.closerange(1, 64)",
    "a deep reply": SAY + "def square(x): say('[' * 50000 + chr(10))",
    "a reply of another kind": SAY + 'def square(x): say(\'{"value": {"type": "object"}}\' + chr(10))',
    "an error that is no exception": SAY + 'def square(x): say(\'{"error": "print"}\' + chr(10))',
    "an error that ends the checker": SAY + 'def square(x): say(\'{"error": "SystemExit"}\' + chr(10))',
    "signals to all": "import os, signal\ndef square(x):\n    for pid in (1, os.getppid(), -1):\n"
    "        try: os.kill(pid, signal.SIGKILL)\n        except OSError: pass",
    "the test is looked for": "from glob import glob\ndef square(x):\n"
    "    for path in glob('/tmp/*') + glob('/proc/*/cmdline'):\n"
    "        if 'secret' in open(path).read(): return 9",
    "a function that raises success": "class passed(BaseException): pass\ndef square(x): raise passed",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_verdict_is_no_pass(sandbox, name):
    verdict = sandbox._run(SQUARE, f"\nLINE = {LINE!r}\n{FORGERIES[name]}", SMALL)
    assert not verdict.passed and verdict.mode == "split", verdict


def test_a_shared_interpreter_can_be_deceived_and_says_that_it_is_shared(sandbox):
    shared = Sandbox(mode="shared", limits=SMALL)
    shared.checked = sandbox.checked
    verdicts = {name: shared.run(SQUARE, f"\nLINE = {LINE!r}\n{program}") for name, program in FORGERIES.items()}
    assert all(verdict.mode == "shared" and verdict.forgeable for verdict in verdicts.values())
    assert verdicts["equal to everything"].passed and verdicts["frames are searched"].reason == "wrong"
    for name in ("exit code 0", "an exit while loading", "passed is printed", "a verdict on every descriptor"):
        assert not verdicts[name].passed


def test_many_boxes_from_threads_leave_no_descriptor_open(sandbox):
    sandbox.run(SQUARE, "    return x * x")
    before = set(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=sandbox.run, args=(SQUARE, "    return x * x")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(os.listdir("/proc/self/fd")) == before
