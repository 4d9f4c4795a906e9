"""What the programs of a run have to compute and to move, by their definition: floors, not sums.

All figures are of one device and one call. Bytes are those that any program of this kind moves to
and from a device's memory: weights, gradients and caches, and the activations that are too large
to stay on the chip.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vibejax import qwen2, sharding
from vibejax.completions import EngineConfig
from vibejax.config.rl import RlConfig
from vibejax.memory_plan import MemoryPlan
from vibejax.planning import tiles_run
from vibejax.qwen2 import ModelConfig

BFLOAT16, FLOAT32 = 2, 4
ACTIVATIONS = 3  # passes over a layer's activations: forward, backward, recomputed


class Work(NamedTuple):
    """Of one device and call.

    Attributes:
        flops: operations of matrix products.
        bytes: to and from memory.
        useful_flops: without what is computed again; a causal mask's lower half alone.
        attention_flops: what of `flops` is attention's.
    """

    flops: float
    bytes: float
    useful_flops: float = 0.0
    attention_flops: float = 0.0


def layer_weights(model: ModelConfig) -> int:
    """Elements of the matrices of one layer."""
    heads = model.width * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    return heads + 3 * model.width * model.mlp


def accumulate(
    config: RlConfig, model: ModelConfig, mesh, lengths: Sequence[int], *, full: bool = False
) -> Work:
    """Gradients of one micro-batch, whose rows hold documents of these lengths.

    Args:
        config: the run's.
        model: its policy.
        mesh: the trainer's.
        lengths: documents of each row.
        full: count attention as if nothing were masked, as some publish their MFU.
    """
    tokens = config.train.microbatch_rows * config.train.row_tokens / mesh.size
    seen = float(config.train.row_tokens) if full else tiles_run.attended(lengths)
    attention = model.layers * 4 * model.heads * model.head_dim * seen
    layers, head = model.layers * layer_weights(model), model.width * model.vocab_rows
    again = forwards_again(config) * attention
    if config.train.remat != "none":
        again += 2 * layers
    useful = tokens * qwen2.train_flops_per_token(model, seen)
    tensor = mesh.shape["tensor"]
    passes = 2 + (config.train.remat != "none")
    weights = (layers + head) / tensor * (passes * BFLOAT16 + FLOAT32)
    sums = 3 * FLOAT32 * (layers + head) / (tensor * sharding.ways(mesh, "embed"))
    a_layer = (
        12 * model.width + (6 * model.heads * model.head_dim + 10 * model.mlp) / tensor
    ) * BFLOAT16
    activations = ACTIVATIONS * model.layers * tokens * tensor * a_layer
    logits = 4 * FLOAT32 * tokens * model.vocab_rows
    moved = weights + sums + activations + logits
    attended = tokens * (3 + forwards_again(config)) * attention
    return Work(useful + tokens * (again + 2 * head), moved, useful, attended)


def forwards_again(config: RlConfig) -> int:
    """How often a micro-batch's backward pass computes attention's forward pass again."""
    return int(config.train.remat not in ("none", "attention"))


def score(config, model: ModelConfig, mesh, rows: int, row_tokens: int) -> Work:
    """Log-probs of rows of one document each."""
    tokens = rows * row_tokens / mesh.size
    seen = (row_tokens + 1) / 2
    useful = tokens * qwen2.train_flops_per_token(model, seen) / 3
    weights = (model.layers * layer_weights(model) + model.width * model.vocab_rows) * BFLOAT16
    attention = tokens * model.layers * 4 * model.heads * model.head_dim * seen
    return Work(useful, weights / mesh.shape["tensor"], useful, attention)


def apply(model: ModelConfig, mesh) -> Work:
    """One AdamW update: reads masters, moments and gradients twice over, writes all but these."""
    parameters = qwen2.param_count(model) / (mesh.shape["tensor"] * sharding.ways(mesh, "embed"))
    return Work(0.0, 8 * FLOAT32 * parameters)


def hand_over(config: RlConfig, model: ModelConfig, mesh) -> Work:
    """The sampler's copy of one layer."""
    weights = layer_weights(model)
    whole = weights * BFLOAT16 / config.rollout.tensor
    return Work(0.0, whole + weights * FLOAT32 / mesh.size)


def fill(engine: EngineConfig, memory: MemoryPlan) -> Work:
    """A chunk of a prompt."""
    model, tokens = engine.model, engine.chunk_tokens
    useful = 2.0 * tokens * model.layers * layer_weights(model) / engine.tensor
    return Work(useful, float(memory.weight_bytes), useful)


def decode_step(engine: EngineConfig, memory: MemoryPlan, rows: int, live_tokens: float) -> Work:
    """One token of each row of a device.

    Args:
        engine: its sizes.
        memory: its plan.
        rows: of the device.
        live_tokens: cached ones of all rows together.
    """
    model = engine.model
    weights = model.layers * layer_weights(model) + model.width * model.vocab_rows
    attention = 4 * model.layers * model.heads * model.head_dim * live_tokens
    useful = (2.0 * rows * weights + attention) / engine.tensor
    pages = live_tokens / engine.page_tokens * memory.page_bytes
    return Work(useful, memory.weight_bytes + pages, useful)
