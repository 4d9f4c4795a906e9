"""What the host hands to the device: rows of a window, chunks of prompts, as arrays of few shapes.

Several devices: an array has a part for each, one after another, and page numbers are the
device's own.

Shape suffixes: as in decode.py.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from vibejax.decode import Rows
from vibejax.scheduler import Fill, Plan, Running

SHRINK = 4  # from one compiled number of rows to the next smaller
LEAST_ROWS = 8  # of a device: fewer take as long, and one alone rounds otherwise on a CPU
LEAST_COPY = 128  # tokens of a row that a window copies; shorter ones are as good as these
LEAST_CHUNK = 16  # tokens; shorter chunks are padded
LOOP_PERIOD = 64  # longest distance at which a loop is looked for


@dataclasses.dataclass
class Draft:
    """A completion so far, with room for all of it.

    Attributes:
        prompt: its identity, for the random draws.
        sample: which of the prompt's completions, for the same.
        prompt_tokens: [T] int32.
        tokens: [max_tokens] int32.
        logprobs: [max_tokens] float32.
        count: how many there are.
    """

    prompt: int
    sample: int
    prompt_tokens: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    count: int = 0

    def extend(self, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Adds tokens."""
        after = self.count + len(tokens)
        self.tokens[self.count : after], self.logprobs[self.count : after] = tokens, logprobs
        self.count = after

    def last(self) -> int:
        """The token that the next step takes in."""
        return self.tokens[self.count - 1] if self.count else self.prompt_tokens[-1]


