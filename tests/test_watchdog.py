"""The watchdog: who stands still by a clock of the test's own, threads, two real processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from vibejax import progress, watchdog
from vibejax.progress import Progress
from vibejax.watchdog import Judge, News


def judged(*looks, limit_s=10.0, processes=2):
    """The verdicts after each look: (time, {process: (count, waiting, told)})."""
    judge = Judge(limit_s, processes, 0.0)
    verdicts = []
    for now, news in looks:
        judge.hear({p: News(Progress(n, w), told) for p, (n, w, told) in news.items()}, now)
        verdicts.append(judge.verdict(now))
    return verdicts


def test_progress_of_all_is_no_news():
    looks = [(t, {0: (t, False, t), 1: (t, False, t)}) for t in range(0, 40, 4)]
    assert not any(judged(*looks))


def test_a_host_at_a_barrier_while_another_decodes_is_not_hung():
    looks = [(t, {0: (1, True, t), 1: (t, False, t)}) for t in range(0, 40, 4)]
    assert not any(judged(*looks))


def test_a_host_that_hangs_is_named_by_those_that_wait_for_it():
    looks = [(t, {0: (1, True, t), 1: (1, False, t)}) for t in range(0, 16, 4)]
    assert judged(*looks) == [None] * 3 + ["process 1 made no progress for 10 s"]


def test_of_two_that_stand_still_the_first_is_named():
    looks = [(t, {0: (min(t, 4), False, t), 1: (1, False, t)}) for t in range(0, 24, 4)]
    assert judged(*looks)[3] == "process 1 made no progress for 10 s"


def test_a_dead_or_frozen_host_is_named_also_where_it_waited():
    looks = [(t, {0: (t, False, t), 1: (1, True, min(t, 4))}) for t in range(0, 20, 4)]
    assert judged(*looks)[3:] == [None, "process 1 is dead or frozen: not heard of for 10 s"]


def test_a_host_that_never_came_is_named():
    looks = [(t, {0: (t, False, t)}) for t in range(0, 16, 4)]
    assert judged(*looks)[-1] == "process 1 is dead or frozen: not heard of for 10 s"


def test_all_at_barriers_are_hung():
    looks = [(t, {0: (1, True, t), 1: (2, True, t)}) for t in range(0, 16, 4)]
    assert judged(*looks)[-1] == "process 0 made no progress for 10 s"


def test_a_process_that_was_frozen_itself_begins_anew():
    looks = [(0, {0: (1, False, 1)}), (100, {}), (104, {0: (2, False, 2)})]
    assert judged(*looks, processes=1) == [None] * 3


def test_silence_ends_the_process_and_beats_do_not():
    lines, ended = [], threading.Event()

    def end(line):
        lines.append(line)
        ended.set()

    with watchdog.watching(0.8, end=end):
        for _ in range(20):
            progress.beat()
            time.sleep(0.1)
        assert not lines
        assert ended.wait(30)
    assert lines == ["process 0 of 1 ends: process 0 made no progress for 0.8 s"]


def test_a_compile_is_a_sign_of_life():
    with watchdog.watching(60.0):
        before = progress.now().count
        jax.jit(lambda x: x * 3 + before)(1.0).block_until_ready()
        assert progress.now().count > before


def test_waiting_ends_with_progress():
    before = progress.now()
    with progress.waiting():
        assert progress.now() == Progress(before.count, True)
    assert progress.now() == Progress(before.count + 1, False)


SCRIPT = """
import sys, threading, time
import jax
from vibejax import preemption, progress, watchdog
process, port = int(sys.argv[1]), sys.argv[2]
with preemption.handled(grace_s=10):
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    with watchdog.watching(float(sys.argv[4])):
        print("ready", flush=True)
        if process == int(sys.argv[3]):
            with progress.waiting():
                time.sleep(600)
        while True:
            progress.beat()
            time.sleep(0.05)
"""


@contextlib.contextmanager
def two_processes(waits, limit_s):
    """Two that have found each other; number `waits` is at a barrier, the other works."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(i), str(port), str(waits), str(limit_s)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for i in (0, 1)
    ]  # fmt: skip
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("frozen", [0, 1])
def test_two_processes_and_one_that_freezes(frozen):
    """A peer that works keeps the one that waits alive; stopped by SIGSTOP, it ends that one.

    Process 0 holds the store in which they meet.
    """
    with two_processes(1 - frozen, 2.0) as processes:
        waiting = processes[1 - frozen]
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=3)
        processes[frozen].send_signal(signal.SIGSTOP)
        _, err = waiting.communicate(timeout=30)
    assert waiting.returncode == watchdog.EXIT_CODE
    line = f"process {1 - frozen} of 2 ends: process {frozen} is dead or frozen: not heard of for 2"
    assert f"error: {line} s\n" in err


def test_sigterm_on_one_process_reaches_the_other():
    with two_processes(2, 60.0) as processes:
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            _, err = process.communicate(timeout=30)
            assert process.returncode == 143, err
            assert "ended by SIGTERM" in err
