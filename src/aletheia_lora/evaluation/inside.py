"""The program inside a box: the checker of a generated program, or the interpreter that the program runs in.

Comes in: its role and limits as one JSON argument, and pipes. Goes out: from the checker one line with the outcome;
from the program's interpreter plain values. It is sent to the box as text, so it imports the standard library alone.

In *split* mode the two have a box each. The checker holds the trusted test and calls the program through two pipes;
values cross them as JSON and arrive as exact built-in types, so nothing that the program defines exists where the
verdict is made. The line with the outcome carries a nonce that only the checker was told. In *shared* mode one
interpreter runs both, and the program could write that line itself.
"""

import builtins
import json
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

MAX_MESSAGE_BYTES = 4 * 2**20
MAX_DETAIL = 500
EXACT_INTS = 2**53  # larger ones travel in hexadecimal: Python refuses to read very long decimal numbers
CONTAINERS: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


# The ends that a program's own interpreter may report of it. It is not believed, so none of them is a pass.
CANDIDATE_ENDS = ("syntax", "raised", "exited", "no_function", "not_plain")


# --- values -----------------------------------------------------------------------------------------------------


class NotPlain(TypeError):
    """A value that cannot be rebuilt on the other side of a pipe."""


def pack(value: Any, *, exact: bool) -> Any:
    """``value`` as JSON can hold it; with ``exact`` an instance of a subclass is refused, else it is taken as its base.

    Raises:
        NotPlain: If it is, or contains, something else than the built-in types of values.
    """
    if value is None or isinstance(value, bool):
        return value
    kinds = (int, float, str, complex, bytes, dict, *CONTAINERS.values())
    base = type(value) if exact else next((kind for kind in kinds if isinstance(value, kind)), type(value))
    if base not in kinds:
        raise NotPlain(type(value).__name__)
    if base is int:
        number = int(value)
        return number if -EXACT_INTS < number < EXACT_INTS else {"int": hex(number)}
    if base is float or base is str:
        return base(value)
    if base is complex:
        return {"complex": [value.real, value.imag]}
    if base is bytes:
        return {"bytes": value.hex()}
    if base is dict:
        return {"dict": [[pack(key, exact=exact), pack(item, exact=exact)] for key, item in value.items()]}
    return {base.__name__: [pack(item, exact=exact) for item in value]}


def unpack(packed: Any) -> Any:
    """The value that :func:`pack` was given, made of exact built-in types.

    Raises:
        ValueError: If nothing that ``pack`` makes looks like this.
        TypeError: If a key or member of a set cannot be one.
    """
    if not isinstance(packed, dict):
        if isinstance(packed, list):
            raise ValueError("a bare list")
        return packed
    ((kind, content),) = packed.items()
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in content}
    if kind not in CONTAINERS:
        raise ValueError(f"an unknown kind {kind!r}")
    return CONTAINERS[kind](unpack(item) for item in content)


def send(stream: BinaryIO, message: Any) -> None:
    """Write one message as one line."""
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """The next message, or None at the end of the stream."""
    line = stream.readline(MAX_MESSAGE_BYTES)
    if not line:
        return None
    if not line.endswith(b"\n"):
        raise ValueError(f"a message that ends early or is over {MAX_MESSAGE_BYTES} bytes")
    return json.loads(line)


# --- the interpreter of the program -----------------------------------------------------------------------------


def load(source: str) -> dict[str, Any]:
    """The namespace of a module with this source."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module  # dataclasses and pickle look their module up
    exec(compile(source, "<candidate>", "exec"), module.__dict__)
    return module.__dict__


def described(error: BaseException) -> str:
    """Class and message of an error, not too long."""
    return f"{type(error).__name__}: {error}"[:MAX_DETAIL]


def failure(error: BaseException) -> dict[str, str]:
    """What became of code that ended in ``error``, as outcome and detail."""
    return {"outcome": "exited" if isinstance(error, SystemExit) else "raised", "detail": described(error)}


def standard_error(error: BaseException) -> str:
    """The name of the built-in exception that ``error`` is, or is derived from."""
    names: list[str] = [kind.__name__ for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind]
    return names[0]


def run_candidate(requests: BinaryIO, replies: BinaryIO) -> None:
    """Load the program, then answer calls until the checker goes away."""
    send(replies, {"ready": True})
    source = receive(requests)["source"]
    try:
        namespace = load(source)
    except SyntaxError as error:
        send(replies, {"outcome": "syntax", "detail": str(error)[:MAX_DETAIL]})
        return
    except BaseException as error:
        send(replies, failure(error))
        return
    send(replies, {"loaded": True})
    while (request := receive(requests)) is not None:
        send(replies, answer(namespace, request))


def answer(namespace: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The outcome of one call of one of the program's functions."""
    if request["call"] not in namespace:
        return {"outcome": "no_function", "detail": f"the program defines no {request['call']}"}
    try:
        value = namespace[request["call"]](*unpack(request["args"]), **unpack(request["kwargs"]))
    except SystemExit as error:
        return failure(error)
    except BaseException as error:
        return {"error": standard_error(error), **failure(error)}
    try:
        return {"value": pack(value, exact=False)}
    except (NotPlain, RecursionError) as error:
        return {"outcome": "not_plain", "detail": f"{request['call']} returned {error}"}


# --- the checker ------------------------------------------------------------------------------------------------


class Ended(BaseException):
    """The verdict is made; a test that catches exceptions does not catch this one by accident."""


