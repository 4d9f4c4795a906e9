"""Plain jax.numpy definitions of what the kernels compute: the oracle of every kernel test.

Shape suffixes: B rows, T query tokens, S key tokens, H query heads, K key/value heads (H a
multiple of K), G = H / K query heads of one key/value head, D head dimension; M entries of a row of
the page table.
"""

import jax
import jax.numpy as jnp

from vibejax.kernels import pages as pages_

MASKED = -1e30  # finite: exp(MASKED - MASKED) is 1, while exp(-inf - -inf) is NaN


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_position_BT: jax.Array,
    q_segment_BT: jax.Array,
    kv_position_BS: jax.Array,
    kv_segment_BS: jax.Array,
) -> jax.Array:
    """Causal grouped-query attention within segments; softmax in float32.

    A query sees the keys of its own segment at its own position and before. The order of tokens
    within a row plays no part, so a row may be cut into chunks and the chunks reordered.
    Padding (segment 0) yields zeros. Materializes [B, K, G, T, S] scores.

    Returns:
        [B, T, H, D] of q's dtype.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q_BTKGD = q_BTHD.reshape(B, T, K, H // K, D) * jnp.asarray(D**-0.5, q_BTHD.dtype)
    score_BKGTS = product("BTKGD,BSKD->BKGTS", q_BTKGD, k_BSKD)
    visible_BTS = (q_segment_BT[:, :, None] == kv_segment_BS[:, None, :]) & (
        q_position_BT[:, :, None] >= kv_position_BS[:, None, :]
    )
    score_BKGTS = jnp.where(visible_BTS[:, None, None], score_BKGTS, MASKED)
    weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BSKD.dtype)
    out_BTKGD = product("BKGTS,BSKD->BTKGD", weight_BKGTS, v_BSKD).astype(q_BTHD.dtype)
    out_BTKGD = jnp.where((q_segment_BT != 0)[:, :, None, None, None], out_BTKGD, 0)
    return out_BTKGD.reshape(B, T, H, D)


def paged_attention(
    q_BTHD: jax.Array, pages: pages_.Pages, table_BM: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Attention of each sequence's last tokens over its cached ones; softmax in float32.

    Materializes the keys and values of whole table rows, and all scores.

    Args:
        q_BTHD: [B, T, H, D] queries of the last T of a sequence's cached tokens, H a multiple of K.
        pages: the pool, of q's dtype or int8.
        table_BM: [B, M] int32: token j of sequence b is in page table[b, j // s]. Entries beyond a
            sequence's tokens may be anything, and so may the pool where no token is.
        length_B: [B] int32 cached tokens, the T among them, at most M * s. 0 is an idle slot.

    Returns:
        [B, T, H, D] of q's dtype; zeros for idle slots and for queries before the first token.
    """
    B, T, H, D = q_BTHD.shape
    k_BSKD, v_BSKD = pages_.read(pages, table_BM)
    S, K = k_BSKD.shape[1:3]
    dtype = jnp.promote_types(q_BTHD.dtype, k_BSKD.dtype)
    q_BTKGD = (q_BTHD.astype(dtype) * jnp.asarray(D**-0.5, dtype)).reshape(B, T, K, H // K, D)
    key_S = jnp.arange(S)
    live_BS = key_S[None] < length_B[:, None]
    position_BT = length_B[:, None] - T + jnp.arange(T)[None]
    visible_BTS = live_BS[:, None] & (key_S[None, None] <= position_BT[:, :, None])
    k_BSKD, v_BSKD = (jnp.where(live_BS[:, :, None, None], x, 0) for x in (k_BSKD, v_BSKD))
    score_BKGTS = product("BTKGD,BSKD->BKGTS", q_BTKGD, k_BSKD)
    score_BKGTS = jnp.where(visible_BTS[:, None, None], score_BKGTS, MASKED)
    weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(dtype)
    out_BTKGD = product("BKGTS,BSKD->BTKGD", weight_BKGTS, v_BSKD)
    out_BTHD = out_BTKGD.reshape(B, T, H, D).astype(q_BTHD.dtype)
    return jnp.where((position_BT >= 0)[:, :, None, None], out_BTHD, 0)


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum accumulated in float32.

    HIGHEST changes nothing for bfloat16 operands; a float32 one, which the backward pass has in
    any case, would be rounded to bfloat16 on a TPU.
    """
    return jnp.einsum(
        subscripts,
        x,
        y,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
