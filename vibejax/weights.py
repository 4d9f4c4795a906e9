"""Weights in and out: Hugging Face folders and GGUF files in, Hugging Face folders out.

    python -m vibejax.weights info SRC
    python -m vibejax.weights import SRC DST [--dtype float32|bfloat16|float16]
    python -m vibejax.weights export RUN DST [--dtype float32|bfloat16|float16]

The model's parameter table decides every name and layout. Nothing is read as a whole: a tensor
passes in pieces of a few MB, on import straight into the array (or the shard of it) that it ends
in, on export straight into the file. The command line never holds more than one piece.
"""

import argparse
import dataclasses
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tokenizers import Tokenizer

from vibejax import buckets, checkpoint_config, gguf_tokenizer, qwen2, safetensors_folder, tokenizer
from vibejax.checkpoint_config import CheckpointError
from vibejax.checkpoint_reader import (
    TOKENIZER_FILES,
    cast,
    check,
    hf_shape,
    hf_tensors,
    is_zero,
    locate,
    open_checkpoint,
    read_pieces,
    row_pieces,
)
from vibejax.config_file import errors_in_one_line
from vibejax.qwen2 import ModelConfig, ParamInfo, Params
from vibejax.safetensors_folder import Tensor, published, read_json, write_json

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_OTHER_WORDS = (
    "note: AutoTokenizer of transformers 5 gives every qwen2 model Qwen's own pre-tokenizer, "
    "which is not this one's; PreTrainedTokenizerFast reads it as it is"
)


def load_config(path: Path) -> ModelConfig:
    """The model configuration of an HF folder or a GGUF file.

    Raises:
        CheckpointError: it is missing, malformed or of another kind of model.
    """
    if path.is_file():
        return open_checkpoint(path).config
    return checkpoint_config.from_hf(read_json(path / "config.json"), path / "config.json")


def require_tensors(path: Path, config: ModelConfig) -> None:
    """Checks, before work that takes long, that `load_params` finds what it reads.

    Raises:
        CheckpointError: a file or a tensor is missing, truncated, or does not fit `config`.
    """
    check(open_checkpoint(path), config)


def load_params(path: Path, config: ModelConfig, mesh: Mesh | None, dtype: Any) -> Params:
    """Reads the parameters, each device's shards only.

    Args:
        path: HF folder or GGUF file.
        config: as `load_config` returns it, or one of the same sizes.
        mesh: parameters are laid out on it by the axis rules; None gives plain arrays.
        dtype: of the parameters, whatever the checkpoint holds.

    Returns:
        The tree of `qwen2.param_table(config)`; padded vocabulary rows are zeros.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not fit `config`.
        ValueError: an axis does not divide on the mesh.
    """
    checkpoint = open_checkpoint(path)
    check(checkpoint, config)
    dtype = np.dtype(dtype)

    def leaf(info: ParamInfo, sharding: Any) -> jax.Array:
        if sharding is None:
            whole = tuple(slice(0, size) for size in info.shape)
            return jax.device_put(_read_shard(checkpoint, info, whole, config, dtype))
        shards: dict[Any, np.ndarray] = {}  # of replicas, each is read once

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            index = tuple(
                slice(*part.indices(size)[:2]) for part, size in zip(index, info.shape, strict=True)
            )
            key = tuple((part.start, part.stop) for part in index)
            if key not in shards:
                shards[key] = _read_shard(checkpoint, info, index, config, dtype)
            return shards[key]

        return jax.make_array_from_callback(info.shape, sharding, shard, dtype=dtype)

    if mesh is None:
        return qwen2.map_table(lambda info: leaf(info, None), config)
    return qwen2.map_table(leaf, config, qwen2.param_shardings(config, mesh))


def _read_shard(checkpoint, info, index, config, dtype) -> np.ndarray:
    """The part `index` of one parameter, layers stacked."""
    shard = _aligned_zeros(tuple(part.stop - part.start for part in index), dtype)
    if not info.stacked:
        _read_into(shard, checkpoint, info.hf_name, info, index, config)
        return shard
    for i, layer in enumerate(range(index[0].start, index[0].stop)):
        _read_into(shard[i], checkpoint, info.hf_name.format(layer), info, index[1:], config)
    return shard


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros at an address that lets JAX take the memory over on a CPU instead of copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _read_into(out, checkpoint, name, info, index, config) -> None:
    """Fills `out` with the part `index` of one tensor, turned from torch's layout to ours."""
    if is_zero(checkpoint, name):
        return
    shape = info.shape[1:] if info.stacked else info.shape
    tensor = Tensor(name, hf_shape(info, config), out.dtype)
    if info.inputs:
        rows = _flat(index[info.inputs :], shape[info.inputs :])
        columns = _flat(index[: info.inputs], shape[: info.inputs])
        # A view of `out`, [inputs, outputs]; torch's rows are our columns.
        target = out.reshape(columns.stop - columns.start, rows.stop - rows.start).T
    elif info.axes[0] == "vocab":
        rows, columns = index
        rows = slice(rows.start, min(rows.stop, config.vocab))  # none within the padding
        target = out
    else:
        rows, columns = _flat(index, shape), slice(0, 0)
        target = out.reshape(-1)
    for part in row_pieces(tensor, rows):
        piece = checkpoint.source.read(name, part, columns)
        target[part.start - rows.start : part.stop - rows.start] = cast(
            piece, out.dtype, checkpoint.path, name
        )


