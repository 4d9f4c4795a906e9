"""Programs: where they are kept, the flag that makes them deterministic, compiling them ahead."""

import os
import re
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import tiny

from vibejax import distributed, preemption, programs, rl, run_folder
from vibejax.config.rl import RlConfig
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


@pytest.fixture
def compiled():
    """The names of programs, as they are compiled."""
    names = []

    def heard(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield names
    jax.monitoring.unregister_event_duration_listener(heard)


def test_programs_of_an_accelerator_are_kept(settings, tmp_path):
    settings("tpu")
    programs.prepare(deterministic=False)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "vibejax" / "compiled")
    assert "XLA_FLAGS" not in os.environ


def test_programs_of_a_cpu_are_not(settings):
    settings("cpu")
    programs.prepare(deterministic=False)
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("named", [{}, {name: "0.5" for name in programs.GPU_MEMORY[1:]},
                                   {name: "0.5" for name in programs.GPU_MEMORY[:1]}])  # fmt: skip
def test_a_gpu_is_taken_whole_unless_its_user_says_how_much(settings, monkeypatch, named):
    for name in programs.GPU_MEMORY:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, share in named.items():
        monkeypatch.setenv(name, share)
    settings("cpu")
    programs.prepare()
    found = {name: os.environ[name] for name in programs.GPU_MEMORY if name in os.environ}
    assert found == (named or {programs.GPU_MEMORY[0]: "0.95"})


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


# Compiling ahead


def lowered(function, *arguments):
    return lambda: jax.jit(function).lower(*arguments)


def test_a_program_that_was_compiled_ahead_is_not_compiled_again(compiled, capsys):
    def double(x_N):
        return x_N + x_N

    program, shape = jax.jit(double), jax.ShapeDtypeStruct((3,), "float32")
    programs.compile_ahead({"double": lambda: program.lower(shape)}, workers=2)
    assert compiled == ["jit(double)"]
    assert program(np.float32([1, 2, 3])).tolist() == [2, 4, 6]
    assert compiled == ["jit(double)"]
    assert re.fullmatch(r"1 programs compiled in [\d.]+ s\n", capsys.readouterr().out)


def test_progress_is_told(monkeypatch, capsys):
    monkeypatch.setattr(programs, "SAY_S", 0.0)
    small, large = (lowered(lambda x_N: x_N * 2.0, np.ones(n, np.float32)) for n in (3, 5))
    programs.compile_ahead({"small": small, "large": large}, workers=1)
    assert re.match(r"1 of 2 programs compiled, \d+ s; left: large\n", capsys.readouterr().out)


def test_a_program_that_cannot_be_compiled_is_named():
    def call(x_N):
        return jax.ffi.ffi_call("nobody_has_it", jax.ShapeDtypeStruct((3,), "float32"))(x_N)

    with pytest.raises(
        RunError, match=r"^accumulate cannot be compiled: NOT_FOUND: No FFI handler"
    ):
        programs.compile_ahead({"accumulate": lowered(call, np.ones(3, np.float32))})


def test_a_run_that_is_to_end_waits_for_no_compile(monkeypatch):
    released = threading.Event()

    class Slow:
        def compile(self):
            released.wait(60)

    monkeypatch.setattr(preemption, "asked", lambda: True)
    began = time.monotonic()
    with pytest.raises(preemption.Preempted):
        programs.compile_ahead({"accumulate": Slow})
    assert time.monotonic() - began < 30
    released.set()


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 4, "tensor": 2}])
def test_a_runs_programs_are_all_compiled_before_its_first_step(tmp_path, compiled, sizes):
    tiny.write_policy(tmp_path / "policy")
    records = [r | {"ground_truth": "1", "last_number": True} for r in tiny.TASK]
    tiny.write_task(tmp_path / "task.jsonl", records)
    config = RlConfig(
        policy=str(tmp_path / "policy"), prompts=str(tmp_path / "task.jsonl"),
        out=str(tmp_path / "run"), steps=2, mesh=sizes, objective={"updates": 2, "kl": 0.01},
        rollout={
            "prompts_per_step": 8, "group_size": 4, "slots": 64, "max_prompt_tokens": 8,
            "max_completion_tokens": 12, "attention": "xla", "page_tokens": 4, "chunk_tokens": 16,
            "tensor": sizes.get("tensor", 1),
        },
        train={"row_tokens": 32, "microbatch_rows": 8},
    )  # fmt: skip
    announced = distributed.announce
    ahead = []

    def announce(line):
        if "programs compiled" in str(line):
            ahead[:] = compiled
        announced(line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "announce", announce)
        rl.run(config)
    rows = run_folder.read_log(tmp_path / "run" / "metrics.jsonl")
    assert any(row["rollout/groups_mixed"] > 0 for row in rows if row["step"]), "nothing was learnt"
    ours = {"jit(accumulate)", "jit(apply)", "jit(score)", "jit(layer)", "jit(window)"}
    assert ours <= {*ahead}
    assert sorted(ours & {*compiled[len(ahead) :]}) == []
