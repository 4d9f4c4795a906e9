"""What lies in a bucket, under names like gs://BUCKET/PATH; no other module knows what those mean.

- An input, a file or a checkpoint, is fetched whole before it is read, to
  ~/.cache/vibejax/fetched: once for each version of it, which the generations of its objects tell.
  A process sees one version for as long as it lives. Every host fetches all of a checkpoint.
- A run folder has a working folder in ~/.cache/vibejax/runs, which a start empties and fills from
  the bucket, so that it does not matter on which machine a run goes on. What is new there goes to
  the bucket every UPLOAD_S seconds, before each checkpoint (which must not outlive the lines that
  lead to it), and at the end: logs, tables, exports and the rollout journal. A process that gets no
  time to end loses what it sampled in the last UPLOAD_S seconds, and samples it again.
- Checkpoints never lie on the disk: Orbax writes them to the bucket and reads them from there.
- A command that writes one file or folder writes it to the disk first.

Credentials are the machine's own, see `gcloud auth application-default`. gcsfs speaks to the bucket
for all but the arrays of checkpoints, which tensorstore reads and writes.
"""

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from vibejax.config_file import InputError

SCHEME = "gs://"
UPLOAD_S = 60
ANSWER_S = 60  # within so many seconds a bucket says whether it can be written
TRIAL = ".vibejax-may-write"  # an object that comes and goes at the start of a run
LEFT = ("checkpoints", "exports", "final", "profile", "tensorboard")  # a run goes on without
_CREDENTIALS = (
    "; credentials are those of `gcloud auth application-default login`, of "
    "GOOGLE_APPLICATION_CREDENTIALS, or of the machine's service account"
)
_LOG = logging.getLogger("vibejax")


class BucketError(InputError):
    """A bucket that cannot be read or written; the message says what to do."""


def named(name: str) -> bool:
    """Whether a name is that of something in a bucket."""
    return name.startswith(SCHEME)


def on_disk(name: str) -> Path:
    """A path that a command writes to and that may not be in a bucket.

    Raises:
        BucketError: it is.
    """
    if named(name):
        raise BucketError(f"{name}: must be a path on disk; copy it to the bucket afterwards")
    return Path(name)


def join(url: str, *names: str) -> str:
    """The name of something inside of `url`."""
    return "/".join([url.rstrip("/"), *names])


@functools.cache
def fetch(url: str) -> Path:
    """A file of a bucket on disk, or a folder: its own files and those of its `final`.

    Raises:
        BucketError: there is nothing, or it cannot be read.
    """
    with _one_line(url, "be read"):
        found = _objects(url)
        if url.removeprefix(SCHEME).rstrip("/") not in found:
            found = {path: info for path, info in found.items() if _of_a_model(url, path)}
        if not found:
            raise BucketError(f"{url}: there is nothing of that name in the bucket")
        versions = "".join(f"{p} {info['generation']}\n" for p, info in sorted(found.items()))
        kept = _cache() / "fetched" / _digest(versions) / url.rstrip("/").rpartition("/")[2]
        if not kept.exists():
            began = time.perf_counter()
            _download(url, found, kept)
            size = sum(info["size"] for info in found.values()) / 1e9
            _LOG.info("%s: %.2f GB fetched in %.0f s", url, size, time.perf_counter() - began)
    return kept


def _of_a_model(url: str, path: str) -> bool:
    inner = path.removeprefix(url.removeprefix(SCHEME).rstrip("/") + "/").split("/")
    return len(inner) == 1 or (len(inner) == 2 and inner[0] == "final")


