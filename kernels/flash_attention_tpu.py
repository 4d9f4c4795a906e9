"""Flash attention on TPUs: forward and a fused backward, packed rows, grouped queries.

The contract is `reference.attention`'s. The G query heads of a key/value head are stacked into the
rows of one query tile, so keys and values are read once a group and never repeated. Scores are
held transposed, keys along sublanes and queries along lanes: sums over keys are then elementwise
operations over vector registers instead of reductions across lanes, and the statistics of a tile
are lane vectors.

Both kernels walk over exactly the tiles that hold an allowed pair. The range of each tile, a few
integers in SMEM, comes from `spans`; tiles are fetched by double-buffered copies, so a tile that is
not needed costs nothing at all. The mask is computed only on tiles that need it.

Softmax is the same whatever is subtracted from a row's scores, as long as nothing overflows. The
forward kernel therefore takes the maxima of one key tile, the one that holds the queries' own keys,
as the reference of all others: their weights follow from the scores at once, without a pass over
the tile for its maxima, and nothing is rescaled. A row of which some score exceeds its reference by
more than 2^90 is done again with running maxima, the rest of its tile with it; only that row takes
the second result, so no document feels another.

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
from vibejax.kernels.tiles import TpuTiles, tpu_tiles

LOG2E = math.log2(math.e)
LN2 = math.log(2)
LARGEST = 2.0**90  # of a row's mass, before its reference counts as too small


def tiles_for(q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, chip: str) -> TpuTiles:
    """The tiles for arrays of these shapes on a chip (a value of `tiles.TPU_CHIPS`).

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
    return tpu_tiles(chip, *dtypes, D, group)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_position_BT: jax.Array,
    q_segment_BT: jax.Array,
    kv_position_BS: jax.Array,
    kv_segment_BS: jax.Array,
    tiles: TpuTiles,
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
        tiles: sizes of the tiles (`tiles.tpu_tiles`); T and S are filled up to whole ones.
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
        first_BN1t: [B, N, 1, t] int32 first key of each token of a query tile.
        last_BN1t: [B, N, 1, t] int32 last key.
        ranges_BN: [B, N] int32 arrays: first and end of the key tiles needed, and of the full ones.
        queries_BM: [B, M] int32 arrays: first and end of the query tiles of a key tile.
    """

    first_BN1t: jax.Array
    last_BN1t: jax.Array
    ranges_BN: tuple[jax.Array, ...]
    queries_BM: tuple[jax.Array, ...]


def _layout(q_position_BT, q_segment_BT, kv_position_BS, kv_segment_BS, tile) -> _Layout:
    def of_row(*ids):
        first_T, last_T = spans.spans(*ids)
        needed = spans.tile_ranges(first_T, last_T, *tile)
        full = spans.full_ranges(first_T, last_T, *tile)
        queries = spans.query_ranges(*needed, ids[2].shape[0] // tile.key)
        tokens = (x.reshape(-1, 1, tile.query) for x in (first_T, last_T))
        return (*tokens, (*needed, *full), queries)

    ids = (_pad(q_position_BT, tile.query), _pad(q_segment_BT, tile.query))
    ids += (_pad(kv_position_BS, tile.key), _pad(kv_segment_BS, tile.key))
    out = jax.vmap(of_row)(*ids)
    return _Layout(*jax.tree.map(lambda x: x.astype(jnp.int32), out))


def _forward(q_BTHD, k_BSKD, v_BSKD, q_pos, q_seg, kv_pos, kv_seg, tiles, interpret):
    B, T, H, D = q_BTHD.shape
    K, tile = k_BSKD.shape[2], tiles.forward
    rows = H // K * tile.query
    layout = _layout(q_pos, q_seg, kv_pos, kv_seg, tile)
    q_BKNrD = _query_tiles(_scaled(q_BTHD), K, tile)
    k_BKSD, v_BKDS = _keys(k_BSKD, tile), _keys(v_BSKD, tile).swapaxes(2, 3)
    N, dtype = q_BKNrD.shape[2], q_BTHD.dtype
    block = lambda *shape: pl.BlockSpec(  # noqa: E731 - one query tile of one key/value head
        (None, None, None, *shape), lambda b, k, n, *_: (b, k, n, 0, 0)
    )
    ids = pl.BlockSpec((None, None, 1, tile.query), lambda b, k, n, *_: (b, n, 0, 0))
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    call = pl.pallas_call(
        functools.partial(_forward_kernel, tile=tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(B, K, N),
            in_specs=[block(rows, D), ids, ids, in_hbm, in_hbm],
            out_specs=[block(rows, D), block(1, rows)],
            scratch_shapes=[
                pltpu.VMEM((2, tile.key, D), dtype),
                pltpu.VMEM((2, D, tile.key), dtype),
                pltpu.VMEM((1, rows), jnp.float32),
                pltpu.VMEM((8, rows), jnp.float32),
                pltpu.VMEM((D, rows), jnp.float32),
                pltpu.VMEM((1, rows), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, K, N, rows, D), dtype),
            jax.ShapeDtypeStruct((B, K, N, 1, rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiles.vmem_bytes,
        ),
        name="flash_attention_forward",
        interpret=interpret,
    )
    out_BKNrD, lse_BKN1r = call(
        *layout.ranges_BN, q_BKNrD, layout.first_BN1t, layout.last_BN1t,
        _in_hbm(k_BKSD, interpret), _in_hbm(v_BKDS, interpret),
    )  # fmt: skip
    out_BTHD = _rows_of_tiles(out_BKNrD, T, tile)
    lse_BTH = _rows_of_tiles(lse_BKN1r.swapaxes(3, 4), T, tile)[..., 0]
    out_BTHD = checkpoint_name(out_BTHD, "attention_output")
    lse_BHT = checkpoint_name(lse_BTH.swapaxes(1, 2), "attention_logsumexp")
    ids = (q_pos, q_seg, kv_pos, kv_seg)
    return out_BTHD, (q_BTHD, k_BSKD, v_BSKD, *ids, out_BTHD, lse_BHT)


def _forward_kernel(
    first_tile_BN, end_tile_BN, first_full_BN, end_full_BN,  # SMEM
    q_ref, first_ref, last_ref, k_hbm, v_hbm, out_ref, lse_ref,
    k_buf, v_buf, max_ref, mass_ref, sum_ref, sound_ref, unsound_smem, sems, *, tile,
):  # fmt: skip
    b, kv, n = (pl.program_id(axis) for axis in range(3))
    begin, end = first_tile_BN[b, n], end_tile_BN[b, n]

    def copies(i, slot):
        at = pl.ds(pl.multiple_of(key_tile(i) * tile.key, tile.key), tile.key)
        return (
            pltpu.make_async_copy(k_hbm.at[b, kv, at], k_buf.at[slot], sems.at[slot, 0]),
            pltpu.make_async_copy(v_hbm.at[b, kv, :, at], v_buf.at[slot], sems.at[slot, 1]),
        )

    def key_tile(i):
        """The last one comes first: it holds the queries' own keys (see `tiles`)."""
        return jnp.where(i == 0, end - 1, begin + i - 1)

    def add(weight_sr, slot, shrink_1r=None):
        mass_8r = jnp.sum(weight_sr.reshape(-1, 8, weight_sr.shape[1]), axis=0)
        update_Dr = _dot(v_buf[slot], weight_sr.astype(v_buf.dtype), ((1,), (0,)))
        if shrink_1r is None:
            mass_ref[...] += mass_8r
            sum_ref[...] += update_Dr
        else:
            mass_ref[...] = mass_ref[...] * shrink_1r + mass_8r
            sum_ref[...] = sum_ref[...] * shrink_1r + update_Dr

    def with_running_maxima(m, slot):
        score_sr = _dot(k_buf[slot], q_ref[...], ((1,), (1,)))
        score_sr = jnp.where(
            _visible(m, first_ref, last_ref, score_sr.shape, tile), score_sr, MASKED
        )
        old_1r = max_ref[...]
        new_1r = jnp.maximum(old_1r, jnp.max(score_sr, axis=0, keepdims=True))
        max_ref[...] = new_1r
        add(jnp.exp2(score_sr - new_1r), slot, jnp.exp2(old_1r - new_1r))

    def with_references(slot):
        score_sr = _dot(k_buf[slot], q_ref[...], ((1,), (1,)))
        add(jnp.exp2(score_sr - max_ref[...]), slot)

    def attempt(number):
        @pl.when(begin < end)
        def _():
            for copy in copies(0, 0):
                copy.start()

        # Above every masked score: a row that has seen nothing yet gives them no weight.
        max_ref[...] = jnp.full(max_ref.shape, MASKED / 2, jnp.float32)
        mass_ref[...] = jnp.zeros(mass_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

        def step(i, _):
            slot = jax.lax.rem(i, 2)

            @pl.when(i + 1 < end - begin)
            def _():
                for copy in copies(i + 1, 1 - slot):
                    copy.start()

            for copy in copies(i, slot):
                copy.wait()
            m = key_tile(i)
            full = (first_full_BN[b, n] <= m) & (m < end_full_BN[b, n])
            quick = full & (i > 0) & (number == 0)
            pl.when(quick)(lambda: with_references(slot))
            pl.when(~quick)(lambda: with_running_maxima(m, slot))

        jax.lax.fori_loop(0, end - begin, step, None)
        real_1r = _of_rows(last_ref, max_ref.shape[1]) >= 0
        mass_1r = jnp.sum(mass_ref[...], axis=0, keepdims=True)
        sound_1r = jnp.where(real_1r & ~(mass_1r <= LARGEST), 0.0, 1.0)
        mass_1r = jnp.where(real_1r, mass_1r, 1.0)
        out_rD = (sum_ref[...] / mass_1r).T.astype(out_ref.dtype)
        lse_1r = jnp.where(real_1r, max_ref[...] + jnp.log2(mass_1r), 0.0)

        @pl.when(number == 0)
        def _():
            out_ref[...] = out_rD
            lse_ref[...] = lse_1r
            sound_ref[...] = sound_1r
            unsound_smem[0] = (jnp.min(sound_1r) < 0.5).astype(jnp.int32)

        @pl.when(number == 1)
        def _():
            sound_rD = jnp.broadcast_to(sound_ref[...], sum_ref.shape).T
            out_ref[...] = jnp.where(sound_rD > 0.5, out_ref[...], out_rD)
            lse_ref[...] = jnp.where(sound_ref[...] > 0.5, lse_ref[...], lse_1r)

    def attempts(number, _):
        pl.when(unsound_smem[0] == 1)(lambda: attempt(number))

    unsound_smem[0] = 1
    jax.lax.fori_loop(0, 2, attempts, None)  # one body: the second is rare, its code is not doubled


def _backward(tiles, interpret, residuals, dout_BTHD):
    q_BTHD, k_BSKD, v_BSKD, q_pos, q_seg, kv_pos, kv_seg, out_BTHD, lse_BHT = residuals
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    tile = tiles.backward
    rows = H // K * tile.query
    layout = _layout(q_pos, q_seg, kv_pos, kv_seg, tile)
    delta_BTH1 = jnp.sum(
        dout_BTHD.astype(jnp.float32) * out_BTHD.astype(jnp.float32), axis=-1, keepdims=True
    )
    delta_BKN1r = _query_tiles(delta_BTH1, K, tile).swapaxes(3, 4)
    lse_BKN1r = _query_tiles(lse_BHT.swapaxes(1, 2)[..., None], K, tile).swapaxes(3, 4)
    q_BKNrD = _query_tiles(_scaled(q_BTHD), K, tile)
    dout_BKNrD = _query_tiles(dout_BTHD.astype(q_BTHD.dtype), K, tile)
    k_BKSD, v_BKSD = _keys(k_BSKD, tile), _keys(v_BSKD, tile)
    M, dtype = k_BKSD.shape[2] // tile.key, q_BTHD.dtype
    keys = pl.BlockSpec((None, None, tile.key, D), lambda b, k, m, *_: (b, k, m, 0))
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    call = pl.pallas_call(
        functools.partial(_backward_kernel, tile=tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(B, K, M),
            in_specs=[keys, keys, *[in_hbm] * 6],
            out_specs=[in_hbm, keys, keys],
            scratch_shapes=[
                pltpu.VMEM((2, rows, D), dtype),
                pltpu.VMEM((2, rows, D), dtype),
                pltpu.VMEM((2, 1, rows), jnp.float32),
                pltpu.VMEM((2, 1, rows), jnp.float32),
                pltpu.VMEM((2, 1, tile.query), jnp.int32),
                pltpu.VMEM((2, 1, tile.query), jnp.int32),
                pltpu.VMEM((2, rows, D), jnp.float32),
                pltpu.VMEM((2, rows, D), jnp.float32),
                pltpu.VMEM((tile.key, D), jnp.float32),
                pltpu.VMEM((tile.key, D), jnp.float32),
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
            vmem_limit_bytes=tiles.vmem_bytes,
        ),
        name="flash_attention_backward",
        input_output_aliases={6: 1, 7: 2},  # dk over k, dv over v: a block is read before written
        interpret=interpret,
    )
    dq_BKNrD, dk_BKSD, dv_BKSD = call(
        *layout.ranges_BN, *layout.queries_BM, k_BKSD, v_BKSD, q_BKNrD, dout_BKNrD,
        lse_BKN1r, delta_BKN1r, layout.first_BN1t, layout.last_BN1t,
    )  # fmt: skip
    # Tiles that hold padding alone were never written.
    begin_BN, end_BN = layout.ranges_BN[:2]
    written_BN = (begin_BN < end_BN)[:, None, :, None, None]
    dq_BKNrD = jnp.where(written_BN, dq_BKNrD * D**-0.5, 0.0)
    dq_BTHD = _rows_of_tiles(dq_BKNrD, T, tile).astype(dtype)
    dk_BSKD, dv_BSKD = (x.swapaxes(1, 2)[:, :S] for x in (dk_BKSD, dv_BKSD))
    return dq_BTHD, dk_BSKD, dv_BSKD, None, None, None, None


attention.defvjp(_forward, _backward)


def _backward_kernel(
    first_tile_BN, end_tile_BN, first_full_BN, end_full_BN, first_query_BM, end_query_BM,  # SMEM
    k_ref, v_ref, q_hbm, dout_hbm, lse_hbm, delta_hbm, first_hbm, last_hbm,
    dq_hbm, dk_ref, dv_ref,
    q_buf, dout_buf, lse_buf, delta_buf, first_buf, last_buf, dq_in, dq_out, dk_sum, dv_sum, sems,
    *, tile,
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
            spans_of_tile = first_buf.at[slot], last_buf.at[slot]
            visible_sr = _visible(m, *spans_of_tile, weight_sr.shape, tile)
            weight_sr = jnp.where(visible_sr, weight_sr, 0.0)
        dweight_sr = _dot(v_ref[...], dout_rD, ((1,), (1,)))
        dscore_sr = (weight_sr * (dweight_sr - delta_buf[slot])).astype(q_rD.dtype)
        dv_sum[...] += _dot(weight_sr.astype(dout_rD.dtype), dout_rD, ((1,), (0,)))
        dk_sum[...] += _dot(dscore_sr, q_rD, ((1,), (0,)))
        dq_out[slot] = dq_in[slot] + _dot(dscore_sr, k_ref[...], ((0,), (0,)))

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
            pl.when(has_dq(n))(lambda: read_dq(n, slot).wait())

            @pl.when(~has_dq(n))
            def _():
                dq_in[slot] = jnp.zeros(dq_in.shape[1:], jnp.float32)

            full = (first_full_BN[b, n] <= m) & (m < end_full_BN[b, n])
            pl.when(full)(functools.partial(accumulate, n, slot, masked=False))
            pl.when(~full)(functools.partial(accumulate, n, slot, masked=True))
            write_dq(n, slot).start()

    jax.lax.fori_loop(begin, end, query_tile, None)
    for back in (2, 1):
        n = jnp.maximum(end - back, 0)

        @pl.when((end - back >= begin) & needed(n))
        def _(n=n):
            write_dq(n, jax.lax.rem(n - begin, 2)).wait()

    dk_ref[...] = (dk_sum[...] * LN2).astype(dk_ref.dtype)
    dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _visible(m, first_ref, last_ref, shape, tile):
    """[s, r] whether a row of the query tile sees a key of key tile `m`."""
    key_sr = m * tile.key + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    first_1r, last_1r = (_of_rows(ref, shape[1]) for ref in (first_ref, last_ref))
    return (key_sr >= first_1r) & (key_sr <= last_1r)


def _of_rows(token_ref, rows):
    """[1, r] what holds for each token, once for each head of the group."""
    return jnp.tile(token_ref[...], (1, rows // token_ref.shape[1]))


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


def _query_tiles(x_BTHD, K, tile):
    """[B, K, N, r, D]: the tiles of a group's heads, head after head, in one piece each."""
    B, _, H, D = x_BTHD.shape
    x_BTHD = _pad(x_BTHD, tile.query)
    x_BNtKGD = x_BTHD.reshape(B, -1, tile.query, K, H // K, D)
    return x_BNtKGD.transpose(0, 3, 1, 4, 2, 5).reshape(B, K, -1, H // K * tile.query, D)


def _rows_of_tiles(x_BKNrD, T, tile):
    """The inverse of `_query_tiles`."""
    B, K, N, r, D = x_BKNrD.shape
    G = r // tile.query
    x_BKNGtD = x_BKNrD.reshape(B, K, N, G, tile.query, D)
    return x_BKNGtD.transpose(0, 2, 4, 1, 3, 5).reshape(B, N * tile.query, K * G, D)[:, :T]


def _keys(x_BSKD, tile):
    """[B, K, S, D] of whole tiles."""
    return _pad(x_BSKD, tile.key).swapaxes(1, 2)


def _in_hbm(x, interpret):
    """`x` where the kernels' copies expect it: XLA likes to keep keys in VMEM, if they fit."""
    return x if interpret else pltpu.with_memory_space_constraint(x, pltpu.HBM)


def _pad(x, tile):
    """`x` with its axis 1 filled up to whole tiles; a segment of 0 is padding."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), *((0, 0),) * (x.ndim - 2)))
