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
import contextlib
import dataclasses
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vibejax.verifiers import Outcome, Verdict
from vibejax.verifiers import worker as protocol

START_LIMIT_S = 60.0  # a start or an import beyond this is a broken machine, not a slow item
START_ATTEMPTS = 3
MAX_LINE_BYTES = 2**20  # a worker that writes more than this a line no longer follows the protocol
FAILURE_WINDOW = 200  # the failure rate is that of the latest items: a late breakdown shows too
FAILURE_MIN_ITEMS = 50


class VerifierFailure(RuntimeError):  # noqa: N818 - it names an outcome of the run
    """So many verifications failed, or workers did not start, that rewards mean nothing."""


@dataclasses.dataclass
class _Inbox:
    """Where the verdicts of one caller go."""

    done: collections.deque = dataclasses.field(default_factory=collections.deque)
    outstanding: int = 0


@dataclasses.dataclass(frozen=True)
class _Item:
    key: Hashable
    request: bytes
    names: list[str]
    limit_s: float
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
    ):
        """Starts the slots; their workers start with the first items.

        Args:
            workers: worker processes that run at the same time.
            limit_s: wall clock of one item, seconds, from the moment its verifier starts.
            limits_s: verifier name -> limit where `limit_s` does not fit; limits of combined
                verifiers add up.
            memory_mb: address space of a worker, MiB.
            recycle_after: items after which a worker is replaced; sympy's caches only grow.
            queue_size: items that may wait; beyond, `submit` blocks.
            max_failure_rate: share of the latest 200 items (once there are 50) that may end
                without saying anything about the completion; 1 switches the bound off.
            settings: verifier name -> keyword arguments of its `verify`.

        Raises:
            ValueError: a number out of range, or a setting of an unknown verifier.
        """
        limits_s, settings = dict(limits_s or {}), dict(settings or {})
        for name, value, least in (
            ("workers", workers, 1),
            ("recycle_after", recycle_after, 1),
            ("queue_size", queue_size, 1),
            ("memory_mb", memory_mb, 256),  # Python with sympy needs most of that
        ):
            if value < least:
                raise ValueError(f"{name} = {value!r} is below {least}")
        for name, value in (("limit_s", limit_s), *limits_s.items()):
            if not value > 0:
                raise ValueError(f"time limit {name} = {value!r} is not above 0 seconds")
        if not 0 <= max_failure_rate <= 1:
            raise ValueError(f"max_failure_rate = {max_failure_rate!r} is not within [0, 1]")
        for name in (*limits_s, *settings):
            if name != "limit_s" and name not in protocol.MODULES:
                known = ", ".join(protocol.MODULES)
                raise ValueError(f"verifier = {name!r} is unknown, known are {known}")
        self.outcomes: collections.Counter[Outcome] = collections.Counter(
            dict.fromkeys(Outcome, 0)  # all keys from the start: safe to copy at any time
        )
        self._limit_s, self._limits_s = limit_s, limits_s
        self._recycle_after, self._queue_size = recycle_after, queue_size
        self._max_failure_rate = max_failure_rate
        self._options = json.dumps(
            {"memory_mb": memory_mb, "settings": settings, "parent": os.getpid()}
        )
        lock = threading.Lock()
        self._lock = lock
        self._has_work = threading.Condition(lock)
        self._has_room = threading.Condition(lock)
        self._has_verdict = threading.Condition(lock)
        self._waiting: collections.deque[_Item] = collections.deque()
        self._inbox = _Inbox()
        self._recent: collections.deque[bool] = collections.deque(maxlen=FAILURE_WINDOW)
        self._workers: set[_Worker] = set()
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

    def verify(self, items: Iterable[tuple[Mapping[str, Any], str]]) -> list[Verdict]:
        """Verifies (record, completion) pairs and returns their verdicts in the order of input.

        Items that other callers submitted are neither waited for nor returned.

        Raises:
            ValueError: a record cannot be verified.
            VerifierFailure: more than `max_failure_rate` of the latest items failed.
        """
        inbox = _Inbox()
        count = 0
        for record, completion in items:
            self._submit(count, record, completion, inbox)
            count += 1
        verdicts = dict(self._drain(inbox, wait=True))
        return [verdicts[i] for i in range(count)]

    def close(self) -> None:
        """Kills the workers and ends the slots; items that were not done get no verdict."""
        if json.loads(self._options)["parent"] != os.getpid():
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
        names = protocol.names(record)
        if not isinstance(completion, str):
            raise ValueError(f"completion = {completion!r:.80} is not a string")
        try:
            request = json.dumps({"record": record, "completion": completion}, default=_plain)
        except TypeError as error:
            raise ValueError(f"record {record!r:.80} is not plain JSON: {error}") from error
        limit_s = sum(self._limits_s.get(name, self._limit_s) for name in names)
        item = _Item(key, request.encode() + b"\n", names, limit_s, inbox)
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
        slot = _Slot(self._start, self._end, self._recycle_after)
        try:
            while (item := self._next()) is not None:
                verdict = slot.verify(item)
                with self._lock:
                    if self._closed:
                        return
                    self.outcomes[verdict.outcome] += 1
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

    def _start(self) -> "_Worker":
        with self._lock:  # so that `close` sees every worker
            if self._closed:
                raise _ClosedError
            worker = _Worker(self._options)
            self._workers.add(worker)
            return worker

    def _end(self, worker: "_Worker") -> None:
        with self._lock:
            self._workers.discard(worker)
            worker.kill()
        worker.bury()