def _download(url: str, found: dict[str, Any], kept: Path) -> None:
    """Puts the objects of `url` where `kept` is to be; several processes may do so at once."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as partial:
        whole = Path(partial) / kept.name
        _get({path: whole / _inside(url, path) for path in found})
        for path, info in found.items():
            if (whole / _inside(url, path)).stat().st_size != info["size"]:
                raise OSError(f"{path} has changed meanwhile")
        with contextlib.suppress(OSError):  # another process was faster
            whole.rename(kept)
    if not kept.exists():
        raise OSError(f"{kept} cannot be written")


def work_folder(url: str, process: int) -> Path:
    """Where the files of a run in a bucket are on this machine, for one of its processes."""
    return _cache() / "runs" / f"{_digest(url.rstrip('/'))[:16]}-{process}"


def require_writable(url: str) -> None:
    """Tries whether objects can be written to and removed from a run folder.

    Raises:
        BucketError: they cannot.
    """
    path = join(url, TRIAL).removeprefix(SCHEME)
    with _one_line(url, "be written"):
        _within(ANSWER_S, "_pipe_file", path, b"")
        _within(ANSWER_S, "_rm_file", path)


def holds_something(url: str) -> bool:
    """Whether there is any object in a folder.

    Raises:
        BucketError: it cannot be read.
    """
    with _one_line(url, "be read"):
        return any(path.rpartition("/")[2] != TRIAL for path in _objects(url))


def restore(url: str, folder: Path, process: int) -> None:
    """Makes a working folder what the bucket has of it, for a run that goes on or begins.

    Args:
        url: of the run.
        folder: as `work_folder` gives it.
        process: whose log file comes along, of those in `logs`.

    Raises:
        BucketError: the bucket cannot be read.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with _one_line(url, "be read"):
        wanted = {path: _inside(url, path) for path in _objects(url)}
        _get(
            {
                path: folder / inner
                for path, inner in wanted.items()
                if inner.partition("/")[0] not in (*LEFT, TRIAL)
                and (not inner.startswith("logs/") or inner == f"logs/process-{process}.log")
            }
        )


class Upload:
    """Keeps a run's folder in a bucket as its working folder on this machine is.

    Only what this process has changed is written, or removed: files of others stay theirs.
    """

    def __init__(self, url: str, folder: Path):
        """Begins with a working folder that is as `restore` left it, but for what is new."""
        self._url, self._folder = url, folder
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._there: dict[str, tuple[int, int]] = {}
        self._thread = threading.Thread(target=self._now_and_again, daemon=True)

    def begin(self) -> None:
        """Takes what is there for what the bucket has, and uploads now and again from now on."""
        self._there = self._files()
        self._thread.start()

    def sync(self) -> None:
        """Uploads what is new, and waits for it.

        Raises:
            BucketError: the bucket cannot be written.
        """
        with self._lock, _one_line(self._url, "be written"):
            files = self._files()
            changed = [name for name, state in files.items() if self._there.get(name) != state]
            self._put([name for name in changed if not _last(Path(name))])
            self._put([name for name in changed if _last(Path(name))])
            gone = [name for name in self._there if name not in files]
            for name in gone:
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    _within(ANSWER_S, "_rm_file", join(self._url, name).removeprefix(SCHEME))
            self._there = files

    def close(self) -> None:
        """Uploads no more now and again."""
        self._ended.set()

    def _now_and_again(self) -> None:
        while not self._ended.wait(UPLOAD_S):
            try:
                self.sync()
            except BucketError as error:
                _LOG.warning("%s; tried again in %d s", error, UPLOAD_S)

    def _files(self) -> dict[str, tuple[int, int]]:
        """Name in the working folder -> what changes when the file does."""
        found = {}
        for parent, folders, names in os.walk(self._folder):
            folders[:] = [name for name in folders if not name.startswith(".")]  # half-written
            for path in (Path(parent, n) for n in names if not n.endswith(".part")):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    state = path.stat()
                    found[str(path.relative_to(self._folder))] = (state.st_mtime_ns, state.st_size)
        return found

    def _put(self, names: list[str]) -> None:
        """Uploads files; of those that others append to meanwhile, what they are now."""
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".") as snapshot:
            pairs = {}
            for name in names:
                path = self._folder / name
                if name.partition("/")[0] not in LEFT:
                    path = Path(snapshot, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                        shutil.copyfile(self._folder / name, path)
                if path.exists():
                    pairs[path] = join(self._url, name).removeprefix(SCHEME)
            if pairs:
                _system().put([str(path) for path in pairs], [*pairs.values()])


def upload(path: Path, url: str) -> None:
    """Makes a file an object.

    Raises:
        BucketError: the bucket cannot be written.
    """
    with _one_line(url, "be written"):
        _system().put_file(str(path), url.removeprefix(SCHEME))


def _last(path: Path) -> bool:
    """Whether a file comes after all others: a model's folder that has a config.json is whole."""
    return path.name == "config.json"


@contextlib.contextmanager
def written(name: str) -> Iterator[Path]:
    """Where to write what is to be a file or folder of that name, on disk or in a bucket.

    Raises:
        BucketError: it is in a bucket where there is something of that name already, or that
            cannot be written.
    """
    if not named(name):
        yield Path(name)
        return
    require_writable(name)
    if holds_something(name):
        raise BucketError(f"{name}: exists; choose another name")
    with tempfile.TemporaryDirectory(prefix="vibejax-") as folder:
        path = Path(folder) / name.rstrip("/").rpartition("/")[2]
        yield path
        files = [file for file in [path, *path.rglob("*")] if file.is_file()]
        for file in sorted(files, key=_last):
            upload(file, join(name, *file.relative_to(path).parts))


def checkpoints(url: str) -> epath.Path:
    """The folder of a run's checkpoints, as Orbax takes it.

    Raises:
        BucketError: gcsfs is missing.
    """
    _system()  # has its settings before etils asks for it
    return epath.Path(join(url, "checkpoints"))


def move(source: epath.Path, target: epath.Path) -> None:
    """Gives a folder of a bucket another name, object by object.

    Raises:
        BucketError: the bucket cannot be written.
    """
    url = os.fspath(source)
    with _one_line(url, "be renamed"):
        paths = [*_objects(url)]
        inner = [_inside(url, path) for path in paths]
        for path, name in zip(paths, inner, strict=True):
            _system().cp_file(path, join(os.fspath(target), name).removeprefix(SCHEME))
        _system().rm(paths)


def unreachable(error: BaseException) -> bool:
    """Whether an error says of a bucket that it cannot be read now, and nothing of what is there.

    tensorstore's errors are ValueErrors with the status in their text.
    """
    while error is not None:
        kind, text = type(error), str(error)
        if kind.__module__.partition(".")[0] in ("aiohttp", "requests", "google"):
            return True
        if kind.__module__.startswith("gcsfs") or text.startswith("Forbidden: "):
            return True
        if any(status in text for status in _STATUSES):
            return True
        error = error.__cause__ or error.__context__
    return False


_STATUSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED",
             "RESOURCE_EXHAUSTED")  # fmt: skip


