"""Hugging Face folders in and out, on random weights that torch never saw."""

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vibejax import checkpoint_reader, qwen2, weights
from vibejax.safetensors_folder import SafetensorsFolder
from vibejax.sharding import make_mesh
from vibejax.weights import CheckpointError

SETTINGS = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "torch_dtype": "float32",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "bos_token_id": 5,
    "eos_token_id": 7,
    "attention_dropout": 0.0,
    "layer_types": ["full_attention"] * 3,
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def layer_shapes(settings: dict) -> dict[str, tuple[int, ...]]:
    E, F = settings["hidden_size"], settings["intermediate_size"]
    D = settings.get("head_dim", E // settings["num_attention_heads"])
    H, K = settings["num_attention_heads"] * D, settings["num_key_value_heads"] * D
    shapes = {
        "input_layernorm.weight": (E,),
        "post_attention_layernorm.weight": (E,),
        "self_attn.q_proj.weight": (H, E),
        "self_attn.k_proj.weight": (K, E),
        "self_attn.v_proj.weight": (K, E),
        "self_attn.o_proj.weight": (E, H),
        "mlp.gate_proj.weight": (F, E),
        "mlp.up_proj.weight": (F, E),
        "mlp.down_proj.weight": (E, F),
    }
    if settings["model_type"] == "qwen2":
        biases = {"q": (H,), "k": (K,), "v": (K,)}
        shapes |= {f"self_attn.{name}_proj.bias": shape for name, shape in biases.items()}
    return shapes


def make_tensors(settings: dict, dtype: str) -> dict[str, np.ndarray]:
    V, E = settings["vocab_size"], settings["hidden_size"]
    shapes = {"model.embed_tokens.weight": (V, E), "model.norm.weight": (E,)}
    for layer in range(settings["num_hidden_layers"]):
        for name, shape in layer_shapes(settings).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    if not settings["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, E)
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=shape).astype(DTYPES[dtype]) for k, shape in shapes.items()}


