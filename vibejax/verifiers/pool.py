"""A pool of worker processes that verify completions and can neither hang nor lie.

Each slot of the pool is a thread that owns one worker process (`vibejax.verifiers.worker`). The
thread hands over one item at a time and waits for the worker's lines: `started` sets the item's
clock, so neither the queue nor an import counts, and whatever does not end with a verdict within
the limit ends with the worker's process group killed and an outcome that says what happened.
While an item uses up the second half of its limit, the slot starts the worker's replacement, so
that a batch in which many items hang does not also wait for imports.

Workers are started by exec, never by a fork of this process, and talk JSON lines: nothing here
depends on the main thread, on signals, or on what the trainer has imported.
"""

import atexit
import collections
import dataclasses
import json
import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

from vibejax.verifiers import Outcome, Verdict
from vibejax.verifiers import worker as protocol
from vibejax.verifiers.slot import Job, Slot, VerifierFailure
from vibejax.verifiers.worker_process import WorkerProcess

MAX_LIMIT_S = 86_400.0
FAILURE_WINDOW = 200  # the failure rate is that of the latest items: a late breakdown shows too
FAILURE_MIN_ITEMS = 50


class _ClosedError(Exception):
    """The pool was closed under a slot."""


@dataclasses.dataclass
class _Inbox:
    """Where the verdicts of one caller go, and whether its failures count."""

    counted: bool = True
    done: collections.deque = dataclasses.field(default_factory=collections.deque)
    outstanding: int = 0


@dataclasses.dataclass(frozen=True)
class _Item:
    key: Hashable
    job: Job
    inbox: _Inbox


