r"""Taking a text apart as instruction rules need it: words, sentences, Markdown blocks.

Everything here is linear in the length of the text: completions are arbitrary, and a pattern that
backtracks would let one of them hold a worker until its clock runs out.

Source: sentence boundaries follow Kiss and Strunk, "Unsupervised Multilingual Sentence Boundary
Detection", 2006, with a fixed abbreviation list in place of a trained one. Markdown blocks follow
the CommonMark specification and GitHub's tables, read line by line.
"""
# ruff: noqa: RUF001 - terminal marks and quotes of all scripts are meant as they stand here

import dataclasses
import functools
import re

# Words that carry a period wherever they stand: titles, companies, references, months, days,
# states. Single letters and dotted acronyms (U.S., e.g.) are recognised by their form.
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof sr jr st messrs rev hon pres gov sen rep reps gen col maj capt lt sgt adm "
    "cpt inc ltd corp co cos bros cie mg vs v al cf viz approx dept est fig figs eq eqs vol vols "
    "ed eds pp jan feb aug sept sep oct nov dec mon tues wed thurs fri ave blvd rd mt ft "
    "ariz calif colo conn fla ga ill ind kan ky la mass md mich minn miss mo mont neb nev okla ore "
    "pa tenn tex va vt wash wis wyo ph.d".split()
)
# After an abbreviation a capital letter may start a name or a sentence; these start a sentence.
OPENERS = frozenset(
    "the this that these those there then they he she it we you i a an and but or so if when while "
    "although though since because however moreover nevertheless nonetheless instead indeed thus "
    "therefore similarly some many most both each one in on at as for from with after before "
    "during despite under what why how who where here his her its our their my your".split()
)
CLOSERS = "\"'”’»)]}*_"  # marks that may follow a terminal mark and belong to its sentence
_OPENING = "\"'“‘«([{*_"
_STOP = re.compile(rf"[.?!…。！？।؟]+[{re.escape(CLOSERS)}]*")
_UNSPACED_STOPS = "。！？"  # Chinese and Japanese put no space after the mark
_WORD = re.compile(r"\w+")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_ACRONYM = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})([^`\n]*)")
_ITEM = re.compile(r"[ \t]*(?:[-*+•]|(\d{1,9})[.)])[ \t]+(\S.*)")
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(\S.*)")
_DELIMITER_CELL = re.compile(r"\s*:?-+:?\s*")
_CELL_BORDER = re.compile(r"(?<!\\)\|")
_NEAR = 40  # characters looked at on either side of a mark: no word that decides is longer


def words(text: str) -> list[str]:
    r"""Returns the runs of word characters (`\w+`): "don't" is two words, 中文 is one."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Splits a text at its terminal marks; a line break alone ends no sentence.

    A mark ends a sentence where blank space or the end of the text follows, except the period of
    an abbreviation or an initial, and an ellipsis, unless a word that opens sentences follows.
    """
    found, start = [], 0
    for stop in _STOP.finditer(text):
        end = stop.end()
        spaced = end == len(text) or text[end].isspace() or text[stop.start()] in _UNSPACED_STOPS
        if spaced and _ends_sentence(text, stop.start(), stop.group()):
            found.append(text[start:end])
            start = end
    found.append(text[start:])
    return [sentence.strip() for sentence in found if _LETTER_OR_DIGIT.search(sentence)]


def _ends_sentence(text: str, at: int, mark: str) -> bool:
    bare = mark.rstrip(CLOSERS)
    if bare.strip(".…"):
        return True
    end = at + len(mark)
    following = text[end : end + _NEAR].split()
    next_word = following[0].lstrip(_OPENING) if following else ""
    if not next_word:
        return True
    opens = next_word[0].isupper() and next_word.rstrip(",:").lower() in OPENERS
    if bare != ".":
        return opens
    preceding = text[max(0, at - _NEAR) : at].split()
    word = preceding[-1].lstrip(_OPENING) if preceding else ""
    if word.lower() == "etc":
        return not next_word[0].islower()
    if len(word) == 1 and word.isalpha():
        return word == "I" or opens
    if word.lower().rpartition("-")[2] in ABBREVIATIONS or _ACRONYM.fullmatch(word):
        return opens
    return True


@dataclasses.dataclass(frozen=True)
class Item:
    """One list item: its number (None for a bullet) and its first line."""

    number: int | None
    text: str


@dataclasses.dataclass(frozen=True)
class Heading:
    """One `#` heading: its level, 1 to 6, and its text."""

    level: int
    text: str


@dataclasses.dataclass(frozen=True)
class Fence:
    """One fenced block: the language named after the fence, the body, and whether it is closed."""

    language: str
    body: str
    closed: bool


@dataclasses.dataclass(frozen=True)
class Table:
    """One table: header cells and rows; rows may be ragged, which `rectangular` tells."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def rectangular(self) -> bool:
        """Whether every row has as many cells as the header."""
        return all(len(row) == len(self.header) for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The Markdown blocks of a text, each kind in order of appearance.

    `paragraphs` are the runs of lines between blank lines, outside fences, that hold a word and
    are not headings alone; a list or table standing by itself is one paragraph.
    """

    headings: tuple[Heading, ...]
    items: tuple[Item, ...]
    tables: tuple[Table, ...]
    fences: tuple[Fence, ...]
    paragraphs: tuple[str, ...]


@functools.lru_cache(maxsize=8)  # the rules of a record ask for the same text, or its variants
def blocks(text: str) -> Blocks:
    """Reads a text's Markdown blocks in one pass over its lines."""
    fences, outside = _cut_fences(text.split("\n"))
    headings, items, tables, paragraphs = [], [], [], []
    for run in _runs(outside):
        if any(_LETTER_OR_DIGIT.search(line) and not _HEADING.fullmatch(line) for line in run):
            paragraphs.append("\n".join(run).strip())
        tables += _tables(run)
        for line in run:
            if heading := _HEADING.fullmatch(line):
                title = heading[2].rstrip().rstrip("#").rstrip()
                headings.append(Heading(len(heading[1]), title))
            elif item := _ITEM.fullmatch(line):
                items.append(Item(int(item[1]) if item[1] else None, item[2].strip()))
    return Blocks(*map(tuple, (headings, items, tables, fences, paragraphs)))


def block_sentences(text: str) -> list[str]:
    """Splits a text's paragraphs into sentences, which end with their paragraph or list item.

    Unlike in `sentences`, headings and code are left out, and the "1." of an item is no sentence.
    """
    found = []
    for paragraph in blocks(text).paragraphs:
        pieces = [[]]
        for line in paragraph.split("\n"):
            if item := _ITEM.fullmatch(line):
                pieces.append([item[2]])
            elif _HEADING.fullmatch(line):
                pieces.append([])
            else:
                pieces[-1].append(line)
        for piece in pieces:
            found += sentences("\n".join(piece))
    return found


def _cut_fences(lines: list[str]) -> tuple[list[Fence], list[str]]:
    """Separates fenced blocks from the other lines, leaving one blank line for each."""
    fences, outside = [], []
    opening, body = None, []
    for line in [*lines, None]:
        fence = None if line is None else _FENCE.fullmatch(line)
        if opening is None and fence:
            opening, body = fence, []
            outside.append("")
        elif opening is None:
            outside.append(line or "")
        elif line is None or (fence and fence[1].startswith(opening[1]) and not fence[2].strip()):
            language = opening[2].strip().lower()
            fences.append(Fence(language, "\n".join(body), closed=line is not None))
            opening = None
        else:
            body.append(line)
    return fences, outside


def _runs(lines: list[str]) -> list[list[str]]:
    """Groups lines into runs without a blank line."""
    runs, run = [], []
    for line in [*lines, ""]:
        if line.strip():
            run.append(line)
        elif run:
            runs.append(run)
            run = []
    return runs


def _tables(run: list[str]) -> list[Table]:
    """Finds tables in a run: a header, a delimiter row of as many cells, then rows."""
    tables, index = [], 1
    while index < len(run):
        header, delimiters = _cells(run[index - 1]), _cells(run[index])
        is_table = len(header) == len(delimiters) and all(
            _DELIMITER_CELL.fullmatch(cell) for cell in delimiters
        )
        if "|" not in run[index] or not is_table:
            index += 1
            continue
        end = index + 1
        while end < len(run) and "|" in run[end]:
            end += 1
        tables.append(Table(header, tuple(_cells(line) for line in run[index + 1 : end])))
        index = end + 1
    return tables


def _cells(line: str) -> tuple[str, ...]:
    line = line.strip().removeprefix("|")
    if line.endswith("|") and not line.endswith("\\|"):
        line = line[:-1]
    return tuple(cell.strip() for cell in _CELL_BORDER.split(line))