class Candidate:
    """The program behind the pipes, as the checker sees it."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self.requests, self.replies = requests, replies
        self.end: dict[str, str] | None = None
        """The outcome that ended it; it stands even where a test catches :class:`Ended`."""
        self.raised: Exception | None = None
        """The last exception of the program that was passed on to the test."""

    def ends(self, outcome: str, detail: str) -> NoReturn:
        """Nothing of the program counts any more."""
        self.end = self.end or {"outcome": outcome, "detail": detail}
        raise Ended

    def exchange(self, message: Any) -> dict[str, Any]:
        """Send a message and give the program's reply."""
        if self.end is not None:
            raise Ended
        try:
            send(self.requests, message)
            reply = receive(self.replies)
        except OSError as error:
            self.ends("died", f"it ended before it was asked: {error}")
        except Exception as error:
            self.ends("broken_reply", described(error))
        if reply is None:
            self.ends("died", "it ended before it answered")
        if isinstance(reply, dict) and reply.keys() & {"ready", "loaded", "value", "error"}:
            return reply
        if isinstance(reply, dict) and reply.get("outcome") in CANDIDATE_ENDS:
            self.ends(reply["outcome"], str(reply.get("detail"))[:MAX_DETAIL])
        self.ends("broken_reply", f"no reply to a call: {reply!r}"[:MAX_DETAIL])

    def function(self, name: str) -> Callable[..., Any]:
        """A function that calls the program's function of this name."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                message = {"call": name, "args": pack(args, exact=True), "kwargs": pack(kwargs, exact=True)}
            except (NotPlain, RecursionError) as error:
                self.ends("needs_shared", f"the test passes {error} to {name}")
            reply = self.exchange(message)
            if "error" in reply:
                self.raised = rebuilt(str(reply["error"]), str(reply.get("detail"))[:MAX_DETAIL])
                raise self.raised
            try:
                return unpack(reply["value"])
            except Exception as error:
                self.ends("broken_reply", described(error))

        return call


def rebuilt(name: str, detail: str) -> Exception:
    """The built-in exception of this name; a RuntimeError where there is none, or it is no ordinary one."""
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = RuntimeError
    error = kind.__new__(kind, detail)
    error.args = (detail,)
    return error


def test(task: dict[str, Any], namespace: dict[str, Any]) -> None:
    """Run the trusted test on the functions that ``namespace`` holds."""
    exec(compile(task["test"], "<test>", "exec"), namespace)
    if callable(namespace.get("check")):
        namespace["check"](namespace[task["entry_points"][0]])


def split_outcome(task: dict[str, Any], candidate: Candidate) -> dict[str, str]:
    """What the test says of a program in another box."""
    namespace: dict[str, Any] = {"__name__": "checker"}
    try:
        exec(compile(task["prompt"], "<prompt>", "exec"), namespace)  # for the helpers that a prompt defines
        exec(compile(task["setup"], "<setup>", "exec"), namespace)
    except Exception as error:
        return {"outcome": "broken_problem", "detail": described(error)}
    namespace.update({name: candidate.function(name) for name in task["entry_points"]})
    try:
        candidate.exchange({"source": task["source"]})
        test(task, namespace)
    except BaseException as error:
        if candidate.end is None:
            own = error is not candidate.raised
            return (
                {"outcome": "wrong", "detail": described(error)} if own else {"outcome": "raised", "detail": str(error)}
            )
    return candidate.end or {"outcome": "passed", "detail": ""}


def shared_outcome(task: dict[str, Any]) -> dict[str, str]:
    """What the test says of a program in the same interpreter: forgeable."""
    try:
        namespace = load(task["source"])
    except SyntaxError as error:
        return {"outcome": "syntax", "detail": str(error)[:MAX_DETAIL]}
    except BaseException as error:
        return failure(error)
    if missing := [name for name in task["entry_points"] if name not in namespace]:
        return {"outcome": "no_function", "detail": f"the program defines no {missing[0]}"}
    try:
        exec(compile(task["setup"], "<setup>", "exec"), namespace)
        test(task, namespace)
    except AssertionError as error:
        return {"outcome": "wrong", "detail": f"AssertionError: {error}"[:MAX_DETAIL]}
    except BaseException as error:
        return failure(error)
    return {"outcome": "passed", "detail": ""}


# --- the start --------------------------------------------------------------------------------------------------


def set_limits(limits: dict[str, int]) -> None:
    """Hard limits of this process and of each one it starts; none can be raised again without privileges."""
    for name, limit in {**limits, "CORE": 0}.items():
        hard = limit + 1 if name == "CPU" else limit  # a signal that tells first, then death
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, hard))


def main() -> None:
    """Play the role that the one argument names, on the pipes that it names."""
    start = json.loads(sys.argv.pop())
    sys.path.remove("")
    set_limits(start["limits"])
    modes = ("rb", "wb", "rb", "wb")
    pipes: list[Any] = [os.fdopen(number, mode) for number, mode in zip(start["pipes"], modes, strict=False)]
    if start["role"] == "candidate":
        run_candidate(*pipes)
    else:
        orders, results, *rest = pipes
        if rest and receive(rest[0]) != {"ready": True}:
            os._exit(1)  # the other box could not be made
        send(results, {"started": True})  # nothing of the program has run yet; it comes with the task
        task = json.loads(orders.read())
        orders.close()
        outcome = split_outcome(task, Candidate(rest[1], rest[0])) if rest else shared_outcome(task)
        send(results, {"nonce": task["nonce"], **outcome})
    os._exit(0)  # threads and exit handlers of the program have nothing left to do


if __name__ == "__main__":
    main()
