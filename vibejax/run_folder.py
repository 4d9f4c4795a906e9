"""A run's folder: created fresh or resumed, with the configuration it belongs to.

A folder holds config.toml, metrics.jsonl, heldout.jsonl, samples.jsonl, tensorboard/,
checkpoints/, exports/ and, at the end, final/; the last two hold HF folders.
"""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from vibejax import config_file
from vibejax.config_file import InputError, Section

C = TypeVar("C", bound=Section)


class RunError(InputError):
    """A run that cannot start or go on; the message says what to do."""


def check_run(config: Section, changeable: Sequence[str] = ()) -> None:
    """Checks that `open_run` can open the run's folder, before work that takes long.

    Args:
        config: the run's.
        changeable: as for `open_run`.

    Raises:
        RunError: as `open_run` does.
    """
    if not config.out:
        if config.resume:
            raise RunError("resume = true needs out, the folder of the run to go on with")
        return
    folder = Path(config.out)
    if not config.resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder}: exists; choose another out, or go on with resume = true")
        return
    stored_path = folder / "config.toml"
    if not stored_path.is_file():
        raise RunError(f"{folder}: has no config.toml, so there is no run to resume")
    stored = config_file.load(type(config), stored_path)
    differing = [
        line
        for line in config_file.differences(stored, config)
        if line.partition(":")[0].partition(".")[0] not in ("resume", "out", "profile", *changeable)
    ]
    if differing:
        raise RunError(
            f"{folder}: cannot resume with another configuration: {'; '.join(differing)}"
        )


def open_run(config: Section, stage: str, changeable: Sequence[str] = ()) -> Path:
    """The folder of a run: `config.out`, or a fresh numbered one under runs/.

    Args:
        config: the run's.
        stage: names a numbered folder.
        changeable: fields in which a resumed run may differ from what it was; the folder's
            config.toml then says what it is.

    Raises:
        RunError: a named folder exists and `resume` is not set, or it is set and there is
            nothing to resume, or the stored configuration differs.
    """
    check_run(config, changeable)
    if config.resume and not changeable:
        return Path(config.out)
    folder = Path(config.out) if config.out else _fresh(stage)
    return _create(folder, config_file.dump(config))


def _create(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(text)
    return folder


def _fresh(stage: str) -> Path:
    """The first runs/<stage>-NNNN that nobody has; creating it claims it."""
    for number in itertools.count(1):
        folder = Path("runs") / f"{stage}-{number:04d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError("itertools.count ends")


class Log:
    """A JSONL file of one object a line, each with its `step`.

    Opened at step s, it drops the lines of later steps and a half-written last line: a resumed
    run writes them again. At step 0 a run begins anew and all lines go.
    """

    def __init__(self, path: Path, step: int):
        """Opens `path` for writing after step `step`."""
        self.rows = [row for row in read_log(path) if row["step"] <= step and step > 0]
        part = path.with_suffix(".part")
        with part.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        self._file = path.open("a")

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Appends one line, at once visible to readers."""
        self.rows.append({"step": step, **row})
        self._file.write(json.dumps(self.rows[-1]) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; nothing where there is none, and no half-written last line."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