def sizes(most: int, least: int = 1) -> list[int]:
    """The numbers of rows that programs are compiled for, the largest first."""
    found = [max(most, least)]
    while found[-1] > least:
        found.append(max(least, -(-found[-1] // SHRINK)))
    return found


def doublings(most: int, least: int) -> list[int]:
    """The lengths of tables that programs are compiled for, the shortest first."""
    found = [min(least, most)]
    while found[-1] < most:
        found.append(min(most, 2 * found[-1]))
    return found


def fitting(found: Sequence[int], count: int) -> int:
    """The smallest of `sizes` that holds `count` rows."""
    return min(size for size in found if size >= count)


def group_of(rows: int) -> int:
    """How many adjacent rows may share the reading of pages."""
    return next(group for group in (8, 4, 2, 1) if rows % group == 0)


class Tables:
    """The pages of what is in each slot; a row is written where a sequence enters or grows."""

    def __init__(self, parts: int, slots: int, entries: int):
        """Of `entries` pages each."""
        self.page_PSM = np.zeros((parts, slots, entries), np.int32)
        self._written_PS = np.zeros((parts, slots), int)

    def write(self, plans: Sequence[Plan]) -> None:
        """Takes in the pages of a plan."""
        for part, plan in enumerate(plans):
            for sequence in plan.started:
                self._written_PS[part, sequence.slot] = 0
            for slot, sequence in plan.running.items():
                written, total = self._written_PS[part, slot], len(sequence.pages)
                if written < total:
                    self.page_PSM[part, slot, written:total] = sequence.pages[written:]
                    self._written_PS[part, slot] = total


class Places:
    """Which sequence decodes in which row of each device.

    Samples of a prompt lie side by side, so that the pages which they share are read once. With
    copies (`kernels.row_copies`) a sequence rather keeps its row: its copy is there.

    Attributes:
        sequences: by device and row; None: an idle row.
        count: rows of each device.
        fresh: rows that hold a sequence which they did not hold before.
    """

    def __init__(self, parts: int, slots: int, keeps: bool):
        """No rows yet.

        Args:
            parts: devices.
            slots: of each.
            keeps: whether sequences keep their rows.
        """
        self.sequences: list[list[Running | None]] = [[] for _ in range(parts)]
        self.fresh: list[list[bool]] = [[] for _ in range(parts)]
        self.count = 0
        self._sizes, self._keeps = sizes(slots, LEAST_ROWS), keeps

    def assign(self, plans: Sequence[Plan]) -> bool:
        """Gives each sequence that can decode a row; False where there is none."""
        ready = [[s for s in plan.running.values() if s.ready] for plan in plans]
        if not any(ready):
            return False
        count = fitting(self._sizes, max(map(len, ready)))
        before = self.sequences if count == self.count else [[None] * count for _ in plans]
        place = self._keep if self._keeps else self._sort
        self.count = count
        self.sequences = [place(*part) for part in zip(ready, before, strict=True)]
        self.fresh = [
            [s is not None and s is not o for s, o in zip(now, old, strict=True)]
            for now, old in zip(self.sequences, before, strict=True)
        ]
        return True

    def forget(self) -> None:
        """Every row is fresh."""
        self.fresh = [[s is not None for s in part] for part in self.sequences]

    def _keep(self, ready: list[Running], before: list[Running | None]) -> list[Running | None]:
        stay = set(ready)
        now = [s if s in stay else None for s in before]
        placed = set(now)
        new = iter([s for s in ready if s not in placed])
        return [s or next(new, None) for s in now]

    def _sort(self, ready: list[Running], before: list[Running | None]) -> list[Running | None]:
        order = sorted(ready, key=lambda s: (s.job.id, s.sample))
        return [*order, *[None] * (len(before) - len(order))]

    def longest(self) -> int:
        """Cached tokens of the sequence that has most."""
        return max(s.cached_tokens for part in self.sequences for s in part if s)


def make_rows(
    places: Places, drafts: dict[Running, Draft], table_PSM: np.ndarray, entries: int
) -> Rows:
    """The arrays of a window.

    Args:
        places: what decodes in which row.
        drafts: of each sequence.
        table_PSM: [devices, slots, pages] int32 pages by slot.
        entries: M, of the rows' tables.
    """
    parts, rows, group = len(places.sequences), places.count, group_of(places.count)
    integer = np.zeros((4, parts, rows), np.int32)
    identity = np.zeros((2, parts, rows), np.uint32)
    table_PBM = np.zeros((parts, rows, entries), np.int32)
    shared_PG = np.zeros((parts, rows // group), np.int32)
    for part, sequences in enumerate(places.sequences):
        live = [row for row, s in enumerate(sequences) if s]
        chosen = [sequences[row] for row in live]
        found = [drafts[s] for s in chosen]
        table_PBM[part, live] = table_PSM[part, [s.slot for s in chosen], :entries]
        integer[0, part, live] = [d.last() for d in found]
        integer[1, part, live] = [s.cached_tokens for s in chosen]
        integer[2, part, live] = [d.count for d in found]
        integer[3, part, live] = [len(d.tokens) - d.count for d in found]
        identity[0, part, live] = [d.prompt for d in found]
        identity[1, part, live] = [d.sample for d in found]
        for g in range(rows // group):
            of_group = [s for s in sequences[g * group : (g + 1) * group] if s]
            shared_PG[part, g] = _shared(of_group) if of_group else 0
    return Rows(
        *integer.reshape(4, -1),
        *identity.reshape(2, -1),
        table_PBM.reshape(parts * rows, entries),
        shared_PG.reshape(-1),
        np.array(places.fresh).reshape(-1),
    )


def _shared(sequences: Sequence[Running]) -> int:
    """Leading pages that sequences have in common."""
    first = sequences[0]
    common = min(s.shared for s in sequences)
    alike = all(s.pages[:common] == first.pages[:common] for s in sequences[1:])
    return common if alike else 0


@dataclasses.dataclass(frozen=True)
class Chunks:
    """One call of `decode.fill`.

    Attributes:
        fills: whose chunks.
        counts: tokens of each.
        token_BT, first_B, count_B, table_BM: what it takes.
    """

    fills: list[Fill]
    counts: list[int]
    token_BT: np.ndarray
    first_B: np.ndarray
    count_B: np.ndarray
    table_BM: np.ndarray


def chunks(plans: Sequence[Plan], tokens_of, chunk_tokens: int, entries: int) -> Iterator[Chunks]:
    """The next chunk of everything that is to be filled, as calls.

    Args:
        plans: of each device.
        tokens_of: the tokens of a fill, int32.
        chunk_tokens: most of one sequence, and of one device in one call.
        entries: M, of the tables.
    """
    waiting: dict[int, list[list[Fill]]] = {}
    for part, plan in enumerate(plans):
        for fill in plan.fills:
            columns = LEAST_CHUNK
            while columns < min(chunk_tokens, fill.tokens - fill.done):
                columns *= 2
            waiting.setdefault(columns, [[] for _ in plans])[part].append(fill)
    for columns, parts in sorted(waiting.items()):
        most = max(1, chunk_tokens // columns)
        for start in range(0, max(map(len, parts)), most):
            now = [part[start : start + most] for part in parts]
            rows = fitting(sizes(most), max(map(len, now)))
            yield _call(now, rows, columns, tokens_of, chunk_tokens, entries)


def _call(now, rows, columns, tokens_of, chunk_tokens, entries) -> Chunks:
    parts = len(now)
    token_PBT = np.zeros((parts, rows, columns), np.int32)
    first_PB, count_PB = np.zeros((2, parts, rows), np.int32)
    table_PBM = np.zeros((parts, rows, entries), np.int32)
    fills, counts = [], []
    for part, of_part in enumerate(now):
        for row, fill in enumerate(of_part):
            count = min(chunk_tokens, fill.tokens - fill.done)
            token_PBT[part, row, columns - count :] = tokens_of(fill)[fill.done :][:count]
            first_PB[part, row], count_PB[part, row] = fill.done, count
            table_PBM[part, row, : len(fill.pages)] = fill.pages
            fills.append(fill)
            counts.append(count)
    flat = (
        x.reshape(parts * rows, *x.shape[2:]) for x in (token_PBT, first_PB, count_PB, table_PBM)
    )
    return Chunks(fills, counts, *flat)


def loop_end(tokens: np.ndarray, new: int, loop_tokens: int) -> int | None:
    """How many tokens of a completion there are when it first ends in a loop.

    Args:
        tokens: [C] int32, of which the last `new` have not been looked at before.
        new: how many.
        loop_tokens: a loop has that many tokens that stand already a fixed distance before.

    Returns:
        At least C - new + 1, or None.
    """
    begin = max(0, len(tokens) - new - loop_tokens + 1)  # the first that can count
    ends = []
    for period in _periods(tokens, new, loop_tokens):
        start = max(begin, period)
        same = tokens[start:] == tokens[start - period : len(tokens) - period]
        if same.sum() < loop_tokens:
            continue
        broken = np.flatnonzero(~same)
        edges = np.concatenate([[-1], broken, [len(same)]])
        runs = np.flatnonzero(np.diff(edges) - 1 >= loop_tokens)
        if runs.size:
            ends.append(start + edges[runs[0]] + 1 + loop_tokens)
    return int(min(ends)) if ends else None


def _periods(tokens: np.ndarray, new: int, loop_tokens: int) -> Iterable[int]:
    """The periods that a loop which ends among the `new` tokens can have: mostly none.

    Such a loop has all tokens from C - loop_tokens to C - new; the last few of them are looked at.
    """
    longest, end = min(LOOP_PERIOD, len(tokens) - 1), len(tokens) - new + 1
    begin = max(end - 8, len(tokens) - loop_tokens)
    if begin >= end or begin <= longest:
        return range(1, longest + 1)
    before = np.lib.stride_tricks.sliding_window_view(
        tokens[begin - longest : end - 1], end - begin
    )
    same = (before == tokens[begin:end]).all(axis=1)
    return longest - np.flatnonzero(same)
