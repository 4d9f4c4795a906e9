"""The GPU kernel of paged attention: interpreted, and lowered for a GPU without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_rows import HEADS, PREFIXED, RAGGED, case, check

from vibejax.kernels import decode_attention_gpu
from vibejax.kernels import pages as pages_
from vibejax.kernels.decode_attention_gpu import Tile


def kernel(parts):
    settings = {"tile": Tile(rows=16, tokens=16), "parts": parts, "interpret": True}
    attend = functools.partial(decode_attention_gpu.paged_attention, **settings)
    attend = jax.jit(attend, static_argnames="group")
    return lambda q, pages, table, length, shared=None, group=1: attend(
        q, pages, table, length, shared, group=group
    )


KERNEL = kernel(parts=2)


@pytest.mark.parametrize("T, H, K, D", [(T, *x) for T, x in zip((1, 3, 1), HEADS, strict=True)])
def test_equals_the_reference(T, H, K, D):
    check(KERNEL, case(RAGGED, T=T, H=H, K=K, D=D), 2e-6)


@pytest.mark.parametrize(
    "change, tolerance", [(dict(dtype=jnp.bfloat16), 2e-2), (dict(int8=True, s=12, M=8), 2e-6)]
)
def test_narrow_pages_equal_the_reference(change, tolerance):
    check(KERNEL, case(RAGGED, **change), tolerance)


def test_parts_change_nothing():
    check(kernel(parts=5), case(RAGGED), 2e-6)


def test_shared_pages_change_nothing():
    check(KERNEL, case(**PREFIXED, T=3), 2e-6)


@given(
    st.lists(st.integers(0, 64), min_size=4, max_size=4),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_any_layout_equals_the_reference(lengths, shared, seed):
    check(KERNEL, case(lengths, M=4, shared=shared, seed=seed), 2e-6)


def shapes(dtype, P=64, s=64, D=128):
    array = jax.ShapeDtypeStruct
    pages = jax.eval_shape(functools.partial(pages_.empty, P, 2, s, D, dtype))
    q_dtype = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    table, length = array((8, 65_536 // s), jnp.int32), array((8,), jnp.int32)
    return array((8, 1, 16, D), q_dtype), pages, table, length, array((2,), jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_lowers_for_a_gpu_without_one(dtype, D):
    attend = jax.jit(functools.partial(decode_attention_gpu.paged_attention, group=4))
    lowered = attend.trace(*shapes(dtype, D=D)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("paged_attention") >= 2


def test_what_does_not_fit_is_named():
    attend = decode_attention_gpu.paged_attention
    with pytest.raises(ValueError, match="head dimension 96: must be 64, 128 or 256"):
        jax.eval_shape(attend, *shapes(jnp.bfloat16, D=96)[:4])
    args = shapes(jnp.int8, P=90_000)[:4]
    size = np.prod(args[1].kv_PKsC.shape, dtype=np.int64)
    with pytest.raises(ValueError, match=f"int8 pages of {size} bytes: must be less than"):
        jax.eval_shape(attend, *args)
