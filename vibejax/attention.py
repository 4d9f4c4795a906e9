"""Attention as the model calls it: one signature each for rows and for decoding.

Shape suffixes: as in vibejax/kernels/reference.py.

The mask is data: segment ids say which tokens belong together, positions say which come first.
Over the `context` axis queries stay where they are, and keys and values are gathered.

Implementations: `reference` holds all scores of a row, [T, T] a head; `xla` goes over them in
blocks and skips those that hold no allowed pair, with memory linear in T; `tpu` is the same as a
kernel, for TPUs alone. `auto` takes the reference for rows of at most `REFERENCE_TOKENS` tokens and
`xla` for longer ones; nothing else takes one implementation for another.
"""

import functools
from typing import Literal

import jax

from vibejax.kernels import flash_attention_tpu, flash_attention_xla, reference
from vibejax.sharding import constrain, spec

Implementation = Literal["auto", "reference", "xla", "tpu"]
REFERENCE_TOKENS = 2_048  # scores of 16 heads in float32: 256 MiB a row


def attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Causal grouped-query attention of packed rows to themselves.

    Args:
        q_BTHD: [B, T, H, D] queries, rotated.
        k_BTKD: [B, T, K, D] keys, rotated, H a multiple of K.
        v_BTKD: [B, T, K, D] values.
        position_BT: [B, T] int32 position of each token in its document.
        segment_BT: [B, T] int32 document of each token; 0 is padding.
        implementation: see the module; `xla` needs each document to be one run, in order.

    Returns:
        [B, T, H, D] of q's dtype, zeros at padding.

    Raises:
        ValueError: the head counts do not divide, keys and values differ in shape, or the
            implementation cannot take the dtypes or the head dimension.
    """
    _check_heads(q_BTHD.shape[2], k_BTKD.shape[2], k_BTKD.shape, v_BTKD.shape)
    k_BSKD = constrain(k_BTKD, "batch", None, "kv_heads", None)
    v_BSKD = constrain(v_BTKD, "batch", None, "kv_heads", None)
    kv_position_BS = constrain(position_BT, "batch", None)
    kv_segment_BS = constrain(segment_BT, "batch", None)
    arrays = (q_BTHD, k_BSKD, v_BSKD, position_BT, segment_BT, kv_position_BS, kv_segment_BS)
    if implementation == "auto":
        implementation = "reference" if q_BTHD.shape[1] <= REFERENCE_TOKENS else "xla"
    if implementation == "reference":
        return reference.attention(*arrays)
    if implementation == "xla":
        return _per_device(flash_attention_xla.attention)(*arrays)
    tiles = flash_attention_tpu.tiles_for(q_BTHD, k_BTKD, v_BTKD)
    attend = functools.partial(flash_attention_tpu.attention, tiles=tiles)
    return _per_device(lambda *a: attend(*a))(*arrays)


def _per_device(attend):
    """`attend` on each device's rows, queries and heads; keys and values of the whole row."""
    if jax.sharding.get_abstract_mesh().empty:
        return attend
    queries = spec("batch", "length", "heads", None)
    keys = spec("batch", None, "kv_heads", None)
    query_ids, key_ids = spec("batch", "length"), spec("batch", None)
    return jax.shard_map(
        attend,
        in_specs=(queries, keys, keys, query_ids, query_ids, key_ids, key_ids),
        out_specs=queries,
        check_vma=False,
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
