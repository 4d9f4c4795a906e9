import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibejax.losses import importance

# One packed row of two completions and padding. Token 0 is a prompt. Ratios pi_trainer /
# pi_sampler: 2, 1/4 in completion 1 (product 1/2, geometric mean 0.71); 4, 2 in completion 2
# (product 8, geometric mean 2.83). Row 2 has the same ids, in another order, and ratio 1.
SEGMENT_BT = jnp.array([[1, 1, 1, 2, 2, 0], [2, 2, 1, 1, 0, 0]])
MASK_BT = jnp.array([[0, 1, 1, 1, 1, 0], [1, 1, 0, 1, 0, 0]], bool)
SAMPLER_BT = jnp.full((2, 6), -2.0)
RATIO_BT = jnp.array([[1e9, 2.0, 0.25, 4.0, 2.0, 1e-9], [1.0, 1.0, 50.0, 1.0, 1.0, 50.0]])
BOUNDS = dict(cap=2.0, low=0.2, high=2.5)

weights = jax.jit(importance.weights, static_argnames="correction")  # one compile a correction


def whole_row(log_ratio, correction, **bounds):
    """The weights of a row that is one completion of equal log-ratios."""
    log_ratio_BT = jnp.full(MASK_BT.shape, log_ratio)
    one_BT = jnp.ones_like(SEGMENT_BT)
    return weights(
        log_ratio_BT, 0 * log_ratio_BT, one_BT, one_BT > 0, correction=correction, **bounds
    )


@pytest.mark.parametrize(
    "correction, want_T",
    [
        ("none", [0, 1, 1, 1, 1, 0]),
        ("token_truncate", [0, 2, 1 / 4, 2, 2, 0]),
        ("token_mask", [0, 2, 1 / 4, 0, 2, 0]),
        ("sequence_truncate", [0, 1 / 2, 1 / 2, 2, 2, 0]),
        ("sequence_mask", [0, 1 / 2, 1 / 2, 0, 0, 0]),
        ("geometric_mask", [0, 2, 1 / 4, 0, 0, 0]),
    ],
)
def test_weights_by_hand(correction, want_T):
    got_BT = weights(
        SAMPLER_BT + jnp.log(RATIO_BT),
        SAMPLER_BT,
        SEGMENT_BT,
        MASK_BT,
        correction=correction,
        **BOUNDS,
    )
    np.testing.assert_allclose(got_BT, [want_T, [1, 1, 0, 1, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("low, high, kept", [(1.0, 1.0, 1.0), (1.1, 2.0, 0.0), (0.5, 0.9, 0.0)])
@pytest.mark.parametrize("correction", ["token_mask", "sequence_mask", "geometric_mask"])
def test_a_mask_keeps_its_edges_and_drops_both_sides(correction, low, high, kept):
    got_BT = whole_row(0.0, correction, cap=2.0, low=low, high=high)
    np.testing.assert_array_equal(got_BT, kept)


def test_masking_by_the_geometric_mean_does_not_shrink_with_length():
    """Six tokens of ratio 1.5: the product, 11.4, is masked away; the mean is not."""
    sequence_BT = whole_row(np.log(1.5), "sequence_mask", **BOUNDS)
    geometric_BT = whole_row(np.log(1.5), "geometric_mask", **BOUNDS)
    np.testing.assert_array_equal(sequence_BT, 0.0)
    np.testing.assert_allclose(geometric_BT, 1.5, rtol=1e-6)


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_truncate"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_log_ratios_are_bounded(correction, sign):
    """Log-ratios of 60 a token, 360 a sequence: clamped to 20, so finite."""
    got_BT = whole_row(sign * 60.0, correction, cap=1e12, low=0.0, high=1.0)
    np.testing.assert_allclose(got_BT, np.exp(sign * 20.0), rtol=1e-5)


def test_every_token_may_be_a_segment_of_its_own():
    ratio_BT = jnp.array([[0.5, 2.0, 1.5, 1.0, 0.3, 1.9]] * 2)
    segment_BT = jnp.array([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
    args = (jnp.log(ratio_BT), jnp.zeros((2, 6)), segment_BT, segment_BT > 0)
    got_BT = weights(*args, correction="sequence_truncate", **BOUNDS)
    np.testing.assert_allclose(got_BT, ratio_BT, rtol=1e-6)


@pytest.mark.parametrize("correction", ["token_truncate", "sequence_mask", "geometric_mask"])
def test_weights_are_constants(correction):
    def total(logprob_BT):
        args = (logprob_BT, SAMPLER_BT, SEGMENT_BT, MASK_BT)
        return jnp.sum(weights(*args, correction=correction, **BOUNDS))

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(SAMPLER_BT + 0.1), 0.0)


def test_agreement_by_hand():
    """Ratios 1, 1.05, 0.8 and 4; k3 of each: r - 1 - ln r."""
    ratio_T = np.array([1.0, 1.05, 0.8, 4.0])
    sampler_T = np.array([-1.0, -2.0, -3.0, -4.0], np.float32)
    got = importance.agreement((sampler_T + np.log(ratio_T)).astype(np.float32), sampler_T, cap=2.0)
    logs = np.log([1.05, 1.25, 4.0])
    want = {
        "agreement/mean_abs_dlogp": logs.sum() / 4,
        "agreement/max_abs_dlogp": np.log(4.0),
        "agreement/kl": ((0.05 - logs[0]) + (-0.2 + logs[1]) + (3 - logs[2])) / 4,
        "agreement/outside_1pct": 3 / 4,
        "agreement/outside_10pct": 2 / 4,
        "agreement/truncated_ratio": 1 / 4,
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_the_agreement_of_parts_is_that_of_all():
    rng = np.random.default_rng(0)
    logprob_T, sampler_T = rng.normal(-2, 0.3, (2, 60)).astype(np.float32)
    cuts = ((0, 7), (7, 7), (7, 60))
    parts = [
        (b - a, importance.agreement(logprob_T[a:b], sampler_T[a:b], cap=2.0) if a < b else {})
        for a, b in cuts
    ]
    got = importance.combined_agreement(parts)
    want = importance.agreement(logprob_T, sampler_T, cap=2.0)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, err_msg=name)
    assert importance.combined_agreement([(0, {})]) == {}


def test_equal_log_probabilities_agree():
    logprob_T = -np.arange(1.0, 5.0, dtype=np.float32)
    assert set(importance.agreement(logprob_T, logprob_T, cap=2.0).values()) == {0.0}
