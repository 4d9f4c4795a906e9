"""Offline self-distillation: the learning potential of traces, and which of them are learnt.

A trace is a verified completion of a teacher. Traces are compared inside a cell only, that is one
domain and one bucket of lengths: what a student finds hard differs by domain, and long traces hold
more tokens that are easy to foresee.

Shape suffixes: T tokens, B traces of one domain, D domains. Host arrays, like all that is decided
once for a whole set.

Source: VibeThinker-3B technical report (arXiv 2606.16140), section 2.3. It gives the score, the
cells, and that extremely short traces and extreme high scores go and the middle to high range
stays; bucket edges, bounds and the mix are not published. The rules below are ours.
"""

import enum
from collections.abc import Sequence

import numpy as np


class Fate(enum.StrEnum):
    """What becomes of an accepted trace, in the order in which it is decided."""

    TOO_SHORT = "too_short"  # not scored
    UNFIT = "unfit"  # the student cannot read it as a document
    SPARSE = "sparse"  # in a cell of too few to rank
    OUTLIER = "outlier"
    BELOW = "below"
    ABOVE = "above"
    SURPLUS = "surplus"  # beyond its domain's share
    CHOSEN = "chosen"


def learning_potential(logprob_T: np.ndarray, learnt_T: np.ndarray) -> float:
    """S_LP(q, y) = -(1 / |y|) sum_t log pi_student(y_t | q, y_<t).

    Args:
        logprob_T: [T] float, nats, the student's, of each token of prompt q and trace y.
        learnt_T: [T] bool, True on y, at least once.

    Returns:
        Mean nats of a token of the trace, what SFT's loss on it would be at first.
    """
    return -float(logprob_T[learnt_T].mean(dtype=np.float64))


def too_short(length_B: np.ndarray, *, min_tokens: int, quantile: float) -> np.ndarray:
    """Which traces of a domain are extremely short, so that their mean is over too few tokens.

    Args:
        length_B: [B] int, tokens.
        min_tokens: shorter ones are.
        quantile: at most this share of the domain, its shortest, are as well; equally long ones
            stay together.

    Returns:
        [B] bool.
    """
    if not len(length_B):
        return np.zeros(0, bool)
    return length_B < max(min_tokens, np.quantile(length_B, quantile, method="lower"))


def buckets(length_B: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """[B] int, the length bucket of each trace: i holds edges[i - 1] <= length < edges[i]."""
    return np.searchsorted(edges, length_B, side="right")


def select(
    score_B: np.ndarray,
    bucket_B: np.ndarray,
    *,
    min_cell: int,
    deviations: float,
    low: float,
    high: float,
) -> np.ndarray:
    """What becomes of the scored traces of a domain, each among those of its own cell.

    A score is an outlier above median + deviations * MAD of its cell, MAD the median distance
    from the median; half of the scores can be anything without moving either. Where more than half
    are equal, MAD is 0 and nothing is an outlier. Of the others, those between two quantiles
    of theirs are chosen, both ends included.

    Args:
        score_B: [B] float, nats.
        bucket_B: [B] int, the cell.
        min_cell: traces that a cell must have to be ranked; those of a smaller one are left out.
        deviations: the outliers' bound; 5 is 3.4 standard deviations of normal scores.
        low: quantile from which traces are chosen.
        high: quantile up to which they are.

    Returns:
        [B] `Fate`: SPARSE, OUTLIER, BELOW, ABOVE or CHOSEN.
    """
    fate_B = np.full(len(score_B), Fate.CHOSEN, object)
    for bucket in np.unique(bucket_B):
        cell_B = bucket_B == bucket
        if cell_B.sum() < min_cell:
            fate_B[cell_B] = Fate.SPARSE
            continue
        median = np.median(score_B[cell_B])
        spread = np.median(np.abs(score_B[cell_B] - median))
        outlier_B = cell_B & (score_B > median + deviations * spread) & (spread > 0)
        ranked_B = cell_B & ~outlier_B
        least, most = np.quantile(score_B[ranked_B], [low, high])
        fate_B[outlier_B] = Fate.OUTLIER
        fate_B[ranked_B & (score_B < least)] = Fate.BELOW
        fate_B[ranked_B & (score_B > most)] = Fate.ABOVE
    return fate_B


def mix(chosen_D: np.ndarray, share_D: np.ndarray) -> np.ndarray:
    """How many traces of each domain make the largest set of the given shares.

    Args:
        chosen_D: [D] int, traces that there are, at least one of each.
        share_D: [D] float above 0, relative to each other.

    Returns:
        [D] int, at least one of each; the domain that is short keeps all.
    """
    share_D = share_D / share_D.sum()
    total = (chosen_D / share_D).min()
    return np.maximum(np.floor(total * share_D + 1e-9).astype(int), 1)
