"""The verifier pool: exactly one honest verdict an item, whatever workers do."""

import collections
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from vibejax.verifiers import Outcome, Verdict
from vibejax.verifiers.pool import Pool, VerifierFailure
from vibejax.verifiers.worker import MODULES, combine, names
from vibejax.verifiers.worker_process import WorkerProcess

MISCHIEF = """
import ctypes, os, signal, subprocess, sys, time
from vibejax.verifiers import Outcome, Verdict, clock

def load():
    time.sleep(float(os.environ.get("MISCHIEF_LOAD_S", "0")))

def preload():
    with clock.stopped():
        pass

def verify(record, completion):
    do, argument = record["do"], record.get("argument")
    answer = completion
    if do == "sleep":
        time.sleep(argument)
    elif do == "import and sleep":
        with clock.stopped():
            time.sleep(1.5)
        time.sleep(argument)
    elif do == "hang":
        while True:
            pass
    elif do == "ignore signals and hang":
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(1)
    elif do == "start a program and hang":
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with open(argument, "w") as file:
            file.write(str(program.pid))
        time.sleep(60)
    elif do == "exit":
        os._exit(argument)
    elif do == "sys.exit":
        sys.exit(argument)
    elif do == "signal":
        os.kill(os.getpid(), argument)
    elif do == "segfault":
        ctypes.string_at(0)
    elif do == "allocate":
        blocks = []
        while True:
            blocks.append(bytearray(2**24))
    elif do == "abort for memory":
        os.write(2, b"GNU MP: Cannot allocate memory (size=123)")
        os.abort()
    elif do == "raise":
        raise ValueError(argument)
    elif do == "recurse":
        verify(record, completion)
    elif do == "print":
        print(argument, flush=True)
        os.write(1, argument.encode())
        subprocess.run(["echo", argument])
    elif do == "forge":
        for number in range(3, 20):
            try:
                os.write(number, argument.encode())
            except OSError:
                pass
    elif do == "pid":
        answer = str(os.getpid())
    elif do == "modules":
        answer = ",".join(sorted({name.partition(".")[0] for name in sys.modules}))
    elif do == "long answer":
        answer = "x" * 10_000_000
    elif do == "reward":
        return Verdict(correct=True, reward=float(argument), outcome=Outcome.CORRECT)
    elif do == "wrong type":
        return {"correct": True}
    return Verdict(correct=True, reward=1.0, outcome=Outcome.CORRECT, answer=answer)
"""


def item(do, argument=None, completion="done"):
    return {"verifier": "mischief", "do": do, "argument": argument}, completion


@pytest.fixture
def open_pool(tmp_path, monkeypatch):
    (tmp_path / "mischief.py").write_text(MISCHIEF)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pools = []

    def start(**arguments):
        arguments = {"max_failure_rate": 1.0, "modules": {"mischief": "mischief"}, **arguments}
        pools.append(Pool(**arguments))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, within_s=10.0):
    end = time.monotonic() + within_s
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


# --- verdicts -----------------------------------------------------------------------------------


def test_verify_returns_verdicts_in_the_order_of_input(open_pool):
    truths = ["1", "2", "3"]
    items = [({"verifier": "math", "ground_truth": t}, r"\boxed{2}") for t in truths]
    verdicts = open_pool(workers=2).verify(items)
    assert [verdict.correct for verdict in verdicts] == [False, True, False]
    assert [verdict.answer for verdict in verdicts] == ["2"] * 3


def test_finished_yields_in_the_order_of_completion_with_the_callers_keys(open_pool):
    pool = open_pool(workers=2)
    pool.verify([item("sleep", 0.3)] * 4)  # both workers run
    pool.submit(("slow", 0), *item("sleep", 1.0))
    pool.submit(("fast", 1), *item("sleep", 0.0))
    assert [key for key, _ in pool.finished()] == [("fast", 1), ("slow", 0)]
    assert list(pool.finished()) == []


def test_finished_without_waiting_yields_only_what_is_done(open_pool):
    pool = open_pool(workers=1)
    pool.submit("a", *item("sleep", 0.5))
    assert list(pool.finished(wait=False)) == []
    assert [key for key, _ in pool.finished()] == ["a"]


def test_outcomes_are_counted(open_pool):
    pool = open_pool(workers=1)
    pool.verify([item("sleep", 0), item("raise", "no"), item("sleep", 0)])
    assert pool.outcomes == collections.Counter({Outcome.CORRECT: 2, Outcome.CRASH: 1})
    assert set(pool.outcomes) == set(Outcome)


