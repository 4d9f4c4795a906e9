"""Records in and out of files, some megabytes at a time, as they lie there.

A record that is kept goes out as the bytes it came in as, wherever the formats allow it. Worker
processes read records here rather than with `data`, which takes seconds to import.
"""

import dataclasses
import fcntl
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from vibejax import records
from vibejax.config_file import InputError

SUFFIXES = (".jsonl", ".parquet")
CHUNK_BYTES = 1 << 20
CHUNK_RECORDS = 256


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Successive records of one file.

    Attributes:
        path: of the file.
        first: line (or row) number of the first record, from 1.
        rows: lines with their ends, or parquet rows.
        done: the share of the file that ends with this chunk.
    """

    path: Path
    first: int
    rows: list[bytes] | pyarrow.RecordBatch
    done: float

    def __len__(self) -> int:
        """How many records there are."""
        return len(self.rows)

    def where(self, i: int) -> str:
        """File and line of a record."""
        return f"{self.path}:{self.first + i}"

    def records(self) -> list[dict[str, Any]]:
        """All records.

        Raises:
            InputError: a line is no JSON object; a last line that is cut off is called so.
        """
        if isinstance(self.rows, pyarrow.RecordBatch):
            return records.plain_rows(self.rows, self.path)
        return [self._record(i, line) for i, line in enumerate(self.rows)]

    def _record(self, i: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith(b"\n") else "the last line is cut off, "
            raise InputError(f"{self.where(i)}: {cut}not a JSON object: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f"{self.where(i)}: not a JSON object: {type(record).__name__}")
        return record


def read_chunks(path: Path) -> Iterator[Chunk]:
    """The records of a .jsonl or .parquet file, in one pass.

    Raises:
        InputError: the file is empty, or no parquet file.
    """
    count = 0
    for rows, done in (_parquet_rows if path.suffix == ".parquet" else _lines)(path):
        yield Chunk(path, count + 1, rows, done)
        count += len(rows)
    if not count:
        raise InputError(f"{path}: is empty")


def _lines(path: Path) -> Iterator[tuple[list[bytes], float]]:
    size, read = path.stat().st_size, 0
    with path.open("rb") as file:
        while lines := file.readlines(CHUNK_BYTES):
            for begin in range(0, len(lines), CHUNK_RECORDS):
                part = lines[begin : begin + CHUNK_RECORDS]
                read += sum(map(len, part))
                yield part, read / size


def _parquet_rows(path: Path) -> Iterator[tuple[pyarrow.RecordBatch, float]]:
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a parquet file: {error}") from None
    read = 0
    for batch in file.iter_batches(CHUNK_RECORDS):
        read += len(batch)
        yield batch, read / file.metadata.num_rows


def parts(record: dict[str, Any], where: str) -> tuple[str, str]:
    """A record's prompt and its trace; a record without a trace has an empty one.

    The prompt is `messages`, or `prompt` as a text or (in verl's columns) as messages; the trace
    is a last message of the assistant, else `completion`.

    Raises:
        InputError: there is no prompt, or a part of it is no text.
    """
    # Parquet gives every record all columns.
    name = "prompt" if record.get("messages") is None else "messages"
    prompt, trace = record.get(name), record.get("completion") or ""
    if not isinstance(trace, str):
        raise InputError(f"{where}: completion must be a text, is {type(trace).__name__}")
    if isinstance(prompt, str) and name == "prompt":
        return prompt, trace
    if prompt is None:
        raise InputError(f"{where}: has neither 'messages' nor a 'prompt'")
    if not isinstance(prompt, list) or not prompt:
        raise InputError(f"{where}: {name} must be a list of {{role, content}} texts")
    for i, message in enumerate(prompt):
        for field in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(field), str):
                raise InputError(f"{where}: {name}[{i}] has no {field!r} text")
    texts = [message["content"] for message in prompt]
    if prompt[-1]["role"] == "assistant":
        trace = texts.pop()
    return "\n".join(texts), trace


def record_id(record: dict[str, Any]) -> Any:
    """A record's `id`, or verl's index; None where it has neither."""
    extra = record.get("extra_info")
    return record.get("id", extra.get("index") if isinstance(extra, dict) else None)


class Writer:
    """A .jsonl or .parquet file that is there, whole, once it is closed without an error."""

    def __init__(self, path: Path):
        """Opens the file under another name."""
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(f"{path}: another process is writing it") from None
        except OSError:
            pass  # a file system that knows no locks
        self._file.truncate(0)
        self._parquet: pyarrow.parquet.ParquetWriter | None = None

    def write_chunk(self, chunk: Chunk, kept: Sequence[int]) -> None:
        """Writes records of a chunk as they are."""
        rows = chunk.rows
        if isinstance(rows, pyarrow.RecordBatch) and self.path.suffix == ".parquet":
            places = pyarrow.array(kept, pyarrow.int64())
            self._write_table(pyarrow.Table.from_batches([rows.take(places)]))
        elif isinstance(rows, list) and self.path.suffix == ".jsonl":
            self._file.writelines(rows[i].removesuffix(b"\n") + b"\n" for i in kept)
        else:
            records = chunk.records()
            self.write_records([records[i] for i in kept])

    def write_records(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes records."""
        if self.path.suffix == ".parquet":
            # pyarrow would take the first record's fields for all there are.
            names = dict.fromkeys(name for record in records for name in record)
            try:
                self._write_table(
                    pyarrow.Table.from_pylist([{n: r.get(n) for n in names} for r in records])
                )
            except (pyarrow.ArrowInvalid, UnicodeEncodeError) as error:
                raise InputError(f"{self.path}: {error}; .jsonl takes any records") from None
            return
        self._file.writelines(
            json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
            for record in records
        )

    def _write_table(self, table: pyarrow.Table) -> None:
        if not len(table):
            return
        if self._parquet is None:
            self._parquet = pyarrow.parquet.ParquetWriter(self._file, table.schema)
        schema = self._parquet.schema
        unknown = set(table.column_names) - set(schema.names)
        if unknown:
            raise InputError(
                f"{self.path}: the first records have no field {min(unknown)!r}, a later one has; "
                ".jsonl takes any records"
            )
        columns = {
            name: table[name]
            if name in table.column_names
            else pyarrow.nulls(len(table), schema.field(name).type)
            for name in schema.names
        }
        try:
            self._parquet.write_table(pyarrow.table(columns).cast(schema))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, ValueError) as error:
            raise InputError(
                f"{self.path}: records differ in the types of their fields: {error}; .jsonl takes "
                "any records"
            ) from None

    def close(self) -> None:
        """Gives the file its name; a parquet file without records is an empty table."""
        if self.path.suffix == ".parquet":
            if self._parquet is None:
                self._parquet = pyarrow.parquet.ParquetWriter(self._file, pyarrow.schema([]))
            self._parquet.close()
        self._file.close()
        self._partial.replace(self.path)

    def discard(self) -> None:
        """Leaves nothing behind."""
        if self._parquet is not None:
            self._parquet.close()
        self._file.close()
        self._partial.unlink(missing_ok=True)
