"""One worker process of the verifier pool: reads items, runs verifiers, writes verdicts.

`python -m vibejax.verifiers.worker OPTIONS` speaks JSON lines over its standard input and output
(pickle would let a verifier that model output has taken over run code in the trainer):

    in   {"preload": [name, ...]}                   import what these verifiers may need
    in   {"record": {...}, "completion": "..."}     verify
    out  {"event": "ready"}                         once, when the process reads its input
    out  {"event": "started"}                       the item's clock starts
    out  {"event": "stopped"}                       it stands still until the next "started"
    out  {"event": "verdict", "correct": ..., ...}  the fields of `Verdict`

The process imports neither jax nor numpy by itself, ends when its input closes or its parent dies,
and holds its own limit on address space.
"""

import ctypes
import dataclasses
import functools
import importlib
import json
import math
import numbers
import os
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

from vibejax.verifiers import Outcome, Verdict, clock

MODULES = {
    "math": "vibejax.verifiers.math",
    "code": "vibejax.verifiers.code",
    "choice": "vibejax.verifiers.choice",
    "instruct": "vibejax.verifiers.instruct",
    "rubric": "vibejax.verifiers.rubric",
    "math_judge": "vibejax.verifiers.math_judge",
}
"""Verifier name -> module with `verify(record, completion, **settings) -> Verdict`, imported on
first use. A module may also have `load()`, called before the clock of its first item starts, and
`preload()`, called where there is time; what it imports later should stop the `clock`."""

LIMITS_S = {"code": 45.0, "rubric": 180.0, "math_judge": 180.0}
"""Seconds that the pool allows verifiers which keep to limits of their own: code runs its tests for
at most 30 s and needs some more to call its sandbox broken, a judge is asked again after errors."""

TRUTH_FIELDS = dict.fromkeys(("math", "math_judge", "choice"), ("ground_truth",))
"""Fields without which a record of that verifier cannot be verified; the other verifiers read
several published record formats and check for themselves."""

MAX_ANSWER_CHARS = 2_000
MAX_DETAIL_CHARS = 500
PR_SET_PDEATHSIG = 1


def names(record: Mapping[str, Any], modules: Mapping[str, str] = MODULES) -> list[str]:
    """Returns the names of the verifiers that a record asks for.

    Args:
        record: `verifier` is one name or a list of names.
        modules: the verifiers that there are: name -> module.

    Raises:
        ValueError: `record` is no mapping, names no verifier or an unknown one, or lacks a field
            that the verifier compares with.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"record {record!r:.80} is not an object of fields")
    if "verifier" not in record:
        raise ValueError(f"record lacks `verifier`: one of {', '.join(modules)}, or a list of them")
    asked = record["verifier"]
    asked = [asked] if isinstance(asked, str) else asked
    if not isinstance(asked, list) or not asked:
        raise ValueError(f"verifier = {asked!r:.80} is neither a name nor a list of names")
    for name in asked:
        if not isinstance(name, str) or name not in modules:
            raise ValueError(f"verifier = {name!r:.80} is unknown, known are {', '.join(modules)}")
        for field in TRUTH_FIELDS.get(name, ()):
            value = record.get(field)
            if value is None or value == "":
                raise ValueError(f"record of verifier {name!r} has no `{field}` (value {value!r})")
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not isinstance(value, str) and not (number and math.isfinite(value)):
                raise ValueError(
                    f"`{field}` of verifier {name!r} must be a text or a number, not {value!r:.80}"
                )
    return asked


def combine(parts: Mapping[str, Verdict]) -> Verdict:
    """Combines the verdicts of several verifiers on one completion.

    Correct means that all are; the reward is the product. A part that says nothing about the
    completion makes the whole say nothing.

    Args:
        parts: verifier name -> its verdict, at least one.
    """
    verdicts = list(parts.values())
    if len(verdicts) == 1:
        return verdicts[0]
    decisive = next(
        (v for v in verdicts if not v.scored),
        next((v for v in verdicts if not v.correct), verdicts[0]),
    )
    reward = 1.0
    for verdict in verdicts:
        reward *= verdict.reward
    return Verdict(
        correct=all(v.correct for v in verdicts),
        reward=reward if decisive.scored else 0.0,
        outcome=decisive.outcome,
        answer=next((v.answer for v in verdicts if v.answer is not None), None),
        detail="; ".join(f"{name}: {v.detail}" for name, v in parts.items() if v.detail),
    )


@functools.cache
def load(path: str) -> types.ModuleType:
    """Imports a verifier's module and what that needs; later calls cost nothing."""
    module = importlib.import_module(path)
    if hasattr(module, "load"):
        module.load()
    return module


def judge(
    record: Mapping[str, Any],
    completion: str,
    modules: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    started: Callable[[], None],
) -> Verdict:
    """Runs the verifiers of a record; whatever they raise becomes a verdict that says so.

    Args:
        record: see `names`.
        completion: text of the completion.
        modules: verifier name -> module.
        settings: verifier name -> keyword arguments of its `verify`.
        started: called once imports are done and the clock should start.
    """
    try:
        verifiers = {name: load(modules[name]) for name in names(record, modules)}
        started()
        parts = {}
        for name, verifier in verifiers.items():
            parts[name] = verifier.verify(record, completion, **settings.get(name, {}))
        return combine(parts)
    except MemoryError:
        return Verdict(correct=False, reward=0.0, outcome=Outcome.MEMORY, detail="MemoryError")
    except Exception as error:  # any failure of a verifier becomes a counted verdict, never a 0
        where = traceback.extract_tb(error.__traceback__)[-1]
        detail = f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}"
        return Verdict(
            correct=False,
            reward=0.0,
            outcome=Outcome.CRASH,
            detail=f"{detail}:{where.lineno})"[:MAX_DETAIL_CHARS],
        )


def confine(memory_mb: int, parent: int) -> None:
    """Limits this process's memory and ties its life to its parent's.

    Args:
        memory_mb: limit on address space, MiB.
        parent: process id that must still be the parent.

    Raises:
        SystemExit: the parent is gone already.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above took effect
        raise SystemExit(1)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    # a soft limit: what a verifier starts in a sandbox may be given another
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Serves items until the input closes."""
    options = json.loads(sys.argv[1])
    confine(options["memory_mb"], options["parent"])
    # Verifiers may print and may start programs: neither may reach the protocol.
    source = os.fdopen(os.dup(0), "rb")
    sink = os.dup(1)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)

    def emit(message: dict[str, Any]) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        while line:
            line = line[os.write(sink, line) :]

    def tell(running: bool) -> None:
        emit({"event": "started" if running else "stopped"})

    emit({"event": "ready"})
    for line in source:
        request = json.loads(line)
        if "preload" in request:
            for name in request["preload"]:
                module = load(options["modules"][name])
                if hasattr(module, "preload"):
                    module.preload()
            continue
        with clock.watched(tell):
            verdict = judge(
                request["record"],
                request["completion"],
                options["modules"],
                options["settings"],
                lambda: tell(True),
            )
        fields = dataclasses.asdict(verdict)
        if verdict.answer is not None:
            fields["answer"] = str(verdict.answer)[:MAX_ANSWER_CHARS]
        fields["detail"] = str(verdict.detail)[:MAX_DETAIL_CHARS]
        emit({"event": "verdict", **fields})
        if verdict.outcome is Outcome.MEMORY:  # what is left of this process is not to be trusted
            break


if __name__ == "__main__":
    main()
