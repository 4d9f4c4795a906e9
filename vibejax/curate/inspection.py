"""What can be said of records without knowing any others: the part that worker processes do."""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vibejax.config.curate import CurateConfig
from vibejax.curate import duplicates, evaluation, repetition
from vibejax.curate.evaluation import Index
from vibejax.curate.letters import Batch, letters, without_layout
from vibejax.curate.record_files import Chunk, parts, read_chunks, record_id
from vibejax.run_folder import RunError

CountTokens = Callable[[str], int]

CHUNKS_AHEAD = 4  # a worker, beyond the one that it looks at

Reason = tuple[str, dict[str, Any]]
"""Why a record is dropped, and the evidence."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found in a chunk, a list entry a record.

    Attributes:
        ids: of the records, None where a record has none.
        reasons: to drop a record; None keeps it so far.
        lines: hashes of the trace's lines, their letters, and the trace's letters.
        exact_keys, near_keys: see `duplicates`; a near key is None where a text is too short.
        min_hashes: [R, 128] uint8, or None where nobody asks for them.
    """

    ids: list[Any]
    reasons: list[Reason | None]
    lines: list[tuple[list[int], list[int], int]]
    exact_keys: list[int]
    near_keys: list[int | None]
    min_hashes: np.ndarray | None


def inspect(
    chunk: Chunk, config: CurateConfig, index: Index | None, tokens: CountTokens | None
) -> Findings:
    """Looks at the records of a chunk one by one.

    Args:
        chunk: the records.
        config: what is looked for.
        index: of the evaluation sets, None without any.
        tokens: counts lengths; None counts characters.

    Raises:
        InputError: a record cannot be read; file, line and field are named.
    """
    records = chunk.records()
    texts = [parts(record, chunk.where(i)) for i, record in enumerate(records)]
    reasons = [_length(*text, config, tokens) for text in texts]
    runs = [tuple(map(letters, text)) for text in texts]
    batch = Batch([without_layout(run) for pair in runs for run in pair])
    if config.repetition.max_share < 1:
        share_R, most_R = repetition.repeated(batch)
        for i, (share, most) in enumerate(zip(share_R, most_R, strict=True)):
            if share > config.repetition.max_share or most > config.repetition.max_count:
                found = {"repeated_share": round(float(share), 3), "most_repeated": int(most)}
                reasons[i] = reasons[i] or ("repetition", found)
    if index is not None:
        for i, found in evaluation.find(index, batch).items():
            reasons[i] = reasons[i] or ("contaminated", found)
    signs = [duplicates.formula(" ".join(text)) for text in texts]
    near = config.duplicates.near > 0
    return Findings(
        ids=[record_id(record) for record in records],
        reasons=reasons,
        lines=[repetition.line_hashes(trace) for _, trace in texts],
        exact_keys=[
            duplicates.exact_key(b"\n".join(pair), sign)
            for pair, sign in zip(runs, signs, strict=True)
        ],
        near_keys=[
            duplicates.near_key(sign) if sum(map(len, pair)) >= duplicates.MIN_LETTERS else None
            for pair, sign in zip(runs, signs, strict=True)
        ],
        min_hashes=duplicates.min_hashes(batch) if near else None,
    )


def _length(
    prompt: str, trace: str, config: CurateConfig, tokens: CountTokens | None
) -> Reason | None:
    """The bound that a record is beyond, if it is."""
    limits = config.length
    for name, text, least, most in (
        ("prompt", prompt, limits.min_prompt, limits.max_prompt),
        ("trace", trace, limits.min_trace, limits.max_trace),
    ):
        if not least and not most:
            continue
        length = len(text) if tokens is None else tokens(text)
        if length < least:
            return f"{name}_short", {"length": length}
        if most and length > most:
            return f"{name}_long", {"length": length}
    return None


def inspect_all(
    config: CurateConfig, inputs: list[Path], index: Index | None
) -> Iterator[tuple[int, Chunk, Findings]]:
    """The chunks of all inputs in their order, each with the number of its input and its findings.

    Raises:
        InputError: a record cannot be read, or a worker process ended.
    """
    chunks = ((s, chunk) for s, path in enumerate(inputs) for chunk in read_chunks(path))
    if config.workers == 1:
        tokens = token_counter(config)
        for source, chunk in chunks:
            yield source, chunk, inspect(chunk, config, index, tokens)
        return
    with concurrent.futures.ProcessPoolExecutor(
        config.workers,
        multiprocessing.get_context("spawn"),  # a fork would copy the verifiers' threads' locks
        initializer=_start_worker,
        initargs=(config, index),
    ) as workers:
        waiting: collections.deque = collections.deque()
        try:
            for source, chunk in chunks:
                waiting.append((source, chunk, workers.submit(_inspect_here, chunk)))
                if len(waiting) > (1 + CHUNKS_AHEAD) * config.workers:
                    yield _next(waiting)
            while waiting:
                yield _next(waiting)
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _next(waiting: collections.deque) -> tuple[int, Chunk, Findings]:
    source, chunk, future = waiting.popleft()
    try:
        return source, chunk, future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise RunError(
            f"{chunk.where(0)}: a worker process ended by itself, for want of memory perhaps; "
            "try workers = 1"
        ) from None


_worker_arguments: tuple[Any, ...] = ()


def _start_worker(config: CurateConfig, index: Index | None) -> None:
    global _worker_arguments
    _worker_arguments = config, index, token_counter(config)


def _inspect_here(chunk: Chunk) -> Findings:
    return inspect(chunk, *_worker_arguments)


def token_counter(config: CurateConfig) -> CountTokens | None:
    """Counts the tokens of a text; None where the configuration names no tokenizer.

    Raises:
        InputError: the tokenizer cannot be used.
    """
    if not config.length.tokenizer:
        return None
    from vibejax import tokenizer, weights  # seconds, which only those wait for who count tokens

    tokens = tokenizer.load(weights.locate(config.length.tokenizer))
    return lambda text: len(tokens.encode(text, add_special_tokens=False))
