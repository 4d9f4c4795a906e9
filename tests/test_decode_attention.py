"""Paged attention: the cache, the definition, and the plain XLA implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_rows import HEADS, PREFIXED, RAGGED, case, check

from vibejax.kernels import decode_attention_xla, reference
from vibejax.kernels import pages as pages_

XLA = jax.jit(
    functools.partial(decode_attention_xla.paged_attention, block_tokens=32),
    static_argnames="group",
)

write = jax.jit(pages_.write)


def attend(q, pages, table, length, shared=None, group=1):
    return XLA(q, pages, table, length, shared, group=group)


@pytest.mark.parametrize("T", [1, 3])
def test_the_definition_is_attention_over_the_tokens_in_order(T):
    """Written page by page and read back, a sequence is a packed row whose last tokens ask."""
    B, K, D, s, length = 1, 2, 8, 4, 11
    random = np.random.default_rng(0)
    k, v, q = (
        random.standard_normal((B, length, heads, D)).astype(np.float32) for heads in (K, K, 2 * K)
    )
    table = jnp.array([[5, 0, 3, -1]])
    pages = pages_.empty(6, K, s, D, jnp.float32)
    for t in range(length):
        pages = write(pages, k[:, t, None], v[:, t, None], table, jnp.array([[t]]))
    got = reference.paged_attention(q[:, -T:], pages, table, jnp.array([length]))
    position, segment = np.arange(length)[None], np.ones((1, length), int)
    want = reference.attention(q, k, v, position, segment, position, segment)
    np.testing.assert_allclose(got, want[:, -T:], atol=2e-6)


def test_tokens_written_are_tokens_read():
    random = np.random.default_rng(1)
    k, v = (random.standard_normal((2, 12, 2, 8)).astype(np.float32) for _ in "kv")
    table = jnp.array([[4, 1, 2], [0, 5, 3]])
    position = jnp.broadcast_to(jnp.arange(12), (2, 12))
    for dtype, tolerance in ((jnp.float32, 0), (jnp.int8, 0.5 / 127)):
        pages = write(pages_.empty(6, 2, 4, 8, dtype), k, v, table, position)
        for got, want in zip(pages_.read(pages, table), (k, v), strict=True):
            largest = np.abs(want).max(axis=-1, keepdims=True)
            assert np.all(np.abs(got - want) <= tolerance * largest * 1.0001)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_tokens_of_no_page_are_dropped(dtype):
    before = pages_.empty(3, 1, 4, 8, dtype)
    new = np.ones((4, 1, 1, 8), np.float32)
    table = jnp.array([[-1], [3], [10**9], [2]])
    position = jnp.array([[0], [1], [2], [4]])  # the last is past its row
    after = write(before, new, new, table, position)
    for b, a in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    kept = write(before, new, new, table, position.at[3].set(3))
    assert np.count_nonzero(kept.kv_PKsC) == 16


def test_a_zero_vector_is_quantized_to_zero():
    rounded, scale = pages_.quantize(jnp.zeros((2, 8)))
    assert not np.any(rounded) and not np.any(scale)


@pytest.mark.parametrize("T, H, K, D", [(T, *x) for T, x in zip((1, 3, 1), HEADS, strict=True)])
def test_equals_the_reference(T, H, K, D):
    check(attend, case(RAGGED, T=T, H=H, K=K, D=D), 2e-6)


@pytest.mark.parametrize(
    "change, tolerance", [(dict(dtype=jnp.bfloat16), 2e-2), (dict(int8=True, s=12, M=8), 2e-6)]
)
def test_narrow_pages_equal_the_reference(change, tolerance):
    check(attend, case(RAGGED, **change), tolerance)


@pytest.mark.parametrize("T, int8", [(1, True), (3, False)])
def test_shared_pages_change_nothing(T, int8):
    check(attend, case(**PREFIXED, T=T, int8=int8), 2e-6)


def test_queries_inside_shared_pages_do_not_look_ahead():
    """A sequence may end with what it shares: its last tokens then ask within those pages."""
    check(attend, case((32, 40), T=3, shared=(2,)), 2e-6)


@given(
    st.lists(st.integers(0, 64), min_size=4, max_size=4),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_any_layout_equals_the_reference(lengths, shared, T, seed):
    check(attend, case(lengths, T=T, M=4, shared=(shared, 0), seed=seed), 2e-6)


BAD = (
    (dict(H=3), "3 query heads are not a multiple of 2 key/value heads"),
    (dict(T=0), "0 query tokens: must be at least 1"),
    (dict(dtype=np.float16), "dtypes float16 of queries and float16 of pages: must be both"),
)


@pytest.mark.parametrize("change, message", BAD)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        attend(*case((5, 9), **change))


def test_arguments_that_disagree_are_named():
    q, pages, table, length, *_ = case((5, 9))
    bad = {
        "head dimension 32 of queries: must be that of the pages, 64": (q[..., :32], pages, table),
        "dtypes bfloat16 of queries and float32 of pages": (q.astype(jnp.bfloat16), pages, table),
        r"pages of int8: int8 has scales": (
            q, pages_.Pages(pages.kv_PKsC.astype(jnp.int8)), table,
        ),
        r"table \(1, 6\) and lengths \(2,\): must have 2 rows": (q, pages, table[:1]),
    }  # fmt: skip
    for message, arrays in bad.items():
        with pytest.raises(ValueError, match=message):
            attend(*arrays, length)
    with pytest.raises(ValueError, match="2 sequences are not a multiple of groups of 3"):
        attend(q, pages, table, length, jnp.zeros(1, jnp.int32), 3)
    with pytest.raises(ValueError, match=r"shared pages \(2,\): must be \(1,\), one a group"):
        attend(q, pages, table, length, jnp.zeros(2, jnp.int32), 2)


def test_temporaries_are_bounded_and_writes_in_place():
    """Neither reading nor writing makes an array of the pool's size."""
    array = jax.ShapeDtypeStruct
    for dtype in (jnp.float32, jnp.int8):
        pages = jax.eval_shape(functools.partial(pages_.empty, 4_096, 2, 64, 128, dtype))
        pool = pages.kv_PKsC.size * pages.kv_PKsC.dtype.itemsize
        q, table = array((8, 1, 16, 128), jnp.float32), array((8, 512), jnp.int32)
        compiled = jax.jit(decode_attention_xla.paged_attention).lower(
            q, pages, table, array((8,), jnp.int32)
        )
        assert compiled.compile().memory_analysis().temp_size_in_bytes < pool / 8
        new, position = array((8, 1, 2, 128), jnp.float32), array((8, 1), jnp.int32)
        step = jax.jit(pages_.write, donate_argnums=0).lower(pages, new, new, table, position)
        analysis = step.compile().memory_analysis()
        assert analysis.temp_size_in_bytes < pool / 8
        assert analysis.alias_size_in_bytes >= pool
