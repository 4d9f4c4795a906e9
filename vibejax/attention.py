"""Attention as the model calls it: one signature each for rows and for decoding.

Shape suffixes: as in vibejax/kernels/reference.py.

The mask is data: segment ids say which tokens belong together, positions say which come first.
Nothing depends on where in the row a token lies, so a row may be cut over the `context` axis in
any balanced order, with keys and values gathered and queries staying where they are.
"""

import jax

from vibejax.kernels import reference
from vibejax.sharding import constrain


def attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array,
) -> jax.Array:
    """Causal grouped-query attention of packed rows to themselves.

    Args:
        q_BTHD: [B, T, H, D] queries, rotated.
        k_BTKD: [B, T, K, D] keys, rotated, H a multiple of K.
        v_BTKD: [B, T, K, D] values.
        position_BT: [B, T] int32 position of each token in its document.
        segment_BT: [B, T] int32 document of each token; 0 is padding.

    Returns:
        [B, T, H, D] of q's dtype, zeros at padding.

    Raises:
        ValueError: the head counts do not divide, or keys and values differ in shape.
    """
    _check_heads(q_BTHD.shape[2], k_BTKD.shape[2], k_BTKD.shape, v_BTKD.shape)
    k_BSKD = constrain(k_BTKD, "batch", None, "kv_heads", None)
    v_BSKD = constrain(v_BTKD, "batch", None, "kv_heads", None)
    kv_position_BS = constrain(position_BT, "batch", None)
    kv_segment_BS = constrain(segment_BT, "batch", None)
    return reference.attention(
        q_BTHD, k_BSKD, v_BSKD, position_BT, segment_BT, kv_position_BS, kv_segment_BS
    )


def decode_attention(
    q_BHD: jax.Array, k_BKDS: jax.Array, v_BKSD: jax.Array, visible_BS: jax.Array
) -> jax.Array:
    """Attention of one new token a row over its cache.

    Args:
        q_BHD: [B, H, D] queries, rotated.
        k_BKDS: [B, K, D, S] cached keys, rotated, the new token's among them.
        v_BKSD: [B, K, S, D] cached values.
        visible_BS: [B, S] bool, which cache entries each row sees; at least one.

    Returns:
        [B, H, D] of q's dtype.

    Raises:
        ValueError: the head counts do not divide, or keys and values differ in shape.
    """
    _check_heads(q_BHD.shape[1], v_BKSD.shape[1], k_BKDS.swapaxes(2, 3).shape, v_BKSD.shape)
    return reference.decode_attention(q_BHD, k_BKDS, v_BKSD, visible_BS)


def _check_heads(heads: int, kv_heads: int, k_shape: tuple, v_shape: tuple) -> None:
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
    if k_shape != v_shape:
        raise ValueError(f"keys {k_shape} and values {v_shape} differ in shape")
