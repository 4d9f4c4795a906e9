"""SIGTERM, in processes of their own: a loop that looks, one that cannot, and twice."""

import signal
import subprocess
import sys
import time

import pytest

from vibejax import preemption, progress

SCRIPT = """
import sys, time
from vibejax import preemption, progress
with preemption.handled(grace_s=1.5):
    print("ready", flush=True)
    try:
        {body}
    finally:
        print("cleaned up", flush=True)
"""
LOOKING = "[(progress.beat(), time.sleep(0.01)) for _ in iter(int, 1)]"
# One call into C that no Python line interrupts: as a compile is, for the main thread.
DEAF = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)"
SLOW_TO_END = """
            try:
                while True: progress.beat(); time.sleep(0.01)
            finally:
                time.sleep(0.5)"""

INTERRUPTIBLE = f"""
            from vibejax import config_file
            with config_file.errors_in_one_line(): print("inside", flush=True); {LOOKING}"""


def started(body):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process):
    began = time.monotonic()
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err, time.monotonic() - began


def test_a_loop_that_looks_ends_in_order():
    process = started(LOOKING)
    process.send_signal(signal.SIGTERM)
    code, out, err, _ = ended(process)
    assert (code, out) == (143, "cleaned up\n")
    assert err == "ended by SIGTERM; the same command goes on, with resume set\n"


def test_an_interrupted_command_ends_in_one_line():
    process = started(INTERRUPTIBLE)
    assert process.stdout.readline() == "inside\n"
    process.send_signal(signal.SIGINT)
    code, out, err, _ = ended(process)
    assert (code, out, err) == (130, "cleaned up\n", "interrupted\n")


def test_a_second_signal_breaks_nothing():
    process = started(SLOW_TO_END)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    code, out, *_ = ended(process)
    assert (code, out) == (143, "cleaned up\n")


def test_nothing_of_the_interpreter_delays_the_end():
    process = started("import atexit; atexit.register(time.sleep, 50); " + LOOKING)
    process.send_signal(signal.SIGTERM)
    code, out, _, seconds = ended(process)
    assert (code, out) == (143, "cleaned up\n") and seconds < 40


def test_a_main_thread_that_hears_nothing_is_ended():
    process = started(DEAF)
    process.send_signal(signal.SIGTERM)
    code, out, err, seconds = ended(process)
    assert (code, out) == (143, "")
    assert err == "ended by SIGTERM, 1.5 s after it\n"
    assert seconds > 1


def test_without_a_signal_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.handled():
        progress.beat()
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_an_error_of_the_run_stays_an_error():
    with pytest.raises(ValueError, match="of the run"), preemption.handled():
        raise ValueError("of the run")
