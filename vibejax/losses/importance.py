"""What the sampler's log-probabilities differ from the trainer's: weights against it, and metrics.

The sampler and the trainer compute the same policy with other shapes and, on an accelerator,
other rounding. Each token's policy-gradient term is multiplied by a constant that corrects for
that, and every step reports how large the difference is.

Shape suffixes: B rows, T tokens.

Source: VibeThinker-3B report, section 2.2.1; token-level truncated importance sampling, Yao et
al. 2025; sequence-level forms and masking, Fang & Khazi 2025.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Correction = Literal[
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_mask",
    "none",
]
LOG_RATIO_BOUND = 20.0  # a sequence's summed log-ratio is clamped to it


def of_one_token(correction: Correction) -> bool:
    """Whether a token's weight depends on that token alone."""
    return correction in ("token_truncate", "token_mask", "none")


@jax.named_scope("importance")
def weights(
    old_logprob_BT: jax.Array,
    sampler_logprob_BT: jax.Array,
    segment_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    correction: Correction,
    cap: float,
    low: float,
    high: float,
) -> jax.Array:
    """The factor on each token's policy-gradient term; a constant to differentiation.

    With r = pi_trainer / pi_sampler of a token, or of its completion (product), or the geometric
    mean over its completion: `*_truncate` gives min(r, cap), `*_mask` gives r inside [low, high]
    and 0 outside, and `geometric_mask` the token's own r where the completion's mean is inside.

    Args:
        old_logprob_BT: [B, T] float32 under the trainer, before the first update on the batch.
        sampler_logprob_BT: [B, T] float32 as sampled.
        segment_BT: [B, T] int32, which completion of the row a token belongs to.
        mask_BT: [B, T] bool, completion tokens.
        correction: which of the above; `none` gives 1.
        cap: C; the report uses 2.
        low: lower edge of what masking keeps.
        high: upper edge of what masking keeps.

    Returns:
        [B, T] float32, 0 outside `mask_BT`.
    """
    delta_BT = jnp.where(mask_BT, jax.lax.stop_gradient(old_logprob_BT) - sampler_logprob_BT, 0.0)
    ratio_BT = jnp.exp(jnp.clip(delta_BT, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    if correction == "none":
        weight_BT = jnp.ones_like(ratio_BT)
    elif correction == "token_truncate":
        weight_BT = jnp.minimum(ratio_BT, cap)
    elif correction == "token_mask":
        weight_BT = _inside(ratio_BT, low, high) * ratio_BT
    else:
        total_BT = _segment_sums(delta_BT, segment_BT)
        if correction == "geometric_mask":
            length_BT = jnp.maximum(_segment_sums(mask_BT.astype(jnp.float32), segment_BT), 1.0)
            weight_BT = _inside(jnp.exp(total_BT / length_BT), low, high) * ratio_BT
        else:
            product_BT = jnp.exp(jnp.clip(total_BT, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
            if correction == "sequence_truncate":
                weight_BT = jnp.minimum(product_BT, cap)
            else:
                weight_BT = _inside(product_BT, low, high) * product_BT
    return jnp.where(mask_BT, weight_BT, 0.0)


def agreement(logprob_T: np.ndarray, sampler_logprob_T: np.ndarray, *, cap: float) -> dict:
    """How far trainer and sampler are apart on the sampled tokens of a step.

    Args:
        logprob_T: [T] float32 under the trainer, of all completion tokens of the step.
        sampler_logprob_T: [T] float32 as sampled.
        cap: the truncation of the importance weight, whose share of tokens is reported.

    Returns:
        Metrics: mean and largest |difference| in nats, the k3 estimate of KL(sampler || trainer),
        and the shares of tokens whose ratio is outside [0.99, 1.01], outside [0.9, 1.1] and
        above `cap`.
    """
    delta_T = logprob_T.astype(np.float64) - sampler_logprob_T
    ratio_T = np.exp(np.clip(delta_T, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    return {
        "agreement/mean_abs_dlogp": float(np.mean(np.abs(delta_T))),
        "agreement/max_abs_dlogp": float(np.max(np.abs(delta_T))),
        "agreement/kl": float(np.mean(ratio_T - 1.0 - delta_T)),
        "agreement/outside_1pct": float(np.mean((ratio_T < 0.99) | (ratio_T > 1.01))),
        "agreement/outside_10pct": float(np.mean((ratio_T < 0.9) | (ratio_T > 1.1))),
        "agreement/truncated_ratio": float(np.mean(ratio_T > cap)),
    }


def combined_agreement(parts: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The agreement of tokens of which (how many, their agreement) are the parts; {} of none."""
    parts = [(count, metrics) for count, metrics in parts if count]
    total = sum(count for count, _ in parts)
    return {
        name: max(metrics[name] for _, metrics in parts)
        if name == "agreement/max_abs_dlogp"
        else sum(count / total * metrics[name] for count, metrics in parts)
        for name in (parts[0][1] if parts else ())
    }


def _inside(ratio_BT: jax.Array, low: float, high: float) -> jax.Array:
    return ((ratio_BT >= low) & (ratio_BT <= high)).astype(jnp.float32)


def _segment_sums(x_BT: jax.Array, segment_BT: jax.Array) -> jax.Array:
    """At each token, the sum of x over the tokens of its segment in its row."""
    count = x_BT.shape[1] + 1

    def row(x_T, segment_T):
        return jax.ops.segment_sum(x_T, segment_T, num_segments=count)[segment_T]

    return jax.vmap(row)(x_BT, segment_BT)