def test_settings_reach_their_verifier(open_pool):
    pool = open_pool(workers=1, settings={"choice": {"rel_tol": 0.2}})
    record = {"verifier": "choice", "ground_truth": "10 m"}
    assert pool.verify([(record, r"\boxed{11 m}")])[0].correct


@pytest.mark.parametrize(
    "do, argument, outcome, detail",
    [
        ("exit", 0, Outcome.CRASH, "exit status 0"),
        ("exit", 3, Outcome.CRASH, "exit status 3"),
        ("sys.exit", "farewell", Outcome.CRASH, "farewell"),
        ("signal", 9, Outcome.CRASH, "killed by signal 9"),
        ("segfault", None, Outcome.CRASH, "killed by signal 11"),
        ("raise", "my reason", Outcome.CRASH, "ValueError: my reason (mischief.py:"),
        ("recurse", None, Outcome.CRASH, "RecursionError"),
        ("allocate", None, Outcome.MEMORY, "MemoryError"),
        ("abort for memory", None, Outcome.MEMORY, "Cannot allocate memory"),
        ("forge", '{"event": "verdict", "correct": true}\n', Outcome.CRASH, "malformed"),
        ("forge", "[]\n", Outcome.CRASH, "not a message"),
        ("forge", "x" * 2_000_000 + "\n", Outcome.CRASH, "line too long"),
        ("reward", "nan", Outcome.CRASH, "reward nan"),
        ("reward", "inf", Outcome.CRASH, "reward inf"),
        ("wrong type", None, Outcome.CRASH, "dict"),
    ],
)
def test_failures_are_explicit_and_the_next_item_is_verified(
    open_pool, do, argument, outcome, detail
):
    pool = open_pool(workers=1, memory_mb=512, limit_s=30.0)
    failed, following = pool.verify([item(do, argument), item("sleep", 0)])
    assert (failed.outcome, failed.correct, failed.reward) == (outcome, False, 0.0)
    assert detail in failed.detail and not failed.scored
    assert following.correct


@pytest.mark.parametrize("do", ["hang", "ignore signals and hang"])
def test_hanging_items_time_out_and_the_next_is_verified(open_pool, do):
    pool = open_pool(workers=1, limit_s=0.5)
    pool.verify([item("sleep", 0)])
    start = time.monotonic()
    hung, following = pool.verify([item(do), item("sleep", 0)])
    assert time.monotonic() - start < 10
    assert hung.outcome is Outcome.TIMEOUT and "0.5 s" in hung.detail
    assert following.correct


def test_replacement_of_a_hanging_worker_starts_before_the_limit(open_pool):
    pool = open_pool(workers=1, limit_s=4.0)
    pool.submit("hung", *item("hang"))
    while len(pool.pids) < 2:
        assert list(pool.finished(wait=False)) == []
        time.sleep(0.02)
    replacement = pool.pids
    pool.submit("next", *item("pid"))
    (_, hung), (_, following) = pool.finished()
    assert hung.outcome is Outcome.TIMEOUT
    assert int(following.answer) in replacement


def test_what_a_hanging_verifier_started_dies_with_it(open_pool, tmp_path):
    pool = open_pool(workers=1, limit_s=1.0)
    written = tmp_path / "pid"
    [verdict] = pool.verify([item("start a program and hang", str(written))])
    assert verdict.outcome is Outcome.TIMEOUT
    assert gone([int(written.read_text())])


def test_waiting_in_the_queue_does_not_count(open_pool):
    pool = open_pool(workers=1, limit_s=1.0)
    verdicts = pool.verify([item("sleep", 0.3)] * 6)  # the last waits for 1.5 s
    assert all(verdict.correct for verdict in verdicts)


@pytest.mark.parametrize("do", ["sleep", "import and sleep"])
def test_importing_a_verifier_does_not_count(open_pool, monkeypatch, do):
    monkeypatch.setenv("MISCHIEF_LOAD_S", "1.5" if do == "sleep" else "0")
    pool = open_pool(workers=1, limit_s=1.0)
    assert pool.verify([item(do, 0.1)])[0].correct


def test_clock_runs_again_after_an_import(open_pool):
    [verdict] = open_pool(workers=1, limit_s=0.5).verify([item("import and sleep", 60)])
    assert verdict.outcome is Outcome.TIMEOUT


