"""Which completion decodes in which slot, over which pages: the host's side of rollouts.

Pure bookkeeping, no arrays of the device: a window of decode steps is planned before it runs and
accounted for after. No clock plays a part, so the same requests and lengths give the same plans.

A sequence has all its tokens but the last in the cache: the next step takes that one in and draws
the token after it. So whatever is to decode, a prompt or a completion that was interrupted, its
tokens but one are first computed into pages (`Fill`), and decoding goes on from the last.

A prompt of several samples is filled once. Pages that its tokens fill whole are shared, with a
count of their users; what is left over lies in a page that each sample copies for itself. From
there on a sequence holds the pages that it needs for the window to come and no more. When the pool
runs dry, the youngest sequence is put back: its pages go, its sampled tokens stay, and it goes on
later from there.

A free slot takes, in this order: a sequence that was put back; the next sample of a prompt that is
already cached; the prompt whose completions are expected to be longest (`job_queue`).
"""

import dataclasses
import heapq
from collections.abc import Iterable

from vibejax.job_queue import Job, Queue
from vibejax.page_pool import PagePool

HEADROOM = 4  # windows that all that runs can go on for, when another sequence enters


@dataclasses.dataclass(eq=False)
class Fill:
    """Keys and values to be computed into pages, by whoever runs the model.

    Attributes:
        job: whose prompt.
        sample: after the prompt come this sample's tokens; None: the prompt alone.
        tokens: how many, from the prompt's first.
        pages: where, in order.
        done: how many are there, set by whoever computes them.
    """

    job: Job
    sample: int | None
    tokens: int
    pages: list[int]
    done: int = 0

    @property
    def complete(self) -> bool:
        """Whether all are there."""
        return self.done == self.tokens


@dataclasses.dataclass(eq=False)
class Running:
    """One sequence: a sample of a job.

    Attributes:
        job: what it completes.
        sample: which of the prompt's completions.
        sampled: tokens drawn so far, kept while it is put back.
        pages: its pages, the prompt's shared ones first; empty while put back.
        shared: how many of them are the prompt's.
        fill: what has to be computed before it can decode.
        copies: the page behind the shared ones is to be copied from this one; None: nothing is.
        order: rises with every admission: the youngest has the largest.
        slot: where it decodes.
    """

    job: Job
    sample: int
    sampled: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    shared: int = 0
    fill: Fill | None = None
    copies: int | None = None
    order: int = -1
    slot: int = -1

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are cached before the next step: all but the last."""
        return self.job.prompt_tokens + self.sampled - 1

    @property
    def ready(self) -> bool:
        """Whether it can decode, once what it copies is copied."""
        return self.fill is None or self.fill.complete


@dataclasses.dataclass
class _Group:
    """A job of which samples are still to start.

    Attributes:
        job: whose samples.
        started: how many have started.
        fill: of the prompt; None: not in the cache.
    """

    job: Job
    started: int = 0
    fill: Fill | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What happens before and in the window to come.

    Attributes:
        fills: what is to be computed, oldest first; a part of it will do.
        started: sequences that enter a slot, new or put back before.
        put_back: sequences that lost their slot and pages.
        running: all in slots, by slot; those decode that are ready once the fills went on.
    """

    fills: list[Fill]
    started: list[Running]
    put_back: list[Running]
    running: dict[int, Running]


