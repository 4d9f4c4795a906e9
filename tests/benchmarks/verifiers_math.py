"""Math verdicts a second, and how many are wrong: `python tests/benchmarks/verifiers_math.py`.

Ours is the pool with two workers, every verdict through a worker process; imports and starts are
not counted. All ground truths differ, so that no cache helps. Two rows say what hanging items cost:
the seconds that a batch takes of which a tenth hangs, and those of a worker's start.

peer: plain math-verify in one process without a pool, on the same pairs, answers marked as LaTeX;
    its own time limit is on, as a loop without a pool needs it. For hanging items and starts,
    which it has not, the bound that the pool keeps to.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import harness

WORKERS = 2
LIMIT_S = 2.0
NUMERIC, SYMBOLIC, BATCH = 3000, 300, 60
PAIRS = Path(__file__).parents[1] / "data" / "math_pairs.jsonl"
HANGING = """
import time
from vibejax.verifiers import Outcome, Verdict
def verify(record, completion):
    while record["hangs"]:
        pass
    return Verdict(correct=True, reward=1.0, outcome=Outcome.CORRECT)
"""


def numeric(i: int) -> tuple[str, str]:
    """Returns an answer and an equal ground truth: integers, decimals, fractions, units."""
    return (
        (f"{i:05d}", str(i)),
        (rf"\frac{{{2 * i}}}{{14}}", f"{i}/7"),
        (f"{i}.50", rf"{i}\frac{{1}}{{2}}"),
        (rf"{i}\text{{ cm}}", f"{i}"),
        (rf"\$ {i + 1000:,}", str(i + 1000)),
    )[i % 5]


def symbolic(i: int) -> tuple[str, str]:
    """Returns an answer and an equal ground truth: surds, polynomials, functions, pi."""
    return (
        (rf"\frac{{{i}}}{{\sqrt{{2}}}}", rf"\frac{{{i}\sqrt{{2}}}}{{2}}"),
        (rf"(x+{i})^2", rf"x^2+{2 * i}x+{i * i}"),
        (rf"\frac{{{i}\pi}}{{4}}", rf"{i}\cdot\frac{{\pi}}{{4}}"),
        (rf"{i}\sin(2x)", rf"{2 * i}\sin x\cos x"),
        (rf"\sqrt{{{i}}}+\ln {i}", rf"\ln({i})+{i}^{{1/2}}"),
    )[i % 5]


def pairs(case: str) -> list[tuple[str, str]]:
    """Returns a case's answers and ground truths."""
    make, count = {"numeric": (numeric, NUMERIC), "symbolic": (symbolic, SYMBOLIC)}[case]
    return [make(i) for i in range(2, count + 2)]


def ours(case: str) -> None:
    """Prints the pool's verdicts a second."""
    from vibejax.verifiers.pool import Pool

    items = [
        ({"verifier": "math", "ground_truth": truth}, rf"Therefore \boxed{{{answer}}}.")
        for answer, truth in pairs(case)
    ]
    with Pool(workers=WORKERS, recycle_after=10**6) as pool:
        pool.verify(items[:50])
        start = time.perf_counter()
        verdicts = pool.verify(items)
        seconds = time.perf_counter() - start
    if not all(verdict.correct for verdict in verdicts):
        raise SystemExit(f"{case}: outcomes {dict(pool.outcomes)}")
    print(json.dumps({"rate": len(items) / seconds}))


def peer(case: str) -> None:
    """Prints math-verify's verdicts a second, and the share that it accepts."""
    import math_verify

    items = pairs(case)

    def accepts(answer: str, truth: str) -> bool:
        gold = math_verify.parse(f"${truth}$")
        return math_verify.verify(gold, math_verify.parse(rf"Therefore $\boxed{{{answer}}}$."))

    for pair in items[:50]:
        accepts(*pair)
    start = time.perf_counter()
    accepted = sum(accepts(*pair) for pair in items)
    seconds = time.perf_counter() - start
    print(json.dumps({"rate": len(items) / seconds, "accepted": accepted / len(items)}))


def errors(side: str) -> None:
    """Prints the wrong accepts and wrong rejects on the table of hand-checked pairs."""
    import math_verify

    from vibejax.verifiers.math import equivalent

    wrong = {"accepts": 0, "rejects": 0}
    for line in PAIRS.read_text().splitlines():
        pair = json.loads(line)
        answer, truth = pair["answer"], pair["ground_truth"]
        if side == "ours":
            accepted = equivalent(answer, truth)
        else:
            gold, parsed = math_verify.parse(f"${truth}$"), math_verify.parse(f"${answer}$")
            accepted = math_verify.verify(gold, parsed)
        if accepted != pair["equal"]:
            wrong["accepts" if accepted else "rejects"] += 1
    print(json.dumps(wrong))


def hanging(side: str) -> None:
    """Prints the seconds of a batch of which a tenth hangs, or the bound."""
    count = BATCH // 10
    if side == "peer":
        print(json.dumps({"seconds": LIMIT_S * count / WORKERS + 2}))
        return
    from vibejax.verifiers.pool import Pool

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "hanging.py").write_text(HANGING)
        os.environ["PYTHONPATH"] = folder
        with Pool(
            workers=WORKERS, limit_s=LIMIT_S, max_failure_rate=1.0, modules={"hanging": "hanging"}
        ) as pool:
            items = [({"verifier": "hanging", "hangs": i % 10 == 5}, "") for i in range(BATCH)]
            start = time.perf_counter()
            verdicts = pool.verify(items)
            seconds = time.perf_counter() - start
    if [v.outcome for v in verdicts].count("timeout") != count:
        raise SystemExit(f"outcomes {dict(pool.outcomes)}")
    print(json.dumps({"seconds": seconds}))


def start(side: str) -> None:
    """Prints the seconds that a worker takes to read its input, or the bound."""
    if side == "peer":
        print(json.dumps({"seconds": 0.3}))
        return
    from vibejax.verifiers.worker_process import WorkerProcess

    options = {"memory_mb": 2048, "modules": {}, "settings": {}, "parent": os.getpid()}
    begin = time.perf_counter()
    worker = WorkerProcess(json.dumps(options))
    worker.expect("ready", time.monotonic() + 60)
    seconds = time.perf_counter() - begin
    worker.kill()
    worker.bury()
    print(json.dumps({"seconds": seconds}))


def main() -> None:
    """Measures one side of a case, or prints every row."""
    if len(sys.argv) == 3:
        side, case = sys.argv[1:]
        others = {"pairs": errors, "a tenth hangs": hanging, "worker start": start}
        others[case](side) if case in others else {"ours": ours, "peer": peer}[side](case)
        return
    for case in ("numeric", "symbolic"):
        found = harness.measure(__file__, case)
        accepted = round(found["peer"].pop("accepted"), 3)
        harness.row(
            "verifiers_math",
            case,
            found,
            "rate",
            "verdicts/s",
            higher_is_better=True,
            peer_accepted=accepted,
        )
    found = harness.measure(__file__, "pairs", rounds=1)
    for kind in ("accepts", "rejects"):
        case, unit = f"{len(PAIRS.read_text().splitlines())} pairs", f"wrong {kind}"
        harness.row("verifiers_math", case, found, kind, unit, higher_is_better=False)
    for case in ("a tenth hangs", "worker start"):
        found = harness.measure(__file__, case)
        harness.row("verifiers_math", case, found, "seconds", "s", higher_is_better=False)


if __name__ == "__main__":
    main()
