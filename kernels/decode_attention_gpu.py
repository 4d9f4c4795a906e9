"""Attention over pages on NVIDIA GPUs.

The contract is `reference.paged_attention`'s. Written in Pallas on Triton, which JAX deprecates
from 0.11 on; its successor is Mosaic GPU (`jax.experimental.pallas.mosaic_gpu`). Nothing outside
this file knows of either.

Each program attends one tile of query rows to one part of a sequence's keys. A sequence's live keys
are cut into as many equal parts as it takes for few sequences to fill the card, and the parts'
results are merged. Keys and values are loaded through the page table, token by token, so a page may
be of any size.

Shape suffixes: as in pages.py; X parts of a sequence, t tokens of a step, R rows of a query tile.

Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867; parts of a sequence side by side,
Flash-Decoding, pytorch.org/blog/flash-decoding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vibejax.kernels import pages as pages_
from vibejax.kernels.reference import MASKED
from vibejax.kernels.tiles import Step

PROGRAMS = 528  # 4 for each of an H100's 132 multiprocessors
PART_TOKENS = 512  # the least worth a program
PARTS = 64


class Tile(NamedTuple):
    """What a program works on at a time, and how it is compiled.

    Attributes:
        rows: of queries, a power of two, at least 16, as is `tokens`.
        tokens: keys of a step.
        warps: that share a program.
        stages: steps in flight between memory and the multiprocessor.
    """

    rows: int
    tokens: int
    warps: int = 4
    stages: int = 3


def check(q_BTHD, pages, table_BM, length_B, shared_G=None, group: int = 1) -> None:
    """What the kernel asks of its arguments.

    Raises:
        ValueError: the kernel does not take them; the message names the value and the rule.
    """
    pages_.check(q_BTHD, pages, table_BM, length_B, shared_G, group)
    D = q_BTHD.shape[-1]
    if D not in (64, 128, 256):
        raise ValueError(f"head dimension {D}: must be 64, 128 or 256")
    size = pages.kv_PKsC.size
    if pages.kv_PKsC.dtype == jnp.int8 and 2**31 <= size <= 2**32:
        raise ValueError(  # Triton's offsets are 32 bits up to there, with a sign
            f"int8 pages of {size} bytes: must be less than {2**31} or more than {2**32}"
        )


def tile_for(rows: int, D: int, dtype, step: Step) -> Tile:
    """The tile for this many query rows of a key/value head; `step` is for bfloat16."""
    if dtype == jnp.float32:  # without tensor cores, every operand passes through registers
        return Tile(rows=16, tokens=32 if D <= 128 else 16, stages=1)
    rows = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return Tile(rows, *step) if D <= 128 else Tile(rows, tokens=32)


def paged_attention(
    q_BTHD: jax.Array,
    pages: pages_.Pages,
    table_BM: jax.Array,
    length_B: jax.Array,
    shared_G: jax.Array | None = None,
    group: int = 1,
    tile: Tile | None = None,
    parts: int | None = None,
    step: Step = Step(),  # noqa: B008 - a constant
    interpret: bool = False,
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
        tile: sizes; None takes those of `tile_for`.
        parts: of a sequence; None takes as many as fill the card.
        step: what `tile_for` takes.
        interpret: runs on a CPU, as `pallas_call` takes it.

    Returns:
        [B, T, H, D] of q's dtype; zeros for idle slots and for queries before the first token.

    Raises:
        ValueError: as `check`.
    """
    check(q_BTHD, pages, table_BM, length_B, shared_G, group)
    one_pass = functools.partial(_one_pass, tile=tile, parts=parts, step=step, interpret=interpret)
    return pages_.in_passes(one_pass, q_BTHD, pages, table_BM, length_B, shared_G, group)


