"""STEM answers: an option's letter, an option's text, or a number with a unit.

What a completion answers is the content of its last balanced `\\boxed{}`; else what follows the
last "answer is", "Answer:", "option B is correct" or the like; else its last line. An answer that
names several options or numbers is wrong, never a pick among them.
"""
# ruff: noqa: RUF001 - dashes and minus signs of all kinds are meant

import collections
import re
from collections.abc import Mapping
from typing import Any

from vibejax.verifiers import Outcome, Verdict, choice_options, choice_units, thinking

MAX_ANSWER_CHARS = 300  # what a statement is read to; the rest explains
MAX_STATEMENTS = 20  # of the last ones, looked through for one that names an answer
MAX_BOX_CHARS = 2_000
_BOX = "\\boxed"
_BRACE = re.compile(r"[{}]")
_STATEMENT = re.compile(
    r"\b(?:answer|option|choice)[*_ ]{0,4}(?:is|would be|must be|:|=)[*_: ]{0,6}|####",
    re.IGNORECASE,
)
_CORRECT_ONE = re.compile(
    r"(?:\b(?:option|choice|answer)\s{1,4}\(?|\(|^[*_ ]{0,4})([A-Z])\)?[*_]{0,4}\s{1,4}is\s{1,4}"
    r"(?:the\s{1,4})?(?:correct|right|best)(?=\s{1,4}(?:answer|option|choice|one)\b|\s{0,4}[.,;:!*\n]|\s{0,4}$)",
    re.MULTILINE | re.IGNORECASE,
)
_LEADING = re.compile(
    r"(?:(?:the|correct|option|choice|answer|is|either|probably|likely|clearly|indeed|therefore|thus)"
    r"\b[\s:]{0,4}){1,6}",
    re.IGNORECASE,
)
_LETTER_ALONE = re.compile(r"\(?([A-Za-z])\)?[.):,;!]?")
_LETTER_FIRST = re.compile(r"\(?([A-Z])(\)[.:]?|[.:,;]|(?=\s))")
_SECOND_LETTER = re.compile(
    r"[\s,;/&]*(?:(?:or|and)\b\s*)?\(?[A-Z](?:\)|[.,:;/&]|\s+(?:or|and)\b|\s*$)|[\s,;/&]*(?:or|and)\s+\(?[A-Z]\b"
)
_REASON = re.compile(r"(?:because|since|as|due|which|where|for|so|with)\b|[-–—(]", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
# A remark after a quantity; what may start a second quantity ("or 6", ", 6") is none.
_QUANTITY_END = re.compile(r",?\s(?:because|since|which|so)\s|\s\((?!or\b|and\b|[\d-])")
_NUMBER = re.compile(r"[-−]?(?:\d[\d,]{0,30})?\.?\d{1,30}(?:e[+-]?\d{1,3})?", re.IGNORECASE)
_SEVERAL = "several"


def verify(
    record: Mapping[str, Any],
    completion: str,
    *,
    rel_tol: float = 0.01,
    require_unit: bool = False,
    last_number: bool = False,
) -> Verdict:
    """Compares a completion's answer with the record's letter, option or quantity.

    Args:
        record: `ground_truth` is an option letter, the text of an option, or a number with or
            without a unit; `options` (list of texts) is needed only where the prompt does not
            hold them; `rel_tol` overrides the setting.
        completion: decoded completion; only what follows the thinking is read.
        rel_tol: relative tolerance of numbers, 0 (exact) to below 0.5.
        require_unit: a number is wrong without a unit if the truth has one.
        last_number: a completion that states no number answers its last one.

    Raises:
        ValueError: the record's truth or options cannot be used, or the tolerance is out of range.
    """
    truth, options = choice_options.truth_of(record)
    rel_tol = record.get("rel_tol", rel_tol)
    if isinstance(rel_tol, bool) or not isinstance(rel_tol, int | float) or not 0 <= rel_tol < 0.5:
        raise ValueError(f"rel_tol = {rel_tol!r:.80}: must be a number from 0 to below 0.5")
    text = thinking.after_thinking(completion)
    if not text:
        return _verdict(None, False, "no text after thinking")
    if isinstance(truth, str):
        answer, letter = answered_letter(text, options)
        detail = "" if letter else "names no single option"
        # Votes go by the option, however it is written.
        return _verdict(letter or answer, letter == truth, detail if answer else "no answer found")
    answer, quantity = answered_quantity(text, last_number=last_number)
    if quantity is None:
        return _verdict(answer, False, "is not one number" if answer else "no answer found")
    if require_unit and truth.unit and not quantity.unit:
        return _verdict(answer, False, "has no unit")
    return _verdict(answer, choice_units.equal(quantity, truth, rel_tol=rel_tol), "")


def _verdict(answer: str | None, correct: bool, detail: str) -> Verdict:
    outcome = Outcome.CORRECT if correct else Outcome.WRONG if answer else Outcome.NO_ANSWER
    return Verdict(
        correct=correct, reward=float(correct), outcome=outcome, answer=answer, detail=detail
    )


def answered_letter(text: str, options: list[str]) -> tuple[str | None, str | None]:
    """Returns what a text answers, as written, and the letter of the option that this names.

    Args:
        text: a completion without its thinking.
        options: the option texts; empty if unknown, then letters A to J are options.

    Returns:
        (None, None) if there is no answer, (answer, None) if it names no single option.
    """
    box = last_box(text)
    if box is not None:
        return box.strip() or None, _single(_letter_of(box, options))
    capital = re.compile(rf"\b[{_valid(options)}]\b")
    statements = _statements(text)
    for statement in statements:
        letter = _letter_of(statement, options)
        if letter or capital.search(statement):
            # A statement that speaks of options in another way is not passed over for an earlier
            # one: "the answer is not A" must not leave an A said before as the answer.
            return statement, _single(letter)
    if statements:
        return statements[0], None
    line = _last_line(text)
    letter = _letter_of(line, options)
    return (line, _single(letter)) if letter else (None, None)


def _single(letter: str | None) -> str | None:
    return None if letter == _SEVERAL else letter


def _valid(options: list[str]) -> str:
    return choice_options.LETTERS[: len(options) or choice_options.UNKNOWN_COUNT]


def _letter_of(answer: str, options: list[str]) -> str | None:
    """Returns the letter an answer names, `_SEVERAL`, or None if it speaks of no option."""
    valid = _valid(options)
    texts = [choice_options.plain(option) for option in options]
    answer = choice_options.unmarked(answer)
    sentence = _SENTENCE_END.split(answer, maxsplit=1)[0]
    for candidate in (answer, sentence):
        if (plain := choice_options.plain(candidate)) in texts:
            return valid[texts.index(plain)]
    if (by_value := _option_of_quantity(sentence, options)) is not None:
        return valid[by_value]
    if leading := _LEADING.match(answer):
        answer = answer[leading.end() :]
    if (alone := _LETTER_ALONE.fullmatch(answer)) and alone[1].upper() in valid:
        return alone[1].upper()
    first = _LETTER_FIRST.match(answer)
    if not first or first[1] not in valid:
        return None
    letter, rest = first[1], answer[first.end() :]
    named = {
        valid[texts.index(plain)]
        for candidate in (rest, _SENTENCE_END.split(rest, maxsplit=1)[0])
        if (plain := choice_options.plain(candidate)) in texts
    }
    if named:
        return letter if named == {letter} else _SEVERAL
    others = set(re.findall(rf"\b([{valid}])[):]", rest)) - {letter}
    if others or _SECOND_LETTER.match(rest):
        return _SEVERAL
    labelled = first[2] not in ("", ",", ";")
    if labelled or not rest.strip() or _REASON.match(rest.lstrip()):
        return letter
    return None


def _option_of_quantity(answer: str, options: list[str]) -> int | None:
    quantity = choice_units.read(answer)
    if quantity is None:
        return None
    same = [
        i
        for i, option in enumerate(options)
        if (other := choice_units.read(option))
        and choice_units.equal(quantity, other, rel_tol=1e-6)
    ]
    return same[0] if len(same) == 1 else None


def answered_quantity(
    text: str, *, last_number: bool
) -> tuple[str | None, choice_units.Quantity | None]:
    """Returns what a text answers, as written, and the quantity that this is.

    Args:
        text: a completion without its thinking.
        last_number: whether a text that states no number answers its last one.

    Returns:
        (None, None) if there is no answer, (answer, None) if it is not one number.
    """
    box = last_box(text)
    if box is not None:
        return box.strip() or None, choice_units.read(box)
    for statement in _statements(text):
        if any(map(str.isdigit, statement)):
            sentence = _SENTENCE_END.split(statement, maxsplit=1)[0]
            quantity = choice_units.read(sentence)
            if quantity is None:
                quantity = choice_units.read(_QUANTITY_END.split(sentence, maxsplit=1)[0])
            return sentence, quantity
    line = _last_line(text)
    if (quantity := choice_units.read(line)) is not None:
        return line, quantity
    if last_number and (numbers := _NUMBER.findall(text[-MAX_ANSWER_CHARS:])):
        return numbers[-1], choice_units.read(numbers[-1])
    return None, None


def _statements(text: str) -> list[str]:
    """Returns what each statement of an answer says, up to the end of its line, last one first."""
    after = ((found.end(), found.end() + MAX_ANSWER_CHARS) for found in _STATEMENT.finditer(text))
    named = (found.span(1) for found in _CORRECT_ONE.finditer(text))
    said = [
        span for spans in (after, named) for span in collections.deque(spans, maxlen=MAX_STATEMENTS)
    ]
    lines = [text[start:end].strip().split("\n")[0] for start, end in sorted(said, reverse=True)]
    return [line for line in lines if line]


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2].strip()[:MAX_ANSWER_CHARS]


def last_box(text: str) -> str | None:
    """Returns the content of the last balanced `\\boxed{}` of a text, None without one."""
    end = len(text)
    for _ in range(MAX_STATEMENTS):
        start = text.rfind(_BOX, 0, end)
        if start < 0:
            return None
        end = start
        content = start + len(_BOX)
        content += len(text[content : content + 8]) - len(text[content : content + 8].lstrip())
        if text[content : content + 1] != "{":
            continue
        depth = 0
        for brace in _BRACE.finditer(text, content, content + MAX_BOX_CHARS):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return text[content + 1 : brace.start()]
    return None
