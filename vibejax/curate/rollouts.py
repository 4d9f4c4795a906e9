"""What rollouts of a model and the verifiers say of records: difficulty, labels, traces.

Rollouts are the `completions` that `python -m vibejax.generate MODEL --prompts F --samples 8`
writes into each record; `accuracy`, a number, takes their place where it was counted before.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vibejax import equivalence
from vibejax.config_file import InputError
from vibejax.equivalence import Pairs
from vibejax.verifiers import Verdict, math
from vibejax.verifiers.pool import Pool

Record = dict[str, Any]


def completion_texts(record: Record, where: str) -> list[str]:
    """The texts of a record's rollouts.

    Raises:
        InputError: there are none, or one has no text.
    """
    completions = record.get("completions")
    if not isinstance(completions, list) or not completions:
        raise InputError(f"{where}: has neither an 'accuracy' nor 'completions'")
    for number, completion in enumerate(completions, start=1):
        if not isinstance(completion, dict) or not isinstance(completion.get("text"), str):
            raise InputError(f"{where}: completion {number} has no 'text'")
    return [completion["text"] for completion in completions]


def given_accuracy(record: Record, where: str) -> float | None:
    """A record's `accuracy`, None where it has none.

    Raises:
        InputError: it is no number between 0 and 1.
    """
    value = record.get("accuracy")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{where}: accuracy = {value!r:.40}: must be a number between 0 and 1")
    return float(value)


def verdicts(pool: Pool, items: Sequence[tuple[Record, str, str]]) -> list[Verdict]:
    """Verdicts on (record, where, completion).

    Raises:
        InputError: a record has nothing to be verified with.
        VerifierFailure: the verifiers themselves fail too often.
    """
    for number, (record, where, completion) in enumerate(items):
        bare = {name: value for name, value in record.items() if name != "completions"}
        if record.get("reward_model") is not None:  # verl's column, of math problems
            bare |= {"verifier": "math"} | record["reward_model"]
        try:
            pool.submit(number, bare, completion)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
    found = dict(pool.finished())
    return [found[number] for number in range(len(items))]


def accuracy(group: Sequence[Verdict]) -> float | None:
    """The share of a group that is correct, of what could be verified; None if nothing could."""
    scored = [verdict.correct for verdict in group if verdict.scored]
    return sum(scored) / len(scored) if scored else None


def majority(texts: Sequence[str], equal: Callable[[Pairs], list[bool]]) -> tuple[str | None, int]:
    """The answer that most completions give, and how many do.

    A completion without an answer votes for nothing. Two answers with the same most votes are no
    majority.

    Args:
        texts: completions.
        equal: says of pairs of answers whether they are equivalent.

    Returns:
        The first spelling of the answer, None where there is no majority, and its votes.
    """
    answers = [math.extract(text) for text in texts]
    groups = equivalence.clusters(answers, equal)
    most = max(map(len, groups), default=0)
    winners = [answers[group[0]] for group in groups if len(group) == most]
    return (winners[0], most) if len(winners) == 1 else (None, most)
