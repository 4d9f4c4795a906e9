"""Which keys a query sees, as a span of the row, and which key tiles a query tile needs.

Each document is one run of tokens and the mask is causal, so what a query sees is one span of
keys: from the start of its document to itself. Spans are computed on the device from the ids; a
few integers a tile are all that a kernel's control flow reads, so no layout is compiled for.

Shape suffixes: T query tokens, S key tokens, N query tiles, M key tiles.
"""

import jax
import jax.numpy as jnp


def spans(
    q_position_T: jax.Array,
    q_segment_T: jax.Array,
    kv_position_S: jax.Array,
    kv_segment_S: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """[T] index of the first and [T] of the last key that each query sees; S and -1 at padding.

    Args:
        q_position_T: [T] int32 position within the document.
        q_segment_T: [T] int32 document, each id at most S; 0 is padding.
        kv_position_S: [S] int32, of the whole row.
        kv_segment_S: [S] int32, each id one run.
    """
    S = kv_segment_S.shape[0]
    start_of_segment = jnp.full(S + 1, S).at[kv_segment_S].min(jnp.arange(S) - kv_position_S)
    start_T = start_of_segment[q_segment_T]
    real_T = q_segment_T != 0
    return jnp.where(real_T, start_T, S), jnp.where(real_T, start_T + q_position_T, -1)


def tile_ranges(
    first_T: jax.Array, last_T: jax.Array, query_tile: int, key_tile: int
) -> tuple[jax.Array, jax.Array]:
    """[N] first key tile that each query tile needs, and [N] the one after its last.

    Exact where the queries of a tile follow each other in the row. Tiles of padding need none.
    """
    first_N = first_T.reshape(-1, query_tile).min(axis=1) // key_tile
    end_N = last_T.reshape(-1, query_tile).max(axis=1) // key_tile + 1
    return jnp.minimum(first_N, end_N), end_N


def full_ranges(
    first_T: jax.Array, last_T: jax.Array, query_tile: int, key_tile: int
) -> tuple[jax.Array, jax.Array]:
    """The range, possibly empty, of key tiles of which every query sees every key."""
    first_N = -(-first_T.reshape(-1, query_tile).max(axis=1) // key_tile)
    end_N = (last_T.reshape(-1, query_tile).min(axis=1) + 1) // key_tile
    return first_N, jnp.maximum(first_N, end_N)


def query_ranges(first_N: jax.Array, end_N: jax.Array, key_tiles: int):
    """[M] first query tile that needs each key tile, and [M] the one after its last.

    Between them may lie query tiles that do not need it: `tile_ranges` says which.
    """
    N = first_N.shape[0]
    index_M = jnp.arange(key_tiles)[:, None]
    needed_MN = (first_N[None] <= index_M) & (index_M < end_N[None])
    first_M = jnp.where(needed_MN, jnp.arange(N), N).min(axis=1)
    end_M = jnp.where(needed_MN, jnp.arange(N) + 1, 0).max(axis=1)
    return jnp.minimum(first_M, end_M), end_M
