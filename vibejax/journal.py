"""The rollout journal: completions and verdicts on disk as they finish, for a step that restarts.

A step of 64K-token completions takes tens of minutes, and a pod may be taken away at any moment.
What a process sampled is appended to a file of its own in the run folder, and the same step of a
restarted run, on as many processes as it may then have, takes it from there: where the parameters
are the same bits, the configuration and the prompt are the same, and the draws are of the same
kind. So the step comes out as if nothing had happened. Files stay until a checkpoint makes their
step needless: a run that goes back to one repeats the steps after it without sampling.

A file is a sequence of frames: length and CRC-32 of what follows, a line of JSON, raw arrays. The
first frame says what the file is of. Reading stops at the first frame that is not whole, and
whoever goes on writing cuts it off. A write reaches the operating system before the next token is
drawn: killing the process loses nothing.

Not kept, so that a restart tries again: completions whose logits are not numbers, and verdicts that
say nothing about the completion.
"""

import dataclasses
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vibejax import config_file, digests
from vibejax.completions import Completion
from vibejax.config_file import Section
from vibejax.data import Prompt
from vibejax.run_folder import FREE, RunError
from vibejax.verifiers import Outcome, Verdict

FORMAT = 1
FRAME = struct.Struct("<II")  # length, CRC-32


class Journal:
    """The journal of one run, as one of its processes sees it."""

    def __init__(self, folder: Path, config: Section, process: int = 0):
        """Opens the journal; nothing is written before there is something to write.

        Args:
            folder: of all processes' files.
            config: the run's, but for what a resumed run may change.
            process: the number of this process.
        """
        self._folder, self._process = folder, process
        same = [
            f"{name} = {value!r}"
            for name, value in config_file.leaves(config).items()
            if name.partition(".")[0] not in FREE
        ]
        self._config = digests.of_text("\n".join(same))

    def open(self, done: int, draws: int, params: str) -> "Entries":
        """What there is of one rollout, and where more is added.

        Args:
            done: steps that the run has finished.
            draws: the number of the engine's draws, see `engine.Engine.generate`.
            params: digest of the parameters that are sampled from.
        """
        heading = {
            "format": FORMAT,
            "done": done,
            "draws": draws,
            "params": params,
            "config": self._config,
        }
        stem = f"{done:08d}-{draws:010d}"
        own = self._folder / f"{stem}-{self._process:05d}"
        return Entries(own, sorted(self._folder.glob(f"{stem}-*")), heading)

    def drop(self, done: int) -> None:
        """Removes what a run does not need that goes on after `done` steps.

        Each process removes its own files, which it alone has where the run is in a bucket, and
        the first all.
        """
        if not self._folder.is_dir():
            return
        files = self._folder.glob("*" if self._process == 0 else f"*-{self._process:05d}")
        for path in [*files]:
            if int(path.name.partition("-")[0]) < done:
                path.unlink(missing_ok=True)


class Entries:
    """The completions and verdicts of one rollout.

    Attributes:
        reused: completions that were asked for and found.
    """

    def __init__(self, own: Path, files: list[Path], heading: dict[str, Any]):
        """Reads `files`, as far as they have this heading; see `Journal.open`."""
        self._path, self._heading, self.reused = own, heading, 0
        self._completions: dict[tuple[int, str], dict[int, Completion]] = {}
        self._verdicts: dict[tuple[int, str], dict[int, Verdict]] = {}
        self._whole = 0  # bytes of the own file that can stay
        for path in files:
            length = 0
            for number, (entry, arrays, end) in enumerate(_frames(path)):
                if number == 0 and entry != heading:
                    break
                if number:
                    self._read(entry, arrays)
                length = end
            if path == own:
                self._whole = length
        self._file = None

    def _read(self, entry: dict[str, Any], arrays: bytes) -> None:
        key, sample = (entry["prompt"], entry["record"]), entry["sample"]
        if "stop" in entry:
            token_C, logprob_C = np.frombuffer(arrays, "<i4").reshape(2, -1)
            self._completions.setdefault(key, {})[sample] = Completion(
                0, sample, token_C.astype(np.int32), logprob_C.view("<f4").astype(np.float32),
                entry["stop"],
            )  # fmt: skip
        else:
            fields = entry["verdict"] | {"outcome": Outcome(entry["verdict"]["outcome"])}
            self._verdicts.setdefault(key, {})[sample] = Verdict(**fields)

    def completions(self, prompt: Prompt) -> list[tuple[Completion, Verdict | None]]:
        """Those of a prompt, with their verdicts where there are some; `request` is to be set."""
        key = _key(prompt)
        verdicts = self._verdicts.get(key, {})
        found = self._completions.get(key, {})
        self.reused += len(found)
        return [(completion, verdicts.get(sample)) for sample, completion in sorted(found.items())]

    def add(self, prompt: Prompt, completion: Completion) -> None:
        """Appends a completion.

        Raises:
            RunError: it cannot be written.
        """
        if completion.stop == "not_finite":
            return
        arrays = completion.tokens.astype("<i4").tobytes()
        arrays += completion.logprobs.astype("<f4").tobytes()
        self._append(prompt, {"sample": completion.sample, "stop": completion.stop}, arrays)

    def judge(self, prompt: Prompt, sample: int, verdict: Verdict) -> None:
        """Appends the verdict on a completion.

        Raises:
            RunError: it cannot be written.
        """
        if verdict.scored:
            fields = dataclasses.asdict(verdict)
            self._append(prompt, {"sample": sample, "verdict": fields}, b"")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, prompt: Prompt, entry: dict[str, Any], arrays: bytes) -> None:
        index, record = _key(prompt)
        try:
            if self._file is None:
                self._path.parent.mkdir(exist_ok=True)
                self._file = self._path.open("r+b" if self._whole else "wb", buffering=0)
                self._file.truncate(self._whole)
                self._file.seek(self._whole)
                if not self._whole:
                    self._write(self._heading, b"")
            self._write({"prompt": index, "record": record} | entry, arrays)
        except OSError as error:
            raise RunError(
                f"{self._path}: a completion could not be written ({error.strerror}); what is "
                "there will be used when the run goes on"
            ) from error

    def _write(self, entry: dict[str, Any], arrays: bytes) -> None:
        content = json.dumps(entry).encode() + b"\n" + arrays
        frame = FRAME.pack(len(content), zlib.crc32(content)) + content
        while frame:  # a raw file may take less than all of it
            frame = frame[self._file.write(frame) :]


def _frames(path: Path) -> Iterator[tuple[dict[str, Any], bytes, int]]:
    """The whole frames at the beginning of a file: entry, arrays, and where the frame ends."""
    content = path.read_bytes()
    start = 0
    while len(content) >= start + FRAME.size:
        length, checksum = FRAME.unpack_from(content, start)
        start += FRAME.size
        body = content[start : start + length]
        start += length
        if len(body) < length or zlib.crc32(body) != checksum or not length:
            return
        line, _, arrays = body.partition(b"\n")
        yield json.loads(line), arrays, start


def _key(prompt: Prompt) -> tuple[int, str]:
    """A prompt's place in its source, and a digest of what it was."""
    text = json.dumps([prompt.tokens, prompt.record], sort_keys=True, default=str)
    return prompt.index, digests.of_text(text)
