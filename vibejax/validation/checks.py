"""Checks one after another: a failed one is a row like any other, and the rest go on."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

Verdict = Literal["ok", "measured", "skipped", "FAILED"]


class Skipped(Exception):  # noqa: N818 - no error
    """A check that has nothing to do on this machine; the message says why."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a check has to say.

    Attributes:
        said: for people, one line.
        figures: for the JSON.
        right: whether what was computed is right; None: it was only timed.
    """

    said: str
    figures: dict[str, Any]
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """A check that has been made.

    Attributes:
        name: of the check.
        verdict: "FAILED" where the result is wrong or there is none.
        said: for people, one line.
        figures: for the JSON.
        seconds: that it took, compiles and all.
    """

    name: str
    verdict: Verdict
    said: str
    figures: dict[str, Any]
    seconds: float


def make(name: str, check: Callable[[], Found]) -> Row:
    """Makes a check, whatever becomes of it."""
    began = time.perf_counter()
    verdict: Verdict
    try:
        found = check()
        said, figures = found.said, found.figures
        verdict = "measured" if found.right is None else "ok" if found.right else "FAILED"
    except Skipped as reason:
        verdict, said, figures = "skipped", str(reason), {}
    except Exception as error:  # of whatever kind: the machine is what is being tried
        verdict, said, figures = "FAILED", _one_line(error), {"error": repr(error)}
    return Row(name, verdict, said, figures, round(time.perf_counter() - began, 2))


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


class Timing(NamedTuple):
    """Seconds of a call.

    Attributes:
        median_s: of the repeats.
        spread_s: between the fastest and the slowest.
        repeats: how many.
    """

    median_s: float
    spread_s: float
    repeats: int

    @property
    def spread(self) -> float:
        """Of the median."""
        return self.spread_s / self.median_s


def timed(call: Callable[[], Any], repeats: int) -> Timing:
    """How long a call takes until its results are there, after two that warm up."""
    for _ in range(2):
        jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return Timing(statistics.median(seconds), max(seconds) - min(seconds), repeats)
