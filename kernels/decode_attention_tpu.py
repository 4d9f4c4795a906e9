"""Attention over pages on TPUs.

The contract is `reference.paged_attention`'s. Decoding is bound by memory: what matters is that
each live page is read once, no other page at all, and that the copies never pause. The kernel goes
over the blocks of all live sequences as one list. A block is some consecutive pages of a sequence,
one copy each for all key/value heads; a ring of buffers holds the blocks ahead, so that the next
sequence's first pages are under way while the present one is finished, however short either is.
Rows of the page table come into SMEM by copies too, ahead of the pages that they name.

The G query heads of a key/value head, and of shared pages the queries of all sequences of a group,
are the rows of one matrix. Scores have keys along lanes: a few rows fill whole registers. int8
pages are widened in VMEM; the factors of keys multiply scores, those of values the weights. Only a
sequence's last block is masked.

The list is cut in two halves of equal work for chips whose two cores are one device.

Shape suffixes: as in pages.py; c pages of a block, t = c * s tokens of it, W workers.

Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867; pages, Kwon et al.,
arXiv:2309.06180.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vibejax.kernels import pages as pages_
from vibejax.kernels.reference import MASKED
from vibejax.kernels.tiles import Fetch

VMEM_BYTES = 14 * 2**20  # what a v4 has, short of what the compiler keeps
BLOCK_TOKENS = 1_024
TABLE_ROWS = 4  # in SMEM: the row in use and those on their way
TABLE_ENTRIES = 32_768  # of a row: four rows take half of SMEM
WORKERS = 2
LANES = 128


class Blocks(NamedTuple):
    """How pages are fetched: pages of a block, and blocks in VMEM."""

    pages: int
    buffers: int


def check(q_BTHD, pages, table_BM, length_B, shared_G=None, group: int = 1) -> None:
    """What the kernel asks of its arguments.

    Raises:
        ValueError: the kernel does not take them; the message names the value and the rule.
    """
    pages_.check(q_BTHD, pages, table_BM, length_B, shared_G, group)
    _, T, H, D = q_BTHD.shape
    K = pages.kv_PKsC.shape[1]
    dtype, s = pages.kv_PKsC.dtype, pages.page_tokens
    rows = 32 // dtype.itemsize  # of a tile in memory
    if s % rows:
        raise ValueError(f"pages of {s} tokens of {dtype.name}: must be a multiple of {rows}")
    if dtype == jnp.int8 and s % LANES and LANES % (2 * s):
        raise ValueError(f"int8 pages of {s} tokens: must be 32, 64 or a multiple of {LANES}")
    if D != 64 and (D % LANES or not 0 < D <= 256):
        raise ValueError(f"head dimension {D}: must be 64, 128 or 256")
    if table_BM.shape[1] > TABLE_ENTRIES:
        raise ValueError(f"{table_BM.shape[1]} pages a sequence: must be at most {TABLE_ENTRIES}")
    rows = T * H // K * (1 if shared_G is None else group)
    if _vmem_bytes(K, rows, D, s, q_BTHD.dtype, dtype, Blocks(1, 2)) > VMEM_BYTES:
        raise ValueError(
            f"{rows} query rows a key/value head, {T} tokens, {H // K} heads, groups of {group}, "
            f"and pages of {s} tokens: must fit into {VMEM_BYTES} bytes"
        )


def blocks_for(K: int, rows: int, D: int, s: int, q_dtype, dtype, fetch: Fetch) -> Blocks:
    """The largest blocks that fit; `rows` are the query rows of a key/value head."""
    page_bytes = 2 * K * s * D * jnp.dtype(dtype).itemsize
    count = max(1, min(fetch.block_bytes // page_bytes, BLOCK_TOKENS // s))
    buffers = fetch.buffers
    while _vmem_bytes(K, rows, D, s, q_dtype, dtype, Blocks(count, buffers)) > VMEM_BYTES:
        if buffers > 3 or (buffers > 2 and count == 1):
            buffers -= 1
        elif count > 1:
            count //= 2
        else:
            break
    return Blocks(count, buffers)


def _vmem_bytes(K, rows, D, s, q_dtype, dtype, blocks):
    """What the buffers take, and the largest intermediate values."""
    rows, lanes, t = -(-rows // 8) * 8, max(D, LANES), blocks.pages * s
    kv = blocks.buffers * K * t * 2 * D * jnp.dtype(dtype).itemsize
    scales = blocks.buffers * K * blocks.pages * 8 * max(2 * s, LANES) * 4
    queries = blocks.buffers * K * rows * lanes * jnp.dtype(q_dtype).itemsize
    sums = 3 * K * rows * (lanes + LANES) * 4
    scores = 4 * rows * max(t, LANES) * 4 + 4 * t * lanes * 4
    return kv + (scales if jnp.dtype(dtype) == jnp.int8 else 0) + queries + sums + scores


def paged_attention(
    q_BTHD: jax.Array,
    pages: pages_.Pages,
    table_BM: jax.Array,
    length_B: jax.Array,
    shared_G: jax.Array | None = None,
    group: int = 1,
    blocks: Blocks | None = None,
    fetch: Fetch = Fetch(),  # noqa: B008 - a constant
    interpret: pltpu.InterpretParams | bool = False,
) -> jax.Array:
    """Attention of each sequence's last tokens over its cached ones; sums in float32.

    Args:
        q_BTHD: [B, T, H, D] queries.
        pages: the pool, of q's dtype or int8.
        table_BM: [B, M] int32 pages of each sequence.
        length_B: [B] int32 cached tokens; 0 is an idle slot.
        shared_G: [B / group] int32, how many of their first pages all live sequences of a group
            share: these are read once a group. None: each sequence reads its own.
        group: sequences of a group, adjacent ones.
        blocks: sizes; None takes those of `blocks_for`.
        fetch: what these begin with.
        interpret: runs on a CPU, as `pallas_call` takes it.

    Returns:
        [B, T, H, D] of q's dtype; zeros for idle slots and for queries before the first token.

    Raises:
        ValueError: as `check`.
    """
    check(q_BTHD, pages, table_BM, length_B, shared_G, group)
    one_pass = functools.partial(_one_pass, blocks=blocks, fetch=fetch, interpret=interpret)
    return pages_.in_passes(one_pass, q_BTHD, pages, table_BM, length_B, shared_G, group)


def bytes_copied(
    q_BTHD: jax.Array,
    pages: pages_.Pages,
    table_BM: jax.Array,
    length_B: jax.Array,
    shared_G: jax.Array | None = None,
    group: int = 1,
) -> int:
    """What the kernel's copies move for `paged_attention` of these arguments.

    Of queries, pages and table only the shapes and dtypes are looked at.
    """
    _, T, H, D = q_BTHD.shape
    K, s = pages.kv_PKsC.shape[1:3]
    page = sum(x.size // x.shape[0] * x.dtype.itemsize for x in pages if x is not None)
    table_row = -(-table_BM.shape[1] // LANES) * LANES * 4

    def of_pass(begin_I, tokens_I, tokens):
        rows, lanes = -(-tokens * H // K // 8) * 8, max(D, LANES)
        pages_I = jnp.maximum(-(-tokens_I // s) - begin_I, 0)
        item = K * rows * (lanes * (q_BTHD.dtype.itemsize + 4) + LANES * 4) + table_row
        return int(pages_I.sum()) * page + int((pages_I > 0).sum()) * item

    if shared_G is None or group == 1:
        return of_pass(jnp.zeros_like(length_B), length_B, T)
    shared_G, _ = pages_.shared_pages(length_B, shared_G, group, T, s)
    shared = of_pass(jnp.zeros_like(shared_G), shared_G * s, T * group)
    return shared + of_pass(jnp.repeat(shared_G, group), length_B, T)


class _Plan(NamedTuple):
    """The list of blocks.

    Attributes:
        item_I: the live items in order, then the others.
        begin_I: first page of an item.
        end_I: one past its last page.
        tokens_I: keys of the sequence up to the item's end.
        first_W: where in `item_I` a worker begins.
        blocks_W: how many blocks it goes over.
        last_W: one past the last place in `item_I`.
    """

    item_I: jax.Array
    begin_I: jax.Array
    end_I: jax.Array
    tokens_I: jax.Array
    first_W: jax.Array
    last_W: jax.Array
    blocks_W: jax.Array


def _plan(begin_I, tokens_I, s, M, count, workers=WORKERS) -> _Plan:
    end_I = jnp.minimum(-(-tokens_I // s), M)
    blocks_I = jnp.maximum(-(-(end_I - begin_I) // count), 0)
    item_I = jnp.argsort(blocks_I == 0, stable=True)
    before_I = jnp.cumsum(blocks_I[item_I])
    live, total = jnp.sum(blocks_I > 0), before_I[-1]
    cut = jnp.arange(1, workers) * total // workers
    cuts = jnp.searchsorted(before_I, cut, side="left", method="compare_all") + (cut > 0)
    edge = jnp.concatenate([jnp.zeros(1, int), jnp.minimum(cuts, live), live[None]])
    edge = edge.astype(jnp.int32)
    done = jnp.where(edge > 0, before_I[jnp.maximum(edge - 1, 0)], 0)
    arrays = (item_I, begin_I, end_I, tokens_I, edge[:-1], edge[1:], done[1:] - done[:-1])
    return _Plan(*(x.astype(jnp.int32) for x in arrays))


def _one_pass(q_IKrD, pages, table_IM, begin_I, tokens_I, T, *, blocks, fetch, interpret):
    I, K, rows, D = q_IKrD.shape  # noqa: E741 - I: items of work
    s, C = pages.kv_PKsC.shape[2:]
    M = table_IM.shape[1]
    dtype = pages.kv_PKsC.dtype
    blocks = blocks or blocks_for(K, rows, D, s, q_IKrD.dtype, dtype, fetch)
    plan = _plan(begin_I, tokens_I, s, M, blocks.pages)
    # Half a row of lanes is filled with zeros: against a token's key and value that is the key.
    lanes, r = max(D, LANES), -(-rows // 8) * 8
    q_IKrD = jnp.pad(q_IKrD, ((0, 0), (0, 0), (0, r - rows), (0, lanes - D)))
    table_I1M = jnp.pad(table_IM, ((0, 0), (0, -M % LANES)))[:, None]
    n = blocks.buffers
    everything = pl.BlockSpec(memory_space=pl.ANY)
    quantized = pages.scale_PKal is not None
    call = pl.pallas_call(
        functools.partial(
            _kernel, blocks=blocks, quantized=quantized, tokens=T, heads=rows // T, D=D
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(plan),
            grid=(WORKERS,),
            in_specs=[everything] * (4 if quantized else 3),
            out_specs=[everything] * 2,
            scratch_shapes=[
                pltpu.VMEM((n, blocks.pages, K, s, C), dtype),
                pltpu.VMEM((n, blocks.pages, *pages.scale_PKal.shape[1:]), jnp.float32)
                if quantized
                else None,
                pltpu.VMEM((n, K, r, lanes), q_IKrD.dtype),
                pltpu.SMEM((TABLE_ROWS, 1, table_I1M.shape[2]), jnp.int32),
                pltpu.VMEM((K, r, 1), jnp.float32),
                pltpu.VMEM((K, r, 1), jnp.float32),
                pltpu.VMEM((K, r, lanes), jnp.float32),
                pltpu.VMEM((2, K, r, lanes), jnp.float32),
                pltpu.VMEM((2, K, r, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((n,)),
                pltpu.SemaphoreType.DMA((n,)),
                pltpu.SemaphoreType.DMA((TABLE_ROWS,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((I, K, r, lanes), jnp.float32),
            jax.ShapeDtypeStruct((I, K, r, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        name="paged_attention",
        interpret=interpret,
    )
    pool = (pages.kv_PKsC, pages.scale_PKal) if quantized else (pages.kv_PKsC,)
    out_IKrD, lse_IKrl = call(*plan, q_IKrD, table_I1M, *pool)
    # Items without a page were never written.
    live_I111 = (plan.begin_I < plan.end_I)[:, None, None, None]
    out_IKrD = jnp.where(live_I111, out_IKrD[:, :, :rows, lanes - D :], 0)
    return out_IKrD, jnp.where(live_I111, lse_IKrl[:, :, :rows, :1], MASKED)[..., 0]


def _kernel(
    item_I, begin_I, end_I, tokens_I, first_W, last_W, blocks_W,  # SMEM
    q_hbm, table_hbm, kv_hbm, *refs, blocks, quantized, tokens, heads, D,
):  # fmt: skip
    scale_hbm, refs = (refs[0], refs[1:]) if quantized else (None, refs)
    (
        out_hbm, lse_hbm, kv_buf, scale_buf, q_buf, table_buf, max_ref, mass_ref, sum_ref,
        out_buf, lse_buf, page_sems, q_sems, table_sems, out_sems,
    ) = refs  # fmt: skip
    w = pl.program_id(0)
    first, last, total = first_W[w], last_W[w], blocks_W[w]
    count, s, K = blocks.pages, kv_buf.shape[3], kv_buf.shape[2]
    t = count * s

    def table_copy(place):
        slot = jax.lax.rem(place, TABLE_ROWS)
        source = table_hbm.at[item_I[place]]
        return pltpu.make_async_copy(source, table_buf.at[slot], table_sems.at[slot])

    def q_copy(place):
        slot = jax.lax.rem(place, blocks.buffers)
        return pltpu.make_async_copy(q_hbm.at[item_I[place]], q_buf.at[slot], q_sems.at[slot])

    def out_copies(place):
        slot, item = jax.lax.rem(place, 2), item_I[place]
        return (
            pltpu.make_async_copy(out_buf.at[slot], out_hbm.at[item], out_sems.at[slot]),
            pltpu.make_async_copy(lse_buf.at[slot], lse_hbm.at[item], out_sems.at[slot]),
        )

    def page_copies(slot, i, page):
        copies = [pltpu.make_async_copy(kv_hbm.at[page], kv_buf.at[slot, i], page_sems.at[slot])]
        if quantized:
            source, target = scale_hbm.at[page], scale_buf.at[slot, i]
            copies.append(pltpu.make_async_copy(source, target, page_sems.at[slot]))
        return copies

    def pages_of(place, block):
        """First entry of a block, and how many pages it has."""
        item = item_I[place]
        entry = begin_I[item] + block * count
        return entry, jnp.minimum(end_I[item] - entry, count)

    def each_page(number, act):
        """`act` on each page of a block; most blocks are whole, and need no loop."""

        @pl.when(number == count)
        def _():
            for i in range(count):
                act(i)

        @pl.when(number < count)
        def _():
            jax.lax.fori_loop(0, number, lambda i, _: act(i), None)

    def fetch(place, block, slot):
        """Starts the copies of a block, and with a sequence's first those of its queries."""

        @pl.when(block == 0)
        def _():
            ahead = place + TABLE_ROWS - 1

            @pl.when(ahead < last)
            def _():
                table_copy(ahead).start()

            q_copy(place).start()
            table_copy(place).wait()

        entry, number = pages_of(place, block)
        row = jax.lax.rem(place, TABLE_ROWS)

        def start(i):
            for copy in page_copies(slot, i, table_buf[row, 0, entry + i]):
                copy.start()

        each_page(number, start)

    def after(place, block):
        _, number = pages_of(place, block)
        ends = begin_I[item_I[place]] + block * count + number == end_I[item_I[place]]
        return jnp.where(ends, place + 1, place), jnp.where(ends, 0, block + 1)

    def attend(slot, q_slot, base, length, masked):
        """Adds the keys base .. base + t to the sums; with `masked`, those that a row sees."""
        if masked:
            key_1t = base + jax.lax.broadcasted_iota(jnp.int32, (1, t), 1)
            row_r1 = jax.lax.broadcasted_iota(jnp.int32, (q_buf.shape[2], 1), 0)
            token_r1 = jnp.minimum(jax.lax.div(row_r1, heads), tokens - 1)
            visible_rt = key_1t <= length - tokens + token_r1
            live_t1 = base + jax.lax.broadcasted_iota(jnp.int32, (t, 1), 0) < length
        for kv in range(K):
            q_rD = q_buf[q_slot, kv]
            lanes = q_rD.shape[1]
            k_tD = kv_buf[slot, :, kv, :, :lanes].reshape(t, lanes)
            v_tD = kv_buf[slot, :, kv, :, kv_buf.shape[4] - lanes :].reshape(t, lanes)
            if quantized:
                k_tD, v_tD = (x.astype(jnp.float32).astype(q_rD.dtype) for x in (k_tD, v_tD))
            elif masked:  # what no token was written to may be anything
                v_tD = jnp.where(live_t1, v_tD, jnp.zeros_like(v_tD))
            score_rt = _dot(q_rD, k_tD, ((1,), (1,)))
            if quantized:
                score_rt = score_rt * _row(scale_buf, slot, kv, s, 0)
            if masked:
                score_rt = jnp.where(visible_rt, score_rt, MASKED)
            old_max_r1 = max_ref[kv]
            new_max_r1 = jnp.maximum(old_max_r1, jnp.max(score_rt, axis=1, keepdims=True))
            weight_rt = jnp.exp2(score_rt - new_max_r1)
            if masked:  # a row that has seen nothing yet has the maximum MASKED itself
                weight_rt = jnp.where(visible_rt, weight_rt, 0.0)
            shrink_r1 = jnp.exp2(old_max_r1 - new_max_r1)
            max_ref[kv] = new_max_r1
            mass_ref[kv] = mass_ref[kv] * shrink_r1 + jnp.sum(weight_rt, axis=1, keepdims=True)
            if quantized:
                weight_rt = weight_rt * _row(scale_buf, slot, kv, s, s)
                if masked:
                    weight_rt = jnp.where(visible_rt, weight_rt, 0.0)
            update_rD = _dot(weight_rt.astype(v_tD.dtype), v_tD, ((1,), (0,)))
            sum_ref[kv] = sum_ref[kv] * shrink_r1 + update_rD

    def finish(place):
        """Writes an item's results, after those before the last from the same buffer."""
        slot = jax.lax.rem(place, 2)

        @pl.when(place - 2 >= first)
        def _():
            for copy in out_copies(place - 2):
                copy.wait()

        for kv in range(K):
            mass_r1 = mass_ref[kv]
            seen_r1 = mass_r1 > 0
            mass_r1 = jnp.where(seen_r1, mass_r1, 1.0)
            out_buf[slot, kv] = sum_ref[kv] / mass_r1
            lse_r1 = jnp.where(seen_r1, max_ref[kv] + jnp.log2(mass_r1), MASKED)
            lse_buf[slot, kv] = jnp.broadcast_to(lse_r1, lse_buf.shape[2:])
        for copy in out_copies(place):
            copy.start()

    def block_step(j, carry):
        place, block, next_place, next_block = carry
        slot = jax.lax.rem(j, blocks.buffers)

        @pl.when(j + blocks.buffers - 1 < total)
        def _():
            fetch(next_place, next_block, jax.lax.rem(j + blocks.buffers - 1, blocks.buffers))

        @pl.when(block == 0)
        def _():
            max_ref[...] = jnp.full(max_ref.shape, MASKED, jnp.float32)
            mass_ref[...] = jnp.zeros(mass_ref.shape, jnp.float32)
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
            q_copy(place).wait()

        _, number = pages_of(place, block)

        def wait(i):
            for copy in page_copies(slot, i, 0):
                copy.wait()

        each_page(number, wait)
        item = item_I[place]
        base = (begin_I[item] + block * count) * s
        length = tokens_I[item]
        q_slot = jax.lax.rem(place, blocks.buffers)
        whole = base + t <= length - tokens + 1
        pl.when(whole)(functools.partial(attend, slot, q_slot, base, length, masked=False))
        pl.when(~whole)(functools.partial(attend, slot, q_slot, base, length, masked=True))
        new_place, new_block = after(place, block)

        @pl.when(new_place != place)
        def _():
            finish(place)

        going = j + blocks.buffers - 1 < total
        ahead = after(jnp.where(going, next_place, place), jnp.where(going, next_block, block))
        return new_place, new_block, *ahead

    @pl.when(total > 0)
    def _():
        for i in range(TABLE_ROWS - 1):

            @pl.when(first + i < last)
            def _(i=i):
                table_copy(first + i).start()

        def warm_up(j, carry):
            fetch(*carry, j)
            return after(*carry)

        start = (first, jnp.int32(0))
        ahead = jax.lax.fori_loop(0, jnp.minimum(total, blocks.buffers - 1), warm_up, start)
        jax.lax.fori_loop(0, total, block_step, (*start, *ahead))
        for back in (2, 1):

            @pl.when(last - back >= first)
            def _(back=back):
                for copy in out_copies(last - back):
                    copy.wait()


def _row(scale_buf, slot, kv, s, first):
    """[1, t] factors of a block: of each page the s from `first` on."""
    lanes = scale_buf.shape[-1]
    pieces = [
        scale_buf[slot, i, kv, pl.ds(at // lanes, 1), pl.ds(at % lanes, min(s, lanes))]
        for i in range(scale_buf.shape[1])
        for at in range(first, first + s, min(s, lanes))
    ]
    return jnp.concatenate(pieces, axis=1)


def _dot(x, y, contract):
    """A product accumulated in float32; float32 operands are multiplied as such."""
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x, y, (contract, ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
