"""Paged caches for the tests of decode attention: random sequences in scattered pages."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vibejax.kernels import pages as pages_
from vibejax.kernels import reference


class Case(NamedTuple):
    q_BTHD: jnp.ndarray
    pages: pages_.Pages
    table_BM: jnp.ndarray
    length_B: jnp.ndarray
    shared_G: jnp.ndarray | None = None
    group: int = 1


GARBAGE = (-1, 10**9, -(2**31), 7)


def case(
    lengths, *, T=1, H=4, K=2, D=64, s=16, M=6, dtype=np.float32, int8=False, shared=None, seed=0
) -> Case:
    """Sequences of these lengths, their pages in random order.

    Table entries past a sequence's pages are garbage; what holds no token is NaN. `shared` is the
    number of pages that each group has in common, in a tuple that divides the sequences.
    """
    random = np.random.default_rng(seed)
    B = len(lengths)
    group = B // len(shared) if shared else 1
    P = B * M + 3
    free = list(random.permutation(P))
    table_BM = random.choice(GARBAGE, (B, M)).astype(np.int32)
    for b, length in enumerate(lengths):
        members = [x for x in range(b - b % group, b - b % group + group) if lengths[x] > 0]
        whole = min((lengths[x] // s for x in members), default=0)
        for entry in range(-(-length // s)):
            common = shared and members[0] < b and entry < min(shared[b // group], whole)
            table_BM[b, entry] = table_BM[members[0], entry] if common else free.pop()
    length_B = np.array(lengths, np.int32)

    def tokens(heads, count):
        return random.standard_normal((B, count, heads, D)).astype(np.float32)

    kv_PKsC = np.full((P, K, s, 2 * D), np.nan, np.float32)
    k_BSKD, v_BSKD = tokens(K, M * s), tokens(K, M * s)
    for b, length in enumerate(lengths):
        for j in range(length):
            kv_PKsC[table_BM[b, j // s], :, j % s] = np.concatenate(
                [k_BSKD[b, j], v_BSKD[b, j]], -1
            )
    pages = pages_.Pages(jnp.asarray(kv_PKsC, dtype))
    if int8:
        live = ~np.isnan(kv_PKsC)
        halves = np.where(live, kv_PKsC, 0).reshape(P, K, s, 2, D)
        scale_PKs2 = np.abs(halves).max(axis=-1) / 127
        rounded = np.round(halves / np.maximum(scale_PKs2, 1e-30)[..., None]).astype(np.int8)
        scale_PKs2 = np.where(live.reshape(halves.shape)[..., 0], scale_PKs2, np.nan)
        scale_PKal = scale_PKs2.swapaxes(2, 3).reshape(P, K, -1, min(2 * s, 128))
        pages = pages_.Pages(jnp.asarray(rounded.reshape(kv_PKsC.shape)), jnp.asarray(scale_PKal))
    shared_G = None if shared is None else jnp.asarray(shared, jnp.int32)
    arrays = (jnp.asarray(x) for x in (table_BM, length_B))
    return Case(jnp.asarray(tokens(H, T), dtype), pages, *arrays, shared_G, group)


_reference = jax.jit(reference.paged_attention)


def check(attend, case: Case, tolerance: float) -> None:
    """Holds `attend` against the reference in float32, relative to the largest value."""
    pages = case.pages
    if pages.scale_PKal is None:
        pages = pages_.Pages(pages.kv_PKsC.astype(jnp.float32))
    exact = case.q_BTHD.astype(jnp.float32), pages, case.table_BM, case.length_B
    want = np.asarray(_reference(*exact))
    got = np.asarray(attend(*case), np.float32)
    np.testing.assert_allclose(got, want, atol=tolerance * max(1.0, np.abs(want).max()))


# Idle, one token, whole pages, one more, a full row; then the same with pages in common.
RAGGED = (0, 1, 16, 33, 96, 47)
PREFIXED = {"lengths": (37, 35, 0, 90, 50, 20, 1, 17), "shared": (2, 0)}
HEADS = ((2, 2, 64), (4, 2, 128), (8, 1, 128))  # H, K, D
