"""Texts as runs of letters and digits, and the hashes of all their n-grams at once.

Case, punctuation, spacing, and how LaTeX lays out what it says, all differ between copies of one
text. What is left of a text here is its letters and digits in their order, UTF-8 bytes without
anything between them, so that no such difference can hide a copy, and no n-gram depends on where
a text has its blanks.

A batch of texts is one array of bytes. The hash of any stretch of it is a difference of two prefix
sums of a polynomial in the bytes, modulo 2^64: all n-grams cost some array operations, no loop.

Shape suffixes: C bytes of a batch, S its segments (of each record the prompt, then the trace),
R its records, X any number of places.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

LAYOUT = (
    "dfrac", "frac", "left", "right", "dots", "cdot", "times", "sqrt", "overline", "triangle",
    "angle", "circ", "mathrm", "text",
)  # fmt: skip
"""Left out wherever they stand: LaTeX that other spellings of a formula write as a sign, or not."""

_SPELLED = str.maketrans(
    {
        letter: unicodedata.name(letter).rpartition(" ")[2].lower().replace("lamda", "lambda")
        for letter in "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
    }
    | {"\u2212": "-"}
)
_LOWER = bytes(range(256)).lower()
_ASCII_SIGNS = bytes(code for code in range(128) if not chr(code).isalnum())
_SIGNS = re.compile(r"[\W_]+")
_LAYOUT_BYTES = tuple(name.encode() for name in LAYOUT)
_CJK = "\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])[^\W\d_])+|\d+")

_BASE = 0x9E3779B97F4A7C15
_CODES = np.random.default_rng(0).integers(0, 2**64, 256, np.uint64)  # the same in all processes
SEPARATOR = b"\0"  # ends each segment; in no text, so that no n-gram of a text crosses it


def plain(text: str) -> str:
    """One spelling of each character: compatibility forms, lower case, names of Greek letters."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", text.translate(_SPELLED)).casefold()


def letters(text: str) -> bytes:
    """The letters and digits of a text, in lower case and UTF-8."""
    if not text.isascii():
        text = _SIGNS.sub("", plain(text))
    return text.encode().translate(_LOWER, _ASCII_SIGNS)


def without_layout(run: bytes) -> bytes:
    """Letters without the names of `LAYOUT`."""
    for name in _LAYOUT_BYTES:
        run = run.replace(name, b"")
    return run


def words(text: str) -> list[str]:
    """The words and numbers of a text; a character of a script without blanks is a word."""
    return _WORD.findall(plain(text))


def join_words(words: Sequence[str]) -> tuple[bytes, np.ndarray]:
    """`without_layout` of words, and where each word that is left of them begins.

    Returns:
        The letters, and [W + 1] int: the first letter of each word, then the count of letters.
    """
    run = "".join(words).encode()
    owner = np.repeat(np.arange(len(words)), [len(word.encode()) for word in words])
    for name in _LAYOUT_BYTES:
        kept = np.ones(len(run), bool)
        at = run.find(name)
        while at >= 0:
            kept[at : at + len(name)] = False
            at = run.find(name, at + len(name))
        run, owner = run.replace(name, b""), owner[kept]
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    return run, np.append(starts, len(run))


class Batch:
    """The letters of a batch of records, and the hashes of what stands in them.

    Attributes:
        code_C: [C] uint8, every segment with a `SEPARATOR` after it.
        start_S: [S] int, where each segment begins.
        size_S: [S] int, its letters.
    """

    def __init__(self, segments: Sequence[bytes]):
        """Takes the letters of the segments, of each record the prompt, then the trace."""
        buffer = SEPARATOR.join(segments) + SEPARATOR
        self.code_C = np.frombuffer(buffer, np.uint8)
        self.size_S = np.fromiter(map(len, segments), np.int64, len(segments))
        self.start_S = np.concatenate([[0], np.cumsum(self.size_S + 1)[:-1]])
        power_C, self._inverse_C = _powers(len(buffer))
        self._gram_hashes: dict[int, np.ndarray] = {}
        self._sum_C = np.zeros(len(buffer) + 1, np.uint64)
        np.cumsum(_CODES[self.code_C] * power_C, out=self._sum_C[1:])

    def hashes(self, start_X: np.ndarray, size_X: np.ndarray) -> np.ndarray:
        """[X] uint64, the hashes of the stretches of `size_X` bytes from `start_X` on."""
        return (self._sum_C[start_X + size_X] - self._sum_C[start_X]) * self._inverse_C[start_X]

    def gram_hashes(self, size: int) -> np.ndarray:
        """[C - size + 1] uint64, the hashes of all n-grams of `size` bytes, of the batch as one."""
        if size not in self._gram_hashes:
            count = max(len(self.code_C) - size + 1, 0)
            sums = self._sum_C[size : size + count] - self._sum_C[:count]
            self._gram_hashes[size] = sums * self._inverse_C[:count]
        return self._gram_hashes[size]

    def grams_within(self, size: int, *, traces_only: bool = False) -> tuple[np.ndarray, ...]:
        """The n-grams of `size` bytes that lie in one segment.

        Returns:
            Their hashes, uint64, and the record of each, int64, ascending.
        """
        count_S = np.maximum(self.size_S - size + 1, 0)
        if traces_only:
            count_S[::2] = 0
        inside_C = np.zeros(len(self.code_C) + 1, np.int8)
        inside_C[self.start_S[count_S > 0]] += 1
        inside_C[(self.start_S + count_S)[count_S > 0]] -= 1
        hashes = self.gram_hashes(size)
        kept = np.cumsum(inside_C, dtype=np.int8)[: len(hashes)].view(bool)
        record_R = np.arange(len(self.size_S) // 2)
        return hashes[kept], np.repeat(record_R, count_S[::2] + count_S[1::2])


def text_hash(run: bytes) -> int:
    """The hash that `Batch.hashes` gives a stretch of these bytes."""
    power_C, _ = _powers(len(run))
    return int((_CODES[np.frombuffer(run, np.uint8)] * power_C).sum(dtype=np.uint64))


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first powers of the base and of its inverse, modulo 2^64."""
    power, inverse = _power_table(max(count, 1 << 20).bit_length())
    return power[:count], inverse[:count]


@functools.lru_cache(maxsize=2)
def _power_table(bits: int) -> tuple[np.ndarray, np.ndarray]:
    tables = []
    for base in (_BASE, pow(_BASE, -1, 2**64)):
        table = np.full(1 << bits, base, np.uint64)
        table[0] = 1
        tables.append(np.multiply.accumulate(table))
    return tables[0], tables[1]
