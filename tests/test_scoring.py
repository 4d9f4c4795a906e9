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


def test_k_beyond_the_completions_is_an_error():
    with pytest.raises(ValueError, match="k = 3: must be between 1 and the 2"):
        scoring.pass_at_k(np.ones((4, 2), bool), 3)


def test_bootstrap_interval_is_that_of_a_mean():
    value_N = np.random.default_rng(0).random(400)
    low, high = scoring.bootstrap_interval(value_N)
    half = 1.96 * value_N.std() / 20
    np.testing.assert_allclose([low, high], value_N.mean() + np.array([-half, half]), atol=3e-3)
