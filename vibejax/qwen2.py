"""Qwen2.5 as pure functions of a parameter tree.

`param_table` declares every parameter once: its shape, the names of its axes (which decide its
sharding), its Hugging Face name and layout (which decide how weights are read and written) and
how it is initialised. `hidden_states` runs over packed rows, `cached_states` over a cache.

Shape suffixes: L layers, B rows, T tokens, S cache entries, E model width, H query heads, K
key/value heads, D head dimension, F feed-forward width, V vocabulary rows.

Source: Qwen2.5 technical report, arXiv:2412.15115; transformers' modeling_qwen2.py for the
order of operations, which the parity test pins.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from vibejax.attention import Implementation, attention
from vibejax.rope import Rope, inverse_frequencies
from vibejax.sharding import constrain, sharding
from vibejax.weight_products import einsum, product_held, project, project_held

Params = dict[str, Any]
Remat = Literal["none", "full", "attention", "offload"]
VOCAB_MULTIPLE = 128  # vocabulary rows are padded to it, so that `tensor` divides them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of one Qwen2.5 model; the defaults are Qwen2.5-Coder-3B's.

    Attributes:
        vocab: token ids that the checkpoint knows; logits beyond are never sampled.
        tied: the output head is the embedding.
        context: positions that the checkpoint was made for (`max_position_embeddings`).
        init_std: standard deviation of randomly initialised matrices.
    """

    rope: Rope
    layers: int = 36
    width: int = 2_048
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 128
    mlp: int = 11_008
    vocab: int = 151_936
    norm_epsilon: float = 1e-6
    tied: bool = True
    context: int = 32_768
    init_std: float = 0.02

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding, padding included."""
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """One parameter.

    Attributes:
        shape: as held here, layers stacked on axis 0.
        axes: the name of each axis.
        hf_name: Hugging Face's name; "{}" is the layer number.
        inputs: of a projection, how many axes (after the layers') are summed over: torch holds
            it as [outputs, inputs]. 0 for what is held alike.
        init: "normal", "zeros" or "ones".
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    inputs: int
    init: Literal["normal", "zeros", "ones"]

    @property
    def stacked(self) -> bool:
        """Whether axis 0 runs over layers, each a tensor of its own in a checkpoint."""
        return self.axes[0] == "layers"


def param_table(config: ModelConfig) -> Params:
    """The parameter tree with a `ParamInfo` at each leaf."""
    L, E, F, V = config.layers, config.width, config.mlp, config.vocab_rows
    H, K, D = config.heads, config.kv_heads, config.head_dim

    def matrix(name: str, inputs: int, shape: tuple[int, ...], *axes: str) -> ParamInfo:
        hf_name = f"model.layers.{{}}.{name}.weight"
        return ParamInfo((L, *shape), ("layers", *axes), hf_name, inputs, "normal")

    def bias(name: str, shape: tuple[int, ...], *axes: str) -> ParamInfo:
        hf_name = f"model.layers.{{}}.{name}.bias"
        return ParamInfo((L, *shape), ("layers", *axes), hf_name, 0, "zeros")

    def norm(name: str) -> ParamInfo:
        return ParamInfo((L, E), ("layers", "embed"), f"model.layers.{{}}.{name}.weight", 0, "ones")

    table = {
        "embed": ParamInfo((V, E), ("vocab", "embed"), "model.embed_tokens.weight", 0, "normal"),
        "norm": ParamInfo((E,), ("embed",), "model.norm.weight", 0, "ones"),
        "layers": {
            "attention_norm": norm("input_layernorm"),
            "q": matrix("self_attn.q_proj", 1, (E, H, D), "embed", "heads", "head_dim"),
            "k": matrix("self_attn.k_proj", 1, (E, K, D), "embed", "kv_heads", "head_dim"),
            "v": matrix("self_attn.v_proj", 1, (E, K, D), "embed", "kv_heads", "head_dim"),
            "q_bias": bias("self_attn.q_proj", (H, D), "heads", "head_dim"),
            "k_bias": bias("self_attn.k_proj", (K, D), "kv_heads", "head_dim"),
            "v_bias": bias("self_attn.v_proj", (K, D), "kv_heads", "head_dim"),
            "o": matrix("self_attn.o_proj", 2, (H, D, E), "heads", "head_dim", "embed"),
            "mlp_norm": norm("post_attention_layernorm"),
            "gate": matrix("mlp.gate_proj", 1, (E, F), "embed", "mlp"),
            "up": matrix("mlp.up_proj", 1, (E, F), "embed", "mlp"),
            "down": matrix("mlp.down_proj", 1, (F, E), "mlp", "embed"),
        },
    }
    if not config.tied:
        table["head"] = ParamInfo((V, E), ("vocab", "embed"), "lm_head.weight", 0, "normal")
    return table


def map_table(function: Any, config: ModelConfig, *trees: Params) -> Params:
    """A tree of `function(info, *leaves)` over `param_table(config)` and trees of its form."""
    return jax.tree.map(function, param_table(config), *trees, is_leaf=_is_info)


def _is_info(x: Any) -> bool:
    return isinstance(x, ParamInfo)


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The tree of NamedShardings of the parameters on `mesh`.

    Raises:
        ValueError: an axis does not divide, with its name and sizes.
    """
    return map_table(lambda info: sharding(mesh, info.shape, *info.axes), config)


def init_params(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters; trace it under jit with `out_shardings` to create them in place."""
    leaves, tree = jax.tree.flatten(map_table(lambda info: info, config))

    def leaf(info: ParamInfo, key: jax.Array) -> jax.Array:
        if info.init == "normal":
            return config.init_std * jax.random.normal(key, info.shape, dtype)
        return jnp.full(info.shape, 1.0 if info.init == "ones" else 0.0, dtype)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [leaf(i, k) for i, k in zip(leaves, keys, strict=True)])


