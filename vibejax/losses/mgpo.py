"""MaxEnt-Guided Policy Optimization (MGPO), the objective of every RL stage.

What is decided once for a whole rollout batch (advantages, prompt weights, per-token weights)
is numpy on the host; what depends on the policy is a function of log-probabilities.

Shape suffixes: N prompts, G completions of a prompt, B rows, T tokens.

Source: VibeThinker-3B technical report, section 2.2.1, equations 1 to 3. D_ME is the binary
relative entropy, as in VibeThinker-1.5B (arXiv:2511.06221), section 3.4. GRPO: arXiv:2402.03300;
clip-high and token mean: DAPO, arXiv:2503.14476; constant: Dr. GRPO, arXiv:2503.20783.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Metrics = dict[str, jax.Array]
Aggregation = Literal["sequence", "token", "constant"]


def prompt_weights(correct_NG: np.ndarray, scored_NG: np.ndarray, *, gamma: float) -> np.ndarray:
    """Weights w(q) = exp(-gamma * D_ME(p(q) || 1/2)), largest where half a group is correct.

    Args:
        correct_NG: [N, G] bool, True where the verifier accepted the completion.
        scored_NG: [N, G] bool, False where the verifier could not say; left out of p(q).
        gamma: sharpness, at least 0; 0 gives exactly 1 and so GRPO.

    Returns:
        [N] float32 in (0, 1].
    """
    count_N = np.maximum(scored_NG.sum(axis=1), 1)
    p_N = (correct_NG & scored_NG).sum(axis=1) / count_N
    distance_N = _relative_entropy(p_N, 0.5) + _relative_entropy(1.0 - p_N, 0.5)  # nats
    return np.exp(-gamma * distance_N).astype(np.float32)


def group_advantages(reward_NG: np.ndarray, scored_NG: np.ndarray) -> np.ndarray:
    """Standardizes rewards within each group; a group of equal rewards gets zeros.

    Args:
        reward_NG: [N, G] float32.
        scored_NG: [N, G] bool; completions that are not scored get 0 and count nowhere.

    Returns:
        [N, G] float32, (r - mean) / std over the group's scored completions.
    """
    reward_NG = reward_NG.astype(np.float64)
    count_N1 = np.maximum(scored_NG.sum(axis=1, keepdims=True), 1)
    mean_N1 = (reward_NG * scored_NG).sum(axis=1, keepdims=True) / count_N1
    centred_NG = (reward_NG - mean_N1) * scored_NG
    std_N1 = np.sqrt((centred_NG**2).sum(axis=1, keepdims=True) / count_N1)
    varies_N1 = std_N1 > 1e-6  # equal rewards: what is left is rounding
    return np.where(varies_N1, centred_NG / np.where(varies_N1, std_N1, 1.0), 0.0).astype(
        np.float32
    )


def token_weights(length_B: np.ndarray, aggregation: Aggregation, *, constant: int) -> np.ndarray:
    """The weight of each token of each completion, such that the loss is a plain weighted sum.

    Fixed from the whole batch before it is cut into rows, micro-batches and devices, so that
    no cut changes the gradient.

    Args:
        length_B: [B] completion tokens.
        aggregation: `sequence` 1 / (B |y|), the mean of the report's J; `token` 1 / sum |y|;
            `constant` 1 / (B `constant`).
        constant: the completion length that `constant` divides by.

    Returns:
        [B] float32.
    """
    length_B = np.maximum(length_B.astype(np.float64), 1)
    if aggregation == "sequence":
        return (1.0 / (len(length_B) * length_B)).astype(np.float32)
    total = length_B.sum() if aggregation == "token" else len(length_B) * constant
    return np.full(len(length_B), 1.0 / total, np.float32)


@jax.named_scope("policy_loss")
def policy_loss(
    logprob_BT: jax.Array,
    old_logprob_BT: jax.Array,
    advantage_BT: jax.Array,
    weight_BT: jax.Array,
    importance_BT: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, Metrics]:
    """Clipped policy-gradient loss: minus the weighted sum of min(rho A, clip(rho) A).

    Args:
        logprob_BT: [B, T] float32, log-probability in nats of each token under the policy.
        old_logprob_BT: [B, T] float32, the same before the first update on this batch; a constant.
        advantage_BT: [B, T] float32, w(q) * A_i of the token's completion; a constant.
        weight_BT: [B, T] float32 from `token_weights`, 0 outside completions.
        importance_BT: [B, T] float32, what the sampler's mismatch multiplies the term with
            (`importance.weights`); a constant.
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.

    Returns:
        The scalar loss (lower is better) and scalar float32 metrics, sums over the tokens.
    """
    log_ratio_BT = jnp.where(weight_BT > 0, logprob_BT - jax.lax.stop_gradient(old_logprob_BT), 0.0)
    ratio_BT = jnp.exp(log_ratio_BT)
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    objective_BT = jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    loss = -jnp.sum(weight_BT * jax.lax.stop_gradient(importance_BT) * objective_BT)
    outside_BT = clipped_BT * advantage_BT < ratio_BT * advantage_BT
    return loss, {
        "policy/loss": loss,
        "policy/clipped_tokens": jnp.sum(outside_BT & (weight_BT > 0), dtype=jnp.float32),
    }


@jax.named_scope("reference_kl")
def reference_kl(
    logprob_BT: jax.Array, reference_logprob_BT: jax.Array, weight_BT: jax.Array
) -> jax.Array:
    """Weighted sum of the k3 estimate of KL(policy || reference), r - 1 - log r.

    Source: GRPO, equation 4; http://joschu.net/blog/kl-approx.html.

    Args:
        logprob_BT: [B, T] float32 under the policy.
        reference_logprob_BT: [B, T] float32 under the frozen reference.
        weight_BT: [B, T] float32 from `token_weights`.

    Returns:
        Scalar float32, at least 0.
    """
    log_ratio_BT = jnp.where(weight_BT > 0, reference_logprob_BT - logprob_BT, 0.0)
    return jnp.sum(weight_BT * (jnp.exp(log_ratio_BT) - 1.0 - log_ratio_BT))


def _relative_entropy(p: np.ndarray, q: float) -> np.ndarray:
    """p log(p / q), with 0 log 0 = 0."""
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0) / q), 0.0)
