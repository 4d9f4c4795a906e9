"""Real processes as the hosts of a run: they find each other, are alike, and train as one would."""

import json
import signal
import time

import bucket_emulator
import processes
import pytest

from vibejax import distributed
from vibejax.distributed import Place, StartError

# Joins the processes of a run with a configuration of `sys.argv[1]`, and does `sys.argv[2]`.
SCRIPT = """
import json, os, sys
from vibejax import distributed
from vibejax.config.mesh import MeshConfig
from vibejax.config_file import InputError, errors_in_one_line
process = int(os.environ["VIBEJAX_PROCESS"])
with errors_in_one_line(), distributed.joined(MeshConfig(data=eval(sys.argv[1]))):
    exec(sys.argv[2])
"""


def joined(data: str, do: str, count: int = 2):
    started = processes.start(["-c", SCRIPT, data, do], count, 1)
    return processes.outcomes(started, 100)


def test_processes_tell_each_other():
    do = """
told = [distributed.gather([process, 0.1, None]), distributed.from_first(lambda: process)]
distributed.announce("once")
print(json.dumps(told), distributed.first())
"""
    ended = joined("1", do, 3)
    assert [code for code, *_ in ended] == [0, 0, 0], ended
    want = json.dumps([[[0, 0.1, None], [1, 0.1, None], [2, 0.1, None]], 0])
    printed = [stdout for _, stdout, _ in ended]
    assert printed == [f"once\n{want} True\n", f"{want} False\n", f"{want} False\n"]


def test_different_configurations_stop_all_and_are_named():
    ended = joined("1 + process", "raise AssertionError")
    assert [code for code, *_ in ended] == [1, 1]
    for _, _, stderr in ended:
        assert stderr == "error: process 1 differs from process 0: data: 1 -> 2\n"


def test_what_stops_one_process_stops_the_others():
    do = """
if process:
    raise InputError("task.jsonl: no such file")
distributed.gather(None)
"""
    zero, one = joined("1", do)
    assert zero[::2] == (1, "error: process 1: task.jsonl: no such file\n")
    assert one[::2] == (1, "error: task.jsonl: no such file\n")


def test_a_missing_coordinator_is_one_line():
    address = processes.free_address()
    environment = {"VIBEJAX_COORDINATOR": address, "VIBEJAX_PROCESSES": "2",
                   "VIBEJAX_PROCESS": "1", "VIBEJAX_START_S": "1"}  # fmt: skip
    started = processes.start(["-c", SCRIPT, "1", "pass"], 1, 1, **environment)
    ((code, _, stderr),) = processes.outcomes(started, 100)
    assert code == 1
    named = f"error: process 1 of 2, coordinator {address}: no coordinator answers ("
    assert stderr.startswith(named)
    assert stderr.endswith(" within 1 s (VIBEJAX_START_S)\n") and stderr.count("\n") == 1


CHECKPOINTS = """
import jax, numpy as np, optax, pathlib
from vibejax import sharding, train
from vibejax.checkpoint import Checkpoints
folder = pathlib.Path(FOLDER)
mesh = sharding.make_mesh({"fsdp": 2}, jax.devices())

def placed(x, *axes):
    x, spec = np.asarray(x), jax.sharding.PartitionSpec(*axes)
    given = jax.sharding.NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, given, lambda index: x[index])

def at(step):
    params = {"w": placed(np.arange(4096.0, dtype=np.float32).reshape(64, 64) + step, "fsdp")}
    return train.TrainState(placed(np.int32(step)), params, optax.sgd(1.0).init(params))

with jax.set_mesh(mesh):
    checkpoints = Checkpoints(folder, keep=3)
    for step in (1, 2):
        checkpoints.save(step, at(step))
    checkpoints.close()
    distributed.gather(None)
    if process == 0:
        (largest,) = sorted((folder / "2/state/ocdbt.process_1/d").iterdir(),
                            key=lambda path: path.stat().st_size)[-1:]
        largest.write_bytes(b"")
    distributed.gather(None)
    checkpoints = Checkpoints(folder, keep=3)
    state = checkpoints.restore_latest(at(0))
    for was, now in zip(at(1).params["w"].addressable_shards, state.params["w"].addressable_shards):
        assert (np.asarray(was.data) == np.asarray(now.data)).all()
    checkpoints.save(2, at(2))
    checkpoints.close()
    print(int(state.step), *sorted(path.name for path in folder.iterdir()))
"""


def test_processes_agree_which_checkpoint_is_whole(tmp_path):
    """Only one of them reads what is damaged."""
    do = CHECKPOINTS.replace("FOLDER", repr(str(tmp_path)))
    for process, (code, stdout, stderr) in enumerate(joined("2", do)):
        assert (code, stdout) == (0, "1 1 2 damaged-2-1\n"), stderr
        why = "another process says so" if process == 0 else "its state cannot be read ("
        assert f"2: damaged: {why}" in stderr
        assert "now damaged-2-1, the checkpoint before it is taken" in stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    processes.prepare(folder)
    return folder


SETTINGS = ("mesh.fsdp=1", "mesh.tensor=1", "steps=2")


@pytest.fixture(scope="module")
def two(folder):
    """A run of two processes, undisturbed: its folder, and what each printed."""
    return processes.train_rl(folder, 2, 1, 300, *SETTINGS, "mesh.context=2")


