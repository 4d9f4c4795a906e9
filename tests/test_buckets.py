"""Paths in buckets, against an emulator: what is fetched, what is kept, and what cannot be."""

import sys
import time
from pathlib import Path

import bucket_emulator
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from vibejax import buckets, run_folder, train, weights
from vibejax.buckets import BucketError
from vibejax.checkpoint import Checkpoints
from vibejax.config.sft import SftConfig
from vibejax.locations import resolve
from vibejax.run_folder import Log, RunError


@pytest.fixture(scope="module")
def emulator():
    with bucket_emulator.serving() as variables:
        yield variables


@pytest.fixture
def cache(emulator, tmp_path, monkeypatch):
    """The emulator for this process, with nothing fetched before."""
    for name, value in (emulator | {"XDG_CACHE_HOME": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    buckets.fetch.cache_clear()
    return tmp_path / "cache" / "vibejax"


@pytest.fixture
def name(request):
    """A folder of the bucket for one test."""
    return f"gs://bucket/{request.node.name}"


def put(url, text="", path=None):
    if path is None:
        buckets._system().pipe_file(url.removeprefix("gs://"), text.encode())
    else:
        buckets.upload(path, url)


def there(url):
    """Name -> text of all objects of a folder."""
    found = buckets._objects(url)
    return {buckets._inside(url, p): buckets._system().cat_file(p).decode() for p in found}


def configured(out, resume="auto", **more):
    return SftConfig(policy="p", data="d", steps=1, out=out, resume=resume, **more)


# Inputs -----------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_for_each_version(cache, name):
    put(f"{name}/p.jsonl", "one")
    first = resolve(f"{name}/p.jsonl")
    assert first.name == "p.jsonl" and first.read_text() == "one"
    put(f"{name}/p.jsonl", "two")
    assert resolve(f"{name}/p.jsonl") == first, "a process sees one version"
    buckets.fetch.cache_clear()
    second = resolve(f"{name}/p.jsonl")
    assert (first.read_text(), second.read_text()) == ("one", "two")
    changed = second.stat().st_mtime_ns
    buckets.fetch.cache_clear()
    assert resolve(f"{name}/p.jsonl").stat().st_mtime_ns == changed, "it was there"


def test_of_a_run_the_model_is_fetched_and_no_checkpoints(cache, name):
    for inner in ("config.toml", "final/config.json", "checkpoints/2/state/d/x", "finally"):
        put(f"{name}/run/{inner}", "{}")
    put(f"{name}/run-2/final/config.json", "{}")  # whose name begins alike
    folder = weights.locate(f"{name}/run")
    assert folder.name == "final"
    found = {str(p.relative_to(folder.parent)) for p in folder.parent.rglob("*") if p.is_file()}
    assert found == {"config.toml", "final/config.json", "finally"}


def test_a_checkpoint_goes_from_bucket_to_bucket(cache, name, tmp_path, capsys):
    tiny.write_policy(tmp_path / "policy")
    for path in (tmp_path / "policy").iterdir():
        put(f"{name}/policy/{path.name}", path=path)
    weights.main(["import", f"{name}/policy", f"{name}/copy"])
    copy = weights.locate(f"{name}/copy")
    assert {p.name for p in copy.iterdir()} >= {"config.json", "tokenizer.json"}
    want = (tmp_path / "policy/model.safetensors").read_bytes()
    assert (copy / "model.safetensors").read_bytes() == want
    with pytest.raises(SystemExit):
        weights.main(["import", f"{name}/policy", f"{name}/copy"])
    assert f"{name}/copy: exists; choose another name" in capsys.readouterr().err


# Run folders ------------------------------------------------------------------------------------


def test_a_run_goes_on_from_another_disk(cache, name, tmp_path, monkeypatch):
    config = configured(f"{name}/run")
    folder = run_folder.open_run(config, "sft")
    assert {*there(f"{name}/run")} == {"config.toml"}, "with it a run has begun"
    with run_folder.kept(config, folder) as keep:
        log = Log(folder / "metrics.jsonl", 0)
        log.write(1, {"x": 1})
        (folder / "journal").mkdir()
        (folder / "journal/00000001-0-00000").write_text("sampled")
        (folder / "half.part").write_text("")
        keep()
        assert {*there(f"{name}/run")} == {
            "config.toml",
            "metrics.jsonl",
            "journal/00000001-0-00000",
        }
        log.write(2, {"x": 2})
        (folder / "journal/00000001-0-00000").unlink()
        (folder / "final").mkdir()
        (folder / "final/config.json").write_text("{}")
        log.close()
    assert {*there(f"{name}/run")} == {"config.toml", "metrics.jsonl", "final/config.json"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    folder = run_folder.open_run(config, "sft")
    assert folder.is_relative_to(tmp_path / "other")
    assert [row["x"] for row in run_folder.read_log(folder / "metrics.jsonl")] == [1, 2]
    assert not (folder / "final").exists(), "a run goes on without"
    with pytest.raises(RunError, match=r"gs://.*run: exists; choose another out"):
        run_folder.check_run(configured(f"{name}/run", resume=False))
    with pytest.raises(RunError, match=r"gs://.*: cannot resume with another configuration: seed"):
        run_folder.check_run(configured(f"{name}/run", seed=3))
    with pytest.raises(RunError, match=r"gs://.*nothing: has no config.toml"):
        run_folder.check_run(configured(f"{name}/nothing", resume=True))


def test_what_a_failing_run_wrote_is_kept(cache, name):
    config = configured(f"{name}/run")
    folder = run_folder.open_run(config, "sft")
    with pytest.raises(KeyError), run_folder.kept(config, folder):
        (folder / "metrics.jsonl").write_text("{}\n")
        raise KeyError
    assert there(f"{name}/run")["metrics.jsonl"] == "{}\n"


def test_a_process_leaves_the_files_of_others_alone(cache, name):
    url = f"{name}/run"
    for k in (0, 1):
        put(f"{url}/logs/process-{k}.log", "old")
        put(f"{url}/journal/00000001-0-0000{k}", "old")
    folder = buckets.work_folder(url, 1)
    buckets.restore(url, folder, 1)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"logs/process-1.log", "journal/00000001-0-00000", "journal/00000001-0-00001"}
    upload = buckets.Upload(url, folder)
    upload.begin()
    put(f"{url}/journal/00000001-0-00000", "new")  # by its process
    (folder / "logs/process-1.log").write_text("new")
    upload.sync()
    upload.close()
    found = there(url)
    assert found["journal/00000001-0-00000"] == found["logs/process-1.log"] == "new"
    assert found["journal/00000001-0-00001"] == found["logs/process-0.log"] == "old"


# Checkpoints ------------------------------------------------------------------------------------


def at(step):
    params = {"w": jnp.arange(256.0).reshape(64, 4) + step}
    return train.TrainState(jnp.array(step, jnp.int32), params, optax.sgd(1.0).init(params))


# A read that fails leaves tasks of Orbax behind, whose loop is closed when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_in_a_bucket_are_verified_and_fall_back(cache, name, capsys):
    place = buckets.checkpoints(name)
    states = {step: at(step) for step in (1, 2, 3)}
    checkpoints = Checkpoints(place, keep=2)
    for step, state in states.items():
        checkpoints.save(step, state)
    checkpoints.close()
    objects = buckets._objects(f"{name}/checkpoints")
    assert {buckets._inside(f"{name}/checkpoints", p).partition("/")[0] for p in objects} == {
        "2",
        "3",
    }
    (newest,) = {p for p in objects if "/checkpoints/3/state/d/" in p}
    content = bytearray(buckets._system().cat_file(newest))
    content[len(content) // 2] ^= 1
    buckets._system().pipe_file(newest, bytes(content))
    checkpoints = Checkpoints(place, keep=2)
    restored = checkpoints.restore_latest(states[1])
    np.testing.assert_array_equal(restored.params["w"], states[2].params["w"])
    assert "checkpoints/3: damaged: " in capsys.readouterr().err
    assert checkpoints.latest_step() == 2
    checkpoints.save(3, states[3])
    checkpoints.close()
    checkpoints = Checkpoints(place, keep=2)
    restored = checkpoints.restore_latest(states[1])
    np.testing.assert_array_equal(restored.params["w"], states[3].params["w"])
    checkpoints.close()
    assert any("/damaged-3-1/state/d/" in path for path in buckets._objects(name))


def test_what_cannot_be_reached_is_not_damaged():
    assert buckets.unreachable(ValueError("Error reading gs://b/x: UNAVAILABLE: try again"))
    try:
        raise OSError("Forbidden: https://storage") from None
    except OSError as cause:
        wrapped = RuntimeError("cannot restore")
        wrapped.__cause__ = cause
    assert buckets.unreachable(wrapped)
    assert not buckets.unreachable(ValueError("Error reading gs://b/x: DATA_LOSS: CRC-32C"))
    assert not buckets.unreachable(FileNotFoundError("b/x"))


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "out, message",
    [
        ("gs://forbidden/run", r"gs://forbidden/run: cannot be written: Forbidden: .*who@example"),
        ("gs://anonymous/run", r"cannot be written: Anonymous caller .*; credentials are those of"),
        ("gs://missing/run", r"gs://missing/run: cannot be written: no such bucket or object"),
    ],
)
def test_a_bucket_that_cannot_be_written_is_one_line(cache, out, message):
    began = time.monotonic()
    with pytest.raises(BucketError, match=message) as caught:
        run_folder.check_run(configured(out))
    assert "\n" not in str(caught.value) and time.monotonic() - began < 10


@pytest.mark.parametrize(
    "name, message",
    [
        ("gs://bucket/absent", "gs://bucket/absent: there is nothing of that name in the bucket"),
        ("gs://missing/absent", "gs://missing/absent: "),
        ("gs://forbidden/x", "gs://forbidden/x: cannot be read: Forbidden: "),
    ],
)
def test_an_input_that_cannot_be_read_is_one_line(cache, name, message):
    with pytest.raises(BucketError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_a_bucket_that_does_not_answer_is_given_up(cache, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:9")  # nobody listens
    monkeypatch.setattr(buckets, "ANSWER_S", 1)
    with pytest.raises(BucketError, match=r"cannot be written: no answer within 1 s"):
        buckets.require_writable("gs://bucket/run")


def test_without_gcsfs_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(buckets, "_system", buckets._system.__wrapped__)
    buckets.fetch.cache_clear()
    with pytest.raises(BucketError, match=r"need gcsfs: pip install 'vibejax\[tpu\]'"):
        resolve("gs://bucket/x")


def test_what_only_goes_to_disk_is_refused():
    with pytest.raises(BucketError, match="must be a path on disk"):
        buckets.on_disk("gs://bucket/pipeline")
    assert buckets.on_disk("a/b") == Path("a/b")
