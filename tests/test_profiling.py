"""The steps that were asked for are recorded, and no others."""

import gzip
import json

import jax
import jax.numpy as jnp

from vibejax.profiling import Profile


def test_the_steps_asked_for_are_recorded(tmp_path):
    profile = Profile(tmp_path, [2, 3])
    work = jax.jit(lambda x: jnp.sin(x))
    for step in range(1, 5):
        profile.begin(step)
        with jax.profiler.TraceAnnotation(f"this is step {step}"):
            jax.block_until_ready(work(jnp.ones(4)))
    profile.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    for step in (2, 3):
        (path,) = tmp_path.glob(f"step-00000{step}/plugins/profile/*/*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        named = {event.get("name") for event in events}
        assert f"this is step {step}" in named and f"this is step {step + 1}" not in named


def test_the_last_step_is_written_when_the_run_ends(tmp_path):
    profile = Profile(tmp_path, [1])
    profile.begin(1)
    assert not [*tmp_path.rglob("*.xplane.pb")]
    profile.close()
    assert [*tmp_path.rglob("*.xplane.pb")]
    profile.close()
