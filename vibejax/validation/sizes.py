"""How large the checks are: on chips as Qwen2.5-Coder-3B has it, interpreted as small as can be."""

import dataclasses

from vibejax.qwen2 import ModelConfig
from vibejax.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of all checks.

    Attributes:
        model: whose heads the kernels get; programs run as many of its layers as fit.
        dtype: of programs.
        short_tokens: of rows that are held against the reference.
        exact_tokens: of rows in float32; 0: none, and no pages in it.
        long_tokens: of rows that are held against attention in blocks; 0: none.
        sequences: whose pages are attended to.
        slots: sequences of a device that decode.
        context: tokens of each.
        page_tokens: of a page.
        window: decode steps of one call.
        chunk_tokens: of a prompt at one time.
        row_tokens: of a device's row of a train micro-batch.
        sweep_tokens: of the rows by which tiles are chosen.
        stream_bytes: of the array that is copied to measure bandwidth.
        matmul: rows and columns of the matrices.
        collective_bytes: of the array that a collective moves.
        repeats: of each timing.
    """

    model: ModelConfig
    dtype: str
    short_tokens: int
    exact_tokens: int
    long_tokens: int
    sequences: int
    slots: int
    context: int
    page_tokens: int
    window: int
    chunk_tokens: int
    row_tokens: int
    sweep_tokens: int
    stream_bytes: int
    matmul: int
    collective_bytes: int
    repeats: int


FULL = Sizes(
    model=ModelConfig(rope=Rope(theta=1e6), context=65_536), dtype="bfloat16",
    short_tokens=2_048, exact_tokens=512, long_tokens=65_536, sequences=8, slots=32, context=4_096,
    page_tokens=64, window=16, chunk_tokens=128, row_tokens=8_192, sweep_tokens=32_768,
    stream_bytes=2**30, matmul=8_192, collective_bytes=2**28, repeats=7,
)  # fmt: skip
"""What a chip is tried with."""

QUICK = dataclasses.replace(FULL, long_tokens=0, context=1_024, row_tokens=2_048, repeats=3)
"""The same in a third of the time."""

TINY = Sizes(
    model=ModelConfig(rope=Rope(theta=1e6), layers=1, width=128, heads=4, kv_heads=2, head_dim=64,
                      mlp=128, vocab=256, context=256),
    dtype="float32", short_tokens=48, exact_tokens=0, long_tokens=0, sequences=4, slots=8,
    context=512, page_tokens=128, window=4, chunk_tokens=16, row_tokens=64, sweep_tokens=128,
    stream_bytes=2**20, matmul=128, collective_bytes=2**16, repeats=2,
)  # fmt: skip
"""What an interpreter can do in a minute."""
