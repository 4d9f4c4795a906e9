"""The kernels against their reference on the device, at the shapes of the model.

Inputs are random and made on the device; a case's reference gets the same numbers in float32.

Shape suffixes: as in vibejax/kernels/reference.py and pages.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import attention
from vibejax.kernels import pages as pages_
from vibejax.kernels import reference, row_copies
from vibejax.kernels.pages import Pages
from vibejax.planning import tiles_run
from vibejax.validation.checks import Found
from vibejax.validation.machine import Machine
from vibejax.validation.sizes import Sizes

TOLERANCES = {"float32": 2e-6, "bfloat16": 2e-2}
"""Largest error of a CPU's interpreter, of the largest number: those of the tests."""

CHIP_TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
"""The same of a chip, whose exponentials and products in several passes round otherwise."""

GROUP = 4  # sequences that share their first pages
COPIED_TOKENS = 1_024  # of a row, at most: copies are for CPUs


class Case(NamedTuple):
    """One comparison.

    Attributes:
        name: of it.
        inputs: key -> arguments of `kernel`; traceable.
        kernel: what is tried; traceable on a mesh of the devices.
        reference: the same by definition, of the float32 arguments.
        dtype: whose tolerance holds.
    """

    name: str
    inputs: Callable[[jax.Array], tuple]
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    dtype: str


def cases(machine: Machine, sizes: Sizes) -> Iterator[Case]:
    """All that this machine can be asked for."""
    for backend in machine.kernels:
        yield from _rows(backend, machine.implementation(backend), sizes)
        yield from _pages(backend, machine.implementation(backend), sizes)
    yield from _rows("xla", "xla", sizes, long=False)
    yield from _pages("xla", "xla", sizes)
    yield _copies(sizes)


def check(case: Case, machine: Machine) -> Found:
    """Holds a kernel against its reference, on the mesh in force."""
    inputs = jax.jit(case.inputs)(jax.random.key(0))
    got = jax.jit(case.kernel)(*inputs)
    exact = jax.jit(lambda *x: jax.tree.map(_exact, x))(*inputs)
    want = jax.jit(case.reference)(*exact)
    error, tolerance = float(_error(got, want)), _tolerance(case.dtype, machine)
    return Found(
        f"error {error:.1e} of the largest number, at most {tolerance:.0e}",
        {"error": error, "tolerance": tolerance},
        right=error <= tolerance,  # not where it is NaN
    )


def close(got: Any, want: Any, dtype: str, machine: Machine) -> bool:
    """Whether two results of a kernel of `dtype` are the same but for rounding."""
    want = jax.tree.map(lambda x: x.astype(jnp.float32), want)
    return float(_error(got, want)) <= _tolerance(dtype, machine)


def _tolerance(dtype: str, machine: Machine) -> float:
    return (TOLERANCES if machine.interpreted else CHIP_TOLERANCES)[dtype]


def _exact(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


@jax.jit
def _error(got: Any, want: Any) -> jax.Array:
    """The largest difference of any array, relative to its largest number or to 1."""
    errors = jax.tree.map(
        lambda g, w: (
            jnp.max(jnp.abs(g.astype(jnp.float32) - w)) / jnp.maximum(1.0, jnp.max(jnp.abs(w)))
        ),
        got,
        want,
    )
    return functools.reduce(jnp.maximum, jax.tree.leaves(errors))


def row_ids(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """[1, T] positions and segments: documents of ragged lengths, padding in the last part."""
    lengths = tiles_run.packed_row(tokens - tokens // 16)
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    segment = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)
    return tuple(np.pad(x, (0, tokens - len(x)))[None] for x in (position, segment))


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., tuple]:
    """(q, k, v, dout, positions, segments) -> the output, and the gradients of q, k and v."""

    def run(q, k, v, dout, position, segment):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, position, segment), q, k, v)
        return out, *back(dout.astype(out.dtype))

    return run


def _rows(backend: str, implementation, sizes: Sizes, *, long: bool = True) -> Iterator[Case]:
    model = sizes.model

    def inputs(tokens: int, dtype: str, key: jax.Array) -> tuple:
        heads = (model.heads, model.kv_heads, model.kv_heads, model.heads)
        arrays = [
            jax.random.normal(k, (1, tokens, n, model.head_dim), dtype)
            for k, n in zip(jax.random.split(key, 4), heads, strict=True)
        ]
        return *arrays, *map(jnp.asarray, row_ids(tokens))

    def attend(*args):
        return attention.attention(*args, implementation)

    def plain(q, k, v, position, segment):
        return reference.attention(q, k, v, position, segment, position, segment)

    def blocks(*args):
        return attention.attention(*args, "xla")

    layouts = [("bfloat16", sizes.short_tokens, plain)]
    if sizes.exact_tokens:
        layouts.append(("float32", sizes.exact_tokens, plain))
    if long and sizes.long_tokens:
        layouts.append(("bfloat16", sizes.long_tokens, blocks))
    for dtype, tokens, by_definition in layouts:
        yield Case(
            f"{backend} packed attention, output and gradients, {tokens} tokens, {dtype}",
            functools.partial(inputs, tokens, dtype),
            with_gradients(attend),
            with_gradients(by_definition),
            dtype,
        )


