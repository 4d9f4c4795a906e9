"""The clock of the item that a worker verifies, which stands still while a verifier imports.

Imports of sympy's size take longer than most verifications and happen once in a process: counted,
they would time out the first items of every worker.
"""

import contextlib
from collections.abc import Callable, Iterator

_listeners: list[Callable[[bool], None]] = []


@contextlib.contextmanager
def watched(listener: Callable[[bool], None]) -> Iterator[None]:
    """Has a function called with False when the clock stops and with True when it starts anew."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextlib.contextmanager
def stopped() -> Iterator[None]:
    """Stops the clock for the body of a `with` statement."""
    for listener in _listeners:
        listener(False)
    try:
        yield
    finally:
        for listener in _listeners:
            listener(True)
