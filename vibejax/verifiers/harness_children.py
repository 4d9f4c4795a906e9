"""What the sandbox's confined children run: the solution as a program, a call, a server; its tests.

See `harness` for who trusts whom. Each function here runs in a process of its own that sees a few
numbered descriptors and nothing else, and ends that process itself.
"""

import atexit
import builtins
import os
import sys
from typing import Any

from vibejax.verifiers import plain

PASSED, FAILED, UNUSABLE = "passed", "failed", "unusable"  # what a tester says
TEXT_CHARS = 300  # of an error's text or a test's line, for people


class UnplainError(TypeError):
    """A test hands the solution a value that cannot leave the tester's process."""


class MissingError(NameError):
    """The solution does not define a name."""


class LostError(Exception):
    """The solution's process ended, or broke the protocol, before the tests did."""


def describe(error: BaseException) -> list[str]:
    """Returns the name and text of an exception whose class may be hostile."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return [type(error).__name__, text[:TEXT_CHARS]]


def fresh_main() -> dict[str, Any]:
    """Makes a new `__main__` and returns its names."""
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["solution.py"]
    return module.__dict__


def load_solution(job: dict) -> dict[str, Any]:
    """Runs the solution's module and returns its names."""
    names = fresh_main()
    exec(compile(job["setup"], "setup", "exec", dont_inherit=True), names)
    exec(compile(job["source"], "solution.py", "exec", dont_inherit=True), names)
    return names


def run_program(job: dict) -> None:
    """Runs the solution as a program on descriptors 0, 1 and 2."""
    sys.stdin = sys.__stdin__ = open(0, errors="replace", closefd=False)  # with an empty buffer
    status = 0
    try:
        load_solution(job)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if status and status is not error.code:
            print(error.code, file=sys.stderr)
    except BaseException as error:
        sys.__excepthook__(type(error), error, error.__traceback__)
        status = 1
    try:  # what the interpreter does at its end
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = status or 1
    os._exit(status & 255)


def serve_calls(job: dict) -> None:
    """Calls the solution's function, once for each byte on descriptor 3.

    The arguments lie in descriptor 5, what is returned is left in 6, and a byte on 4 says so.
    """

    def refuse(value: Any) -> int:
        raise TypeError(f"returned a value of type {type(value).__name__}, not plain data")

    names = None
    while os.read(3, 1):
        try:
            arguments = plain.decode(plain.loads(plain.content(5)), refuse)
            if names is None:
                names = load_solution(job)
            name, holder = job["function"], names.get("Solution")
            if isinstance(holder, type) and hasattr(holder, name):
                function = getattr(holder(), name)
            elif name in names:
                function = names[name]
            else:
                raise NameError(f"the solution defines no {name}")
            plain.replace(6, plain.dumps({"value": plain.encode(function(*arguments), refuse)}))
        except BaseException as error:
            plain.replace(6, plain.dumps({"error": describe(error)}))
        os.write(4, b"\0")


def serve_solution(job: dict) -> None:
    """Answers the tester's requests from descriptor 3 on descriptor 4."""
    objects: list[Any] = []

    def hand_over(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    names = None
    while True:
        action, target, *rest = plain.receive(3, sys.maxsize)
        try:
            if names is None:
                names = load_solution(job)
            if action == "name" and target not in names:
                plain.send(4, {"missing": target})
                continue
            if action == "name":
                value = names[target]
            elif action == "attribute":
                value = getattr(objects[target], *rest)
            elif action == "items":
                value = list(objects[target])
            else:
                args, kwargs = plain.decode(rest[0], objects.__getitem__)
                value = objects[target](*args, **kwargs)
            reply = {"value": plain.encode(value, hand_over)}
        except BaseException as error:
            reply = {"error": describe(error)}
        plain.send(4, reply)


class Link:
    """The tester's end of the pipes to the solution: requests on 4, replies on 3.

    Attributes:
        calls: how often the tests called the solution.
        lost: why there are no more replies, or None. Test code may catch the exception; the test
            fails all the same.
    """

    def __init__(self, limit: int):
        """Takes the largest reply that is read, in bytes."""
        self.limit = limit
        self.calls = 0
        self.lost: str | None = None

    def ask(self, *request: Any) -> Any:
        """Sends a request and returns the value of the reply, or raises the solution's error."""
        if self.lost is None:
            try:
                plain.send(4, request)
                reply = plain.receive(3, self.limit)
                if "value" in reply:
                    return plain.decode(reply["value"], lambda number: Remote(self, number))
                name, text = reply["error"] if "error" in reply else ("MissingError", request[1])
            except (EOFError, OSError):
                self.lost = "the solution's process ended before the tests did"
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                self.lost = f"the solution's reply is broken: {error}"
        if self.lost is not None:
            raise LostError(self.lost)
        if name == "MissingError":
            raise MissingError(f"the solution defines no {text}")
        kind = getattr(builtins, name, None)
        known = isinstance(kind, type) and issubclass(kind, Exception)
        # StopIteration out of a function that the tests map over would end their loop quietly.
        if not known or issubclass(kind, StopIteration | StopAsyncIteration | UnicodeError):
            kind, text = RuntimeError, f"{name}: {text}"
        raise kind(text)


class Remote:
    """A function, class or other object of the solution, as the tests see it."""

    __slots__ = ("_link", "_number")

    def __init__(self, link: Link, number: int):
        """Takes the link, and the number that the solution's process gave the object."""
        self._link, self._number = link, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the object in the solution's process with copies of the arguments."""

        def number(value: Any) -> int:
            if type(value) is Remote:
                return value._number
            raise UnplainError(f"the tests hand a {type(value).__name__} to the solution")

        self._link.calls += 1
        return self._link.ask("call", self._number, plain.encode([list(args), kwargs], number))

    def __iter__(self) -> Any:
        """Reads all items of the object at once."""
        return iter(self._link.ask("items", self._number))

    def __getattr__(self, name: str) -> Any:
        """Reads a public attribute of the object."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self._link.ask("attribute", self._number, name)


def run_tests(job: dict, code: bytes) -> None:
    """Runs test code against the solution's proxies; the verdict goes to descriptor 5."""
    link = Link(job["output_bytes"])
    text = code.decode(errors="surrogatepass")
    try:
        names = fresh_main()
        exec(compile(job["setup"], "setup", "exec", dont_inherit=True), names)
        for name in job["names"]:
            names.pop(name, None)  # a stub of setup's would stand for the solution
            try:
                names[name] = link.ask("name", name)
            except MissingError:
                pass  # then the tests fail where they use it
        exec(compile(text, "tests", "exec", dont_inherit=True), names)
        if link.lost:
            verdict = [FAILED, link.lost]
        elif not link.calls:
            verdict = [UNUSABLE, "the tests never call the solution"]
        else:
            verdict = [PASSED, ""]
    except UnplainError as error:
        verdict = [UNUSABLE, str(error)]
    except BaseException as error:
        line, trace = "", error.__traceback__
        while trace:
            if trace.tb_frame.f_code.co_filename == "tests":
                line = text.splitlines()[trace.tb_lineno - 1].strip()
            trace = trace.tb_next
        verdict = [FAILED, ": ".join(filter(None, [*describe(error), line[:TEXT_CHARS]]))]
    plain.write_all(5, plain.dumps(verdict))
    os._exit(0)
