"""SIGTERM: the run comes to an orderly end and exits with 143, so that it is started again.

Pods and queued resources are taken away with a SIGTERM and half a minute. The signal sets a flag,
which the loops look at after every decode window and micro-batch (`check`); what is being saved is
finished and the process exits with 143, which Kubernetes restarts; 0 is for a run that is complete.

Python runs signal handlers between two lines of the main thread, and that may be inside a compile
of minutes. So a thread of its own hears of the signal too and ends the process when GRACE_S have
passed: whatever is on disk by then is whole, see `journal` and `checkpoint`.

A signal is sent to a process, so this module's state is the process's. Where a run has several,
the others hear of it from the watchdog's threads (`ask`). They need not agree on a moment: each may
be in another window, what each has sampled is in its own journal, and a save that not all have
begun is never finished, which the next start knows.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax

EXIT_CODE = 128 + signal.SIGTERM
GRACE_S = 20.0  # Kubernetes and TPU pods kill after 30 s

_asked = threading.Event()


class Preempted(BaseException):
    """The process was asked to end."""


def asked() -> bool:
    """Whether this process has been asked to end, or another of its run has."""
    return _asked.is_set()


def ask() -> None:
    """Asks this process to end, as a signal from outside does."""
    os.kill(os.getpid(), signal.SIGTERM)


def check() -> None:
    """To be called wherever a run can stop without losing much.

    Raises:
        Preempted: the process was asked to end.
    """
    if asked():
        raise Preempted


@contextlib.contextmanager
def handled(grace_s: float = GRACE_S) -> Iterator[None]:
    """Turns SIGTERM into `Preempted` where `check` is called, and that into exit code 143.

    For the main thread, around all that a command does. A further SIGTERM changes nothing.

    Args:
        grace_s: after so many seconds the process ends wherever it is.
    """
    _asked.clear()
    jax.config.update("jax_enable_preemption_service", False)  # it takes the signal for itself
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.signal(signal.SIGTERM, lambda number, frame: _asked.set())
    waker = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_late, args=(heard, grace_s), daemon=True).start()
    try:
        yield
    except Preempted:
        print("ended by SIGTERM; the same command goes on, with resume set", file=sys.stderr)
        if jax.distributed.is_initialized():
            jax.distributed.shutdown()  # the others lose their store with process 0
        sys.stdout.flush()
        sys.stderr.flush()
        # All is closed. Python's own ending may take minutes on a busy host, and no thread could
        # cut that short.
        os._exit(EXIT_CODE)
    finally:
        if not _asked.is_set():
            signal.set_wakeup_fd(waker)
            signal.signal(signal.SIGTERM, before)
            told.close()


def _end_late(heard: socket.socket, grace_s: float) -> None:
    """Ends the process `grace_s` after a SIGTERM, whatever its main thread does."""
    with heard:
        while number := heard.recv(1):
            if number[0] == signal.SIGTERM:
                _asked.set()
                time.sleep(grace_s)
                print(f"ended by SIGTERM, {grace_s:g} s after it", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)
