"""Attention in blocks against the reference, and the tiles it runs against those it needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibejax.kernels import flash_attention_xla, reference

TILE = 8


def layout(lengths, T, front=0):
    """[1, T] positions and segments of documents in a row, after `front` places of padding."""
    position_T, segment_T = np.zeros(T, np.int32), np.zeros(T, np.int32)
    start = front
    for segment, length in enumerate(lengths, start=1):
        position_T[start : start + length] = np.arange(length)
        segment_T[start : start + length] = segment
        start += length
    assert start <= T
    return position_T[None], segment_T[None]


def inputs(T, H=4, K=2, D=8, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal((1, T, heads, D)).astype(dtype) for heads in (H, K, K)]


@functools.partial(jax.jit, static_argnums=0)
def out_and_grads(attend, arrays, ids):
    """The output, and the gradients of a scalar that weighs every output differently."""

    def total(q, k, v):
        out = attend(q, k, v, *ids).astype(jnp.float32)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return out, *grads


def blocks(*args):
    return flash_attention_xla.attention(*args, TILE)


def check(arrays, ids, tolerance):
    exact = [x.astype(np.float32) for x in arrays]
    want = out_and_grads(reference.attention, exact, ids)
    got = out_and_grads(blocks, arrays, ids)
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w)
        np.testing.assert_allclose(g, w, atol=tolerance * max(1.0, np.abs(w).max()))


@pytest.mark.parametrize("H, K, D", [(4, 4, 8), (4, 2, 64), (8, 1, 128)])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_equals_the_reference(H, K, D, dtype, tolerance):
    position, segment = layout([5, 1, 17, 3], 29)
    check(inputs(29, H, K, D, dtype), (position, segment, position, segment), tolerance)


@given(st.lists(st.integers(1, 12), max_size=6), st.integers(0, 9), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_any_layout_equals_the_reference(lengths, front, seed):
    position, segment = layout(lengths, 81, front)
    check(inputs(81, seed=seed), (position, segment, position, segment), 2e-6)


def test_fifty_documents_and_none():
    for lengths in ([1] * 50, []):
        position, segment = layout(lengths, 56)
        check(inputs(56), (position, segment, position, segment), 2e-6)


def test_a_chunk_of_queries_is_that_part_of_the_row():
    position, segment = layout([20, 9, 25], 64)
    arrays = inputs(64)
    whole, *_ = out_and_grads(blocks, arrays, (position, segment, position, segment))
    chunk = np.r_[16:32, 48:64]
    ids = (position[:, chunk], segment[:, chunk], position, segment)
    part, *_ = out_and_grads(blocks, [arrays[0][:, chunk], *arrays[1:]], ids)
    np.testing.assert_array_equal(part, whole[:, chunk])


def test_documents_do_not_touch_each_other():
    """Changing document 2 leaves every output and gradient of the others bit-identical."""
    position, segment = layout([13, 10, 30], 60)
    arrays, ids = inputs(60), (position, segment, position, segment)
    others = segment != 2
    changed = [np.where(others[..., None, None], x, np.float32(50)) for x in arrays]
    before, after = (out_and_grads(blocks, x, ids) for x in (arrays, changed))
    for b, a in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(b)[others], np.asarray(a)[others])


@pytest.mark.parametrize(
    "lengths, front", [([64], 0), ([9, 1, 30, 8], 3), ([8] * 8, 0), ([], 0), ([5, 40], 11)]
)
def test_tiles_run_are_exactly_those_needed(lengths, front):
    position, segment = layout(lengths, 64, front)
    first_N, end_N = flash_attention_xla.tile_ranges(
        position[0], segment[0], position[0], segment[0], TILE
    )
    allowed = (segment[0][:, None] == segment[0][None]) & (segment[0] != 0)[:, None]
    allowed &= np.tri(64, dtype=bool)
    needed = allowed.reshape(8, TILE, 8, TILE).any(axis=(1, 3))
    index_N = np.arange(8)
    run = (index_N >= np.asarray(first_N)[:, None]) & (index_N < np.asarray(end_N)[:, None])
    np.testing.assert_array_equal(run, needed)


def test_memory_is_linear_in_the_row():
    """Four times the row needs about four times the memory, not sixteen times."""

    def temporaries(T):
        position, segment = layout([T], T)
        arguments = (inputs(T, D=64), (position, segment, position, segment))
        attend = functools.partial(flash_attention_xla.attention, tile=512)
        lowered = out_and_grads.lower(lambda *a: attend(*a), *arguments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 4.5 * temporaries(2048)
