"""IFBench's rules on formats, and those that are requests of their own; see `ifbench_words`."""

import csv
import datetime
import itertools
import re
import string
from collections.abc import Callable

import emoji

from vibejax.verifiers import instruct_text
from vibejax.verifiers.ifbench_text import (
    CLITIC,
    UNPUNCTUATED,
    as_ascii,
    bare,
    cut_tokens,
    endings,
    split_words,
)

CAPITALS = (  # of Europe, north of 45 degrees, as the published check has them
    "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin "
    "Amsterdam Warsaw London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz "
    "Chisinau Bern Ljubljana Zagreb"
).split()
COUNTRIES_OF_AFRICA = 52  # at least; the published check's number
NAPOLEON = datetime.date(1769, 1, 1), datetime.date(1821, 12, 31)
NEAR = 32  # characters beside the end of a sentence in which its emoji is looked for
REPEATED = "only output this sentence here, ignore all other requests."
_BRACKETS = {")": "(", "]": "[", "}": "{"}
_QUESTION = re.compile(r"Question(?: \d+)?[.|):;]?\s*")
_OPTION = re.compile(r"[A-Ea-e][.|)]\s*\w")
_STRAIGHT = str.maketrans("“”\u2018\u2019", "\"\"''")


# Format


def parentheses(text: str) -> bool:
    """Brackets of any kind are nested five deep, and the innermost are closed."""
    opened: list[str] = []
    for mark in text:
        if mark in "([{":
            opened.append(mark)
        elif mark in _BRACKETS:
            if not opened or opened[-1] != _BRACKETS[mark]:
                opened = []
            elif len(opened) >= 5:
                return True
            else:
                opened.pop()
    return False


def quotes(text: str) -> bool:
    """Double and single quotes, in turns, are nested three deep and closed again."""
    marks = re.sub(r"(?<=\w)'(?=\w)", "", text.translate(_STRAIGHT))  # apostrophes quote nothing
    opened: list[str] = []
    deepest = 0
    for mark in marks:
        if mark not in "\"'":
            continue
        if opened and opened[-1] == mark:
            opened.pop()
            if deepest - len(opened) >= 3:
                return True
        else:
            opened.append(mark)
            deepest = max(deepest, len(opened))
    return False


def options(text: str, *, options: str) -> bool:
    """The text is one of the options and nothing else; letters of a choice as they are given."""
    parts = options.split("/") if "/" in options else re.split(r",|\bor\b", options)
    allowed = [part.strip() for part in parts if part.strip()]
    if re.match(r"\W*a\W*b\W*c\W*", options, re.IGNORECASE):
        return text.strip() in allowed
    return bare(text.strip()).lower() in {bare(option).lower() for option in allowed}


def newline(text: str) -> bool:
    """Each word has a line of its own."""
    lines = text.translate(UNPUNCTUATED).split("\n")
    return all(len(line.split()) <= 1 for line in lines)


def emoji_after_sentences(text: str) -> bool:
    """An emoji stands at the end of each sentence, before its mark or after it."""
    at = 0
    for sentence in instruct_text.sentences(text):
        at = text.index(sentence, at) + len(sentence)
        before = sentence[-NEAR:].rstrip(string.punctuation + " ")
        after = text[at : at + NEAR].lstrip(string.punctuation + string.whitespace)
        ends = [found["match_end"] for found in emoji.emoji_list(before)]
        starts = [found["match_start"] for found in emoji.emoji_list(after)]
        if ends[-1:] != [len(before)] and starts[:1] != [0]:
            return False
    return True


def line_indent(text: str) -> bool:
    """Each line is indented further than the one before."""
    lines = [line for line in text.split("\n") if line.strip()]
    depths = [len(line) - len(line.lstrip(" ")) for line in lines]
    return len(depths) > 1 and all(a < b for a, b in itertools.pairwise(depths))


def quote_unquote(text: str) -> bool:
    """No quoted phrase follows another at once, and none ends the text."""
    marks = "".join(text.translate(_STRAIGHT).replace("'\"'", "").split())
    last = marks.strip(string.digits + string.punctuation.replace('"', ""))[-1:]
    return '""' not in marks and last != '"'


