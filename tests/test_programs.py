"""Where compiled programs are kept, and the flag that makes them deterministic."""

import os
import subprocess
import sys

import jax
import pytest

from vibejax import programs
from vibejax.run_folder import RunError


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Settings of a fresh process on a chip, by its name."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    yield lambda backend: monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_of_an_accelerator_are_kept(settings, tmp_path):
    settings("tpu")
    programs.prepare(deterministic=False)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "vibejax" / "compiled")
    assert "XLA_FLAGS" not in os.environ


def test_programs_of_a_cpu_are_not(settings):
    settings("cpu")
    programs.prepare(deterministic=False)
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_the_user_has_stays(settings):
    settings("tpu")
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    programs.prepare(deterministic=False)
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/compiled"


def test_determinism_is_a_flag_of_xla(settings, monkeypatch):
    settings("cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/x")
    for _ in range(2):
        programs.prepare(deterministic=True)
        assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=/x {programs.DETERMINISTIC}"


def test_determinism_cannot_come_late(settings):
    settings("gpu")
    jax.devices()
    with pytest.raises(RunError, match="uses its GPUs already; set XLA_FLAGS=--xla_gpu_determ"):
        programs.prepare(deterministic=True)


def test_xla_knows_the_flag():
    """It ends a process that gives it one that it does not know."""
    code = (
        "import jax; from vibejax import programs; programs.prepare(deterministic=True); "
        "print(jax.devices())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
