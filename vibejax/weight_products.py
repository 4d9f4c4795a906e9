"""Products of activations with weights, as the trainer and as the sampler compute them.

Every one says precision=HIGHEST. It changes nothing for bfloat16 operands; a float32 operand would
otherwise be rounded to bfloat16 on a TPU.

Letters of the subscripts: B rows, T tokens, E model width, H query heads, K key/value heads, D head
dimension, F feed-forward width.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from vibejax.sharding import constrain

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """An einsum with a weight in x's dtype, whose gradient has the weight's own dtype.

    A weight's gradient sums over tokens and over devices: with float32 weights, in float32.

    On a mesh the whole weight is gathered, and its gradient scattered again: left to itself, XLA
    for TPUs multiplies by one device's part after the other, and moves the result each time.

    For it one factor is read transposed. Without the barrier XLA for CPUs computes the
    activation's derivative inside that transposing read, element by element: a training step of
    the shipped policy then takes twice as long.
    """
    return einsum(subscripts, x, _gathered(subscripts, w, x.dtype))


def _gathered(subscripts: str, w: jax.Array, dtype: Any) -> jax.Array:
    """A weight in the dtype of the computation, whole but for what devices share on purpose."""
    return constrain(w.astype(dtype), *_weight_axes(subscripts, embed=None))


def _weight_axes(subscripts: str, embed: str | None) -> list[str | None]:
    names = {"E": embed, "H": "heads", "K": "kv_heads", "D": "head_dim", "F": "mlp"}
    return [names[letter] for letter in subscripts.split("->")[0].split(",")[1]]


def _forward(subscripts, x, w):
    return project(subscripts, x, w), (x, w)


def _backward(subscripts, residuals, dy):
    x, w = residuals
    inputs, out_axes = subscripts.split("->")
    x_axes, w_axes = inputs.split(",")
    dy = jax.lax.optimization_barrier(dy)
    whole = _gathered(subscripts, w, x.dtype)
    dx = einsum(f"{out_axes},{w_axes}->{x_axes}", dy, whole)
    dw = einsum(f"{x_axes},{out_axes}->{w_axes}", x, dy, preferred_element_type=w.dtype)
    return dx, constrain(dw, *_weight_axes(subscripts, embed="embed"))


project.defvjp(_forward, _backward)


def project_held(subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """The same product as `project`'s, with a weight whose input axes are last."""
    inputs, outputs = subscripts.split("->")
    _, w_axes = inputs.split(",")
    summed = sum(axis not in outputs for axis in w_axes)
    rows, size = x.shape[: x.ndim - summed], math.prod(x.shape[x.ndim - summed :])
    y_NF = product_held(x.reshape(-1, size), w.reshape(-1, size), x.dtype)
    return y_NF.reshape(*rows, *w.shape[: w.ndim - summed])


def product_held(x_NE: jax.Array, w_FE: jax.Array, dtype: Any) -> jax.Array:
    """[N, F] of `dtype`: few rows times a weight, on a CPU each as of any other number of rows.

    XLA for CPUs packs the second factor of a product each time it is run: let it be x. It takes
    64, 32 or 16 columns of it at once, whichever divides their number, and sums in an order of its
    own for each: every product here has an odd multiple of 16. Without a mesh as on a CPU.
    """
    product = functools.partial(einsum, preferred_element_type=dtype)
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device and device.platform != "cpu":
        return product("NE,FE->NF", x_NE, w_FE)
    first = _columns_at_once(len(x_NE))
    parts = [part_NE for part_NE in (x_NE[:first], x_NE[first:]) if len(part_NE)]
    y_FN = jnp.concatenate([product("FE,NE->FN", w_FE, part_NE) for part_NE in parts], axis=1)
    return jax.lax.optimization_barrier(y_FN).T  # or XLA turns the product around again


def _columns_at_once(columns: int) -> int:
    """The most of `columns` that are an odd multiple of 16, the last of which may be incomplete."""
    sixteens = math.ceil(columns / 16)
    return columns if sixteens % 2 else 16 * (sixteens - 1)