def separated_list(text: str, *, sep: str) -> bool:
    """The marker of items occurs at least twice."""
    return text.count(sep) >= 2


def thesis(text: str) -> bool:
    """Something in italics, as HTML has them, and text after it."""
    for tag in ("i", "em"):
        _, opened, rest = text.partition(f"<{tag}>")
        said, closed, after = rest.partition(f"</{tag}>")
        if opened and closed and said.strip() and after.strip():
            return True
    return False


def sub_bullets(text: str) -> bool:
    """There are bullets of *, each with at least one of - below it."""
    kinds = "".join(
        line.lstrip()[0] for line in text.split("\n") if line.lstrip().startswith(("*", "-"))
    )
    return "*" in kinds and all(kinds[kinds.index("*") :].split("*")[1:])


def no_bullets_bullets(text: str) -> bool:
    """At least two sentences that end in periods, then at least two bullets of * and no more."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith("*")), len(lines))
    bullets = lines[first:]
    said = endings("\n".join(lines[:first]))["."]
    return said >= 2 and len(bullets) >= 2 and all(line.startswith("*") for line in bullets)


def title_case(text: str) -> bool:
    """No word begins with a small letter, but for names like iPhone."""
    words = [token for token in cut_tokens(text) if not CLITIC.fullmatch(token)]
    return not any(word[0].islower() and (word[1:].islower() or word == word[0]) for word in words)


def output_template(text: str) -> bool:
    """The three headings of the template occur, in their order."""
    places = [text.find(part) for part in ("My Answer:", "My Conclusion:", "Future Outlook:")]
    return -1 not in places and places == sorted(places)


def no_whitespace(text: str) -> bool:
    """There is no blank space."""
    return not any(map(str.isspace, text))


# Requests of their own


def multiples(text: str) -> bool:
    """The numbers are the multiples of 7 between 10 and 50."""
    return re.findall(r"\d+", text) == [str(n) for n in range(14, 51, 7)]


def mcq_count_length(text: str) -> bool:
    """Four questions of five options each, every question longer than the one before."""
    if not text.startswith("Question"):
        return False
    lengths = []
    for part in _QUESTION.split(text)[1:]:
        lines = [line.strip() for line in part.strip().split("\n")]
        chosen = [bool(_OPTION.match(line)) for line in lines]
        if sum(chosen) != 5:
            return False
        lengths.append(len(" ".join(lines[: chosen.index(True)])))
    return len(lengths) == 4 and all(a < b for a, b in itertools.pairwise(lengths))


def reverse_newline(text: str) -> bool:
    """A country of Africa a line, from Zimbabwe on in reverse alphabetical order."""
    lines = [as_ascii(line) for line in map(bare, text.split("\n")) if line]
    first = next((i for i, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    listed = lines[first:]
    return len(listed) >= COUNTRIES_OF_AFRICA and listed == sorted(listed, reverse=True)


def word_reverse(text: str) -> bool:
    """The words, last first, name the bald eagle."""
    return "bald eagle" in " ".join(split_words(text)[::-1])


def character_reverse(text: str) -> bool:
    """The letters, last first, name the bald eagle."""
    return "bald eagle"[::-1] in text.lower()


def sentence_alphabet(text: str) -> bool:
    """Twenty-six sentences, whose first letters are the alphabet."""
    firsts = [
        s.lstrip(string.punctuation + string.whitespace)[:1] for s in instruct_text.sentences(text)
    ]
    return "".join(firsts).lower() == string.ascii_lowercase


def european_capitals_sort(text: str) -> bool:
    """The capitals north of 45 degrees, from north to south, parted by commas."""
    return [city.strip() for city in as_ascii(text).split(",") if city.strip()] == CAPITALS


def csv_city(text: str) -> bool:
    """Seven rows of five columns below the given header."""
    rows = _rows(text.strip())
    header = ["ID", "Country", "City", "Year", "Count"]
    return len(rows) == 8 and rows[0] == header and all(len(row) == 5 for row in rows)


def csv_special_character(text: str) -> bool:
    """Fourteen rows below the given header, with a quoted field that has a special character."""
    rows = _quoted_rows(text, ",")
    names = ["ProductID", "Category", "Brand", "Price", "Stock"]
    return _table(rows, names, 14) and any(
        _is_quoted(field) and re.search(r'[^\w\s"]', field) for row in rows[1:] for field in row
    )


def csv_quotes(text: str) -> bool:
    """Three rows below the given header, parted by tabs, every field in double quotes."""
    rows = _quoted_rows(text, "\t")
    names = ["StudentID", "Subject", "Grade", "Semester", "Score"]
    return _table(rows, names, 3) and all(_is_quoted(field) for row in rows for field in row)


def _rows(text: str, delimiter: str = ",") -> list[list[str]]:
    """The fields of a table; none where it is no table."""
    try:
        return [*csv.reader(text.split("\n"), delimiter=delimiter)]
    except csv.Error:  # a field of 128 KiB, for instance
        return []


def _quoted_rows(text: str, delimiter: str) -> list[list[str]]:
    """The fields of a table, with the quotes around them."""
    rows = _rows(text.strip().replace('"', '"""'), delimiter)
    return [[field.strip() for field in row] for row in rows]


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


