"""A run's record: one JSON object a step, the same for TensorBoard, and a live table."""

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

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
        first = step + 1 if step else 0  # at step 0 a run begins anew, as its log does
        self._board = _Board(folder / "tensorboard", first) if distributed.first() else None
        self._columns = columns
        self._console = Console(file=sys.stderr, highlight=False, quiet=not distributed.first())
        self._header = False

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Records the metrics of one step."""
        self.log.write(step, metrics)
        if self._board:
            self._board.write(step, metrics)
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
        if self._board:
            self._board.close()
        self.log.close()


class _Board:
    """TensorBoard's event file, written by who calls: a disk that is full is that caller's error.

    A writer with a thread of its own dies there, and the run then waits for it.
    """

    def __init__(self, folder: Path, first_step: int):
        """Opens a file; what older ones hold from `first_step` on is not shown any more."""
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.SessionStatus.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
