"""CLR's formulas: how far a completion is to be trusted, and which answer wins by that.

All in exact fractions, so that scores that are equal are no different by rounding.

Source: VibeThinker-3B technical report, section 3.1, claim-level reliability, equations 5 and 6.
K completions of a prompt, M claims of each, verdict v_km = 1 where claim m of completion k held.
"""

from collections.abc import Sequence
from fractions import Fraction


def reliability(holds: Sequence[bool | None], claims: int) -> Fraction:
    """How far a completion is to be trusted: r_k = (mean_m v_km)^M (equation 5).

    Only what was looked at and held counts. A verdict that could not be read is no verdict that
    the claim holds; and where fewer than M claims were made the missing ones count as fallen: by
    the mean over those that were made, one claim that says nothing would outdo five that say
    much. So a completion of which no claim could be read has r_k = 0.

    Args:
        holds: the verdicts v_k1, v_k2, ...: True, False, or None where it could not be read.
        claims: M, how many claims were asked for.

    Raises:
        ValueError: there are more verdicts than claims, or no claims.
    """
    if claims < max(1, len(holds)):
        raise ValueError(f"claims = {claims}: must be at least {max(1, len(holds))}")
    return Fraction(sum(verdict is True for verdict in holds), claims) ** claims


def scores(clusters: Sequence[Sequence[int]], reliability_K: Sequence[Fraction]) -> list[Fraction]:
    """The score of each answer: the sum of r_k over the completions that give it (equation 6).

    Args:
        clusters: the places k of the completions of each answer; who gives none is in no cluster.
        reliability_K: [K] r_k.
    """
    return [sum((reliability_K[k] for k in cluster), Fraction(0)) for cluster in clusters]


def vote(clusters: Sequence[Sequence[int]], reliability_K: Sequence[Fraction]) -> int | None:
    """The answer with the highest score (equation 6: answer = argmax Score).

    Of equal scores the one that more completions give wins: with all r_k = 0, or all alike, this
    is the plain majority, which needs no claims. Of equals in that too the first wins: the draws
    are exchangeable, so the first is as good as any.

    Args:
        clusters: as for `scores`, in the order of their first completions.
        reliability_K: [K] r_k.

    Returns:
        The place of the winning cluster, None where there is none.
    """
    score = scores(clusters, reliability_K)
    return max(
        range(len(clusters)), key=lambda c: (score[c], len(clusters[c])), default=None
    )  # of equals, max takes the first


def majority(clusters: Sequence[Sequence[int]]) -> int | None:
    """The answer that most completions give, the first of equals; as `vote` with r_k = 1."""
    return max(range(len(clusters)), key=lambda c: len(clusters[c]), default=None)