class Pool:
    """Worker processes that turn (record, completion) into verdicts.

    Every method may be called from any thread. Use it as a context manager, or call `close`.

    Attributes:
        outcomes: how many items ended how, since the start: a metric of every run.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        limit_s: float = 5.0,
        limits_s: Mapping[str, float] | None = None,
        memory_mb: int = 2048,
        recycle_after: int = 500,
        queue_size: int = 1024,
        max_failure_rate: float = 0.1,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        modules: Mapping[str, str] | None = None,
    ):
        """Starts the slots; their workers start with the first items.

        Args:
            workers: worker processes that run at the same time.
            limit_s: wall clock of one item, seconds, from the moment its verifier starts.
            limits_s: verifier name -> limit where `limit_s` does not fit, beyond those of
                `worker.LIMITS_S`; the limits of combined verifiers add up.
            memory_mb: address space of a worker, MiB.
            recycle_after: items after which a worker is replaced; sympy's caches only grow.
            queue_size: items that may wait; beyond, `submit` blocks.
            max_failure_rate: share of the latest 200 items (once there are 50) that may end
                without saying anything about the completion; 1 switches the bound off.
            settings: verifier name -> keyword arguments of its `verify`.
            modules: further verifiers: name -> importable module with a function
                `verify(record, completion, **settings) -> Verdict` and, if it imports much, a
                function `load()` that does so before the clock starts.

        Raises:
            ValueError: a number out of range, or a setting of an unknown verifier.
        """
        limits_s, settings = {**protocol.LIMITS_S, **(limits_s or {})}, dict(settings or {})
        for name, value, least in (
            ("workers", workers, 1),
            ("recycle_after", recycle_after, 1),
            ("queue_size", queue_size, 1),
            ("memory_mb", memory_mb, 256),  # Python with sympy needs most of that
        ):
            if value < least:
                raise ValueError(f"{name} = {value!r} is below {least}")
        for name, value in (("limit_s", limit_s), *limits_s.items()):
            if not 0 < value <= MAX_LIMIT_S:
                raise ValueError(f"time limit {name} = {value!r} s is not in (0, {MAX_LIMIT_S}]")
        if not 0 <= max_failure_rate <= 1:
            raise ValueError(f"max_failure_rate = {max_failure_rate!r} is not within [0, 1]")
        self._modules = {**protocol.MODULES, **(modules or {})}
        for name in (*limits_s, *settings):
            if name not in self._modules:
                known = ", ".join(self._modules)
                raise ValueError(f"verifier = {name!r} is unknown, known are {known}")
        self.outcomes: collections.Counter[Outcome] = collections.Counter(
            dict.fromkeys(Outcome, 0)  # all keys from the start: safe to copy at any time
        )
        self._limit_s, self._limits_s = limit_s, limits_s
        self._recycle_after, self._queue_size = recycle_after, queue_size
        self._max_failure_rate = max_failure_rate
        self._owner = os.getpid()
        self._options = json.dumps(
            {
                "memory_mb": memory_mb,
                "modules": self._modules,
                "settings": settings,
                "parent": self._owner,
            }
        )
        lock = threading.Lock()
        self._lock = lock
        self._has_work = threading.Condition(lock)
        self._has_room = threading.Condition(lock)
        self._has_verdict = threading.Condition(lock)
        self._waiting: collections.deque[_Item] = collections.deque()
        self._inbox = _Inbox()
        self._recent: collections.deque[bool] = collections.deque(maxlen=FAILURE_WINDOW)
        self._workers: set[WorkerProcess] = set()
        self._error: BaseException | None = None
        self._closed = False
        self._slots = [
            threading.Thread(target=self._serve, name=f"verifier-{i}", daemon=True)
            for i in range(workers)
        ]
        for slot in self._slots:
            slot.start()
        atexit.register(self.close)

    def __enter__(self) -> "Pool":
        """Returns the pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the pool."""
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        with self._lock:
            return [worker.process.pid for worker in self._workers]

    def submit(self, key: Hashable, record: Mapping[str, Any], completion: str) -> None:
        """Queues one item; blocks while `queue_size` items wait.

        Args:
            key: what `finished` yields beside the verdict.
            record: `verifier` names the verifiers, the other fields are theirs; plain JSON.
            completion: text of the completion.

        Raises:
            ValueError: the record cannot be verified, or is no JSON.
            VerifierFailure: the pool has given up.
            RuntimeError: the pool is closed.
        """
        self._submit(key, record, completion, self._inbox)

    def finished(self, *, wait: bool = True) -> Iterator[tuple[Hashable, Verdict]]:
        """Yields (key, verdict) in the order of completion until no submitted item is left.

        Args:
            wait: whether to wait for items that still run; otherwise only what is done is yielded.

        Raises:
            VerifierFailure: more than `max_failure_rate` of the latest items failed.
            RuntimeError: the pool was closed before all items were done.
        """
        return self._drain(self._inbox, wait)

    def verify(
        self, items: Iterable[tuple[Mapping[str, Any], str]], *, counted: bool = True
    ) -> list[Verdict]:
        """Verifies (record, completion) pairs and returns their verdicts in the order of input.

        Items that other callers submitted are neither waited for nor returned.

        Args:
            items: what to verify.
            counted: whether failures count towards `max_failure_rate`.

        Raises:
            ValueError: a record cannot be verified.
            VerifierFailure: more than `max_failure_rate` of the latest items failed.
        """
        inbox = _Inbox(counted=counted)
        count = 0
        for record, completion in items:
            self._submit(count, record, completion, inbox)
            count += 1
        verdicts = dict(self._drain(inbox, wait=True))
        return [verdicts[i] for i in range(count)]

    def close(self) -> None:
        """Kills the workers and ends the slots; items that were not done get no verdict."""
        if os.getpid() != self._owner:
            return  # a fork of the owner must not kill the owner's workers
        atexit.unregister(self.close)
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
            for condition in (self._has_work, self._has_room, self._has_verdict):
                condition.notify_all()
        for slot in self._slots:
            slot.join()

    def _submit(
        self, key: Hashable, record: Mapping[str, Any], completion: str, inbox: _Inbox
    ) -> None:
        names = protocol.names(record, self._modules)
        if not isinstance(completion, str):
            raise ValueError(f"completion = {completion!r:.80} is not a string")
        try:
            request = json.dumps({"record": record, "completion": completion}, default=_plain)
        except TypeError as error:
            raise ValueError(f"record {record!r:.80} is not plain JSON: {error}") from error
        limit_s = sum(self._limits_s.get(name, self._limit_s) for name in names)
        item = _Item(key, Job(request.encode() + b"\n", names, limit_s), inbox)
        with self._lock:
            while len(self._waiting) >= self._queue_size and not (self._closed or self._error):
                self._has_room.wait()
            self._check()
            if self._closed:
                raise RuntimeError("the verifier pool is closed")
            inbox.outstanding += 1
            self._waiting.append(item)
            self._has_work.notify()

    def _drain(self, inbox: _Inbox, wait: bool) -> Iterator[tuple[Hashable, Verdict]]:
        while True:
            with self._lock:
                while wait and inbox.outstanding and not inbox.done:
                    if self._closed or self._error:
                        break
                    self._has_verdict.wait()
                self._check()
                if not inbox.done:
                    if wait and inbox.outstanding:
                        raise RuntimeError(
                            f"the verifier pool was closed with {inbox.outstanding} items undone"
                        )
                    return
                key, verdict = inbox.done.popleft()
            yield key, verdict

    def _check(self) -> None:
        """Raises what stops the run; the lock is held."""
        if self._error:
            raise VerifierFailure(f"verifier pool: {self._error}") from self._error
        failed = sum(self._recent)
        if len(self._recent) >= FAILURE_MIN_ITEMS and (
            failed > self._max_failure_rate * len(self._recent)
        ):
            counts = ", ".join(
                f"{outcome} {count}" for outcome, count in self.outcomes.items() if count
            )
            raise VerifierFailure(
                f"{failed} of the latest {len(self._recent)} verifications failed, more than "
                f"max_failure_rate = {self._max_failure_rate} (outcomes so far: {counts})"
            )

    # What follows runs in the slots' threads.

    def _serve(self) -> None:
        slot = Slot(self._start, self._end, self._recycle_after)
        try:
            while (item := self._next()) is not None:
                verdict = slot.verify(item.job)
                with self._lock:
                    if self._closed:
                        return
                    self.outcomes[verdict.outcome] += 1
                    if item.inbox.counted:
                        self._recent.append(not verdict.scored)
                    item.inbox.done.append((item.key, verdict))
                    item.inbox.outstanding -= 1
                    self._has_verdict.notify_all()
        except _ClosedError:
            return
        except Exception as error:  # a slot that dies silently would leave its callers waiting
            with self._lock:
                self._error = self._error or error
                self._has_verdict.notify_all()
                self._has_room.notify_all()
        finally:
            slot.end()

    def _next(self) -> _Item | None:
        with self._lock:
            while not self._waiting and not self._closed:
                self._has_work.wait()
            if self._closed:
                return None
            self._has_room.notify()
            return self._waiting.popleft()

    def _start(self) -> WorkerProcess:
        with self._lock:  # so that `close` sees every worker
            if self._closed:
                raise _ClosedError
            worker = WorkerProcess(self._options)
            self._workers.add(worker)
            return worker

    def _end(self, worker: WorkerProcess) -> None:
        with self._lock:
            self._workers.discard(worker)
            worker.kill()
        worker.bury()


def _plain(value: Any) -> Any:
    """Turns numpy scalars and arrays, as parquet readers return them, into plain values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
