"""Checkpoints that are not there, not whole, or of another kind: one line each."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hf_folder import SETTINGS, assert_same, command, make_tensors, read_folder, write_folder

from vibejax import weights
from vibejax.config_file import InputError
from vibejax.weights import CheckpointError


def test_locate_finds_folders_files_runs_and_packages(tmp_path, monkeypatch):
    src = write_folder(tmp_path / "run/final", SETTINGS, make_tensors(SETTINGS, "float32"))
    assert weights.locate(str(tmp_path / "run")) == src
    assert weights.locate(str(src)) == src
    (tmp_path / "model.gguf").touch()
    assert weights.locate(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    package = tmp_path / "weights_package"
    write_folder(package / "policy", SETTINGS, {})
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert weights.locate("package:weights_package/policy") == package / "policy"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        (".", "neither an HF folder .config.json. nor a run .final/."),
        ("package:no_such_package/x", "no installed Python package 'no_such_package'"),
        ("package:vibejax/../tests", "with a path inside the package"),
        ("package:vibejax//etc/passwd", "with a path inside the package"),
        ("package:vibejax", "with a path inside the package"),
        ("package:vibejax.kernels/x", "no installed Python package 'vibejax.kernels'"),
    ],
)
def test_locate_names_what_is_not_there(model, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        weights.locate(model)


def test_a_tied_head_is_accepted_only_as_a_copy(tmp_path):
    settings = SETTINGS | {"tie_word_embeddings": True}
    tensors = make_tensors(settings, "float32")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    src = write_folder(tmp_path / "equal", settings, tensors | head)
    weights.convert(src, tmp_path / "dst", None)
    assert_same(read_folder(tmp_path / "dst"), tensors)
    halves = make_tensors(settings, "bfloat16")
    wide = {"lm_head.weight": halves["model.embed_tokens.weight"].astype(np.float32)}
    weights.convert(write_folder(tmp_path / "wide", settings, halves | wide), tmp_path / "w", None)
    assert_same(read_folder(tmp_path / "w"), halves)
    head["lm_head.weight"][-1, -1] += 1
    src = write_folder(tmp_path / "other", settings, tensors | head)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head.weight"):
        weights.convert(src, tmp_path / "dst2", None)


# Bad input: what is done to a good folder of two shards, and what the one line says.


def _without(name):
    return lambda settings, tensors: tensors.pop(name)


def _settings(**changes):
    return lambda settings, tensors: settings.update(changes)


def _reshape(settings, tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((24, 15), np.float32)


def _extra(settings, tensors):
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(4, np.float32)


def _integers(settings, tensors):
    tensors["model.norm.weight"] = np.zeros(16, np.int8)


BAD = {
    "missing tensor": (
        _without("model.layers.1.self_attn.k_proj.bias"),
        r"tensor model.layers.1.self_attn.k_proj.bias is missing",
    ),
    "untied without a head": (_without("lm_head.weight"), "tensor lm_head.weight is missing"),
    "wrong shape": (
        _reshape,
        r"tensor model.layers.2.mlp.up_proj.weight has shape \(24, 15\), must be \(24, 16\)",
    ),
    "unknown tensor": (_extra, "tensor model.layers.0.self_attn.q_norm.weight has no place"),
    "integers": (_integers, "tensor model.norm.weight has dtype I8, must be among F32, BF16, F16"),
    "architecture": (
        _settings(model_type="mistral"),
        r"config.json: model_type 'mistral' is not supported \(qwen2, llama\)",
    ),
    "window": (
        _settings(use_sliding_window=True, sliding_window=32, max_window_layers=0),
        "sliding window attention is not supported",
    ),
    "rope": (
        _settings(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        r"rope type 'llama3' is not supported \(default, linear, dynamic, yarn\)",
    ),
    "partial rope": (_settings(partial_rotary_factor=0.5), "partial_rotary_factor is not"),
    "yarn without a number": (
        _settings(rope_scaling={"rope_type": "linear", "factor": "big"}),
        "factor = 'big' must be a positive number",
    ),
    "rope as text": (_settings(rope_scaling="yarn"), "rope_scaling = 'yarn' must be a dict"),
    "yarn with texts": (
        _settings(rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_fast": "x"}),
        "beta_fast = 'x' must be a positive number",
    ),
    "yarn of a negative context": (
        _settings(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": -5}),
        "original_max_position_embeddings = -5 must be a positive whole number",
    ),
    "layer types": (_settings(layer_types=5), "layer_types = 5 must be a list"),
    "window of null": (
        _settings(use_sliding_window=True, sliding_window=32, max_window_layers=None),
        "sliding window attention is not supported",
    ),
    "endless": (_settings(hidden_size=float("inf")), "hidden_size = inf must be a positive whole"),
    "activation": (_settings(hidden_act="gelu"), r"hidden_act 'gelu' is not supported \(silu\)"),
    "quantized": (_settings(quantization_config={"bits": 4}), "quantized"),
    "no layers": (_settings(num_hidden_layers=0), "num_hidden_layers = 0 must be a positive"),
    "a size as text": (_settings(hidden_size="16"), "hidden_size = '16' must be a positive whole"),
    "missing key": (_settings(intermediate_size=None), "key 'intermediate_size' is missing"),
    "heads": (_settings(num_key_value_heads=3), "4 heads must be a multiple of 3"),
    "llama's o bias": (
        _settings(model_type="llama", attention_bias=True),
        "attention_bias = true is not supported",
    ),
}


def assert_one_line(folder: Path, message: str, capsys) -> None:
    dst = folder.parent / "dst"
    assert command("import", folder, dst) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert str(folder) in err
    assert not dst.exists()


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_gets_one_line(case, tmp_path, capsys):
    settings, tensors = dict(SETTINGS), make_tensors(SETTINGS, "float32")
    change, message = BAD[case]
    change(settings, tensors)
    assert_one_line(write_folder(tmp_path / "src", settings, tensors, 2), message, capsys)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_file_of_the_tokenizer_that_is_not_json_is_not_copied(name, tmp_path, capsys):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"))
    (src / name).write_text("{")
    assert_one_line(src, f"{name}: not JSON", capsys)


def _remove_shard(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()


def _truncate_shard(folder):
    file = folder / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 5)


def _empty_shard(folder):
    os.truncate(folder / "model-00001-of-00002.safetensors", 0)


def _escape(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))


def _swap_shards(folder):
    one, two = sorted(folder.glob("*.safetensors"))
    one.rename(folder / "kept")
    two.rename(one)
    (folder / "kept").rename(two)


def _no_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()


def _broken_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


DAMAGE = {
    "missing shard": (_remove_shard, r"model-00002-of-00002.safetensors: the shard is missing"),
    "truncated": (_truncate_shard, r"model-00002-of-00002.safetensors: damaged or truncated"),
    "empty": (_empty_shard, r"model-00001-of-00002.safetensors: damaged or truncated"),
    "path": (_escape, r"shard '../model-00001-of-00002.safetensors' must be a file in the same"),
    "swapped": (
        _swap_shards,
        r"safetensors: tensor \S+ is missing, though model.safetensors.index",
    ),
    "no weights": (_no_weights, "holds neither model.safetensors nor model.safetensors.index.json"),
    "broken json": (_broken_json, "config.json: not JSON"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_gets_one_line(case, tmp_path, capsys):
    folder = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"), 2)
    damage, message = DAMAGE[case]
    damage(folder)
    assert_one_line(folder, message, capsys)
