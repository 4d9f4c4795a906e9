"""Tests of a code record: the formats they come in, and what counts as the same output.

Formats, in the record's field `tests` (an object, or the same as a JSON string):

- `{"type": "stdin", "cases": [{"input": text, "output": text}, ...]}`: the solution is a program.
- `{"type": "call", "function": name, "cases": [{"args": [...], "expected": value}, ...]}`: it
  defines that function, or a class `Solution` with that method.
- `{"type": "assert", "entry_point": name or names, "code": text or texts}`: Python that asserts;
  each text is one test. A text that defines `check` and does not call it gets `check(entry_point)`
  at its end (HumanEval). Without `entry_point`, whatever the tests use and nobody defines is the
  solution's (MBPP). Arguments are copied on their way, so a solution must return what it computes.

Each may have `setup`: code that runs before the solution and, for `assert`, before the tests as
well: the prompt of HumanEval, whose tests use helpers that the prompt defines. Without `setup`,
such helpers would have to come from the solution, which could change them; they are refused.

A record of LiveCodeBench is read as it is published: `public_test_cases` and `private_test_cases`
(JSON, or JSON pickled, compressed and in base64), `metadata` with `func_name` for call tests. Its
solutions may use, without importing it, what the benchmark's own runner imports for them.

Printed output: blank space at both ends of the text and of each line is ignored, the number of
lines counts, and lines are compared word by word. Words are the same if their text is the same, or
if both are decimal numbers, at least one of them written with a point or an exponent, and they are
equal; if the expected one is written so, they may differ by `tolerance`, relative or absolute. So
`3.0` is `3`, `007` is not `7`, and `nan` is nothing but `nan`.

Returned values: equal as in Python, lists and tuples alike, keys of objects as JSON writes them;
where the expected number is a float, within `tolerance`.
"""

import ast
import base64
import builtins
import dataclasses
import functools
import importlib
import io
import json
import math
import pickle
import re
import symtable
import threading
import zlib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from vibejax.verifiers import plain

PROGRAM, CALL, ASSERT = "program", "call", "assert"
FORMATS = {"stdin": PROGRAM, "call": CALL, "assert": ASSERT}
MAX_UNPACKED_BYTES = 2**29  # the largest tests of LiveCodeBench take a fifth of that
MAX_NUMBER_CHARS = 100
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4})?", re.ASCII)
_FRACTION = re.compile(r"[.eE]")
_WORD = re.compile(r"[^\W\d]\w*")

