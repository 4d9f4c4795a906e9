"""Attention in blocks against the reference."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import check, inputs, out_and_grads, row_ids

from vibejax.kernels import flash_attention_xla

TILE = 8


def blocks(*args):
    return flash_attention_xla.attention(*args, TILE)


@pytest.mark.parametrize("H, K, D", [(4, 4, 8), (4, 2, 64), (8, 1, 128)])
@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_equals_the_reference(H, K, D, dtype, tolerance):
    check(blocks, inputs(29, H, K, D, dtype), row_ids([5, 1, 17, 3], 29), tolerance)


@given(st.lists(st.integers(1, 12), max_size=6), st.integers(0, 9), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_any_layout_equals_the_reference(lengths, front, seed):
    check(blocks, inputs(81, seed=seed), row_ids(lengths, 81, front), 2e-6)


def test_fifty_documents_and_none():
    for lengths in ([1] * 50, []):
        check(blocks, inputs(56), row_ids(lengths, 56), 2e-6)


def test_a_chunk_of_queries_is_that_part_of_the_row():
    arrays, whole_ids = inputs(64), row_ids([20, 9, 25], 64)
    position, segment = whole_ids[:2]
    whole, *_ = out_and_grads(blocks, arrays, whole_ids)
    chunk = np.r_[16:32, 48:64]
    ids = (position[:, chunk], segment[:, chunk], position, segment)
    part, *_ = out_and_grads(blocks, [arrays[0][:, chunk], *arrays[1:]], ids)
    np.testing.assert_array_equal(part, whole[:, chunk])


def test_documents_do_not_touch_each_other():
    """Changing document 2 leaves every output and gradient of the others bit-identical."""
    arrays, ids = inputs(60), row_ids([13, 10, 30], 60)
    others = ids[1] != 2
    changed = [np.where(others[..., None, None], x, np.float32(50)) for x in arrays]
    before, after = (out_and_grads(blocks, x, ids) for x in (arrays, changed))
    for b, a in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(b)[others], np.asarray(a)[others])


def test_memory_is_linear_in_the_row():
    """Four times the row needs about four times the memory, not sixteen times."""

    def temporaries(T):
        arguments = (inputs(T, D=64), row_ids([T], T))
        attend = functools.partial(flash_attention_xla.attention, tile=256)
        lowered = out_and_grads.lower(lambda *a: attend(*a), *arguments)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 4.5 * temporaries(2048)
