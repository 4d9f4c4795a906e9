"""Tile sizes of the kernels, chip by chip.

The sizes are those with the fewest cycles in a static replay of what the compiler made of each
(`tests/benchmarks/attention.py`; an optimistic model, good for ranking sizes on one chip), among
those that leave the copies of a tile at most half of its time. Sizes are given in rows, the query
tokens of a tile times the query heads that share its keys.

A file named by the environment variable VIBEJAX_TILES puts others in their place, as measured on a
chip that is there (`tpu/validate.py` writes it). It has a table a chip:

    [v5e]                     # a value of TPU_CHIPS
    forward = [2048, 512]     # rows and key tokens
    backward = [1024, 1024]
    decode = [524288, 6]      # bytes of a block of pages, blocks on their way
    [gpu9]                    # a GPU of this compute capability, as gpu_capability has it
    forward = [128, 128, 8, 2]  # query tokens, key tokens, warps, stages; the same for dq and dkv
    decode = [64, 4, 3]       # key tokens of a step, warps, stages

All are those of bfloat16 heads of at most 128, and what is left out stays as it is here.
"""

import functools
import os
import tomllib
from pathlib import Path
from typing import NamedTuple

MIB = 2**20
LANES = 128  # of a vector register: query tokens of a tile are a multiple of them
LONGEST_QUERY_TILE = 512


class Tile(NamedTuple):
    """Tokens of a query tile and of a key tile."""

    query: int
    key: int


class Fetch(NamedTuple):
    """How the TPU kernel over pages copies them.

    Attributes:
        block_bytes: of one copy, which is the half or less where they do not fit.
        buffers: blocks on their way; 6 hide the latency of the fastest memory.
    """

    block_bytes: int = 2**19
    buffers: int = 6


class Step(NamedTuple):
    """What a program of the GPU kernel over pages works on at a time.

    Attributes:
        tokens: keys, a power of two, at least 16.
        warps: that share a program.
        stages: steps in flight between memory and the multiprocessor.
    """

    tokens: int = 64
    warps: int = 4
    stages: int = 3


class TpuTiles(NamedTuple):
    """Of one chip, for one shape of heads.

    Attributes:
        forward: tile of the forward kernel.
        backward: tile of the backward kernel.
        vmem_bytes: what either may take of the on-chip memory.
    """

    forward: Tile
    backward: Tile
    vmem_bytes: int


TPU_CHIPS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""What JAX calls a device, and the name of its chip."""

# Rows and key tokens, forward and backward, for bfloat16 heads of at most 128, and the share of
# the on-chip memory (16 MiB on v4, 64 a core on v5p and tpu7x, 128 on v5e and v6e) that a kernel
# may take; the rest is the compiler's. Beside them, cycles of a tile without a mask for each 2^20
# pairs of a query row and a key of 128: forward, backward, and of these what the busiest matrix
# unit works.
_TPU = {
    "v4": ((1024, 512), (1024, 512), 14 * MIB),  # 4,700 of 4,096; 11,468 of 10,240
    "v5e": ((2048, 512), (1024, 1024), 64 * MIB),  # 4,308 of 4,096; 10,756 of 10,240
    "v5p": ((2048, 512), (1024, 1024), 48 * MIB),  # 4,312 of 4,096; 10,666 of 10,240
    "v6e": ((2048, 512), (1024, 1024), 64 * MIB),  # 1,845 of 1,536; 5,633 of 5,120
    "tpu7x": ((2048, 512), (1024, 1024), 48 * MIB),  # 1,686 of 1,536; 5,450 of 5,120
}
# Also replayed: v5e forward 2048 x 256 (4,474), 1024 x 512 (4,400), 2048 x 1024 (4,200, but 4 MiB
# more of scores and coarser documents), backward 1024 x 512 (10,598; its copies take half of the
# time) and 2048 x 512 (10,420, the same); v6e forward 2048 x 256 (2,064), 2048 x 1024 (1,800),
# backward 1024 x 512 (5,742); v4 forward 2048 x 256 (4,724), backward 1024 x 256 (11,424).

LARGE_GPUS = ("H100", "H200", "H20", "H800", "B100", "B200", "B300")
"""In the name of a GPU: compute capability 9 or more, tiles of Hopper's matrix instructions."""


