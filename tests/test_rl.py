"""The RL stage as its users run it: processes, kills, resumes, bad input."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import bucket_emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vibejax import buckets, rl, run_folder, weights
from vibejax.metrics import VARYING

STEPS = 6
TOML = """
policy = "{policy}"
prompts = "{task}"
heldout = "{task}"
steps = 6
[rollout]
prompts_per_step = 4
group_size = 4
refills = 1
max_prompt_tokens = 8
max_completion_tokens = 12
slots = 16
[optimizer]
learning_rate = 1e-2
[train]
row_tokens = 32
microbatch_rows = 8
[eval]
every = 2
prompts = 8
[checkpoint]
every = 2
"""
# A random policy is never right; half of all one-digit answers are, so that there is a gradient.
RECORDS = [
    {"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": "1", "last_number": True}
    for a in range(3)
    for b in range(4)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    tiny.write_policy(folder / "policy")
    tiny.write_task(folder / "task.jsonl", RECORDS)
    toml = TOML.format(policy=folder / "policy", task=folder / "task.jsonl")
    (folder / "rl.toml").write_text(toml)
    return folder


def command(folder, out, *settings):
    pairs = [f"out={out}", *settings]
    options = [part for pair in pairs for part in ("--set", pair)]
    return [sys.executable, "-m", "vibejax.rl", str(folder / "rl.toml"), *options]


def environment(folder):
    """All runs of this file compile the same programs: the second finds them where the first left
    them, as on a pod that restarts.
    """
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in conftest.py
    }


def run(folder, out, *settings, **options):
    return subprocess.run(
        command(folder, out, *settings),
        capture_output=True, text=True, env=environment(folder), **options,
    )  # fmt: skip


def metrics(out):
    """The rows of a run without what differs from run to run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in rows]


def reused(out):
    """Completions that the run took from its journal, in all steps that it has finished."""
    rows = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return sum(row.get("time/journaled", 0) for row in rows)


def final(out):
    config = weights.load_config(out / "final")
    return jax.device_get(weights.load_params(out / "final", config, None, jnp.float32))


@pytest.fixture(scope="module")
def uninterrupted(folder):
    out = folder / "uninterrupted"
    done = run(folder, out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_run_leaves_its_record(folder, uninterrupted):
    out, done = uninterrupted
    assert done.stdout.splitlines()[-1].startswith("held-out pass@1: ")
    assert "\ntrainer memory of a device: weights " in done.stdout
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "heldout/pass@1" in row] == [0, 2, 4, 6]
    trained = [row for row in rows if "agreement/mean_abs_dlogp" in row]
    assert trained, "no step had a mixed group: the test proves nothing"
    assert max(row["agreement/mean_abs_dlogp"] for row in trained) < 1e-5
    assert max(row["agreement/max_abs_dlogp"] for row in trained) < 1e-3
    assert sum(row["rollout/refilled"] for row in rows[1:]) > 0
    for row in rows[1:]:
        shares = ("groups_all_right", "groups_all_wrong", "groups_mixed")
        np.testing.assert_allclose(sum(row[f"rollout/{s}"] for s in shares), 1.0)
        counts = {name: n for name, n in row.items() if name.startswith("verifier/")}
        assert sum(counts.values()) == 16 and {"verifier/correct", "verifier/timeout"} <= {*counts}
    assert list((out / "tensorboard").iterdir())
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "completion", "ground_truth", "outcome"} <= samples[0].keys()


def test_all_of_the_time_is_accounted_for(uninterrupted):
    rows = run_folder.read_log(uninterrupted[0] / "metrics.jsonl")
    for row in rows[1:]:
        shares = {k.removeprefix("goodput/"): v for k, v in row.items() if k.startswith("goodput/")}
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(shares[name] > 0 for name in ("rollout", "train", "handover", "idle"))
    assert rows[1]["goodput/compile"] > 0.1  # where the programs come from, or the cache's files
    assert [row["step"] for row in rows[1:] if row["goodput/save"] > 0] == [3, 5]  # of 2 and 4


def test_training_changed_the_weights(folder, uninterrupted):
    before = final_of_policy(folder)
    after = final(uninterrupted[0])
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def final_of_policy(folder):
    config = weights.load_config(folder / "policy")
    return jax.device_get(weights.load_params(folder / "policy", config, None, jnp.float32))


