"""A run's record: metrics.jsonl, TensorBoard's file, and disks without room."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter

from vibejax.metrics import Metrics


def events(folder):
    """What TensorBoard reads: of each record its length, a checksum, the event, a checksum."""
    (file,) = (folder / "tensorboard").iterdir()
    held, at, found = file.read_bytes(), 0, []
    while at < len(held):
        (size,) = struct.unpack_from("Q", held, at)
        found.append(Event.FromString(held[at + 12 : at + 12 + size]))
        at += size + 16
    return found


def test_tensorboard_has_every_step(tmp_path):
    metrics = Metrics(tmp_path, 2, {})
    metrics.write(3, {"rollout/accuracy": 0.5, "step/finite": True})
    metrics.write(4, {"rollout/accuracy": 0.75})
    metrics.close()
    _, start, *rest = events(tmp_path)
    assert start.step == 3 and start.HasField("session_log")  # what was there from 3 on is void
    found = [(e.step, v.tag, v.simple_value) for e in rest for v in e.summary.value]
    assert found == [
        (3, "rollout/accuracy", 0.5),
        (3, "step/finite", 1.0),
        (4, "rollout/accuracy", 0.75),
    ]


def test_a_run_that_begins_anew_voids_all_that_was_there(tmp_path):
    metrics = Metrics(tmp_path, 0, {})
    metrics.close()
    assert events(tmp_path)[1].step == 0


def test_a_full_disk_is_the_writers_error(tmp_path, monkeypatch):
    """And the next one's too: nothing waits for a thread that has died."""
    metrics = Metrics(tmp_path, 0, {})

    def full(self, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full)
        for step in (1, 2):
            with pytest.raises(OSError, match="No space left"):
                metrics.write(step, {"rollout/accuracy": 0.5})
    metrics.write(3, {"rollout/accuracy": 0.5})
    metrics.close()
    assert events(tmp_path)[-1].step == 3
