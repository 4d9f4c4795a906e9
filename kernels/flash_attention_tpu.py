"""Flash attention on TPUs: forward and a fused backward, packed rows, grouped queries.

The contract is `reference.attention`'s. The G query heads of a key/value head are stacked into the
rows of one query tile, so keys and values are read once a group and never repeated. Scores are
held transposed, keys along sublanes and queries along lanes: the row maxima and sums of softmax
are then elementwise operations over vector registers instead of reductions across lanes, and the
statistics of a tile are lane vectors, stored as [H, T].

Both kernels walk over exactly the tiles that hold an allowed pair. The range of each tile, a few
integers in SMEM, comes from `spans`; tiles are fetched by double-buffered copies, so a tile that is
not needed costs nothing at all. The mask is computed only on tiles that need it.

The backward kernel has key tiles outside and query tiles inside: 5 matmuls a tile. dk and dv stay
in VMEM; dq is read, added to and written back in HBM in float32. A query tile's first key tile
writes without reading, so dq need not be zeroed. All copies of a key tile end before the next one
begins: what it reads of dq is then what was written.

Shape suffixes: B rows, T query tokens, S key tokens, H query heads, K key/value heads, G = H / K,
D head dimension, N query tiles, M key tiles, t tokens of a query tile, r = G * t rows of a query
tile, s tokens of a key tile.

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
from jax.experimental.pallas import tpu as pltpu

from vibejax.kernels import spans
from vibejax.kernels.reference import MASKED

LOG2E = math.log2(math.e)
LN2 = math.log(2)
VMEM_BYTES = 14 * 2**20  # what a v4 has, short of what the compiler keeps
ROWS = 1_024  # of a query tile: with 512 keys its float32 scores take 2 MiB of VMEM


class Tiles(NamedTuple):
    """Tokens of a query tile (times G rows) and of a key tile."""

    query: int
    key: int


def tiles_for(q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array) -> Tiles:
    """The tile sizes for arrays of these shapes.

    Raises:
        ValueError: the kernels do not take them; the message names the value and the rule.
    """
    dtypes = {x.dtype.name for x in (q_BTHD, k_BSKD, v_BSKD)}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float32"}:
        raise ValueError(f"dtypes {sorted(dtypes)}: must be all bfloat16 or all float32")
    _, _, H, D = q_BTHD.shape
    if D % 64 or not 0 < D <= 256:
        raise ValueError(f"head dimension {D}: must be a multiple of 64, at most 256")
    group = H // k_BSKD.shape[2]
    if group > 16:
        raise ValueError(f"{group} query heads a key/value head: must be at most 16")
    if dtypes == {"float32"}:  # operands take twice the room, and their products more passes
        return Tiles(query=128, key=256 if group > 4 else 512)
    return Tiles(query=max(128, ROWS // group // 128 * 128), key=512)


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
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """Causal grouped-query attention within segments; statistics and sums in float32.

    Args:
        q_BTHD: [B, T, H, D] queries: contiguous chunks of the row, each of whole tiles.
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


class _Layout(NamedTuple):
    """What the kernels know of the mask.

    Attributes:
        first_BNr: [B, N, 1, r] int32 first key of each row of a query tile.
        last_BNr: [B, N, 1, r] int32 last key.
        ranges_BN: [B, N] int32 arrays: first and end of the key tiles needed, and of the full ones.
        queries_BM: [B, M] int32 arrays: first and end of the query tiles of a key tile.
    """

    first_BNr: jax.Array
    last_BNr: jax.Array
    ranges_BN: tuple[jax.Array, ...]
    queries_BM: tuple[jax.Array, ...]