RUNNER_IMPORTS = tuple(
    "string re datetime collections heapq bisect copy math random statistics itertools functools "
    "operator io sys json builtins typing".split()
)
"""What LiveCodeBench's runner imports before a solution, by `from X import *`, then `import X`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tests:
    """The tests of one record.

    Attributes:
        kind: PROGRAM, CALL or ASSERT.
        cases: for each test what the sandbox gets (standard input, encoded arguments, test code)
            and what it does not get, the expected output (None for ASSERT).
        setup: code that runs first.
        function: what CALL calls.
        names: of the solution, as used by the code of ASSERT.
        imports: whether the solution may use modules of RUNNER_IMPORTS without importing them.
    """

    kind: str
    cases: Sequence[tuple[bytes, Any]]
    setup: str = ""
    function: str = ""
    names: Sequence[str] = ()
    imports: bool = False


def read(record: Mapping[str, Any]) -> Tests:
    """Reads the tests of a record.

    Raises:
        ValueError: there are none, or they are malformed; names the field and the rule.
    """
    tests = record.get("tests")
    if tests is None:
        if "public_test_cases" in record or "private_test_cases" in record:
            return _read_livecodebench(record)
        raise ValueError("record has neither `tests` nor `public_test_cases` of LiveCodeBench")
    tests = _json(tests, "tests")
    if not isinstance(tests, Mapping) or tests.get("type") not in FORMATS:
        raise ValueError(f"tests = {tests!r:.80}: must be an object, its `type` in {[*FORMATS]}")
    kind, setup = FORMATS[tests["type"]], _text(tests, "setup", default="")
    _parse(setup, "setup")
    if kind == ASSERT:
        return _read_assert(tests, setup)
    cases = tests.get("cases")
    if not isinstance(cases, list | tuple) or not cases:
        raise ValueError(f"tests.cases = {cases!r:.80}: must be a list of at least one test")
    for number, case in enumerate(cases, 1):
        if not isinstance(case, Mapping):
            raise ValueError(f"tests.cases: test {number} is {case!r:.80}, not an object")
    if kind == PROGRAM:
        pairs = [(_bytes(_text(case, "input")), _text(case, "output")) for case in cases]
        return Tests(kind=kind, setup=setup, cases=pairs)
    calls = [_call(case.get("args"), case) for case in cases]
    return Tests(kind=kind, setup=setup, cases=calls, function=_text(tests, "function"))


def _read_assert(tests: Mapping[str, Any], setup: str) -> Tests:
    texts, names = tests.get("code"), tests.get("entry_point", [])
    texts = [texts] if isinstance(texts, str) else texts
    names = [names] if isinstance(names, str) else names
    for field, value in (("code", texts), ("entry_point", names)):
        if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
            raise ValueError(f"tests.{field} = {value!r:.80}: must be text or a list of texts")
    if not texts:
        raise ValueError("tests.code = []: must hold at least one test")
    finished, unknown = [], set()
    for text in texts:
        body = _parse(text, "code").body
        defined = any(isinstance(x, ast.FunctionDef) and x.name == "check" for x in body)
        if defined and not any(ast.unparse(x).startswith("check(") for x in body):
            if not names:
                raise ValueError("tests.entry_point is missing: `check` needs a function to check")
            text = f"{text}\ncheck({names[0]})\n"
        finished.append((_bytes(text), None))
        unknown |= _undefined(text, setup)
    if names and unknown - set(names):
        raise ValueError(
            f"tests.code uses {sorted(unknown - set(names))}, which neither it nor tests.setup nor "
            "tests.entry_point names: put helpers into setup"
        )
    names = names or sorted(unknown)
    if not names:
        raise ValueError("tests.code uses nothing of a solution")
    return Tests(kind=ASSERT, setup=setup, cases=finished, names=names)


# CPython 3.11 counts the depth of all threads' syntax trees in one place and then disagrees.
_PARSER = threading.Lock()


def _undefined(code: str, setup: str) -> set[str]:
    """Returns global names that code uses and neither it nor its setup defines."""
    used, defined = set(), set(dir(builtins)) | {"__name__"}
    for text in (code, setup):
        top = symtable.symtable(text, "tests", "exec")
        for symbol in top.get_symbols():
            if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
                defined.add(symbol.get_name())
        tables = [top] if text is code else []
        for table in tables:
            tables += table.get_children()
            for symbol in table.get_symbols():
                if symbol.is_referenced() and (table is top or symbol.is_global()):
                    used.add(symbol.get_name())
        for node in ast.walk(_tree(text)):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                defined |= _public_names(node.module) if node.module in RUNNER_IMPORTS else set()
    return used - defined


def _read_livecodebench(record: Mapping[str, Any]) -> Tests:
    cases = [
        *(_json(record.get("public_test_cases") or [], "public_test_cases")),
        *_unpack(record.get("private_test_cases") or "[]"),
    ]
    if not cases:
        raise ValueError("public_test_cases and private_test_cases are empty")
    kinds = {case.get("testtype") for case in cases}
    if kinds == {"stdin"}:
        pairs = [(_bytes(_text(case, "input")), _text(case, "output")) for case in cases]
        return Tests(kind=PROGRAM, cases=pairs, imports=True)
    if kinds != {"functional"}:
        raise ValueError(f"testtype = {sorted(map(str, kinds))}: must be all stdin or functional")
    function = _text(_json(record.get("metadata"), "metadata"), "func_name")
    calls = []
    for case in cases:
        lines = _text(case, "input").strip("\n").split("\n")
        args = [_json(line, "input") for line in lines]
        calls.append(_call(args, {"expected": _json(_text(case, "output"), "output")}))
    return Tests(kind=CALL, cases=calls, function=function, imports=True)


class _NoClasses(pickle.Unpickler):
    """Builds text, numbers and containers only: a pickle that names a class or function fails."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuses."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@functools.lru_cache(maxsize=4)  # the completions of a group share their tests
def _unpack(packed: str) -> list[Mapping[str, Any]]:
    """Reads LiveCodeBench's `private_test_cases`: JSON, or base64 of zlib of pickled JSON text."""
    if not isinstance(packed, str):
        raise ValueError(f"private_test_cases = {packed!r:.80}: must be text")
    if packed.lstrip().startswith("["):
        return _json(packed, "private_test_cases")
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(packed, validate=True), MAX_UNPACKED_BYTES)
        text = _NoClasses(io.BytesIO(data)).load()
    except (ValueError, LookupError, TypeError, EOFError, zlib.error, pickle.PickleError) as error:
        raise ValueError(f"private_test_cases is not base64 of zlib of a pickle: {error}") from None
    if not isinstance(text, str):
        raise ValueError(f"private_test_cases holds a pickled {type(text).__name__}, not text")
    return _json(text, "private_test_cases")


def _json(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field} = {value!r:.80} is not JSON: {error}") from None


def _text(holder: Any, field: str, default: str | None = None) -> str:
    value = holder.get(field, default) if isinstance(holder, Mapping) else None
    if not isinstance(value, str):
        raise ValueError(f"{field} = {value!r:.80}: must be text, in {holder!r:.80}")
    return value


def _tree(code: str) -> ast.Module:
    with _PARSER:
        return ast.parse(code)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _parse(code: str, field: str) -> ast.Module:
    try:
        return _tree(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"tests.{field} does not parse: {error}") from None


