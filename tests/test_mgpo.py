import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibejax.losses import long2short, mgpo


def all_scored(correct_NG):
    return np.ones_like(correct_NG, bool)


@jax.jit
def loss_and_gradient(*args):
    """((loss, metrics), gradient with respect to the log-probabilities), clipped to 0.8, 1.28."""
    return jax.value_and_grad(mgpo.policy_loss, has_aux=True)(*args, clip_low=0.2, clip_high=0.28)


@pytest.mark.parametrize(
    "correct, gamma, want",
    [
        ([1, 1, 1, 1], 2.0, 1 / 4),  # D_ME = ln 2, exp(-2 ln 2)
        ([0, 0, 0, 0], 2.0, 1 / 4),
        ([1, 0, 1, 0], 2.0, 1.0),  # D_ME = 0
        ([1, 0, 0, 0], 1.0, 2**0.25 * (2 / 3) ** 0.75),  # D_ME = ln(1/2) / 4 + 3 ln(3/2) / 4
        ([1, 0, 0, 0], 0.0, 1.0),
    ],
)
def test_prompt_weight_by_hand(correct, gamma, want):
    correct_NG = np.array([correct], bool)
    weight_N = mgpo.prompt_weights(correct_NG, all_scored(correct_NG), gamma=gamma)
    assert weight_N.dtype == np.float32
    np.testing.assert_allclose(weight_N, [want], rtol=1e-6)


def test_prompt_weight_counts_scored_completions_only():
    correct_NG = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]], bool)
    scored_NG = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    weight_N = mgpo.prompt_weights(correct_NG, scored_NG, gamma=2.0)
    np.testing.assert_allclose(weight_N, [1 / 4, 1.0, 1 / 4], rtol=1e-6)  # p = 2/2, 1/2, none


def test_group_advantages_by_hand():
    reward_NG = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0.1] * 4], np.float32)
    advantage_NG = mgpo.group_advantages(reward_NG, all_scored(reward_NG))
    third = 3**-0.5  # mean 3/4, std sqrt(3)/4: (1/4) / std and (-3/4) / std
    want_NG = [[1, -1, 1, -1], [third, third, third, -(3**0.5)], [0] * 4, [0] * 4]
    assert advantage_NG.dtype == np.float32
    np.testing.assert_allclose(advantage_NG, want_NG, rtol=1e-6)


