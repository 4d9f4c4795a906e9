"""A worker process of the verifier pool as its owner sees it: start, send, receive, kill."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vibejax.verifiers import Outcome

MAX_LINE_BYTES = 2**20  # a worker that writes more than this a line no longer follows the protocol


class DiedError(Exception):
    """A worker closed its output or broke the protocol."""


class LateError(Exception):
    """A worker said nothing in time."""


class RefusedError(Exception):
    """A worker ended an item before it started it."""


class WorkerProcess:
    """A worker process and its pipes.

    Attributes:
        process: the process, leader of its own process group.
        served: items that it has verified.
        last_words: the last line of its errors, once it is buried.
    """

    def __init__(self, options: str):
        """Starts the process; `options` as `vibejax.verifiers.worker` reads them."""
        self.served = 0
        self.last_words = ""
        self._killed = False
        self._buffer = bytearray()
        self._errors = tempfile.TemporaryFile()
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            # -P: the working directory may hold a file named like a module
            [sys.executable, "-P", "-m", "vibejax.verifiers.worker", options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is the owner's to handle; a group that can be killed
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        os.set_blocking(self.process.stdin.fileno(), False)
        self._input = select.poll()
        self._input.register(self.process.stdin, select.POLLOUT)
        self._output = select.poll()
        self._output.register(self.process.stdout, select.POLLIN)

    def send(self, data: bytes, deadline: float) -> None:
        """Writes a request; `deadline` in seconds of the monotonic clock."""
        view = memoryview(data)
        while view:
            if not self._input.poll(_milliseconds(deadline)):
                raise LateError
            try:
                view = view[os.write(self.process.stdin.fileno(), view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise DiedError("input closed") from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """Returns the next message; `deadline` in seconds of the monotonic clock."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise DiedError("line too long")
            # A slot that was kept from running looks once more before it calls a worker late.
            if not self._output.poll(_milliseconds(deadline)):
                raise LateError
            chunk = os.read(self.process.stdout.fileno(), 2**16)
            if not chunk:
                raise DiedError("output closed")
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise DiedError("not JSON") from error
        if not isinstance(message, dict):
            raise DiedError("not a message")
        return message

    def expect(self, event: str, deadline: float) -> None:
        """Reads messages up to an event; `deadline` in seconds of the monotonic clock."""
        while (message := self.receive(deadline)).get("event") != event:
            if message.get("event") == "verdict":
                raise RefusedError(message.get("detail"))

    def kill(self) -> None:
        """Kills the worker and all it started; safe to call twice, before `bury`."""
        if not self._killed:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                # not yet waited for, so the id cannot have gone to another process
                os.killpg(self.process.pid, signal.SIGKILL)

    def bury(self) -> None:
        """Waits for the killed process and closes its files."""
        self.process.wait()
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        text = self._errors.read().decode(errors="replace").strip()
        self.last_words = text.splitlines()[-1][:300] if text else ""
        for file in (self.process.stdin, self.process.stdout, self._errors):
            file.close()

    def cause(self, error: DiedError) -> tuple[Outcome, str]:
        """Says of a worker that was buried how it died."""
        status = self.process.returncode
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        words = f"{error}, {how}; {self.last_words}".rstrip("; ")
        # GMP and the C library abort with this text where Python would raise MemoryError
        memory = "Cannot allocate memory" in words or "MemoryError" in words
        return (Outcome.MEMORY if memory else Outcome.CRASH), f"worker died: {words}"


def _milliseconds(deadline: float) -> float:
    return max(0.0, (deadline - time.monotonic()) * 1000)
