"""Code answers: a completion's last code block against a record's tests, in a sandbox.

What a solution does wrong, it does: a wrong output, an exception, a hang, running out of memory,
leaving before the tests end, printing without end, being killed by the filter all make it `wrong`.
Were they failures of the verifier instead, which are left out of the reward, hanging would be a way
out of a problem that a policy cannot solve, and it would learn to hang. Only a sandbox that breaks
is a `crash`, and tests that cannot test are `unscored`.

`code_tests` has the formats of tests and what counts as the same output, `sandbox` and `harness`
what a solution can see and do.
"""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from vibejax.verifiers import (
    Outcome,
    Verdict,
    code_tests,
    harness,
    harness_children,
    plain,
    sandbox,
    thinking,
)

LANGUAGES = ("python", "python3", "py", "py3")
SHOWN_CHARS = 100  # of an output, in a verdict's detail
MAX_MARKS = 100
SHORT_REPLY_BYTES = 2**16
LONGEST_REPLY = 16  # times the expected value's length; digits and tags may take that much
PRELOADED = frozenset(
    "abc array bisect cmath collections contextlib copy dataclasses datetime decimal enum "
    "fractions functools heapq io itertools json math numbers operator queue random re statistics "
    "string threading time types typing".split()
)
"""Modules that are imported once for all tests of a problem if the solution mentions them."""


class _Result(NamedTuple):
    """One test's result: + passed, - failed, ? says nothing; and why."""

    mark: str
    why: str


def extract(completion: str) -> str | None:
    """Returns the last fenced code block of a completion, or None.

    Only what follows the thinking counts. A block that is marked as Python is preferred to one
    without a mark, which models put around sample outputs; blocks in another language are none.
    Fences are lines of at least three backticks or tildes; a block that is never closed ends with
    the text, as in CommonMark. Linear in the text's length.

    Args:
        completion: decoded completion, without the prompt.
    """
    text = thinking.after_thinking(completion)
    found: dict[bool, str] = {}  # marked as Python or not -> the last such block
    fence, indent, marked, lines = "", 0, None, []
    for line in [*(text or "").split("\n"), None]:
        stripped = "" if line is None else line.strip()
        if fence and (line is None or _closes(stripped, fence)):
            if marked is not None:
                found[marked] = "\n".join(lines)
            fence = ""
        elif fence:
            blank = len(line) - len(line.lstrip(" "))
            lines.append(line[min(indent, blank) :])
        elif stripped.startswith(("```", "~~~")):
            fence = stripped[: len(stripped) - len(stripped.lstrip(stripped[0]))]
            language = stripped[len(fence) :].strip().lower().split(" ")[0]
            indent, lines = len(line) - len(line.lstrip(" ")), []
            marked = language in LANGUAGES if language in ("", *LANGUAGES) else None
    return found.get(True, found.get(False))


def _closes(line: str, fence: str) -> bool:
    return len(line) >= len(fence) and not line.strip(fence[0])


def load() -> None:
    """Finds out how to confine, so that the first verification need not."""
    try:
        sandbox.find_backend()
    except sandbox.SandboxUnavailableError:
        pass  # each verification says so, unless its settings allow to go on


def verify(
    record: Mapping[str, Any],
    completion: str,
    *,
    backend: str = "auto",
    allow_unsandboxed: bool = False,
    seconds: float = 6.0,
    total_seconds: float = 30.0,
    memory_bytes: int = 2**30,
    output_bytes: int = 2**24,
    stop_early: bool = True,
    tolerance: float = 1e-6,
) -> Verdict:
    """Runs a completion's code against the tests of its record.

    Args:
        record: `tests`, or the fields of LiveCodeBench; see `code_tests`.
        completion: decoded completion, without the prompt.
        backend: auto, bubblewrap or namespaces; see `sandbox`.
        allow_unsandboxed: whether to run where no sandbox works.
        seconds: wall clock of one test; LiveCodeBench's value.
        total_seconds: wall clock of all tests of the record. Whoever calls must allow
            `sandbox.GRACE_S` more before it takes the verifier for dead.
        memory_bytes: address space of a test's process.
        output_bytes: the most that a test may print or return.
        stop_early: whether the first failed test ends the verification.
        tolerance: of floats, relative or absolute.

    Returns:
        The verdict; its answer is the code, its detail one mark a test (+ passed, - failed, . not
        run) and what the first failure was.

    Raises:
        ValueError: the record's tests, or a setting, are malformed.
        SandboxUnavailableError: there is no way to confine the code.
    """
    for name, value in (("seconds", seconds), ("total_seconds", total_seconds)):
        if not value > 0:
            raise ValueError(f"{name} = {value!r}: must be above 0")
    least = {"memory_bytes": 2**26, "output_bytes": 2**10}  # Python alone takes 20 MiB
    for name, value in (("memory_bytes", memory_bytes), ("output_bytes", output_bytes)):
        if value < least[name]:
            raise ValueError(f"{name} = {value!r}: must be at least {least[name]}")
    tests = code_tests.read(record)
    way = sandbox.find_backend(backend, allow_unsandboxed=allow_unsandboxed)
    source = extract(completion)
    if source is None or not source.strip():
        return Verdict(
            correct=False, reward=0.0, outcome=Outcome.NO_ANSWER, detail="no block of Python code"
        )
    job = {
        "kind": tests.kind,
        "source": source,
        "setup": tests.setup + (code_tests.runner_setup(source) if tests.imports else ""),
        "function": tests.function,
        "names": list(tests.names),
        "memory_bytes": memory_bytes,
        "output_bytes": output_bytes,
        "total_seconds": total_seconds,
    }
    job["preload"] = _imports(job["setup"] + "\n" + source)
    results: list[_Result] = []
    end = time.monotonic() + total_seconds
    try:
        with sandbox.problem(way, job) as box:
            for body, expected in tests.cases:
                left = end - time.monotonic()
                if left <= 0:
                    results.append(_Result("-", f"all {total_seconds} s were used up before it"))
                    break
                ended = box.run(body, min(seconds, left))
                results.append(_judge(tests.kind, ended, expected, tolerance))
                if stop_early and results[-1].mark != "+":
                    break
    except sandbox.SandboxBrokenError as error:
        return Verdict(
            correct=False, reward=0.0, outcome=Outcome.CRASH, answer=source, detail=str(error)
        )
    return _verdict(results, len(tests.cases), source)


