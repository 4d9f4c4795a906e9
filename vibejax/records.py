"""Records in JSONL, CSV and parquet files: objects of what JSON has values for."""

import csv
import functools
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
from pyarrow import types

from vibejax.config_file import InputError

Record = dict[str, Any]


class DataError(InputError):
    """A data file that cannot be used; the message names file, line and rule."""


def read_records(path: Path) -> Iterator[tuple[int, Record]]:
    """The records of a .jsonl, .jsonl.gz, .csv or .parquet file, each with its number from 1.

    The number is that of the line, or of the row.

    Raises:
        DataError: the file is missing, empty or malformed; the line is named.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    count = 0
    for count, record in enumerate(_rows(path), start=1):
        yield count, record
    if not count:
        raise DataError(f"{path}: is empty")


def _rows(path: Path) -> Iterator[Record]:
    if path.suffix == ".parquet":
        try:
            file = pyarrow.parquet.ParquetFile(path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: not a parquet file: {error}") from error
        for batch in _batches(file, path):
            for row in plain_rows(batch, path):
                yield {name: value for name, value in row.items() if value is not None}
    elif path.suffix == ".csv":
        yield from _csv_rows(path)
    else:
        yield from _json_rows(path)


def _batches(file: pyarrow.parquet.ParquetFile, path: Path) -> Iterator[pyarrow.RecordBatch]:
    try:
        yield from file.iter_batches()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: a damaged parquet file: {error}") from error


def _csv_rows(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for number, row in enumerate(csv.DictReader(file, strict=True), start=1):
                if None in row:
                    raise DataError(f"{path}:{number}: has more values than the header has columns")
                yield row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a CSV file: {error}") from error


def _json_rows(path: Path) -> Iterator[Record]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        numbered = enumerate(lines, start=1)
        while True:
            try:
                number, line = next(numbered)
            except StopIteration:
                return
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{path}: not a gzip file: {error}") from error
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # also of numbers that are too long
                raise DataError(f"{path}:{number}: not a JSON object: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{path}:{number}: not a JSON object: {type(record).__name__}")
            yield record


def plain_rows(batch: pyarrow.RecordBatch, path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file, with text in place of dates, decimals and bytes.

    Raises:
        DataError: bytes are no UTF-8.
    """
    others = [field.name for field in batch.schema if not _in_json(field.type)]
    rows = batch.to_pylist()
    for row in rows:
        for name in others:
            try:
                row[name] = json.loads(json.dumps(row[name], default=_text))
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: column {name!r} holds bytes: {error}") from None
    return rows


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@functools.cache
def _in_json(kind: pyarrow.DataType) -> bool:
    if types.is_struct(kind):
        return all(_in_json(field.type) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _in_json(kind.value_type)
    return any(
        test(kind)
        for test in (
            types.is_null,
            types.is_boolean,
            types.is_integer,
            types.is_floating,
            types.is_string,
            types.is_large_string,
        )
    )
