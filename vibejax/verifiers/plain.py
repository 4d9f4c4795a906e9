"""Plain data across a trust boundary: values as JSON without loss of type, and message framing.

Runs on both sides of the sandbox, so it needs nothing but the standard library. The side that
trusts nobody rebuilds exact builtin types, whatever the other side sent.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

WORD = 8  # bytes of a number on a pipe, little-endian
SAFE_INT = 2**63  # beyond, ints travel as hex: reading long decimals takes quadratic time
ATOMS = (bool, str, type(None))


def encode(value: Any, hand_over: Callable[[Any], int]) -> Any:
    """Turns a value into a tree that JSON carries without loss of type.

    Args:
        value: anything; subclasses of builtin types count as those types.
        hand_over: called with each value that is not plain data; returns a number to send instead,
            or raises.

    Raises:
        RecursionError: the value is nested too deeply, or contains itself.
    """
    if isinstance(value, ATOMS):
        return value
    if isinstance(value, int):
        return value if -SAFE_INT < value < SAFE_INT else {"int": hex(value)}
    if isinstance(value, float):
        return value if value - value == 0 else {"float": float.__repr__(value)}
    if isinstance(value, list):
        if set(map(type, value)) <= set(ATOMS):  # a large grid, quickly
            return list(value)
        return [encode(item, hand_over) for item in value]
    if isinstance(value, dict):
        pairs = dict.items(value)
        return {"dict": [[encode(k, hand_over), encode(v, hand_over)] for k, v in pairs]}
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [encode(item, hand_over) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [encode(value.real, hand_over), encode(value.imag, hand_over)]}
    return {"object": hand_over(value)}


def decode(tree: Any, find: Callable[[int], Any]) -> Any:
    """Rebuilds a value from `encode`'s tree, of exact builtin types whatever the tree holds.

    Args:
        tree: what `loads` returned; may be hostile.
        find: called with the number of each value that was handed over.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: the tree was not made by `encode`.
    """
    if isinstance(tree, list):
        return [decode(item, find) for item in tree]
    if not isinstance(tree, dict):
        return tree
    [(kind, content)] = tree.items()
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "object":
        return find(content)
    items = [decode(item, find) for item in content]
    if kind == "complex":
        return complex(*items)
    return {"dict": dict, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](items)


def dumps(tree: Any) -> bytes:
    """Returns a tree as JSON."""
    return json.dumps(tree, allow_nan=False).encode()


def loads(data: bytes) -> Any:
    """Reads a tree from JSON.

    Raises:
        ValueError, RecursionError: not JSON, or nested too deeply.
    """
    return json.loads(data)


def words(*numbers: int) -> bytes:
    """Returns numbers as they go over a pipe."""
    return b"".join(number.to_bytes(WORD, "little") for number in numbers)


def read_exactly(fd: int, count: int) -> bytes:
    """Reads `count` bytes.

    Raises:
        EOFError: the other end closed before.
    """
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_word(fd: int) -> int:
    """Reads one number.

    Raises:
        EOFError: the other end closed before.
    """
    return int.from_bytes(read_exactly(fd, WORD), "little")


def write_all(fd: int, data: bytes) -> None:
    """Writes all bytes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def content(fd: int, last: int = sys.maxsize) -> bytes:
    """Returns a file's content, or at most so many of its last bytes."""
    size = os.fstat(fd).st_size
    return os.pread(fd, min(last, size), max(0, size - last))


def replace(fd: int, data: bytes) -> None:
    """Makes data the content of a file, with the next write at its start."""
    os.ftruncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    write_all(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)


def send(fd: int, tree: Any) -> None:
    """Writes a tree with its length in front."""
    data = dumps(tree)
    write_all(fd, words(len(data)) + data)


def receive(fd: int, limit: int) -> Any:
    """Reads what `send` wrote.

    Args:
        fd: read end of a pipe.
        limit: bytes of the largest message that is read.

    Raises:
        EOFError: the other end closed before.
        ValueError, RecursionError: the message is too long, not JSON, or nested too deeply.
    """
    length = read_word(fd)
    if length > limit:
        raise ValueError(f"a message of {length} bytes, above the limit of {limit}")
    return loads(read_exactly(fd, length))
