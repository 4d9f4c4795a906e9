"""Spans and tile ranges against the mask itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rows import layout

from vibejax.kernels import spans

T, QUERY, KEY = 64, 8, 16
LAYOUTS = [([64], 0), ([9, 1, 30, 8], 3), ([8] * 8, 0), ([], 0), ([5, 40], 11), ([1] * 50, 14)]


def mask(segment_T):
    same = (segment_T[:, None] == segment_T[None]) & (segment_T != 0)[:, None]
    return same & np.tri(T, dtype=bool)


def tiles(mask_TT, reduce):
    return reduce(mask_TT.reshape(T // QUERY, QUERY, T // KEY, KEY), axis=(1, 3))


def within(first, end, count):
    index = np.arange(count)
    return (index >= np.asarray(first)[:, None]) & (index < np.asarray(end)[:, None])


def check(lengths, front):
    position, segment = layout(lengths, T, front)
    first_T, last_T = spans.spans(position, segment, position, segment)
    np.testing.assert_array_equal(within(first_T, np.asarray(last_T) + 1, T), mask(segment))
    needed = tiles(mask(segment), np.any)
    ranges = spans.tile_ranges(first_T, last_T, QUERY, KEY)
    np.testing.assert_array_equal(within(*ranges, T // KEY), needed)
    full = spans.full_ranges(first_T, last_T, QUERY, KEY)
    np.testing.assert_array_equal(within(*full, T // KEY), tiles(mask(segment), np.all))
    first_M, end_M = spans.query_ranges(*ranges, T // KEY)
    for m, column in enumerate(needed.T):
        (indices,) = np.nonzero(column)
        want = (indices[0], indices[-1] + 1) if len(indices) else (0, 0)
        assert (first_M[m], end_M[m]) == want


@pytest.mark.parametrize("lengths, front", LAYOUTS)
def test_ranges_are_exactly_what_the_mask_needs(lengths, front):
    check(lengths, front)


@given(st.lists(st.integers(1, 20), max_size=5), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_ranges_of_any_layout(lengths, front):
    while sum(lengths) + front > T:
        lengths = lengths[:-1]
    check(lengths, front)


def test_a_chunk_of_queries_keeps_its_place_in_the_row():
    position, segment = layout([20, 30], T)
    whole = spans.spans(position, segment, position, segment)
    chunk = slice(16, 40)
    part = spans.spans(position[chunk], segment[chunk], position, segment)
    for w, p in zip(whole, part, strict=True):
        np.testing.assert_array_equal(np.asarray(w)[chunk], p)
