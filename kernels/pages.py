"""The cache of keys and values that decoding reads: pages, and what every kernel over them shares.

A page holds the keys and values of s consecutive tokens of one sequence. A sequence's row of the
page table names its pages in order, and sequences with a common prompt may name the same ones.

A token's key and value lie side by side, C = 2 D numbers: a page is then one contiguous piece of
memory for all heads together, and fills the 128 lanes of a TPU with head dimension 64 too. The
layers of a model may share one pool: layer l's pages are the table's plus l times their number.

Shape suffixes: P pages, K key/value heads, s tokens of a page, D head dimension, C = 2 D, a * l =
2 s scales of a page, of its keys and then of its values, in rows of l = min(2 s, 128), B sequences,
M table entries of a sequence, T tokens, S = M * s, N = B * T, H query heads, G = H / K, Gr groups
of n sequences; and of a pass over pages, I items, r query rows of one key/value head.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOG2E = math.log2(math.e)


class Pages(NamedTuple):
    """A pool of pages. Devices may share the heads, and may each have pages of their own.

    Attributes:
        kv_PKsC: [P, K, s, C] bfloat16, float32 or int8; the key is in the first D of C.
        scale_PKal: [P, K, a, l] float32 factors of the int8 numbers, one a token; else None.
    """

    kv_PKsC: jax.Array
    scale_PKal: jax.Array | None = None

    @property
    def page_tokens(self) -> int:
        """Tokens of a page, s."""
        return self.kv_PKsC.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.kv_PKsC.shape[3] // 2


def empty(pages: int, kv_heads: int, page_tokens: int, head_dim: int, dtype) -> Pages:
    """A pool of zeros; int8 has scales.

    Args:
        pages: P; of int8 a multiple of 8, or a TPU copies the scales to write some.
        kv_heads: K.
        page_tokens: s; of int8 a power of two at most 64, or a multiple of 128.
        head_dim: D.
        dtype: of keys and values.
    """
    kv_PKsC = jnp.zeros((pages, kv_heads, page_tokens, 2 * head_dim), dtype)
    if kv_PKsC.dtype != jnp.int8:
        return Pages(kv_PKsC)
    lanes = min(2 * page_tokens, 128)
    shape = (pages, kv_heads, 2 * page_tokens // lanes, lanes)
    return Pages(kv_PKsC, jnp.zeros(shape, jnp.float32))


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds vectors, the last axis of `x`, to int8 multiples of their largest number over 127.

    Returns:
        int8 of x's shape, and the float32 factors, without the last axis.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    rounded = jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None])
    return rounded.astype(jnp.int8), scale


def write(
    pages: Pages,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    table_BM: jax.Array,
    position_BT: jax.Array,
) -> Pages:
    """The pages with new tokens in them; in place where `pages` is donated or carried by a loop.

    On a mesh, call it on each device's heads, in a `shard_map`.
    (A CPU scatters bfloat16 by way of a float32 copy of the pool: give it float32.)

    Args:
        pages: the pool.
        k_BTKD: [B, T, K, D] keys, rotated.
        v_BTKD: [B, T, K, D] values.
        table_BM: [B, M] int32 pages of each sequence.
        position_BT: [B, T] int32 position of each token in its sequence. A token is dropped where
            this is outside of the table, or the table's entry outside of the pool.
    """
    P, K, s, C = pages.kv_PKsC.shape
    entry_BT = jnp.clip(position_BT // s, 0, table_BM.shape[1] - 1)
    page_BT = jnp.take_along_axis(table_BM, entry_BT, axis=1)
    kept_BT = (position_BT // s == entry_BT) & (page_BT >= 0) & (page_BT < P)
    page_N = jnp.where(kept_BT, page_BT, P).reshape(-1)  # a negative one would count from the end
    slot_N = (position_BT % s).reshape(-1)
    quantized = pages.scale_PKal is not None
    if quantized:
        (k_BTKD, k_scale_BTK), (v_BTKD, v_scale_BTK) = quantize(k_BTKD), quantize(v_BTKD)
    kv_NKC = jnp.concatenate([k_BTKD, v_BTKD], axis=-1).reshape(-1, K, C)
    # As rows of one token and head each, in one list: of another scatter a TPU copies the pool.
    row_NK = (page_N[:, None] * K + jnp.arange(K)[None]) * s + slot_N[:, None]
    rows = pages.kv_PKsC.reshape(-1, C).at[row_NK.reshape(-1)]
    kv_PKsC = rows.set(kv_NKC.reshape(-1, C).astype(pages.kv_PKsC.dtype), mode="drop")
    kv_PKsC = kv_PKsC.reshape(pages.kv_PKsC.shape)
    if not quantized:
        return Pages(kv_PKsC)
    # Of scales a row is a single one, the values' behind the keys'.
    scale = jnp.stack([k_scale_BTK, v_scale_BTK], axis=-1).reshape(-1)
    row_NK2 = (page_N[:, None] * K + jnp.arange(K)[None])[..., None] * 2 + jnp.arange(2)[None, None]
    row_NK2 = row_NK2 * s + slot_N[:, None, None]
    scales = pages.scale_PKal.reshape(-1).at[row_NK2.reshape(-1)]
    return Pages(kv_PKsC, scales.set(scale, mode="drop").reshape(pages.scale_PKal.shape))


def read(pages: Pages, table_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys and values of whole table rows; entries outside of the pool give zeros.

    Returns:
        [B, S, K, D] keys and values of the pool's dtype; float32 from int8.
    """
    B, M = table_BM.shape
    P, K, s, C = pages.kv_PKsC.shape
    inside_BM = (table_BM >= 0) & (table_BM < P)
    page_BM = jnp.where(inside_BM, table_BM, 0)
    kv_BMKsC = pages.kv_PKsC[page_BM]
    if pages.scale_PKal is not None:
        scale_BMK2s = pages.scale_PKal[page_BM].reshape(B, M, K, 2, s)
        kv_BMKs2D = kv_BMKsC.astype(jnp.float32).reshape(B, M, K, s, 2, C // 2)
        kv_BMKsC = (kv_BMKs2D * scale_BMK2s.swapaxes(3, 4)[..., None]).reshape(kv_BMKsC.shape)
    kv_BMKsC = jnp.where(inside_BM[:, :, None, None, None], kv_BMKsC, 0)
    kv_BSKC = kv_BMKsC.swapaxes(2, 3).reshape(B, M * s, K, C)
    return kv_BSKC[..., : C // 2], kv_BSKC[..., C // 2 :]


def check(q_BTHD: jax.Array, pages: Pages, table_BM, length_B, shared_G, group: int) -> None:
    """What every implementation asks of its arguments.

    Raises:
        ValueError: they do not fit together; the message names the value and the rule.
    """
    B, T, H, D = q_BTHD.shape
    K = pages.kv_PKsC.shape[1]
    if H % K:
        raise ValueError(f"{H} query heads are not a multiple of {K} key/value heads")
    if T < 1:
        raise ValueError(f"{T} query tokens: must be at least 1")
    if pages.head_dim != D:
        raise ValueError(
            f"head dimension {D} of queries: must be that of the pages, {pages.head_dim}"
        )
    q_dtype, dtype = q_BTHD.dtype.name, pages.kv_PKsC.dtype.name
    if q_dtype not in ("bfloat16", "float32") or dtype not in (q_dtype, "int8"):
        raise ValueError(
            f"dtypes {q_dtype} of queries and {dtype} of pages: must be both bfloat16 or both "
            "float32, or the pages int8"
        )
    if (dtype == "int8") != (pages.scale_PKal is not None):
        raise ValueError(f"pages of {dtype}: int8 has scales, and nothing else has")
    if table_BM.shape[0] != B or length_B.shape != (B,):
        raise ValueError(
            f"table {table_BM.shape} and lengths {length_B.shape}: must have {B} rows each"
        )
    if B % group:
        raise ValueError(f"{B} sequences are not a multiple of groups of {group}")
    if shared_G is not None and shared_G.shape != (B // group,):
        raise ValueError(f"shared pages {shared_G.shape}: must be {(B // group,)}, one a group")


def in_passes(
    one_pass: Callable,
    q_BTHD: jax.Array,
    pages: Pages,
    table_BM: jax.Array,
    length_B: jax.Array,
    shared_G: jax.Array | None,
    group: int,
) -> jax.Array:
    """Attention as one pass over pages, or as one over shared pages and one over the rest.

    Args:
        one_pass: (q_IKrD, pages, table_IM, begin_I, tokens_I, T) -> (out_IKrD, lse_IKr), float32.
            Attends queries whose scores are logarithms to the base 2 to the keys of each item from
            page `begin` to token `tokens`. The rows are T tokens of G heads each, token t seeing
            the keys before tokens - (T - 1 - t); with T 1, all rows see all. `lse` is to the base
            2; rows that see nothing have out 0 and lse reference.MASKED.
        q_BTHD: [B, T, H, D], and the others as `paged_attention` takes them.

    Returns:
        [B, T, H, D] of q's dtype.
    """
    B, T, H, D = q_BTHD.shape
    K, s = pages.kv_PKsC.shape[1:3]
    scale = D**-0.5 * LOG2E
    q_BTKGD = (q_BTHD.astype(jnp.float32) * scale).astype(q_BTHD.dtype).reshape(B, T, K, H // K, D)
    q_BKTGD = q_BTKGD.transpose(0, 2, 1, 3, 4)
    begin_B = jnp.zeros_like(length_B)
    parts = []
    if shared_G is not None and group > 1:
        q_GrKnTGD = q_BKTGD.reshape(B // group, group, K, T, H // K, D).swapaxes(1, 2)
        shared_Gr, row_Gr = shared_pages(length_B, shared_G, group, T, s)
        out, lse = one_pass(
            q_GrKnTGD.reshape(B // group, K, -1, D), pages, table_BM[row_Gr],
            jnp.zeros_like(shared_Gr), shared_Gr * s, 1,
        )  # fmt: skip
        out = out.reshape(B // group, K, group, -1, D).swapaxes(1, 2).reshape(B, K, -1, D)
        lse = lse.reshape(B // group, K, group, -1).swapaxes(1, 2).reshape(B, K, -1)
        parts.append((out, lse))
        begin_B = jnp.repeat(shared_Gr, group)
    parts.append(one_pass(q_BKTGD.reshape(B, K, -1, D), pages, table_BM, begin_B, length_B, T))
    out_BKrD, _ = merge(*(jnp.stack(x) for x in zip(*parts, strict=True)))
    out_BKTGD = jnp.where((length_B > 0)[:, None, None, None], out_BKrD, 0).reshape(q_BKTGD.shape)
    return out_BKTGD.transpose(0, 2, 1, 3, 4).reshape(q_BTHD.shape).astype(q_BTHD.dtype)


def shared_pages(length_B, shared_G, group, T, s):
    """How many pages are read once a group: of `shared_G`, those that all queries see whole.

    Returns:
        [Gr] pages, and [Gr] the table row of a live member, or of any where none is.
    """
    length_Gn = length_B.reshape(-1, group)
    live_Gn = length_Gn > 0
    seen_Gn = jnp.where(live_Gn, jnp.maximum(length_Gn - T + 1, 0) // s, jnp.iinfo(jnp.int32).max)
    shared_G = jnp.where(live_Gn.any(axis=1), jnp.minimum(shared_G, seen_Gn.min(axis=1)), 0)
    row_G = jnp.arange(length_Gn.shape[0]) * group + jnp.argmax(live_Gn, axis=1)
    return shared_G.astype(jnp.int32), row_G


def merge(out_N: jax.Array, lse_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over N sets of keys together, from the results over each.

    Args:
        out_N: [N, ..., D] float32 results.
        lse_N: [N, ...] float32 logarithms to the base 2 of the sums of exponentials.

    Returns:
        The result [..., D] and its logarithm [...].
    """
    max_ = lse_N.max(axis=0)
    weight_N = jnp.exp2(lse_N - max_[None])
    mass = weight_N.sum(axis=0)
    return (weight_N[..., None] * out_N).sum(axis=0) / mass[..., None], max_ + jnp.log2(mass)