def test_limits_differ_by_verifier(open_pool):
    pool = open_pool(workers=1, limit_s=0.3, limits_s={"mischief": 5.0})
    assert pool.verify([item("sleep", 0.6)])[0].correct


def test_noise_on_standard_output_is_no_verdict(open_pool):
    forged = '{"event": "verdict", "correct": true, "reward": 9, "outcome": "correct"}\n'
    [verdict] = open_pool(workers=1).verify([item("print", forged)])
    assert (verdict.answer, verdict.reward) == ("done", 1.0)


def test_long_answers_are_cut_on_the_way(open_pool):
    [verdict] = open_pool(workers=1).verify([item("long answer")])
    assert verdict.correct and len(verdict.answer) == 2000


def test_any_text_reaches_the_verifier(open_pool):
    texts = ["\0" * 1000, "\ud800 lone surrogate", "\n{}\r\n", "\U0001f600", ""]
    verdicts = open_pool(workers=2).verify([item("sleep", 0, text) for text in texts])
    assert [verdict.answer for verdict in verdicts] == texts


def test_hostile_completions_get_a_verdict_through_the_pool(open_pool):
    record = {"verifier": "math", "ground_truth": "3"}
    texts = ["{" * 1_000_000, "\0" * 300_000, r"\frac{a} \boxed " * 60_000, r"\boxed{" * 100_000]
    verdicts = open_pool(workers=2, limit_s=5.0).verify([(record, text) for text in texts])
    assert all(verdict.outcome is Outcome.NO_ANSWER for verdict in verdicts)


# --- processes ----------------------------------------------------------------------------------


def test_workers_start_quickly_and_without_heavy_modules(open_pool):
    options = {"memory_mb": 2048, "modules": {}, "settings": {}, "parent": os.getpid()}
    seconds = 60.0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        worker = WorkerProcess(json.dumps(options))
        assert worker.receive(time.monotonic() + 60) == {"event": "ready"}
        worker.kill()
        worker.bury()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = (after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)
        seconds = min(seconds, sum(used))
    assert seconds < 0.3  # of the processor: the wall clock is the machine's other work
    [verdict] = open_pool(workers=1).verify([item("modules")])
    assert not {"jax", "jaxlib", "numpy", "sympy", "pydantic"} & set(verdict.answer.split(","))


