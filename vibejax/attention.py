"""Attention as the model calls it: one signature each for rows and for decoding.

Shape suffixes: as in vibejax/kernels/reference.py.

The mask is data: segment ids say which tokens belong together, positions say which come first.
Over the `context` axis queries stay where they are, and keys and values are gathered.

Implementations of rows:
    reference: holds all scores of a row, [T, T] a head.
    xla: goes over them in blocks and skips those that hold no allowed pair; memory linear in T.
    tpu, gpu: the same as kernels, compiled for the chip of the mesh's devices.
    tpu_interpreted, gpu_interpreted: those kernels step by step on a CPU, to look into them.
    cudnn: cuDNN's kernel, for rows of one document each (`segment_BT` None).
    auto: the kernels on a chip that has tiles, elsewhere `xla`.
Nothing else takes one implementation for another.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vibejax.kernels import (
    decode_attention_gpu,
    decode_attention_tpu,
    decode_attention_xla,
    flash_attention_gpu,
    flash_attention_tpu,
    flash_attention_xla,
    reference,
    row_copies,
    tiles,
)
from vibejax.kernels import pages as pages_
from vibejax.kernels.pages import Pages
from vibejax.kernels.row_copies import Copies, Recent
from vibejax.sharding import constrain, context_chunk, spec, ways

Implementation = Literal[
    "auto", "reference", "xla", "tpu", "gpu", "tpu_interpreted", "gpu_interpreted", "cudnn"
]
INTERPRETED_CHIP = "v5e"  # whose tiles are taken where there is no chip
POOL = spec("batch", "kv_heads", None, None)  # of a device's pages, and of these its heads


@jax.named_scope("attention")
def attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array | None,
    implementation: Implementation = "auto",
    place_BT: jax.Array | None = None,
) -> jax.Array:
    """Causal grouped-query attention of packed rows to themselves.

    Args:
        q_BTHD: [B, T, H, D] queries, rotated.
        k_BTKD: [B, T, K, D] keys, rotated, H a multiple of K.
        v_BTKD: [B, T, K, D] values.
        position_BT: [B, T] int32 position of each token in its document.
        segment_BT: [B, T] int32 document of each token; 0 is padding. None: a row is one document.
        implementation: see the module; all but `reference` need each document to be one run, in
            order, and ids of at most T.
        place_BT: [B, T] int32 where in its row each token belongs, where `packing.spread` put the
            rows' tokens in another order, in chunks of `sharding.context_chunk`.

    Returns:
        [B, T, H, D] of q's dtype, zeros at padding; what a backward pass needs of it is named
        `attention_output` and, of a kernel, `attention_logsumexp` for rematerialisation policies.

    Raises:
        ValueError: the head counts do not divide, keys and values differ in shape, or the
            implementation cannot take the dtypes, the head dimension or the mesh's devices.
    """
    _check_heads(q_BTHD.shape[2], k_BTKD.shape[2], k_BTKD.shape, v_BTKD.shape)
    kind, platform = _device()
    if implementation == "auto":
        implementation = _kernel(kind, platform) or "xla"
    if implementation == "cudnn":
        return _cudnn(q_BTHD, k_BTKD, v_BTKD, segment_BT, place_BT, platform)
    if segment_BT is None:
        segment_BT = jnp.ones(q_BTHD.shape[:2], jnp.int32)
    k_BSKD = _in_row_order(constrain(k_BTKD, "batch", None, "kv_heads", None), place_BT)
    v_BSKD = _in_row_order(constrain(v_BTKD, "batch", None, "kv_heads", None), place_BT)
    kv_position_BS = _in_row_order(constrain(position_BT, "batch", None), place_BT)
    kv_segment_BS = _in_row_order(constrain(segment_BT, "batch", None), place_BT)
    arrays = (q_BTHD, k_BSKD, v_BSKD, position_BT, segment_BT, kv_position_BS, kv_segment_BS)
    if implementation == "reference":
        return checkpoint_name(reference.attention(*arrays), "attention_output")
    if implementation == "xla":
        return _per_device(flash_attention_xla.attention)(*arrays)
    backend, _, interpreted = implementation.partition("_")
    if not interpreted and platform != backend:
        raise ValueError(
            f"attention {implementation!r}: the mesh's devices are {platform or 'none'}"
        )
    if backend == "tpu":
        chip = INTERPRETED_CHIP if interpreted else tiles.tpu_chip(kind)
        sizes = flash_attention_tpu.tiles_for(q_BTHD, k_BTKD, v_BTKD, chip)
        kernel = flash_attention_tpu.attention
    else:
        sizes = flash_attention_gpu.tiles_for(q_BTHD, k_BTKD, v_BTKD, tiles.gpu_capability(kind))
        kernel = flash_attention_gpu.attention
    return _per_device(lambda *args: kernel(*args, sizes, bool(interpreted)))(*arrays)


def _in_row_order(x_BT: jax.Array, place_BT: jax.Array | None) -> jax.Array:
    """`x` of the whole row, [B, T, ...], with its chunks where they belong."""
    if place_BT is None:
        return x_BT
    B, T = place_BT.shape
    chunk = context_chunk(T, ways(jax.sharding.get_abstract_mesh(), "length"))
    order_BC = jnp.argsort(constrain(place_BT, "batch", None)[:, ::chunk], axis=1)
    x_BCt = x_BT.reshape(B, T // chunk, chunk, *x_BT.shape[2:])
    index = order_BC.reshape(B, -1, *(1,) * (x_BCt.ndim - 2))
    return jnp.take_along_axis(x_BCt, index, axis=1).reshape(x_BT.shape)


def _device() -> tuple[str, str]:
    """Kind and platform of the mesh's devices, empty without a mesh.

    `jax.devices()` names the CPU while a program is compiled for a chip that is not there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.device_kind, device.platform) if device else ("", "")


