"""Drawing a token: temperature, top-k and top-p by threshold, one uniform and the inverse CDF.

No noise over the vocabulary, no sort. The uniform is a function of (seed, step, prompt, sample,
position) alone, so a completion depends neither on its neighbours in the batch nor on when it
was decoded.

Shape suffixes: B rows, V vocabulary, N blocks of the vocabulary, M ids of a block.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30
BLOCK = 128  # ids of a block; the inverse CDF first finds the block, then the id


def sequence_keys(
    seed: int, step: jax.Array, prompt_B: jax.Array, sample_B: jax.Array
) -> jax.Array:
    """[B] random keys, one a completion.

    Args:
        seed: of the run.
        step: scalar int32, optimizer step that the rollout is for.
        prompt_B: [B] uint32, identity of the prompt in its source.
        sample_B: [B] uint32, which completion of the prompt.
    """
    root = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda p, g: jax.random.fold_in(jax.random.fold_in(root, p), g))(
        prompt_B, sample_B
    )


def uniforms(key_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """[B] float32 in [0, 1): the draw of each row for the token at its position."""
    return jax.vmap(lambda k, p: jax.random.uniform(jax.random.fold_in(k, p)))(key_B, position_B)


def sample(
    logit_BV: jax.Array,
    uniform_B: jax.Array,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Draws one id a row and gives its log-probability under the distribution drawn from.

    Args:
        logit_BV: [B, V] float32; ids that must not be drawn hold `MASKED`.
        uniform_B: [B] float32 in [0, 1).
        temperature: divides the logits; 0 takes the likeliest id, whose log-probability is then
            that of temperature 1.
        top_p: keeps the likeliest ids until their mass reaches it; 1 keeps all.
        top_k: keeps the k likeliest ids; 0 keeps all. Ids tied with the last one are kept too.

    Returns:
        [B] int32 ids, and [B] float32 nats.
    """
    if temperature == 0:
        id_B = jnp.argmax(logit_BV, axis=-1).astype(jnp.int32)
        best_B = jnp.max(logit_BV, axis=-1)
        return id_B, best_B - jax.nn.logsumexp(logit_BV, axis=-1)
    logit_BV = logit_BV / temperature
    largest_B1 = jnp.max(logit_BV, axis=-1, keepdims=True)
    weight_BV = jnp.exp(logit_BV - largest_B1)
    if top_k:
        weight_BV = _keep(weight_BV, lambda kept: jnp.sum(kept > 0, axis=-1) >= top_k)
    if top_p < 1.0:
        total_B = jnp.sum(weight_BV, axis=-1)
        weight_BV = _keep(weight_BV, lambda kept: jnp.sum(kept, axis=-1) >= top_p * total_B)
    id_B, mass_B = _inverse_cdf(weight_BV, uniform_B)
    chosen_logit_B = jnp.take_along_axis(logit_BV, id_B[:, None], axis=-1)[:, 0]
    return id_B, chosen_logit_B - largest_B1[:, 0] - jnp.log(mass_B)


def _keep(weight_BV: jax.Array, enough) -> jax.Array:
    """Zeroes all weights below the largest threshold at which `enough` of each row is kept.

    Non-negative floats order as their bits do, so 31 halvings find the threshold exactly.
    """
    bits_BV = jax.lax.bitcast_convert_type(weight_BV, jnp.int32)

    def halve(_, bounds):
        low_B, high_B = bounds  # low keeps enough, high does not
        middle_B = low_B + (high_B - low_B) // 2
        holds_B = enough(jnp.where(bits_BV >= middle_B[:, None], weight_BV, 0.0))
        return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B)

    one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32)
    start_B = jnp.zeros(weight_BV.shape[0], jnp.int32)
    threshold_B, _ = jax.lax.fori_loop(0, 31, halve, (start_B, jnp.full_like(start_B, one + 1)))
    return jnp.where(bits_BV >= threshold_B[:, None], weight_BV, 0.0)


def _inverse_cdf(weight_BV: jax.Array, uniform_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The id at which the running sum of weights passes uniform * total, and the total."""
    B, V = weight_BV.shape
    weight_BNM = jnp.pad(weight_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    block_BN = jnp.sum(weight_BNM, axis=-1)
    before_BN = jnp.cumsum(block_BN, axis=-1) - block_BN
    total_B = before_BN[:, -1] + block_BN[:, -1]
    goal_B = uniform_B * total_B
    n_B = _last(before_BN <= goal_B[:, None], block_BN)
    weight_BM = jnp.take_along_axis(weight_BNM, n_B[:, None, None], axis=1)[:, 0]
    before_BM = jnp.cumsum(weight_BM, axis=-1) - weight_BM
    rest_B = goal_B - jnp.take_along_axis(before_BN, n_B[:, None], axis=-1)[:, 0]
    m_B = _last(before_BM <= rest_B[:, None], weight_BM)
    return (n_B * BLOCK + m_B).astype(jnp.int32), total_B


def _last(reached_BN: jax.Array, weight_BN: jax.Array) -> jax.Array:
    """[B] index of the last entry that is reached and has weight: rounding never picks a zero."""
    index_N = jnp.arange(weight_BN.shape[1])
    return jnp.max(jnp.where(reached_BN & (weight_BN > 0), index_N[None], 0), axis=-1)
