"""Checkpoints of the training state: asynchronous, sharded and atomic, through Orbax."""

import logging
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from vibejax import goodput
from vibejax.run_folder import RunError
from vibejax.train import TrainState


class Checkpoints:
    """The checkpoints of one run, by step."""

    def __init__(self, folder: Path, *, keep: int):
        """Opens (or creates) `folder`; only finished checkpoints are seen."""
        self._folder = folder
        logging.getLogger("absl").addFilter(_is_not_raised_again)
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    def latest_step(self) -> int | None:
        """The newest finished checkpoint's step."""
        return self._manager.latest_step()

    @goodput.phase("save")
    def save(self, step: int, state: TrainState) -> None:
        """Starts writing `state`; an earlier save that failed is reported here.

        Raises:
            RunError: the disk is full, or cannot be written; older checkpoints stay.
        """
        if step == self.latest_step():
            return
        needed, free = state_bytes(state), shutil.disk_usage(self._folder).free
        if free < needed:
            raise RunError(
                f"{self._folder}: the checkpoint of step {step} needs {needed:,} bytes and "
                f"{free:,} are free; the last good one stays"
            )
        with _disk_errors(self._folder):
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore_latest(self, state: TrainState) -> TrainState:
        """The newest checkpoint, laid out as `state`; `state` itself where none was finished."""
        step = self.latest_step()
        if step is None:
            return state
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Waits for the running save.

        Raises:
            RunError: it failed.
        """
        with _disk_errors(self._folder):
            self._manager.wait_until_finished()
        self._manager.close()


def state_bytes(state: TrainState) -> int:
    """The bytes of all arrays of `state`, over all hosts."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


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
        if isinstance(error, OSError) or (isinstance(error, ValueError) and "rite" in str(error)):
            first = str(error).strip().splitlines()[0][:300]
            raise RunError(
                f"{self._folder}: a checkpoint could not be written ({first}); "
                "the last good one stays"
            ) from error
        return False
