"""Ends a process when it, or another of its run, has stood still for too long.

A pod in which one host hangs or has died waits in a collective until somebody looks. So every
process publishes its `progress` and reads that of the others, and a thread of each ends its own
process, with one line that names who stood still; whatever started the run starts it again. That
needs nothing of the main thread, which may hang anywhere. SIGTERM on one reaches all the same way.

A process stands still when nothing is heard of it any more (it is dead or frozen); when its count
does not rise although it does not wait for others; or when no process's count rises at all.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from vibejax import distributed, preemption, progress
from vibejax.progress import Progress

EXIT_CODE = os.EX_TEMPFAIL  # to be tried again
LOOKS = 8  # within the limit, at least
LOOK_S = 2.0  # between two, at most: SIGTERM leaves half a minute


class News(NamedTuple):
    """What a process last said of itself.

    Attributes:
        progress: how far it was.
        told: how often it had said so: rises while the process lives.
        asked: whether it was asked to end.
    """

    progress: Progress
    told: int
    asked: bool = False


class KeyValuePeers:
    """How the processes of a run hear of each other: in the key-value store of jax.distributed.

    Both methods may block, or fail, while the process that holds the store is gone.
    """

    PREFIX = "vibejax/progress/"

    def __init__(self, client: Any, process: int):
        """Of process number `process`, which `client` (jax.distributed's) connects."""
        self._client, self._process = client, process

    def publish(self, news: News) -> None:
        """Tells the others of this process."""
        value = json.dumps([*news.progress, news.told, news.asked])
        self._client.key_value_set(f"{self.PREFIX}{self._process}", value, allow_overwrite=True)

    def peers(self) -> dict[int, News]:
        """The latest of every process that has said something."""
        found = {}
        for key, value in self._client.key_value_dir_get(self.PREFIX):
            count, waiting, told, asked = json.loads(value)
            found[int(key.rpartition("/")[2])] = News(Progress(count, waiting), told, asked)
        return found


class Judge:
    """Who has stood still, by what is heard and when."""

    def __init__(self, limit_s: float, processes: int, now: float):
        """Nothing has been heard of any process at time `now`.

        Args:
            limit_s: seconds without progress that are too many.
            processes: of the run, numbered from 0.
            now: seconds of any clock.
        """
        self._limit_s, self._asked = limit_s, now
        self._news: dict[int, News] = {}
        self._heard = dict.fromkeys(range(processes), now)
        self._moved = dict.fromkeys(range(processes), now)

    def hear(self, news: dict[int, News], now: float) -> None:
        """Takes in the latest of some processes."""
        for process, latest in news.items():
            before = self._news.get(process)
            if before is None or latest.told != before.told:
                self._heard[process] = now
            if before is None or latest.progress != before.progress:
                self._moved[process] = now
            self._news[process] = latest

    def verdict(self, now: float) -> str | None:
        """Who stands still; None if none does. To be asked more often than the limit.

        Of several that which stopped first is named: the others wait for it.
        """
        limit_s, asked, self._asked = self._limit_s, self._asked, now
        if now - asked > limit_s / 2:  # this process was frozen itself, and has heard of nobody
            self._heard = dict.fromkeys(self._heard, now)
            self._moved = dict.fromkeys(self._moved, now)
        silent = [p for p, at in self._heard.items() if now - at > limit_s]
        if silent:
            first = min(silent, key=self._heard.__getitem__)
            return f"process {first} is dead or frozen: not heard of for {limit_s:g} s"
        still = [p for p, at in self._moved.items() if now - at > limit_s]
        hung = [p for p in still if not self._news[p].progress.waiting]
        if hung or len(still) == len(self._moved):
            first = min(hung or still, key=self._moved.__getitem__)
            return f"process {first} made no progress for {limit_s:g} s"
        return None


@contextlib.contextmanager
def watching(limit_s: float, end: Callable[[str], None] | None = None) -> Iterator[None]:
    """Watches over the processes of a run as long as the block runs.

    A process that is asked to end asks the others. One that is through waits here for them: the
    first may still be writing what all have computed.

    Args:
        limit_s: seconds without progress after which this process ends; 0: never.
        end: called with the line of who stood still; None prints it and ends the process.
    """
    limit_s = limit_s or float("inf")
    look_s = min(limit_s / LOOKS, LOOK_S)
    end, process, processes = end or _end, distributed.process(), distributed.count()
    peers = KeyValuePeers(distributed.store(), process) if processes > 1 else None
    judge, lock = Judge(limit_s, processes, time.monotonic()), threading.Lock()
    done = threading.Event()

    def talk() -> None:
        for told in itertools.count():
            last = done.is_set()  # whoever ends says once more whether it was asked to
            # The store is gone when process 0 is: then nothing is heard, which the judge sees.
            with contextlib.suppress(RuntimeError):
                peers.publish(News(progress.now(), told, preemption.asked()))
                news = {p: n for p, n in peers.peers().items() if p != process}
                with lock:
                    judge.hear(news, time.monotonic())
                if any(n.asked for n in news.values()) and not preemption.asked():
                    preemption.ask()
            if last:
                return
            done.wait(look_s)

    def watch() -> None:
        for told in itertools.count():
            now = time.monotonic()
            with lock:
                judge.hear({process: News(progress.now(), told)}, now)
                line = judge.verdict(now)
            if line is not None:
                end(f"process {process} of {processes} ends: {line}")
                return
            if done.wait(look_s):
                return

    jax.monitoring.register_event_duration_secs_listener(progress.compiled)
    # Two threads: talking to others blocks when the process that holds the store is frozen.
    tasks = (talk, watch) if peers else (watch,)
    threads = [threading.Thread(target=task, name=task.__name__, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        yield
        distributed.gather(None)
    finally:
        done.set()
        for thread in threads:
            thread.join(LOOK_S)
        jax.monitoring.unregister_event_duration_listener(progress.compiled)


def _end(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
