"""Attention in blocks, in plain XLA: memory linear in the row, for any device.

For CPUs, for chips that no kernel has tiles for, and to hold against a suspected kernel. The
contract is `reference.attention`'s.

The key tiles that a query tile needs are one contiguous range (see `spans`); the rows go through
the union of theirs together, and no other tile is read, in the forward or in the backward pass.

Shape suffixes: B rows, T query tokens, S key tokens, H query heads, K key/value heads, G = H / K,
D head dimension, N query tiles, t tokens of a query tile, R = G * t, M key tiles, s tokens of a
key tile.

Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867; its backward pass,
FlashAttention-2, arXiv:2307.08691, algorithm 2.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vibejax.kernels.reference import MASKED, product
from vibejax.kernels.spans import spans, tile_ranges

TILE = 64  # what packed rows skip most with
LONG_TILE = 256  # fewer rounds of the loops; 1.5 times as fast at 16,384 tokens on two cores
LONG_TOKENS = 4_096


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_position_BT: jax.Array,
    q_segment_BT: jax.Array,
    kv_position_BS: jax.Array,
    kv_segment_BS: jax.Array,
    tile: int | None = None,
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
        tile: tokens of a tile, of queries and of keys; None: by the length of the row.

    Returns:
        [B, T, H, D] of q's dtype, zeros at padding.
    """
    arrays = (q_BTHD, k_BSKD, v_BSKD)
    ids = (q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS)
    return _forward(*arrays, *ids, tile)[0]


def _forward(
    q_BTHD, k_BSKD, v_BSKD, q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS, tile
):
    arrays = (q_BTHD, k_BSKD, v_BSKD)
    ids = (q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS)
    S, K, D = k_BSKD.shape[1:]
    tile = tile or _tile(S)
    visible = _visible(ids, tile)
    q_NBKRD = _tiles(q_BTHD, K, tile) * jnp.asarray(D**-0.5, q_BTHD.dtype)
    k_MBKsD, v_MBKsD = _tiles(k_BSKD, K, tile), _tiles(v_BSKD, K, tile)

    def query_tile(n):
        def key_tile(m, carry):
            max_BKR, mass_BKR, sum_BKRD = carry
            score_BKRs = product("BKRD,BKsD->BKRs", q_NBKRD[n], k_MBKsD[m])
            score_BKRs = visible.where(n, m, score_BKRs, MASKED)
            new_max_BKR = jnp.maximum(max_BKR, score_BKRs.max(axis=-1))
            weight_BKRs = jnp.exp(score_BKRs - new_max_BKR[..., None])
            weight_BKRs = visible.where(n, m, weight_BKRs, 0.0)
            shrink_BKR = jnp.exp(max_BKR - new_max_BKR)
            v_BKsD = v_MBKsD[m]
            update_BKRD = product("BKRs,BKsD->BKRD", weight_BKRs.astype(v_BKsD.dtype), v_BKsD)
            return (
                new_max_BKR,
                mass_BKR * shrink_BKR + weight_BKRs.sum(axis=-1),
                sum_BKRD * shrink_BKR[..., None] + update_BKRD,
            )

        zeros_BKR = jnp.zeros(q_NBKRD.shape[1:-1], jnp.float32)
        zeros_BKRD = jnp.zeros(q_NBKRD.shape[1:], jnp.float32)
        start = (zeros_BKR + MASKED, zeros_BKR, zeros_BKRD)
        max_BKR, mass_BKR, sum_BKRD = visible.loop(n, key_tile, start)
        seen_BKR = mass_BKR > 0  # nothing is where a query is padding
        mass_BKR = jnp.where(seen_BKR, mass_BKR, 1.0)
        lse_BKR = jnp.where(seen_BKR, max_BKR + jnp.log(mass_BKR), 0.0)
        return (sum_BKRD / mass_BKR[..., None]).astype(q_BTHD.dtype), lse_BKR

    out_NBKRD, lse_NBKR = jax.lax.map(query_tile, jnp.arange(q_NBKRD.shape[0]))
    out_BTHD = _joined(out_NBKRD, q_BTHD.shape, tile)
    out_BTHD = checkpoint_name(out_BTHD, "attention_output")
    lse_NBKR = checkpoint_name(lse_NBKR, "attention_logsumexp")
    return out_BTHD, (*arrays, *ids, out_BTHD, lse_NBKR)