VARIABLE = "VIBEJAX_TILES"

# Of each number of a key: its least and its largest value.
_ROWS, _KEYS, _WARPS, _STAGES = (LANES, 16_384), (LANES, 16_384), (1, 16), (1, 8)
_GPU_TILE = ((16, 512), (16, 512), _WARPS, _STAGES)
TPU_KEYS = {
    "forward": (_ROWS, _KEYS),
    "backward": (_ROWS, _KEYS),
    "decode": ((2**12, 2**22), (2, 16)),
}
GPU_KEYS = {
    "forward": _GPU_TILE,
    "dq": _GPU_TILE,
    "dkv": _GPU_TILE,
    "decode": ((16, 512), _WARPS, _STAGES),
}
_COUNTS = ("stages", "buffers")  # which need not be powers of two


def chosen(chip: str) -> dict[str, tuple[int, ...]]:
    """What the file of VIBEJAX_TILES has for a chip, by key; nothing without a file.

    Args:
        chip: a value of `TPU_CHIPS`, or `gpu8` or `gpu9`.

    Raises:
        ValueError: the file cannot be used; the message is one line that names file and key.
    """
    return overrides().get(chip, {})


def overrides() -> dict[str, dict[str, tuple[int, ...]]]:
    """What the file of VIBEJAX_TILES has, by chip and key; nothing without a file.

    Raises:
        ValueError: as `chosen`.
    """
    path = os.environ.get(VARIABLE)
    return read(path) if path else {}


