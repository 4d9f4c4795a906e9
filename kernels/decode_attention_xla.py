"""Attention over pages in plain XLA, for a CPU and anything that no kernel is written for.

The contract is `reference.paged_attention`'s. Pages are gathered a few at a time, as far as the
longest live sequence goes; a sequence that has ended goes on reading a page that it has read.

Shape suffixes: as in pages.py; c pages of a block, t = c * s tokens of it.

Source: online softmax, Milakov and Gimelshein, arXiv:1805.02867.
"""

import functools

import jax
import jax.numpy as jnp

from vibejax.kernels import pages as pages_
from vibejax.kernels.reference import MASKED, product

BLOCK_TOKENS = 256


def check(q_BTHD, pages, table_BM, length_B, shared_G=None, group: int = 1) -> None:
    """As `pages.check`: this implementation asks no more."""
    pages_.check(q_BTHD, pages, table_BM, length_B, shared_G, group)


def paged_attention(
    q_BTHD: jax.Array,
    pages: pages_.Pages,
    table_BM: jax.Array,
    length_B: jax.Array,
    shared_G: jax.Array | None = None,
    group: int = 1,
    block_tokens: int = BLOCK_TOKENS,
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
        block_tokens: tokens read at once of each sequence, in whole pages.

    Returns:
        [B, T, H, D] of q's dtype; zeros for idle slots and for queries before the first token.

    Raises:
        ValueError: as `check`.
    """
    check(q_BTHD, pages, table_BM, length_B, shared_G, group)
    block = max(1, min(block_tokens // pages.page_tokens, table_BM.shape[1]))
    one_pass = functools.partial(_one_pass, block=block)
    return pages_.in_passes(one_pass, q_BTHD, pages, table_BM, length_B, shared_G, group)


def _one_pass(q_IKrD, pages, table_IM, begin_I, tokens_I, T, *, block):
    I, K, r, D = q_IKrD.shape  # noqa: E741 - I: items of work
    P, _, s, _ = pages.kv_PKsC.shape
    M = table_IM.shape[1]
    end_I = jnp.minimum(-(-tokens_I // s), M)
    last_Ir = tokens_I[:, None] - T + (jnp.arange(r) * T // r)[None]

    def step(carry):
        entry, max_IKr, mass_IKr, sum_IKrD = carry
        entry_Ic = begin_I[:, None] + entry + jnp.arange(block)[None]
        near_Ic = jnp.clip(entry_Ic, 0, jnp.maximum(end_I - 1, 0)[:, None])
        page_Ic = jnp.take_along_axis(table_IM, near_Ic, axis=1)
        page_Ic = jnp.clip(page_Ic, 0, P - 1)  # those of idle slots
        kv_IcKsC = pages.kv_PKsC[page_Ic].astype(q_IKrD.dtype)
        key_It = (entry_Ic[:, :, None] * s + jnp.arange(s)[None, None]).reshape(I, -1)
        visible_Irt = (key_It[:, None] <= last_Ir[:, :, None]) & (key_It < tokens_I[:, None])[
            :, None
        ]
        visible_IKrt = visible_Irt[:, None]
        k_scale_IKt, v_scale_IKt = _scales(pages, page_Ic)
        score_IKrcs = product("IKrD,IcKsD->IKrcs", q_IKrD, kv_IcKsC[..., :D])
        score_IKrt = score_IKrcs.reshape(I, K, r, -1) * k_scale_IKt[:, :, None]
        score_IKrt = jnp.where(visible_IKrt, score_IKrt, MASKED)
        new_max_IKr = jnp.maximum(max_IKr, score_IKrt.max(axis=-1))
        weight_IKrt = jnp.exp2(score_IKrt - new_max_IKr[..., None])
        weight_IKrt = jnp.where(visible_IKrt, weight_IKrt, 0)
        shrink_IKr = jnp.exp2(max_IKr - new_max_IKr)
        mass_IKr = mass_IKr * shrink_IKr + weight_IKrt.sum(axis=-1)
        weight_IKrt = jnp.where(visible_IKrt, weight_IKrt * v_scale_IKt[:, :, None], 0)
        weight_IKrcs = weight_IKrt.reshape(score_IKrcs.shape).astype(q_IKrD.dtype)
        live_Ic1s1 = (key_It < tokens_I[:, None]).reshape(I, block, 1, s, 1)
        v_IcKsD = jnp.where(live_Ic1s1, kv_IcKsC[..., D:], 0)
        update_IKrD = product("IKrcs,IcKsD->IKrD", weight_IKrcs, v_IcKsD)
        return entry + block, new_max_IKr, mass_IKr, sum_IKrD * shrink_IKr[..., None] + update_IKrD

    zeros_IKr = jnp.zeros((I, K, r), jnp.float32)
    start = (0, zeros_IKr + MASKED, zeros_IKr, jnp.zeros(q_IKrD.shape, jnp.float32))
    longest = jnp.max(end_I - begin_I)
    _, max_IKr, mass_IKr, sum_IKrD = jax.lax.while_loop(lambda x: x[0] < longest, step, start)
    seen_IKr = mass_IKr > 0
    mass_IKr = jnp.where(seen_IKr, mass_IKr, 1)
    lse_IKr = jnp.where(seen_IKr, max_IKr + jnp.log2(mass_IKr), MASKED)
    return sum_IKrD / mass_IKr[..., None], lse_IKr


def _scales(pages, page_Ic):
    """[I, K, t] factors of the keys and of the values, or 1."""
    if pages.scale_PKal is None:
        one = jnp.ones((1, 1, 1), jnp.float32)
        return one, one
    I, c = page_Ic.shape  # noqa: E741 - I: items of work
    K, s = pages.kv_PKsC.shape[1:3]
    scale_IcK2s = pages.scale_PKal[page_Ic].reshape(I, c, K, 2, s)
    return tuple(scale_IcK2s.transpose(3, 0, 2, 1, 4).reshape(2, I, K, -1))
