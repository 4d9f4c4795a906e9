"""Which records repeat items of evaluation sets: n-grams of words, found whatever their spacing.

An item's n-grams are its stretches of n words (more, where n words have fewer than 24 letters, as
formulas do). One is found wherever a record has the same letters and digits in the same order.
A record repeats an item when the n-grams that it shares with it cover `share` of the item's words,
at least n, and in any case when they cover 4 n. A single n-gram is not enough: "where m and n are
relatively prime positive integers, find m + n" ends hundreds of competition problems.

What an evaluation set itself shows to be no item's own does not count: an instruction that most
items begin or end with is cut off, and n-grams of two different problems are passed over. Items
that share half of their n-grams are one problem, named once for each set it stands in.

An item of less than 2 n words has n-grams of half its length, so that a change in its middle
does not hide it. One of less than n words or 24 letters must stand in the prompt as a whole and be
half of it, since short questions are parts of longer ones; below 8 letters none is looked for.

Source: VibeThinker-1.5B (arXiv:2511.06221), decontamination: 10-grams of normalised text.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vibejax.curate.letters import Batch, join_words, text_hash, words

ANCHOR_LETTERS = 24  # of an n-gram, looked up at every letter of a record before the rest
SHORT_ANCHOR_LETTERS = 8
SHORTEST_GRAM = 5  # words
ENOUGH_GRAMS = 4  # of n words
INSTRUCTION_SHARE = 0.5  # of the items of a set that begin or end alike
INSTRUCTION_ITEMS = 3  # below that many, two problems on one thing would pass for it
SAME_PROBLEM_SHARE = 0.5  # of the n-grams of the smaller item
FILTER_BITS = 6  # bits a looked-up anchor: of others, one in 64 is looked up too
MAX_EVIDENCE_CHARS = 240


@dataclasses.dataclass
class Item:
    """One item of an evaluation set, without the set's instruction.

    Attributes:
        names: "SET:NUMBER" of each set it stands in.
        words: what is left of its words.
        starts: [W + 1] int, the first letter of each word, then the count of letters.
        short: it is looked for as a whole.
        needed: words that a record must share with it.
    """

    names: list[str]
    words: list[str]
    starts: np.ndarray
    short: bool = False
    needed: int = 0


@dataclasses.dataclass(frozen=True)
class Grams:
    """The n-grams that are looked up by the hash of their first `anchor` letters.

    Attributes:
        anchor: letters.
        anchors: sorted hashes.
        first: of each anchor the first of its n-grams, then the count of n-grams.
        hash, letters: of each n-gram, ordered by anchor.
        item, begin, end: the item it is from, and the words it is of.
        filter: for the top bits of a hash, whether an anchor has them.
        shift: what leaves those bits.
    """

    anchor: int
    anchors: np.ndarray
    first: np.ndarray
    hash: np.ndarray
    letters: np.ndarray
    item: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    filter: np.ndarray
    shift: np.uint64


@dataclasses.dataclass(frozen=True)
class Index:
    """All items of all sets, ready to be looked for.

    Attributes:
        items: each problem once.
        grams: long and short ones.
        instructions: set -> the words that most of its items begin and end with.
        too_short: names of items that are not looked for.
    """

    items: list[Item]
    grams: list[Grams]
    instructions: dict[str, list[str]]
    too_short: list[str]


def build(sets: dict[str, Sequence[str]], *, n: int, share: float) -> Index:
    """The index of evaluation sets.

    Args:
        sets: name -> texts of the items.
        n: words of an n-gram.
        share: of an item's words that a record must share with it.
    """
    items, instructions, too_short = [], {}, []
    for name, texts in sets.items():
        item_words = [words(text) for text in texts]
        instructions[name] = [" ".join(part) for part in _instruction(item_words) if part]
        for number, own in enumerate(_cut(item_words), start=1):
            run, starts = join_words(own)
            if len(run) < SHORT_ANCHOR_LETTERS:
                too_short.append(f"{name}:{number}")
                continue
            left = [run[a:b].decode() for a, b in itertools.pairwise(starts)]
            short = len(left) < n or len(run) < ANCHOR_LETTERS
            items.append(Item([f"{name}:{number}"], left, starts, short))
    grams = [_grams(item, n) for item in items]
    hashes = [
        [text_hash(_run(item, *span)) for span in own]
        for item, own in zip(items, grams, strict=True)
    ]
    first_of = _same_problems(hashes)
    kept = [i for i, first in enumerate(first_of) if i == first]
    for i, first in enumerate(first_of):
        if i != first:
            items[first].names += items[i].names
    problems_of = collections.Counter(h for i in kept for h in set(hashes[i]))
    rows: dict[int, list[tuple]] = {ANCHOR_LETTERS: [], SHORT_ANCHOR_LETTERS: []}
    for new, i in enumerate(kept):
        own = [
            (span, h) for span, h in zip(grams[i], hashes[i], strict=True) if problems_of[h] == 1
        ] or list(zip(grams[i], hashes[i], strict=True))  # an item of nothing but stock phrases
        item = items[i]
        covered = len({w for (begin, end), _ in own for w in range(begin, end)})
        item.needed = min(covered, max(n, math.ceil(min(share * covered, ENOUGH_GRAMS * n))))
        anchor = SHORT_ANCHOR_LETTERS if item.short else ANCHOR_LETTERS
        for (begin, end), h in own:
            run = _run(item, begin, end)
            rows[anchor].append((text_hash(run[:anchor]), h, len(run), new, begin, end))
    looked_up = [_look_up(anchor, found) for anchor, found in rows.items() if found]
    return Index([items[i] for i in kept], looked_up, instructions, too_short)


def _run(item: Item, begin: int, end: int) -> bytes:
    return "".join(item.words[begin:end]).encode()


def _instruction(item_words: Sequence[list[str]]) -> tuple[list[str], list[str]]:
    """What most items begin with, and what they end with."""
    if len(item_words) < INSTRUCTION_ITEMS:
        return [], []
    ends = []
    for step in (1, -1):
        shared: list[str] = []
        rest = [own[::step] for own in item_words]
        while True:
            counts = collections.Counter(
                own[len(shared)] for own in rest if own[: len(shared)] == shared != own
            )
            word, count = counts.most_common(1)[0] if counts else ("", 0)
            if count <= INSTRUCTION_SHARE * len(item_words):
                break
            shared.append(word)
        ends.append(shared[::step])
    return ends[0], ends[1]


def _cut(item_words: Sequence[list[str]]) -> list[list[str]]:
    """The items without their set's instruction; one that is nothing else keeps it."""
    before, after = _instruction(item_words)
    cut = []
    for own in item_words:
        begin = len(before) if own[: len(before)] == before else 0
        end = len(own) - (len(after) if after and own[-len(after) :] == after else 0)
        cut.append(own[begin:end] or own)
    return cut