@functools.cache
def read(path: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tiles of a file, by chip and key.

    Raises:
        ValueError: as `chosen`.
    """
    try:
        tables = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{VARIABLE} = {path}: {error}") from None
    known = {chip: TPU_KEYS for chip in _TPU} | {"gpu8": GPU_KEYS, "gpu9": GPU_KEYS}
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for chip, table in tables.items():
        if chip not in known or not isinstance(table, dict):
            raise ValueError(f"{path}: unknown table [{chip}]; known: {', '.join(known)}")
        keys = known[chip]
        for key, sizes in table.items():
            if key not in keys:
                raise ValueError(f"{path}: unknown key {chip}.{key}; known: {', '.join(keys)}")
            _check_sizes(f"{path}: {chip}.{key} = {sizes}", sizes, keys[key], _parts(keys, key))
        found[chip] = {key: tuple(sizes) for key, sizes in table.items()}
        if keys is TPU_KEYS:
            try:
                check_rows(chip, found[chip])
            except ValueError as error:
                raise ValueError(f"{path}: {chip}: {error}") from None
    return found


def _parts(keys: dict, key: str) -> tuple[str, ...]:
    """What the numbers of a key are called."""
    if keys is TPU_KEYS:
        return ("bytes", "buffers") if key == "decode" else ("rows", "key tokens")
    return (*(("key tokens",) if key == "decode" else ("query tokens", "key tokens")),
            "warps", "stages")  # fmt: skip


def _check_sizes(said: str, sizes, ranges, parts: tuple[str, ...]) -> None:
    if not isinstance(sizes, list) or len(sizes) != len(parts):
        raise ValueError(f"{said}: must be [{', '.join(parts)}]")
    for size, (least, most), part in zip(sizes, ranges, parts, strict=True):
        whole = isinstance(size, int) and not isinstance(size, bool) and least <= size <= most
        if not whole or (part not in _COUNTS and size & (size - 1)):
            rule = "a whole number" if part in _COUNTS else "a power of two, so that tiles divide,"
            raise ValueError(f"{said}: {part} must be {rule} from {least} to {most}")


def built_in(chip: str) -> dict[str, tuple[int, ...]]:
    """The rows and key tokens of a TPU chip where no file says otherwise, by key."""
    return dict(zip(("forward", "backward"), _TPU[chip][:2], strict=True))


def check_rows(chip: str, table: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError if the tiles of a chip need more memory than a kernel may take."""
    sizes = built_in(chip) | table
    tiles = TpuTiles(Tile(*sizes["forward"]), Tile(*sizes["backward"]), _TPU[chip][2])
    check_vmem(tiles, "bfloat16", LANES, 1)


def gpu_capability(device_kind: str) -> int:
    """The major compute capability whose tiles a GPU takes: 9, or 8 for all others."""
    return 9 if any(name in device_kind for name in LARGE_GPUS) else 8


def tpu_chip(device_kind: str) -> str:
    """The chip of what JAX calls a device.

    Raises:
        ValueError: there are no tiles for it.
    """
    if device_kind not in TPU_CHIPS:
        raise ValueError(f"no tiles for {device_kind!r}; there are for {', '.join(TPU_CHIPS)}")
    return TPU_CHIPS[device_kind]


def tpu_tiles(
    chip: str,
    dtype: str,
    head_dim: int,
    group: int,
    table: dict[str, tuple[int, ...]] | None = None,
) -> TpuTiles:
    """The tiles of the TPU kernels.

    Args:
        chip: a value of `TPU_CHIPS`.
        dtype: bfloat16 or float32, of queries, keys and values.
        head_dim: a multiple of 64, at most 256.
        group: query heads a key/value head.
        table: rows and key tokens by key, others than the built-in ones; None: `chosen`.

    Raises:
        ValueError: there are no tiles for the chip, or the smallest exceed its on-chip memory.
    """
    if chip not in _TPU:
        raise ValueError(f"no tiles for chip {chip!r}; there are for {', '.join(_TPU)}")
    vmem_bytes = _TPU[chip][2]
    found = built_in(chip) | (chosen(chip) if table is None else table)
    sizes = [found["forward"], found["backward"]]
    if dtype == "float32" or head_dim > 128:  # operands take twice the room
        sizes = [(rows // 2, keys // 2) for rows, keys in sizes]
    while True:
        forward, backward = (Tile(_query_tokens(rows // group, k), k) for rows, k in sizes)
        tiles = TpuTiles(forward, backward, vmem_bytes)
        if max(k for _, k in sizes) == LANES or not _excess(tiles, dtype, head_dim, group):
            check_vmem(tiles, dtype, head_dim, group)
            return tiles
        sizes = [(rows, max(LANES, k // 2)) for rows, k in sizes]


def _query_tokens(most: int, key_tokens: int) -> int:
    """A power of two, so that a query tile lies in one key tile and in one chunk of a row.

    The forward kernel needs the queries' own keys in one tile; rows are cut into chunks of
    `LONGEST_QUERY_TILE` tokens over context shards.
    """
    tokens = LANES
    while 2 * tokens <= min(most, key_tokens, LONGEST_QUERY_TILE):
        tokens *= 2
    return tokens


def check_vmem(tiles: TpuTiles, dtype: str, head_dim: int, group: int) -> None:
    """Raises ValueError, with the sizes, if a kernel's tiles need more memory than it may take."""
    if excess := _excess(tiles, dtype, head_dim, group):
        raise ValueError(excess)


def _excess(tiles: TpuTiles, dtype: str, head_dim: int, group: int) -> str:
    """Which kernel's tiles need too much memory, and how much; empty if none.

    The count is of the kernel's buffers, and of its scores as if none of them stayed in registers.
    """
    width = {"bfloat16": 2, "float32": 4}[dtype]
    for name, tile in (("forward", tiles.forward), ("backward", tiles.backward)):
        rows, scores = group * tile.query, group * tile.query * tile.key
        if name == "forward":  # q and the output, k and v, each twice; the sums; scores and weights
            needed = 4 * (rows + tile.key) * head_dim * width
            needed += rows * (head_dim + 32) * 4 + scores * (4 + width)
        else:  # q, dout, k, v, dk, dv and dq, the sums; weights and their gradients
            needed = (4 * rows + 8 * tile.key) * head_dim * width
            needed += (4 * rows + 2 * tile.key) * head_dim * 4 + rows * 32 * 4
            needed += 2 * scores * (4 + width)
        if needed > tiles.vmem_bytes:
            return (
                f"{name} tile of {tile.query} x {tile.key} tokens, {group} query heads of "
                f"{head_dim}, {dtype}: needs {needed / MIB:.1f} MiB of on-chip memory, "
                f"must be at most {tiles.vmem_bytes / MIB:.1f}"
            )
    return ""
