"""Rules beyond IFEval's: format, ordering, counts, keywords, completion, language, length.

Each function takes a text that is not blank and says whether it follows the rule. Counts are
bounded by `at_least` and `at_most` (give both alike for "exactly"); texts compare without regard
to case; Markdown is read by `instruct_text.blocks`.
"""
# ruff: noqa: RUF001 - terminal marks and quotes of all scripts are meant as they stand here

import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Sequence

from vibejax.verifiers import instruct_text, language

SCRIPTS = {  # the first words of Unicode character names that a script's letters have
    "latin": ("LATIN",),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "thai": ("THAI",),
    "hangul": ("HANGUL",),
    "chinese": ("CJK",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
}
ORDERS = ("ascending", "descending")
_FILLER = re.compile(
    r"\[(?:your|insert|add|name|date|company|todo|tbd|placeholder|\.\.\.)[^\]\n]{0,80}\]"
    r"|\b(?:TODO|TBD|FIXME)\b|lorem ipsum|<(?:insert|your) [^>\n]{0,80}>",
    re.IGNORECASE,
)
_HEADING_WITHOUT_SPACE = re.compile(r" {0,3}#{2,6}[^#\s]")
_FINAL_MARKS = (*".?!…。！？।؟)]}\"'”’»*_`>|",)


def _within(count: int, at_least: int | None, at_most: int | None) -> bool:
    if at_least is None and at_most is None:
        raise ValueError("at_least, at_most: one of them must be given")
    if at_least is not None and at_most is not None and at_least > at_most:
        raise ValueError(f"at_least = {at_least}: must not exceed at_most = {at_most}")
    return (at_least is None or count >= at_least) and (at_most is None or count <= at_most)


def _count_word(text: str, word: str) -> int:
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    return sum(1 for _ in re.finditer(pattern, text, re.IGNORECASE))


def _increasing(places: Sequence[int]) -> bool:
    return -1 not in places and all(a < b for a, b in itertools.pairwise(places))


# Format


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def json_document(text: str, *, keys: list[str] | None = None) -> bool:
    """The whole text, or the one fenced block it consists of, is a strict JSON object or array.

    NaN, infinities and repeated keys are not valid. With `keys`, it is an object that has them.
    """
    body = text.strip()
    found = instruct_text.blocks(body)
    if len(found.fences) == 1 and not found.paragraphs and found.fences[0].closed:
        body = found.fences[0].body
    try:
        value = json.loads(
            body,
            # Digits stay text: turning a number of a million digits into an int takes minutes.
            parse_int=str,
            parse_constant=_reject_constant,
            object_pairs_hook=_unique_keys,
        )
    except (ValueError, RecursionError):
        return False
    if keys is not None:
        return isinstance(value, dict) and all(key in value for key in keys)
    return isinstance(value, dict | list)


def markdown(text: str) -> bool:
    """The text uses Markdown blocks, and they are well formed.

    Fences are closed, tables rectangular, `##` is followed by a space, and every paragraph closes
    its `**`.
    """
    found = instruct_text.blocks(text)
    malformed = (
        not all(fence.closed for fence in found.fences)
        or not all(table.rectangular for table in found.tables)
        or any(paragraph.count("**") % 2 for paragraph in found.paragraphs)
        or any(
            _HEADING_WITHOUT_SPACE.match(line)
            for paragraph in found.paragraphs
            for line in paragraph.split("\n")
        )
    )
    return not malformed and bool(found.headings or found.items or found.tables or found.fences)


def table(
    text: str,
    *,
    columns: list[str] | None = None,
    num_columns: int | None = None,
    at_least: int | None = None,
    at_most: int | None = None,
) -> bool:
    """There is a rectangular table with these header cells, columns and this number of rows."""
    found = [table for table in instruct_text.blocks(text).tables if table.rectangular]
    if columns is not None:
        names = [name.lower() for name in columns]
        found = [table for table in found if [cell.lower() for cell in table.header] == names]
    if num_columns is not None:
        found = [table for table in found if len(table.header) == num_columns]
    if at_least is not None or at_most is not None:
        _within(0, at_least, at_most)
        found = [table for table in found if _within(len(table.rows), at_least, at_most)]
    return bool(found)


def code_block(text: str, *, language: str | None = None) -> bool:
    """There is a closed fenced block that is not blank, of that language if one is given."""
    return any(
        fence.closed
        and fence.body.strip()
        and (language is None or fence.language.split(" ")[0] == language.lower())
        for fence in instruct_text.blocks(text).fences
    )


# Ordering


def keyword_order(text: str, *, keywords: list[str]) -> bool:
    """Every keyword occurs, and their first occurrences are in the given order."""
    lowered = text.lower()
    return _increasing([lowered.find(keyword.lower()) for keyword in keywords])


def heading_order(text: str, *, headings: list[str]) -> bool:
    """The headings occur in the given order; others may stand between them."""
    found = [heading.text.lower() for heading in instruct_text.blocks(text).headings]
    return _increasing([found.index(h.lower()) if h.lower() in found else -1 for h in headings])


def item_order(text: str, *, order: str) -> bool:
    """There are at least two list items, and they are in alphabetical order or its reverse."""
    if order not in ORDERS:
        raise ValueError(f"order = {order!r}: must be one of {', '.join(ORDERS)}")
    found = [
        " ".join(instruct_text.words(item.text)).lower()
        for item in instruct_text.blocks(text).items
    ]
    return len(found) >= 2 and found == sorted(found, reverse=order == "descending")


def numbered_list(text: str, *, at_least: int | None = None, at_most: int | None = None) -> bool:
    """There are so many numbered items, and they run 1, 2, 3 without a gap or a restart."""
    numbers = [item.number for item in instruct_text.blocks(text).items if item.number is not None]
    in_order = bool(numbers) and numbers == list(range(1, len(numbers) + 1))
    return _within(len(numbers), at_least, at_most) and in_order


# Counts


def list_items(text: str, *, at_least: int | None = None, at_most: int | None = None) -> bool:
    """There are so many list items, with bullets or numbers."""
    return _within(len(instruct_text.blocks(text).items), at_least, at_most)


def headings(
    text: str, *, level: int | None = None, at_least: int | None = None, at_most: int | None = None
) -> bool:
    """There are so many headings, of that level if one is given."""
    found = [h for h in instruct_text.blocks(text).headings if level in (None, h.level)]
    return _within(len(found), at_least, at_most)


def questions(text: str, *, at_least: int | None = None, at_most: int | None = None) -> bool:
    """There are so many sentences that end with a question mark."""
    found = [
        sentence
        for sentence in instruct_text.block_sentences(text)
        if sentence.rstrip(instruct_text.CLOSERS).endswith(("?", "？", "؟"))
    ]
    return _within(len(found), at_least, at_most)


# Keywords


def keyword_count(
    text: str, *, keyword: str, at_least: int | None = None, at_most: int | None = None
) -> bool:
    """The keyword occurs so many times as a word of its own."""
    return _within(_count_word(text, keyword), at_least, at_most)


def keyword_in_sentence(text: str, *, keyword: str, nth_sentence: int) -> bool:
    """The nth sentence holds the keyword as a word of its own; -1 is the last sentence."""
    if nth_sentence == 0:
        raise ValueError("nth_sentence = 0: must be 1 or more, or negative to count from the end")
    found = instruct_text.sentences(text)
    index = nth_sentence - 1 if nth_sentence > 0 else len(found) + nth_sentence
    return 0 <= index < len(found) and _count_word(found[index], keyword) > 0


def keyword_in_every_paragraph(text: str, *, keyword: str) -> bool:
    """Every paragraph holds the keyword as a word of its own."""
    found = instruct_text.blocks(text).paragraphs
    return bool(found) and all(_count_word(paragraph, keyword) for paragraph in found)


# Completion


def parts(text: str, *, parts: list[str]) -> bool:
    """Every part is named, in order, and followed by words before the next one is."""
    lowered, end = text.lower(), 0
    starts = []
    for part in parts:
        start = lowered.find(part.lower(), end)
        if start < 0:
            return False
        end = start + len(part)
        starts.append((start, end))
    ends = [start for start, _ in starts[1:]] + [len(lowered)]
    return all(
        instruct_text.words(lowered[after:until])
        for (_, after), until in zip(starts, ends, strict=True)
    )


def finished(text: str) -> bool:
    """The text does not break off: it ends with a mark, every fence is closed."""
    closed = all(fence.closed for fence in instruct_text.blocks(text).fences)
    return closed and text.rstrip().endswith(_FINAL_MARKS)


def no_filler(text: str) -> bool:
    """Nothing is left to fill in: no `[your name]`, TODO, TBD or lorem ipsum."""
    return _FILLER.search(text) is None


def start(text: str, *, phrase: str) -> bool:
    """The text starts with the phrase, in any case."""
    return text.strip().lower().startswith(phrase.strip().lower())


# Language


def language_of_paragraphs(text: str, *, language: str) -> bool:
    """The text and each of its paragraphs of 40 letters or more are in that language."""
    return _all_in(text, language)


def _all_in(text: str, name: str) -> bool:
    code = language.code(name)
    long = [
        paragraph
        for paragraph in instruct_text.blocks(text).paragraphs
        if sum(map(str.isalpha, paragraph)) >= 40  # shorter ones are often names and labels
    ]
    return all(language.detect(piece) == code for piece in [text, *long])


def script(text: str, *, script: str) -> bool:
    """Every letter belongs to the script, so that no other language's writing is mixed in."""
    if script not in SCRIPTS:
        raise ValueError(f"script = {script!r}: must be one of {', '.join(SCRIPTS)}")
    letters = {letter for letter in text if letter.isalpha()}
    return bool(letters) and all(
        unicodedata.name(letter, "").split(" ")[0] in SCRIPTS[script] for letter in letters
    )


# Length


def length_words(text: str, *, at_least: int | None = None, at_most: int | None = None) -> bool:
    """There are so many words."""
    return _within(len(instruct_text.words(text)), at_least, at_most)


def length_sentences(text: str, *, at_least: int | None = None, at_most: int | None = None) -> bool:
    """There are so many sentences, headings and code apart; a paragraph or item ends one."""
    return _within(len(instruct_text.block_sentences(text)), at_least, at_most)


def length_sentence_words(
    text: str, *, at_least: int | None = None, at_most: int | None = None
) -> bool:
    """Every sentence has so many words."""
    _within(0, at_least, at_most)
    found = instruct_text.block_sentences(text)
    return bool(found) and all(
        _within(len(instruct_text.words(sentence)), at_least, at_most) for sentence in found
    )


def length_paragraphs(
    text: str, *, at_least: int | None = None, at_most: int | None = None
) -> bool:
    """There are so many paragraphs between blank lines, headings and fenced code apart."""
    return _within(len(instruct_text.blocks(text).paragraphs), at_least, at_most)


def length_characters(
    text: str, *, at_least: int | None = None, at_most: int | None = None
) -> bool:
    """There are so many characters, blank space at both ends apart."""
    return _within(len(text.strip()), at_least, at_most)


RULES: dict[str, Callable[..., bool]] = {
    "format:json": json_document,
    "format:markdown": markdown,
    "format:table": table,
    "format:code_block": code_block,
    "order:keywords": keyword_order,
    "order:headings": heading_order,
    "order:items": item_order,
    "order:numbered_list": numbered_list,
    "count:list_items": list_items,
    "count:headings": headings,
    "count:questions": questions,
    "keyword:count": keyword_count,
    "keyword:in_sentence": keyword_in_sentence,
    "keyword:in_every_paragraph": keyword_in_every_paragraph,
    "completion:parts": parts,
    "completion:finished": finished,
    "completion:no_filler": no_filler,
    "completion:start": start,
    "language:every_paragraph": language_of_paragraphs,
    "language:script": script,
    "length:words": length_words,
    "length:sentences": length_sentences,
    "length:sentence_words": length_sentence_words,
    "length:paragraphs": length_paragraphs,
    "length:characters": length_characters,
}
