"""Which records were there before: the same text but for its looks, or nearly the same.

Records are compared as wholes, prompt and trace, so that several traces of one prompt all stay.
Two are the same if their letters and their formulas are: the numbers and operators in their order.
They are nearly the same if enough of their n-grams of letters are (the Jaccard index, estimated
from min-hashes) and their formulas, now with single letters, are the same too: "x + 3" is no copy
of "x - 3", nor a problem of the same problem with other numbers.

A record costs some 400 bytes, whatever its length: a dictionary's entry for its letters, 128 bytes
of min-hashes, and as much or twice as much in the tables that find candidates. A new record is
compared with those that agree with it in one of 16 bands of 8 min-hashes: 0.947 of pairs whose
index is 0.8 meet in one, 0.9999 of those with 0.9.

Source: one permutation hashing with rotation (Shrivastava and Li, arXiv:1406.4784).
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import numpy as np

from vibejax.curate.letters import Batch, plain

GRAM_LETTERS = 24
BINS = 128
BANDS = 16
MIN_LETTERS = 64  # shorter texts have too few n-grams to be nearly the same
_FIRST_BITS = 12

_WORDS = re.compile(r"[^\W\d_]{2,}(?:[-'\u2019][^\W\d_]+)*")
_ASCII_WORDS = re.compile(r"[a-z]{2,}(?:[-'][a-z]+)*")
_RELATION = re.compile(r"\\([lgn])eq?(?![a-z])")
_SIGN = re.compile(
    r"\d+(?:\.\d+)?|(?<=[\w)])!|[-+*/^=<>|%\u00b1\u00b7\u00d7\u00f7\u2190-\u22ff~]|(?<!['\u2019])[^\W\d_a]"
)
_PAUSES = str.maketrans(dict.fromkeys(',;:?"$', " "))
_LETTERS = dict.fromkeys(range(ord("a"), ord("z") + 1))
_MIX = np.uint64(0xD6E8FEB86659FD93)
_BAND_MIX = np.random.default_rng(1).integers(0, 2**64, BANDS, np.uint64) | np.uint64(1)


def formula(text: str) -> str:
    """The numbers, operators and single letters of a text, in their order."""
    text = plain(text)
    if "\\" in text:
        text = _RELATION.sub(r" ~\1 ", text)
    # Without its words first, plain ones by `str`: patterns cost ten times as much a letter.
    tokens = [t for t in text.translate(_PAUSES).split() if len(t) == 1 or not t.isalpha()]
    words = _ASCII_WORDS if text.isascii() else _WORDS
    return " ".join(_SIGN.findall(words.sub("", " ".join(tokens))))


def exact_key(run: bytes, signs: str) -> int:
    """64 bits that two records share if their letters, numbers and operators are the same.

    Args:
        run: the letters of prompt and trace.
        signs: their `formula`, whose letters are not used: "x y" is "xy".
    """
    return _digest(run, " ".join(signs.translate(_LETTERS).split()))


def near_key(signs: str) -> int:
    """64 bits that nearly the same records share: of their `formula`."""
    return _digest(signs)


def _digest(*parts: str | bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "little")


def min_hashes(batch: Batch) -> np.ndarray:
    """[R, 128] uint8, the low bits of the min-hashes of each record's n-grams.

    One hash function serves all: its top bits say which of 128 bins an n-gram is of, and a bin
    without any takes the next one's.
    """
    hashes, record = batch.grams_within(GRAM_LETTERS)
    mixed = (hashes ^ (hashes >> np.uint64(29))) * _MIX
    bins = (mixed >> np.uint64(57)).astype(np.int64)
    none = np.iinfo(np.uint32).max
    smallest_RB = np.full((len(batch.size_S) // 2, BINS), none, np.uint32)
    value = ((mixed >> np.uint64(25)) & np.uint64(none)).astype(np.uint32)
    np.minimum.at(smallest_RB.reshape(-1), record * BINS + bins, value)
    place_2B = np.arange(2 * BINS)
    filled_R2B = np.where(np.tile(smallest_RB, (1, 2)) < none, place_2B[None], 2 * BINS - 1)
    next_R2B = np.minimum.accumulate(filled_R2B[:, ::-1], axis=1)[:, ::-1]
    next_RB = next_R2B[:, :BINS]
    borrowed = np.take_along_axis(smallest_RB, next_RB % BINS, axis=1)
    away_RB = (next_RB - place_2B[None, :BINS]).astype(np.uint32)
    return (borrowed + away_RB * np.uint32(0x9E3779B1) >> np.uint32(8)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Earlier:
    """The record that a duplicate was there before as.

    Attributes:
        number: counted over all records that were read.
        share: of n-grams that are the same; None where letters and formulas are.
    """

    number: int
    share: float | None


class Seen:
    """The records that were kept so far, as hashes."""

    def __init__(self, *, exact: bool, near: float):
        """Remembers nothing yet.

        Args:
            exact: whether records with the same letters and formulas are duplicates.
            near: smallest share of n-grams by which two records are nearly the same; 0 switches
                the comparison off.
        """
        self._exact, self._near = exact, near
        self._number_of: dict[int, int] = {}
        self._count = 0
        self._min_hashes = np.empty((1 << _FIRST_BITS, BINS), np.uint8)
        self._near_keys = np.empty(1 << _FIRST_BITS, np.uint64)
        self._numbers = np.empty(1 << _FIRST_BITS, np.int64)
        self._make_tables(_FIRST_BITS + 1)

    def take(
        self,
        numbers: Sequence[int],
        exact_keys: Sequence[int],
        near_keys: Sequence[int | None],
        hashes_RB: np.ndarray | None,
    ) -> list[Earlier | None]:
        """Compares some records with all before and each other, and remembers the new ones.

        Args:
            numbers: of the records, ascending.
            exact_keys: see `exact_key`.
            near_keys: see `near_key`; None for a text too short to be compared.
            hashes_RB: [R, 128] uint8, see `min_hashes`; None without near duplicates.

        Returns:
            For each record the one that it repeats, None for a new one.
        """
        begin = self._count
        near = self._near > 0 and hashes_RB is not None and len(numbers) > 0
        candidates = self._candidates(near_keys, hashes_RB) if near else {}
        found: list[Earlier | None] = []
        for i, number in enumerate(numbers):
            earlier = self._number_of.get(exact_keys[i]) if self._exact else None
            if earlier is not None:
                found.append(Earlier(earlier, None))
                continue
            near_key = near_keys[i]
            if near and near_key is not None:
                added = begin + np.flatnonzero(
                    self._near_keys[begin : self._count] == np.uint64(near_key)
                )
                at = np.concatenate([candidates[i], added]) if i in candidates else added
                nearest = self._nearest(at, hashes_RB[i]) if len(at) else None
                if nearest is not None:
                    found.append(nearest)
                    continue
                self._append(near_key, hashes_RB[i], number)
            if self._exact:
                self._number_of[exact_keys[i]] = number
            found.append(None)
        self._enter(begin, self._count)
        return found

    def _candidates(
        self, near_keys: Sequence[int | None], hashes_RB: np.ndarray
    ) -> dict[int, np.ndarray]:
        """For the records that have any: those before with the same key in one of their slots."""
        at = self._tables[np.arange(BANDS)[None], self._slots(hashes_RB)]
        keys = np.array([key or 0 for key in near_keys], np.uint64)
        same = (at >= 0) & (self._near_keys[at] == keys[:, None])
        return {int(i): np.unique(at[i][same[i]]) for i in np.flatnonzero(same.any(axis=1))}

    def _nearest(self, at: np.ndarray, hashes_B: np.ndarray) -> Earlier | None:
        # Of two bins of different texts, one in 256 agrees by chance.
        agree = np.count_nonzero(self._min_hashes[at] == hashes_B, axis=1) / BINS
        best = int(agree.argmax())
        if agree[best] < self._near:
            return None
        return Earlier(int(self._numbers[at[best]]), float(agree[best]))

    def _append(self, near_key: int, hashes_B: np.ndarray, number: int) -> None:
        if self._count == len(self._numbers):
            for name in ("_min_hashes", "_near_keys", "_numbers"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.empty_like(old)]))
            self._make_tables(self._bits + 1)
        self._min_hashes[self._count] = hashes_B
        self._near_keys[self._count] = near_key
        self._numbers[self._count] = number
        self._count += 1

    def _make_tables(self, bits: int) -> None:
        """Tables of twice as many slots as there is room for records."""
        self._bits = bits
        self._tables = np.full((BANDS, 1 << bits), -1, np.int32)
        step = 4096
        for begin in range(0, self._count, step):
            self._enter(begin, min(begin + step, self._count))

    def _enter(self, begin: int, end: int) -> None:
        """Puts records into one slot a band; a later one takes it over, and 15 bands are left."""
        slots = self._slots(self._min_hashes[begin:end])
        self._tables[np.arange(BANDS)[None], slots] = np.arange(begin, end)[:, None]

    def _slots(self, hashes_RB: np.ndarray) -> np.ndarray:
        bands = np.ascontiguousarray(hashes_RB).view(np.uint64)
        mixed = (bands ^ (bands >> np.uint64(31))) * _BAND_MIX[None]
        return (mixed >> np.uint64(64 - self._bits)).astype(np.int64)
