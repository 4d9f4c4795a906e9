"""Attention over pages for a CPU, by way of a copy of what each row has.

Gathering a sequence's pages for every token costs several times what attending to it does. So each
row has a copy of its keys and values, in the order in which a product reads them. It is made when
a sequence enters the row; the steps of a window add theirs beside it, and at the window's end
these go into the copy and into the pages. Chips with a kernel that reads pages where they lie do
without.

Shape suffixes: as in pages.py; B rows, S tokens of a copy, W steps of a window.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vibejax.kernels import pages as pages_
from vibejax.kernels.reference import MASKED, product


class Copies(NamedTuple):
    """Keys [B, K, D, S] and values [B, K, S, D] of one layer, of the tokens cached so far."""

    k_BKDS: jax.Array
    v_BKSD: jax.Array


class Recent(NamedTuple):
    """Keys [B, K, D, W] and values [B, K, W, D] of one layer, of the steps of a window."""

    k_BKDW: jax.Array
    v_BKWD: jax.Array


def empty(rows: int, tokens: int, kv_heads: int, head_dim: int, dtype) -> Copies:
    """Copies of nothing."""
    return Copies(
        jnp.zeros((rows, kv_heads, head_dim, tokens), dtype),
        jnp.zeros((rows, kv_heads, tokens, head_dim), dtype),
    )


def empty_recent(copies: Copies, steps: int) -> Recent:
    """Room for the steps of a window."""
    B, K, D, _ = copies.k_BKDS.shape
    dtype = copies.k_BKDS.dtype
    return Recent(jnp.zeros((B, K, D, steps), dtype), jnp.zeros((B, K, steps, D), dtype))


def refresh(
    copies: Copies,
    pages: pages_.Pages,
    table_BM: jax.Array,
    cached_B: jax.Array,
    fresh_B: jax.Array,
) -> Copies:
    """The copies with those of some rows made anew.

    Args:
        copies: of all rows.
        pages: the pool.
        table_BM: [B, M] int32 pages of each row, as many as a copy has room for.
        cached_B: [B] int32 tokens that each row has; what the pages hold beyond is not taken.
        fresh_B: [B] bool, whose copies are made.
    """
    order_B = jnp.argsort(~fresh_B)

    def one_row(i, copies):
        b = order_B[i]
        k_1SKD, v_1SKD = pages_.read(pages, jax.lax.dynamic_slice_in_dim(table_BM, b, 1))
        seen_S = jnp.arange(k_1SKD.shape[1]) < cached_B[b]
        v_1SKD = jnp.where(seen_S[None, :, None, None], v_1SKD, 0)  # a weight of 0 hides no NaN
        new = Copies(k_1SKD.transpose(0, 2, 3, 1), v_1SKD.swapaxes(1, 2))
        return jax.tree.map(
            lambda of_rows, of_row: jax.lax.dynamic_update_slice_in_dim(
                of_rows, of_row.astype(of_rows.dtype), b, 0
            ),
            copies,
            new,
        )

    return jax.lax.fori_loop(0, fresh_B.sum(), one_row, copies)


def attend(
    copies: Copies,
    recent: Recent,
    q_BHD: jax.Array,
    k_BKD: jax.Array,
    v_BKD: jax.Array,
    cached_B: jax.Array,
    step: jax.Array,
    *,
    rounded: bool,
) -> tuple[jax.Array, Recent]:
    """Attention of the tokens of one step; softmax in float32.

    Args:
        copies: of what was cached before the window.
        recent: of the window's steps so far.
        q_BHD: [B, H, D] queries, rotated, H a multiple of K.
        k_BKD: [B, K, D] keys of the same tokens, rotated.
        v_BKD: [B, K, D] values.
        cached_B: [B] int32 tokens that each row had before the window.
        step: scalar int32, which of the window's.
        rounded: whether the pages hold int8: the new keys and values are then what they will be
            there.

    Returns:
        [B, H, D] of q's dtype, and the steps with this one.
    """
    B, H, D = q_BHD.shape
    K, S = copies.v_BKSD.shape[1:3]
    if rounded:
        k_BKD, v_BKD = (_as_rounded(x) for x in (k_BKD, v_BKD))
    k_BKDW = jax.lax.dynamic_update_slice(recent.k_BKDW, k_BKD[..., None], (0, 0, 0, step))
    v_BKWD = jax.lax.dynamic_update_slice(recent.v_BKWD, v_BKD[:, :, None], (0, 0, step, 0))
    q_BKGD = q_BHD.reshape(B, K, H // K, D) * jnp.asarray(D**-0.5, q_BHD.dtype)
    before_BKGS = product("BKGD,BKDS->BKGS", q_BKGD, copies.k_BKDS)
    within_BKGW = product("BKGD,BKDW->BKGW", q_BKGD, k_BKDW)
    seen_BS = jnp.arange(S)[None] < cached_B[:, None]
    before_BKGS = jnp.where(seen_BS[:, None, None], before_BKGS, MASKED)
    seen_W = jnp.arange(k_BKDW.shape[3]) <= step
    within_BKGW = jnp.where(seen_W[None, None, None], within_BKGW, MASKED)
    largest = jnp.maximum(before_BKGS.max(axis=-1), within_BKGW.max(axis=-1))[..., None]
    before_BKGS, within_BKGW = jnp.exp(before_BKGS - largest), jnp.exp(within_BKGW - largest)
    # As a product: a sum would round the exponentials in it otherwise with more rows.
    mass_BKG = sum(
        product("BKGS,SF->BKGF", x, jnp.ones((x.shape[-1], 8)))[..., 0]
        for x in (before_BKGS, within_BKGW)
    )
    sum_BKGD = product("BKGS,BKSD->BKGD", before_BKGS.astype(q_BHD.dtype), copies.v_BKSD)
    sum_BKGD += product("BKGW,BKWD->BKGD", within_BKGW.astype(q_BHD.dtype), v_BKWD)
    out_BKGD = (sum_BKGD / mass_BKG[..., None]).astype(q_BHD.dtype)
    return out_BKGD.reshape(B, H, D), Recent(k_BKDW, v_BKWD)


def keep(
    copies: Copies,
    pages: pages_.Pages,
    recent: Recent,
    table_BM: jax.Array,
    cached_B: jax.Array,
    count_B: jax.Array,
) -> tuple[Copies, pages_.Pages]:
    """The copies and the pages with the tokens of a window.

    Args:
        copies: of what was cached before the window; the copy of a row that goes on has room for
            all its steps.
        pages: the pool.
        recent: of the window's steps.
        table_BM: [B, M] int32 pages of each row.
        cached_B: [B] int32 tokens that each row had before the window.
        count_B: [B] int32 how many steps each row took.
    """
    step_W = jnp.arange(recent.k_BKDW.shape[3])
    position_BW = jnp.where(step_W[None] < count_B[:, None], cached_B[:, None] + step_W[None], -1)
    k_BWKD = recent.k_BKDW.transpose(0, 3, 1, 2)
    pages = pages_.write(pages, k_BWKD, recent.v_BKWD.swapaxes(1, 2), table_BM, position_BW)

    def one_row(b, copies):
        new = (jax.lax.dynamic_slice_in_dim(x, b, 1) for x in recent)
        k_1KDW, v_1KWD = new
        return Copies(
            jax.lax.dynamic_update_slice(copies.k_BKDS, k_1KDW, (b, 0, 0, cached_B[b])),
            jax.lax.dynamic_update_slice(copies.v_BKSD, v_1KWD, (b, 0, cached_B[b], 0)),
        )

    return jax.lax.fori_loop(0, cached_B.shape[0], one_row, copies), pages


def _as_rounded(x_BKD: jax.Array) -> jax.Array:
    rounded, scale_BK = pages_.quantize(x_BKD)
    return (rounded.astype(jnp.float32) * scale_BK[..., None]).astype(x_BKD.dtype)
