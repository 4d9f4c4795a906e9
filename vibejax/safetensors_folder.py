"""Reading and writing the tensors of a Hugging Face folder, a bounded piece at a time.

A file is opened for each piece that is read: safetensors maps files into memory, and pages that
were touched count as the process's own until the mapping is closed. Files are written here and
not by the library, which wants all tensors of a file at once.

Source: https://huggingface.co/docs/safetensors, "Format": eight bytes with the length of a JSON
header, the header, then the tensors in order.
"""

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from vibejax.checkpoint_config import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


class Tensor(NamedTuple):
    """One tensor as a checkpoint holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of an HF folder: described at once, read slice by slice."""

    def __init__(self, folder: Path):
        """Reads the headers of all shards.

        Raises:
            CheckpointError: no weights, a shard missing or damaged, a dtype that is no float.
        """
        self._shards: dict[str, Path] = {}
        self.tensors: dict[str, Tensor] = {}
        for shard, names in _shard_names(folder).items():
            for tensor in _describe(shard, names):
                self._shards[tensor.name] = shard
                self.tensors[tensor.name] = tensor

    def read(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """The slice of one tensor, in its own dtype; `columns` is ignored for a vector."""
        shard = self._shards[name]
        index = (rows, columns) if len(self.tensors[name].shape) == 2 else rows
        with _opened(shard) as file:
            return file.get_slice(name)[index]

    def dtype_names(self) -> set[str]:
        """The dtypes in the folder."""
        return {tensor.dtype.name for tensor in self.tensors.values()}


def _shard_names(folder: Path) -> dict[Path, list[str] | None]:
    """Shard -> the tensors to take from it, None for all."""
    if (folder / SINGLE).exists():  # beside it an index is of an earlier save, as in transformers
        return {folder / SINGLE: None}
    index = folder / INDEX
    if not index.exists():
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: key 'weight_map' must map tensor names to files")
    shards: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise CheckpointError(f"{index}: shard {file!r} must be a file in the same folder")
        shards.setdefault(folder / file, []).append(name)
    return shards


def _opened(shard: Path) -> Any:
    try:
        return safetensors.safe_open(shard, framework="numpy")
    except FileNotFoundError:
        raise CheckpointError(f"{shard}: the shard is missing") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard}: damaged or truncated ({error})") from None


def _describe(shard: Path, names: list[str] | None) -> Iterator[Tensor]:
    with _opened(shard) as file:
        held = set(file.keys())
        for name in sorted(held) if names is None else names:
            if name not in held:
                raise CheckpointError(f"{shard}: tensor {name} is missing, though {INDEX} lists it")
            view = file.get_slice(name)
            if view.get_dtype() not in DTYPES:
                known = ", ".join(DTYPES)
                raise CheckpointError(
                    f"{shard}: tensor {name} has dtype {view.get_dtype()}, must be among {known}"
                )
            yield Tensor(name, tuple(view.get_shape()), DTYPES[view.get_dtype()])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write(
    folder: Path,
    tensors: Sequence[Tensor],
    pieces: Callable[[Tensor], Iterator[np.ndarray]],
    max_shard_bytes: float,
) -> None:
    """Writes tensors as one file, or as shards and their index where one would be too large.

    Args:
        folder: exists; nothing in it is read.
        tensors: what to write, in order.
        pieces: gives a tensor's data as C-contiguous arrays of its dtype, in order.
        max_shard_bytes: a file is closed before it passes this size; a single tensor may.
    """
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        _write_file(folder / SINGLE, tensors, pieces)
        return
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, shard, pieces)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(path, tensors, pieces):
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # transformers refuses a file that does not say which framework's layout it has.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": codes[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in pieces(tensor):
                file.write(piece.view(np.uint8).data)


@contextlib.contextmanager
def published(dst: Path, needed: int) -> Iterator[Path]:
    """A folder to write into, which takes the place of `dst` when all went well.

    Args:
        dst: folder to be; an earlier export there is replaced. Whatever fails, it stays as it
            was; a process killed between two renames leaves it beside as `.NAME.old`, from
            where the next call puts it back. Of several processes the last one's is there.
        needed: bytes that will be written, for the message.

    Raises:
        CheckpointError: `dst` is something else than an export, or cannot be written.
    """
    old = dst.parent / f".{dst.name}.old"
    name = f".{dst.name}.{secrets.token_hex(4)}"
    staging, lock = dst.parent / f"{name}.partial", None
    try:
        if old.exists() and not dst.exists():
            with contextlib.suppress(FileNotFoundError):
                _moved(old, dst)
        if dst.exists() and not _replaceable(dst):
            raise CheckpointError(f"{dst}: exists and is no export; name a new folder")
        dst.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(dst)
        # Locked before it has the name by which others find it.
        unseen = dst.parent / f"{name}.new"
        unseen.mkdir()
        lock = _locked(unseen)
        unseen.rename(staging)
        yield staging
        for file in staging.iterdir():
            _sync(file)
        _sync(staging)
        # A rename cannot replace a folder that holds something; another process may be faster.
        while not _moved(staging, dst):
            shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                _moved(dst, old)
        _sync(dst.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{dst}: not written, {error.strerror} ({needed / 1e9:.2f} GB to write)"
        ) from None
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def _moved(folder: Path, name: Path) -> bool:
    """Renames a folder; False where something is there already."""
    try:
        folder.rename(name)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _remove_abandoned(dst: Path) -> None:
    """Removes what processes were writing when they were killed: nobody holds its lock."""
    for path in dst.parent.glob(f".{glob.escape(dst.name)}.*.partial"):
        with contextlib.suppress(OSError):  # it is written, or the file system knows no locks
            lock = _locked(path, always=False)
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path, *, always: bool = True) -> int:
    """A handle that locks a folder until it is closed; `always`: also where that cannot be."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if not always:
            os.close(handle)
            raise
    return handle


def _replaceable(dst: Path) -> bool:
    try:
        held = {path.name for path in dst.iterdir()}
    except FileNotFoundError:  # another process replaces it
        return True
    except NotADirectoryError:
        return False
    return "config.json" in held or not held


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
