"""Instruction following: does a completion follow the rules that its record lists.

Rules are named by id: the 25 of IFEval (`instruct_ifeval`) and the 58 of IFBench (`ifbench_words`,
`ifbench_formats`) by their public ids and kwargs, and a wider set of our own (`instruct_wider`). A
record lists them as IFEval's JSONL does, in `instruction_id_list` and `kwargs`, either at its top
level or under `ground_truth`.

Strict judges the text as it is. Loose accepts a rule that any of eight variants follows: the text
without its first line, its last line or both, each with and without asterisks.
"""

import inspect
import json
import types
from collections.abc import Callable, Mapping
from typing import Any

from vibejax.verifiers import (
    Outcome,
    Verdict,
    ifbench_formats,
    ifbench_words,
    instruct_ifeval,
    instruct_wider,
    language,
    thinking,
)

RULES: dict[str, Callable[..., bool]] = {
    **instruct_ifeval.RULES,
    **ifbench_words.RULES,
    **ifbench_formats.RULES,
    **instruct_wider.RULES,
}
MODES = ("strict", "loose")

Rule = tuple[str, Callable[[str], bool]]


def load() -> None:
    """Loads the language model and the verbs, so that their second is not on an item's clock."""
    language.detect("a")
    ifbench_words.start_verb("a")


def verify(
    record: Mapping[str, Any], completion: str, *, mode: str = "strict", partial: bool = False
) -> Verdict:
    """Says whether a completion follows all rules of its record.

    Args:
        record: an IFEval row, or a record whose `ground_truth` is one (also as a JSON string).
        completion: decoded completion; only what follows the thinking is judged.
        mode: `strict` or `loose`.
        partial: the reward is the share of rules followed instead of all or nothing.

    Raises:
        ValueError: the record lists no rules, an unknown one, or kwargs that do not fit; or the
            mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode = {mode!r}: must be one of {', '.join(MODES)}")
    listed = rules(record)
    text = thinking.after_thinking(completion)
    if not text:
        return Verdict(
            correct=False, reward=0.0, outcome=Outcome.NO_ANSWER, detail="no text after thinking"
        )
    followed = follow(listed, text, loose=mode == "loose")
    missed = [rule_id for (rule_id, _), good in zip(listed, followed, strict=True) if not good]
    correct = not missed
    return Verdict(
        correct=correct,
        reward=sum(followed) / len(followed) if partial else float(correct),
        outcome=Outcome.CORRECT if correct else Outcome.WRONG,
        answer=f"{sum(followed)} of {len(followed)} rules followed",
        detail=f"not followed: {', '.join(missed)}" if missed else "",
    )


def follow(listed: list[Rule], text: str, *, loose: bool) -> list[bool]:
    """Says for each rule whether a text follows it; a blank text follows none."""
    variants = _variants(text) if loose else [text]
    variants = [variant for variant in variants if variant.strip()]
    return [any(rule(variant) for variant in variants) for _, rule in listed]


def _variants(text: str) -> list[str]:
    lines = text.split("\n")
    cut = [text] + ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return list(dict.fromkeys(cut + [variant.replace("*", "") for variant in cut]))


def rules(record: Mapping[str, Any]) -> list[Rule]:
    """Reads the rules of a record; also the way to check a record before a run.

    Kwargs that are None count as absent: IFEval's tables fill every row with all names.

    Returns:
        (rule id, function of the text) in the order of the record.

    Raises:
        ValueError: there are no rules, an id is unknown, a kwarg is missing, unknown, of the
            wrong type or out of range.
    """
    listing = record.get("ground_truth", record)
    if isinstance(listing, str):
        try:
            listing = json.loads(listing)
        except ValueError as error:
            raise ValueError(f"ground_truth = {listing!r:.80}: must be JSON ({error})") from error
    if not isinstance(listing, Mapping):
        raise ValueError(f"ground_truth = {listing!r:.80}: must be an object")
    ids, kwargs = listing.get("instruction_id_list"), listing.get("kwargs")
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"instruction_id_list = {ids!r:.80}: must be a list of at least one id")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids):
        raise ValueError(f"kwargs = {kwargs!r:.80}: must be a list of {len(ids)}, one per id")
    return [(rule_id, _bind(rule_id, given)) for rule_id, given in zip(ids, kwargs, strict=True)]


def _bind(rule_id: str, given: Mapping[str, Any] | None) -> Callable[[str], bool]:
    """Binds a rule to its kwargs, checking names, types and values."""
    if not isinstance(rule_id, str) or rule_id not in RULES:
        raise ValueError(f"instruction id {rule_id!r:.80} is unknown, known are {', '.join(RULES)}")
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"{rule_id}: kwargs = {given!r:.80}: must be an object")
    given = {name: value for name, value in (given or {}).items() if value is not None}
    rule = RULES[rule_id]
    known = dict(list(inspect.signature(rule).parameters.items())[1:])
    if unknown := [name for name in given if name not in known]:
        takes = ", ".join(known) or "none"
        raise ValueError(f"{rule_id}: unknown kwarg {unknown[0]!r:.80}, it takes {takes}")
    for name, parameter in known.items():
        if name in given:
            given[name] = _typed(f"{rule_id}: {name}", given[name], parameter.annotation)
        elif parameter.default is inspect.Parameter.empty:
            raise ValueError(f"{rule_id}: kwarg {name!r} is missing")
    try:
        rule("", **given)  # values out of range show whatever the text is
    except ValueError as error:
        raise ValueError(f"{rule_id}: {error}") from error
    return lambda text: rule(text, **given)


def _typed(label: str, value: Any, annotation: Any) -> Any:
    """Checks a kwarg against its annotation: int >= 0 (nth_* may be negative), str, list[str]."""
    kinds = annotation.__args__ if isinstance(annotation, types.UnionType) else (annotation,)
    if int in kinds:
        # Tables that hold missing values turn whole numbers into floats.
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole:
            raise ValueError(f"{label} = {value!r:.80}: must be a whole number")
        if value < 0 and "nth" not in label:
            raise ValueError(f"{label} = {value!r}: must not be negative")
        return int(value)
    if str in kinds:
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{label} = {value!r:.80}: must be text that is not blank")
        return value
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{label} = {value!r:.80}: must be a list of texts, at least one")
    if not all(v.strip() for v in value):
        raise ValueError(f"{label} = {value!r:.80}: must not hold a blank text")
    return value
