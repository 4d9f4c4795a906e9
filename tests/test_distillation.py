"""The score of a trace and the choice inside cells, on numbers worked out by hand."""

import numpy as np

from vibejax.losses import distillation
from vibejax.losses.distillation import Fate

RULES = {"min_cell": 2, "deviations": 5.0, "low": 0.5, "high": 0.9}


def test_learning_potential_is_the_mean_over_the_trace_alone():
    logprob_T = np.array([0, -9, -1, -2, -3], np.float32)  # a prompt of two tokens
    learnt_T = np.array([False, False, True, True, True])
    assert distillation.learning_potential(logprob_T, learnt_T) == 2.0


def test_twelve_traces_by_hand():
    """Median, MAD and quantiles of each cell are in the comments; bounds are 0.5 and 0.9."""
    length_B = np.array([5, 20, 30, 40, 50, 60, 200, 300, 400, 500, 600, 5_000])
    score_B = np.array([9, 0.8, 0.2, 9, 0.6, 0.4, 1.0, 1.8, 1.4, 1.6, 1.2, 2.0])
    short_B = distillation.too_short(length_B, min_tokens=10, quantile=0.0)
    assert short_B.tolist() == [True] + [False] * 11
    bucket_B = distillation.buckets(length_B, [100, 1_000])
    assert bucket_B.tolist() == [0] * 6 + [1] * 5 + [2]
    fate_B = distillation.select(score_B[1:], bucket_B[1:], **RULES)
    assert fate_B.tolist() == [
        # 0.6, MAD 0.2: above 1.6 is an outlier; of 0.2 0.4 0.6 0.8 the quantiles are 0.5 and 0.74
        Fate.ABOVE, Fate.BELOW, Fate.OUTLIER, Fate.CHOSEN, Fate.BELOW,
        # 1.4, MAD 0.2: above 2.4 nothing; the quantiles are 1.4 and 1.72
        Fate.BELOW, Fate.ABOVE, Fate.CHOSEN, Fate.CHOSEN, Fate.BELOW,
        # one trace does not rank
        Fate.SPARSE,
    ]  # fmt: skip


def test_a_cell_is_judged_by_its_own_scores():
    rng = np.random.default_rng(0)
    score_B, bucket_B = rng.integers(0, 40, 200).astype(float), rng.integers(0, 4, 200)
    fate_B = distillation.select(score_B, bucket_B, **RULES)
    assert {*fate_B} == {Fate.CHOSEN, Fate.BELOW, Fate.ABOVE}
    moved_B = score_B + 1_000 * (bucket_B == 2)
    assert (distillation.select(moved_B, bucket_B, **RULES) == fate_B).all()
    order = rng.permutation(200)
    assert (distillation.select(score_B[order], bucket_B[order], **RULES) == fate_B[order]).all()


def test_most_scores_equal_make_no_outliers():
    fate_B = distillation.select(np.array([1, 1, 1, 1, 5.0]), np.zeros(5, int), **RULES)
    assert Fate.OUTLIER not in fate_B


def test_the_shortest_share_goes_and_equal_lengths_stay_together():
    length_B = np.array([3, 1, 2, 4, 5, 6, 7, 8, 9, 10])
    short_B = distillation.too_short(length_B, min_tokens=0, quantile=0.25)
    assert length_B[short_B].tolist() == [1, 2]
    assert not distillation.too_short(np.full(10, 7), min_tokens=7, quantile=0.25).any()
    assert not distillation.too_short(np.arange(1, 12), min_tokens=0, quantile=0.05).any()


def test_an_edge_begins_its_bucket():
    assert distillation.buckets([9, 10, 19, 20], [10, 20]).tolist() == [0, 1, 1, 2]
    assert distillation.buckets([1, 99], []).tolist() == [0, 0]


def test_mix_by_hand():
    """Six of the second are three quarters of eight; every domain keeps one."""
    mixed = distillation.mix(np.array([10, 6]), np.array([1.0, 3.0]))
    assert mixed.tolist() == [2, 6]
    assert distillation.mix(np.array([30, 30]), np.array([0.1, 0.2])).tolist() == [15, 30]
    assert distillation.mix(np.array([1_000, 1]), np.array([1.0, 999.0])).tolist() == [1, 1]


def test_the_domain_that_is_short_keeps_all():
    """Whatever is lost in c / s * s."""
    for count in range(1, 200):
        for share in (1.0, 3.0, 7.0):
            chosen_D, share_D = np.array([count, 10_000]), np.array([share, 3.0])
            assert distillation.mix(chosen_D, share_D)[0] == count