def write_folder(folder: Path, settings: dict, tensors: dict, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
        weight_map |= {name: file for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = safetensors.numpy.load_file(file)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert ours[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_import_then_export_gives_the_same_bytes(dtype, shards, tmp_path):
    tensors = make_tensors(SETTINGS, dtype)
    src = write_folder(tmp_path / "src", SETTINGS, tensors, shards)
    config = weights.load_config(src)
    params = weights.load_params(src, config, None, DTYPES[dtype])
    limit = 5e9 if shards == 1 else 20_000
    weights.save_params(
        params, config, tmp_path / "dst", dtype=dtype, source=src, max_shard_bytes=limit
    )
    assert_same(read_folder(tmp_path / "dst"), tensors)
    assert (len(list((tmp_path / "dst").glob("*.safetensors"))) > 1) == (shards > 1)


@pytest.mark.parametrize("tied", [True, False])
def test_the_command_line_keeps_every_tensors_own_dtype(tied, tmp_path, capsys):
    settings = SETTINGS | {"tie_word_embeddings": tied}
    tensors = make_tensors(settings, "bfloat16")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    src = write_folder(tmp_path / "src", settings, tensors)
    assert weights.main(["import", str(src), str(tmp_path / "dst")]) == 0
    assert_same(read_folder(tmp_path / "dst"), tensors)
    assert capsys.readouterr() == ("", "")


def test_dtype_as_asked(tmp_path):
    tensors = make_tensors(SETTINGS, "float32")
    src = write_folder(tmp_path / "src", SETTINGS, tensors)
    assert weights.main(["export", str(src), str(tmp_path / "dst"), "--dtype", "bfloat16"]) == 0
    assert_same(
        read_folder(tmp_path / "dst"),
        {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()},
    )
    assert json.loads((tmp_path / "dst/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_tensors_land_where_the_forward_pass_reads_them(tmp_path):
    tensors = make_tensors(SETTINGS, "float32")
    src = write_folder(tmp_path / "src", SETTINGS, tensors)
    params = weights.load_params(src, weights.load_config(src), None, jnp.float32)
    q_EHD = np.asarray(params["layers"]["q"][1])
    o_HDE = np.asarray(params["layers"]["o"][1])
    torch_q, torch_o = (tensors[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qo")
    # output (head 3, dimension 2) is row 3 * 4 + 2 of torch's matrix, as are inputs its columns
    np.testing.assert_array_equal(q_EHD[:, 3, 2], torch_q[14])
    np.testing.assert_array_equal(o_HDE[3, 2], torch_o[:, 14])
    embed_VE = np.asarray(params["embed"])
    np.testing.assert_array_equal(embed_VE[:300], tensors["model.embed_tokens.weight"])
    assert embed_VE.shape[0] == 384
    assert not embed_VE[300:].any()


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


def test_exported_settings_carry_over_what_the_model_does_not_decide(tmp_path):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"))
    (src / "generation_config.json").write_text('{"eos_token_id": [7, 8], "top_p": 0.9}')
    (src / "tokenizer.json").write_text("{}")
    assert weights.main(["import", str(src), str(tmp_path / "dst")]) == 0
    written = json.loads((tmp_path / "dst/config.json").read_text())
    expected = {k: v for k, v in SETTINGS.items() if k != "layer_types"}
    assert {k: written[k] for k in expected} == expected
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "dst" / name).read_bytes() == (src / name).read_bytes()


MESHES = [{"fsdp": 8}, {"tensor": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.mark.parametrize("sizes", MESHES)
def test_each_device_gets_its_shards_of_the_same_values(sizes, tmp_path):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "bfloat16"))
    config = weights.load_config(src)
    whole = weights.load_params(src, config, None, jnp.float32)
    mesh = make_mesh(sizes)
    params = weights.load_params(src, config, mesh, jnp.float32)
    shardings = qwen2.param_shardings(config, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, params, shardings))
    # and they go back out of the mesh as they came
    weights.save_params(params, config, tmp_path / "dst", dtype="bfloat16", source=None)
    assert_same(read_folder(tmp_path / "dst"), read_folder(src))


def test_a_host_reads_the_slices_of_its_devices_only(tmp_path, monkeypatch):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"))
    config = weights.load_config(src)
    read = []
    original = SafetensorsFolder.read

    def counted(self, name, rows, columns):
        piece = original(self, name, rows, columns)
        read.append((name, rows, columns, piece.size))
        return piece

    monkeypatch.setattr(SafetensorsFolder, "read", counted)
    checkpoint = checkpoint_reader.open_checkpoint(src)
    info = qwen2.param_table(config)["layers"]["q"]
    index = (slice(1, 2), slice(4, 8), slice(2, 4), slice(0, 4))  # a quarter of E, half of H
    shard = weights._read_shard(checkpoint, info, index, config, np.dtype(np.float32))
    assert read == [("model.layers.1.self_attn.q_proj.weight", slice(8, 16), slice(4, 8), 32)]
    whole = weights.load_params(src, config, None, jnp.float32)["layers"]["q"]
    np.testing.assert_array_equal(shard, np.asarray(whole)[index])

    read.clear()
    weights.load_params(src, config, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), jnp.float32)
    sizes = {}
    for name, _, _, size in read:
        sizes[name] = sizes.get(name, 0) + size
    for name, tensor in read_folder(src).items():
        # Each slice once, however many devices hold it.
        assert sizes[name] == tensor.size, name


TWO_HOSTS = textwrap.dedent("""
    import sys
    from pathlib import Path
    import jax
    jax.config.update("jax_num_cpu_devices", 2)
    src, dst, address, process = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    import numpy as np
    from vibejax import weights
    from vibejax.safetensors_folder import SafetensorsFolder
    from vibejax.sharding import make_mesh
    read = {}
    original = SafetensorsFolder.read
    def counted(self, name, rows, columns):
        piece = original(self, name, rows, columns)
        read[name] = read.get(name, 0) + piece.size
        return piece
    SafetensorsFolder.read = counted
    config = weights.load_config(src)
    params = weights.load_params(src, config, make_mesh({"fsdp": 4}), np.float32)
    weights.save_params(params, config, dst, dtype="float32", source=src)
    sizes = [read["model.layers.1.mlp.up_proj.weight"], read["model.embed_tokens.weight"]]
    dst.with_name(f"read{process}").write_text(repr(sizes))
""")


def test_two_hosts_read_half_each_and_write_the_whole(tmp_path):
    tensors = make_tensors(SETTINGS, "float32")
    src = write_folder(tmp_path / "src", SETTINGS, tensors)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_HOSTS, src, tmp_path / "dst", address, str(process)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()},
        )
        for process in range(2)
    ]
    try:
        assert [host.wait(timeout=120) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()
    half = repr([24 * 16 // 2, 300 * 16 // 2])
    assert [(tmp_path / f"read{process}").read_text() for process in range(2)] == [half, half]
    assert_same(read_folder(tmp_path / "dst"), tensors)


def test_an_axis_that_does_not_divide_is_named(tmp_path):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"))
    config = weights.load_config(src)
    with pytest.raises(ValueError, match="axis 'kv_heads' of size 2 is not a multiple"):
        weights.load_params(src, config, make_mesh({"tensor": 4, "data": 2}), jnp.float32)


def test_a_tied_head_is_accepted_only_as_a_copy(tmp_path):
    settings = SETTINGS | {"tie_word_embeddings": True}
    tensors = make_tensors(settings, "float32")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    src = write_folder(tmp_path / "equal", settings, tensors | head)
    weights.convert(src, tmp_path / "dst", None)
    assert_same(read_folder(tmp_path / "dst"), tensors)
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
    assert weights.main(["import", str(folder), str(dst)]) == 1
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


def test_numbers_beyond_float16_are_not_written_as_infinity(tmp_path):
    tensors = make_tensors(SETTINGS, "bfloat16")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = 1e6
    src = write_folder(tmp_path / "src", SETTINGS, tensors)
    with pytest.raises(
        CheckpointError, match=r"layers.0.mlp.down_proj.weight holds 999424, beyond"
    ):
        weights.convert(src, tmp_path / "dst", "float16")
    assert not (tmp_path / "dst").exists()


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


def test_the_command_line_overwrites_nothing(tmp_path, capsys):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "float32"))
    assert weights.main(["import", str(src), str(src)]) == 1
    assert "src: exists; name a new folder" in capsys.readouterr().err


def test_info_says_what_a_checkpoint_is(tmp_path, capsys):
    src = write_folder(tmp_path / "src", SETTINGS, make_tensors(SETTINGS, "bfloat16"))
    assert weights.main(["info", str(src)]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    count = sum(tensor.size for tensor in read_folder(src).values())
    assert lines["parameters"] == f"{count:,}"
    assert lines["architecture"] == "qwen2"
    assert lines["dtype"] == "bfloat16"
    assert lines["layers"] == "3"
    assert lines["rope"].startswith("theta=1000000.0 kind=default")
    assert lines["tokenizer"].startswith("none (")


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
    with pytest.raises(CheckpointError, match=message):
        weights.locate(model)


MEASURE = textwrap.dedent("""
    import re, sys
    import jax
    import numpy as np
    from pathlib import Path
    from vibejax import weights

    def peak(work):
        # The high-water mark of this program alone (Linux); getrusage starts at the parent's.
        Path("/proc/self/clear_refs").write_text("5")
        before = high_water()
        result = work()
        return high_water() - before, result

    def high_water():
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

    src, dst, dtype = Path(sys.argv[1]), Path(sys.argv[2]), np.dtype(sys.argv[3])
    config = weights.load_config(src)
    jax.device_put(np.zeros(8))  # the backend's own memory is no part of the import
    converted, _ = peak(lambda: weights.convert(src, dst / "converted", dtype.name))
    loaded, params = peak(lambda: weights.load_params(src, config, None, dtype))
    write = lambda: weights.save_params(params, config, dst / "saved", dtype=dtype, source=None)
    saved, _ = peak(write)
    print(converted, loaded, saved)
""")


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """A checkpoint of 150M bfloat16 parameters in a 3B's proportions, and that number."""
    settings = SETTINGS | dict(
        vocab_size=50_000, hidden_size=768, intermediate_size=4_096, num_hidden_layers=12,
        num_attention_heads=6, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    E, V = settings["hidden_size"], settings["vocab_size"]
    block = np.random.default_rng(0).normal(size=V * E).astype(ml_dtypes.bfloat16)
    shapes = {"embed_tokens.weight": (V, E), "norm.weight": (E,)} | layer_shapes(settings)
    tensors = {}
    for name in make_tensors(settings | {"hidden_size": 12, "intermediate_size": 8}, "bfloat16"):
        shape = shapes[re.sub(r"^model\.(layers\.\d+\.)?", "", name)]
        tensors[name] = block[: np.prod(shape)].reshape(shape)
    folder = write_folder(tmp_path_factory.mktemp("large") / "src", settings, tensors)
    yield folder, sum(tensor.size for tensor in tensors.values())
    shutil.rmtree(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_import_and_export_peak_below_1_3_copies(dtype, large_folder, tmp_path):
    src, count = large_folder
    copy = count * np.dtype(DTYPES[dtype]).itemsize
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, src, tmp_path, dtype],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    converted, loaded, saved = (int(word) / copy for word in done.stdout.split())
    print(
        f"peak in copies of {copy / 1e9:.2f} GB {dtype}: the command line {converted:.2f}, "
        f"loading {loaded:.2f}, and saving {saved:.2f} on top"
    )
    for folder in ("converted", "saved"):  # pytest keeps what lies in tmp_path
        shutil.rmtree(tmp_path / folder)
    assert converted < 0.3
    assert 0.9 < loaded < 1.3
    assert saved < 0.5  # a compiled slice and one embedding, whatever the size
