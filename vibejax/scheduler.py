"""Which completion decodes in which slot, over which pages: the host's side of rollouts.

Pure bookkeeping, no arrays of the device: a window of decode steps is planned before it runs and
accounted for after. No clock plays a part, so the same requests and lengths give the same plans.

Pages of a prompt that all its samples see whole are held once, with a count of their users; each
sample has pages of its own from there on. A sequence holds the pages that it needs for the window
to come and no more. When the pool runs dry, the youngest sequence is put back: its pages go, its
sampled tokens stay, and it goes on later from there.

A free slot takes, in this order: a sequence that was put back; the next sample of a prompt that is
already cached; the prompt whose completions are expected to be longest, from the lengths that its
samples had before, else the mean of all so far.
"""

import dataclasses
import heapq
from collections import deque
from collections.abc import Hashable, Iterable, Sequence

Id = Hashable
HEADROOM = 4  # windows that all that runs can go on for, when another sequence enters


@dataclasses.dataclass(frozen=True)
class Job:
    """A prompt and how often it is to be completed.

    Attributes:
        id: names it.
        prompt_tokens: its length, at least 1.
        samples: completions G.
        expected_tokens: of a completion, by what is known of it; None: the mean of all so far.
    """

    id: Id
    prompt_tokens: int
    samples: int
    expected_tokens: float | None = None


@dataclasses.dataclass(eq=False)
class Running:
    """One sequence: a sample of a job.

    Attributes:
        job: what it completes.
        sample: which of the job's completions.
        sampled: tokens drawn so far, kept while it is put back.
        pages: its pages, the prompt's shared ones first; empty while put back.
        shared: how many of them are the prompt's.
        order: rises with every admission: the youngest has the largest.
        slot: where it decodes.
    """

    job: Job
    sample: int
    sampled: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    shared: int = 0
    order: int = -1
    slot: int = -1

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are cached before the next step: all but the last drawn."""
        return self.job.prompt_tokens + max(self.sampled - 1, 0)


class PoolTooSmallError(ValueError):
    """A sequence needs more pages than there are."""


class PagePool:
    """Page numbers and how many sequences use each."""

    def __init__(self, pages: int):
        """A pool of `pages` free pages."""
        self.size = pages
        self._free = list(range(pages - 1, -1, -1))
        self._users = [0] * pages

    @property
    def free(self) -> int:
        """Pages that nobody uses."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one user."""
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each."""
        for page in pages:
            self._users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One user less for each; without any, a page is free."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)


@dataclasses.dataclass
class _Group:
    """A job of which samples are still to start.

    Attributes:
        job: whose samples.
        next_sample: the first that has not started.
        pages: the prompt's whole pages; None: not in the cache.
    """

    job: Job
    next_sample: int = 0
    pages: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens before and in the window to come.

    Attributes:
        prefill: jobs whose prompts are computed now, into the pages of `prompt_pages`.
        started: sequences that enter a slot, new or put back before.
        put_back: sequences that lost their slot and pages.
        running: all that decode in the window, by slot.
    """

    prefill: list[tuple[Job, list[int]]]
    started: list[Running]
    put_back: list[Running]
    running: dict[int, Running]


