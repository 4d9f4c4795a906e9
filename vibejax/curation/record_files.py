"""Records in and out of files, some megabytes at a time, as they lie there.

A record that is kept goes out as the bytes it came in as, wherever the formats allow it.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from vibejax.data import DataError, Record, from_verl, is_chat

SUFFIXES = (".jsonl", ".parquet")
CHUNK_BYTES = 1 << 20
CHUNK_RECORDS = 512


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

    def records(self) -> list[Record]:
        """All records.

        Raises:
            DataError: a line is no JSON object; a last line that is cut off is called so.
        """
        if isinstance(self.rows, pyarrow.RecordBatch):
            return self.rows.to_pylist()
        return [self._record(i, line) for i, line in enumerate(self.rows)]

    def _record(self, i: int, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith(b"\n") else "the last line is cut off, "
            raise DataError(f"{self.where(i)}: {cut}not a JSON object: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{self.where(i)}: not a JSON object: {type(record).__name__}")
        return record


def read_chunks(path: Path) -> Iterator[Chunk]:
    """The records of a .jsonl or .parquet file, in one pass.

    Raises:
        DataError: the file is empty, or no parquet file.
    """
    count = 0
    for rows, done in (_parquet_rows if path.suffix == ".parquet" else _lines)(path):
        yield Chunk(path, count + 1, rows, done)
        count += len(rows)
    if not count:
        raise DataError(f"{path}: is empty")


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
        raise DataError(f"{path}: not a parquet file: {error}") from None
    read = 0
    for batch in file.iter_batches(CHUNK_RECORDS):
        read += len(batch)
        yield batch, read / file.metadata.num_rows


def parts(record: Record, where: str) -> tuple[str, str]:
    """A record's prompt and its trace; a record without a trace has an empty one.

    Raises:
        DataError: there is no prompt, or a field of it is no text.
    """
    if "reward_model" in record:
        record = from_verl(record)
    if "messages" in record:
        messages = record["messages"]
        if not is_chat(messages):
            raise DataError(f"{where}: messages must be a list of {{role, content}} texts")
        trace = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return "\n".join(message["content"] for message in prompt), trace
    if not isinstance(record.get("prompt"), str):
        raise DataError(f"{where}: has neither 'messages' nor a 'prompt' text")
    trace = record.get("completion") or ""
    if not isinstance(trace, str):
        raise DataError(f"{where}: completion is no text but {type(trace).__name__}")
    return record["prompt"], trace


class Writer:
    """A .jsonl or .parquet file that is there, whole, once it is closed without an error."""

    def __init__(self, path: Path):
        """Opens the file under another name."""
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")
        self._parquet: pyarrow.parquet.ParquetWriter | None = None

    def write_chunk(self, chunk: Chunk, kept: Sequence[int]) -> None:
        """Writes records of a chunk as they are."""
        rows = chunk.rows
        if isinstance(rows, pyarrow.RecordBatch) and self.path.suffix == ".parquet":
            self._write_table(pyarrow.Table.from_batches([rows.take(pyarrow.array(kept))]))
        elif isinstance(rows, list) and self.path.suffix == ".jsonl":
            self._file.writelines(rows[i].removesuffix(b"\n") + b"\n" for i in kept)
        else:
            records = chunk.records()
            self.write_records([records[i] for i in kept])

    def write_records(self, records: Sequence[dict[str, Any]]) -> None:
        """Writes records."""
        if self.path.suffix == ".parquet":
            try:
                self._write_table(pyarrow.Table.from_pylist(list(records)))
            except pyarrow.ArrowInvalid as error:
                raise DataError(f"{self.path}: {error}; .jsonl takes any records") from None
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
            raise DataError(
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
            raise DataError(
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
        self._file.close()
        self._partial.unlink(missing_ok=True)
