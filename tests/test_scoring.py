import itertools

import numpy as np
import pytest

from vibejax import scoring


def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_one():
    correct_NG = np.array([[True, False, False, True], [False] * 4, [True] * 4])
    for k in range(1, 5):
        draws = [
            np.mean([any(row[list(c)]) for c in itertools.combinations(range(4), k)])
            for row in correct_NG
        ]
        np.testing.assert_allclose(scoring.pass_at_k(correct_NG, k), np.mean(draws))


def test_pass_at_1_is_the_mean():
    correct_NG = np.random.default_rng(0).random((50, 8)) < 0.3
    np.testing.assert_allclose(scoring.pass_at_k(correct_NG, 1), correct_NG.mean())


def test_pass_curves_by_hand():
    value_NK = scoring.pass_curves(np.array([0, 1, 2, 4]), 4)
    want_NK = [[0, 0, 0, 0], [1 / 4, 2 / 4, 3 / 4, 1], [1 / 2, 5 / 6, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_allclose(value_NK, want_NK, atol=1e-15)
    # C(999, k) / C(1000, k) = 1 - k / 1000, though neither fits a float64
    value_K = scoring.pass_curves(np.array([1]), 1_000)[0]
    np.testing.assert_allclose(value_K, np.arange(1, 1_001) / 1_000, atol=1e-12)


def test_k_beyond_the_completions_is_an_error():
    with pytest.raises(ValueError, match="k = 3: must be between 1 and the 2"):
        scoring.pass_at_k(np.ones((4, 2), bool), 3)


def test_bootstrap_interval_is_that_of_a_mean():
    value_N = np.random.default_rng(0).random(400)
    low, high = scoring.bootstrap_interval(value_N)
    half = 1.96 * value_N.std() / 20
    np.testing.assert_allclose([low, high], value_N.mean() + np.array([-half, half]), atol=3e-3)


@pytest.mark.parametrize(
    "clusters, want",
    [
        ([[0, 2], [1], [3]], 1.0),  # the largest is right
        ([[0], [1, 3], [2]], 0.0),
        ([[0, 2], [1, 3]], 0.5),  # a tie: either, by lot
        ([[0], [1], [2], [3]], 0.5),
        ([[0], [1]], 0.5),  # two completions do not answer
        ([[0, 1, 2]], 2 / 3),  # verdicts that differ within a cluster
        ([], 0.0),
    ],
)
def test_majority_score_by_hand(clusters, want):
    correct_G = np.array([True, False, True, False])
    np.testing.assert_allclose(scoring.majority_score(clusters, correct_G), want)


def test_majority_score_of_two_answers_is_a_vote():
    """Of n completions with one of two answers, the vote is the sign of the count."""
    for right in range(6):
        correct_G = np.arange(5) < right
        clusters = [c for c in (np.flatnonzero(correct_G), np.flatnonzero(~correct_G)) if len(c)]
        assert scoring.majority_score(clusters, correct_G) == float(right > 2)


def test_held_out_metrics_tell_what_was_not_verified():
    correct_NG = np.array([[True, False], [False, False]])
    scored_NG = np.array([[True, True], [True, False]])
    found = scoring.heldout_metrics(correct_NG, scored_NG, np.full((2, 2), 3), ~scored_NG)
    assert (found["heldout/pass@1"], found["heldout/unscored"]) == (0.25, 0.25)
