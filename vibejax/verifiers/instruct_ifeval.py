"""The 25 rules of IFEval, one function each; arguments have the names of IFEval's kwargs.

Each takes a text that is not blank and says whether it follows the rule. Keywords, markers and
splitters are literal text, not patterns.

Source: Zhou et al., "Instruction-Following Evaluation for Large Language Models",
arXiv:2311.07911, table 1. Agreement with lm-eval's implementation is measured, and each
difference justified, in tests/test_instruct_parity.py.
"""

import json
import operator
import re
from collections.abc import Callable

from vibejax.verifiers import instruct_text, language

RELATIONS = {"less than": operator.lt, "at least": operator.ge}
CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCE_OPENINGS = ("```json", "```Json", "```JSON", "```")
_FIRST_WORD_ENDS = re.compile(r"[.,?!'\"]")
_HIGHLIGHT = re.compile(r"\*([^\n*]*)\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*([^\n*]*)\*\*")
_POSTSCRIPTS = {  # the two markers of the prompts, with the blank space that writers put inside
    "p.s.": re.compile(r"p\.\s?s\."),
    "p.p.s": re.compile(r"p\.\s?p\.\s?s"),
}
# Words as the Penn Treebank cuts them: marks stand alone, hyphens, slashes and periods do not cut,
# and a clitic (NASA's, I'M) is a word of its own.
_WORD_BREAK = re.compile(r"""[\s;@#$%&?!*"`“”«»()\[\]{}<>…]+|[,:](?!\d)|--+|\.{2,}""")
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|ll|re|ve))", re.IGNORECASE)


def compare(count: int, relation: str, bound: int) -> bool:
    """Applies one of the two relations of IFEval.

    Raises:
        ValueError: the relation is neither of them.
    """
    if relation not in RELATIONS:
        raise ValueError(f"relation = {relation!r}: must be one of {', '.join(RELATIONS)}")
    return RELATIONS[relation](count, bound)


def keywords_existence(text: str, *, keywords: list[str]) -> bool:
    """Every keyword occurs, in any case, also inside a longer word."""
    return all(re.search(re.escape(keyword), text, re.IGNORECASE) for keyword in keywords)


def keywords_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """The keyword occurs less than, or at least, so many times, also inside longer words."""
    found = re.findall(re.escape(keyword.strip()), text, re.IGNORECASE)
    return compare(len(found), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    """None of the words occurs as a word of its own, in any case."""
    return not any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
        for word in forbidden_words
    )


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The character occurs, in any case, less than, or at least, so many times."""
    if len(letter) != 1:
        raise ValueError(f"letter = {letter!r}: must be one character")
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, *, language: str) -> bool:
    """The text is in the language of that ISO 639-1 code."""
    return _is_in(text, language)


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    """There are less than, or at least, so many sentences."""
    return compare(len(instruct_text.sentences(text)), relation, num_sentences)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """There are exactly so many paragraphs separated by `***`, none of them blank."""
    pieces = [piece.strip() for piece in text.split("***")]
    inner = pieces[0 if pieces[0] else 1 : None if pieces[-1] else -1]
    return all(inner) and len(inner) == num_paragraphs


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    """There are less than, or at least, so many words."""
    return compare(len(instruct_text.words(text)), relation, num_words)


def nth_paragraph_first_word(
    text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """There are so many paragraphs between blank lines, and the nth starts with the word."""
    if not 1 <= nth_paragraph <= num_paragraphs:
        raise ValueError(f"nth_paragraph = {nth_paragraph}: must be 1 to {num_paragraphs}")
    pieces = [piece.strip() for piece in text.split("\n\n")]
    if sum(map(bool, pieces)) != num_paragraphs or not pieces[nth_paragraph - 1]:
        return False
    word = pieces[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return _FIRST_WORD_ENDS.split(word, maxsplit=1)[0].lower() == first_word.lower()


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """There are at least so many placeholders in square brackets, each on one line."""
    found = 0
    for line in text.split("\n"):
        end = 0
        while (start := line.find("[", end)) >= 0 and (end := line.find("]", start) + 1):
            found += 1
    return found >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """The marker of a postscript occurs, in any case."""
    marker = postscript_marker.strip().lower()
    pattern = _POSTSCRIPTS.get(marker) or re.compile(re.escape(marker))
    return pattern.search(text.lower()) is not None


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """There are exactly so many lines that start with `-`, or with one `*`."""
    lines = [line.strip() for line in text.split("\n")]
    return num_bullets == sum(
        line.startswith("-") or (line.startswith("*") and line[1:2] not in ("", "*"))
        for line in lines
    )


def constrained_response(text: str) -> bool:
    """One of the three fixed answers occurs."""
    return any(answer in text for answer in CONSTRAINED_RESPONSES)


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """There are at least so many spans `*like this*` or `**like this**` that are not blank."""
    found = _HIGHLIGHT.findall(text) + _DOUBLE_HIGHLIGHT.findall(text)
    return sum(bool(span.strip()) for span in found) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """The splitter followed by a number occurs at least so many times."""
    found = re.findall(re.escape(section_spliter.strip()) + r"\s?\d", text)
    return len(found) >= num_sections


def json_format(text: str) -> bool:
    """The whole text, a code fence around it apart, is one JSON value."""
    body = text.strip()
    for opening in _FENCE_OPENINGS:
        body = body.removeprefix(opening)
    try:
        # Digits stay text: turning a number of a million digits into an int takes minutes.
        json.loads(body.removesuffix("```").strip(), parse_int=str)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """Some line holds `<<a title>>` that is not blank."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def two_responses(text: str) -> bool:
    """There are two different responses separated by `******`."""
    pieces = [piece.strip() for piece in text.split("******")]
    inner = pieces[0 if pieces[0] else 1 : None if pieces[-1] else -1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """The text starts with the request, word for word but in any case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, *, end_phrase: str) -> bool:
    """The text ends with the phrase, in any case; quotation marks around the text do not count."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """The whole text stands in double quotation marks."""
    body = text.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Words written in capitals occur less than, or at least, so many times."""
    return compare(_capital_words(text), capital_relation, capital_frequency)


def _capital_words(text: str) -> int:
    found = 0
    for word in _WORD_BREAK.split(text):
        clitic = _CLITIC.fullmatch(word or "")
        found += sum(part.isupper() for part in (clitic.groups() if clitic else (word or "",)))
    return found


def english_capital(text: str) -> bool:
    """The text is in English and has no small letter."""
    return text.isupper() and _is_in(text, "en")


def english_lowercase(text: str) -> bool:
    """The text is in English and has no capital letter."""
    return text.islower() and _is_in(text, "en")


def no_comma(text: str) -> bool:
    """The text has no comma."""
    return "," not in text


def _is_in(text: str, code: str) -> bool:
    return language.code(code) == language.detect(text)


RULES: dict[str, Callable[..., bool]] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
