"""Negative log-likelihood, the loss of supervised fine-tuning."""

import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


@jax.named_scope("nll_loss")
def nll_loss(logprob_BT: jax.Array, weight_BT: jax.Array) -> tuple[jax.Array, Metrics]:
    """Weighted sum of -log p over tokens; the weights, fixed on the host, say which mean it is.

    Args:
        logprob_BT: [B, T] float32, nats.
        weight_BT: [B, T] float32, 0 on tokens that are not learnt.

    Returns:
        The scalar loss, and its sums over tokens as metrics.
    """
    loss = -jnp.sum(weight_BT * logprob_BT)
    return loss, {"loss": loss}