def _kernel(kind: str, platform: str) -> Literal["tpu", "gpu"] | None:
    """What our kernels are called for these devices; None: there are none for them."""
    if platform == "tpu" and kind in tiles.TPU_CHIPS:
        return "tpu"
    return "gpu" if platform == "gpu" else None


def has_kernels() -> bool:
    """Whether `auto` takes our kernels on the mesh in force."""
    return _kernel(*_device()) is not None


def _cudnn(q_BTHD, k_BTKD, v_BTKD, segment_BT, place_BT, platform):
    if segment_BT is not None or place_BT is not None:
        raise ValueError(
            "attention 'cudnn': must be rows of one document each, in order (segment_BT and "
            "place_BT None); with segment ids it would hold a mask of [T, T]"
        )
    if platform != "gpu":
        raise ValueError(f"attention 'cudnn': the mesh's devices are {platform or 'none'}")
    heads = spec("batch", None, "heads", None), spec("batch", None, "kv_heads", None)
    attend = jax.shard_map(
        lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="cudnn"
        ),
        in_specs=(heads[0], heads[1], heads[1]),
        out_specs=heads[0],
        check_vma=False,
    )
    return checkpoint_name(attend(q_BTHD, k_BTKD, v_BTKD), "attention_output")


def _per_device(attend):
    """`attend` on each device's rows, queries and heads; keys and values of the whole row."""
    if jax.sharding.get_abstract_mesh().empty:
        return attend
    queries = spec("batch", "length", "heads", None)
    keys = spec("batch", None, "kv_heads", None)
    query_ids, key_ids = spec("batch", "length"), spec("batch", None)
    return jax.shard_map(
        attend,
        in_specs=(queries, keys, keys, query_ids, query_ids, key_ids, key_ids),
        out_specs=queries,
        check_vma=False,
    )


