"""Traces that say the same thing over and over, and those made of what all other traces say.

Within a trace: the share of its n-grams of 48 letters (some ten words) that stood in it before, and
how often the most frequent one stands there. A model that has fallen into a loop is caught by the
first where the loop fills the trace, by the second where it only ends it.

Between traces: a line or sentence of at least 40 letters, digits masked, that stood in many
records before is a template. A trace that consists of templates teaches the template.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np

from vibejax.curate.letters import Batch

GRAM_LETTERS = 48
MIN_LINE_LETTERS = 40
_SLOT_BITS = 24  # of the table of lines: 32 MiB, 16 million lines
_LETTERS_AND_ENDS = bytes(range(48)).translate(None, b"\n!.") + b":;<=>@[\\]^_`{|}~\x7f"
_MASKED = bytes.maketrans(b"0123456789", b"0" * 10)
_LINE_END = re.compile(rb"[\n!.?]")


def repeated(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """How much the traces of a batch repeat themselves.

    Returns:
        [R] float, the share of a trace's n-grams that stood before in it, and [R] int, how often
        its most frequent n-gram stands in it; both 0 where there is none.
    """
    count = len(batch.size_S) // 2
    share_R, most_R = np.zeros(count), np.zeros(count, np.int64)
    hashes, record = batch.grams_within(GRAM_LETTERS, traces_only=True)
    if not len(hashes):
        return share_R, most_R
    bits = np.uint64(64 - max(count - 1, 1).bit_length())
    # The record in the top bits: one sort puts equal n-grams of each record side by side.
    keys = np.sort((record.astype(np.uint64) << bits) | (hashes >> (np.uint64(64) - bits)))
    begin = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    times = np.diff(np.append(begin, len(keys)))
    owner = (keys[begin] >> bits).astype(np.int64)
    total_R = np.bincount(owner, times, count)
    distinct_R = np.bincount(owner, minlength=count)
    np.divide(total_R - distinct_R, total_R, out=share_R, where=total_R > 0)
    np.maximum.at(most_R, owner, times)
    return share_R, most_R


def line_hashes(trace: str) -> tuple[list[int], list[int], int]:
    """The lines and sentences of a trace that are long enough to be templates.

    Returns:
        A hash of 32 bits for each different one, the letters of each, counted as often as it
        stands there, and the letters of the whole trace.
    """
    run = trace.encode("utf-8", "replace").lower().translate(_MASKED, _LETTERS_AND_ENDS)
    lines = _LINE_END.split(run)
    sizes: dict[int, int] = {}
    for line in lines:
        if len(line) >= MIN_LINE_LETTERS:
            key = zlib.crc32(line)
            sizes[key] = sizes.get(key, 0) + len(line)
    return list(sizes), list(sizes.values()), sum(map(len, lines))


class Templates:
    """In how many records each line stood so far."""

    def __init__(self, max_records: int):
        """Has seen no line yet.

        Args:
            max_records: records in which a line may stand before it is a template.
        """
        self._max_records = max_records
        self._count = np.zeros(1 << _SLOT_BITS, np.uint32)

    def share(self, lines: Sequence[int], sizes: Sequence[int], total: int) -> float:
        """Counts the lines of a record, and says which share of its trace is templates."""
        if not lines:
            return 0.0
        slots = np.asarray(lines, np.int64) & ((1 << _SLOT_BITS) - 1)
        before = self._count[slots]
        self._count[slots] += 1  # its lines are all different
        return float(np.asarray(sizes)[before >= self._max_records].sum() / total)