def checkpoint_arrays(out):
    """All arrays of the newest checkpoint: step, parameters, optimizer state."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((out / "checkpoints").absolute()) as manager:
        arrays = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(manager.latest_step(), args=arrays).state


@pytest.mark.parametrize("moment", ["start", "sampling", "saving"])
def test_killed_and_resumed_equals_uninterrupted(folder, uninterrupted, moment):
    """kill -9, and everything after the resume is bit for bit that of the run left alone."""
    out = folder / f"killed-{moment}"
    process = subprocess.Popen(
        command(folder, out), stderr=subprocess.DEVNULL, env=environment(folder)
    )
    wait_for = {
        "start": lambda: rows_written(out) >= 1,  # before any checkpoint
        "sampling": lambda: rows_written(out) >= 4,  # after the checkpoint of step 2
        "saving": lambda: any((out / "checkpoints").glob("4*")),  # its folder, finished or not
    }[moment]
    deadline = time.monotonic() + 120
    while not wait_for() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = (out / "checkpoints/4").exists()  # on a busy machine the kill comes late
    assert not (out / "final").exists()
    done = run(folder, out, "resume=true", "profile.steps=[6]")
    assert done.returncode == 0, done.stderr
    assert_same(out, uninterrupted[0])
    assert list((out / "profile" / "step-000006").rglob("*.xplane.pb"))
    if moment == "sampling" and not saved:
        assert reused(out) >= 16, "step 3 was sampled before the kill, and is not in a checkpoint"


def assert_same(out, other):
    assert metrics(out) == metrics(other)
    jax.tree.map(np.testing.assert_array_equal, checkpoint_arrays(out), checkpoint_arrays(other))
    jax.tree.map(np.testing.assert_array_equal, final(out), final(other))
    assert not list((out / "journal").iterdir()), "a finished run has nothing to go on with"


def test_sigterm_twice_and_the_same_command_again(folder, uninterrupted):
    """Exit code 143, one line, and resume = "auto" goes on; the step's rollout is not done anew."""
    out = folder / "preempted"
    process = subprocess.Popen(
        command(folder, out, "resume=auto"), stderr=subprocess.PIPE, text=True,
        env=environment(folder),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while rows_written(out) < 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    began = time.monotonic()
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 25
    lines = [line for line in stderr.splitlines() if "SIGTERM" in line]
    assert lines == ["ended by SIGTERM; the same command goes on, with resume set"]
    assert not (out / "final").exists() and "Traceback" not in stderr
    saved = (out / "checkpoints/4").exists()
    done = run(folder, out, "resume=auto")
    assert done.returncode == 0, done.stderr
    assert_same(out, uninterrupted[0])
    assert saved or reused(out) >= 16


def test_in_a_bucket_killed_ended_and_resumed_from_empty_disks(folder, uninterrupted, monkeypatch):
    """Policy, prompts and run folder in a bucket; what is there alone gives the run on disk."""
    with bucket_emulator.serving() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        system = buckets._system()
        for path in [*(folder / "policy").iterdir(), folder / "task.jsonl"]:
            system.put_file(str(path), f"bucket/{path.relative_to(folder)}")
        settings = ("policy=gs://bucket/policy", "prompts=gs://bucket/task.jsonl",
                    "heldout=gs://bucket/task.jsonl", "resume=auto")  # fmt: skip
        for disk, number in (("first", signal.SIGKILL), ("second", signal.SIGTERM)):
            monkeypatch.setenv("XDG_CACHE_HOME", str(folder / disk))
            process = subprocess.Popen(
                command(folder, "gs://bucket/run", *settings), stderr=subprocess.PIPE, text=True,
                env=environment(folder),
            )  # fmt: skip
            deadline = time.monotonic() + 240
            while process.poll() is None:  # until step 3 is done, after the checkpoint of step 2
                works = [*(folder / disk).glob("vibejax/runs/*")]
                if works and rows_written(works[0]) >= 4:
                    break
                assert time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
            assert process.returncode == (143 if number == signal.SIGTERM else -9), stderr
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "third"))
        done = run(folder, "gs://bucket/run", *settings)
        assert done.returncode == 0, done.stderr
        out = folder / "from_bucket"
        system.get("bucket/run/", str(out), recursive=True)
        (out / "journal").mkdir(exist_ok=True)  # buckets have no empty folders
        assert_same(out, uninterrupted[0])
        assert (out / "heldout.jsonl").read_text() == (
            uninterrupted[0] / "heldout.jsonl"
        ).read_text()
        assert reused(out) >= 16, "of step 3, which the process that was asked to end had sampled"


