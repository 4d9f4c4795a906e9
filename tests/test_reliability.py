"""CLR's formulas, worked out by hand."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vibejax import reliability

T, F, UNREAD = True, False, None


@pytest.mark.parametrize(
    "holds, expected",
    [
        ([T, T, T, T, T], 1),
        ([T, T, T, T, F], Fraction(1024, 3125)),  # (4/5)^5 = 0.32768
        ([F, T, T, F, T], Fraction(243, 3125)),  # (3/5)^5 = 0.07776
        ([F, F, F, F, F], 0),
        ([T, T, T, T, UNREAD], Fraction(1024, 3125)),  # no verdict that it holds
        ([T], Fraction(1, 3125)),  # one of five claims was made: (1/5)^5
        ([], 0),
    ],
)
def test_reliability_of_five_claims(holds, expected):
    assert reliability.reliability(holds, 5) == expected


@pytest.mark.parametrize("holds, claims", [([], 0), ([T, T, T], 2)])
def test_more_verdicts_than_claims_are_refused(holds, claims):
    with pytest.raises(ValueError, match=f"claims = {claims}: must be at least"):
        reliability.reliability(holds, claims)


def test_one_sure_completion_outvotes_two_doubtful_ones():
    """K = 3, M = 5: 2 * (3/5)^5 = 0.15552 is below (4/5)^5 = 0.32768."""
    r_K = [reliability.reliability([T] * held + [F] * (5 - held), 5) for held in (3, 4, 3)]
    assert reliability.scores([[0, 2], [1]], r_K) == [Fraction(486, 3125), Fraction(1024, 3125)]
    assert reliability.vote([[0, 2], [1]], r_K) == 1
    assert reliability.majority([[0, 2], [1]]) == 0


def test_equal_scores_go_to_the_larger_cluster_and_then_to_the_first():
    half = Fraction(1, 2)
    assert reliability.vote([[0], [1, 2]], [Fraction(1), half, half]) == 1
    assert reliability.vote([[0], [1]], [half, half]) == 0
    # In floats, 0.1 + 0.2 is above 0.3.
    tenths = [Fraction(n, 10) for n in (3, 1, 2)]
    assert reliability.vote([[0, 3], [1, 2]], [*tenths, Fraction(0)]) == 0


def test_where_nothing_is_reliable_the_majority_wins():
    assert reliability.vote([[0], [1, 3], [2, 4]], [Fraction(0)] * 5) == 1


def test_without_an_answer_nothing_wins():
    assert reliability.vote([], [Fraction(1)] * 3) is None
    assert reliability.majority([]) is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.fractions(Fraction(1, 9), 1))
def test_the_vote_of_completions_alike_is_the_majority(answers, r):
    clusters = [[k for k, a in enumerate(answers) if a == b] for b in dict.fromkeys(answers)]
    assert reliability.vote(clusters, [r] * len(answers)) == reliability.majority(clusters)
