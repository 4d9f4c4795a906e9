"""Files and shards as written, and folders that appear whole or not at all."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import safetensors.numpy
from hf_folder import SETTINGS, make_tensors, read_folder, write_folder

from vibejax import safetensors_folder, weights
from vibejax.weights import CheckpointError


def test_shards_and_index_are_complete(tmp_path):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"))
    weights.convert(src, tmp_path / "dst", None, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "dst/model.safetensors.index.json").read_text())
    tensors = read_folder(tmp_path / "dst")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for file in (tmp_path / "dst").glob("*.safetensors"):
        held = safetensors.numpy.load_file(file)
        assert {name for name, f in index["weight_map"].items() if f == file.name} == held.keys()
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 30_000


def test_a_write_that_fails_leaves_the_last_export(tmp_path):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"))
    weights.convert(src, tmp_path / "dst", None)
    before = {file.name: file.read_bytes() for file in (tmp_path / "dst").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, hard))  # as a full disk: writing fails
    try:
        with pytest.raises(CheckpointError, match=r"dst: not written, File too large \(0.00 GB to"):
            weights.convert(src, tmp_path / "dst", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {file.name: file.read_bytes() for file in (tmp_path / "dst").iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src"]


def test_an_export_replaces_an_export_and_nothing_else(tmp_path):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"))
    for leftover in (".dst.00ff.partial", ".dst.old"):  # of processes that were killed
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "config.json").write_text("{}")
    weights.convert(src, tmp_path / "dst", None)
    (tmp_path / "dst/stale").touch()
    weights.convert(src, tmp_path / "dst", None)
    assert not (tmp_path / "dst/stale").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src"]
    with safetensors_folder.published(tmp_path / "dst", 0) as folder:  # while another writes
        weights.convert(src, tmp_path / "dst", None)
        (folder / "config.json").write_text("the last")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src"]
    assert (tmp_path / "dst/config.json").read_text() == "the last"
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").touch()
    with pytest.raises(CheckpointError, match="home: exists and is no export; name a new folder"):
        weights.convert(src, tmp_path / "home", None)
    assert (tmp_path / "home/thesis.tex").exists()


EXPORTS = """
import sys
from pathlib import Path
from vibejax import safetensors_folder
for _ in range(200):
    with safetensors_folder.published(Path(sys.argv[1]), 0) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("")
"""


def test_exports_of_two_processes_to_one_folder_are_whole(tmp_path):
    command = [sys.executable, "-c", EXPORTS, str(tmp_path / "dst")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(p.communicate()[1], p.returncode) for p in processes] == [(b"", 0)] * 2
    assert [file.name for file in tmp_path.iterdir()] == ["dst"]
    assert len([*(tmp_path / "dst").iterdir()]) == 2


def test_one_file_counts_beside_the_shards_of_an_earlier_save(tmp_path):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"))
    old = {name: 0 * w for name, w in make_tensors(SETTINGS, "float32").items()}
    write_folder(tmp_path / "old", SETTINGS, old)
    weights.convert(tmp_path / "old", tmp_path / "dst", None, max_shard_bytes=30_000)
    shutil.copyfile(src / "model.safetensors", tmp_path / "dst/model.safetensors")
    weights.convert(tmp_path / "dst", tmp_path / "again", None)
    for name, held in read_folder(src).items():
        assert (read_folder(tmp_path / "again")[name] == held).all()


@pytest.mark.parametrize("shard", ["../src/model.safetensors", "..", "", 3])
def test_a_shard_that_is_no_file_of_the_folder_is_named(shard, tmp_path):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"))
    (src / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": shard}}
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"shard .* must be a file in the same folder"):
        weights.convert(src, tmp_path / "dst", None)
