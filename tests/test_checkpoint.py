import collections
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vibejax import train
from vibejax.checkpoint import Checkpoints, state_bytes
from vibejax.run_folder import RunError


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