def _one_pass(q_IKrD, pages, table_IM, begin_I, tokens_I, T, *, tile, parts, step, interpret):
    I, K, rows, D = q_IKrD.shape  # noqa: E741 - I: items of work
    P, _, s, C = pages.kv_PKsC.shape
    M = table_IM.shape[1]
    tile = tile or tile_for(rows, D, q_IKrD.dtype, step)
    r = -(-rows // tile.rows) * tile.rows
    if parts is None:
        wanted = -(-PROGRAMS // (I * K * (r // tile.rows)))
        parts = max(1, min(wanted, PARTS, M * s // PART_TOKENS))
    bounds_I2 = jnp.stack([begin_I * s, jnp.minimum(tokens_I, M * s)], axis=1).astype(jnp.int32)
    q_IKrD = jnp.pad(q_IKrD, ((0, 0), (0, 0), (0, r - rows), (0, 0)))
    arrays = [bounds_I2, table_IM, q_IKrD, pages.kv_PKsC]
    specs = [
        pl.BlockSpec((None, 2), lambda i, kv, x: (i, 0)),
        pl.BlockSpec((None, M), lambda i, kv, x: (i, 0)),
        pl.BlockSpec((None, None, r, D), lambda i, kv, x: (i, kv, 0, 0)),
        pl.BlockSpec((P, None, s, C), lambda i, kv, x: (0, kv, 0, 0)),
    ]
    if pages.scale_PKal is not None:
        arrays.append(pages.scale_PKal.reshape(P, K, 2 * s))
        specs.append(pl.BlockSpec((P, None, 2 * s), lambda i, kv, x: (0, kv, 0)))
    # The tiles of rows and the parts share one axis of the grid, which has three.
    tiles = r // tile.rows
    out_XIKrD, lse_XIKr = pl.pallas_call(
        functools.partial(
            _kernel, tile=tile, tiles=tiles, parts=parts, tokens=T, heads=rows // T, pages=P
        ),
        grid=(I, K, tiles * parts),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec(
                (None, None, None, tile.rows, D),
                lambda i, kv, x: (jax.lax.div(x, tiles), i, kv, jax.lax.rem(x, tiles), 0),
            ),
            pl.BlockSpec(
                (None, None, None, tile.rows),
                lambda i, kv, x: (jax.lax.div(x, tiles), i, kv, jax.lax.rem(x, tiles)),
            ),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((parts, I, K, r, D), jnp.float32),
            jax.ShapeDtypeStruct((parts, I, K, r), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        name="paged_attention",
        interpret=interpret,
    )(*arrays)
    return pages_.merge(out_XIKrD[..., :rows, :], lse_XIKr[..., :rows])


def _kernel(
    bounds_ref, table_ref, q_ref, kv_ref, *refs, tile, tiles, parts, tokens, heads, pages
):  # fmt: skip
    *scale_ref, out_ref, lse_ref = refs
    x = pl.program_id(2)
    part, first_row = jax.lax.div(x, tiles), jax.lax.rem(x, tiles) * tile.rows
    s, D, t = kv_ref.shape[1], q_ref.shape[1], tile.tokens
    begin, end = bounds_ref[0], bounds_ref[1]
    q_RD = q_ref[pl.ds(first_row, tile.rows), :]
    row_R = first_row + jnp.arange(tile.rows)
    last_R = end - tokens + jnp.minimum(jax.lax.div(row_R, heads), tokens - 1)
    steps = jax.lax.div(jnp.maximum(end - begin, 0) + t - 1, t)
    steps_part = jax.lax.div(steps + parts - 1, parts)

    def step(j, carry):
        max_R, mass_R, sum_RD = carry
        key_t = begin + j * t + jnp.arange(t)
        live_t = key_t < end
        entry_t, slot_t = jax.lax.div(key_t, s), jax.lax.rem(key_t, s)
        page_t = triton.load(table_ref.at[entry_t], mask=live_t, other=0)
        page_t = jnp.clip(page_t, 0, pages - 1)
        page_tD, slot_tD, live_tD = (
            jnp.broadcast_to(x[:, None], (t, D)) for x in (page_t, slot_t, live_t)
        )

        def load(first):
            lane_tD = jnp.broadcast_to(first + jnp.arange(D)[None, :], (t, D))
            place = kv_ref.at[page_tD, slot_tD, lane_tD]
            return triton.load(place, mask=live_tD, other=0).astype(q_RD.dtype)

        score_Rt = _dot(q_RD, load(0).T)
        if scale_ref:
            k_scale_t = triton.load(scale_ref[0].at[page_t, slot_t], mask=live_t, other=0)
            score_Rt *= k_scale_t[None, :]
        visible_Rt = key_t[None, :] <= last_R[:, None]
        score_Rt = jnp.where(visible_Rt, score_Rt, MASKED)
        new_max_R = jnp.maximum(max_R, jnp.max(score_Rt, axis=1))
        weight_Rt = jnp.exp2(score_Rt - new_max_R[:, None])
        weight_Rt = jnp.where(visible_Rt, weight_Rt, 0.0)
        shrink_R = jnp.exp2(max_R - new_max_R)
        mass_R = mass_R * shrink_R + jnp.sum(weight_Rt, axis=1)
        if scale_ref:
            v_scale_t = triton.load(scale_ref[0].at[page_t, slot_t + s], mask=live_t, other=0)
            weight_Rt *= v_scale_t[None, :]
        update_RD = _dot(weight_Rt.astype(q_RD.dtype), load(D))
        return new_max_R, mass_R, sum_RD * shrink_R[:, None] + update_RD

    start = (
        jnp.full((tile.rows,), MASKED, jnp.float32),
        jnp.zeros((tile.rows,), jnp.float32),
        jnp.zeros((tile.rows, D), jnp.float32),
    )
    first = part * steps_part
    last = jnp.minimum(first + steps_part, steps)
    max_R, mass_R, sum_RD = jax.lax.fori_loop(first, last, step, start)
    seen_R = mass_R > 0
    mass_R = jnp.where(seen_R, mass_R, 1.0)
    out_ref[...] = sum_RD / mass_R[:, None]
    lse_ref[...] = jnp.where(seen_R, max_R + jnp.log2(mass_R), MASKED)


def _dot(x, y):
    """A product accumulated in float32; float32 operands are multiplied as such."""
    exact = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x, y, (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