def _layout(q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS, group, tiles) -> _Layout:
    def of_row(*ids):
        first_T, last_T = spans.spans(*ids)
        needed = spans.tile_ranges(first_T, last_T, *tiles)
        full = spans.full_ranges(first_T, last_T, *tiles)
        queries = spans.query_ranges(*needed, ids[2].shape[0] // tiles.key)
        rows = (jnp.tile(x.reshape(-1, 1, tiles.query), (1, 1, group)) for x in (first_T, last_T))
        return (*rows, (*needed, *full), queries)

    ids = (q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS)
    ids = [_pad(x, size) for x, size in zip(ids, (*tiles[:1] * 2, *tiles[1:] * 2), strict=True)]
    out = jax.vmap(of_row)(*ids)
    return _Layout(*jax.tree.map(lambda x: x.astype(jnp.int32), out))


def _forward(q_BTHD, k_BSKD, v_BSKD, q_pos, q_seg, kv_pos, kv_seg, tiles, interpret):
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    G, rows = H // K, H // K * tiles.query
    layout = _layout(q_pos, q_seg, kv_pos, kv_seg, G, tiles)
    q_BKNrD = _query_tiles(_scaled(q_BTHD), K, tiles)
    k_BKSD, v_BKDS = _keys(k_BSKD, tiles), _keys(v_BSKD, tiles).swapaxes(2, 3)
    N = q_BKNrD.shape[2]
    dtype = q_BTHD.dtype
    tile = lambda *shape: pl.BlockSpec(  # noqa: E731 - one query tile of one key/value head
        (None, None, None, *shape), lambda b, k, n, *_: (b, k, n, 0, 0)
    )
    ids = pl.BlockSpec((None, None, 1, rows), lambda b, k, n, *_: (b, n, 0, 0))
    everything = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        functools.partial(_forward_kernel, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, K, N),
            in_specs=[tile(rows, D), ids, ids, everything, everything],
            out_specs=[tile(rows, D), tile(1, rows)],
            scratch_shapes=[
                pltpu.VMEM((2, tiles.key, D), dtype),
                pltpu.VMEM((2, D, tiles.key), dtype),
                pltpu.VMEM((1, rows), jnp.float32),
                pltpu.VMEM((1, rows), jnp.float32),
                pltpu.VMEM((D, rows), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, K, N, rows, D), dtype),
            jax.ShapeDtypeStruct((B, K, N, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        name="flash_attention_forward",
        interpret=interpret,
    )
    out_BKNrD, lse_BKNr = call(
        *layout.ranges_BN, q_BKNrD, layout.first_BNr, layout.last_BNr, k_BKSD, v_BKDS
    )
    out_BTHD = checkpoint_name(_rows_of_tiles(out_BKNrD, T, tiles), "attention_output")
    lse_BKNr = checkpoint_name(lse_BKNr, "attention_logsumexp")
    ids = (q_pos, q_seg, kv_pos, kv_seg)
    return out_BTHD, (q_BTHD, k_BSKD, v_BSKD, *ids, out_BTHD, lse_BKNr)


def _forward_kernel(
    first_tile_BN, end_tile_BN, first_full_BN, end_full_BN,  # SMEM
    q_ref, first_ref, last_ref, k_hbm, v_hbm, out_ref, lse_ref,
    k_buf, v_buf, max_ref, mass_ref, sum_ref, sems, *, tiles,
):  # fmt: skip
    b, kv, n = (pl.program_id(axis) for axis in range(3))
    begin, end = first_tile_BN[b, n], end_tile_BN[b, n]

    def copies(m, slot):
        at = pl.ds(pl.multiple_of(m * tiles.key, tiles.key), tiles.key)
        return (
            pltpu.make_async_copy(k_hbm.at[b, kv, at], k_buf.at[slot], sems.at[slot, 0]),
            pltpu.make_async_copy(v_hbm.at[b, kv, :, at], v_buf.at[slot], sems.at[slot, 1]),
        )

    @pl.when(begin < end)
    def _():
        for copy in copies(begin, 0):
            copy.start()

    max_ref[...] = jnp.full(max_ref.shape, MASKED, jnp.float32)
    mass_ref[...] = jnp.zeros(mass_ref.shape, jnp.float32)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    def accumulate(m, slot, masked):
        score_sr = _dot(k_buf[slot], q_ref[...], ((1,), (1,)))
        if masked:
            score_sr = jnp.where(_visible(m, first_ref, last_ref, tiles), score_sr, MASKED)
        old_max_1r = max_ref[...]
        new_max_1r = jnp.maximum(old_max_1r, jnp.max(score_sr, axis=0, keepdims=True))
        weight_sr = jnp.exp2(score_sr - new_max_1r)
        if masked:  # a row that has seen nothing yet has the maximum MASKED itself
            weight_sr = jnp.where(score_sr == MASKED, 0.0, weight_sr)
        shrink_1r = jnp.exp2(old_max_1r - new_max_1r)
        mass_ref[...] = mass_ref[...] * shrink_1r + jnp.sum(weight_sr, axis=0, keepdims=True)
        update_Dr = _dot(v_buf[slot], weight_sr.astype(v_buf.dtype), ((1,), (0,)))
        sum_ref[...] = sum_ref[...] * shrink_1r + update_Dr
        max_ref[...] = new_max_1r

    def key_tile(m, _):
        slot = jax.lax.rem(m - begin, 2)

        @pl.when(m + 1 < end)
        def _():
            for copy in copies(m + 1, 1 - slot):
                copy.start()

        for copy in copies(m, slot):
            copy.wait()
        full = (first_full_BN[b, n] <= m) & (m < end_full_BN[b, n])
        pl.when(full)(functools.partial(accumulate, m, slot, masked=False))
        pl.when(~full)(functools.partial(accumulate, m, slot, masked=True))

    jax.lax.fori_loop(begin, end, key_tile, None)
    real_1r = last_ref[...] >= 0
    mass_1r = jnp.where(real_1r, mass_ref[...], 1.0)
    out_ref[...] = (sum_ref[...] / mass_1r).T.astype(out_ref.dtype)
    lse_ref[...] = jnp.where(real_1r, max_ref[...] + jnp.log2(mass_1r), 0.0)


def _backward(tiles, interpret, residuals, dout_BTHD):
    q_BTHD, k_BSKD, v_BSKD, q_pos, q_seg, kv_pos, kv_seg, out_BTHD, lse_BKNr = residuals
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    rows = H // K * tiles.query
    layout = _layout(q_pos, q_seg, kv_pos, kv_seg, H // K, tiles)
    delta_BTH1 = jnp.sum(
        dout_BTHD.astype(jnp.float32) * out_BTHD.astype(jnp.float32), axis=-1, keepdims=True
    )
    delta_BKNr = _query_tiles(delta_BTH1, K, tiles).swapaxes(3, 4)
    q_BKNrD = _query_tiles(_scaled(q_BTHD), K, tiles)
    dout_BKNrD = _query_tiles(dout_BTHD.astype(q_BTHD.dtype), K, tiles)
    k_BKSD, v_BKSD = _keys(k_BSKD, tiles), _keys(v_BSKD, tiles)
    M, dtype = k_BKSD.shape[2] // tiles.key, q_BTHD.dtype
    keys = pl.BlockSpec((None, None, tiles.key, D), lambda b, k, m, *_: (b, k, m, 0))
    everything = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        functools.partial(_backward_kernel, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(B, K, M),
            in_specs=[keys, keys, *[everything] * 6],
            out_specs=[everything, keys, keys],
            scratch_shapes=[
                pltpu.VMEM((2, rows, D), dtype),
                pltpu.VMEM((2, rows, D), dtype),
                pltpu.VMEM((2, 1, rows), jnp.float32),
                pltpu.VMEM((2, 1, rows), jnp.float32),
                pltpu.VMEM((2, 1, rows), jnp.int32),
                pltpu.VMEM((2, 1, rows), jnp.int32),
                pltpu.VMEM((2, rows, D), jnp.float32),
                pltpu.VMEM((2, rows, D), jnp.float32),
                pltpu.VMEM((tiles.key, D), jnp.float32),
                pltpu.VMEM((tiles.key, D), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 8)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q_BKNrD.shape, jnp.float32),
            jax.ShapeDtypeStruct(k_BKSD.shape, dtype),
            jax.ShapeDtypeStruct(k_BKSD.shape, dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        name="flash_attention_backward",
        interpret=interpret,
    )
    dq_BKNrD, dk_BKSD, dv_BKSD = call(
        *layout.ranges_BN, *layout.queries_BM, k_BKSD, v_BKSD, q_BKNrD, dout_BKNrD,
        lse_BKNr, delta_BKNr, layout.first_BNr, layout.last_BNr,
    )  # fmt: skip
    # Tiles that hold padding alone were never written.
    begin_BN, end_BN = layout.ranges_BN[:2]
    written_BN = (begin_BN < end_BN)[:, None, :, None, None]
    dq_BKNrD = jnp.where(written_BN, dq_BKNrD * D**-0.5, 0.0)
    dq_BTHD = _rows_of_tiles(dq_BKNrD, T, tiles).astype(dtype)
    dk_BSKD, dv_BSKD = (x.swapaxes(1, 2)[:, :S] for x in (dk_BKSD, dv_BKSD))
    return dq_BTHD, dk_BSKD, dv_BSKD, None, None, None, None


attention.defvjp(_forward, _backward)


def _backward_kernel(
    first_tile_BN, end_tile_BN, first_full_BN, end_full_BN, first_query_BM, end_query_BM,  # SMEM
    k_ref, v_ref, q_hbm, dout_hbm, lse_hbm, delta_hbm, first_hbm, last_hbm,
    dq_hbm, dk_ref, dv_ref,
    q_buf, dout_buf, lse_buf, delta_buf, first_buf, last_buf, dq_in, dq_out, dk_sum, dv_sum, sems,
    *, tiles,
):  # fmt: skip
    b, kv, m = (pl.program_id(axis) for axis in range(3))
    begin, end = first_query_BM[b, m], end_query_BM[b, m]
    per_head = ((q_hbm, q_buf), (dout_hbm, dout_buf), (lse_hbm, lse_buf), (delta_hbm, delta_buf))

    def reads(n, slot):
        sources = [(hbm.at[b, kv, n], buf.at[slot]) for hbm, buf in per_head]
        sources += [
            (first_hbm.at[b, n], first_buf.at[slot]),
            (last_hbm.at[b, n], last_buf.at[slot]),
        ]
        return [
            pltpu.make_async_copy(source, target, sems.at[slot, i])
            for i, (source, target) in enumerate(sources)
        ]

    def read_dq(n, slot):
        return pltpu.make_async_copy(dq_hbm.at[b, kv, n], dq_in.at[slot], sems.at[slot, 6])

    def write_dq(n, slot):
        return pltpu.make_async_copy(dq_out.at[slot], dq_hbm.at[b, kv, n], sems.at[slot, 7])

    def needed(n):
        return (first_tile_BN[b, n] <= m) & (m < end_tile_BN[b, n])

    def has_dq(n):
        return needed(n) & (first_tile_BN[b, n] < m)

    def fetch(n, slot):
        @pl.when(needed(n))
        def _():
            for copy in reads(n, slot):
                copy.start()

        @pl.when(has_dq(n))
        def _():
            read_dq(n, slot).start()

    @pl.when(begin < end)
    def _():
        fetch(begin, 0)

    dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
    dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    def accumulate(n, slot, masked):
        q_rD, dout_rD = q_buf[slot], dout_buf[slot]
        score_sr = _dot(k_ref[...], q_rD, ((1,), (1,)))
        weight_sr = jnp.exp2(score_sr - lse_buf[slot])
        if masked:
            visible_sr = _visible(m, first_buf.at[slot], last_buf.at[slot], tiles)
            weight_sr = jnp.where(visible_sr, weight_sr, 0.0)
        dweight_sr = _dot(v_ref[...], dout_rD, ((1,), (1,)))
        dscore_sr = (weight_sr * (dweight_sr - delta_buf[slot])).astype(q_rD.dtype)
        dv_sum[...] += _dot(weight_sr.astype(dout_rD.dtype), dout_rD, ((1,), (0,)))
        dk_sum[...] += _dot(dscore_sr, q_rD, ((1,), (0,)))
        dq_out[slot] = _dot(dscore_sr, k_ref[...], ((0,), (0,)))

    def query_tile(n, _):
        slot = jax.lax.rem(n - begin, 2)

        @pl.when(n + 1 < end)
        def _():
            fetch(n + 1, 1 - slot)

        @pl.when((n - 2 >= begin) & needed(jnp.maximum(n - 2, 0)))
        def _():
            write_dq(n - 2, slot).wait()

        @pl.when(needed(n))
        def _():
            for copy in reads(n, slot):
                copy.wait()
            full = (first_full_BN[b, n] <= m) & (m < end_full_BN[b, n])
            pl.when(full)(functools.partial(accumulate, n, slot, masked=False))
            pl.when(~full)(functools.partial(accumulate, n, slot, masked=True))

        @pl.when(has_dq(n))
        def _():
            read_dq(n, slot).wait()
            dq_out[slot] += dq_in[slot]

        @pl.when(needed(n))
        def _():
            write_dq(n, slot).start()

    jax.lax.fori_loop(begin, end, query_tile, None)
    for back in (2, 1):
        n = jnp.maximum(end - back, 0)

        @pl.when((end - back >= begin) & needed(n))
        def _(n=n):
            write_dq(n, jax.lax.rem(n - begin, 2)).wait()

    dk_ref[...] = (dk_sum[...] * LN2).astype(dk_ref.dtype)
    dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _visible(m, first_ref, last_ref, tiles):
    """[s, r] whether a row of the query tile sees a key of key tile `m`."""
    rows = first_ref.shape[-1]
    key_sr = m * tiles.key + jax.lax.broadcasted_iota(jnp.int32, (tiles.key, rows), 0)
    return (key_sr >= first_ref[...]) & (key_sr <= last_ref[...])


def _dot(x, y, contract):
    """A product accumulated in float32; float32 operands are multiplied as such."""
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x, y, (contract, ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _scaled(q_BTHD):
    """Queries whose scores are logarithms to the base 2."""
    scale = q_BTHD.shape[-1] ** -0.5 * LOG2E
    return (q_BTHD.astype(jnp.float32) * scale).astype(q_BTHD.dtype)


def _query_tiles(x_BTHD, K, tiles):
    """[B, K, N, r, D]: the tiles of a group's heads, head after head, in one piece each."""
    B, _, H, D = x_BTHD.shape
    x_BTHD = _pad(x_BTHD, tiles.query)
    x_BNtKGD = x_BTHD.reshape(B, -1, tiles.query, K, H // K, D)
    return x_BNtKGD.transpose(0, 3, 1, 4, 2, 5).reshape(B, K, -1, H // K * tiles.query, D)


def _rows_of_tiles(x_BKNrD, T, tiles):
    """The inverse of `_query_tiles`."""
    B, K, N, r, D = x_BKNrD.shape
    G = r // tiles.query
    x_BKNGtD = x_BKNrD.reshape(B, K, N, G, tiles.query, D)
    return x_BKNGtD.transpose(0, 2, 4, 1, 3, 5).reshape(B, N * tiles.query, K * G, D)[:, :T]


def _keys(x_BSKD, tiles):
    """[B, K, S, D] of whole tiles."""
    return _pad(x_BSKD, tiles.key).swapaxes(1, 2)


def _pad(x, tile):
    """`x` with its axis 1 filled up to whole tiles; a segment of 0 is padding."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), *((0, 0),) * (x.ndim - 2)))
