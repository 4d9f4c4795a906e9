"""The copy of the parameters that is decoded with: a list of layers, in the sampler's dtype.

Decoding reads every weight once a token. From a stacked array each layer would first be copied out
of it; from a list it is read where it lies. Projections have their input axes last, the form in
which a CPU reads the first factor of a product (`weight_products.product_held`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vibejax.qwen2 import ModelConfig, ParamInfo, Params, map_table, param_table
from vibejax.sharding import replicated, sharding


def make(params: Params, config: ModelConfig, dtype: Any, mesh: Mesh | None = None) -> Params:
    """The copy that `qwen2.cached_states` reads, of `dtype`.

    Args:
        params: tree of `param_table(config)`.
        config: of the model.
        dtype: of the copy.
        mesh: where it is to lie, over devices that hold `params`: all of them, or with several
            processes this one's; None: where they are. One layer is moved at a time.
    """
    dtype, away = jnp.dtype(dtype), None
    if mesh is not None and not params["norm"].is_fully_addressable:
        mesh, away = None, mesh  # no program moves from the mesh of all to that of one

    def moved(held: Params, places: Params) -> Params:
        return held if away is None else _to_process(held, places, params["norm"].sharding.mesh)

    places = shapes(config, dtype, away)
    layers = [
        moved(layer(params["layers"], i, config, dtype, mesh), places["layers"][i])
        for i in range(config.layers)
    ]
    rest = {name: w for name, w in params.items() if name != "layers"}
    return {
        name: moved(w, places[name]) for name, w in _beside(rest, config, dtype, mesh).items()
    } | {"layers": layers}


def shapes(config: ModelConfig, dtype: Any, mesh: Mesh | None = None) -> Params:
    """The shapes and dtypes of a copy, and on a mesh where they lie."""

    def held(info: ParamInfo) -> jax.ShapeDtypeStruct:
        shape, axes = (info.shape, info.axes)
        if info.stacked:
            order = (*range(1 + info.inputs, len(shape)), *range(1, 1 + info.inputs))
            shape, axes = tuple(shape[i] for i in order), tuple(axes[i] for i in order)
        place = None if mesh is None else sharding(mesh, shape, *axes)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    table = map_table(held, config)
    return table | {"layers": [table["layers"]] * config.layers}


def _to_process(held: Params, places: Params, mesh: Mesh) -> Params:
    """Arrays over the `mesh` of all processes, laid out as `places` say on the devices of this one.

    All devices get the whole; this process's copies then become an array of its own, from which
    each device keeps its part. All processes must call.
    """

    def to_process(w: jax.Array, place: jax.ShapeDtypeStruct) -> jax.Array:
        copies = [shard.data for shard in w.addressable_shards]
        whole = replicated(place.sharding.mesh)
        local = jax.make_array_from_single_device_arrays(w.shape, whole, copies)
        return jax.device_put(local, place.sharding)

    return jax.tree.map(to_process, _whole_everywhere(held, mesh), places)


@functools.partial(jax.jit, static_argnames="mesh")
def _whole_everywhere(held: Params, mesh: Mesh) -> Params:
    return jax.tree.map(lambda w: jax.lax.with_sharding_constraint(w, replicated(mesh)), held)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def layer(stacked, i, config, dtype, mesh):
    """Layer i of a copy, from the stacked ones."""

    def hold(info: ParamInfo, w_L: jax.Array) -> jax.Array:
        w = jax.lax.dynamic_index_in_dim(w_L, i, keepdims=False).astype(dtype)
        order = (*range(info.inputs, w.ndim), *range(info.inputs))
        w = w.transpose(order)
        return _on(mesh, w, *(info.axes[1:][axis] for axis in order))

    return jax.tree.map(
        hold, param_table(config)["layers"], stacked, is_leaf=lambda x: isinstance(x, ParamInfo)
    )


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def _beside(rest, config, dtype, mesh):
    """What a copy holds beside layers."""
    table = param_table(config)
    return {name: _on(mesh, w.astype(dtype), *table[name].axes) for name, w in rest.items()}


def _on(mesh: Mesh | None, w: jax.Array, *axes: str) -> jax.Array:
    if mesh is None:
        return w
    return jax.lax.with_sharding_constraint(w, sharding(mesh, w.shape, *axes))
