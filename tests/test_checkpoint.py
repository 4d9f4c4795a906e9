"""Checkpoints: what is kept, and what happens to one that is not what was saved."""

import collections
import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vibejax import checkpoint, train
from vibejax.checkpoint import Checkpoints, state_bytes
from vibejax.run_folder import RunError

# A read that fails leaves tasks of Orbax behind, whose loop is closed when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def state():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(3, jnp.bfloat16)}
    return train.TrainState(jnp.zeros((), jnp.int32), params, optax.sgd(1.0).init(params))


def test_bytes_by_hand(state):
    assert state_bytes(state) == 6 * 4 + 3 * 2 + state.step.nbytes


def test_a_save_that_cannot_fit_is_refused_before_it_is_begun(state, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state)
    Usage = collections.namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free=state_bytes(state) - 1))
    with pytest.raises(RunError, match=r"step 2 needs 34 bytes and 33 are free; the last good"):
        checkpoints.save(2, state)
    assert checkpoints.latest_step() == 1
    restored = checkpoints.restore_latest(state)
    np.testing.assert_array_equal(restored.params["w"], state.params["w"])
    checkpoints.close()


def at(step: int) -> train.TrainState:
    """A state that says which step it is of."""
    params = {"w": jnp.arange(6.0).reshape(2, 3) + step, "b": jnp.full(3, step, jnp.bfloat16)}
    return train.TrainState(jnp.array(step, jnp.int32), params, optax.sgd(1.0).init(params))


def saved(folder, *steps, **kept):
    checkpoints = Checkpoints(folder, **({"keep": 2} | kept))
    for step in steps:
        checkpoints.save(step, at(step))
    checkpoints.close()
    return folder


def restored(folder):
    checkpoints = Checkpoints(folder, keep=2)
    state = checkpoints.restore_latest(at(0))
    checkpoints.close()
    gc.collect()  # here, not in another test
    step = int(state.step)
    jax.tree.map(np.testing.assert_array_equal, state, at(step))
    return step


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 1 and 2, to be copied and damaged."""
    return saved(tmp_path_factory.mktemp("two") / "good", 1, 2)


@pytest.fixture
def folder(two, tmp_path):
    return shutil.copytree(two, tmp_path / "run")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


# Every file and every kind of damage: tests/benchmarks/corruption.py.
DAMAGE = {
    "arrays flipped": ("state/d/*", flip),
    "digests flipped": ("digests/metadata", flip),
    "tree deleted": ("state/_METADATA", lambda path: path.unlink()),
    "manifest cut": ("state/manifest.ocdbt", lambda path: path.write_bytes(path.read_bytes()[:50])),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_makes_way_for_the_one_before_it(folder, kind, capfd):
    pattern, damage = DAMAGE[kind]
    (path,) = (folder / "2").glob(pattern)
    damage(path)
    assert restored(folder) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    (line,) = lines
    assert line.startswith(f"{folder}/2: damaged: ")
    assert line.endswith("; now damaged-2-1, the checkpoint before it is taken")
    saved(folder, 2)  # the run comes to that step again
    assert restored(folder) == 2


def test_numbers_that_orbax_loads_but_nobody_saved(folder, monkeypatch, capfd):
    """Whatever loads: digests decide. Here the digests are those of another state."""
    path = folder / "2" / "digests" / "metadata"
    record = json.loads(path.read_text())
    record["leaves"]["params.w"] = record["leaves"]["params.w"][:-1] + "g"
    record["sha256"] = checkpoint._sha256(record["leaves"])
    path.write_text(json.dumps(record))
    assert restored(folder) == 1
    assert "1 of 3 arrays are not what was saved, the first is params.w" in capfd.readouterr().err


def test_none_left_is_an_error_and_not_a_fresh_start(folder):
    for step in ("1", "2"):
        (folder / step / "digests" / "metadata").unlink()
    checkpoints = Checkpoints(folder, keep=2)
    with pytest.raises(RunError, match=f"{folder}: no checkpoint is left that is what was saved"):
        checkpoints.restore_latest(at(0))
    checkpoints.close()


def test_a_newer_format_is_named(folder):
    path = folder / "2" / "digests" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    checkpoints = Checkpoints(folder, keep=2)
    with pytest.raises(RunError, match="run/2: has format 2, written by another version; this one"):
        checkpoints.restore_latest(at(0))
    checkpoints.close()


def test_other_arrays_are_named_and_stay(folder):
    params = {"w": jnp.zeros((2, 4)), "b": jnp.zeros(3, jnp.bfloat16)}
    other = train.TrainState(jnp.array(0, jnp.int32), params, optax.sgd(1.0).init(params))
    checkpoints = Checkpoints(folder, keep=2)
    with pytest.raises(RunError, match=r"params.w is float32\[2, 3\] there and float32\[2, 4\] in"):
        checkpoints.restore_latest(other)
    checkpoints.close()
    assert restored(folder) == 2


def test_half_written_ones_are_skipped(folder):
    shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
    assert restored(folder) == 2


def test_kept_are_the_newest_and_every_so_many(tmp_path):
    saved(tmp_path / "run", *range(1, 8), keep=2, keep_every=3)
    steps = sorted(int(path.name) for path in (tmp_path / "run").iterdir())
    assert steps == [3, 6, 7]