def _flat(index: tuple[slice, ...], shape: tuple[int, ...]) -> slice:
    """The range of a flattened block of axes; only the first may be cut."""
    inner = math.prod(shape[1:])
    if any(part != slice(0, size) for part, size in zip(index[1:], shape[1:], strict=True)):
        raise ValueError(f"{index} of {shape}: only the first axis of a block can be sharded")
    return slice(index[0].start * inner, index[0].stop * inner)


def save_params(
    params: Params,
    config: ModelConfig,
    dst: Path,
    *,
    dtype: Any,
    source: Path | None,
    eos_ids: Sequence[int] = (),
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a Hugging Face folder that transformers and vLLM load as it is.

    The folder appears whole or not at all: it is written beside `dst` and renamed. With
    several processes all must call; the first one writes, the others return when it has their
    data, which may be before the folder is there.

    Args:
        params: tree of `qwen2.param_table(config)`.
        config: the model.
        dst: folder to be; an earlier export there is replaced.
        dtype: of the tensors.
        source: HF folder or GGUF file that the tokenizer, the stop ids and further keys of
            config.json come from; None leaves them out.
        eos_ids: stop ids in place of the source's; empty keeps those.
        max_shard_bytes: beyond it, weights are spread over several files.

    Raises:
        CheckpointError: it cannot be written; `dst` is as it was.
    """
    dtype = np.dtype(dtype)
    leaves = {info.hf_name: leaf for info, leaf in _pairs(params, config)}
    table = {name: info for name, info, _ in hf_tensors(config)}
    layer_of = {
        info.hf_name.format(i): i
        for info in table.values()
        if info.stacked
        for i in range(config.layers)
    }

    def pieces(tensor: Tensor) -> Iterator[np.ndarray]:
        info = table[tensor.name]
        leaf = leaves[info.hf_name]
        value = _on_host(leaf, layer_of[tensor.name] if info.stacked else None)
        if info.inputs:
            value = value.reshape(tensor.shape[::-1]).T
        else:
            value = value.reshape(-1, *tensor.shape[1:])
        for rows in row_pieces(tensor):
            piece = cast(value[rows], dtype, dst, tensor.name)
            yield np.ascontiguousarray(piece)

    tensors = [Tensor(name, shape, dtype) for name, _, shape in hf_tensors(config)]
    if jax.process_index() != 0:
        for tensor in tensors:  # takes part in gathering, writes nothing
            for _ in pieces(tensor):
                pass
        return
    with published(dst, sum(tensor.nbytes for tensor in tensors)) as folder:
        fill_folder(folder, config, tensors, pieces, source, max_shard_bytes, eos_ids)


def _pairs(params: Params, config: ModelConfig) -> list[tuple[ParamInfo, jax.Array]]:
    pairs = qwen2.map_table(lambda info, leaf: (info, leaf), config, params)
    return jax.tree.leaves(pairs, is_leaf=lambda x: isinstance(x, tuple))


def _on_host(x: jax.Array, layer: int | None) -> np.ndarray:
    """One parameter, or one layer of it, whole."""
    (device, *others) = x.sharding.device_set
    if device.platform == "cpu" and not others:
        whole = np.asarray(x)  # a view of the array's own memory
        return whole if layer is None else whole[layer]
    part = x if layer is None else x[layer]
    if not part.is_fully_addressable:
        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part)


def convert(src: Path, dst: Path, dtype: str | None, max_shard_bytes: float = 5e9) -> None:
    """Makes a Hugging Face folder out of any checkpoint, piece by piece.

    Args:
        src: HF folder or GGUF file.
        dst: folder to be.
        dtype: of the tensors; None keeps each tensor's own (GGUF: float32, which holds what any
            quantization stands for).
        max_shard_bytes: beyond it, weights are spread over several files.

    Raises:
        CheckpointError: `src` cannot be read or `dst` not be written.
    """
    checkpoint = open_checkpoint(src)
    check(checkpoint, checkpoint.config)
    _backend(src)  # a broken tokenizer stops before the work
    for name in TOKENIZER_FILES if src.is_dir() else ():
        if name.endswith(".json") and (src / name).exists():
            read_json(src / name)
    held = checkpoint.source.tensors
    usual = held["model.embed_tokens.weight"].dtype

    def tensor_of(name: str, shape: tuple[int, ...]) -> Tensor:
        own = held[name].dtype if name in held else usual
        return Tensor(name, shape, own if dtype is None else DTYPES[dtype])

    def pieces(tensor: Tensor) -> Iterator[np.ndarray]:
        for piece in read_pieces(checkpoint, tensor):
            yield np.ascontiguousarray(cast(piece, tensor.dtype, src, tensor.name))

    tensors = [tensor_of(name, shape) for name, _, shape in hf_tensors(checkpoint.config)]
    with published(dst, sum(tensor.nbytes for tensor in tensors)) as folder:
        fill_folder(folder, checkpoint.config, tensors, pieces, src, max_shard_bytes)


def _backend(path: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint, None for a folder without."""
    if path.is_dir() and not (path / "tokenizer.json").exists():
        return None
    return tokenizer.load_backend(path)


