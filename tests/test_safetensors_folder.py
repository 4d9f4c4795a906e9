"""Files and shards as written, and folders that appear whole or not at all."""

import json
import resource

import pytest
import safetensors.numpy
from hf_folder import SETTINGS, make_tensors, read_folder, write_folder

from vibejax import weights
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
    for leftover in (".dst.partial", ".dst.old"):  # of processes that were killed
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "config.json").write_text("{}")
    weights.convert(src, tmp_path / "dst", None)
    (tmp_path / "dst/stale").touch()
    weights.convert(src, tmp_path / "dst", None)
    assert not (tmp_path / "dst/stale").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dst", "src"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").touch()
    with pytest.raises(CheckpointError, match="home: exists and is no export; name a new folder"):
        weights.convert(src, tmp_path / "home", None)
    assert (tmp_path / "home/thesis.tex").exists()