def rows_written(out):
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def test_resume_of_a_finished_run_changes_nothing(folder, uninterrupted):
    out = uninterrupted[0]
    before = metrics(out)
    done = run(folder, out, "resume=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("held-out pass@1: ")
    assert metrics(out) == before


@pytest.mark.parametrize(
    "settings, message",
    [
        (["resume=true", "seed=3"], "cannot resume with another configuration: seed: 0 -> 3"),
        ([], "exists; choose another out, or go on with resume = true"),
        (["out=nowhere", "resume=true"], "has no config.toml, so there is no run to resume"),
        (["rollout.max_completion_tokens=99", "train.row_tokens=128", "out=x"], "= 107 is more th"),
        (["prompts=missing.jsonl", "out=x", "mesh.data=8"], "missing.jsonl: no such file"),
        (["policy=missing", "out=x"], "missing: no such file or folder"),
        (["policy=../damaged", "out=x", "mesh.data=8"], "damaged or truncated"),
        (["attention.implementation=tpu", "out=x", "mesh.data=8"], "= 'tpu': the devices are cpu"),
        (["rollout.attention=gpu", "out=x"], "rollout.attention = 'gpu': the devices are cpu"),
        (
            ["rollout.prompts_per_step=13", "out=x", "mesh.data=8"],
            "12 prompts, fewer than rollout.",
        ),
        (
            ["rollout.pool_tokens=8", "rollout.page_tokens=4", "out=x", "mesh.data=8"],
            "the longest prompt: its 4 tokens and 12 more need 4 pages of 4, a device has 1",
        ),
        (["mesh.fsdp=3", "out=x"], "fsdp=3 x context=1 x tensor=1 needs 3 devices, found 8"),
        (
            ["curriculum_steps=2", "out=x", "mesh.data=8"],
            "prompt 1: a curriculum needs its 'accuracy' between 0 and",
        ),
        (["train.microbatch_rows=0"], "train.microbatch_rows = 0: must be greater than"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_one_line(
    folder, uninterrupted, tmp_path, monkeypatch, capfd, settings, message
):
    shutil.copytree(folder / "policy", tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", command(folder, uninterrupted[0], *settings)[2:])
    with pytest.raises(SystemExit) as ended:
        rl.main()
    stderr = capfd.readouterr().err
    assert ended.value.code not in (0, None)
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert not list((tmp_path / "here").iterdir()), "a run that cannot start leaves no folder"


def test_a_process_that_cannot_start_says_so_and_fails(folder, uninterrupted):
    done = run(folder, uninterrupted[0])
    assert done.returncode == 1
    assert done.stderr.strip().endswith("choose another out, or go on with resume = true")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_options_of_the_objective_run_together(folder, tmp_path):
    options = ["drop_solved=true", "objective.kl=0.1", "objective.updates=2", "steps=5",
               "objective.long2short=0.2", "objective.gamma=0", "heldout=",
               "objective.correction=geometric_mask", "objective.aggregation=token",
               "rollout.group_size=32", "objective.mask_truncated=true",
               "rollout.prompts_per_step=2"]  # fmt: skip
    done = run(folder, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert 0 < len(json.loads((tmp_path / "out/kept_prompts.json").read_text())) < len(RECORDS)
    kl = [row["policy/reference_kl"] for row in metrics(tmp_path / "out")[1:]]
    assert kl[-1] > 0  # the policy has moved away from where it began


def test_a_fresh_run_gets_a_numbered_folder(folder, tmp_path):
    for number in (1, 2):
        done = run(folder, '""', "steps=1", "heldout=", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"runs/rl-000{number}/final/model.safetensors").is_file()


def test_numbers_that_are_not_finite_stop_the_run(folder, tmp_path):
    """The step after a step so large that nothing can be computed any more."""
    out = tmp_path / "out"
    done = run(folder, out, "optimizer.learning_rate=1e30", "steps=40", "heldout=")
    assert done.returncode == 1, done.stderr
    assert re.match(r"error: step \d+: .* not finite", done.stderr.strip().splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not (out / "final").exists()


def test_a_full_disk_keeps_the_last_good_checkpoint(folder, tmp_path):
    """Once three steps are done no file may pass 64 KiB: the save of step 4 fails."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(folder, out), stderr=subprocess.PIPE, text=True,
        env=environment(folder),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while rows_written(out) < 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (65536, 65536))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stderr
    # The writer's own threads may print of other files at the same time, into the same line.
    assert "the last good one stays" in stderr
    done = run(folder, out, "resume=true")
    assert done.returncode == 0, done.stderr