def _backward(tile, residuals, dout_BTHD):
    q_BTHD, k_BSKD, v_BSKD, *ids, out_BTHD, lse_NBKR = residuals
    S, K, D = k_BSKD.shape[1:]
    tile = tile or _tile(S)
    visible = _visible(ids, tile)
    scale = D**-0.5
    delta_BTH1 = jnp.sum(
        dout_BTHD.astype(jnp.float32) * out_BTHD.astype(jnp.float32), axis=-1, keepdims=True
    )
    q_NBKRD = _tiles(q_BTHD, K, tile) * jnp.asarray(scale, q_BTHD.dtype)
    dout_NBKRD, delta_NBKR1 = _tiles(dout_BTHD, K, tile), _tiles(delta_BTH1, K, tile)
    k_MBKsD, v_MBKsD = _tiles(k_BSKD, K, tile), _tiles(v_BSKD, K, tile)

    def query_tile(sums, n):
        q_BKRD, dout_BKRD = q_NBKRD[n], dout_NBKRD[n]

        def key_tile(m, carry):
            dq_BKRD, dk_MBKsD, dv_MBKsD = carry
            score_BKRs = product("BKRD,BKsD->BKRs", q_BKRD, k_MBKsD[m])
            weight_BKRs = jnp.exp(score_BKRs - lse_NBKR[n][..., None])
            weight_BKRs = visible.where(n, m, weight_BKRs, 0.0)
            dweight_BKRs = product("BKRD,BKsD->BKRs", dout_BKRD, v_MBKsD[m])
            dscore_BKRs = (weight_BKRs * (dweight_BKRs - delta_NBKR1[n])).astype(q_BKRD.dtype)
            weight_BKRs = weight_BKRs.astype(dout_BKRD.dtype)
            dv_BKsD = product("BKRs,BKRD->BKsD", weight_BKRs, dout_BKRD)
            dk_BKsD = product("BKRs,BKRD->BKsD", dscore_BKRs, q_BKRD)
            dq_BKRD += product("BKRs,BKsD->BKRD", dscore_BKRs, k_MBKsD[m])
            return dq_BKRD, dk_MBKsD.at[m].add(dk_BKsD), dv_MBKsD.at[m].add(dv_BKsD)

        dq_BKRD, *sums = visible.loop(n, key_tile, (jnp.zeros(q_BKRD.shape, jnp.float32), *sums))
        return sums, dq_BKRD

    zeros_MBKsD = jnp.zeros(k_MBKsD.shape, jnp.float32)
    (dk_MBKsD, dv_MBKsD), dq_NBKRD = jax.lax.scan(
        query_tile, [zeros_MBKsD, zeros_MBKsD], jnp.arange(q_NBKRD.shape[0])
    )
    # q was scaled before the products: dk has the scale through q, dq gets it here.
    grads = (
        (_joined(dx, x.shape, tile) * factor).astype(x.dtype)
        for dx, x, factor in (
            (dq_NBKRD, q_BTHD, scale), (dk_MBKsD, k_BSKD, 1.0), (dv_MBKsD, v_BSKD, 1.0)
        )
    )  # fmt: skip
    return (*grads, None, None, None, None)


attention.defvjp(_forward, _backward)


class _Visible(NamedTuple):
    """Which keys the queries of a tile see.

    Attributes:
        q_position_NBt, q_segment_NBt: of the tokens of each query tile.
        kv_position_MBs, kv_segment_MBs: of the tokens of each key tile.
        first_N, end_N: the key tiles that any row needs for a query tile.
    """

    q_position_NBt: jax.Array
    q_segment_NBt: jax.Array
    kv_position_MBs: jax.Array
    kv_segment_MBs: jax.Array
    first_N: jax.Array
    end_N: jax.Array

    def where(self, n, m, score_BKRs, otherwise) -> jax.Array:
        """Scores of query tile `n` and key tile `m`, `otherwise` where a query sees no key."""
        segment_Bt1, segment_B1s = self.q_segment_NBt[n][..., None], self.kv_segment_MBs[m][:, None]
        before_Bts = self.q_position_NBt[n][..., None] >= self.kv_position_MBs[m][:, None]
        seen_Bts = (segment_Bt1 == segment_B1s) & (segment_Bt1 != 0) & before_Bts
        score_BKGts = score_BKRs.reshape(*score_BKRs.shape[:2], -1, *seen_Bts.shape[1:])
        return jnp.where(seen_Bts[:, None, None], score_BKGts, otherwise).reshape(score_BKRs.shape)

    def loop(self, n, key_tile, start):
        """`start` taken through `key_tile` of every key tile that query tile `n` needs."""
        return jax.lax.fori_loop(self.first_N[n], self.end_N[n], key_tile, start)


def _tile(tokens: int) -> int:
    return LONG_TILE if tokens > LONG_TOKENS else min(TILE, tokens)


def _visible(ids_BT, tile) -> _Visible:
    ids_BT = [_pad(x, tile) for x in ids_BT]
    ranges = jax.vmap(functools.partial(tile_ranges, query_tile=tile, key_tile=tile))
    first_BN, end_BN = ranges(*jax.vmap(spans)(*ids_BT))
    some_BN = first_BN < end_BN  # a row whose tile is padding needs none, and widens no range
    first_N = jnp.where(some_BN, first_BN, ids_BT[2].shape[1]).min(axis=0)
    end_N = jnp.where(some_BN, end_BN, 0).max(axis=0)
    cut = (x.reshape(len(x), -1, tile).swapaxes(0, 1) for x in ids_BT)
    return _Visible(*cut, first_N, end_N)


def _pad(x, tile):
    """`x` with its axis 1 filled up to whole tiles; a segment of 0 is padding."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), *((0, 0),) * (x.ndim - 2)))


def _tiles(x_BTHD, K, tile):
    """[N, B, K, R, D] tiles of x_BTHD, each as the factor of a batched product."""
    B, _, H, D = x_BTHD.shape
    x_BNtKGD = _pad(x_BTHD, tile).reshape(B, -1, tile, K, H // K, D)
    return x_BNtKGD.transpose(1, 0, 3, 4, 2, 5).reshape(-1, B, K, H // K * tile, D)


def _joined(x_NBKRD, shape, tile):
    """Tiles as one array again: [B, T, H, D]."""
    N, B, K, R, D = x_NBKRD.shape
    x_NBKGtD = x_NBKRD.reshape(N, B, K, R // tile, tile, D)
    x_BTHD = x_NBKGtD.transpose(1, 0, 4, 2, 3, 5).reshape(B, N * tile, *shape[2:])
    return x_BTHD[:, : shape[1]]
