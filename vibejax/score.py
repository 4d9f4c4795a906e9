"""Log-probabilities of given tokens: `python -m vibejax.score MODEL F.jsonl --out F`.

MODEL is an HF folder, a GGUF file or a run folder. A record holds `tokens` or `messages`; it
comes out as itself plus `tokens` and `logprobs`: natural logarithms at temperature 1, one a
token, the first null since nothing comes before it.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import buckets, data, programs, qwen2, sharding, tokenizer, train, weights
from vibejax.config.training import TrainConfig
from vibejax.config_file import InputError, errors_in_one_line
from vibejax.locations import resolve
from vibejax.packing import Document
from vibejax.records import read_records

RECORDS_AT_ONCE = 256
ROW_MULTIPLE = 256  # rows are as long as the longest record, rounded up to it


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("records", metavar="F.jsonl")
    parser.add_argument("--out", help="default: standard output")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None,
                        help="default: bfloat16 on accelerators, float32 on CPU")  # fmt: skip
    with errors_in_one_line(OSError):
        run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Scores the records of `args`.

    Raises:
        InputError: the model or a record cannot be used.
    """
    if args.out is not None and Path(args.out).resolve() == Path(args.records).resolve():
        raise InputError(f"--out {args.out}: is the file of the records")
    programs.prepare()
    path = weights.locate(args.model)
    model = weights.load_config(path)
    tokens = tokenizer.load(path)
    source = resolve(args.records)
    records = [
        (record, _ids(record, tokens, model, f"{source}:{number}"))
        for number, record in read_records(source)
    ]
    longest = max(len(ids) for _, ids in records)
    config = TrainConfig(
        row_tokens=-(-longest // ROW_MULTIPLE) * ROW_MULTIPLE,
        microbatch_rows=1,
        dtype=args.dtype or qwen2.default_dtype(),
    )
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    score = jax.jit(lambda params, rows: train.row_logprobs(params, rows, model, config).logprob_BT)
    with jax.set_mesh(mesh):
        params = weights.load_params(path, model, mesh, jnp.float32)
        with _sink(args.out) as out:
            for start in range(0, len(records), RECORDS_AT_ONCE):
                part = records[start : start + RECORDS_AT_ONCE]
                documents = [
                    Document(tokens=ids, weights=np.ones(len(ids), np.float32)) for _, ids in part
                ]
                values = train.score_documents(score, params, documents, config, mesh)
                out.writelines(_lines(part, values, start + 1))
                out.flush()


def _lines(part, values: list[np.ndarray], first: int) -> Iterator[str]:
    """Records with their log-probs, `first` the number of the first."""
    for number, ((record, ids), logprobs) in enumerate(zip(part, values, strict=True), first):
        if not np.isfinite(logprobs).all():
            raise InputError(f"record {number}: the model's logits are not numbers")
        row = {"tokens": ids.tolist(), "logprobs": [None, *logprobs[1:].tolist()]}
        yield json.dumps(record | row) + "\n"


def _ids(record: data.Record, tokens, model, where: str) -> np.ndarray:
    """The token ids of a record.

    Raises:
        InputError: it has none, or more than the model has positions.
    """
    if "tokens" in record:
        ids = record["tokens"]
        valid = isinstance(ids, list) and ids and all(type(i) is int for i in ids)
        if not valid or not 0 <= min(ids) <= max(ids) < model.vocab:
            raise InputError(f"{where}: tokens must be ids between 0 and {model.vocab - 1}")
    elif "messages" in record:
        ids = data.encode_conversation(record["messages"], tokens, where)
        data.require_known(ids, tokens, model.vocab, where)
    else:
        raise InputError(f"{where}: has neither 'tokens' nor 'messages'")
    if len(ids) > model.context:
        raise InputError(f"{where}: has {len(ids)} tokens, the model {model.context} positions")
    return np.asarray(ids, np.int32)


def _sink(out: str | None) -> contextlib.AbstractContextManager[TextIO]:
    if out is None:
        return contextlib.nullcontext(sys.stdout)
    path = buckets.on_disk(out).resolve()  # through a link
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe, say
        return path.open("w")
    return _replaced(path)


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[TextIO]:
    """A file to write, which takes the place of `path` when all went well."""
    part = path.with_name(path.name + ".partial")
    try:
        with part.open("w") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