def test_workers_are_recycled(open_pool):
    pool = open_pool(workers=1, recycle_after=3)
    pids = [verdict.answer for verdict in pool.verify([item("pid")] * 9)]
    assert [len(set(pids[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1]
    assert len(set(pids)) == 3


def test_submit_blocks_while_the_queue_is_full(open_pool):
    pool = open_pool(workers=1, queue_size=2)
    submitted = []

    def submit_all():
        for i in range(6):
            pool.submit(i, *item("sleep", 0.4))
            submitted.append(i)

    thread = threading.Thread(target=submit_all)
    thread.start()
    time.sleep(0.3)
    assert len(submitted) <= 3  # one runs, two wait
    thread.join()
    assert sorted(key for key, _ in pool.finished()) == list(range(6))


def test_threads_get_their_own_verdicts(open_pool):
    pool = open_pool(workers=2, limit_s=1.0)
    received = {}

    def ask(name):
        received[name] = pool.verify(
            [item("hang") if i == 5 else item("sleep", 0, f"{name}-{i}") for i in range(10)]
        )

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    ask("main")
    for thread in threads:
        thread.join()
    for name in ("a", "b", "c", "main"):
        answers = [verdict.answer for verdict in received[name]]
        assert answers == [None if i == 5 else f"{name}-{i}" for i in range(10)]
        assert received[name][5].outcome is Outcome.TIMEOUT
    assert list(pool.finished()) == []


def test_batch_in_which_a_tenth_hangs_is_bounded(open_pool):
    limit_s, workers, hanging = 1.5, 2, 4
    do = "ignore signals and hang"
    pool = open_pool(workers=workers, limit_s=limit_s)
    start = time.monotonic()
    pool.verify([item("sleep", 0)] * workers)
    start_s = time.monotonic() - start  # a tenth of a second, more on a busy machine
    start = time.monotonic()
    verdicts = pool.verify([item(do if i % 10 == 3 else "sleep", 0) for i in range(40)])
    seconds = time.monotonic() - start
    assert seconds < limit_s * hanging / workers + 2 + hanging * start_s
    assert collections.Counter(v.outcome for v in verdicts) == {"correct": 36, "timeout": 4}


def test_every_item_has_one_verdict_while_workers_are_killed_at_random():
    draw = random.Random(0)
    kills, received = 0, []
    with Pool(workers=2, limit_s=60.0, recycle_after=400, max_failure_rate=1.0) as pool:

        def submit_all():
            for i in range(2000):
                truth = rf"\frac{{{i}}}{{7}}" if i % 500 else rf"{i}\sqrt{{2}}"
                answer = rf"\boxed{{{i}/7}}" if i % 500 else rf"\boxed{{\sqrt{{2}} \cdot {i}}}"
                pool.submit(i, {"verifier": "math", "ground_truth": truth}, answer)

        thread = threading.Thread(target=submit_all)
        thread.start()
        while thread.is_alive() or len(received) < 2000:
            for pair in pool.finished():
                received.append(pair)
                pids = pool.pids
                if pids and draw.random() < 0.01:
                    os.kill(draw.choice(pids), signal.SIGKILL)
                    kills += 1
        thread.join()
        assert list(pool.finished()) == []
    assert sorted(key for key, _ in received) == list(range(2000))
    outcomes = collections.Counter(verdict.outcome for _, verdict in received)
    assert set(outcomes) <= {Outcome.CORRECT, Outcome.CRASH}  # none is a silent 0
    assert outcomes[Outcome.CRASH] <= kills
    assert kills >= 10
    assert pool.outcomes == outcomes


# --- the end ------------------------------------------------------------------------------------


def test_too_many_failures_stop_the_run(open_pool):
    pool = open_pool(workers=2, max_failure_rate=0.1)
    for i in range(60):
        pool.submit(i, *item("raise" if i % 4 == 0 else "sleep", 0))
    with pytest.raises(VerifierFailure, match=r"max_failure_rate = 0\.1.*crash"):
        list(pool.finished())


def test_failures_below_the_bound_do_not_stop_the_run(open_pool):
    pool = open_pool(workers=2, max_failure_rate=0.1)
    for i in range(60):
        pool.submit(i, *item("raise" if i % 20 == 10 else "sleep", 0))
    assert len(list(pool.finished())) == 60


def test_verifier_that_does_not_load_stops_the_run(open_pool):
    pool = open_pool(workers=1, modules={"mischief": "there_is_no_such_module"})
    with pytest.raises(VerifierFailure, match=r"mischief does not load.*there_is_no_such_module"):
        pool.verify([item("sleep", 0)])
    with pytest.raises(VerifierFailure):
        pool.submit("next", *item("sleep", 0))


def test_worker_that_does_not_start_stops_the_run(open_pool, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(7)")
    with pytest.raises(VerifierFailure, match=r"do not start: .*exit status 7"):
        open_pool(workers=1).verify([item("sleep", 0)])


def test_close_kills_workers_and_refuses_further_items(open_pool):
    pool = open_pool(workers=2, limit_s=60.0)
    for i in range(4):
        pool.submit(i, *item("hang"))
    while len(pool.pids) < 2:
        time.sleep(0.01)
    pids = pool.pids
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 5 and gone(pids) and pool.pids == []
    with pytest.raises(RuntimeError, match="closed with 4 items undone"):
        list(pool.finished())
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("more", *item("hang"))
    pool.close()


OWNER = """
import sys, time
from vibejax.verifiers.pool import Pool
pool = Pool(workers=2, limit_s=60, modules={"mischief": "mischief"})
for i in range(4):
    pool.submit(i, {"verifier": "mischief", "do": "hang"}, "")
while len(pool.pids) < 2:
    time.sleep(0.01)
print(*pool.pids, flush=True)
if sys.argv[1] == "wait":
    with pool:
        list(pool.finished())
"""


@pytest.mark.parametrize(
    "end, number", [("exit", None), ("wait", signal.SIGINT), ("wait", signal.SIGKILL)]
)
def test_no_worker_outlives_its_owner(tmp_path, end, number):
    (tmp_path / "mischief.py").write_text(MISCHIEF)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, end],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with owner:
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        if number is not None:
            time.sleep(0.2)
            owner.send_signal(number)
        owner.wait(timeout=10)
        errors = owner.stderr.read()
    assert gone(pids)
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record, message",
    [
        ([], "is not an object"),
        ({"ground_truth": 3}, "lacks `verifier`: one of math, code"),
        ({"verifier": "maths", "ground_truth": 3}, "'maths' is unknown, known are math, code"),
        ({"verifier": ["math", "x"], "ground_truth": 3}, "'x' is unknown"),
        ({"verifier": []}, "neither a name nor a list of names"),
        ({"verifier": 7}, "neither a name nor a list of names"),
        ({"verifier": "math"}, "'math' has no `ground_truth`"),
        ({"verifier": "math", "ground_truth": None}, "'math' has no `ground_truth`"),
        ({"verifier": "math", "ground_truth": ""}, "'math' has no `ground_truth`"),
        ({"verifier": "math", "ground_truth": 3, "x": {1, 2}}, "not plain JSON.*set"),
    ],
)
def test_bad_records_are_refused_where_they_are_submitted(open_pool, record, message):
    with pytest.raises(ValueError, match=message):
        open_pool(workers=1).submit("key", record, "")


def test_completion_must_be_text(open_pool):
    with pytest.raises(ValueError, match="completion = 3 is not a string"):
        open_pool(workers=1).submit("key", *item("sleep", 0, 3))


def test_numbers_from_parquet_are_understood(open_pool):
    record = {"verifier": "math", "ground_truth": np.int64(25), "ids": np.arange(3)}
    assert open_pool(workers=1).verify([(record, r"\boxed{025}")])[0].correct


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"workers": 0}, "workers = 0 is below 1"),
        ({"limit_s": 0}, "limit_s = 0 s is not in"),
        ({"limit_s": float("nan")}, "limit_s = nan s is not in"),
        ({"limits_s": {"math": -1}}, "math = -1 s is not in"),
        ({"limits_s": {"maths": 1}}, "'maths' is unknown, known are math"),
        ({"settings": {"maths": {}}}, "'maths' is unknown, known are math"),
        ({"memory_mb": 10}, "memory_mb = 10 is below 256"),
        ({"queue_size": 0}, "queue_size = 0 is below 1"),
        ({"recycle_after": 0}, "recycle_after = 0 is below 1"),
        ({"max_failure_rate": 2}, "max_failure_rate = 2 is not within"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pool(**arguments)


# --- composition --------------------------------------------------------------------------------


def verdict(correct, reward, outcome=None, **fields):
    outcome = outcome or (Outcome.CORRECT if correct else Outcome.WRONG)
    return Verdict(correct=correct, reward=reward, outcome=outcome, **fields)


def test_combined_verdict_is_the_conjunction_and_the_product():
    good = verdict(True, 1.0, answer="5")
    assert combine({"math": good}) is good
    both = combine({"instruct": verdict(True, 0.5), "rubric": verdict(True, 0.5, answer="fine")})
    assert (both.correct, both.reward, both.answer) == (True, 0.25, "fine")
    mixed = combine({"math": good, "instruct": verdict(False, 0.0, detail="no comma allowed")})
    assert (mixed.correct, mixed.reward, mixed.outcome) == (False, 0.0, Outcome.WRONG)
    assert mixed.detail == "instruct: no comma allowed"


@pytest.mark.parametrize("order", [1, -1])
def test_unscored_part_makes_the_whole_unscored(order):
    parts = {"instruct": verdict(False, 0.0), "rubric": verdict(False, 0.0, Outcome.UNSCORED)}
    whole = combine(dict(list(parts.items())[::order]))
    assert whole.outcome is Outcome.UNSCORED and not whole.scored


def test_records_may_name_several_verifiers(open_pool):
    record = {"verifier": ["math", "mischief"], "ground_truth": 3, "do": "reward", "argument": 0.5}
    pool = open_pool(workers=1)
    right, wrong = pool.verify([(record, r"\boxed{3}"), (record, r"\boxed{4}")])
    assert (right.correct, right.reward, right.answer) == (True, 0.5, "3")
    assert (wrong.correct, wrong.reward, wrong.outcome) == (False, 0.0, Outcome.WRONG)
    assert names(record, {**MODULES, "mischief": ""}) == ["math", "mischief"]


def test_failures_that_are_not_counted_stop_nobody():
    with Pool(workers=2, max_failure_rate=0.1, limit_s=20) as pool:
        broken = [({"verifier": "instruct", "ground_truth": 3}, "x")] * 60
        verdicts = pool.verify(broken, counted=False)
        assert len(verdicts) == 60 and not any(verdict.scored for verdict in verdicts)
        assert pool.verify([({"verifier": "math", "ground_truth": 1}, "\\boxed{1}")])[0].correct
        with pytest.raises(VerifierFailure):
            pool.verify(broken)