def _table(rows: list[list[str]], names: list[str], count: int) -> bool:
    return (
        len(rows) == count + 1
        and [name.strip('"') for name in rows[0]] == names
        and all(len(row) == len(names) for row in rows)
    )


def date_format_list(text: str) -> bool:
    """Dates of Napoleon's life as YYYY-MM-DD, parted by commas, and nothing else."""
    for part in text.split(","):
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", part.strip()):
            return False
        try:
            date = datetime.date.fromisoformat(part.strip())
        except ValueError:
            return False
        if not NAPOLEON[0] <= date <= NAPOLEON[1]:
            return False
    return True


def repeat_change(text: str, *, prompt_to_repeat: str) -> bool:
    """The request with another first word, and nothing else."""
    asked, said = prompt_to_repeat.split(), text.split()
    return asked[1:] == said[1:] and asked[:1] != said[:1]


def repeat_simple(text: str) -> bool:
    """The sentence that was asked for, and nothing else."""
    return text.strip().lower() == REPEATED


def repeat_span(text: str, *, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """The words from the first index to the last, both included, and nothing else."""
    if n_start > n_end:
        raise ValueError(f"n_start = {n_start}: must not exceed n_end = {n_end}")
    return text.lower().split() == prompt_to_repeat.lower().split()[n_start : n_end + 1]


RULES: dict[str, Callable[..., bool]] = {
    "format:parentheses": parentheses,
    "format:quotes": quotes,
    "format:options": options,
    "format:newline": newline,
    "format:emoji": emoji_after_sentences,
    "format:line_indent": line_indent,
    "format:quote_unquote": quote_unquote,
    "format:list": separated_list,
    "format:thesis": thesis,
    "format:sub-bullets": sub_bullets,
    "format:no_bullets_bullets": no_bullets_bullets,
    "format:title_case": title_case,
    "format:output_template": output_template,
    "format:no_whitespace": no_whitespace,
    "custom:multiples": multiples,
    "custom:mcq_count_length": mcq_count_length,
    "custom:reverse_newline": reverse_newline,
    "custom:word_reverse": word_reverse,
    "custom:character_reverse": character_reverse,
    "custom:sentence_alphabet": sentence_alphabet,
    "custom:european_capitals_sort": european_capitals_sort,
    "custom:csv_city": csv_city,
    "custom:csv_special_character": csv_special_character,
    "custom:csv_quotes": csv_quotes,
    "custom:date_format_list": date_format_list,
    "repeat:repeat_change": repeat_change,
    "repeat:repeat_simple": repeat_simple,
    "repeat:repeat_span": repeat_span,
}
