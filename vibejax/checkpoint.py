"""Checkpoints of the training state: asynchronous, sharded and atomic, through Orbax.

Orbax does not check its array data: a flipped bit loads silently. So a checkpoint carries a digest
of every array, computed on the devices before it is saved and again after it is restored, on
whatever mesh. A checkpoint that is not what was saved is set aside, and the one before it is taken.
"""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from vibejax import buckets, digests, distributed, goodput, progress
from vibejax.run_folder import RunError
from vibejax.train import TrainState

FORMAT = 1  # of what lies beside the arrays
_HANDLERS = {"state": ocp.StandardCheckpointHandler, "digests": ocp.JsonCheckpointHandler}


class DamagedError(Exception):
    """A checkpoint is not what was saved; the message says what of it."""


class Checkpoints:
    """The checkpoints of one run, by step."""

    def __init__(self, folder: Path | epath.Path, *, keep: int, keep_every: int = 0):
        """Opens (or creates) `folder`; only finished checkpoints are seen.

        Args:
            folder: of the run's checkpoints, on disk or (an epath) in a bucket.
            keep: how many are kept, the newest.
            keep_every: those of its multiples are kept for good; 0: none are.
        """
        self.folder = folder
        self._in_bucket = buckets.named(str(folder))
        logging.getLogger("absl").addFilter(_is_not_raised_again)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every or None)
        self._place = folder if self._in_bucket else epath.Path(folder.absolute())
        self._manager = ocp.CheckpointManager(self._place, options=options)

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, of those finished and the one being saved."""
        return self._manager.latest_step()

    @goodput.phase("save")
    def save(self, step: int, state: TrainState) -> None:
        """Starts writing `state`, once the save before it is finished.

        An earlier save that failed is reported here.

        Raises:
            RunError: disk or bucket is full, or cannot be written; older checkpoints stay.
        """
        if step == self.latest_step():
            return
        if not self._in_bucket:
            self._require_room(step, state_bytes(state))
        leaves = digests.of_leaves(state)
        record = {"format": FORMAT, "leaves": leaves, "sha256": _sha256(leaves)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), digests=ocp.args.JsonSave(record)
        )
        with _disk_errors(self.folder), progress.waiting():
            self._manager.save(step, args=items, force=True)

    def _require_room(self, step: int, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise RunError(
                f"{self.folder}: the checkpoint of step {step} needs {needed:,} bytes and "
                f"{free:,} are free; the last good one stays"
            )

    def restore_latest(self, state: TrainState) -> TrainState:
        """The newest checkpoint that is what was saved, laid out as `state`.

        Returns:
            `state` itself where no checkpoint was finished.

        Raises:
            RunError: all are damaged, or one holds other arrays, was written by a newer version
                or cannot be reached.
        """
        with _disk_errors(self.folder), progress.waiting():
            self._manager.wait_until_finished()
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            found = restored = None
            complaint = ""
            try:
                found = self._read_all(step, state)
            except DamagedError as error:
                complaint = str(error)
            if _all_processes(found is not None):  # digests take all processes
                leaves, restored = found
                complaint = _difference(leaves, digests.of_leaves(restored))
                if _all_processes(not complaint):
                    return restored
            found = restored = None  # the next one needs the memory
            aside = self._set_aside(step)
            print(
                f"{self.folder / str(step)}: damaged: {complaint or 'another process says so'}; "
                f"now {aside.name}, the checkpoint before it is taken",
                file=sys.stderr,
            )
        if steps:
            raise RunError(f"{self.folder}: no checkpoint is left that is what was saved")
        return state

    def _read_all(self, step: int, state: TrainState) -> tuple[dict[str, str], TrainState]:
        """The digests of what was saved at `step`, and what is there of this process's part.

        Raises:
            DamagedError: it cannot be read.
            RunError: it holds other arrays, was written by a newer version, or cannot be reached.
        """
        record = self._read(step, "digests", ocp.args.JsonRestore())
        if not isinstance(record, dict) or not record.keys() >= {"format", "leaves", "sha256"}:
            raise DamagedError("its digests cannot be read")
        if record["format"] != FORMAT:
            raise RunError(
                f"{self.folder / str(step)}: has format {record['format']}, written by another "
                f"version; this one reads format {FORMAT}"
            )
        saved = record["leaves"]
        if _sha256(saved) != record["sha256"]:
            raise DamagedError("its digests are not what was saved")
        there = {name: leaf.rpartition(" ")[0] for name, leaf in saved.items()}
        here = digests.kinds(state)
        for name in there | here:
            if there.get(name) != here.get(name):
                raise RunError(
                    f"{self.folder / str(step)}: {name} is {there.get(name, 'missing')} there "
                    f"and {here.get(name, 'missing')} in this run"
                )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        return saved, self._read(step, "state", ocp.args.StandardRestore(abstract))

    def _read(self, step: int, name: str, how: ocp.args.CheckpointArgs) -> Any:
        """An item of a checkpoint, by this process alone: another may find it damaged."""
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process-{jax.process_index()}",
        )
        handler = _HANDLERS[name](multiprocessing_options=alone)
        reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
        try:
            with progress.waiting():
                return reader.restore(self._place / str(step) / name, args=how)
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # says nothing about the checkpoint
        # What a damaged file makes Orbax, tensorstore and their decoders raise has no one class.
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            if self._in_bucket and buckets.unreachable(error):
                raise RunError(
                    f"{self.folder / str(step)}: cannot be read now ({lines[0][:300]})"
                ) from error
            raise DamagedError(f"its {name} cannot be read ({lines[0][:300]})") from error

    def _set_aside(self, step: int) -> Path:
        """Renames a checkpoint, so that the run can save at its step again."""
        aside = self.folder / distributed.from_first(lambda: self._renamed(step))
        self._manager.reload()
        return aside

    def _renamed(self, step: int) -> str:
        """Renames it; one process does, as another would count what this one just made."""
        folder = self.folder / str(step)
        number = sum(1 for _ in self.folder.glob(f"damaged-{step}-*")) + 1
        aside = self.folder / f"damaged-{step}-{number}"
        if self._in_bucket:
            buckets.move(folder, aside)
        else:
            folder.rename(aside)
        return aside.name

    def close(self) -> None:
        """Waits for the running save.

        Raises:
            RunError: it failed.
        """
        with _disk_errors(self.folder), progress.waiting():
            self._manager.wait_until_finished()
        self._manager.close()


def _difference(saved: dict[str, str], found: dict[str, str]) -> str:
    """What of a checkpoint is not what was saved; empty: nothing."""
    differing = [name for name in saved if found[name] != saved[name]]
    count = f"{len(differing)} of {len(saved)} arrays are"
    return f"{count} not what was saved, the first is {differing[0]}" if differing else ""


def state_bytes(state: TrainState) -> int:
    """The bytes of all arrays of `state`, over all hosts."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _sha256(leaves: dict[str, str]) -> str:
    return digests.of_text(json.dumps(leaves, sort_keys=True))


def _all_processes(holds: bool) -> bool:
    """Whether something holds on every process of the run."""
    return all(distributed.gather(holds))


def _is_not_raised_again(record: logging.LogRecord) -> bool:
    """Whether a log line is news: Orbax logs the traceback of a failed save, and raises it too."""
    return not (record.exc_info and "orbax" in record.pathname)


class _disk_errors:  # noqa: N801 - reads as a statement
    """Turns what a full disk makes Orbax raise into one line."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # tensorstore reports a failed write as ValueError, the rest of Orbax as OSError
        failed = isinstance(error, OSError) or (
            isinstance(error, ValueError) and "rite" in str(error)
        )
        if buckets.named(str(self._folder)) and isinstance(error, Exception):
            failed = failed or buckets.unreachable(error)
        if failed:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise RunError(
                f"{self._folder}: a checkpoint could not be written ({first}); "
                "the last good one stays"
            ) from error
        return False
