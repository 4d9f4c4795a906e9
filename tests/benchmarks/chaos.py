"""Kills at random moments of a 30-step run: `python tests/benchmarks/chaos.py [--kills 20]`.

The tiny policy of the tests, with refills, two updates a step, held-out evaluations and a
checkpoint every third step, in a process that is killed by SIGKILL or asked to end by SIGTERM and
started again by the same command, until all kills are spent and the run is complete. Then its
parameters and optimizer state, its final model and its metrics (but for time/*) must be, bit for
bit, those of a run that was left alone, with no step lost or doubled; SIGTERM must have ended it
with 143 within 25 s; completions must have been taken from the journal. Prints one row; exits with
1 where one of these is not so.

Verifiers have all the time that they could need: a kill must not turn into a time-out.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from vibejax import weights
from vibejax.checkpoint import Checkpoints
from vibejax.metrics import VARYING
from vibejax.run_folder import read_log

STEPS, GRACE_S = 30, 25
TOML = """
policy = "{folder}/policy"
prompts = "{folder}/task.jsonl"
heldout = "{folder}/task.jsonl"
resume = "auto"
steps = 30
[rollout]
prompts_per_step = 6
group_size = 8
refills = 1
max_prompt_tokens = 8
max_completion_tokens = 40
slots = 16
window = 4
[objective]
updates = 2
[optimizer]
learning_rate = 1e-3
[train]
row_tokens = 64
microbatch_rows = 4
[verifiers]
workers = 1
limit_s = 600
[eval]
every = 10
prompts = 8
[checkpoint]
every = 3
keep_every = 15
"""
# As in tests/test_rl.py: a random policy is right now and then, so that there is a gradient.
RECORDS = [
    {"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": "1", "last_number": True}
    for a in range(5)
    for b in range(5)
]


def start(folder: Path, out: Path) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "vibejax.rl", str(folder / "rl.toml"), "--set", f"out={out}"]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def run_in_chaos(folder: Path, out: Path, kills: int, whole_s: float, draw: random.Random):
    """Runs, kills and starts again; how the process ended, and how long SIGTERM took."""
    ends: collections.Counter = collections.Counter()
    slowest_s = 0.0
    while True:
        process, began = start(folder, out), time.monotonic()
        if kills:
            # Most of a life is its start; the rest of the run is spread over the kills.
            deadline = time.monotonic() + draw.uniform(0.2, 1.0) * whole_s
            progress = rows(out)
            wanted = progress + draw.randrange(1 + 2 * STEPS // 20)
            while process.poll() is None and time.monotonic() < deadline and rows(out) <= wanted:
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
        if kills and process.poll() is None:
            kills -= 1
            how = draw.choice((signal.SIGKILL, signal.SIGTERM))
            process.send_signal(how)
            asked = time.monotonic()
            code = process.wait()
            if how == signal.SIGTERM:
                slowest_s = max(slowest_s, time.monotonic() - asked)
            ends[f"{how.name}: {code}"] += 1
        else:
            code = process.wait()
            ends[f"alone: {code}"] += 1
            if code == 0:
                return ends, slowest_s
            if code:
                raise SystemExit(f"a run that nobody killed ended with {code}: {folder / 'log'}")
        print(
            f"{rows(out):3} rows, {time.monotonic() - began:5.1f} s, {dict(ends)}", file=sys.stderr
        )


def rows(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def metrics(out: Path) -> list[dict]:
    kept = []
    for row in read_log(out / "metrics.jsonl"):
        kept.append({name: value for name, value in row.items() if not name.startswith(VARYING)})
    return kept


def state_digests(out: Path) -> str:
    """What the newest checkpoint says its arrays are; reading it would check that they are so."""
    checkpoints = Checkpoints(out / "checkpoints", keep=2)
    step = checkpoints.latest_step()
    checkpoints.close()
    return (out / "checkpoints" / str(step) / "digests" / "metadata").read_text()


def final_is_the_same(out: Path, other: Path) -> bool:
    config = weights.load_config(out / "final")
    models = [weights.load_params(x / "final", config, None, jnp.float32) for x in (out, other)]
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), *models)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.write_policy(folder / "policy")
        tiny.write_task(folder / "task.jsonl", RECORDS)
        (folder / "rl.toml").write_text(TOML.format(folder=folder))
        alone, chaos = folder / "alone", folder / "chaos"
        began = time.monotonic()
        if start(folder, alone).wait():
            raise SystemExit((folder / "log").read_text())
        whole_s = time.monotonic() - began
        ends, slowest_s = run_in_chaos(folder, chaos, args.kills, whole_s, random.Random(args.seed))
        found = read_log(chaos / "metrics.jsonl")
        checks = {
            "state_identical": state_digests(chaos) == state_digests(alone),
            "final_identical": final_is_the_same(chaos, alone),
            "metrics_identical": metrics(chaos) == metrics(alone),
            "steps_once_each": [row["step"] for row in found] == list(range(STEPS + 1)),
            "sigterm_exits_143": not {k for k in ends if k.startswith("SIGTERM")}
            - {"SIGTERM: 143", "SIGTERM: 0"},
            "sigterm_in_time": slowest_s < GRACE_S,
            "journal_reused": sum(row.get("time/journaled", 0) for row in found) > 0,
        }
        kept = sorted(int(p.name) for p in (chaos / "checkpoints").iterdir() if p.name.isdigit())
        row = {
            "benchmark": "chaos",
            "case": f"{args.kills} kills, {STEPS} steps, 1 process",
            "ours": sum(checks.values()),
            "peer": len(checks),
            "ratio": sum(checks.values()) / len(checks),
            "unit": "checks that hold",
            "higher_is_better": True,
            **checks,
            "ends": dict(ends),
            "slowest_sigterm_s": round(slowest_s, 2),
            "journaled_completions": sum(row.get("time/journaled", 0) for row in found),
            "checkpoints": kept,
            "seconds_alone": round(whole_s, 1),
            "seconds": round(time.monotonic() - began, 1),
        }
        print(json.dumps(row))
    sys.exit(not all(checks.values()))


if __name__ == "__main__":
    main()
