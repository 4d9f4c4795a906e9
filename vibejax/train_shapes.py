"""The trainer's programs over shapes alone: compiled before they are needed, or for other devices.

Shape suffixes: as in train.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vibejax import sharding, train
from vibejax.config.training import TrainConfig
from vibejax.qwen2 import ModelConfig

FLOATS = ("weight", "advantage", "sampler_logprob", "old_logprob", "reference_logprob")

Trace = Callable[[], jax.stages.Traced]


def train_step(
    step: train.TrainStep,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    sums: Sequence[str],
    channels: Sequence[str],
) -> dict[str, Trace]:
    """`accumulate`, of a micro-batch, and `apply`, the update, of any stage that trains.

    Args:
        step: the programs.
        optimizer: of the updates.
        config: of the micro-batches.
        model: the policy.
        mesh: the devices.
        sums: names of the metrics that micro-batches add up to.
        channels: of their documents, loss weights among them.
    """
    params = train.abstract_params(model, mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    total = train.Sums(params, scalar, dict.fromkeys(sums, scalar))
    state = train.abstract_state(params, optimizer)
    return {
        "accumulate": traced(mesh, step.accumulate, params, total, rows(config, mesh, channels)),
        "apply": traced(mesh, step.apply, state, total),
    }


def traced(mesh: jax.sharding.Mesh, program: Any, *arguments: Any) -> Trace:
    """What traces a jitted program of a mesh for such arguments."""

    def trace() -> jax.stages.Traced:
        with jax.set_mesh(mesh):
            return program.trace(*arguments)

    return trace


def rows(config: TrainConfig, mesh: jax.sharding.Mesh, channels: Sequence[str]) -> train.Batch:
    """A micro-batch as shapes.

    Args:
        config: its sizes.
        mesh: where it lies.
        channels: beside tokens, positions and segments.
    """
    shape = (config.microbatch_rows, config.row_tokens)
    placed = sharding.sharding(mesh, shape, "batch", "length")
    order = ["place"] if sharding.ways(mesh, "length") > 1 else []
    return {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name in FLOATS else jnp.int32, sharding=placed
        )
        for name in ["token", "target", "position", "segment", *channels, *order]
    }
