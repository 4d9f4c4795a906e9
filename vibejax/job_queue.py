"""Prompts that wait for the devices of an engine, those with the longest completions first.

How long is known from the lengths that a prompt's samples had before; of others the mean of all
completions so far is taken.
"""

import dataclasses
import heapq
from collections import deque
from collections.abc import Hashable, Iterable


@dataclasses.dataclass(frozen=True)
class Job:
    """A prompt and how often it is to be completed.

    Attributes:
        id: names it.
        prompt_tokens: its length, at least 1.
        samples: completions G.
        max_tokens: longest completion.
        expected_tokens: of a completion, by what is known of it; None: the mean of all so far.
        first_sample: the number of the first of them.
    """

    id: int
    prompt_tokens: int
    samples: int
    max_tokens: int
    expected_tokens: float | None = None
    first_sample: int = 0

    def split(self, parts: int) -> list["Job"]:
        """Its samples as at most `parts` jobs, which can begin on different devices."""
        most, jobs = -(-self.samples // parts), []
        for first in range(0, self.samples, most):
            samples = min(most, self.samples - first)
            job = dataclasses.replace(self, samples=samples, first_sample=self.first_sample + first)
            jobs.append(job)
        return jobs


class Queue:
    """Jobs that have not begun; the devices of an engine take from one queue."""

    def __init__(self) -> None:
        """An empty queue."""
        self._known: list[tuple[float, int, Job]] = []  # a heap, the longest expected first
        self._unknown: deque[Job] = deque()
        self.samples = 0  # of the jobs that wait
        self._submitted = self._finished = self._finished_tokens = 0

    def __bool__(self) -> bool:
        """Whether a job waits."""
        return bool(self._known or self._unknown)

    def submit(self, jobs: Iterable[Job]) -> None:
        """Adds jobs."""
        for job in jobs:
            if job.expected_tokens is None:
                self._unknown.append(job)
            else:
                heapq.heappush(self._known, (-job.expected_tokens, self._submitted, job))
            self._submitted += 1
            self.samples += job.samples

    def longest_expected(self) -> Job | None:
        """The job to begin next; None without one."""
        mean = self._finished_tokens / self._finished if self._finished else float("inf")
        if self._known and (not self._unknown or -self._known[0][0] >= mean):
            job = heapq.heappop(self._known)[2]
        elif self._unknown:
            job = self._unknown.popleft()
        else:
            return None
        self.samples -= job.samples
        return job

    def learn(self, tokens: int) -> None:
        """Takes in the length of a completion."""
        self._finished += 1
        self._finished_tokens += tokens


class Lengths:
    """How long the latest completions of prompts were, by which the next ones are queued."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._known: dict[Hashable, tuple[int, int, int]] = {}  # run, completions, their tokens

    def learn(self, prompt: Hashable, tokens: int, run: int) -> None:
        """Takes in the length of a completion; those of an earlier run are forgotten."""
        latest, count, total = self._known.get(prompt, (run, 0, 0))
        if latest != run:
            count = total = 0
        self._known[prompt] = run, count + 1, total + tokens

    def expected(self, prompt: Hashable) -> float | None:
        """The mean of what is known; None where nothing is."""
        if prompt not in self._known:
            return None
        _, count, total = self._known[prompt]
        return total / count
