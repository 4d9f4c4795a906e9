import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from vibejax.losses import long2short

GROUPS = (4, 8)


def test_redistribution_by_hand():
    """1 / length = 1, 1/2, 1/4: mean 7/12, distances 5/12, -1/12, -4/12, divided by 5/12."""
    reward_NG = np.array([[1, 2, 0.5]], np.float32)
    correct_NG, length_NG = np.ones((1, 3), bool), np.array([[1, 2, 4]])
    got_NG = long2short.redistribute(reward_NG, correct_NG, length_NG, strength=0.2)
    assert got_NG.dtype == np.float32
    np.testing.assert_allclose(got_NG, [[1 + 0.2, 2 - 0.04, 0.5 - 0.16]], rtol=1e-6)


def test_incorrect_completions_neither_change_nor_count():
    correct_NG = np.array([[1, 0, 1, 1, 0]], bool)
    reward_NG = np.array([[1, 0, 1, 1, -0.5]], np.float32)
    length_NG = np.array([[4, 1, 2, 1, 9]])
    got_NG = long2short.redistribute(reward_NG, correct_NG, length_NG, strength=0.2)
    np.testing.assert_allclose(got_NG, [[0.84, 0, 0.96, 1.2, -0.5]], rtol=1e-6)


def test_groups_without_a_difference_are_left_alone():
    """Equal lengths, one correct completion, none; three times 1 / 17 is not exactly 3 / 17."""
    reward_NG = np.array([[1, 1, 1, 0.1], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    correct_NG = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    length_NG = np.array([[17, 17, 17, 3], [5, 6, 7, 8], [5, 6, 7, 8]])
    got_NG = long2short.redistribute(reward_NG, correct_NG, length_NG, strength=0.2)
    np.testing.assert_array_equal(got_NG, reward_NG)


def test_one_token_in_65536_is_a_difference():
    correct_NG = np.ones((1, 2), bool)
    length_NG = np.array([[65_535, 65_536]])
    got_NG = long2short.redistribute(
        np.ones((1, 2), np.float32), correct_NG, length_NG, strength=0.2
    )
    np.testing.assert_allclose(got_NG, [[1.2, 0.8]], rtol=1e-6)


@settings(deadline=None, max_examples=100)
@given(
    correct_NG=npst.arrays(bool, GROUPS),
    length_NG=npst.arrays(np.int32, GROUPS, elements=st.integers(1, 65_536)),
    strength=st.floats(0.0, 1.0),
)
def test_groups_keep_their_sum_and_shorter_never_earns_less(correct_NG, length_NG, strength):
    plain_NG = correct_NG.astype(np.float32)
    reward_NG = long2short.redistribute(plain_NG, correct_NG, length_NG, strength=strength)
    np.testing.assert_allclose(reward_NG.sum(1), correct_NG.sum(1), atol=1e-5)
    np.testing.assert_array_equal(reward_NG[~correct_NG], 0.0)
    assert np.all(np.abs(reward_NG - plain_NG) <= strength + 1e-6)
    for reward_G, correct_G, length_G in zip(reward_NG, correct_NG, length_NG, strict=True):
        by_length_G = reward_G[correct_G][np.argsort(length_G[correct_G])]
        assert np.all(np.diff(by_length_G) <= 1e-6), "a longer correct completion earned more"
