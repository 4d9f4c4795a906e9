"""Kills at random moments of a run: `python tests/benchmarks/chaos.py [--processes 2]`.

The tiny policy of the tests, with refills, two updates a step, held-out evaluations and a
checkpoint every third of 30 steps. One of its processes, or all, are killed by SIGKILL, or one is
asked to end by SIGTERM; of several one is frozen by SIGSTOP, too. All then have to end by
themselves, within 25 s of SIGTERM and else within a minute of `watchdog_s`, and are started again
by the same command, until all kills are spent and the run is complete. Then its parameters and
optimizer state, its final model and its metrics (but for time/*) must be, bit for bit, those of a
run that was left alone, with no step lost or doubled; SIGTERM must have ended every process with
143; completions must have been taken from the journal. Prints one row; exits with 1 where one of
these is not so.

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
import processes
import tiny

from vibejax import weights
from vibejax.checkpoint import Checkpoints
from vibejax.metrics import VARYING
from vibejax.run_folder import read_log

STEPS, GRACE_S, WATCHDOG_S = 30, 25, 30
TOML = """
policy = "{folder}/policy"
prompts = "{folder}/task.jsonl"
heldout = "{folder}/task.jsonl"
resume = "auto"
steps = 30
watchdog_s = 30
[mesh]
fsdp = {processes}
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


def start(folder: Path, out: Path, count: int) -> list[subprocess.Popen]:
    """The run's processes, whose compiled programs and log lie in `folder`."""
    found = {"VIBEJAX_COORDINATOR": processes.free_address(), "VIBEJAX_PROCESSES": str(count)}
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "vibejax.rl", str(folder / "rl.toml"), "--set", f"out={out}"]
    with (folder / "log").open("a") as log:
        return [
            subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment | (found | {"VIBEJAX_PROCESS": str(i)} if count > 1 else {}),
            )
            for i in range(count)
        ]


def run_in_chaos(
    folder: Path, out: Path, count: int, attacks: list[str], whole_s: float, draw: random.Random
) -> tuple[collections.Counter, collections.Counter]:
    """Runs, attacks and starts again.

    Returns:
        how often an attack ended the processes with which codes, and the longest seconds from an
        attack of each kind to the end of the last process.
    """
    ends: collections.Counter = collections.Counter()
    slowest_s: collections.Counter = collections.Counter()
    while True:
        run = start(folder, out, count)
        if attacks:
            # After some rows, so that the attacks are spread over the run; or while it starts.
            before = rows(out)
            ahead = int(draw.uniform(0, 2 * (STEPS - before) / len(attacks)))
            deadline = time.monotonic() + (1.0 if ahead else draw.uniform(0, 0.2)) * whole_s
            while alive(run) and time.monotonic() < deadline:
                if ahead and rows(out) >= before + ahead:
                    break
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
        if attacks and len(alive(run)) == count:
            attack = attacks.pop()
            began = time.monotonic()
            for process in run if attack == "SIGKILL of all" else [draw.choice(run)]:
                process.send_signal(getattr(signal, attack.split()[0]))
            limit = began + (GRACE_S if attack == "SIGTERM of one" else WATCHDOG_S + 60)
            frozen = attack == "SIGSTOP of one"
            while len(alive(run)) > frozen and time.monotonic() < limit:
                time.sleep(0.01)
            slowest_s[attack] = max(slowest_s[attack], time.monotonic() - began)
        else:
            attack = "none"
            while alive(run):
                time.sleep(0.1)
        for process in alive(run):
            process.kill()
        codes = sorted(process.wait() for process in run)
        ends[f"{attack}: {codes}"] += 1
        print(f"{rows(out):3} rows, {len(attacks)} to come, {dict(ends)}", file=sys.stderr)
        if attack == "none":
            if any(codes):
                raise SystemExit(
                    f"a run that nobody killed ended: {(folder / 'log').read_text()[-3000:]}"
                )
            return ends, slowest_s


def alive(run: list[subprocess.Popen]) -> list[subprocess.Popen]:
    return [process for process in run if process.poll() is None]


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
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    kinds = ["SIGKILL of all", "SIGTERM of one"]
    if args.processes > 1:
        kinds.append("SIGKILL of one")
    attacks = (kinds * args.kills)[: args.kills]
    if args.processes > 1:
        attacks.append("SIGSTOP of one")
    draw.shuffle(attacks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.write_policy(folder / "policy")
        tiny.write_task(folder / "task.jsonl", RECORDS)
        (folder / "rl.toml").write_text(TOML.format(folder=folder, processes=args.processes))
        alone, chaos = folder / "alone", folder / "chaos"
        began = time.monotonic()
        if any([process.wait() for process in start(folder, alone, args.processes)]):
            raise SystemExit((folder / "log").read_text())
        whole_s = time.monotonic() - began
        ends, slowest_s = run_in_chaos(folder, chaos, args.processes, attacks, whole_s, draw)
        found = read_log(chaos / "metrics.jsonl")
        struck = sum(times for end, times in ends.items() if not end.startswith("none"))
        checks = {
            "state_identical": state_digests(chaos) == state_digests(alone),
            "final_identical": final_is_the_same(chaos, alone),
            "metrics_identical": metrics(chaos) == metrics(alone),
            "steps_once_each": [row["step"] for row in found] == list(range(STEPS + 1)),
            "sigterm_exits_143": all(
                set(json.loads(end.split(": ")[1])) in ({143}, {0})
                for end in ends
                if end.startswith("SIGTERM")
            ),
            "ends_in_time": all(
                seconds < (GRACE_S if attack.startswith("SIGTERM") else WATCHDOG_S + 60)
                for attack, seconds in slowest_s.items()
            ),
            "journal_reused": sum(row.get("time/journaled", 0) for row in found) > 0,
        }
        kept = sorted(int(p.name) for p in (chaos / "checkpoints").iterdir() if p.name.isdigit())
        row = {
            "benchmark": "chaos",
            "case": f"{struck} attacks, {STEPS} steps, {args.processes} processes",
            "ours": sum(checks.values()),
            "peer": len(checks),
            "ratio": sum(checks.values()) / len(checks),
            "unit": "checks that hold",
            "higher_is_better": True,
            **checks,
            "ends": dict(ends),
            "slowest_end_s": {attack: round(seconds, 2) for attack, seconds in slowest_s.items()},
            "journaled_completions": sum(row.get("time/journaled", 0) for row in found),
            "checkpoints": kept,
            "seconds_alone": round(whole_s, 1),
            "seconds": round(time.monotonic() - began, 1),
        }
        print(json.dumps(row))
    sys.exit(not all(checks.values()))


if __name__ == "__main__":
    main()
