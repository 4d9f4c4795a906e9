"""A weighted average of checkpoints: `python -m vibejax.merge OUT A[=WEIGHT] B[=WEIGHT] ...`.

With --specialists PROBE_RUN the sources are the specialists that a probe found, each with the
number of domains that it is best at. OUT becomes an HF folder whose parameters are
M = sum_i w_i M_i over the sources (HF folders, run folders, GGUF files). A weight is 1 where none
is given; they are divided by their sum. Sources must be of one architecture and one tokenizer. What
else OUT holds (tokenizer, stop ids, further keys of config.json) is the first source's, and
merge.json says what was merged: the sources, their weights, and SHA-256 sums of all weight files.

Tensors pass in pieces of a few MB, so the memory needed depends neither on the model nor on the
number of sources.

Source: VibeThinker-3B (arXiv 2606.16140) sec. 2.1, the merge of the specialists.
"""

import argparse
import collections
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vibejax import buckets, tokenizer, weights
from vibejax.checkpoint_config import CheckpointError
from vibejax.checkpoint_reader import (
    Checkpoint,
    cast,
    check,
    checksums,
    hf_tensors,
    locate,
    open_checkpoint,
    read_pieces,
    row_pieces,
)
from vibejax.config_file import InputError, errors_in_one_line
from vibejax.locations import resolve
from vibejax.safetensors_folder import Tensor, published, read_json, write_json