def _call(args: Any, case: Mapping[str, Any]) -> tuple[bytes, Any]:
    if not isinstance(args, list | tuple) or "expected" not in case:
        raise ValueError(f"test {case!r:.80}: must have `args`, a list, and `expected`")
    return plain.dumps(plain.encode(list(args), _refuse)), _jsonlike(case["expected"])


def _jsonlike(value: Any) -> Any:
    """Returns an expected value with lists for tuples and text for keys, as JSON would have it."""
    if isinstance(value, list | tuple):
        return [_jsonlike(item) for item in value]
    if isinstance(value, Mapping):
        return {_key(key): _jsonlike(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _refuse(value)


def _refuse(value: Any) -> Any:
    raise ValueError(f"{value!r:.80} in a test is a {type(value).__name__}, which is no JSON value")


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    return json.dumps(key) if key is None or isinstance(key, bool | int | float) else _refuse(key)


@functools.cache
def _runner_names() -> dict[str, str]:
    """Returns which module each name comes from that LiveCodeBench's runner imports."""
    table = {}
    for module in RUNNER_IMPORTS:
        table |= dict.fromkeys(_public_names(module), module)
    return {name: module for name, module in table.items() if module != "builtins"}


def _public_names(module: str) -> set[str]:
    """Returns what `from module import *` defines."""
    names = vars(importlib.import_module(module))
    return set(names.get("__all__") or (name for name in names if not name.startswith("_")))


def runner_setup(source: str) -> str:
    """Returns the imports of LiveCodeBench's runner, as far as a solution mentions them."""
    words = set(_WORD.findall(source))
    names = [f"from {m} import {n}" for n, m in sorted(_runner_names().items()) if n in words]
    modules = [f"import {m}" for m in RUNNER_IMPORTS if m in words and m != "builtins"]
    return "\n".join([*names, *modules, "import sys", "sys.setrecursionlimit(50000)", ""])


def same_output(printed: str, expected: str, *, tolerance: float) -> bool:
    """Says whether a program printed what was expected; see the module's text for the rules."""
    printed, expected = printed.strip(), expected.strip()
    if printed.count("\n") != expected.count("\n"):
        return False
    pairs = zip(printed.split("\n"), expected.split("\n"), strict=True)
    return all(line == want or _same_words(line, want, tolerance) for line, want in pairs)


def _same_words(line: str, want: str, tolerance: float) -> bool:
    wanted = want.split()
    words = line.split(None, len(wanted))  # no more pieces than one too many
    return len(words) == len(wanted) and all(
        word == want or _same_number(word, want, tolerance)
        for word, want in zip(words, wanted, strict=True)
    )


def _same_number(word: str, want: str, tolerance: float) -> bool:
    if max(len(word), len(want)) > MAX_NUMBER_CHARS:
        return False
    if not (_NUMBER.fullmatch(word) and _NUMBER.fullmatch(want)):
        return False
    if _FRACTION.search(want) and math.isclose(
        float(word), float(want), rel_tol=tolerance, abs_tol=tolerance
    ):
        return True
    return bool(_FRACTION.search(word + want)) and Decimal(word) == Decimal(want)


def same_value(tree: Any, expected: Any, *, tolerance: float) -> bool:
    """Says whether a returned value is the expected one; see the module's text for the rules.

    Args:
        tree: the value as `plain.encode` sends it. It may be hostile: no set or dict is built of
            its items, whose hashes could collide, and it is walked no deeper than `expected`.
        expected: a JSON value.
        tolerance: relative or absolute, where the expected number is a float.

    Raises:
        ValueError, TypeError, RecursionError: `tree` is not what `plain.encode` sends.
    """
    if isinstance(tree, dict):
        [(kind, content)] = tree.items() if len(tree) == 1 else [("", None)]
        if kind == "dict" and isinstance(expected, dict) and isinstance(content, list):
            return _same_items(content, expected, tolerance)
        if kind == "tuple":
            tree = content
        elif kind == "int":
            tree = int(content, 16)
        elif kind == "float" and content in ("inf", "-inf"):
            tree = float(content)
        else:
            return False
    if isinstance(expected, list):
        return (
            isinstance(tree, list)
            and len(tree) == len(expected)
            and all(map(functools.partial(same_value, tolerance=tolerance), tree, expected))
        )
    if isinstance(expected, float) and isinstance(tree, int | float):
        try:
            return math.isclose(tree, expected, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:  # an int beyond all floats
            return False
    return type(tree) is not dict and type(tree) is not list and tree == expected


def _same_items(pairs: list[Any], expected: dict[str, Any], tolerance: float) -> bool:
    missing = dict(expected)
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2):
            return False
        key, value = pair
        if isinstance(key, list | dict):
            return False
        key = _key(key)
        if key not in missing or not same_value(value, missing.pop(key), tolerance=tolerance):
            return False
    return not missing
