"""Signs of life: the loops call `beat` after every decode window, micro-batch and verdict.

The count is what the watchdog looks at, and a run that was asked to end does so here.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from vibejax import preemption


class Progress(NamedTuple):
    """How far a process has come.

    Attributes:
        count: of all its signs of life.
        waiting: for other processes, so that it may stand still.
    """

    count: int
    waiting: bool


_lock = threading.Lock()
_count, _waits = 0, 0


def beat() -> None:
    """Something was done.

    Raises:
        Preempted: the process was asked to end.
    """
    _add()
    preemption.check()


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around a wait for other processes: a barrier, an exchange, a save of all."""
    global _waits
    with _lock:
        _waits += 1
    try:
        yield
    finally:
        with _lock:
            _waits -= 1
        _add()


def now() -> Progress:
    """The state of this process."""
    with _lock:
        return Progress(_count, _waits > 0)


def compiled(event: str, duration: float, **more: Any) -> None:
    """A listener of jax.monitoring: a phase of a compile has ended."""
    if "compil" in event:
        _add()


def _add() -> None:
    global _count
    with _lock:
        _count += 1
