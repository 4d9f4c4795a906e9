"""What a checkpoint says about its model: Hugging Face's config.json or GGUF metadata.

Both become a `ModelConfig`; whatever this model code does not compute is refused by name instead
of being ignored. Architectures: `qwen2`, and `llama`, which is Qwen2 with zero QKV biases.

Source: transformers' configuration_qwen2.py and modeling_rope_utils.py (version 5); llama.cpp's
gguf-py/gguf/constants.py for the metadata keys.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vibejax.config_file import InputError
from vibejax.qwen2 import ModelConfig
from vibejax.rope import Rope

ARCHITECTURES = ("qwen2", "llama")
ROPE_KINDS = ("default", "linear", "dynamic", "yarn")

# Keys of a source's config.json that an export decides itself, or that would be wrong in it.
_NOT_CARRIED = frozenset(
    "architectures model_type dtype torch_dtype rope_parameters rope_scaling rope_theta head_dim "
    "layer_types attention_bias mlp_bias pretraining_tp transformers_version auto_map "
    "_name_or_path original_max_position_embeddings partial_rotary_factor".split()
)


class CheckpointError(InputError):
    """A checkpoint cannot be read or written; the message is one line: path, tensor, rule."""


def from_hf(settings: Mapping[str, Any], path: Path) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        settings: the parsed file.
        path: where it lies, for messages.

    Raises:
        CheckpointError: a key is missing or malformed, or asks for what Qwen2.5 does not have.
    """
    architecture = settings.get("model_type")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: model_type {architecture!r} is not supported ({known})")
    layers, width, heads = (
        _number(settings, key, path, int)
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    for key, kind in (("rope_scaling", dict), ("rope_parameters", dict), ("layer_types", list)):
        if not isinstance(settings.get(key) or kind(), kind):
            raise CheckpointError(
                f"{path}: {key} = {settings[key]!r:.80} must be a {kind.__name__}"
            )
    _refuse_unsupported(settings, layers, path)
    context = _number(settings, "max_position_embeddings", path, int, 32_768)
    config = ModelConfig(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=_number(settings, "num_key_value_heads", path, int, heads),
        head_dim=_number(settings, "head_dim", path, int, width // heads),
        mlp=_number(settings, "intermediate_size", path, int),
        vocab=_number(settings, "vocab_size", path, int),
        rope=_rope_from_hf(settings, context, path),
        norm_epsilon=_number(settings, "rms_norm_eps", path, float, 1e-6),
        tied=bool(settings.get("tie_word_embeddings", False)),
        context=context,
        init_std=_number(settings, "initializer_range", path, float, 0.02),
    )
    _check_heads(config, path)
    return config


def _number(settings, key, path, kind, default=None):
    value = settings.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{path}: key {key!r} is missing")
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not 0 < value <= sys.float_info.max or value != kind(value):
        word = "a positive whole number" if kind is int else "a positive number"
        raise CheckpointError(f"{path}: {key} = {value!r} must be {word}")
    return kind(value)


def _check_heads(config: ModelConfig, path: Path) -> None:
    if config.heads % config.kv_heads:
        raise CheckpointError(
            f"{path}: {config.heads} heads must be a multiple of {config.kv_heads} key/value heads"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{path}: head dimension {config.head_dim} must be even")


def _refuse_unsupported(settings: Mapping[str, Any], layers: int, path: Path) -> None:
    """Raises for a key that asks for a computation which this model code does not do."""
    sliding = settings.get("use_sliding_window") and settings.get("sliding_window", 4096)
    first = settings.get("max_window_layers", 28)  # of the layers with a window
    types = settings.get("layer_types") or ()
    if (sliding and not (type(first) is int and first >= layers)) or "sliding_attention" in types:
        raise CheckpointError(f"{path}: sliding window attention is not supported")
    if settings.get("quantization_config"):
        raise CheckpointError(f"{path}: a quantized Hugging Face checkpoint is not supported")
    activation = settings.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{path}: hidden_act {activation!r} is not supported (silu)")
    for key in ("attention_bias", "mlp_bias"):  # llama's: they stand for biases on o and the MLP
        if settings.get(key):
            raise CheckpointError(f"{path}: {key} = true is not supported")


def _rope_from_hf(settings: Mapping[str, Any], context: int, path: Path) -> Rope:
    """Both forms: `rope_theta` beside `rope_scaling`, and version 5's `rope_parameters`."""
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        known = ", ".join(ROPE_KINDS)
        raise CheckpointError(f"{path}: rope type {kind!r} is not supported ({known})")
    for place in (settings, scaling):
        if place.get("partial_rotary_factor", 1) not in (1, None):
            raise CheckpointError(f"{path}: a partial_rotary_factor is not supported")
    theta = scaling.get("rope_theta", settings.get("rope_theta"))
    theta = _number({"rope_theta": theta}, "rope_theta", path, float, 10_000.0)
    if kind == "default":
        return Rope(theta=theta)
    name = "original_max_position_embeddings"
    original = _number(scaling, name, path, int, context)
    original = _number(settings, name, path, int, original)
    factor = _number(scaling, "factor", path, float, context / original if kind == "yarn" else None)
    if kind != "yarn":
        return Rope(theta=theta, kind=kind, factor=factor)
    return Rope(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=original,
        attention_factor=_attention_factor(scaling, factor, path),
        beta_fast=_number(scaling, "beta_fast", path, float, 32.0),
        beta_slow=_number(scaling, "beta_slow", path, float, 1.0),
        truncate=bool(scaling.get("truncate", True)),
    )


def _attention_factor(scaling: Mapping[str, Any], factor: float, path: Path) -> float | None:
    """What multiplies YaRN's cosines and sines; None for the paper's 0.1 ln(factor) + 1."""
    if scaling.get("attention_factor") is not None:
        return _number(scaling, "attention_factor", path, float)
    if not (scaling.get("mscale") and scaling.get("mscale_all_dim")) or factor <= 1:
        return None
    above, below = (_number(scaling, key, path, float) for key in ("mscale", "mscale_all_dim"))
    return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)


def to_hf(config: ModelConfig, dtype: str, source: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of an exported model, in keys that transformers 4 and 5 and vLLM read.

    Args:
        config: the model.
        dtype: "float32", "bfloat16" or "float16".
        source: config.json of the checkpoint that the model came from, or empty: keys that the
            model does not depend on (`bos_token_id`, `use_cache`, ...) are carried over.
    """
    rope = config.rope
    settings = {key: value for key, value in source.items() if key not in _NOT_CARRIED}
    settings |= {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": dtype,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.context,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "use_sliding_window": False,
        "rope_theta": rope.theta,
    }
    if config.head_dim * config.heads != config.width:
        settings["head_dim"] = config.head_dim
    if rope.kind != "default":
        settings["rope_scaling"] = _scaling_to_hf(rope, config.context)
    return settings


def _scaling_to_hf(rope: Rope, context: int) -> dict[str, Any]:
    # `type` is what transformers before 4.45 and older vLLM look for.
    scaling = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor}
    if rope.kind == "yarn":
        scaling |= {
            "original_max_position_embeddings": rope.original_context or context,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
        }
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
        if not rope.truncate:
            scaling["truncate"] = False
    return scaling


def from_gguf(metadata: Mapping[str, Any], *, vocab: int, tied: bool, path: Path) -> ModelConfig:
    """The model that a GGUF file's metadata describe.

    Args:
        metadata: key -> value.
        vocab: rows of the embedding; the metadata need not say.
        tied: the file has no `output.weight`.
        path: the file, for messages.

    Raises:
        CheckpointError: as for `from_hf`.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: architecture {architecture!r} is not supported ({known})")
    prefix = f"{architecture}."
    own = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    width, heads = (
        _number(own, key, path, int) for key in ("embedding_length", "attention.head_count")
    )
    config = ModelConfig(
        layers=_number(own, "block_count", path, int),
        width=width,
        heads=heads,
        kv_heads=_number(own, "attention.head_count_kv", path, int, heads),
        head_dim=_number(own, "attention.key_length", path, int, width // heads),
        mlp=_number(own, "feed_forward_length", path, int),
        vocab=vocab,
        rope=_rope_from_gguf(own, path),
        norm_epsilon=_decimal(_number(own, "attention.layer_norm_rms_epsilon", path, float)),
        tied=tied,
        context=_number(own, "context_length", path, int),
    )
    _check_heads(config, path)
    for key, meant in (
        ("rope.dimension_count", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("expert_count", 0),
    ):
        if own.get(key, meant) != meant:
            raise CheckpointError(f"{path}: {prefix}{key} = {own[key]!r} must be {meant}")
    return config


def _decimal(value: float) -> float:
    """The short decimal number that GGUF keeps as a float32: 9.9999997e-06 was 1e-05."""
    return float(str(np.float32(value)))


def _rope_from_gguf(own: Mapping[str, Any], path: Path) -> Rope:
    theta = _decimal(_number(own, "rope.freq_base", path, float, 10_000.0))
    # As llama.cpp, to which a factor of 0 is none.
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear")) or None
    kind = own.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor is None):
        return Rope(theta=theta)
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{path}: rope.scaling.type {kind!r} is not supported (linear, yarn)")
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if own.get(f"rope.scaling.{key}", 1.0) != 1.0:
            raise CheckpointError(f"{path}: rope.scaling.{key} other than 1 is not supported")
    factor = _decimal(_number({"rope.scaling.factor": factor}, "rope.scaling.factor", path, float))
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=factor)
    fast, slow = (
        _decimal(_number(own, f"rope.scaling.yarn_beta_{name}", path, float, usual))
        for name, usual in (("fast", Rope.beta_fast), ("slow", Rope.beta_slow))
    )
    return Rope(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=_number(own, "rope.scaling.original_context_length", path, int),
        beta_fast=fast,
        beta_slow=slow,
    )