@jax.named_scope("paged_attention")
def paged_attention(
    q_BTHD: jax.Array,
    pages: Pages,
    table_BM: jax.Array,
    length_B: jax.Array,
    shared_G: jax.Array | None = None,
    group: int = 1,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Attention of the last tokens of each sequence over its cached ones.

    On a mesh each device has its own sequences and pages (`batch`) and its own heads (`tensor`):
    a page table names the pages of its device.

    Args:
        q_BTHD: [B, T, H, D] queries, rotated: of the last T tokens of each sequence.
        pages: the pool, see `vibejax.kernels.pages`; of q's dtype, or int8 with scales.
        table_BM: [B, M] int32 pages of each sequence in order; entries past its length are free.
        length_B: [B] int32 cached tokens, the queries' among them; 0 is an idle slot.
        shared_G: [B / group] int32, how many of their first pages all live sequences of a group
            have in common: these are read once a group. None: each sequence reads its own.
        group: sequences of a group, adjacent ones.
        implementation: as for rows.

    Returns:
        [B, T, H, D] of q's dtype; zeros for idle slots and for queries before the first token.

    Raises:
        ValueError: the arguments do not fit together, or the kernel cannot take the dtypes, the
            head dimension, the page size or the mesh's devices.
    """
    kind, platform = _device()
    if implementation == "auto":
        implementation = _kernel(kind, platform) or "xla"
    backend, _, interpreted = implementation.partition("_")
    if backend in ("tpu", "gpu") and not interpreted and platform != backend:
        raise ValueError(
            f"attention {implementation!r}: the mesh's devices are {platform or 'none'}"
        )
    if backend == "cudnn":
        raise ValueError("attention 'cudnn': must be tpu, gpu, xla or reference over pages")
    if backend == "reference":
        decode_attention_xla.check(q_BTHD, pages, table_BM, length_B, shared_G, group)
        attend = lambda *args: reference.paged_attention(*args[:4])  # noqa: E731 - no sharing
    elif backend == "xla":
        attend = functools.partial(decode_attention_xla.paged_attention, group=group)
    elif backend == "tpu":
        chip = INTERPRETED_CHIP if interpreted else tiles.tpu_chip(kind)
        attend = functools.partial(
            decode_attention_tpu.paged_attention,
            group=group,
            fetch=tiles.Fetch(*tiles.chosen(chip).get("decode", ())),
            interpret=bool(interpreted),
        )
    else:
        capability = tiles.gpu_capability(kind)
        attend = functools.partial(
            decode_attention_gpu.paged_attention,
            group=group,
            step=tiles.Step(*tiles.chosen(f"gpu{capability}").get("decode", ())),
            interpret=bool(interpreted),
        )
    queries, of_sequence = spec("batch", None, "heads", None), spec("batch")
    groups = None if shared_G is None else of_sequence
    in_specs = (queries, _pool_spec(pages), spec("batch", None), of_sequence, groups)
    attend = _on_each_device(attend, in_specs, queries)
    return attend(q_BTHD, pages, table_BM, length_B, shared_G)


@jax.named_scope("write_pages")
def write_pages(
    pages: Pages,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    table_BM: jax.Array,
    position_BT: jax.Array,
) -> Pages:
    """`kernels.pages.write`, on a mesh by each device into its own pages and heads."""
    tokens, rows = spec("batch", None, "kv_heads", None), spec("batch", None)
    pool = _pool_spec(pages)
    write = _on_each_device(pages_.write, (pool, tokens, tokens, rows, rows), pool)
    return write(pages, k_BTKD, v_BTKD, table_BM, position_BT)


def read_pages(pages: Pages, table_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`kernels.pages.read`, on a mesh by each device of its own pages and heads."""
    tokens = spec("batch", None, "kv_heads", None)
    in_specs = (_pool_spec(pages), spec("batch", None))
    return _on_each_device(pages_.read, in_specs, (tokens, tokens))(pages, table_BM)


@jax.named_scope("refresh_copies")
def refresh_copies(
    copies: Copies, pages: Pages, table_BM: jax.Array, cached_B: jax.Array, fresh_B: jax.Array
) -> Copies:
    """`kernels.row_copies.refresh`, on a mesh by each device of its own pages and heads."""
    rows = spec("batch")
    in_specs = (_of_rows(Copies), _pool_spec(pages), spec("batch", None), rows, rows)
    refresh = _on_each_device(row_copies.refresh, in_specs, _of_rows(Copies))
    return refresh(copies, pages, table_BM, cached_B, fresh_B)


@jax.named_scope("keep_recent")
def keep_recent(
    copies: Copies,
    pages: Pages,
    recent: Recent,
    table_BM: jax.Array,
    cached_B: jax.Array,
    count_B: jax.Array,
) -> tuple[Copies, Pages]:
    """`kernels.row_copies.keep`, on a mesh by each device for its own rows."""
    pool, rows = _pool_spec(pages), spec("batch")
    in_specs = (_of_rows(Copies), pool, _of_rows(Recent), spec("batch", None), rows, rows)
    keep = _on_each_device(row_copies.keep, in_specs, (_of_rows(Copies), pool))
    return keep(copies, pages, recent, table_BM, cached_B, count_B)


def _of_rows(kind: type):
    return kind(*(spec("batch", "kv_heads", None, None),) * 2)


def _pool_spec(pages: Pages) -> Pages:
    """Each device has pages of its own, and of these its own heads."""
    return Pages(*(None if x is None else POOL for x in pages))


def _on_each_device(function, in_specs, out_specs):
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _check_heads(heads: int, kv_heads: int, k_shape: tuple, v_shape: tuple) -> None:
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
    if k_shape != v_shape:
        raise ValueError(f"keys {k_shape} and values {v_shape} differ in shape")
