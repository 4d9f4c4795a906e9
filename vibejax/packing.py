"""Documents into rows: which document lies in which row, and the arrays of the rows.

Shape suffixes: B rows, T tokens of a row.

Targets are shifted here, on the host, and every token's loss weight is fixed here. What a row
holds besides is data to the model: it reads positions and segment ids, never the place in a row.

The plan is made for one optimizer step at a time, longest document first. grain's packing works on
a stream: it fills as well or worse with as many rows open, takes a step's documents from where the
rows happen to end, and has a state to keep; this has none.
"""

import bisect
import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from vibejax.sharding import context_chunk

Rows = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One sequence of tokens, some of which count in the loss.

    Attributes:
        tokens: [T] int32, prompt and completion.
        weights: [T] float32, the loss weight of each token as a target: 0 on the prompt.
        channels: further per-token values, [T] float32 by name, aligned with `tokens`: the
            advantage, the sampler's log-prob.
    """

    tokens: np.ndarray
    weights: np.ndarray
    channels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def plan(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Which documents share a row: best fit, longest first; a pure function of the lengths.

    Args:
        lengths: tokens of each document.
        row_tokens: T.

    Returns:
        For each row, the indices of its documents.

    Raises:
        ValueError: a document is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > row_tokens:
            raise ValueError(f"document {index} has {length} tokens; a row holds {row_tokens}")
        tightest = bisect.bisect_left(free, (length, 0))
        if tightest == len(free):
            rows.append([])
            room, row = row_tokens, len(rows) - 1
        else:
            room, row = free.pop(tightest)
        rows[row].append(index)
        bisect.insort(free, (room - length, row))
    return rows


def fill(lengths: Sequence[int], row_tokens: int, microbatch_rows: int) -> float:
    """The share of the tokens computed for these documents that are theirs, not padding."""
    rows = len(plan(lengths, row_tokens))
    computed = math.ceil(rows / microbatch_rows) * microbatch_rows * row_tokens
    return sum(lengths) / computed


def pack(documents: Sequence[Document], row_plan: list[list[int]], row_tokens: int) -> Rows:
    """The rows of `row_plan`.

    Returns:
        By name, [B, T] arrays: int32 `token`, `target`, `position`, `segment` (from 1; 0 is
        padding), float32 `weight` and the documents' channels. A value stands where its token is
        the target, one place before the token itself; the last place of a document has weight 0.
    """
    shape = (len(row_plan), row_tokens)
    rows = {name: np.zeros(shape, np.int32) for name in ("token", "target", "position", "segment")}
    rows["weight"] = np.zeros(shape, np.float32)
    for name in documents[0].channels if documents else ():
        rows[name] = np.zeros(shape, np.float32)
    for b, start, segment, document in _places(documents, row_plan):
        end = start + len(document.tokens)
        rows["token"][b, start:end] = document.tokens
        rows["target"][b, start : end - 1] = document.tokens[1:]
        rows["position"][b, start:end] = np.arange(end - start)
        rows["segment"][b, start:end] = segment
        rows["weight"][b, start : end - 1] = document.weights[1:]
        for name, value in document.channels.items():
            rows[name][b, start : end - 1] = value[1:]
    return rows


def spread(rows: Rows, shards: int) -> Rows:
    """The rows with their tokens in the order in which context shards hold them.

    A causal row costs its last part most. Chunks of a row go to shards in equal number, heaviest
    first to the shard with the least work so far, so that all wait for each other the least; work
    is the keys that a chunk's tokens see.

    Args:
        rows: as `pack` returns them.
        shards: of the `context` axis, which cuts rows in equal contiguous parts.

    Returns:
        `rows` in that order, and `place`, [B, T] int32: where in its row each token belongs.

    Raises:
        ValueError: a shard's part of a row is not a whole number of chunks, or a segment id is not
            one run.
    """
    check_runs(rows["segment"])
    B, T = rows["segment"].shape
    chunk = context_chunk(T, shards)
    work_BT = np.where(rows["segment"] > 0, rows["position"] + 1, 0)
    work_BC = work_BT.reshape(B, -1, chunk).sum(axis=-1, dtype=np.int64)
    order_BC = np.stack([_balanced(work_C, shards) for work_C in work_BC])
    place_BT = (order_BC[:, :, None] * chunk + np.arange(chunk)).reshape(B, T)
    out = {name: np.take_along_axis(x_BT, place_BT, axis=1) for name, x_BT in rows.items()}
    return out | {"place": place_BT.astype(np.int32)}


def _balanced(work_C: np.ndarray, shards: int) -> np.ndarray:
    """The chunks of one row, shard after shard, in row order within each."""
    room = len(work_C) // shards
    parts: list[list[int]] = [[] for _ in range(shards)]
    load = [0] * shards
    for index in sorted(range(len(work_C)), key=lambda c: (-work_C[c], c)):
        shard = min((s for s in range(shards) if len(parts[s]) < room), key=lambda s: (load[s], s))
        parts[shard].append(index)
        load[shard] += int(work_C[index])
    return np.concatenate([sorted(part) for part in parts])


def gather(value_BT: np.ndarray, place_BT: np.ndarray) -> np.ndarray:
    """Values of rows from `spread`, back in the order of the rows."""
    out = np.empty_like(value_BT)
    np.put_along_axis(out, place_BT, value_BT, axis=1)
    return out


def unpack(
    value_BT: np.ndarray, documents: Sequence[Document], row_plan: list[list[int]]
) -> list[np.ndarray]:
    """Per-target values of rows, back to each document's tokens; a first token's value is 0."""
    out: list[np.ndarray] = [np.empty(0)] * len(documents)
    order = (index for row in row_plan for index in row)
    for index, (b, start, _, document) in zip(order, _places(documents, row_plan), strict=True):
        shifted = value_BT[b, start : start + len(document.tokens) - 1]
        out[index] = np.concatenate([np.zeros(1, value_BT.dtype), shifted])
    return out


def microbatches(rows: Rows, size: int) -> Iterator[Rows]:
    """Cuts rows into micro-batches of `size`, the last filled up with empty rows.

    Raises:
        ValueError: a segment id is not one run; the attention kernels, which see it traced, would
            take two documents for one.
    """
    if "place" not in rows:
        check_runs(rows["segment"])
    count = len(rows["token"])
    for start in range(0, count, size):
        part = {name: x_BT[start : start + size] for name, x_BT in rows.items()}
        filler = ((0, size - len(part["token"])), (0, 0))
        yield {name: np.pad(x_BT, filler) for name, x_BT in part.items()}


def check_runs(segment_BT: np.ndarray) -> None:
    """Raises ValueError, with row and id, where a segment id (0, padding, apart) is not one run."""
    for row, segment_T in enumerate(segment_BT):
        starts_T = np.flatnonzero(np.diff(segment_T, prepend=0) != 0)
        ids, runs = np.unique(segment_T[starts_T], return_counts=True)
        broken = ids[(runs > 1) & (ids != 0)]
        if len(broken):
            raise ValueError(f"row {row}: segment {broken[0]} must be one run of tokens")


def _places(documents, row_plan) -> Iterator[tuple[int, int, int, Document]]:
    """(row, first place, segment id, document) in the order of the plan."""
    for b, indices in enumerate(row_plan):
        start = 0
        for segment, index in enumerate(indices, start=1):
            yield b, start, segment, documents[index]
            start += len(documents[index].tokens)
