"""What a finished stage of a pipeline says of itself: its inputs, outputs, metrics and versions."""

import contextlib
import glob
import importlib.metadata
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vibejax import digests, weights
from vibejax.checkpoint_reader import checksums
from vibejax.config_file import InputError
from vibejax.locations import resolve
from vibejax.run_folder import read_log

PACKAGES = ("vibejax", "jax", "numpy")


def versions() -> dict[str, str]:
    """Of the packages that decide what a stage computes."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def inputs(settings: Any, own: Path) -> dict[str, dict[str, str]]:
    """Value -> the sums of the files it names, of every value that names a file or a checkpoint.

    Args:
        settings: of a stage, in plain values.
        own: the stage's folder, where its outputs lie.
    """
    found = {}
    for text in sorted({name for value in _strings(settings) for name in _names(value)}):
        if Path(text).is_relative_to(own):
            continue
        with contextlib.suppress(InputError, OSError, ValueError):
            path = resolve(text)
            if path.is_file():
                found[text] = {path.name: digests.of_file(path)}
            elif path.is_dir():
                found[text] = checksums(weights.locate(text))
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
    elif isinstance(value, str) and value:
        yield value


def _names(text: str) -> set[str]:
    """What a value may name: a path as it is, NAME=PATH, PATH=NUMBER, or a pattern of paths."""
    matches = glob.glob(text) if "/" in text and glob.has_magic(text) else []
    return {text, text.partition("=")[2], text.rpartition("=")[0], *matches} - {""}


def outputs(folder: Path) -> dict[str, str]:
    """The sums of a step's own files and of its final model."""
    files = [path for part in (folder, folder / "final") for path in sorted(part.glob("*"))]
    return {
        str(path.relative_to(folder)): digests.of_file(path) for path in files if path.is_file()
    }


def metrics(folder: Path) -> dict[str, Any]:
    """The last of a training run's metrics, or what a command says it found."""
    rows = read_log(folder / "metrics.jsonl")
    if rows:
        return rows[-1]
    for name in ("results.json", "probe.json", "report.json", "records.report.json", "merge.json"):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text())
    return {}


def git_revision() -> str | None:
    """Of the source tree that this module lies in; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None
