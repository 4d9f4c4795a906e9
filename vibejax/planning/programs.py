"""The programs of an RL run as they are compiled, over shapes alone: no device needs to be there.

Shape suffixes: B rows, T tokens of a row or chunk, M pages of a row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vibejax import (
    batching,
    decode,
    handover,
    policy_programs,
    qwen2,
    sampler_copy,
    sharding,
    train,
)
from vibejax.config.rl import RlConfig
from vibejax.config.training import TrainConfig
from vibejax.engine import Engine
from vibejax.kernels import pages
from vibejax.qwen2 import ModelConfig

FLOATS = ("weight", "advantage", "sampler_logprob", "old_logprob", "reference_logprob")

Programs = dict[str, Callable[[], jax.stages.Traced]]


def trainer(config: RlConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> Programs:
    """What the trainer's devices run; each is traced by calling it.

    `accumulate` a micro-batch, `apply` the update, `canary` the scoring of the few tokens by which
    a hand-over is checked, `score` that of whole rows, where the run does it, and `hand_over` of
    one layer's weights.

    Args:
        config: of the run.
        model: its policy.
        mesh: the devices.
    """
    run = policy_programs.make(config, model, mesh)
    params = _params(model, mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    sums = train.Sums(params, scalar, dict.fromkeys(policy_programs.SUMS, scalar))
    channels = ["weight", "advantage", "sampler_logprob"]
    scored = [
        name
        for name, needed in (
            ("old_logprob", config.objective.updates > 1),
            ("reference_logprob", config.objective.kl),
        )
        if needed
    ]

    def traced(program, *arguments):
        def trace():
            with jax.set_mesh(mesh):
                return program.trace(*arguments)

        return trace

    found = {
        "accumulate": traced(
            run.train_step.accumulate, params, sums, rows(config.train, mesh, channels + scored)
        ),
        "apply": traced(run.train_step.apply, train.abstract_state(params, run.optimizer), sums),
        "canary": traced(run.score, params, rows(handover.short_rows(config), mesh, channels[:1])),
        "hand_over": lambda: _hand_over(config, model, mesh, params),
    }
    if scored:
        found["score"] = traced(run.score, params, rows(config.train, mesh, channels))
    return found


def _params(model: ModelConfig, mesh: jax.sharding.Mesh) -> qwen2.Params:
    return qwen2.map_table(
        lambda info, s: jax.ShapeDtypeStruct(info.shape, jnp.float32, sharding=s),
        model,
        qwen2.param_shardings(model, mesh),
    )


def rows(config: TrainConfig, mesh: jax.sharding.Mesh, channels: list[str]) -> train.Batch:
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


def _hand_over(config, model, mesh, params) -> jax.stages.Traced:
    tensor = config.rollout.tensor
    everywhere = jax.sharding.Mesh(
        mesh.devices.reshape(mesh.size // tensor, 1, 1, tensor),
        mesh.axis_names,
        axis_types=mesh.axis_types,
    )
    dtype = jnp.dtype(config.train.dtype)
    return sampler_copy.layer.trace(params["layers"], 0, model, dtype, everywhere)


def sampler(engine: Engine, how: decode.Sampling) -> Programs:
    """What the engine's devices run: `fill` with a chunk a device, `window` with all slots."""
    config, mesh, parts = engine.config, engine.mesh, sharding.ways(engine.mesh, "batch")
    model, dtype = config.model, engine.dtype
    entries, slots = -(-engine.context // config.page_tokens), config.slots
    group = batching.group_of(slots // parts)

    def array(kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
        axes = ("batch", *(None,) * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding.sharding(mesh, shape, *axes))

    def layer() -> pages.Pages:
        shapes = jax.eval_shape(
            lambda: pages.empty(
                parts * engine.memory.pages, model.kv_heads, config.page_tokens, model.head_dim,
                engine.kv_dtype,
            )
        )  # fmt: skip
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=sharding.sharding(mesh, x.shape, "batch", "kv_heads", None, None),
            ),
            shapes,
        )

    params, pools = sampler_copy.shapes(model, dtype, mesh), [layer()] * model.layers
    window_rows = decode.Rows(
        *[array(jnp.int32, slots)] * 4,
        *[array(jnp.uint32, slots)] * 2,
        array(jnp.int32, slots, entries),
        array(jnp.int32, slots // group),
        array(jnp.bool_, slots),
    )
    number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=sharding.replicated(mesh))

    def window() -> jax.stages.Traced:
        with jax.set_mesh(mesh):
            return decode.window.trace(
                params, pools, None, window_rows, number, number, config=model, how=how,
                steps=config.window, group=group, implementation=config.attention,
            )  # fmt: skip

    def fill() -> jax.stages.Traced:
        with jax.set_mesh(mesh):
            return decode.fill.trace(
                params, pools, array(jnp.int32, parts, config.chunk_tokens),
                array(jnp.int32, parts), array(jnp.int32, parts), array(jnp.int32, parts, entries),
                config=model, implementation=config.attention,
            )  # fmt: skip

    return {"fill": fill, "window": window}
