"""Which answers of a prompt's completions are one and the same, by the math verifier."""

from collections.abc import Callable, Sequence
from typing import Any

from vibejax.verifiers.pool import Pool

Pairs = Sequence[tuple[str, str]]


def clusters(
    answers: Sequence[str | None], equal: Callable[[Pairs], list[bool]]
) -> list[list[int]]:
    """Groups answers that say the same.

    Each answer is compared with the first of every group there is, and joins the first that it
    equals; the same text is compared once.

    Args:
        answers: of the completions; one that is None or empty joins no group.
        equal: says of pairs of answers whether they are equivalent.

    Returns:
        The places of each group's answers, groups in the order of their first.
    """
    groups: list[list[int]] = []
    group_of: dict[str, list[int]] = {}
    for place, answer in enumerate(answers):
        if not answer:
            continue
        if answer not in group_of:
            same = equal([(str(answers[group[0]]), answer) for group in groups])
            group = next((g for g, e in zip(groups, same, strict=True) if e), None)
            if group is None:
                groups.append(group := [])
            group_of[answer] = group
        group_of[answer].append(place)
    return groups


def equal_answers(pool: Pool, pairs: Pairs) -> list[bool]:
    """Whether answers are equivalent, by the math verifier, in its processes."""
    items: list[tuple[dict[str, Any], str]] = [
        ({"verifier": "math", "ground_truth": first}, rf"\boxed{{{second}}}")
        for first, second in pairs
    ]
    return [verdict.correct for verdict in pool.verify(items)]
