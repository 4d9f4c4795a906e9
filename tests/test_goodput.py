"""Shares of the time, on a clock that is set by hand and on a real one."""

import jax
import jax.numpy as jnp
import pytest

from vibejax import goodput


@pytest.fixture
def passed(monkeypatch):
    """Lets seconds pass."""
    now = [0.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now[0])
    goodput.start()

    def wait(seconds):
        now[0] += seconds

    return wait


def nonzero(shares):
    assert [*shares] == [f"goodput/{name}" for name in goodput.SHARES]
    return {name.removeprefix("goodput/"): share for name, share in shares.items() if share}


def test_time_counts_for_the_innermost_phase(passed):
    passed(1)
    with goodput.phase("rollout"):
        passed(4)
        with goodput.phase("verify"):
            passed(2)
        passed(1)
    with goodput.phase("train"):
        passed(8)
    assert nonzero(goodput.shares()) == {
        "idle": 1 / 16, "rollout": 5 / 16, "verify": 2 / 16, "train": 8 / 16
    }  # fmt: skip
    passed(3)
    assert nonzero(goodput.shares()) == {"idle": 1.0}


def test_shares_inside_of_a_phase_go_on_with_it(passed):
    with goodput.phase("save"):
        passed(1)
        assert nonzero(goodput.shares()) == {"save": 1.0}
        passed(1)
    passed(3)
    assert nonzero(goodput.shares()) == {"save": 0.25, "idle": 0.75}
    assert sum(goodput.shares().values()) == 0.0, "no time has passed"


def test_a_phase_ends_with_an_error(passed):
    @goodput.phase("handover")
    def fail():
        passed(1)
        raise ValueError

    with pytest.raises(ValueError):
        fail()
    passed(3)
    assert nonzero(goodput.shares()) == {"handover": 0.25, "idle": 0.75}


def test_a_compile_counts_for_itself_and_once(passed):
    """Traced for 3 s, 1 s of it a function inside; lowered for 1 s; compiled for 4 s."""

    def happened(event, seconds):
        jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{event}_duration", seconds)

    with goodput.phase("train"):
        passed(1)
        happened("jaxpr_trace", 1.0)
        passed(2)
        happened("jaxpr_trace", 3.0)
        passed(1)
        happened("jaxpr_to_mlir_module", 1.0)
        passed(4)
        happened("backend_compile", 4.0)
        jax.monitoring.record_event_duration_secs("/jax/checkpoint/write", 7.0)
        passed(8)
    assert nonzero(goodput.shares()) == {"train": 0.5, "compile": 0.5}


def test_jax_tells_of_its_compiles():
    """If it names its events otherwise one day, compiles would count for the phase."""
    goodput.start()
    with goodput.phase("train"):
        jax.block_until_ready(jax.jit(lambda x: jnp.tan(x) @ jnp.sin(x))(jnp.ones((3, 3))))
    shares = goodput.shares()
    assert shares["goodput/compile"] > shares["goodput/idle"]
    assert sum(shares.values()) == pytest.approx(1.0)