def default_dtype() -> str:
    """The dtype that the default device computes fastest in."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def head(params: Params) -> jax.Array:
    """[V, E] output head: the embedding where the two are tied."""
    return params.get("head", params["embed"])


@jax.named_scope("logits")
def logits(params: Params, x_BE: jax.Array, config: ModelConfig) -> jax.Array:
    """[B, V] float32 logits of the next token; ids that do not exist hold -1e30."""
    head_VE = head(params).astype(x_BE.dtype)
    logit_BV = product_held(x_BE, head_VE, jnp.float32)
    return jnp.where((jnp.arange(config.vocab_rows) < config.vocab)[None], logit_BV, -1e30)


def hidden_states(
    params: Params,
    token_BT: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array,
    config: ModelConfig,
    *,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    implementation: Implementation = "auto",
    place_BT: jax.Array | None = None,
) -> jax.Array:
    """Normed outputs of the last layer; `losses.logprobs` turns them into log-probabilities.

    Args:
        params: tree of `param_table(config)`, arrays at the leaves.
        token_BT: [B, T] int32 token ids.
        position_BT: [B, T] int32 position within the token's document.
        segment_BT: [B, T] int32 document number within the row; 0 is padding.
        config: static.
        dtype: of the computation; norms, RoPE and softmax are float32 in any case.
        remat: what the backward pass keeps of a layer: `none` all but elementwise work, `attention`
            keeps the attention output, `offload` the layer inputs in host memory, `full` the
            layer inputs on the device.
        implementation: of attention; see `vibejax.attention`.
        place_BT: [B, T] int32 where in its row each token belongs; None: where it is.

    Returns:
        [B, T, E] of `dtype`.
    """
    with jax.named_scope("embed"):
        x_BTE = constrain(params["embed"][token_BT].astype(dtype), "batch", "length", None)
    cos_BTD, sin_BTD = _rope(position_BT, config)

    def layer(x_BTE: jax.Array, p: Params) -> tuple[jax.Array, None]:
        x_BTE = checkpoint_name(x_BTE, "layer_input")
        q_BTHD, k_BTKD, v_BTKD = _qkv(x_BTE, p, cos_BTD, sin_BTD, config, TRAINER)
        a_BTHD = attention(
            q_BTHD, k_BTKD, v_BTKD, position_BT, segment_BT, implementation, place_BT
        )
        with jax.named_scope("out"):
            x_BTE = x_BTE + project("BTHD,HDE->BTE", a_BTHD, p["o"])
        return constrain(_mlp(x_BTE, p, config, TRAINER), "batch", "length", None), None

    x_BTE, _ = jax.lax.scan(_rematerialised(layer, remat), x_BTE, params["layers"])
    return _rms_norm(x_BTE, params["norm"], config.norm_epsilon)


def _rematerialised(layer, remat: Remat):
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    if remat == "full":
        policy = policies.nothing_saveable
    elif remat == "attention":
        # Named where they are computed, in the kernels' own rules: a kernel runs once a layer.
        policy = policies.save_only_these_names("attention_output", "attention_logsumexp")
    else:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer_input"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def cached_states(
    params: Params,
    token_BT: jax.Array,
    position_BT: jax.Array,
    caches: Sequence[Any],
    attend: Callable[..., tuple[jax.Array, Any]],
    config: ModelConfig,
) -> tuple[jax.Array, list[Any]]:
    """Normed outputs for the next tokens of sequences whose earlier ones are cached.

    Args:
        params: as `sampler_copy.make` returns them.
        token_BT: [B, T] int32.
        position_BT: [B, T] int32 position of each token in its sequence; -1 is padding.
        caches: of each layer, whatever `attend` takes.
        attend: (cache, q_BTHD, k_BTKD, v_BTKD) -> (a_BTHD, cache): caches the keys and values
            of the new tokens, and attends to all up to each.
        config: static.

    Returns:
        [B, T, E] of the parameters' dtype, and the caches.
    """
    with jax.named_scope("embed"):
        x_BTE = constrain(params["embed"][token_BT], "batch", None, None)
    cos_BTD, sin_BTD = _rope(jnp.maximum(position_BT, 0), config)
    written = []
    for p, cache in zip(params["layers"], caches, strict=True):
        q_BTHD, k_BTKD, v_BTKD = _qkv(x_BTE, p, cos_BTD, sin_BTD, config, SAMPLER)
        a_BTHD, cache = attend(cache, q_BTHD, k_BTKD, v_BTKD)
        with jax.named_scope("out"):
            x_BTE = x_BTE + project_held("BTHD,HDE->BTE", a_BTHD, p["o"])
        x_BTE = constrain(_mlp(x_BTE, p, config, SAMPLER), "batch", None, None)
        written.append(cache)
    return _norm_alike(x_BTE, params["norm"], config.norm_epsilon), written


@jax.named_scope("qkv")
def _qkv(x_BTE, p, cos_BTD, sin_BTD, config, how):
    subscripts = ("BTE,EHD->BTHD", "BTE,EKD->BTKD", "BTE,EKD->BTKD")
    weights = (p["q"], p["k"], p["v"])
    products = _normed_products(x_BTE, p["attention_norm"], weights, subscripts, config, how)
    biases = (p["q_bias"], p["k_bias"], p["v_bias"])
    q_BTHD, k_BTKD, v_BTKD = map(_biased, products, biases)
    q_BTHD = constrain(_rotate(q_BTHD, cos_BTD, sin_BTD), "batch", "length", "heads", None)
    return q_BTHD, _rotate(k_BTKD, cos_BTD, sin_BTD), v_BTKD


@jax.named_scope("mlp")
def _mlp(x_BTE, p, config, how):
    subscripts, weights = ("BTE,EF->BTF",) * 2, (p["gate"], p["up"])
    gate_BTF, up_BTF = _normed_products(x_BTE, p["mlp_norm"], weights, subscripts, config, how)
    return x_BTE + how.project("BTF,FE->BTE", _gated(gate_BTF, up_BTF), p["down"])


# What only passes over its arguments is computed again by the backward pass, whatever `remat` says:
# to keep its intermediate values for all layers takes longer, and a sixth more memory.
_again = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(_again, static_argnums=(3, 4, 5), policy=jax.checkpoint_policies.dots_saveable)
def _normed_products(x_BTE, scale_E, weights, subscripts, config, how) -> list[jax.Array]:
    """Products of weights with the normed x; what is kept is x, which is kept in any case."""
    h_BTE = how.norm(x_BTE, scale_E, config.norm_epsilon)
    return [how.project(s, h_BTE, w) for s, w in zip(subscripts, weights, strict=True)]


@_again
def _gated(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    return jax.nn.silu(gate_BTF) * up_BTF


@functools.partial(_again, static_argnums=2)
def _rms_norm(x_BTE: jax.Array, scale_E: jax.Array, epsilon: float) -> jax.Array:
    sum_BT1 = jnp.sum(x_BTE.astype(jnp.float32) ** 2, axis=-1, keepdims=True)
    return _normed(x_BTE, sum_BT1, scale_E, epsilon)


def _norm_alike(x_BTE: jax.Array, scale_E: jax.Array, epsilon: float) -> jax.Array:
    """`_rms_norm` whose bits do not depend on the number of rows.

    XLA for CPUs rounds the squares in a sum of many rows, and does not in one of few; a product
    with ones sums what is rounded in any case.
    """
    square_NE = (x_BTE.astype(jnp.float32) ** 2).reshape(-1, x_BTE.shape[-1])
    sum_N8 = einsum("NE,FE->NF", square_NE, jnp.ones((8, x_BTE.shape[-1])))
    return _normed(x_BTE, sum_N8[:, :1].reshape(*x_BTE.shape[:2], 1), scale_E, epsilon)


def _normed(x_BTE, sum_BT1, scale_E, epsilon):
    variance_BT1 = sum_BT1 / x_BTE.shape[-1]
    normed_BTE = x_BTE.astype(jnp.float32) * jax.lax.rsqrt(variance_BT1 + epsilon)
    return (normed_BTE * _held(scale_E, x_BTE.dtype)[None, None]).astype(x_BTE.dtype)


def _biased(x_BTHD: jax.Array, bias_HD: jax.Array) -> jax.Array:
    sum_BTHD = x_BTHD.astype(jnp.float32) + _held(bias_HD, x_BTHD.dtype)[None, None]
    return sum_BTHD.astype(x_BTHD.dtype)


def _held(w: jax.Array, dtype: Any) -> jax.Array:
    """A scale or bias in float32, but rounded to `dtype`, as the sampler's copy holds it.

    Applied in float32, its gradient is summed over tokens and devices in float32.
    """
    kept = jnp.finfo(dtype)
    return jax.lax.reduce_precision(w.astype(jnp.float32), kept.nexp, kept.nmant)


def _rope(position_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """[B, T, D/2] float32 cosines and sines; float32 since positions pass 65,536."""
    longest = jnp.max(position_BT) + 1
    frequency_D, scale = inverse_frequencies(config.rope, config.head_dim, config.context, longest)
    angle_BTD = position_BT[..., None].astype(jnp.float32) * frequency_D[None, None]
    return scale * jnp.cos(angle_BTD), scale * jnp.sin(angle_BTD)


def _rotate(x_BTHD: jax.Array, cos_BTD: jax.Array, sin_BTD: jax.Array) -> jax.Array:
    """Rotates the pairs (d, d + D/2), Hugging Face's layout."""
    cos_BT1D, sin_BT1D = cos_BTD[:, :, None], sin_BTD[:, :, None]
    a, b = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos_BT1D - b * sin_BT1D, b * cos_BT1D + a * sin_BT1D], axis=-1)
    return rotated.astype(x_BTHD.dtype)


class _Layer(NamedTuple):
    """What the trainer and the sampler compute alike but not in the same way."""

    project: Callable[[str, jax.Array, jax.Array], jax.Array]
    norm: Callable[[jax.Array, jax.Array, float], jax.Array]


TRAINER = _Layer(project, _rms_norm)
SAMPLER = _Layer(project_held, _norm_alike)


def train_flops_per_token(config: ModelConfig, attended: float) -> float:
    """Floating-point operations of forward and backward for one token of a packed row.

    Args:
        config: the model.
        attended: keys that an average token sees.
    """
    E, H, K, D = config.width, config.heads, config.kv_heads, config.head_dim
    weights = E * D * (2 * H + 2 * K) + 3 * E * config.mlp
    layer = 2 * weights + 4 * H * D * attended
    return 3.0 * (config.layers * layer + 2 * E * config.vocab_rows)


def param_count(config: ModelConfig) -> int:
    """Number of parameters as a checkpoint holds them, vocabulary padding left out."""
    infos = jax.tree.leaves(map_table(lambda i: math.prod(i.shape), config))
    heads = 1 if config.tied else 2
    return sum(infos) - heads * (config.vocab_rows - config.vocab) * config.width
