"""One view of HF folders and GGUF files: what the model is, and its tensors in pieces.

The names, shapes and layout of tensors are Hugging Face's, torch's [outputs, inputs], whichever
the format is; `qwen2.param_table` decides what they have to be.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vibejax import checkpoint_config, digests, qwen2
from vibejax.checkpoint_config import CheckpointError
from vibejax.gguf_reader import GGUFFile
from vibejax.locations import resolve
from vibejax.qwen2 import ModelConfig, ParamInfo
from vibejax.safetensors_folder import SafetensorsFolder, Tensor, read_json

PIECE_BYTES = 16 << 20
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_QKV_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose description was read; its tensors are read when asked for.

    Attributes:
        path: HF folder or GGUF file.
        architecture: as the checkpoint names it.
        config: the model.
        settings: config.json, empty for a GGUF file.
        source: the tensors.
    """

    path: Path
    architecture: str
    config: ModelConfig
    settings: Mapping[str, Any]
    source: SafetensorsFolder | GGUFFile


def locate(model: str) -> Path:
    """The HF folder or GGUF file that the name of a model stands for.

    Args:
        model: an HF folder, a GGUF file, a run folder (its `final/` is meant), one of these in a
            bucket ("gs://BUCKET/PATH"), or "package:NAME/PATH" for one inside an installed
            Python package, which is found without being imported.

    Raises:
        InputError: there is nothing of the kind.
    """
    path = resolve(model)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{model}: no such file or folder")
    for folder in (path, path / "final"):
        if (folder / "config.json").exists():
            return folder
    raise CheckpointError(f"{model}: neither an HF folder (config.json) nor a run (final/)")


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads what a checkpoint says about itself: configuration and tensor shapes, no weights.

    Raises:
        CheckpointError: it cannot be read, or is of another kind than this model code computes.
    """
    if path.is_file():
        file = GGUFFile(path)
        if file.metadata.get("split.count", 1) != 1:
            raise CheckpointError(f"{path}: one part of several; join them by llama-gguf-split")
        embedding = file.tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise CheckpointError(f"{path}: tensor token_embd.weight is missing")
        frequencies = file.tensors.get("rope_freqs.weight")
        if frequencies is not None:
            raise CheckpointError(f"{path}: scaled RoPE by rope_freqs.weight is not supported")
        config = checkpoint_config.from_gguf(
            file.metadata,
            vocab=embedding.shape[0],
            tied="lm_head.weight" not in file.tensors,
            path=path,
        )
        architecture = file.metadata["general.architecture"]
        return Checkpoint(
            path=path, architecture=architecture, config=config, settings={}, source=file
        )
    settings = read_json(path / "config.json")
    config = checkpoint_config.from_hf(settings, path / "config.json")
    return Checkpoint(
        path=path,
        architecture=settings["model_type"],
        config=config,
        settings=settings,
        source=SafetensorsFolder(path),
    )


def checksums(path: Path) -> dict[str, str]:
    """File name -> SHA-256, of what makes an HF folder the model that it is, or of a GGUF file."""
    files = [path]
    if path.is_dir():
        known = ("config.json", *TOKENIZER_FILES)
        files = [*path.glob("*.safetensors"), *filter(Path.is_file, (path / n for n in known))]
    return {held.name: digests.of_file(held) for held in sorted(files)}


def hf_tensors(config: ModelConfig) -> Iterator[tuple[str, ParamInfo, tuple[int, ...]]]:
    """(name, parameter, shape) of every tensor of an HF checkpoint, layer by layer."""
    infos = jax.tree.leaves(qwen2.map_table(lambda info: info, config))
    outer = [info for info in infos if not info.stacked]
    for info in outer:
        yield info.hf_name, info, hf_shape(info, config)
    for layer in range(config.layers):
        for info in infos:
            if info.stacked:
                yield info.hf_name.format(layer), info, hf_shape(info, config)


def hf_shape(info: ParamInfo, config: ModelConfig) -> tuple[int, ...]:
    """As a checkpoint holds one layer of it: torch's [outputs, inputs], no vocabulary padding."""
    shape = info.shape[1:] if info.stacked else info.shape
    if info.inputs:
        return math.prod(shape[info.inputs :]), math.prod(shape[: info.inputs])
    if info.axes[0] == "vocab":
        return config.vocab, shape[1]
    return (math.prod(shape),)


def check(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Compares names and shapes of all tensors with what the model has.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or unknown to the model; or a
            tied checkpoint holds a head that differs from its embedding.
    """
    held = dict(checkpoint.source.tensors)
    for name, _, shape in hf_tensors(config):
        tensor = held.pop(name, None)
        if tensor is None and not is_zero(checkpoint, name):
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing")
        if tensor is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} has shape {tensor.shape}, must be {shape}"
            )
    if held.pop("lm_head.weight", None) is not None:  # not popped above, so the two are tied
        _check_tied_head(checkpoint)
    # Old checkpoints hold RoPE frequencies, which follow from the configuration.
    unknown = [name for name in held if not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        raise CheckpointError(f"{checkpoint.path}: tensor {unknown[0]} has no place in the model")


def is_zero(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is left out since the llama architecture has none of the kind."""
    return (
        checkpoint.architecture == "llama"
        and name.endswith(_QKV_BIASES)
        and name not in checkpoint.source.tensors
    )


def _check_tied_head(checkpoint: Checkpoint) -> None:
    embedding, head = (
        checkpoint.source.tensors[name] for name in ("model.embed_tokens.weight", "lm_head.weight")
    )
    pairs = zip(read_pieces(checkpoint, embedding), read_pieces(checkpoint, head), strict=True)
    if embedding.shape != head.shape or not all(
        np.array_equal(a.astype(np.float32), b.astype(np.float32)) for a, b in pairs
    ):
        raise CheckpointError(
            f"{checkpoint.path}: tie_word_embeddings is true, but lm_head.weight differs from "
            "model.embed_tokens.weight"
        )


def read_pieces(checkpoint: Checkpoint, tensor: Tensor) -> Iterator[np.ndarray]:
    """A tensor's rows in pieces of bounded size, in the dtype that the source holds."""
    if is_zero(checkpoint, tensor.name):
        yield np.zeros(tensor.shape, tensor.dtype)
        return
    for rows in row_pieces(tensor):
        yield checkpoint.source.read(tensor.name, rows, slice(0, tensor.shape[-1]))


def row_pieces(tensor: Tensor, rows: slice | None = None) -> Iterator[slice]:
    """The rows of a tensor, or those asked for, as ranges of at most `PIECE_BYTES` each."""
    rows = slice(0, tensor.shape[0]) if rows is None else rows
    per_row = 4 * math.prod(tensor.shape[1:])  # GGUF gives float32 whatever the file holds
    step = max(1, PIECE_BYTES // per_row)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def cast(piece: np.ndarray, dtype: np.dtype, path: Path, name: str) -> np.ndarray:
    """`piece` in another dtype; float16 alone has a smaller range than the others."""
    if piece.dtype == dtype:
        return piece
    if dtype != np.float16:
        return piece.astype(dtype)
    wide = piece.astype(np.float32)
    largest = float(np.fmax.reduce(np.abs(wide), axis=None, initial=0.0))  # NaN apart
    if largest > float(np.finfo(np.float16).max):
        raise CheckpointError(f"{path}: tensor {name} holds {largest:g}, beyond float16")
    return wide.astype(dtype)