def _grams(item: Item, n: int) -> list[tuple[int, int]]:
    """The n-grams of an item, as the words that each begins with and ends before."""
    count = len(item.words)
    if item.short:
        return [(0, count)]
    n = n if count >= 2 * n else max(SHORTEST_GRAM, math.ceil(count / 2))
    spans = []
    for begin in range(count - n + 1):
        long_enough = item.starts[begin] + ANCHOR_LETTERS
        end = max(begin + n, int(np.searchsorted(item.starts, long_enough)))
        if end <= count:
            spans.append((begin, end))
    return spans or [(0, count)]


def _same_problems(hashes: list[list[int]]) -> list[int]:
    """Of each item the first that is the same problem: itself, where there is none before."""
    holders: dict[int, list[int]] = collections.defaultdict(list)
    first_of = []
    for i, own in enumerate(hashes):
        shared = collections.Counter(j for h in set(own) for j in holders.get(h, ()))
        j, count = shared.most_common(1)[0] if shared else (i, 0)
        same = count and count >= SAME_PROBLEM_SHARE * min(len(set(own)), len(set(hashes[j])))
        first_of.append(j if same else i)
        if not same:
            for h in set(own):
                holders[h].append(i)
    return first_of


def _look_up(anchor: int, rows: list[tuple]) -> Grams:
    rows.sort()
    types = (np.uint64, np.uint64, np.int64, np.int64, np.int64, np.int64)
    column = [np.array(v, t) for v, t in zip(zip(*rows, strict=True), types, strict=True)]
    anchors, first = np.unique(column[0], return_index=True)
    bits = len(anchors).bit_length() + FILTER_BITS
    shift = np.uint64(64 - bits)
    passes = np.zeros(1 << bits, bool)
    passes[anchors >> shift] = True
    return Grams(anchor, anchors, np.append(first, len(rows)), *column[1:], passes, shift)


def find(index: Index, batch: Batch) -> dict[int, dict[str, Any]]:
    """The records of a batch that repeat an item.

    Returns:
        Record -> evidence: `item` ("SET:NUMBER", joined by "+" where it stands in several),
        `share` of its words, and the longest run of them, `text`. Of several items, the one
        with the largest share.
    """
    shared: dict[tuple[int, int], set[tuple[int, int]]] = collections.defaultdict(set)
    for grams in index.grams:
        at_X, gram_X = _places(grams, batch)
        segment_X = np.searchsorted(batch.start_S, at_X, side="right") - 1
        for segment, gram in zip(segment_X.tolist(), gram_X.tolist(), strict=True):
            i = int(grams.item[gram])
            if index.items[i].short and (
                segment % 2 or 2 * grams.letters[gram] < batch.size_S[segment]
            ):
                continue
            span = int(grams.begin[gram]), int(grams.end[gram])
            shared[segment // 2, i].add(span)
    best: dict[int, dict[str, Any]] = {}
    for (record, i), spans in shared.items():
        item = index.items[i]
        covered = sorted({w for begin, end in spans for w in range(begin, end)})
        if len(covered) < item.needed:
            continue
        found = round(len(covered) / len(item.words), 3)
        if record not in best or found > best[record]["share"]:
            text = _longest_run(item, covered)[:MAX_EVIDENCE_CHARS]
            best[record] = {"item": "+".join(item.names), "share": found, "text": text}
    return best


def _places(grams: Grams, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Where in a batch n-grams stand: their first letters, and which n-grams."""
    hashes = batch.gram_hashes(grams.anchor)
    at = np.flatnonzero(grams.filter[hashes >> grams.shift])
    row = np.minimum(np.searchsorted(grams.anchors, hashes[at]), len(grams.anchors) - 1)
    known = grams.anchors[row] == hashes[at]
    at, row = at[known], row[known]
    count = grams.first[row + 1] - grams.first[row]
    before = np.cumsum(count) - count
    gram = np.repeat(grams.first[row] - before, count) + np.arange(count.sum())
    at = np.repeat(at, count)
    fits = at + grams.letters[gram] <= len(batch.code_C)
    at, gram = at[fits], gram[fits]
    same = batch.hashes(at, grams.letters[gram]) == grams.hash[gram]
    return at[same], gram[same]


def _longest_run(item: Item, covered: list[int]) -> str:
    runs: list[list[int]] = []
    for word in covered:
        if runs and word == runs[-1][-1] + 1:
            runs[-1].append(word)
        else:
            runs.append([word])
    return " ".join(item.words[w] for w in max(runs, key=len))
