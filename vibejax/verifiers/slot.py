"""One place in the verifier pool: a worker, its replacement, and what becomes of each item."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

from vibejax.verifiers import Outcome, Verdict
from vibejax.verifiers.worker_process import DiedError, LateError, RefusedError, WorkerProcess

START_LIMIT_S = 60.0  # a start or an import beyond this is a broken machine, not a slow item
START_ATTEMPTS = 10  # of workers for one item, if others keep killing them
OWN_ATTEMPTS = 2  # of those that may end by themselves


class VerifierFailure(RuntimeError):  # noqa: N818 - it names an outcome of the run
    """So many verifications failed, or workers did not start, that rewards mean nothing."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is asked to do.

    Attributes:
        request: the line that is sent to it.
        names: of the verifiers.
        limit_s: wall clock in seconds, from the moment the verifiers start.
    """

    request: bytes
    names: list[str]
    limit_s: float


class Slot:
    """One worker at a time, its replacement, and the item it runs."""

    def __init__(
        self,
        start: Callable[[], WorkerProcess],
        end: Callable[[WorkerProcess], None],
        recycle_after: int,
    ):
        """Starts nothing yet.

        Args:
            start: makes a worker process.
            end: kills one.
            recycle_after: items after which a worker is replaced.
        """
        self._start, self._end_worker, self._recycle_after = start, end, recycle_after
        self._worker: WorkerProcess | None = None
        self._understudy: WorkerProcess | None = None

    def end(self) -> None:
        """Kills the worker and its replacement."""
        for worker in (self._worker, self._understudy):
            if worker is not None:
                self._end_worker(worker)
        self._worker = self._understudy = None

    def verify(self, job: Job) -> Verdict:
        """Returns the item's verdict, whatever its worker does."""
        worker = self._begin(job)
        if worker is None:
            return _failure(
                Outcome.CRASH, f"{START_ATTEMPTS} workers were killed before they started the item"
            )
        try:
            verdict = _verdict(self._result(worker, job))
        except LateError:
            self._retire()
            return _failure(Outcome.TIMEOUT, f"no verdict after {job.limit_s:g} s")
        except DiedError as error:
            self._retire()
            return _failure(*worker.cause(error))
        worker.served += 1
        if worker.served >= self._recycle_after or verdict.outcome is Outcome.MEMORY:
            self._retire()
        return verdict

    def _begin(self, job: Job) -> WorkerProcess | None:
        """Hands the item to a worker and returns once its clock runs.

        A worker that dies before it has started the item did not die of it: another is tried.

        Returns:
            None if all that were tried were killed from outside.

        Raises:
            VerifierFailure: workers cannot start, or cannot load the verifier.
        """
        for attempt in range(START_ATTEMPTS):
            if self._worker is None:
                self._worker, self._understudy = self._understudy or self._start(), None
            worker = self._worker
            deadline = time.monotonic() + START_LIMIT_S
            try:
                worker.send(job.request, deadline)
                worker.expect("started", deadline)
                return worker
            except RefusedError as error:
                raise VerifierFailure(
                    f"verifier {'+'.join(job.names)} does not load: {error}"
                ) from error
            except (DiedError, LateError) as error:
                self._retire()
                if attempt >= OWN_ATTEMPTS and worker.process.returncode >= 0:
                    raise VerifierFailure(
                        f"worker processes do not start: {worker.cause(error)[1]}"
                    ) from error
        return None

    def _result(self, worker: WorkerProcess, job: Job) -> dict[str, Any]:
        """Waits for the item's verdict; after an import the clock starts anew."""
        while True:
            begin = time.monotonic()
            try:
                message = worker.receive(begin + job.limit_s / 2)
            except LateError:
                self._prepare(job)
                message = worker.receive(begin + job.limit_s)
            if message.get("event") != "stopped":
                return message
            worker.expect("started", time.monotonic() + START_LIMIT_S)

    def _prepare(self, job: Job) -> None:
        if self._understudy is None:
            self._understudy = self._start()
            load = json.dumps({"preload": job.names}).encode() + b"\n"
            with contextlib.suppress(DiedError, LateError):  # found out when it is needed
                self._understudy.send(load, time.monotonic() + 1)

    def _retire(self) -> None:
        self._end_worker(self._worker)
        self._worker = None


def _verdict(message: dict[str, Any]) -> Verdict:
    """Checks what a worker sent: model output may have taken it over."""
    try:
        if message.pop("event") != "verdict" or not isinstance(message["correct"], bool):
            raise DiedError("not a verdict")
        reward = float(message["reward"])
        if not math.isfinite(reward):
            raise DiedError(f"reward {reward}")
        return Verdict(
            correct=message["correct"],
            reward=reward,
            outcome=Outcome(message["outcome"]),
            answer=None if message["answer"] is None else str(message["answer"]),
            detail=str(message["detail"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DiedError(f"malformed verdict: {error}") from error


def _failure(outcome: Outcome, detail: str) -> Verdict:
    return Verdict(correct=False, reward=0.0, outcome=outcome, detail=detail)
