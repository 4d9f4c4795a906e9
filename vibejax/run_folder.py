"""A run's folder: created fresh or resumed, with the configuration it belongs to.

A folder holds config.toml, data.json, metrics.jsonl, heldout.jsonl, samples.jsonl, tensorboard/,
checkpoints/, logs/, exports/ and, at the end, final/; the last two hold HF folders. While an RL run
samples, journal/ holds what it has sampled; `lock` is locked while it runs. All processes of a run
see the same folder; the first one writes what is not named after a process. Where `out` names a
folder of a bucket, each process has a working folder instead, as `buckets` says.
"""

import contextlib
import fcntl
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from vibejax import buckets, config_file, digests, distributed
from vibejax.config_file import InputError, Section
from vibejax.locations import resolve

C = TypeVar("C", bound=Section)

PART = "config.part"  # config.toml while it is written: what holds nothing else is no run's
FREE = ("out", "resume", "profile")  # fields in which a resumed run may differ from what it was


class RunError(InputError):
    """A run that cannot start or go on; the message says what to do."""


def check_run(config: Section, changeable: Sequence[str] = ()) -> None:
    """Checks that `open_run` can open the run's folder, before work that takes long.

    Args:
        config: the run's.
        changeable: as for `open_run`.

    Raises:
        InputError: as `open_run` does.
    """
    distributed.from_first(lambda: str(_checked(config, changeable)))


def _checked(config: Section, changeable: Sequence[str]) -> Path:
    """Where the run's files are on this machine, those of a bucket as they are there."""
    folder = Path(config.out)
    if buckets.named(config.out):
        buckets.require_writable(config.out)
        folder = buckets.work_folder(config.out, distributed.process())
        _require_free(config, folder)
        buckets.restore(config.out, folder, distributed.process())
    _check(config, folder, changeable)
    return folder


def _check(config: Section, folder: Path, changeable: Sequence[str]) -> None:
    if not config.out:
        if config.resume:
            given = json.dumps(config.resume)
            raise RunError(f"resume = {given} needs out, the folder of the run to go on with")
        return
    if not resumes(config, folder):
        if config.resume == "auto":
            if folder.exists() and not folder.is_dir():
                raise RunError(f"{config.out}: is not a folder")
            return
        if _taken(config, folder):
            raise RunError(f"{config.out}: exists; choose another out, or go on with resume = true")
        return
    _require_free(config, folder)
    stored_path = folder / "config.toml"
    if not stored_path.is_file():
        raise RunError(f"{config.out}: has no config.toml, so there is no run to resume")
    stored = config_file.load(type(config), stored_path)
    differing = [
        line
        for line in config_file.differences(stored, config)
        if line.partition(":")[0].partition(".")[0] not in (*FREE, *changeable)
    ]
    if differing:
        raise RunError(
            f"{config.out}: cannot resume with another configuration: {'; '.join(differing)}"
        )


def _taken(config: Section, folder: Path) -> bool:
    if buckets.named(config.out):
        return buckets.holds_something(config.out)
    if not folder.is_dir():
        return folder.exists()
    return any(path.name != PART for path in folder.iterdir())


def resumes(config: Section, folder: Path) -> bool:
    """Whether a run goes on in its folder; where `resume` is "auto", whether it has begun there."""
    if config.resume == "auto":
        return (folder / "config.toml").is_file()
    return config.resume


def open_run(config: Section, stage: str, changeable: Sequence[str] = ()) -> Path:
    """The folder of a run: `config.out`, the working folder of one in a bucket, or a fresh numbered
    one under runs/.

    Args:
        config: the run's.
        stage: names a numbered folder.
        changeable: fields in which a resumed run may differ from what it was; the folder's
            config.toml then says what it is.

    Raises:
        RunError: a named folder exists and `resume` is not set, or it is set and there is
            nothing to resume, or the stored configuration differs.
        BucketError: the bucket cannot be read and written.
    """
    folder = Path(distributed.from_first(lambda: str(_open(config, stage, changeable))))
    if buckets.named(config.out) and not distributed.first():
        folder = buckets.work_folder(config.out, distributed.process())
        buckets.restore(config.out, folder, distributed.process())
    return folder


def _open(config: Section, stage: str, changeable: Sequence[str]) -> Path:
    folder = _checked(config, changeable)
    if resumes(config, folder) and not changeable:
        return folder
    folder = folder if config.out else _fresh(stage)
    folder.mkdir(parents=True, exist_ok=True)
    # With it a run has begun.
    write_whole(folder / "config.toml", config_file.dump(config), part=folder / PART)
    if buckets.named(config.out):
        buckets.upload(folder / "config.toml", buckets.join(config.out, "config.toml"))
    return folder