class Scheduler:
    """Slots and pages of one device."""

    def __init__(self, queue: Queue, slots: int, pages: int, page_tokens: int, window: int):
        """Sizes.

        Args:
            queue: where jobs come from.
            slots: sequences that decode at one time.
            pages: of the pool.
            page_tokens: tokens of a page.
            window: decode steps of one window.
        """
        self.queue, self.slots, self.window = queue, slots, window
        self.page_tokens = page_tokens
        self.pool = PagePool(pages)
        self.running: dict[int, Running] = {}
        self.put_back_count = 0
        self._free_slots = list(range(slots))  # a heap: the lowest first
        self._waiting: list[tuple[int, Running]] = []  # put back, the oldest first
        self._group: _Group | None = None  # begun, with samples still to start
        self._fills: list[Fill] = []
        self._closing: list[Fill] = []  # of groups whose samples have all started
        self._admitted = 0
        # Pages kept for what runs: else what enters now would soon be put back.
        self._reserve = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do here."""
        return not (self.outstanding or self._closing or self.queue)

    @property
    def outstanding(self) -> int:
        """Completions of jobs begun here that are not there yet."""
        to_start = self._group.job.samples - self._group.started if self._group else 0
        return len(self.running) + len(self._waiting) + to_start

    def plan(self, most: int | None = None) -> Plan:
        """Fills free slots and gives every running sequence its pages for the window.

        Args:
            most: no job begins while so many sequences run here; None: as many as there are slots.
                The samples of one that has begun are nobody else's.
        """
        self._close()
        put_back = self._make_room()
        self._reserve = sum(self._missing(s, HEADROOM) for s in self.running.values())
        started: list[Running] = []
        while self._free_slots:
            sequence = self._next(may_begin=most is None or len(self.running) < most)
            if sequence is None:
                break
            sequence.slot = heapq.heappop(self._free_slots)
            sequence.order = self._admitted
            self._admitted += 1
            self.running[sequence.slot] = sequence
            self._reserve += self._missing(sequence, HEADROOM)
            started.append(sequence)
        running = dict(sorted(self.running.items()))
        return Plan([f for f in self._fills if not f.complete], started, put_back, running)

    def copied(self, sequence: Running) -> None:
        """The page that a sequence was to copy is copied."""
        self.pool.release([sequence.copies])
        sequence.copies = None

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
            self.queue.learn(sequence.sampled)
            self._leave(sequence)
        self._close()
        return done

    def _close(self) -> None:
        """Lets go of prompts that are filled and whose samples have all started."""
        self._fills = [fill for fill in self._fills if not fill.complete]
        for fill in self._closing:
            if fill.complete:
                self.pool.release(fill.pages)
        self._closing = [fill for fill in self._closing if not fill.complete]

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

    def _next(self, may_begin: bool) -> Running | None:
        """The sequence that the next free slot takes, with its pages; None if none fits."""
        if self._waiting:
            sequence = self._waiting[0][1]
            while not self._give(sequence, None):
                if not self._uncache():
                    return None
            heapq.heappop(self._waiting)
            return sequence
        if self._group is None:
            job = self.queue.longest_expected() if may_begin else None
            if job is None:
                return None
            self._group = _Group(job)
        group = self._group
        if group.fill is None and group.job.samples - group.started > 1:
            first_window = min(self.window, group.job.max_tokens)
            needed = self._pages_of(group.job.prompt_tokens + first_window) + 1
            if needed + self._reserve <= self.pool.free:
                tokens = group.job.prompt_tokens - 1
                pages = self.pool.take(self._pages_of(tokens))
                group.fill = Fill(group.job, None, tokens, pages)
                self._fills.append(group.fill)
            elif self.running:
                return None
        sequence = Running(group.job, group.job.first_sample + group.started)
        if not self._give(sequence, group.fill):
            return None
        group.started += 1
        if group.started == group.job.samples:
            if group.fill is not None:
                self._closing.append(group.fill)
            self._group = None
        return sequence

    def _uncache(self) -> bool:
        """Gives up the pages of a prompt whose next sample has not started; False without one.

        Samples that run keep those that they share.
        """
        group = self._group
        if group is None or group.fill is None or not group.fill.complete:
            return False
        self.pool.release(group.fill.pages)
        group.fill = None
        return True

    def _give(self, sequence: Running, prompt: Fill | None) -> bool:
        """Pages for the sequence's next window, the prompt's among them; False if too few."""
        shared = prompt.pages[: prompt.tokens // self.page_tokens] if prompt else []
        missing = self._needed(sequence) - len(shared)
        if missing + self._reserve > self.pool.free:
            return False
        self.pool.share(shared)
        sequence.pages, sequence.shared = [*shared, *self.pool.take(missing)], len(shared)
        if prompt:
            sequence.fill = prompt
            if prompt.tokens % self.page_tokens:
                sequence.copies = prompt.pages[-1]
                self.pool.share([sequence.copies])
        elif sequence.cached_tokens:
            job, sample = sequence.job, sequence.sample
            sequence.fill = Fill(job, sample, sequence.cached_tokens, list(sequence.pages))
            self._fills.append(sequence.fill)
        return True

    def _leave(self, sequence: Running) -> None:
        self.pool.release(sequence.pages)
        if sequence.copies is not None:
            self.copied(sequence)
        if not sequence.ready and sequence.fill.sample is not None:
            self._fills.remove(sequence.fill)
        heapq.heappush(self._free_slots, sequence.slot)
        del self.running[sequence.slot]
        sequence.pages, sequence.shared, sequence.fill, sequence.slot = [], 0, None, -1

    def _needed(self, sequence: Running, windows: int = 1) -> int:
        left = sequence.job.max_tokens - sequence.sampled
        return self._pages_of(sequence.cached_tokens + min(windows * self.window, left))

    def _missing(self, sequence: Running, windows: int = 1) -> int:
        return max(0, self._needed(sequence, windows) - len(sequence.pages))

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)