def fill_folder(
    folder: Path,
    config: ModelConfig,
    tensors: list[Tensor],
    pieces: Callable[[Tensor], Iterator[np.ndarray]],
    source: Path | None,
    max_shard_bytes: float,
    eos_ids: Sequence[int] = (),
) -> None:
    """Writes all that makes an empty folder a Hugging Face checkpoint.

    Args:
        folder: as `safetensors_folder.published` gives it.
        config: the model.
        tensors: what to write, in order; the first one's dtype is the checkpoint's.
        pieces: gives a tensor's data, as for `safetensors_folder.write`.
        source: as for `save_params`.
        max_shard_bytes: beyond it, weights are spread over several files.
        eos_ids: as for `save_params`.
    """
    settings: Mapping[str, Any] = {}
    if source is not None and source.is_file():
        tokenizer.save(tokenizer.load(source), folder)
        settings = read_json(folder / "generation_config.json")
    elif source is not None:
        for name in TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        if (source / "config.json").exists():
            settings = read_json(source / "config.json")
    written = checkpoint_config.to_hf(config, tensors[0].dtype.name, settings)
    write_json(folder / "config.json", written)
    generation = folder / "generation_config.json"
    if eos_ids:
        kept = read_json(generation) if generation.exists() else {}
        write_json(generation, kept | {"eos_token_id": list(eos_ids)})
    elif not generation.exists() and "eos_token_id" in settings:
        write_json(generation, {"eos_token_id": settings["eos_token_id"]})
    safetensors_folder.write(folder, tensors, pieces, max_shard_bytes)


def describe(path: Path) -> str:
    """What `info` prints: one `name: value` a line."""
    checkpoint = open_checkpoint(path)
    check(checkpoint, checkpoint.config)
    config = checkpoint.config
    rope = [f"{k}={v}" for k, v in dataclasses.asdict(config.rope).items() if v is not None]
    lines = {
        "checkpoint": path,
        "architecture": checkpoint.architecture,
        "parameters": f"{qwen2.param_count(config):,}",
        "dtype": ", ".join(sorted(checkpoint.source.dtype_names())),
    }
    for field in dataclasses.fields(config):
        if field.name not in ("rope", "init_std"):
            lines[field.name] = getattr(config, field.name)
    lines["rope"] = " ".join(rope)
    try:
        tokens = tokenizer.load(path)
    except CheckpointError as error:
        lines["tokenizer"] = f"none ({error})"
    else:
        lines["tokenizer"] = f"{tokens.vocab} tokens"
        lines["eos"] = ", ".join(f"{i} {tokens.backend.id_to_token(i)!r}" for i in tokens.eos_ids)
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vibejax.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print what a checkpoint is").add_argument("src")
    for name, text in (
        ("import", "make an HF folder out of an HF folder or a GGUF file"),
        ("export", "make an HF folder out of a run's final policy"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("src")
        command.add_argument("dst")
        command.add_argument(
            "--dtype", choices=DTYPES, help="default: the source's own; float32 for GGUF"
        )
    parsed = parser.parse_args(arguments)
    with errors_in_one_line(OSError):
        src = locate(parsed.src)
        if parsed.command == "info":
            print(describe(src))
            return
        with buckets.written(parsed.dst) as dst:
            if dst.exists():
                raise CheckpointError(f"{dst}: exists; name a new folder")
            convert(src, dst, parsed.dtype)
            backend = _backend(dst)
        if backend is not None and not gguf_tokenizer.splits_like_qwen2(backend):
            print(f"{parsed.dst}: {_OTHER_WORDS}", file=sys.stderr)


if __name__ == "__main__":
    main()
