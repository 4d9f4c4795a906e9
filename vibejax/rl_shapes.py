"""The programs of an RL run over shapes alone: compiled ahead, or for devices that are not there.

Shape suffixes: B rows, T tokens of a row or chunk, M pages of a row.
"""

import functools

import jax
import jax.numpy as jnp

from vibejax import (
    batching,
    decode,
    handover,
    policy_programs,
    sampler_copy,
    sharding,
    train,
    train_shapes,
)
from vibejax.config.rl import RlConfig
from vibejax.engine import Engine
from vibejax.kernels import pages
from vibejax.qwen2 import ModelConfig
from vibejax.train_shapes import Trace, rows, traced


def trainer(
    run: policy_programs.Programs, config: RlConfig, model: ModelConfig, mesh: jax.sharding.Mesh
) -> dict[str, Trace]:
    """What the trainer's devices run in an RL run; each is traced by calling it.

    Those of `train_step`; `canary`, the scoring of the few tokens by which a hand-over is checked;
    `score`, that of whole rows, where the run does it; and `hand_over` of one layer's weights.

    Args:
        run: the programs.
        config: of the run.
        model: its policy.
        mesh: the devices.
    """
    channels = ["weight", "advantage", "sampler_logprob"]
    scored = [
        name
        for name, needed in (
            ("old_logprob", config.objective.updates > 1),
            ("reference_logprob", config.objective.kl),
        )
        if needed
    ]
    params = train.abstract_params(model, mesh)
    found = train_shapes.train_step(
        run.train_step, run.optimizer, config.train, model, mesh, policy_programs.SUMS,
        channels + scored,
    )  # fmt: skip
    short = rows(handover.short_rows(config), mesh, channels[:1])
    found["canary"] = traced(mesh, run.score, params, short)
    found["hand_over"] = lambda: _hand_over(config, model, mesh, params)
    if scored:
        found["score"] = traced(mesh, run.score, params, rows(config.train, mesh, channels[:1]))
    return found


def _hand_over(config, model, mesh, params) -> jax.stages.Traced:
    tensor = config.rollout.tensor
    everywhere = jax.sharding.Mesh(
        mesh.devices.reshape(mesh.size // tensor, 1, 1, tensor),
        mesh.axis_names,
        axis_types=mesh.axis_types,
    )
    dtype = jnp.dtype(config.train.dtype)
    return sampler_copy.layer.trace(params["layers"], 0, model, dtype, everywhere)


def sampler(engine: Engine, how: decode.Sampling) -> dict[str, Trace]:
    """What the engine's devices run where attention reads pages in place.

    `fill` with a chunk for each device, `window` with all slots, and `window_N` with N rows of a
    device, for the smaller numbers that a window may have.
    """
    config, mesh, parts = engine.config, engine.mesh, sharding.ways(engine.mesh, "batch")
    model, dtype = config.model, engine.dtype
    entries = -(-engine.context // config.page_tokens)

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
    # What the host brings lies nowhere yet.
    array = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind)  # noqa: E731

    def window(rows: int) -> jax.stages.Traced:
        B, group = parts * rows, batching.group_of(rows)
        held = decode.Rows(
            *[array(jnp.int32, B)] * 4,
            *[array(jnp.uint32, B)] * 2,
            array(jnp.int32, B, entries),
            array(jnp.int32, B // group),
            array(jnp.bool_, B),
        )
        number = array(jnp.uint32)
        with jax.set_mesh(mesh):
            return decode.window.trace(
                params, pools, None, held, number, number, config=model, how=how,
                steps=config.window, group=group, implementation=config.attention,
            )  # fmt: skip

    def fill() -> jax.stages.Traced:
        with jax.set_mesh(mesh):
            return decode.fill.trace(
                params, pools, array(jnp.int32, parts, config.chunk_tokens),
                array(jnp.int32, parts), array(jnp.int32, parts), array(jnp.int32, parts, entries),
                config=model, implementation=config.attention,
            )  # fmt: skip

    most, *fewer = batching.sizes(config.slots // parts, batching.LEAST_ROWS)
    found = {"window": functools.partial(window, most), "fill": fill}
    return found | {f"window_{rows}": functools.partial(window, rows) for rows in fewer}