def require_same_data(
    config: Section, folder: Path, *fields: str, policy: str, tokenizer: str
) -> None:
    """Checks that what a run reads is in every process what it was when the run began.

    The order of a file's records, and what a run keeps of them, goes by the records' numbers. The
    folder's data.json holds the sums of a run that has begun.

    Args:
        config: the run's.
        folder: of the run, in use.
        fields: of `config` that name files; those that name none are left out.
        policy: a digest of the parameters that the run starts from.
        tokenizer: a digest of its tokenizer.

    Raises:
        RunError: something has changed since, or is another on another host.
    """
    names = {field: getattr(config, field) for field in fields if getattr(config, field)}
    sums = {field: digests.of_file(resolve(name)) for field, name in names.items()}
    of = config.policy or "a new policy"
    names |= {"policy": f"{of}: the parameters", "tokenizer": f"{of}: the tokenizer"}
    sums |= {"policy": policy, "tokenizer": tokenizer}
    for process, other in enumerate(distributed.gather(sums)):
        for field in (field for field in names if other[field] != sums[field]):
            raise RunError(f"{names[field]}: not the same for process {process}")
    path = folder / "data.json"
    if not distributed.first():
        return
    stored = read_whole(path, sums)
    for field in (field for field in names if stored.get(field) != sums[field]):
        raise RunError(
            f"{names[field]}: changed since the run in {folder} began; go on with what was there, "
            "or begin another run"
        )
    write_whole(path, json.dumps(sums))


def write_whole(path: Path, text: str, part: Path | None = None) -> None:
    """Makes a file hold a text, whatever happens: all of it, or what it held before.

    Args:
        path: of the file.
        text: that it is to hold.
        part: where it is written first; None: beside.

    Raises:
        RunError: it cannot be written.
    """
    part = part or path.with_suffix(".part")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise RunError(f"{part}: {error.strerror}") from None


def read_whole(path: Path, default: Any, kind: type = dict) -> Any:
    """The JSON that `write_whole` has put there, of a kind; `default` where there is no file.

    Raises:
        RunError: it is damaged.
    """
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error})") from None
    if not isinstance(value, kind):
        raise RunError(f"{path}: damaged (no {kind.__name__})")
    return value


def _lock_file(config: Section, folder: Path) -> Path:
    """Locked by who is at a run; a working folder goes and comes again, so there it is beside."""
    if buckets.named(config.out):
        return folder.with_name(f"{folder.name}.lock")
    return folder / "lock"


def _require_free(config: Section, folder: Path) -> None:
    if _lock_file(config, folder).exists():
        with _claimed(config, folder):
            pass


@contextlib.contextmanager
def _claimed(config: Section, folder: Path) -> Iterator[None]:
    """Keeps processes that are not of the run from it, for as long as this one lives at most.

    Raises:
        RunError: another is at it.
    """
    if not (buckets.named(config.out) or distributed.first()):
        yield
        return
    with locked(_lock_file(config, folder), config.out or str(folder)):
        yield


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Locks a file against other processes, where the file system knows locks.

    Args:
        path: of the file, which may be made.
        what: it stands for, for the message.

    Raises:
        RunError: another process has locked it.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{what}: another process is at this run") from None
        except OSError:
            pass
        yield


@contextlib.contextmanager
def kept(config: Section, folder: Path) -> Iterator[Callable[[], None]]:
    """Keeps a run from other processes, and has its bucket hold what its working folder does.

    Where it has one, see `buckets`: of several processes each goes on when all have uploaded what
    is theirs.

    Args:
        config: the run's.
        folder: as `open_run` gave it.

    Yields:
        What is to be called before a checkpoint is saved: it waits until the bucket has all.

    Raises:
        RunError: another process is at the run.
        BucketError: what the run leaves could not be uploaded; it is in its working folder.
    """
    with _claimed(config, folder), _uploaded(config, folder) as sync:
        yield sync


@contextlib.contextmanager
def _uploaded(config: Section, folder: Path) -> Iterator[Callable[[], None]]:
    if not buckets.named(config.out):
        yield lambda: None
        return
    upload = buckets.Upload(config.out, folder)
    upload.begin()
    try:
        yield upload.sync
    except BaseException:
        upload.close()
        try:
            upload.sync()
        except buckets.BucketError as error:  # why the run ends is said by what is raised
            print(f"{error}; what it lacks is in {folder}", file=sys.stderr)
        raise
    upload.close()
    try:
        upload.sync()
    except buckets.BucketError as error:
        raise buckets.BucketError(f"{error}; what it lacks is in {folder}") from error
    distributed.gather(None)  # who ends early is missed by those who still upload


def checkpoints(config: Section, folder: Path) -> Path | epath.Path:
    """Where a run's checkpoints are: in its folder, or in the bucket itself."""
    return buckets.checkpoints(config.out) if buckets.named(config.out) else folder / "checkpoints"


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
    run writes them again. At step 0 a run begins anew and all lines go. Opened at no step, it keeps
    all whole lines, whose steps are their numbers. Of several processes the first writes.
    """

    def __init__(self, path: Path, step: int | None = None):
        """Opens `path` for writing after `step`."""
        self._path, self._last = path, 0
        if distributed.first():
            part = path.with_suffix(".part")
            with part.open("w") as file:
                for row in _whole_lines(path):
                    if step is None or row["step"] <= step > 0:
                        file.write(json.dumps(row) + "\n")
                        self._last = row["step"]
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        self._file = path.open("a") if distributed.first() else open(os.devnull, "w")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All lines; they are read from the file, which may be longer than what fits here."""
        return read_log(self._path)

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Appends one line, at once visible to readers."""
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        self._last = step

    def append(self, row: dict[str, Any]) -> None:
        """Appends one line, whose step is the next."""
        self.write(self._last + 1, row)

    def sync(self) -> None:
        """Waits until the disk has all lines: a checkpoint must not outlive them."""
        if distributed.first():  # the others' lines go nowhere
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; nothing where there is none, and no half-written last line."""
    return [*_whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(errors="replace") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith("\n"):
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise RunError(f"{path}:{number}: not JSON: {error}") from None
