"""A run's record: one JSON object a step, the same for TensorBoard, and a live table."""

import sys
from pathlib import Path
from typing import Any

import tensorboardX
from rich.console import Console
from rich.text import Text

from vibejax import distributed
from vibejax.run_folder import Log

VARYING = ("time/", "goodput/")  # how long things took, which differs from run to run


class Metrics:
    """Writes every step to metrics.jsonl and TensorBoard, and a row of the table to stderr.

    Of several processes the first does.

    Names are `area/name`; those that differ from run to run begin with one of `VARYING`.
    """

    def __init__(self, folder: Path, step: int, columns: dict[str, tuple[str, str]]):
        """Opens the files after `step`.

        Args:
            folder: of the run.
            step: the last step that is kept.
            columns: of the table: title -> (metric, format).
        """
        self.log = Log(folder / "metrics.jsonl", step)
        self._board = tensorboardX.SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + 1, write_to_disk=distributed.first()
        )
        self._columns = columns
        self._console = Console(file=sys.stderr, highlight=False, quiet=not distributed.first())
        self._header = False

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Records the metrics of one step."""
        self.log.write(step, metrics)
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._row(step, metrics)

    def _row(self, step: int, metrics: dict[str, Any]) -> None:
        widths = {title: max(len(title), 8) for title in self._columns}
        if not self._header:
            titles = "  ".join(f"{title:>{widths[title]}}" for title in self._columns)
            self._console.print(Text(f"{'step':>6}  {titles}", style="bold"), soft_wrap=True)
            self._header = True
        cells = [
            f"{format(metrics[name], form):>{widths[title]}}"
            if name in metrics
            else " " * widths[title]
            for title, (name, form) in self._columns.items()
        ]
        self._console.print(Text(f"{step:>6}  {'  '.join(cells)}"), soft_wrap=True)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._board.close()
        self.log.close()