class _ClosedError(Exception):
    """The pool was closed under a slot."""


class _DiedError(Exception):
    """A worker closed its output or broke the protocol."""


class _LateError(Exception):
    """A worker said nothing in time."""


class _Slot:
    """One worker at a time, its replacement, and the item it runs."""

    def __init__(
        self, start: Callable[[], "_Worker"], end: Callable[["_Worker"], None], recycle_after: int
    ):
        self._start, self._end_worker, self._recycle_after = start, end, recycle_after
        self._worker: _Worker | None = None
        self._understudy: _Worker | None = None

    def end(self) -> None:
        for worker in (self._worker, self._understudy):
            if worker is not None:
                self._end_worker(worker)
        self._worker = self._understudy = None

    def verify(self, item: _Item) -> Verdict:
        """Returns the item's verdict, whatever its worker does."""
        worker = self._begin(item)
        begin = time.monotonic()
        deadline = begin + item.limit_s
        try:
            try:
                message = worker.receive(begin + item.limit_s / 2)
            except _LateError:
                self._prepare(item)
                message = worker.receive(deadline)
            verdict = _verdict(message)
        except _LateError:
            self._retire()
            return _failure(Outcome.TIMEOUT, f"no verdict after {item.limit_s:g} s")
        except _DiedError as error:
            self._end_worker(worker)
            self._worker = None
            return _failure(*worker.cause(error))
        worker.served += 1
        if worker.served >= self._recycle_after or verdict.outcome is Outcome.MEMORY:
            self._retire()
        return verdict

    def _begin(self, item: _Item) -> "_Worker":
        """Hands the item to a worker and returns once its clock runs.

        A worker that dies before it has started the item did not die of it: another is tried.
        """
        for _attempt in range(START_ATTEMPTS):
            if self._worker is None:
                self._worker, self._understudy = self._understudy or self._start(), None
            worker = self._worker
            deadline = time.monotonic() + START_LIMIT_S
            try:
                worker.send(item.request, deadline)
                while (message := worker.receive(deadline)).get("event") != "started":
                    if message.get("event") == "verdict":
                        raise VerifierFailure(
                            f"verifier {'+'.join(item.names)} does not load: {message['detail']}"
                        )
                return worker
            except (_DiedError, _LateError) as error:
                self._retire()
                reason = f"{error or type(error).__name__} {worker.last_words}".strip()
        raise VerifierFailure(
            f"{START_ATTEMPTS} worker processes in a row did not start an item of "
            f"verifier {'+'.join(item.names)}: {reason}"
        )

    def _prepare(self, item: _Item) -> None:
        if self._understudy is None:
            self._understudy = self._start()
            load = json.dumps({"load": item.names}).encode() + b"\n"
            with contextlib.suppress(_DiedError, _LateError):  # found out when it is needed
                self._understudy.send(load, time.monotonic() + 1)

    def _retire(self) -> None:
        self._end_worker(self._worker)
        self._worker = None