SHOWN = 60  # characters of a value in a message


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint, as the user names it, and its weight before the division by the sum."""

    model: str
    weight: float


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vibejax.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument("sources", nargs="*", metavar="MODEL[=WEIGHT]")
    parser.add_argument(
        "--specialists", metavar="PROBE_RUN", help="in place of sources, those it found"
    )
    parser.add_argument(
        "--dtype",
        choices=weights.DTYPES,
        help="default: the sources' own; float32 where they differ, and for GGUF",
    )
    args = parser.parse_args(arguments)
    with errors_in_one_line():
        if bool(args.sources) == bool(args.specialists):
            raise InputError("name either sources or the run folder of a probe (--specialists)")
        sources = [parse_source(text) for text in args.sources]
        if args.specialists:
            sources = specialists(resolve(args.specialists))
        with buckets.written(args.out) as out:
            merge(out, sources, args.dtype)
        for source, share in zip(sources, shares(sources), strict=True):
            print(f"{share:.4f}  {source.model}")


def parse_source(text: str) -> Source:
    """What MODEL or MODEL=WEIGHT stands for; the last "=" counts.

    Raises:
        InputError: the weight is no number.
    """
    model, equals, weight = text.rpartition("=")
    if not equals:
        return Source(text, 1.0)
    try:
        return Source(model, float(weight))
    except ValueError:
        raise InputError(
            f"{text}: weight {weight!r} must be a number; a path that holds '=' needs one, PATH=1"
        ) from None


def specialists(probe: Path) -> list[Source]:
    """The specialists in the run folder of a probe; the report merges them with equal weights.

    Raises:
        InputError: the folder holds no finished probe.
    """
    path = probe / "probe.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; has the probe finished?")
    best = read_json(path).get("specialists")
    if not isinstance(best, dict) or not all(isinstance(model, str) for model in best.values()):
        raise InputError(f"{path}: 'specialists' must map domains to checkpoints")
    return [Source(model, float(n)) for model, n in collections.Counter(best.values()).items()]


def shares(sources: Sequence[Source]) -> list[float]:
    """The sources' weights w_i, divided by their sum.

    Raises:
        InputError: a weight is negative or not finite, or all are 0.
    """
    for source in sources:
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise InputError(
                f"{source.model}: weight {source.weight} must be finite and at least 0"
            )
    total = sum(source.weight for source in sources)
    if not (math.isfinite(total) and total > 0):
        raise InputError(f"the weights sum to {total}; the sum must be finite and above 0")
    return [source.weight / total for source in sources]


def merge(
    dst: Path, sources: Sequence[Source], dtype: str | None, max_shard_bytes: float = 5e9
) -> None:
    """Writes the weighted average of checkpoints; the folder appears whole or not at all.

    Args:
        dst: HF folder to be.
        sources: at least one; the same checkpoint may come twice.
        dtype: of the tensors; None keeps each tensor's own where all sources agree, and else
            takes float32.
        max_shard_bytes: beyond it, weights are spread over several files.

    Raises:
        InputError: a weight cannot be used.
        CheckpointError: `dst` exists; a source is missing or damaged, or holds a value that is not
            finite; or two of them are no copies of one model with one tokenizer.
    """
    share = shares(sources)
    paths = [locate(source.model) for source in sources]
    for path in paths:
        if path.resolve().is_relative_to(dst.resolve()):
            raise CheckpointError(f"{dst}: holds the source {path}; name a new folder")
    if dst.exists():
        raise CheckpointError(f"{dst}: exists; name a new folder")
    checkpoints = [open_checkpoint(path) for path in paths]
    _check_one_model(checkpoints)
    _check_one_tokenizer(paths)
    config = checkpoints[0].config
    for checkpoint in checkpoints:
        check(checkpoint, config)

    def pieces(tensor: Tensor) -> Iterator[np.ndarray]:
        for piece in _averaged(checkpoints, share, tensor):
            yield cast(piece, tensor.dtype, dst, tensor.name)

    tensors = [
        Tensor(
            name, shape, _own_dtype(checkpoints, name) if dtype is None else weights.DTYPES[dtype]
        )
        for name, _, shape in hf_tensors(config)
    ]
    with published(dst, sum(tensor.nbytes for tensor in tensors)) as folder:
        weights.fill_folder(folder, config, tensors, pieces, paths[0], max_shard_bytes)
        merged = [
            {"path": str(path), "weight": w, "sha256": checksums(path)}
            for path, w in zip(paths, share, strict=True)
        ]
        write_json(folder / "merge.json", {"sources": merged, "sha256": checksums(folder)})


def _averaged(
    checkpoints: Sequence[Checkpoint], share: Sequence[float], tensor: Tensor
) -> Iterator[np.ndarray]:
    """sum_i w_i M_i of one tensor, float32, in pieces of which few are held at one time."""
    streams = [read_pieces(checkpoint, tensor) for checkpoint in checkpoints]
    for _ in row_pieces(tensor):
        total = None
        for checkpoint, w, stream in zip(checkpoints, share, streams, strict=True):
            piece = next(stream).astype(np.float32)
            if not np.isfinite(piece).all():
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {tensor.name} holds a value that is not finite"
                )
            piece *= np.float32(w)
            total = piece if total is None else np.add(total, piece, out=total)
        yield total


def _own_dtype(checkpoints: Sequence[Checkpoint], name: str) -> np.dtype:
    """The dtype in which all sources hold a tensor; float32 where they do not agree."""
    # A llama has no QKV biases; they are zeros of the dtype of its embedding.
    held = [checkpoint.source.tensors for checkpoint in checkpoints]
    dtypes = {tensors.get(name, tensors["model.embed_tokens.weight"]).dtype for tensors in held}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _check_one_model(checkpoints: Sequence[Checkpoint]) -> None:
    first, *others = checkpoints
    # `init_std` says where weights came from, not what is computed with them.
    own = dataclasses.asdict(first.config) | {"init_std": None}
    for other in others:
        config = dataclasses.asdict(other.config) | {"init_std": None}
        if config != own:
            raise CheckpointError(
                f"{first.path} and {other.path} are of two architectures: "
                f"{_first_difference(own, config)}"
            )


def _check_one_tokenizer(paths: Sequence[Path]) -> None:
    first, *others = paths
    own = _tokenizer_parts(tokenizer.load(first))
    for other in others:  # one at a time: a vocabulary takes as much memory as a tensor
        parts = _tokenizer_parts(tokenizer.load(other))
        if parts != own:
            raise CheckpointError(
                f"{first} and {other} have two tokenizers: {_first_difference(own, parts)}"
            )


def _tokenizer_parts(tokens: tokenizer.Tokenizer) -> dict[str, Any]:
    """All that decides which ids a text or a chat becomes, and where a completion stops."""
    return {
        **json.loads(tokens.backend.to_str()),
        "chat_template": tokens.template,
        "eos_token_id": list(tokens.eos_ids),
    }


def _first_difference(a: Any, b: Any, name: str = "") -> str:
    """Where two unequal JSON values first differ, and what they hold there."""
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(key for key in a | b if key not in a or key not in b or a[key] != b[key])
        return _first_difference(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    if isinstance(a, list) and isinstance(b, list):
        i = _common(a, b)
        if i == min(len(a), len(b)):
            return f"{name} has {len(a)} and {len(b)} entries"
        return _first_difference(a[i], b[i], f"{name}[{i}]")
    if isinstance(a, str) and isinstance(b, str) and max(len(a), len(b)) > SHOWN:
        i = _common(a, b)
        return f"{name}[{i}:] = {a[i:][:SHOWN]!r} and {b[i:][:SHOWN]!r}"
    return f"{name} = {a!r:.{SHOWN}} and {b!r:.{SHOWN}}"


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items the two begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


if __name__ == "__main__":
    main()
