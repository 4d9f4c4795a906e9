"""Flash attention on NVIDIA GPUs: forward and backward, packed rows, grouped queries.

The contract is `reference.attention`'s. Written in Pallas on Triton, which JAX deprecates from 0.11
on; its successor is Mosaic GPU (`jax.experimental.pallas.mosaic_gpu`). Nothing outside this file
knows of either.

Three kernels: forward, the gradient of queries, and the gradients of keys and values. Each program
owns one tile of what it writes, held in registers, so there are no atomics and no gradients in
float32 in memory. Arrays stay as the model has them, [B, T, H, D]; every program reads its own head
of them. The heads of a group run side by side and find each other's keys in the L2 cache; the
gradients of keys and values sum over the group's heads in one loop.

The loops go over exactly the tiles that hold an allowed pair, as `spans` finds them. Each is cut in
three: the tiles in which every pair is allowed lie in the middle and compute no mask.

Shape suffixes: B rows, T query tokens, S key tokens, H query heads, K key/value heads, G = H / K,
D head dimension, N query tiles, M key tiles, t tokens of a query tile, s tokens of a key tile,
4 bounds of loops.

Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867; FlashAttention-2,
arXiv:2307.08691.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vibejax.kernels import spans
from vibejax.kernels import tiles as tiles_
from vibejax.kernels.reference import MASKED

LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """One kernel's tokens of a query tile and of a key tile, and how it is compiled.

    Attributes:
        query: a power of two, at least 16, as is `key`.
        key: tokens of a key tile.
        warps: that share a program; 4 together issue a Hopper's matrix instructions of 64 rows.
        stages: tiles in flight between memory and the multiprocessor.
    """

    query: int
    key: int
    warps: int = 4
    stages: int = 2


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile

    @property
    def query(self) -> int:
        """What T is filled up to whole ones of: the largest, of which the others are parts."""
        return max(tile.query for tile in self)

    @property
    def key(self) -> int:
        """What S is filled up to whole ones of."""
        return max(tile.key for tile in self)


def tiles_for(q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, capability: int) -> Tiles:
    """The tile sizes for arrays of these shapes: those that the compiler fits into registers.

    Args:
        q_BTHD: [B, T, H, D] queries.
        k_BSKD: [B, S, K, D] keys.
        v_BSKD: [B, S, K, D] values.
        capability: major compute capability of the chip (`tiles.gpu_capability`).

    Raises:
        ValueError: the kernels do not take them; the message names the value and the rule.
    """
    dtypes = {x.dtype.name for x in (q_BTHD, k_BSKD, v_BSKD)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        raise ValueError(f"dtypes {sorted(dtypes)}: must be all bfloat16 or all float32")
    D = q_BTHD.shape[-1]
    if D not in (64, 128, 256):
        raise ValueError(f"head dimension {D}: must be 64, 128 or 256")
    if dtypes == {"float32"}:  # without tensor cores, every operand passes through registers
        return Tiles(*[Tile(query=16, key=16, warps=4, stages=1)] * 3)
    # Chips before Hopper also hold a product's left operand in registers.
    if D == 256:
        if capability >= 9:
            return Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2))
        return Tiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2))
    if capability >= 9:
        found = Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3))
    else:
        found = Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2))
    chosen = tiles_.chosen(f"gpu{capability}")
    return found._replace(**{name: Tile(*chosen[name]) for name in Tiles._fields if name in chosen})


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_position_BT: jax.Array,
    q_segment_BT: jax.Array,
    kv_position_BS: jax.Array,
    kv_segment_BS: jax.Array,
    tiles: Tiles,
    interpret: bool = False,
) -> jax.Array:
    """Causal grouped-query attention within segments; statistics and sums in float32.

    Args:
        q_BTHD: [B, T, H, D] queries: one or several contiguous chunks of the row.
        k_BSKD: [B, S, K, D] keys of the whole row, of q's dtype.
        v_BSKD: [B, S, K, D] values, of q's dtype.
        q_position_BT: [B, T] int32 position within the document.
        q_segment_BT: [B, T] int32 document, each id at most S; 0 is padding.
        kv_position_BS: [B, S] int32.
        kv_segment_BS: [B, S] int32, each id one run.
        tiles: sizes of the tiles; T and S are filled up to whole ones.
        interpret: runs on a CPU, as `pallas_call` takes it.

    Returns:
        [B, T, H, D] of q's dtype, zeros at padding.
    """
    arrays = (q_BTHD, k_BSKD, v_BSKD)
    ids = (q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS)
    return _forward(*arrays, *ids, tiles, interpret)[0]


def _forward(q_BTHD, k_BSKD, v_BSKD, q_pos, q_seg, kv_pos, kv_seg, tiles, interpret):
    T = q_BTHD.shape[1]
    ids = (q_pos, q_seg, kv_pos, kv_seg)
    first_BT, last_BT = _spans(*ids, tiles)
    bounds_BN4 = _key_bounds(first_BT, last_BT, tiles.forward)
    q_padded = _pad(q_BTHD, tiles.query)
    k_padded, v_padded = (_pad(x, tiles.key) for x in (k_BSKD, v_BSKD))
    specs = _query_tile_specs(q_padded, k_padded, tiles.forward)
    B, filled, H, D = q_padded.shape
    call = pl.pallas_call(
        functools.partial(_flash_attention_forward, tile=tiles.forward, scale=D**-0.5 * LOG2E),
        grid=specs.grid,
        in_specs=[specs.bounds, specs.ids, specs.ids, specs.queries, specs.keys, specs.keys],
        out_specs=[specs.queries, specs.statistics],
        out_shape=[
            jax.ShapeDtypeStruct(q_padded.shape, q_padded.dtype),
            jax.ShapeDtypeStruct((B, H, filled), jnp.float32),
        ],
        compiler_params=_compiler_params(tiles.forward),
        interpret=interpret,
    )
    out_BTHD, lse_BHT = call(bounds_BN4, first_BT, last_BT, q_padded, k_padded, v_padded)
    out_BTHD = checkpoint_name(out_BTHD[:, :T], "attention_output")
    lse_BHT = checkpoint_name(lse_BHT[:, :, :T], "attention_logsumexp")
    return out_BTHD, (q_BTHD, k_BSKD, v_BSKD, *ids, out_BTHD, lse_BHT)


def _flash_attention_forward(
    bounds_ref, first_ref, last_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, tile, scale
):
    """One query tile of one head. Scores times `scale` are logarithms to the base 2."""
    q_tD, first_t, last_t = q_ref[...], first_ref[...], last_ref[...]

    def key_tile(m, carry, masked):
        sum_tD, max_t, mass_t = carry
        keys = pl.ds(m * tile.key, tile.key)
        score_ts = _dot(q_tD, k_ref[keys, :].T) * scale
        if masked:
            key_s = m * tile.key + jnp.arange(tile.key)
            visible_ts = _visible(key_s[None], first_t[:, None], last_t[:, None])
            score_ts = jnp.where(visible_ts, score_ts, MASKED)
        new_max_t = jnp.maximum(max_t, jnp.max(score_ts, axis=1))
        weight_ts = jnp.exp2(score_ts - new_max_t[:, None])
        if masked:  # a query that has seen nothing yet has the maximum MASKED itself
            weight_ts = jnp.where(visible_ts, weight_ts, 0.0)
        shrink_t = jnp.exp2(max_t - new_max_t)
        mass_t = mass_t * shrink_t + jnp.sum(weight_ts, axis=1)
        v_sD = v_ref[keys, :]
        sum_tD = sum_tD * shrink_t[:, None] + _dot(weight_ts.astype(v_sD.dtype), v_sD)
        return sum_tD, new_max_t, mass_t

    start = (
        jnp.zeros(q_tD.shape, jnp.float32),
        jnp.full(first_t.shape, MASKED, jnp.float32),
        jnp.zeros(first_t.shape, jnp.float32),
    )
    sum_tD, max_t, mass_t = _in_three(bounds_ref, key_tile, start)
    mass_t = jnp.where(last_t >= 0, mass_t, 1.0)
    out_ref[...] = (sum_tD / mass_t[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(last_t >= 0, max_t + jnp.log2(mass_t), 0.0)


def _backward(tiles, interpret, residuals, dout_BTHD):
    q_BTHD, k_BSKD, v_BSKD, *ids, out_BTHD, lse_BHT = residuals
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    delta_BTH = jnp.sum(dout_BTHD.astype(jnp.float32) * out_BTHD.astype(jnp.float32), axis=-1)
    first_BT, last_BT = _spans(*ids, tiles)
    lse_BHT, delta_BHT = (_pad(x, tiles.query, axis=2) for x in (lse_BHT, delta_BTH.swapaxes(1, 2)))
    q_BTHD, dout_BTHD = (_pad(x, tiles.query) for x in (q_BTHD, dout_BTHD.astype(q_BTHD.dtype)))
    k_BSKD, v_BSKD = (_pad(x, tiles.key) for x in (k_BSKD, v_BSKD))
    arrays = (first_BT, last_BT, lse_BHT, delta_BHT, q_BTHD, dout_BTHD, k_BSKD, v_BSKD)
    dq_BTHD = _dq(*arrays, tiles.dq, interpret)
    dk_BSKD, dv_BSKD = _dkv(*arrays, tiles.dkv, interpret)
    return dq_BTHD[:, :T], dk_BSKD[:, :S], dv_BSKD[:, :S], None, None, None, None


attention.defvjp(_forward, _backward)


def _dq(first_BT, last_BT, lse_BHT, delta_BHT, q_BTHD, dout_BTHD, k_BSKD, v_BSKD, tile, interpret):
    specs = _query_tile_specs(q_BTHD, k_BSKD, tile)
    call = pl.pallas_call(
        functools.partial(_flash_attention_dq, tile=tile, scale=q_BTHD.shape[-1] ** -0.5),
        grid=specs.grid,
        in_specs=[
            specs.bounds, specs.ids, specs.ids, specs.statistics, specs.statistics,
            specs.queries, specs.queries, specs.keys, specs.keys,
        ],
        out_specs=specs.queries,
        out_shape=jax.ShapeDtypeStruct(q_BTHD.shape, q_BTHD.dtype),
        compiler_params=_compiler_params(tile),
        interpret=interpret,
    )  # fmt: skip
    bounds_BN4 = _key_bounds(first_BT, last_BT, tile)
    return call(
        bounds_BN4, first_BT, last_BT, lse_BHT, delta_BHT, q_BTHD, dout_BTHD, k_BSKD, v_BSKD
    )


def _flash_attention_dq(
    bounds_ref, first_ref, last_ref, lse_ref, delta_ref, q_ref, dout_ref, k_ref, v_ref,
    dq_ref, *, tile, scale,
):  # fmt: skip
    """The gradient of one query tile of one head."""
    q_tD, dout_tD, lse_t, delta_t = q_ref[...], dout_ref[...], lse_ref[...], delta_ref[...]
    first_t, last_t = first_ref[...], last_ref[...]

    def key_tile(m, dq_tD, masked):
        keys = pl.ds(m * tile.key, tile.key)
        k_sD, v_sD = k_ref[keys, :], v_ref[keys, :]
        score_ts = _dot(q_tD, k_sD.T) * (scale * LOG2E)
        weight_ts = jnp.exp2(score_ts - lse_t[:, None])
        if masked:
            key_s = m * tile.key + jnp.arange(tile.key)
            visible_ts = _visible(key_s[None], first_t[:, None], last_t[:, None])
            weight_ts = jnp.where(visible_ts, weight_ts, 0.0)
        dscore_ts = weight_ts * (_dot(dout_tD, v_sD.T) - delta_t[:, None])
        return dq_tD + _dot(dscore_ts.astype(k_sD.dtype), k_sD)

    dq_tD = _in_three(bounds_ref, key_tile, jnp.zeros(q_tD.shape, jnp.float32))
    dq_ref[...] = (dq_tD * scale).astype(dq_ref.dtype)


def _dkv(first_BT, last_BT, lse_BHT, delta_BHT, q_BTHD, dout_BTHD, k_BSKD, v_BSKD, tile, interpret):
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    G, M = H // K, S // tile.key
    bounds_BM4 = _query_bounds(first_BT, last_BT, M, tile)
    bounds = pl.BlockSpec((None, None, 4), lambda kv, m, b: (b, m, 0))
    ids = pl.BlockSpec((None, T), lambda kv, m, b: (b, 0))
    statistics = pl.BlockSpec((None, G, T), lambda kv, m, b: (b, kv, 0))
    queries = pl.BlockSpec((None, T, G, D), lambda kv, m, b: (b, 0, kv, 0))
    keys = pl.BlockSpec((None, tile.key, None, D), lambda kv, m, b: (b, m, kv, 0))
    call = pl.pallas_call(
        functools.partial(_flash_attention_dkv, tile=tile, group=G, scale=D**-0.5),
        grid=(K, M, B),
        in_specs=[bounds, ids, ids, statistics, statistics, queries, queries, keys, keys],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(k_BSKD.shape, k_BSKD.dtype)] * 2,
        compiler_params=_compiler_params(tile),
        interpret=interpret,
    )
    return call(
        bounds_BM4, first_BT, last_BT, lse_BHT, delta_BHT, q_BTHD, dout_BTHD, k_BSKD, v_BSKD
    )


def _flash_attention_dkv(
    bounds_ref, first_ref, last_ref, lse_ref, delta_ref, q_ref, dout_ref, k_ref, v_ref,
    dk_ref, dv_ref, *, tile, group, scale,
):  # fmt: skip
    """The gradients of one key tile, from all heads of its group.

    Scores are transposed: the products that they enter then take them from registers as they are.
    Query tiles times heads make one loop, so that copies stay in flight throughout even where a
    key tile has few query tiles.
    """
    k_sD, v_sD = k_ref[...], v_ref[...]
    key_s = pl.program_id(1) * tile.key + jnp.arange(tile.key)

    def head_of_query_tile(i, carry, masked):
        dk_sD, dv_sD = carry
        n, head = jax.lax.div(i, group), jax.lax.rem(i, group)
        queries = pl.ds(n * tile.query, tile.query)
        q_tD, dout_tD = q_ref[queries, head, :], dout_ref[queries, head, :]
        score_st = _dot(k_sD, q_tD.T) * (scale * LOG2E)
        weight_st = jnp.exp2(score_st - lse_ref[head, queries][None])
        if masked:
            first_t, last_t = first_ref[queries], last_ref[queries]
            visible_st = _visible(key_s[:, None], first_t[None], last_t[None])
            weight_st = jnp.where(visible_st, weight_st, 0.0)
        dv_sD += _dot(weight_st.astype(dout_tD.dtype), dout_tD)
        dscore_st = weight_st * (_dot(v_sD, dout_tD.T) - delta_ref[head, queries][None])
        return dk_sD + _dot(dscore_st.astype(q_tD.dtype), q_tD), dv_sD

    zeros_sD = jnp.zeros(k_sD.shape, jnp.float32)
    dk_sD, dv_sD = _in_three(bounds_ref, head_of_query_tile, (zeros_sD, zeros_sD), group)
    dk_ref[...] = (dk_sD * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_sD.astype(dv_ref.dtype)


class _Specs(NamedTuple):
    """The blocks of a program that owns one query tile of one head."""

    grid: tuple[int, int, int]
    bounds: pl.BlockSpec
    ids: pl.BlockSpec
    statistics: pl.BlockSpec
    queries: pl.BlockSpec
    keys: pl.BlockSpec


def _query_tile_specs(q_BTHD, k_BSKD, tile) -> _Specs:
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    # Late tiles of a long document have the most keys: they start first, short ones fill in.
    last, group = T // tile.query - 1, H // K
    return _Specs(
        grid=(H, T // tile.query, B),
        bounds=pl.BlockSpec((None, None, 4), lambda h, n, b: (b, last - n, 0)),
        ids=pl.BlockSpec((None, tile.query), lambda h, n, b: (b, last - n)),
        statistics=pl.BlockSpec((None, None, tile.query), lambda h, n, b: (b, h, last - n)),
        queries=pl.BlockSpec((None, tile.query, None, D), lambda h, n, b: (b, last - n, h, 0)),
        keys=pl.BlockSpec((None, S, None, D), lambda h, n, b: (b, 0, jax.lax.div(h, group), 0)),
    )


def _in_three(bounds_ref, body, carry, times=1):
    """Loops over the masked tiles before the full ones, the full ones, and the masked ones after.

    Args:
        bounds_ref: [4] where the three begin and end.
        body: of (index, carry, masked).
        carry: of the loops.
        times: iterations a tile.
    """
    begin, full, after, end = (bounds_ref[i] * times for i in range(4))
    for low, high, masked in ((begin, full, True), (full, after, False), (after, end, True)):
        carry = jax.lax.fori_loop(low, high, functools.partial(body, masked=masked), carry)
    return carry


def _spans(q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS, tiles):
    """[B, T] int32 first and last key of each query, of whole tiles."""
    queries = (_pad(x, tiles.query) for x in (q_position_BT, q_segment_BT))
    keys = (_pad(x, tiles.key) for x in (kv_position_BS, kv_segment_BS))
    return [x.astype(jnp.int32) for x in jax.vmap(spans.spans)(*queries, *keys)]


def _key_bounds(first_BT, last_BT, tile):
    """[B, N, 4] key tiles of each query tile, as `_in_three` takes them."""

    def of_row(first_T, last_T):
        begin_N, end_N = spans.tile_ranges(first_T, last_T, tile.query, tile.key)
        full = spans.full_ranges(first_T, last_T, tile.query, tile.key)
        return jnp.stack([begin_N, *(jnp.clip(x, begin_N, end_N) for x in full), end_N], axis=1)

    return jax.vmap(of_row)(first_BT, last_BT).astype(jnp.int32)


def _query_bounds(first_BT, last_BT, M, tile):
    """[B, M, 4] query tiles of each key tile, as `_in_three` takes them."""

    def of_row(first_T, last_T):
        needed = spans.tile_ranges(first_T, last_T, tile.query, tile.key)
        first_full_N, end_full_N = spans.full_ranges(first_T, last_T, tile.query, tile.key)
        begin_M, end_M = spans.query_ranges(*needed, M)
        N = first_full_N.shape[0]
        index_M1, index_1N = jnp.arange(M)[:, None], jnp.arange(N)[None]
        full_MN = (first_full_N[None] <= index_M1) & (index_M1 < end_full_N[None])
        full_M = jnp.where(full_MN, index_1N, N).min(axis=1)
        # Of full tiles with others between them, only those before the first gap go unmasked.
        gap_MN = ~full_MN & (index_1N > full_M[:, None])
        after_M = jnp.where(gap_MN, index_1N, N).min(axis=1)
        middle = (jnp.clip(x, begin_M, end_M) for x in (full_M, after_M))
        return jnp.stack([begin_M, *middle, end_M], axis=1)

    return jax.vmap(of_row)(first_BT, last_BT).astype(jnp.int32)


def _visible(key, first, last):
    """Whether a query with these first and last keys sees a key of the row."""
    return (key >= first) & (key <= last)


def _dot(x, y):
    """A product accumulated in float32; HIGHEST keeps float32 operands from becoming tf32."""
    return jnp.dot(x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _compiler_params(tile):
    return triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)


def _pad(x, tile, axis=1):
    """`x` with its tokens filled up to whole tiles; a segment of 0 is padding."""
    return jnp.pad(x, [(0, -size % tile if i == axis else 0) for i, size in enumerate(x.shape)])
