"""What CLR asks a model about its completions, and how the replies are read.

The wording is a file, by default clr_questions.toml beside this module, which says what can stand
in it. Problems, completions and claims are put into it as they are, in one pass: what they hold
is not looked at for names to fill in.
"""

import hashlib
import json
import re
from collections.abc import Mapping

import pydantic

from vibejax.config_file import Section
from vibejax.verifiers.thinking import after_thinking

_NAME = re.compile(r"\{\{\s{0,8}(\w+)\s{0,8}\}\}")
_NUMBERED = re.compile(
    r"[\s*_#>-]{0,16}(?:claim\s{0,4})?(\d{1,3})[*_]{0,3}[.):][*_]{0,3}\s(.*)", re.IGNORECASE
)
_VERDICT = re.compile(
    r"[\W_]{0,16}(?:(?:the )?(?:verdict|claim)(?: is)?[\W_]{1,16})?(true|false)[\W_]{0,16}",
    re.IGNORECASE,
)


class Questions(Section):
    """The wording of both questions.

    Attributes:
        extraction: asks for the claims of a completion.
        checking: asks whether a claim holds.
    """

    extraction: str
    checking: str

    @pydantic.model_validator(mode="after")
    def _has_all_names(self):
        for field, needed in (
            ("extraction", {"problem", "completion", "count"}),
            ("checking", {"problem", "claim"}),
        ):
            there = set(_NAME.findall(getattr(self, field)))
            for name in sorted(needed - there):
                raise ValueError(f"{field} has no {{{{{name}}}}} in it")
            for name in sorted(there - needed - {"mark"}):
                known = ", ".join(sorted(needed | {"mark"}))
                raise ValueError(f"{field} has {{{{{name}}}}}, which is none of {known}")
        return self


def ask_for_claims(
    questions: Questions, problem: str, completion: str, count: int
) -> list[dict[str, str]]:
    """The chat that asks for the `count` claims that a completion's answer rests on."""
    texts = {"problem": problem, "completion": completion, "count": str(count)}
    return _chat(questions.extraction, texts)


def ask_for_verdict(questions: Questions, problem: str, claim: str) -> list[dict[str, str]]:
    """The chat that asks whether a claim can be proved false.

    It does not show the completion, which could talk the model into its own mistakes.
    """
    return _chat(questions.checking, {"problem": problem, "claim": claim})


def _chat(wording: str, texts: Mapping[str, str]) -> list[dict[str, str]]:
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:6]
    filled = texts | {"mark": digest}
    text = _NAME.sub(lambda name: filled[name[1]], wording)
    return [{"role": "user", "content": text.strip()}]


def read_claims(reply: str, count: int, *, complete: bool) -> list[str]:
    """The claims of a reply: the lines that are numbered 1, 2, ...

    Signs of markdown around the number are overlooked, and so is what stands between the lines.
    A line that is numbered 1 begins a list and a number out of order ends it; the longest list
    counts, the last of equals. Claims beyond `count` are left out, and so is one that stood before.

    Args:
        reply: the model's, with its thinking.
        count: how many claims were asked for.
        complete: whether the reply ended by itself; if not, its last line is not read.

    Returns:
        `count` claims or fewer; none where there is no such list.
    """
    lists: list[list[str]] = [[]]
    for line in _lines(reply, complete):
        if not (match := _NUMBERED.fullmatch(line)):
            continue
        number, text = int(match[1]), match[2].strip(" \t\r*_")
        if number == 1:
            lists.append([])
        if number != len(lists[-1]) + 1:
            lists.append([])
        elif re.search(r"\w", text):
            lists[-1].append(text)
    claims = [list(dict.fromkeys(found))[:count] for found in lists]
    return max(reversed(claims), key=len)  # of equals, max takes the first


def read_verdict(reply: str, *, complete: bool) -> bool | None:
    """Whether a claim holds: by the last line that says nothing but the verdict.

    Such as "**Verdict:** FALSE", "True." or "The claim is false."; a line that says more is none.

    Args:
        reply: the model's, with its thinking.
        complete: as for `read_claims`.

    Returns:
        None where no line is a verdict.
    """
    for line in reversed(_lines(reply, complete)):
        if match := _VERDICT.fullmatch(line.strip()):
            return match[1].lower() == "true"
    return None


def _lines(reply: str, complete: bool) -> list[str]:
    text = after_thinking(reply)
    return [] if text is None else text.split("\n")[: None if complete else -1]
