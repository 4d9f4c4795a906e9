"""Which completions of a prompt give the same answer, by the math verifier's equivalence."""

from collections.abc import Callable, Sequence
from typing import Any

from vibejax.verifiers.pool import Pool

Pairs = Sequence[tuple[str, str]]


def clusters(
    answers: Sequence[str | None], equal: Callable[[Pairs], list[bool]]
) -> list[list[int]]:
    """The completions of a prompt by what they answer.

    Equivalence is asked of the first spelling of each answer, so that a chain of answers, each
    like the one before, does not become one.

    Args:
        answers: of each completion; one without an answer stands in no cluster.
        equal: says of pairs of answers whether they are equivalent.

    Returns:
        Places in `answers`, in the order of each cluster's first.
    """
    found: dict[str, list[int]] = {}  # by first spelling
    first: dict[str, str] = {}  # spelling -> the first that it is equivalent to
    for place, answer in enumerate(answers):
        if not answer:
            continue
        if answer not in first:
            known = list(found)
            same = equal([(other, answer) for other in known])
            first[answer] = next((k for k, e in zip(known, same, strict=True) if e), answer)
        found.setdefault(first[answer], []).append(place)
    return list(found.values())


def equal_answers(pool: Pool, pairs: Pairs) -> list[bool]:
    """Whether answers are equivalent, by the math verifier, in its processes."""
    items: list[tuple[dict[str, Any], str]] = [
        ({"verifier": "math", "ground_truth": first}, rf"\boxed{{{second}}}")
        for first, second in pairs
    ]
    return [verdict.correct for verdict in pool.verify(items)]
