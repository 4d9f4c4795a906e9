"""Reading GGUF files, the format of llama.cpp: metadata, and tensors under Hugging Face's names.

Quantized tensors are dequantized by the gguf package, some rows at a time. In files of the
`llama` architecture the rows of q and k are permuted within each head, since llama.cpp rotates
neighbouring pairs (2d, 2d + 1) there; they come back in Hugging Face's order (d, d + D/2). Files
of `qwen2` are not permuted.

The header is parsed here: the package's reader builds several Python objects for every token of
the vocabulary, which takes five seconds for 49,152 tokens and their merges, and this 0.1.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3; llama.cpp's
convert_hf_to_gguf.py, `LlamaModel.permute`, and gguf-py's tensor_mapping.py.
"""

import math
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import gguf
import numpy as np

from vibejax.checkpoint_config import CheckpointError
from vibejax.safetensors_folder import Tensor

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# value type -> numpy's code; little-endian, as nearly all files are
_SCALARS = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Stored(NamedTuple):
    """Where and how the file holds one tensor."""

    kind: gguf.GGMLQuantizationType
    offset: int
    row_bytes: int


class GGUFFile:
    """A GGUF file's metadata, and its tensors read slice by slice."""

    def __init__(self, path: Path):
        """Reads the header.

        Raises:
            CheckpointError: no GGUF file, another version, truncated.
        """
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._stored: dict[str, _Stored] = {}
        try:
            with path.open("rb") as file:
                self._read_header(file)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        except (
            struct.error, UnicodeDecodeError, IndexError, ArithmeticError, MemoryError,
            RecursionError,
        ):  # fmt: skip
            raise CheckpointError(f"{path}: damaged or truncated GGUF header") from None

    def _read_header(self, file: BinaryIO) -> None:
        magic, version = struct.unpack("<4sI", file.read(8))
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file")
        if version not in _VERSIONS:
            known = ", ".join(map(str, _VERSIONS))
            raise CheckpointError(f"{self.path}: GGUF version {version} must be among {known}")
        tensors, keys = struct.unpack("<QQ", file.read(16))
        for _ in range(keys):
            key = _string(file)
            self.metadata[key] = _value(file, _u32(file))
        infos = [self._tensor_info(file) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise CheckpointError(
                f"{self.path}: general.alignment {alignment!r} must be a positive whole number"
            )
        start = -(-file.tell() // alignment) * alignment
        size = self.path.stat().st_size
        for stored_name, shape, kind, offset in infos:
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise CheckpointError(
                    f"{self.path}: tensor {stored_name} has rows of {shape[-1]}, "
                    f"must be a multiple of {kind.name}'s {block}"
                )
            row_bytes = shape[-1] // block * block_bytes
            if start + offset + math.prod(shape[:-1]) * row_bytes > size:
                raise CheckpointError(f"{self.path}: truncated, tensor {stored_name} is cut off")
            name = _hf_name(stored_name)
            self.tensors[name] = Tensor(name, shape, np.dtype(np.float32))
            self._stored[name] = _Stored(kind, start + offset, row_bytes)

    def _tensor_info(self, file: BinaryIO) -> tuple:
        name = _string(file)
        dims = struct.unpack(f"<{(n := _u32(file))}Q", file.read(8 * n))
        kind, offset = struct.unpack("<IQ", file.read(12))
        if kind not in set(gguf.GGMLQuantizationType) or not dims:
            raise CheckpointError(f"{self.path}: tensor {name} has unknown type {kind}")
        return name, dims[::-1], gguf.GGMLQuantizationType(kind), offset

    def read(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """The slice of one tensor as float32; `columns` is ignored for a vector.

        Raises:
            CheckpointError: its quantization is not one that the gguf package undoes.
        """
        head = self._permuted_head(name)
        if head is None:
            return self._stored_rows(name, rows, columns)
        # The permutation stays within a head, so whole heads are read.
        first, last = rows.start // head * head, -(-rows.stop // head) * head
        stored = self._stored_rows(name, slice(first, last), columns)
        paired = stored.reshape(-1, head // 2, 2, *stored.shape[1:])
        ordered = paired.swapaxes(1, 2).reshape(stored.shape)
        return ordered[rows.start - first : rows.stop - first]

    def dtype_names(self) -> set[str]:
        """The quantizations in the file."""
        return {stored.kind.name for stored in self._stored.values()}

    def _permuted_head(self, name: str) -> int | None:
        """Rows of a head within which the tensor is permuted; None where it is not."""
        match = re.search(r"self_attn\.([qk])_proj\.(weight|bias)$", name)
        if not match or self.metadata.get("general.architecture") != "llama":
            return None
        heads = self.metadata["llama.attention.head_count"]
        if match[1] == "k":
            heads = self.metadata.get("llama.attention.head_count_kv", heads)
        return self.tensors[name].shape[0] // heads

    def _stored_rows(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """As `read`, in the file's order."""
        if len(self.tensors[name].shape) == 1:
            return self._dequantized(name, slice(0, 1))[0][rows]
        return self._dequantized(name, rows)[:, columns]

    def _dequantized(self, name: str, rows: slice) -> np.ndarray:
        """Whole rows, float32; a vector is one row."""
        kind, offset, row_bytes = self._stored[name]
        count = rows.stop - rows.start
        # Not a memory map: its pages would count towards the peak of the process.
        data = np.fromfile(
            self.path, np.uint8, count * row_bytes, offset=offset + rows.start * row_bytes
        )
        try:
            return gguf.dequantize(data.reshape(count, row_bytes), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {name}: quantization {kind.name} is not supported"
            ) from None


def _hf_name(name: str) -> str:
    """Hugging Face's name, or the file's own for a tensor that has none there."""
    if name in _NAMES:
        return _NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    return name


def _u32(file: BinaryIO) -> int:
    return struct.unpack("<I", file.read(4))[0]


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    text = file.read(length)
    if len(text) < length:
        raise struct.error
    return text.decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        item, count = struct.unpack("<IQ", file.read(12))
        if item in (_STRING, _ARRAY):
            return [_value(file, item) for _ in range(count)]
        return _scalars(file, item, count)
    return _scalars(file, kind, 1)[0]


def _scalars(file: BinaryIO, kind: int, count: int) -> list:
    dtype = np.dtype(_SCALARS[kind])
    data = file.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise struct.error
    return np.frombuffer(data, dtype).tolist()
