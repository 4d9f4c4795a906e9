"""A run's folder: created fresh or resumed, with the configuration it belongs to.

A folder holds config.toml, metrics.jsonl, heldout.jsonl, samples.jsonl, tensorboard/,
checkpoints/, logs/, exports/ and, at the end, final/; the last two hold HF folders. While an RL run
samples, journal/ holds what it has sampled. All processes of a run see the same folder; the first
one writes what is not named after a process.
"""

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from vibejax import config_file, distributed
from vibejax.config_file import InputError, Section

C = TypeVar("C", bound=Section)

FREE = ("out", "resume", "profile")  # fields in which a resumed run may differ from what it was


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
    distributed.from_first(lambda: _check(config, changeable))


def _check(config: Section, changeable: Sequence[str]) -> None:
    if not config.out:
        if config.resume:
            given = json.dumps(config.resume)
            raise RunError(f"resume = {given} needs out, the folder of the run to go on with")
        return
    folder = Path(config.out)
    if not resumes(config):
        if config.resume == "auto":
            if folder.exists() and not folder.is_dir():
                raise RunError(f"{folder}: is not a folder")
            return
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
        if line.partition(":")[0].partition(".")[0] not in (*FREE, *changeable)
    ]
    if differing:
        raise RunError(
            f"{folder}: cannot resume with another configuration: {'; '.join(differing)}"
        )


def resumes(config: Section) -> bool:
    """Whether a run goes on in its folder; where `resume` is "auto", whether it has begun there."""
    if config.resume == "auto":
        return (Path(config.out) / "config.toml").is_file()
    return config.resume


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
    return Path(distributed.from_first(lambda: str(_open(config, stage, changeable))))


def _open(config: Section, stage: str, changeable: Sequence[str]) -> Path:
    _check(config, changeable)
    if resumes(config) and not changeable:
        return Path(config.out)
    folder = Path(config.out) if config.out else _fresh(stage)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "config.part"
    part.write_text(config_file.dump(config))
    part.replace(folder / "config.toml")  # with it a run has begun
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
    run writes them again. At step 0 a run begins anew and all lines go. Of several processes
    the first writes.
    """

    def __init__(self, path: Path, step: int):
        """Opens `path` for writing after step `step`."""
        self.rows = [row for row in read_log(path) if row["step"] <= step and step > 0]
        if distributed.first():
            part = path.with_suffix(".part")
            with part.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        self._file = path.open("a") if distributed.first() else open(os.devnull, "w")

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Appends one line, at once visible to readers."""
        self.rows.append({"step": step, **row})
        self._file.write(json.dumps(self.rows[-1]) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Waits until the disk has all lines: a checkpoint must not outlive them."""
        if distributed.first():  # the others' lines go nowhere
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; nothing where there is none, and no half-written last line."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