def page_inputs(
    sizes: Sizes, rows: int, tokens: int, kv_dtype: str, key: jax.Array
) -> tuple[jax.Array, Pages, jax.Array, jax.Array, jax.Array]:
    """Queries, pages in random order, table, ragged lengths and shared pages of `rows` sequences.

    The first one of a group has the first pages of all; one sequence is idle.
    """
    model, s = sizes.model, sizes.page_tokens
    entries = sizes.context // s
    keys = jax.random.split(key, 4)
    dtype = "bfloat16" if kv_dtype == "int8" else kv_dtype
    q_BTHD = jax.random.normal(keys[0], (rows, tokens, model.heads, model.head_dim), dtype)
    count = rows * entries
    shape = (count, model.kv_heads, s, 2 * model.head_dim)
    kv_PKsC = jax.random.normal(keys[1], shape, dtype)
    pages = Pages(kv_PKsC)
    if kv_dtype == "int8":
        rounded, scale_PKs2 = pages_.quantize(kv_PKsC.reshape(*shape[:3], 2, model.head_dim))
        scale_PKal = scale_PKs2.swapaxes(2, 3).reshape(count, model.kv_heads, -1, min(2 * s, 128))
        pages = Pages(rounded.reshape(shape), scale_PKal)
    table_BM = jax.random.permutation(keys[2], count).astype(jnp.int32).reshape(rows, entries)
    length_B = jax.random.randint(keys[3], (rows,), tokens, sizes.context + 1).astype(jnp.int32)
    length_B = length_B.at[0].set(sizes.context).at[-1].set(0)
    group = min(GROUP, rows)
    common = entries // 4  # of those that share them, all have more tokens
    length_B = jnp.where(length_B > 0, jnp.maximum(length_B, common * s + tokens), 0)
    first_BM = jnp.repeat(table_BM[::group], group, axis=0)
    shared = jnp.arange(entries)[None] < common
    table_BM = jnp.where(shared, first_BM, table_BM)
    return q_BTHD, pages, table_BM, length_B, jnp.full(rows // group, common, jnp.int32)


def _pages(backend: str, implementation, sizes: Sizes) -> Iterator[Case]:
    def attend(q_BTHD, pages, table_BM, length_B, shared_G):
        rows, tokens = q_BTHD.shape[:2]
        if tokens > 1:  # as prompts are computed: no pages are read for several at once
            shared_G = None
        group = 1 if shared_G is None else min(GROUP, rows)
        return attention.paged_attention(
            q_BTHD, pages, table_BM, length_B, shared_G, group, implementation
        )

    def by_definition(*args):
        return reference.paged_attention(*args[:4])

    chunk = f"a chunk of {sizes.chunk_tokens} tokens"
    layouts = [
        ("one token", sizes.sequences, 1, "int8"),
        (chunk, 2, sizes.chunk_tokens, "bfloat16"),
    ]
    if sizes.exact_tokens:  # the interpreter takes its time over each
        layouts += [("one token", sizes.sequences, 1, dtype) for dtype in ("bfloat16", "float32")]
    for name, rows, tokens, kv_dtype in layouts:
        yield Case(
            f"{backend} attention over pages, {name}, {sizes.context} cached, {kv_dtype} pages",
            functools.partial(page_inputs, sizes, rows, tokens, kv_dtype),
            attend,
            by_definition,
            "float32" if kv_dtype == "float32" else "bfloat16",
        )


def _copies(sizes: Sizes) -> Case:
    """Row copies: made from pages, then one more token attended to beside them."""
    model, rows = sizes.model, 4
    small = dataclasses.replace(sizes, context=min(sizes.context, COPIED_TOKENS))

    def inputs(key: jax.Array) -> tuple:
        keys = jax.random.split(key, 3)
        q_BTHD, pages, table_BM, length_B, _ = page_inputs(small, rows, 1, "float32", keys[0])
        new = [
            jax.random.normal(k, (rows, model.kv_heads, model.head_dim), "float32")
            for k in keys[1:]
        ]
        # Every row has a token, and room for one more.
        return q_BTHD, pages, table_BM, jnp.clip(length_B, 1, small.context - 1), *new

    def attend(q_BTHD, pages, table_BM, cached_B, k_BKD, v_BKD):
        copies = row_copies.empty(rows, small.context, model.kv_heads, model.head_dim, q_BTHD.dtype)
        fresh_B = jnp.ones(rows, bool)
        copies = attention.refresh_copies(copies, pages, table_BM, cached_B, fresh_B)
        recent = row_copies.empty_recent(copies, 2)
        out_BHD, _ = row_copies.attend(
            copies, recent, q_BTHD[:, 0], k_BKD, v_BKD, cached_B, jnp.int32(0), rounded=False
        )
        return out_BHD

    def by_definition(q_BTHD, pages, table_BM, cached_B, k_BKD, v_BKD):
        # Sequences share pages: each gets its own before it writes.
        k_BSKD, v_BSKD = pages_.read(pages, table_BM)
        S = k_BSKD.shape[1]
        new_BS = (jnp.arange(S)[None] == cached_B[:, None])[..., None, None]
        k_BSKD = jnp.where(new_BS, k_BKD[:, None], k_BSKD)
        v_BSKD = jnp.where(new_BS, v_BKD[:, None], v_BSKD)
        key_BS = jnp.broadcast_to(jnp.arange(S)[None], (rows, S))
        return reference.attention(
            q_BTHD, k_BSKD, v_BSKD, cached_B[:, None], jnp.ones((rows, 1), jnp.int32),
            key_BS, jnp.ones((rows, S), jnp.int32),
        )[:, 0]  # fmt: skip

    return Case(
        f"row copies, {small.context} tokens, float32", inputs, attend, by_definition, "float32"
    )
