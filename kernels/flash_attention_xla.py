"""Attention in blocks, in plain XLA: memory linear in the row, for any device.

For chips that no kernel has tiles for, to hold against a suspected kernel, and for long rows on a
CPU, where the reference would hold [T, T] scores. The contract is `reference.attention`'s.

The key tiles that a query tile needs are one contiguous range (see `spans`); no other tile is
read, in the forward or in the backward pass.

Shape suffixes: B rows, T query tokens, S key tokens, H query heads, K key/value heads, G = H / K,
D head dimension, N query tiles, t tokens of a query tile, s tokens of a key tile.

Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867; its backward pass,
FlashAttention-2, arXiv:2307.08691, algorithm 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vibejax.kernels.reference import MASKED, product
from vibejax.kernels.spans import spans, tile_ranges

TILE = 512


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_position_BT: jax.Array,
    q_segment_BT: jax.Array,
    kv_position_BS: jax.Array,
    kv_segment_BS: jax.Array,
    tile: int = TILE,
) -> jax.Array:
    """Causal grouped-query attention within segments; softmax in float32.

    Args:
        q_BTHD: [B, T, H, D] queries: one or several contiguous chunks of the row.
        k_BSKD: [B, S, K, D] keys of the whole row.
        v_BSKD: [B, S, K, D] values.
        q_position_BT: [B, T] int32 position within the document.
        q_segment_BT: [B, T] int32 document, each id at most S; 0 is padding.
        kv_position_BS: [B, S] int32.
        kv_segment_BS: [B, S] int32, each id one run.
        tile: tokens of a tile, of queries and of keys.

    Returns:
        [B, T, H, D] of q's dtype, zeros at padding.
    """
    arrays = (q_BTHD, k_BSKD, v_BSKD)
    ids = (q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS)
    return _forward(*arrays, *ids, tile)[0]


def _forward(
    q_BTHD, k_BSKD, v_BSKD, q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS, tile
):
    T = q_BTHD.shape[1]
    padded = [
        _pad(x, tile)
        for x in (
            q_BTHD, k_BSKD, v_BSKD, q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS
        )
    ]  # fmt: skip
    rows = functools.partial(_forward_row, tile=tile)
    out_BTHD, lse_BHT = jax.lax.map(lambda row: rows(*row), tuple(padded))
    out_BTHD = checkpoint_name(out_BTHD[:, :T], "attention_output")
    lse_BHT = checkpoint_name(lse_BHT[:, :, :T], "attention_logsumexp")
    ids = (q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS)
    return out_BTHD, (q_BTHD, k_BSKD, v_BSKD, *ids, out_BTHD, lse_BHT)


def _backward(tile, residuals, dout_BTHD):
    q_BTHD, k_BSKD, v_BSKD, q_pos, q_seg, kv_pos, kv_seg, out_BTHD, lse_BHT = residuals
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    delta_BTH = jnp.sum(dout_BTHD.astype(jnp.float32) * out_BTHD.astype(jnp.float32), axis=-1)
    padded = tuple(
        _pad(x, tile)
        for x in (
            q_BTHD, k_BSKD, v_BSKD, q_pos, q_seg, kv_pos, kv_seg,
            dout_BTHD, lse_BHT.swapaxes(1, 2), delta_BTH,
        )
    )  # fmt: skip
    rows = functools.partial(_backward_row, tile=tile)
    dq_BTHD, dk_BSKD, dv_BSKD = jax.lax.map(lambda row: rows(*row), padded)
    grads = (dq_BTHD[:, :T], dk_BSKD[:, :S], dv_BSKD[:, :S])
    grads = (g.astype(x.dtype) for g, x in zip(grads, (q_BTHD, k_BSKD, v_BSKD), strict=True))
    return (*grads, None, None, None, None)


attention.defvjp(_forward, _backward)


def _forward_row(q_THD, k_SKD, v_SKD, q_pos_T, q_seg_T, kv_pos_S, kv_seg_S, *, tile):
    T, H, D = q_THD.shape
    K = k_SKD.shape[1]
    q_TKGD = _grouped(q_THD, K)
    first_T, last_T = spans(q_pos_T, q_seg_T, kv_pos_S, kv_seg_S)
    first_N, end_N = tile_ranges(first_T, last_T, tile, tile)

    def query_tile(n):
        q_tKGD, q_pos_t, q_seg_t = (_cut(x, n, tile) for x in (q_TKGD, q_pos_T, q_seg_T))

        def key_tile(m, carry):
            max_KGt, mass_KGt, sum_KGtD = carry
            k_sKD, v_sKD, pos_s, seg_s = (
                _cut(x, m, tile) for x in (k_SKD, v_SKD, kv_pos_S, kv_seg_S)
            )
            visible_ts = _visible(q_pos_t, q_seg_t, pos_s, seg_s)
            score_KGts = product("tKGD,sKD->KGts", q_tKGD, k_sKD)
            score_KGts = jnp.where(visible_ts, score_KGts, MASKED)
            new_max_KGt = jnp.maximum(max_KGt, score_KGts.max(axis=-1))
            weight_KGts = jnp.where(visible_ts, jnp.exp(score_KGts - new_max_KGt[..., None]), 0.0)
            shrink_KGt = jnp.exp(max_KGt - new_max_KGt)
            update_KGtD = product("KGts,sKD->KGtD", weight_KGts.astype(v_sKD.dtype), v_sKD)
            return (
                new_max_KGt,
                mass_KGt * shrink_KGt + weight_KGts.sum(axis=-1),
                sum_KGtD * shrink_KGt[..., None] + update_KGtD,
            )

        zeros_KGt = jnp.zeros((K, H // K, tile), jnp.float32)
        start = (zeros_KGt + MASKED, zeros_KGt, jnp.zeros((K, H // K, tile, D), jnp.float32))
        max_KGt, mass_KGt, sum_KGtD = jax.lax.fori_loop(first_N[n], end_N[n], key_tile, start)
        real_t = q_seg_t != 0
        mass_KGt = jnp.where(real_t, mass_KGt, 1.0)
        lse_KGt = jnp.where(real_t, max_KGt + jnp.log(mass_KGt), 0.0)
        out_KGtD = sum_KGtD / mass_KGt[..., None]
        return out_KGtD.astype(q_THD.dtype), lse_KGt

    out_NKGtD, lse_NKGt = jax.lax.map(query_tile, jnp.arange(T // tile))
    out_THD = out_NKGtD.transpose(0, 3, 1, 2, 4).reshape(T, H, D)
    return out_THD, lse_NKGt.transpose(1, 2, 0, 3).reshape(H, T)


def _backward_row(
    q_THD, k_SKD, v_SKD, q_pos_T, q_seg_T, kv_pos_S, kv_seg_S, dout_THD, lse_TH, delta_TH, *, tile
):
    T, H, D = q_THD.shape
    K = k_SKD.shape[1]
    scale = D**-0.5
    q_TKGD, dout_TKGD = _grouped(q_THD, K), dout_THD.reshape(T, K, H // K, D)
    lse_TKG, delta_TKG = (x.reshape(T, K, H // K) for x in (lse_TH, delta_TH))
    first_T, last_T = spans(q_pos_T, q_seg_T, kv_pos_S, kv_seg_S)
    first_N, end_N = tile_ranges(first_T, last_T, tile, tile)

    def query_tile(sums, n):
        q_tKGD, dout_tKGD, lse_tKG, delta_tKG, q_pos_t, q_seg_t = (
            _cut(x, n, tile) for x in (q_TKGD, dout_TKGD, lse_TKG, delta_TKG, q_pos_T, q_seg_T)
        )
        lse_KGt1, delta_KGt1 = (x.transpose(1, 2, 0)[..., None] for x in (lse_tKG, delta_tKG))

        def key_tile(m, carry):
            dq_tKGD, dk_SKD, dv_SKD = carry
            k_sKD, v_sKD, pos_s, seg_s = (
                _cut(x, m, tile) for x in (k_SKD, v_SKD, kv_pos_S, kv_seg_S)
            )
            visible_ts = _visible(q_pos_t, q_seg_t, pos_s, seg_s)
            score_KGts = product("tKGD,sKD->KGts", q_tKGD, k_sKD)
            weight_KGts = jnp.where(visible_ts, jnp.exp(score_KGts - lse_KGt1), 0.0)
            dweight_KGts = product("tKGD,sKD->KGts", dout_tKGD, v_sKD)
            dscore_KGts = (weight_KGts * (dweight_KGts - delta_KGt1)).astype(k_sKD.dtype)
            weight_KGts = weight_KGts.astype(dout_tKGD.dtype)
            dv_sKD = product("KGts,tKGD->sKD", weight_KGts, dout_tKGD)
            dk_sKD = product("KGts,tKGD->sKD", dscore_KGts, q_tKGD)
            dq_tKGD += product("KGts,sKD->tKGD", dscore_KGts, k_sKD)
            return dq_tKGD, _add(dk_SKD, dk_sKD, m, tile), _add(dv_SKD, dv_sKD, m, tile)

        zeros_tKGD = jnp.zeros(q_tKGD.shape, jnp.float32)
        dq_tKGD, *sums = jax.lax.fori_loop(first_N[n], end_N[n], key_tile, (zeros_tKGD, *sums))
        return sums, dq_tKGD

    zeros_SKD = jnp.zeros(k_SKD.shape, jnp.float32)
    sums, dq_NtKGD = jax.lax.scan(query_tile, [zeros_SKD, zeros_SKD], jnp.arange(T // tile))
    # q was scaled before the products: dk has the scale through q, dq gets it here.
    return dq_NtKGD.reshape(T, H, D) * scale, *sums


def _grouped(q_THD, K):
    """[T, K, G, D] queries, scaled."""
    T, H, D = q_THD.shape
    return q_THD.reshape(T, K, H // K, D) * jnp.asarray(D**-0.5, q_THD.dtype)


def _visible(q_position_t, q_segment_t, position_s, segment_s):
    same_ts = (q_segment_t[:, None] == segment_s[None]) & (q_segment_t != 0)[:, None]
    return same_ts & (q_position_t[:, None] >= position_s[None])


def _pad(x, tile):
    """`x` with its axis 1 filled up to whole tiles; a segment of 0 is padding."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), *((0, 0),) * (x.ndim - 2)))


def _cut(x, n, tile):
    return jax.lax.dynamic_slice_in_dim(x, n * tile, tile)


def _add(x, update, m, tile):
    return jax.lax.dynamic_update_slice_in_dim(x, _cut(x, m, tile) + update, m * tile, 0)
