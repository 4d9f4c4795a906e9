"""Where the time of a run goes: shares of sampling, verifying, training, compiling and the rest.

A phase is entered where its work is done, with `phase`, as a block or as a decorator. Time counts
for the innermost phase alone: in `rollout` devices decode, `verify` is what is left to wait for
once they have ended. Compiling counts for itself, ahead or in whatever phase a program is first
needed, and `idle` is what no phase has: waiting for other hosts, reading, writing metrics.

A process has one clock, so this module's state is the process's.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Literal

import jax

Phase = Literal["rollout", "verify", "train", "handover", "save", "compile"]
SHARES = ("rollout", "verify", "train", "handover", "save", "compile", "idle")
COMPILING = "/jax/core/compile/"  # JAX's events of tracing, lowering and compiling

_seconds: Counter[str] = Counter()
_entered: list[str] = ["idle"]  # the innermost last
_compiled: list[tuple[float, float]] = []  # beginning and seconds of what was compiled
_since = time.perf_counter()
_listens = False


def start() -> None:
    """Begins to count, for a run."""
    global _since, _listens
    _seconds.clear()
    _compiled.clear()
    _since = time.perf_counter()
    if not _listens:
        jax.monitoring.register_event_duration_secs_listener(_heard)
        _listens = True


@contextlib.contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Counts what is inside for `name`, but for phases and compiles inside of it."""
    _count()
    _entered.append(name)
    try:
        yield
    finally:
        _count()
        _entered.pop()


def shares() -> dict[str, float]:
    """The metrics `goodput/*` of the time since they were last asked for, or since `start`."""
    _count()
    total = sum(_seconds.values()) or 1.0
    found = {f"goodput/{name}": max(0.0, _seconds[name] / total) for name in SHARES}
    _seconds.clear()
    _compiled.clear()
    return found


def _count() -> None:
    """Adds the time that has passed to the innermost phase."""
    global _since
    now = time.perf_counter()
    _seconds[_entered[-1]] += now - _since
    _since = now


def _heard(event: str, seconds: float, **_: object) -> None:
    """Moves the time of a compile, which ends now, from its phase to `compile`.

    A function that is traced inside of another has an event of its own, before the outer's.
    """
    if not event.startswith(COMPILING) or threading.current_thread() != threading.main_thread():
        return
    _count()
    began = time.perf_counter() - seconds
    within = 0.0
    while _compiled and _compiled[-1][0] >= began:
        within += _compiled.pop()[1]
    _compiled.append((began, seconds))
    _seconds["compile"] += seconds - within
    _seconds[_entered[-1]] -= seconds - within
