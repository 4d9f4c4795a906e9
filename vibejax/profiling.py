"""Profiler traces of the steps that a run was asked for, as XProf and Perfetto read them."""

from collections.abc import Collection
from pathlib import Path

import jax


class Profile:
    """Records some steps of a run, each into a folder of its own."""

    def __init__(self, folder: Path, steps: Collection[int]):
        """Records `steps` into `folder`/step-NNNNNN."""
        self._folder, self._steps = folder, steps
        self._records = False

    def begin(self, step: int) -> None:
        """Ends the recording of the step before; begins that of `step` if it was asked for."""
        self.close()
        if step in self._steps:
            jax.profiler.start_trace(str(self._folder / f"step-{step:06d}"))
            self._records = True

    def close(self) -> None:
        """Writes what is being recorded."""
        if self._records:
            self._records = False
            jax.profiler.stop_trace()