@functools.cache
def _system() -> Any:
    """gcsfs, with the settings that all of this process have.

    Raises:
        BucketError: it is not installed.
    """
    # What it asks about a bucket's kind needs a right of its own; tensorstore has no use of it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import fsspec
        import gcsfs  # noqa: F401 - fsspec imports it by name
    except ImportError:
        raise BucketError(
            "paths that begin with gs:// need gcsfs: pip install 'vibejax[tpu]'"
        ) from None
    # Other processes write to the bucket too, so that a listing is out of date at once.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return fsspec.filesystem("gcs")


def _within(seconds: float, name: str, *arguments: Any) -> Any:
    """What one of gcsfs' coroutines gives, which would try for minutes without a network.

    Raises:
        TimeoutError: it takes too long.
    """
    from fsspec import asyn

    system = _system()
    try:
        return asyn.sync(system.loop, getattr(system, name), *arguments, timeout=seconds)
    except asyn.FSTimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _objects(url: str) -> dict[str, Any]:
    """Path (without gs://) -> what is known, of an object and of all that lies under its name."""
    path = url.removeprefix(SCHEME).rstrip("/")
    found = _within(ANSWER_S, "_find", path, False, True)
    # Folders may have an object of their own, of no bytes, with a slash at its end.
    return {name: info for name, info in found.items() if not name.endswith("/")}


def _get(targets: dict[str, Path]) -> None:
    """Puts objects into files."""
    for target in targets.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    if targets:
        _system().get([*targets], [str(target) for target in targets.values()])


def _inside(url: str, path: str) -> str:
    """The name of an object inside of `url`; empty for the object of that name itself."""
    return path.removeprefix(url.removeprefix(SCHEME).rstrip("/")).removeprefix("/")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vibejax"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _one_line(url: str, what: str) -> Iterator[None]:
    """Turns whatever a bucket's libraries raise into one line that names it."""
    try:
        yield
    except InputError:
        raise
    # aiohttp, google-auth, gcsfs and requests have no class in common.
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line] or [type(error).__name__]
        if isinstance(error, FileNotFoundError):
            raise BucketError(f"{url}: cannot {what}: no such bucket or object") from error
        hint = _CREDENTIALS if getattr(error, "code", None) == 401 else ""
        raise BucketError(f"{url}: cannot {what}: {' '.join(lines)[:300]}{hint}") from error
