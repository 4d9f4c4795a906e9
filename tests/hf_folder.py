"""Hugging Face folders of a few kilobytes, written and read by the safetensors library."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from vibejax import weights

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


def command(*arguments: object) -> int:
    """The exit status of `python -m vibejax.weights` with these arguments."""
    try:
        weights.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return exit.code
    return 0