def test_unscored_completions_count_nowhere():
    reward_NG = np.array([[1, 0, 1, 9], [1, 9, 9, 9], [9, 9, 9, 9]], np.float32)
    scored_NG = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    advantage_NG = mgpo.group_advantages(reward_NG, scored_NG)
    np.testing.assert_array_equal(advantage_NG, [[1, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_token_weights_by_hand():
    length_B = np.array([1, 3])
    sequence_B = mgpo.token_weights(length_B, "sequence", constant=10)
    np.testing.assert_allclose(sequence_B, [1 / 2, 1 / 6], rtol=1e-7)
    np.testing.assert_allclose(mgpo.token_weights(length_B, "token", constant=10), [1 / 4, 1 / 4])
    constant_B = mgpo.token_weights(length_B, "constant", constant=10)
    np.testing.assert_allclose(constant_B, [1 / 20, 1 / 20], rtol=1e-7)


def test_aggregations_by_hand():
    """On policy the loss is minus the aggregated advantage; A = 2 on 1 token, -1 on 3 tokens."""
    zero_BT = jnp.zeros((2, 3))
    advantage_BT = jnp.array([[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]])
    mask_BT = np.array([[1, 0, 0], [1, 1, 1]])
    want = {
        "sequence": -(2 - 1) / 2,  # each completion's mean, then the mean of both
        "token": -(2 - 3) / 4,  # 4 tokens
        "constant": -(2 - 3) / (2 * 10),
    }
    for aggregation, loss in want.items():
        weight_B = mgpo.token_weights(mask_BT.sum(axis=1), aggregation, constant=10)
        weight_BT = jnp.asarray(mask_BT * weight_B[:, None])
        args = (zero_BT, zero_BT, advantage_BT, weight_BT, jnp.ones((2, 3)))
        (got, _), _ = loss_and_gradient(*args)
        np.testing.assert_allclose(got, loss, rtol=1e-6)


def test_policy_loss_and_gradient_by_hand():
    """Ratios 3/2, 1/2 and 1 with A = 2 and A = -2; clipped they are 1.28, 0.8 and 1.

    objective: A > 0: min(3, 2.56), min(1, 1.6), 2; A < 0: min(-3, -2.56), min(-1, -1.6), -2.
    Where the clipped one is taken the gradient is 0, elsewhere it is minus the objective.
    """
    ratio_BT = np.array([[1.5, 0.5, 1.0], [1.5, 0.5, 1.0]])
    advantage_BT = jnp.array([[2.0] * 3, [-2.0] * 3])
    old_BT = jnp.full((2, 3), -1.0)
    logprob_BT = old_BT + jnp.log(ratio_BT)
    weight_BT = jnp.array([[0.25] * 3, [0.5] * 3])
    importance_BT = jnp.array([[1.0, 1.0, 2.0], [1.0, 1.0, 0.5]])
    (loss, metrics), grad_BT = loss_and_gradient(
        logprob_BT, old_BT, advantage_BT, weight_BT, importance_BT
    )
    want = -0.25 * (2.56 + 1.0 + 2 * 2.0) - 0.5 * (-3.0 - 1.6 + 0.5 * -2.0)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/loss"], want, rtol=1e-6)
    assert metrics["policy/clipped_tokens"] == 2
    want_BT = [[0, -0.25 * 1.0, -0.25 * 2 * 2.0], [0.5 * 3.0, 0, 0.5 * 0.5 * 2.0]]
    np.testing.assert_allclose(grad_BT, want_BT, rtol=1e-6)


def test_only_the_policy_gets_a_gradient():
    args = [jnp.full((2, 3), x) for x in (-1.0, -1.1, 1.0, 0.5, 0.9)]
    others = jax.jit(jax.grad(lambda *args: loss_and_gradient(*args)[0][0], argnums=(1, 4)))
    old_BT, importance_BT = others(*args)
    np.testing.assert_array_equal(old_BT, 0.0)
    np.testing.assert_array_equal(importance_BT, 0.0)


def test_tokens_without_weight_do_not_matter():
    """A token of weight 0 may hold anything: no value, no gradient, no metric comes from it."""
    weight_BT = jnp.array([[0.5, 0.0, 0.0]])
    one_BT = jnp.ones((1, 3))
    logprob_BT = jnp.array([[-1.0, 500.0, jnp.nan]])
    old_BT = jnp.array([[-1.0, -500.0, 0.0]])
    (loss, metrics), grad_BT = loss_and_gradient(logprob_BT, old_BT, one_BT, weight_BT, one_BT)
    assert loss == -0.5
    assert metrics["policy/clipped_tokens"] == 0
    np.testing.assert_array_equal(grad_BT, [[-0.5, 0.0, 0.0]])


def test_gamma_zero_is_grpo_to_the_bit():
    """With gamma = 0 loss and gradient are those of the unweighted advantages, and of GRPO."""
    random = np.random.default_rng(0)
    N, G, T = 3, 4, 5
    correct_NG = random.random((N, G)) < 0.5
    scored_NG = all_scored(correct_NG)
    advantage_NG = mgpo.group_advantages(correct_NG.astype(np.float32), scored_NG)
    weighted_NG = advantage_NG * mgpo.prompt_weights(correct_NG, scored_NG, gamma=0.0)[:, None]
    length_B = random.integers(1, T + 1, N * G)
    mask_BT = np.arange(T) < length_B[:, None]
    weight_BT = mask_BT * mgpo.token_weights(length_B, "sequence", constant=T)[:, None]
    old_BT = -random.random((N * G, T), np.float32)
    logprob_BT = old_BT + 0.5 * random.standard_normal((N * G, T), np.float32)
    ones_BT = jnp.ones((N * G, T))

    def run(advantage_NG):
        advantage_BT = jnp.asarray(np.repeat(advantage_NG.reshape(-1, 1), T, axis=1))
        args = map(jnp.asarray, (logprob_BT, old_BT, advantage_BT, weight_BT))
        return loss_and_gradient(*args, ones_BT)

    ((loss, _), grad_BT), ((grpo_loss, _), grpo_grad_BT) = run(weighted_NG), run(advantage_NG)
    np.testing.assert_array_equal(loss, grpo_loss)
    np.testing.assert_array_equal(grad_BT, grpo_grad_BT)

    want = 0.0  # GRPO, equation 3 without its KL term, as written
    for n in range(N):
        reward_G = correct_NG[n].astype(float)
        for g in range(G):
            advantage = (reward_G[g] - reward_G.mean()) / (reward_G.std() or 1.0)
            b = n * G + g
            ratio_T = np.exp(logprob_BT[b].astype(float) - old_BT[b])[: length_B[b]]
            clipped_T = np.clip(ratio_T, 1 - 0.2, 1 + 0.28)
            want -= np.minimum(ratio_T * advantage, clipped_T * advantage).mean() / (N * G)
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_any_split_of_the_rows_sums_to_the_same_gradient():
    random = np.random.default_rng(1)
    args = [random.standard_normal((6, 4), np.float32) for _ in range(3)]
    args += [random.random((6, 4), np.float32) for _ in range(2)]
    _, whole_BT = loss_and_gradient(*args)
    parts = [loss_and_gradient(*(x[b : b + 2] for x in args))[1] for b in range(0, 6, 2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole_BT)


def test_long2short_enters_the_gradient_by_hand():
    """Three correct completions of 1, 2 and 4 tokens, gamma = 2, strength 0.2.

    p counts the binary verdicts, so p = 1 and w = 1/4. Rewards 1.2, 0.96, 0.84 have mean 1 and
    variance (0.04 + 0.0016 + 0.0256) / 3 = 0.0224. On policy, each token's gradient is
    -w A / (3 |y|).
    """
    correct_NG = np.ones((1, 3), bool)
    length_NG = np.array([[1, 2, 4]])
    reward_NG = long2short.redistribute(
        correct_NG.astype(np.float32), correct_NG, length_NG, strength=0.2
    )
    advantage_NG = mgpo.group_advantages(reward_NG, correct_NG)
    advantage_NG *= mgpo.prompt_weights(correct_NG, correct_NG, gamma=2.0)[:, None]
    weight_B = mgpo.token_weights(length_NG[0], "sequence", constant=4)
    mask_BT = np.arange(4) < length_NG[0][:, None]
    std = 0.0224**0.5
    want_B = np.array([-0.25 * 0.2 / 3, 0.25 * 0.04 / 6, 0.25 * 0.16 / 12]) / std
    zero_BT = jnp.zeros((3, 4))
    _, got_BT = loss_and_gradient(
        zero_BT,
        zero_BT,
        jnp.asarray(advantage_NG[0][:, None] * mask_BT),
        jnp.asarray(weight_B[:, None] * mask_BT),
        jnp.ones((3, 4)),
    )
    np.testing.assert_allclose(got_BT, want_B[:, None] * mask_BT, rtol=1e-5)


def test_reference_kl_by_hand():
    """pi_ref = 2 pi: r - 1 - ln r = 1 - ln 2, and its derivative by log pi is 1 - r = -1."""
    logprob_BT = jnp.array([[-1.0, -1.0, -1.0]])
    reference_BT = logprob_BT + jnp.array([[np.log(2), 0.0, 1e3]], jnp.float32)  # e^1000: inf
    weight_BT = jnp.array([[0.5, 0.5, 0.0]])
    kl_and_gradient = jax.jit(jax.value_and_grad(mgpo.reference_kl))
    kl, grad_BT = kl_and_gradient(logprob_BT, reference_BT, weight_BT)
    np.testing.assert_allclose(kl, 0.5 * (1 - np.log(2)), rtol=1e-6)
    np.testing.assert_allclose(grad_BT, [[-0.5, 0.0, 0.0]], atol=1e-7)