def _verdict(results: list[_Result], count: int, source: str) -> Verdict:
    marks = "".join(result.mark for result in results)
    correct = marks == "+" * count
    outcome = Outcome.CORRECT if correct else Outcome.WRONG
    if "?" in marks and "-" not in marks:
        outcome = Outcome.UNSCORED
    detail = ""
    if not correct:
        first = next(number for number, mark in enumerate(marks, 1) if mark != "+")
        shown = marks.ljust(count, ".")[:MAX_MARKS]
        detail = f"{marks.count('+')} of {count} tests passed [{shown}]; "
        detail += f"test {first}: {results[first - 1].why}"
    return Verdict(
        correct=correct, reward=float(correct), outcome=outcome, answer=source, detail=detail
    )


def _imports(source: str) -> list[str]:
    """Returns the preloaded modules that a source's import lines mention, without parsing it."""
    mentioned: set[str] = set()
    for line in source.split("\n"):
        if line.lstrip().startswith(("import ", "from ")):
            mentioned.update(line.replace(",", " ").replace(".", " ").replace(";", " ").split())
    return sorted(PRELOADED & mentioned)


def _judge(kind: str, ended: sandbox.Ended, expected: Any, tolerance: float) -> _Result:
    """Judges one test by how it ended and what it left; both may be hostile."""
    errors = ended.errors.decode(errors="replace").strip().split("\n")[-1][:300]
    if ended.how == harness.TIMED_OUT:
        return _Result("-", "still running at the time limit")
    if ended.how == harness.SIGNALLED:
        return _Result("-", f"killed by signal {ended.value}. {errors}".strip(". "))
    if ended.value != 0:
        return _Result("-", errors or f"exit status {ended.value}")
    if kind == code_tests.PROGRAM:
        printed = ended.reply.decode(errors="replace")
        if code_tests.same_output(printed, expected, tolerance=tolerance):
            return _Result("+", "")
        return _Result("-", f"printed {_shown(printed)}, expected {_shown(expected)}")
    wanted = plain.dumps(plain.encode(expected, int)).decode() if kind == code_tests.CALL else ""
    if wanted and len(ended.reply) > SHORT_REPLY_BYTES + LONGEST_REPLY * len(wanted):
        return _Result("-", f"returned {len(ended.reply)} bytes, far more than expected")
    try:
        reply = plain.loads(ended.reply)
    except (ValueError, RecursionError):
        return _Result("-", f"ended before it returned. {errors}".strip(". "))
    if kind == code_tests.ASSERT:  # the tester's reply: [verdict, why]
        mark = {harness_children.PASSED: "+", harness_children.UNUSABLE: "?"}.get(reply[0], "-")
        lost = f" ({errors})" if mark == "-" and errors else ""
        return _Result(mark, reply[1] + lost)
    try:
        same = code_tests.same_value(reply["value"], expected, tolerance=tolerance)
    except (ValueError, TypeError, KeyError, RecursionError):  # an error, or no reply of ours
        same = False
    if same:
        return _Result("+", "")
    returned = ended.reply[: SHOWN_CHARS + 1].decode(errors="replace")
    return _Result("-", f"replied {_shown(returned)}, expected {_shown(wanted)}")


def _shown(text: str) -> str:
    """Returns text on one line, cut to a readable length."""
    cut = repr(text[:SHOWN_CHARS])
    return cut if len(text) <= SHOWN_CHARS else cut + "..."
