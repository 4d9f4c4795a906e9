"""Several real processes on this machine as the hosts of one run, and a tiny RL run by them."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tiny

from vibejax import optimizer, sharding, train, weights
from vibejax.checkpoint import Checkpoints
from vibejax.config.training import OptimizerConfig
from vibejax.metrics import VARYING

TOML = """
policy = "{folder}/policy"
prompts = "{folder}/task.jsonl"
heldout = "{folder}/task.jsonl"
steps = 5
samples_per_step = 4
[mesh]
fsdp = 2
context = 2
tensor = 2
[rollout]
prompts_per_step = 4
group_size = 8
refills = 1
max_prompt_tokens = 8
max_completion_tokens = 24
slots = 16
[optimizer]
learning_rate = 1e-2
[train]
row_tokens = 64
microbatch_rows = 4
[eval]
prompts = 8
"""
# A random policy is never right; half of all one-digit answers are, so that there is a gradient.
RECORDS = [
    {"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": "1", "last_number": True}
    for a in range(3)
    for b in range(4)
]


def start(
    arguments: Sequence[str], processes: int, devices: int, **environment: str
) -> list[subprocess.Popen]:
    """The same command in every process; several find each other as on machines of their own."""
    found = {}
    if processes > 1:
        found = {"VIBEJAX_COORDINATOR": free_address(), "VIBEJAX_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
            # A process's devices wait for each other in threads: more than there are cores here.
            | {"NPROC": str(8 * devices)}
            | environment
            | found
            | ({"VIBEJAX_PROCESS": str(process)} if found else {}),
        )
        for process in range(processes)
    ]


def free_address() -> str:
    """Where nobody answers yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def outcomes(started: Sequence[subprocess.Popen], timeout: float) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process; those that take longer are killed.

    The CPU's collectives print lines of their own, which are left out.
    """
    try:
        texts = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        (process.returncode, re.sub(r"(?m)^\[Gloo\].*\n", "", stdout), stderr)
        for process, (stdout, stderr) in zip(started, texts, strict=True)
    ]


def prepare(folder: Path) -> None:
    """The policy, the task and the configuration of RL runs."""
    tiny.write_policy(folder / "policy")
    tiny.write_task(folder / "task.jsonl", RECORDS)
    (folder / "rl.toml").write_text(TOML.format(folder=folder))


def start_rl(
    folder: Path, processes: int, devices: int, *settings: str, **environment: str
) -> list[subprocess.Popen]:
    """An RL run that has begun; a later one finds the programs that this one compiles."""
    options = [part for pair in settings for part in ("--set", pair)]
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = ["-m", "vibejax.rl", str(folder / "rl.toml"), *options]
    return start(command, processes, devices, **kept, **environment)


def train_rl(
    folder: Path, processes: int, devices: int, timeout: float, *settings: str
) -> tuple[Path, list[str]]:
    """The run folder of processes with `devices` devices each, and what each printed."""
    out = folder / f"{processes}x{devices}"
    started = start_rl(folder, processes, devices, f"out={out}", *settings)
    ended = outcomes(started, timeout)
    for code, _, stderr in ended:
        assert code == 0, stderr[-3_000:]
    return out, [stdout for _, stdout, _ in ended]


def rows_of(out: Path, name: str) -> list[dict]:
    """The lines of one of a run's logs, without what differs from run to run."""
    rows = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in rows]


def apart(folder: Path, one: Path, other: Path) -> float:
    """||difference of the final parameters|| / ||what the run `one` changed||."""
    first, second = (_params(folder, out) for out in (one, other))
    subtract = functools.partial(jax.tree.map, np.subtract)
    return _norm(subtract(first, second)) / _norm(subtract(first, _params(folder, None)))


def _params(folder: Path, out: Path | None) -> dict:
    """The parameters that a run ended with; None: those that all began with."""
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    model = weights.load_config(folder / "policy")
    state = train.init_state(
        weights.load_params(folder / "policy", model, mesh, np.float32),
        optimizer.make_optimizer(OptimizerConfig(), 1),
    )
    if out is not None:
        checkpoints = Checkpoints(out / "checkpoints", keep=2)
        state = checkpoints.restore_latest(state)
        checkpoints.close()
    return jax.device_get(state.params)


def _norm(tree: dict) -> float:
    squares = [np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(squares)))
