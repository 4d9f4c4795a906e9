"""How many tiles of the attention kernels a row needs, and how long a device works on them.

The cycles of a tile come from a static replay of what the compiler made of the kernels
(`tests/benchmarks/attention.py --chip v5e`): optimistic, since waits for memory are left out.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from vibejax import packing
from vibejax.kernels import spans, tiles
from vibejax.kernels.tiles import Tile
from vibejax.packing import Document
from vibejax.planning.slices import Slice
from vibejax.qwen2 import ModelConfig

# Documents of the packed row of 65,536 tokens by which kernels and plans are judged, beside the
# row of one document.
PACKED = (17421, 1203, 8850, 402, 5117, 12044, 2961, 6710, 731, 7399, 2698)


class Counts(NamedTuple):
    """Of one row and key/value head.

    Attributes:
        run: tiles that the kernel goes over.
        full: those without a mask.
        queries: tiles of queries.
    """

    run: int
    full: int
    queries: int


class Cycles(NamedTuple):
    """Of one tile.

    Attributes:
        quick: of 2^20 pairs of a query row and a key, without a mask.
        masked: the same with one.
        step: around each tile.
        edge: around each tile of queries, and in the backward kernel of keys.
    """

    quick: float
    masked: float
    step: float
    edge: float


KERNELS: dict[str, tuple[Cycles, Cycles]] = {
    "v4": (Cycles(4_700, 6_460, 75, 2_029), Cycles(11_468, 11_468, 274, 795)),
    "v5e": (Cycles(4_233, 5_817, 75, 2_029), Cycles(10_482, 10_414, 274, 795)),
    "v5p": (Cycles(4_312, 5_925, 75, 2_029), Cycles(10_666, 10_666, 274, 795)),
    "v6e": (Cycles(1_845, 2_535, 75, 2_029), Cycles(5_633, 5_633, 274, 795)),
    "tpu7x": (Cycles(1_686, 2_317, 75, 2_029), Cycles(5_450, 5_450, 274, 795)),
}
"""Forward and backward, by chip, of one core.

v5e's are replayed. Of the others the tile without a mask is (`kernels/tiles.py`); the rest is taken
over from v5e, the mask in proportion.
"""


def packed_row(tokens: int) -> tuple[int, ...]:
    """Documents like `PACKED` for a row of any length."""
    scaled = [n * tokens // sum(PACKED) for n in PACKED]
    return (*scaled[1:], tokens - sum(scaled[1:]))


def attended(lengths: Sequence[int]) -> float:
    """Keys that an average token of a row of these documents sees."""
    return sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


def row(lengths: Sequence[int], shards: int) -> packing.Rows:
    """Positions and segments of a row of these documents, as `shards` context shards hold them."""
    documents = [
        Document(tokens=np.zeros(n, np.int32), weights=np.ones(n, np.float32)) for n in lengths
    ]
    rows = packing.pack(documents, [[*range(len(lengths))]], sum(lengths))
    return packing.spread(rows, shards) if shards > 1 else rows


@functools.cache
def counts(tile: Tile, lengths: tuple[int, ...], shards: int, name: str) -> list[Counts]:
    """What each shard's kernel goes over, forward or backward by `name`."""
    spread, whole = row(lengths, shards), row(lengths, 1)
    first, end, first_full, end_full = ranges(
        tile,
        *(spread[ids].reshape(shards, -1) for ids in ("position", "segment")),
        *(whole[ids][0] for ids in ("position", "segment")),
    )
    run, full = np.maximum(end - first, 0), np.maximum(end_full - first_full, 0)
    if name == "forward":  # the last tile has no reference yet
        full = full - ((full > 0) & (end_full == end))
    return [
        Counts(int(r.sum()), int(f.sum()), run.shape[1]) for r, f in zip(run, full, strict=True)
    ]


def ranges(tile: Tile, q_position_ST, q_segment_ST, kv_position_T, kv_segment_T):
    """What the kernels read, a row of query tiles each: first and end of key tiles; of full ones.

    Args:
        tile: the kernel's.
        q_position_ST: of each shard's queries.
        q_segment_ST: the same.
        kv_position_T: of the whole row.
        kv_segment_T: the same.
    """

    def of_shard(*ids):
        first, last = spans.spans(*ids)
        needed, full = (f(first, last, *tile) for f in (spans.tile_ranges, spans.full_ranges))
        return (*needed, *full)

    of_shards = jax.jit(jax.vmap(of_shard, in_axes=(0, 0, None, None)))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        found = of_shards(q_position_ST, q_segment_ST, kv_position_T, kv_segment_T)
        return tuple(map(np.asarray, found))


def seconds(
    where: Slice,
    model: ModelConfig,
    lengths: Sequence[int],
    *,
    shards: int,
    tensor: int,
    rows: int,
    forwards: int,
    backwards: int,
) -> float:
    """Seconds of the attention kernels of all layers, on the device that has most to do.

    Args:
        where: the slice; a TPU's.
        model: whose heads.
        lengths: documents of a row.
        shards: of the context axis.
        tensor: devices that share the heads.
        rows: of a device.
        forwards: times that the forward kernel of a layer runs.
        backwards: the same of the backward kernel.
    """
    group, kv_heads = model.heads // model.kv_heads, model.kv_heads // tensor
    chosen = tiles.tpu_tiles(where.kind, "bfloat16", model.head_dim, group)
    total = 0.0
    for name, tile, times in (
        ("forward", chosen.forward, forwards),
        ("backward", chosen.backward, backwards),
    ):
        cost = KERNELS[where.kind][name == "backward"]
        scale = tile.query * group * tile.key / 2**20 * model.head_dim / 128
        keys = sum(lengths) // tile.key if name == "backward" else 0
        of_shards = [
            scale * (cost.quick * c.full + cost.masked * (c.run - c.full))
            + cost.step * c.run
            + cost.edge * (c.queries + keys)
            for c in counts(tile, tuple(lengths), shards, name)
        ]
        total += times * max(of_shards)
    cores = min(where.chip.cores, rows * kv_heads)
    return model.layers * total * rows * kv_heads / cores / where.chip.clock