def test_two_processes_train_as_one_does(folder, two):
    """Every row lies on both hosts. More devices a host: tests/benchmarks/hosts.py.

    (Devices of one CPU process wait for each other in threads, of which a small machine has too
    few when it is busy.)
    """
    one, _ = processes.train_rl(folder, 1, 1, 300, *SETTINGS, "mesh.context=1")
    two, printed = two
    first, other = (processes.rows_of(out, "samples.jsonl") for out in (one, two))
    assert [row["prompt"] for row in first] == [row["prompt"] for row in other]
    assert first[:4] == other[:4]  # of step 1, before any rounding could make a difference
    assert processes.apart(folder, one, two) < 1e-3
    assert [row["step"] for row in processes.rows_of(two, "metrics.jsonl")] == [0, 1, 2]
    names = [row.keys() for row in processes.rows_of(one, "metrics.jsonl")]
    assert names == [row.keys() for row in processes.rows_of(two, "metrics.jsonl")]
    assert "held-out pass@1" in printed[0] and not printed[1]
    logs = [(two / f"logs/process-{process}.log").read_text() for process in (0, 1)]
    assert all(f"process {k} of 2, 1 x cpu" in log for k, log in enumerate(logs))
    assert all("step 2: 2 prompts" in log for log in logs)
    assert (two / "final/model.safetensors").read_bytes()


def test_two_processes_go_on_from_a_bucket(folder, two, tmp_path):
    """Killed after the first step, on machines whose disks are new when they start again."""
    options = ("out=gs://bucket/run", *SETTINGS, "mesh.context=2", "resume=auto",
               "checkpoint.every=1")  # fmt: skip
    with bucket_emulator.serving() as emulator:

        def begin(disk):
            disk = {"XDG_CACHE_HOME": str(tmp_path / disk)}
            return processes.start_rl(folder, 2, 1, *options, **disk, **emulator)

        started = begin("first")
        limit = time.monotonic() + 300
        while not any("/1/" in n for n in bucket_emulator.names(emulator, "run/checkpoints/")):
            assert time.monotonic() < limit and not any(p.poll() for p in started)
            time.sleep(0.05)
        for process in started:
            process.send_signal(signal.SIGKILL)
        processes.outcomes(started, 60)
        ended = processes.outcomes(begin("second"), 300)
        assert [code for code, _, _ in ended] == [0, 0], ended[0][2][-3_000:]
        metrics = bucket_emulator.content(emulator, "run/metrics.jsonl").decode()
        assert [json.loads(line)["step"] for line in metrics.splitlines()] == [0, 1, 2]
        assert {"run/logs/process-0.log", "run/logs/process-1.log"} <= {
            *bucket_emulator.names(emulator, "run/logs/")
        }
        final = bucket_emulator.content(emulator, "run/final/model.safetensors")
    assert final == (two[0] / "final/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        ({"VIBEJAX_COORDINATOR": "", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, None),
        (
            {"VIBEJAX_COORDINATOR": "h:1", "VIBEJAX_PROCESSES": "4", "VIBEJAX_PROCESS": "3"},
            Place("h:1", 4, 3),
        ),
        *(
            (
                {"SLURM_JOB_ID": "5000", "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_NUM_NODES": "3",
                 "SLURM_NTASKS": "3", "SLURM_PROCID": "2"},
                Place(f"{first}:62344", 3, 2),  # 61440 + 5000 - 4096
            )
            for nodes, first in (
                ("gpu[003-004,9],x", "gpu003"), ("gpu7,gpu8,x", "gpu7"), ("a[1,3-4]", "a1"),
            )
        ),
    ],
)  # fmt: skip
def test_the_environment_says_which_process_this_is(environment, place):
    assert distributed.place_from(environment) == place


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"VIBEJAX_PROCESS": "0"}, "VIBEJAX_PROCESS: needs VIBEJAX_COORDINATOR, VIBEJAX_PROCESSES"),
        (
            {"VIBEJAX_COORDINATOR": "h", "VIBEJAX_PROCESSES": "1", "VIBEJAX_PROCESS": "0"},
            "VIBEJAX_COORDINATOR = 'h': must be HOST:PORT",
        ),
        (
            {"VIBEJAX_COORDINATOR": "h:1", "VIBEJAX_PROCESSES": "two", "VIBEJAX_PROCESS": "0"},
            "VIBEJAX_PROCESSES = 'two': must be a whole number",
        ),
        (
            {"VIBEJAX_COORDINATOR": "h:1", "VIBEJAX_PROCESSES": "2", "VIBEJAX_PROCESS": "2"},
            "VIBEJAX_PROCESS = 2: must be below VIBEJAX_PROCESSES = 2",
        ),
        (
            {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_NODES": "1",
             "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
            "SLURM started 8 tasks on 1 nodes: .* ask for --ntasks-per-node=1",
        ),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_be_is_named(environment, message):
    with pytest.raises(StartError, match=message):
        distributed.place_from(environment)


def test_the_digest_of_the_code_sees_content_names_and_what_is_linked(tmp_path):
    kernels, code = tmp_path / "kernels", tmp_path / "code"
    for folder in (kernels, code):
        folder.mkdir()
    (code / "kernels").symlink_to(kernels)
    digests = [distributed.code_digest(code)]
    for path, text in ((code / "a.py", "x = 1"), (code / "a.py", "x = 2"), (kernels / "b.py", "")):
        path.write_text(text)
        digests.append(distributed.code_digest(code))
    (code / "a.py").rename(code / "c.py")
    digests.append(distributed.code_digest(code))
    assert len(set(digests)) == 5
    (code / "a.txt").write_text("not code")
    assert distributed.code_digest(code) == digests[-1]