class Scheduler:
    """Slots, pages and the queue of one engine."""

    def __init__(self, slots: int, pages: int, page_tokens: int, window: int, max_tokens: int):
        """Sizes.

        Args:
            slots: sequences that decode at one time.
            pages: of the pool.
            page_tokens: tokens of a page.
            window: decode steps of one window.
            max_tokens: longest completion.
        """
        self.slots, self.window, self.max_tokens = slots, window, max_tokens
        self.page_tokens = page_tokens
        self.pool = PagePool(pages)
        self.running: dict[int, Running] = {}
        self.put_back_count = 0
        self._free_slots = list(range(slots))  # a heap: the lowest first
        self._queue: list[tuple[float, int, Job]] = []
        self._unknown: deque[Job] = deque()  # without an expectation of their own
        self._waiting: list[tuple[int, Running]] = []  # put back, the oldest first
        self._groups: deque[_Group] = deque()  # begun; at most one of them is in the cache
        self._admitted = self._submitted = 0
        self._finished, self._finished_tokens = 0, 0

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues jobs.

        Raises:
            PoolTooSmallError: one sequence of a job could outgrow the pool.
        """
        for job in jobs:
            most = self._pages_of(job.prompt_tokens + self.max_tokens)
            if most > self.pool.size:
                raise PoolTooSmallError(
                    f"job {job.id!r}: a prompt of {job.prompt_tokens} tokens and {self.max_tokens} "
                    f"more need {most} pages of {self.page_tokens}, the pool has {self.pool.size}"
                )
            if job.expected_tokens is None:
                self._unknown.append(job)
            else:
                heapq.heappush(self._queue, (-job.expected_tokens, self._submitted, job))
            self._submitted += 1

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self.running or self._waiting or self._groups or self._queue or self._unknown)

    def plan(self) -> Plan:
        """Fills free slots and gives every running sequence its pages for the window."""
        put_back = self._make_room()
        prefill: list[tuple[Job, list[int]]] = []
        started: list[Running] = []
        while self._free_slots:
            sequence = self._next(prefill)
            if sequence is None:
                break
            sequence.slot = heapq.heappop(self._free_slots)
            sequence.order = self._admitted
            self._admitted += 1
            self.running[sequence.slot] = sequence
            started.append(sequence)
        return Plan(prefill, started, put_back, dict(sorted(self.running.items())))

    def account(self, sampled: dict[int, int], ended: Iterable[int]) -> list[Running]:
        """Takes in what a window did.

        Args:
            sampled: tokens drawn in the window, by slot.
            ended: slots whose sequences are complete.

        Returns:
            The complete sequences; their slots and pages are free.
        """
        for slot, count in sampled.items():
            self.running[slot].sampled += count
        done = [self.running[slot] for slot in ended]
        for sequence in done:
            self._finished += 1
            self._finished_tokens += sequence.sampled
            self._leave(sequence)
        return done

    def _make_room(self) -> list[Running]:
        """Pages for what runs, the oldest first; the youngest make way when there are none."""
        put_back: list[Running] = []
        for sequence in sorted(self.running.values(), key=lambda s: s.order):
            while sequence.slot >= 0 and self._missing(sequence) > self.pool.free:
                if self._uncache():
                    continue
                youngest = max(self.running.values(), key=lambda s: s.order)
                self._leave(youngest)
                heapq.heappush(self._waiting, (youngest.order, youngest))
                put_back.append(youngest)
                self.put_back_count += 1
            if sequence.slot >= 0:
                sequence.pages += self.pool.take(self._missing(sequence))
        return put_back

    def _next(self, prefill: list[tuple[Job, list[int]]]) -> Running | None:
        """The sequence that the next free slot takes, with its pages; None if none fits."""
        if self._waiting:
            sequence = self._waiting[0][1]
            while not self._give(sequence, []):
                if not self._uncache():
                    return None
            heapq.heappop(self._waiting)
            return sequence
        if not self._groups:
            job = self._longest_expected()
            if job is None:
                return None
            self._groups.append(_Group(job))
        group = self._groups[0]
        if group.pages is None:
            first_window = min(self.window, self.max_tokens)
            needed = self._pages_of(group.job.prompt_tokens + first_window)
            if needed + self._reserve() > self.pool.free:
                return None
            group.pages = self.pool.take(group.job.prompt_tokens // self.page_tokens)
            prefill.append((group.job, group.pages))
        sequence = Running(group.job, group.next_sample)
        if not self._give(sequence, group.pages):
            return None
        group.next_sample += 1
        if group.next_sample == group.job.samples:
            self.pool.release(group.pages)
            self._groups.popleft()
        return sequence

    def _longest_expected(self) -> Job | None:
        mean = self._finished_tokens / self._finished if self._finished else float("inf")
        if self._queue and (not self._unknown or -self._queue[0][0] >= mean):
            return heapq.heappop(self._queue)[2]
        return self._unknown.popleft() if self._unknown else None

    def _uncache(self) -> bool:
        """Gives up the pages of a prompt whose next sample has not started; False without one.

        Samples that run keep those that they share.
        """
        for group in self._groups:
            if group.pages:
                self.pool.release(group.pages)
                group.pages = None
                return True
        return False

    def _give(self, sequence: Running, shared: list[int]) -> bool:
        """Pages for the sequence's next window, the first of them shared; False if too few."""
        missing = self._needed(sequence) - len(shared)
        if missing + self._reserve() > self.pool.free:
            return False
        self.pool.share(shared)
        sequence.pages, sequence.shared = [*shared, *self.pool.take(missing)], len(shared)
        return True

    def _leave(self, sequence: Running) -> None:
        self.pool.release(sequence.pages)
        heapq.heappush(self._free_slots, sequence.slot)
        del self.running[sequence.slot]
        sequence.pages, sequence.shared, sequence.slot = [], 0, -1

    def _reserve(self) -> int:
        """Pages kept for what runs: else what enters now would soon be put back."""
        return len(self.running) * self._pages_of(HEADROOM * self.window)

    def _needed(self, sequence: Running) -> int:
        left = self.max_tokens - sequence.sampled
        return self._pages_of(sequence.cached_tokens + min(self.window, left))

    def _missing(self, sequence: Running) -> int:
        return max(0, self._needed(sequence) - len(sequence.pages))

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)
