"""The student's scores of traces: packed, a part at a time, stored as they come."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import data, train, weights
from vibejax.distill.traces import Setup, Trace, digest, fingerprint
from vibejax.losses import distillation
from vibejax.packing import Document
from vibejax.records import DataError
from vibejax.run_folder import Log, RunError

TRACES_AT_ONCE = 256  # scored before their scores are stored

Score = Callable[[Sequence[Document]], list[np.ndarray]]  # log-probs of each document's tokens


def score_traces(setup: Setup, traces: Sequence[Trace], path: Path) -> list[float | None]:
    """The student's learning potential of each trace, None where it cannot read the trace.

    A score is a function of student and trace. How traces are packed, which moves the last bits,
    depends on all of them but not on what is stored: a resumed run finds the same bits.

    Args:
        setup: the run's.
        traces: to score.
        path: JSONL, a line a trace: `id`, `teacher`, `length`, the `learnt` tokens that the score
            is a mean over, `score`, and a hash of student and trace.

    Raises:
        RunError: the student's logits are not numbers.
    """
    log = Log(path)
    found = {row["trace_sha256"]: row["score"] for row in log.rows}
    held = fingerprint(setup.student)
    digests = [digest([held, trace.record]) for trace in traces]
    missing = {n // TRACES_AT_ONCE for n, name in enumerate(digests) if name not in found}
    score = _load(setup) if missing else None
    start = time.perf_counter()
    for part in sorted(missing):
        places = range(part * TRACES_AT_ONCE, min((part + 1) * TRACES_AT_ONCE, len(traces)))
        rows = _score_part([traces[n] for n in places], setup, score)
        for n, row in zip(places, rows, strict=True):
            if digests[n] not in found:
                found[digests[n]] = row["score"]
                log.append(row | {"trace_sha256": digests[n]})
        seconds = time.perf_counter() - start
        print(f"{places.stop} of {len(traces)} traces scored, {seconds:.0f} s", file=sys.stderr)
    log.close()
    return [found[name] for name in digests]


def _load(setup: Setup) -> Score:
    config, student = setup.config, setup.student
    logprobs = jax.jit(
        lambda params, rows: (
            train.row_logprobs(
                params,
                rows,
                student.model,
                config.train,
                implementation=config.attention.implementation,
            ).logprob_BT
        )
    )
    params = weights.load_params(student.path, student.model, setup.mesh, jnp.float32)
    return lambda documents: train.score_documents(
        logprobs, params, documents, config.train, setup.mesh
    )


def _score_part(traces: Sequence[Trace], setup: Setup, score: Score) -> list[dict]:
    """A line of scores.jsonl for each trace, without its hash."""
    documents = [read_trace(trace, setup) for trace in traces]
    readable = [document for document in documents if document is not None]
    values = iter(score(readable) if readable else ())
    rows = []
    for trace, document in zip(traces, documents, strict=True):
        row = {"id": trace.id, "teacher": trace.teacher, "length": trace.length}
        if document is None:
            rows.append(row | {"learnt": 0, "score": None})
            continue
        learnt_T = document.weights > 0
        potential = distillation.learning_potential(next(values), learnt_T)
        if not np.isfinite(potential):
            raise RunError(f"{setup.student.name}: the model's logits are not numbers")
        rows.append(row | {"learnt": int(learnt_T.sum()), "score": potential})
    return rows


def read_trace(trace: Trace, setup: Setup) -> Document | None:
    """The document that SFT of the student would learn, None if it would refuse it."""
    try:
        read = data.learning_document(trace.record, setup.student.tokenizer, trace.id)
    except DataError:  # what a model wrote may be anything, also what a template refuses
        return None
    longest = min(setup.config.train.row_tokens, setup.student.model.context)
    if len(read.tokens) > longest:  # the student's tokens may be others than the teacher's
        return None
    return Document(tokens=read.tokens, weights=np.float32(read.learnt))
