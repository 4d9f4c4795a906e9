"""Math answers: what a completion answers, and whether that equals the ground truth.

The comparison goes from the exact and fast to the symbolic: one spelling (`math_text`), numbers
and units (`math_quantity`), lists, sets, intervals, matrices and relations part by part
(`math_tree`, `math_compare`, `math_intervals`), and for single expressions math-verify on sympy
(`math_symbolic`). It sets no time limit of its own: the pool that runs it does, in another process.
"""

import re
from collections.abc import Mapping
from typing import Any

from vibejax.verifiers import (
    Outcome,
    Verdict,
    math_compare,
    math_symbolic,
    math_text,
    math_tree,
)
from vibejax.verifiers.thinking import after_thinking

MAX_ANSWER_CHARS = 1_000  # no ground truth is longer, and parsers are not linear
MAX_BRACKETS = math_tree.MAX_DEPTH

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{|\\[{}]|[{}]")
_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,8}\{")
_ANSWER_IS = re.compile(r"answer\*{0,2}\s{0,4}(?:is|:|=)\*{0,2}(?:\s{0,4}:)?|####", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|\.\s")
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")
_INTEGER = re.compile(r"[-+]?\d+")


def preload() -> None:
    """Imports math-verify and sympy, which only some answers need."""
    math_symbolic.load()


def extract(completion: str, *, last_number: bool = False) -> str | None:
    """Returns the answer of a completion as text, or None.

    After the thinking, if there is any: the content of the last balanced `\\boxed{}`, else what
    follows the last "answer is", "answer:" or "####" up to the end of its sentence, else, only if
    asked for, the last number. Of several boxes the last counts. Takes time linear in the length.

    Args:
        completion: decoded completion, without the prompt.
        last_number: whether a completion that marks no answer answers its last number.
    """
    text = after_thinking(completion)
    if text is None:
        return None
    boxed = _last_box(text)
    if boxed is not None:
        return boxed.strip()
    ends = [marker.end() for marker in _ANSWER_IS.finditer(text)]
    if ends:
        rest = text[ends[-1] : ends[-1] + MAX_ANSWER_CHARS].strip()
        return _SENTENCE_END.split(rest, maxsplit=1)[0].strip()
    if last_number and (numbers := _NUMBER.findall(text[-MAX_ANSWER_CHARS:])):
        return numbers[-1]
    return None


def equivalent(answer: str, ground_truth: str | int | float) -> bool:
    """Whether two answers say the same; symmetric.

    Conventions, where graders differ: 50% equals 1/2 and 50; a unit may be missing but not
    differ; bare lists and sets have no order, (1, 2) has; "x = 3" equals 3; a decimal of at least
    six digits equals the number that it is rounded from; a list equals no single value.

    Args:
        answer: as `extract` returns it; an empty one equals nothing.
        ground_truth: a number, text or LaTeX.
    """
    sides = [str(answer).strip(), str(ground_truth).strip()]
    if not all(sides) or max(map(len, sides)) > MAX_ANSWER_CHARS:
        return False
    if all(len(side) < 100 and _INTEGER.fullmatch(side) for side in sides):
        return int(sides[0]) == int(sides[1])
    a, b = map(math_text.clean, sides)
    if not a or not b:
        return False
    if a == b:
        return True
    if max((*math_text.depths(a), *math_text.depths(b))) > MAX_BRACKETS:
        return False
    return math_compare.equal(math_tree.read(a), math_tree.read(b))


def verify(record: Mapping[str, Any], completion: str) -> Verdict:
    """Compares a completion's answer with the record's ground truth.

    Args:
        record: `ground_truth` is an int, a float, text or LaTeX; `last_number` (bool, optional)
            says that an unmarked last number counts as the answer.
        completion: decoded completion, without the prompt.
    """
    answer = extract(completion, last_number=bool(record.get("last_number", False)))
    if not answer:
        return Verdict(correct=False, reward=0.0, outcome=Outcome.NO_ANSWER)
    correct = equivalent(answer, record["ground_truth"])
    return Verdict(
        correct=correct,
        reward=float(correct),
        outcome=Outcome.CORRECT if correct else Outcome.WRONG,
        answer=answer,
    )


def _last_box(text: str) -> str | None:
    if not _BOX.search(text):
        return None
    opened: list[int] = []  # of each open brace: where a box's content starts, or -1
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
    return None if box is None else _BOX.sub("{", text[box[0] : box[1]])