class _Worker:
    """A worker process, its pipes and what it said."""

    def __init__(self, options: str):
        self.served = 0
        self.last_words = ""
        self._killed = False
        self._buffer = bytearray()
        self._errors = tempfile.TemporaryFile()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            # -P: the working directory may hold a file named like a module
            [sys.executable, "-P", "-m", "vibejax.verifiers.worker", options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is the owner's to handle; a group that can be killed
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        os.set_blocking(self.process.stdin.fileno(), False)
        self._input = select.poll()
        self._input.register(self.process.stdin, select.POLLOUT)
        self._output = select.poll()
        self._output.register(self.process.stdout, select.POLLIN)

    def send(self, data: bytes, deadline: float) -> None:
        """Writes a request; `deadline` in seconds of the monotonic clock."""
        view = memoryview(data)
        while view:
            if not self._input.poll(_milliseconds(deadline)):
                raise _LateError
            try:
                view = view[os.write(self.process.stdin.fileno(), view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise _DiedError("input closed") from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """Returns the next message; `deadline` in seconds of the monotonic clock."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise _DiedError("line too long")
            # A slot that was kept from running looks once more before it calls a worker late.
            if not self._output.poll(_milliseconds(deadline)):
                raise _LateError
            chunk = os.read(self.process.stdout.fileno(), 2**16)
            if not chunk:
                raise _DiedError("output closed")
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise _DiedError("not JSON") from error
        if not isinstance(message, dict):
            raise _DiedError("not a message")
        return message

    def kill(self) -> None:
        """Kills the worker and all it started; safe to call twice, before `bury`."""
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                # not yet waited for, so the id cannot have gone to another process
                os.killpg(self.process.pid, signal.SIGKILL)

    def bury(self) -> None:
        """Waits for the killed process and closes its files."""
        self.process.wait()
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        text = self._errors.read().decode(errors="replace").strip()
        self.last_words = text.splitlines()[-1][:300] if text else ""
        for file in (self.process.stdin, self.process.stdout, self._errors):
            file.close()

    def cause(self, error: _DiedError) -> tuple[Outcome, str]:
        """Says of a worker that was buried how it died."""
        words = f"{error}; {self.last_words}".rstrip("; ")
        # GMP and the C library abort with this text where Python would raise MemoryError
        memory = "Cannot allocate memory" in words or "MemoryError" in words
        return (Outcome.MEMORY if memory else Outcome.CRASH), f"worker died: {words}"


def _verdict(message: dict[str, Any]) -> Verdict:
    """Checks what a worker sent: model output may have taken it over."""
    try:
        if message.pop("event") != "verdict" or not isinstance(message["correct"], bool):
            raise _DiedError("not a verdict")
        reward = float(message["reward"])
        if not math.isfinite(reward):
            raise _DiedError(f"reward {reward}")
        return Verdict(
            correct=message["correct"],
            reward=reward,
            outcome=Outcome(message["outcome"]),
            answer=message["answer"],
            detail=str(message["detail"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _DiedError(f"malformed verdict: {error}") from error


def _failure(outcome: Outcome, detail: str) -> Verdict:
    return Verdict(correct=False, reward=0.0, outcome=outcome, detail=detail)


def _plain(value: Any) -> Any:
    """Turns numpy scalars and arrays, as parquet readers return them, into plain values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


def _milliseconds(deadline: float) -> float:
    return max(0.0, (deadline - time.monotonic()) * 1000)
