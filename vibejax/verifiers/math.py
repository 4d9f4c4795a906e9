"""Math answers: what a completion answers, and whether that equals the ground truth."""

import functools
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from vibejax.verifiers import Outcome, Verdict

MAX_ANSWER_CHARS = 1_000  # no ground truth is longer; parsers are not linear
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{|\\[{}]|[{}]")
_ANSWER_IS = re.compile(r"answer\s{0,4}(?:is|:|=)(?:\s{0,4}:)?|####", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|\.\s")
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")


def extract(completion: str, *, last_number: bool = False) -> str | None:
    """Returns the answer of a completion as text, or None.

    After the last `</think>`, if there is one: the content of the last balanced `\\boxed{}`, else
    what follows the last "the answer is" or "####" up to the end of its sentence, else, only if
    asked for, the last number. Of several boxes the last counts. Linear in the text's length.

    Args:
        completion: decoded completion, without the prompt.
        last_number: whether a completion that marks no answer answers its last number.
    """
    text = (
        completion[completion.rfind("</think>") + len("</think>") :]
        if ("</think>" in completion)
        else completion
    )
    boxed = _last_box(text)
    if boxed is not None:
        return boxed.strip()
    ends = [marker.end() for marker in _ANSWER_IS.finditer(text)]
    if ends:
        rest = text[ends[-1] : ends[-1] + MAX_ANSWER_CHARS].strip()
        return _SENTENCE_END.split(rest, maxsplit=1)[0].strip().strip("*").rstrip(".").strip()
    if last_number and (numbers := _NUMBER.findall(text[-MAX_ANSWER_CHARS:])):
        return numbers[-1]
    return None


def _last_box(text: str) -> str | None:
    if "boxed" not in text and "fbox" not in text:
        return None
    opened: list[int] = []  # for each open brace: where a box's content starts, or -1
    box = None
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "{":
            opened.append(-1)
        elif token == "}":
            if opened and (start := opened.pop()) >= 0:
                box = (start, match.start())
        elif len(token) > 2:
            opened.append(match.end())
    return None if box is None else re.sub(r"\\(?:boxed|fbox)\s*\{", "{", text[box[0] : box[1]])


_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|[,!;: ])(?![a-zA-Z])|\\\$|\$|\\text\{\s*\}|\s+"
    r"|(?<=\d),(?=\d{3}(?!\d))|\{,\}"
)


def _normal(text: str) -> str:
    text = text.replace("dfrac", "frac").replace("tfrac", "frac").replace("\u2212", "-")
    return _DROPPED.sub("", text).rstrip(".")


def _rational(text: str) -> Fraction | None:
    """Reads an integer, decimal, fraction or percentage."""
    text = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    text = re.sub(r"^(-?)\\frac(\d)(\d)$", r"\1\2/\3", text)
    percent = re.fullmatch(r"(.*?)\\?%", text)
    try:
        value = Fraction(percent.group(1) if percent else text)
    except (ValueError, ZeroDivisionError):
        return None
    return value / 100 if percent else value


@functools.cache
def load() -> Any:
    """Imports math-verify and sympy, which takes longer than most verifications."""
    import math_verify

    return math_verify


def equivalent(answer: str, ground_truth: str | int | float) -> bool:
    """Whether two answers say the same; symmetric.

    Args:
        answer: as `extract` returns it; an empty one equals nothing.
        ground_truth: a number, text or LaTeX.
    """
    a, b = _normal(answer), _normal(str(ground_truth))
    if not a or not b or max(len(answer), len(b)) > MAX_ANSWER_CHARS:
        return False
    if a == b:
        return True
    a_value, b_value = _rational(a), _rational(b)
    if a_value is not None and b_value is not None:
        return a_value == b_value
    library = load()
    config = [library.LatexExtractionConfig()]
    parsed = [
        library.parse(f"${side}$", config, parsing_timeout=None, fallback_mode="no_fallback")
        for side in (answer.replace("$", ""), str(ground_truth).replace("$", ""))
    ]
    return bool(
        parsed[0]
        and parsed[1]
        and (
            library.verify(parsed[1], parsed[0], timeout_seconds=None)
            or library.verify(parsed[0], parsed[1], timeout_seconds=None)
        )
    )


def verify(record: Mapping[str, Any], completion: str) -> Verdict:
    """Compares a completion's answer with the record's ground truth.

    Args:
        record: `ground_truth` is an int, a float, text or LaTeX; `last_number` (bool, optional)
            says that an unmarked last number counts as the answer.
        completion: decoded completion, without the prompt.
    """
    answer = extract(completion, last_number=record.get("last_number", False))
    if not answer:
        return Verdict(correct=False, reward=0.0, outcome=Outcome.NO_ANSWER)
    correct = equivalent(answer, record["ground_truth"])
    return Verdict(
        correct=correct,
        reward=float(correct),
        outcome=Outcome.CORRECT if correct else Outcome.WRONG,
        answer=answer,
    )
