"""Packed rows for the tests of attention: layouts, random inputs, outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vibejax.kernels import reference


def layout(lengths, T, front=0):
    """[T] positions and segments of documents in a row, after `front` places of padding."""
    position_T, segment_T = np.zeros(T, np.int32), np.zeros(T, np.int32)
    start = front
    for segment, length in enumerate(lengths, start=1):
        position_T[start : start + length] = np.arange(length)
        segment_T[start : start + length] = segment
        start += length
    assert start <= T
    return position_T, segment_T


def row_ids(lengths, T, front=0):
    """The four id arguments of attention for one row, [1, T] each."""
    position_T, segment_T = layout(lengths, T, front)
    return position_T[None], segment_T[None], position_T[None], segment_T[None]


def inputs(T, H=4, K=2, D=8, dtype=np.float32, seed=0):
    """Random queries, keys and values of one row."""
    random = np.random.default_rng(seed)
    return [random.standard_normal((1, T, heads, D)).astype(dtype) for heads in (H, K, K)]


@functools.partial(jax.jit, static_argnums=0)
def out_and_grads(attend, arrays, ids):
    """The output, and the gradients of a scalar that weighs every output differently."""

    def total(q, k, v):
        out = attend(q, k, v, *ids).astype(jnp.float32)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return out, *grads


def check(attend, arrays, ids, tolerance):
    """Holds `attend` against the reference in float32, relative to the largest value."""
    exact = [x.astype(np.float32) for x in arrays]
    want = out_and_grads(reference.attention, exact, ids)
    got = out_and_grads(attend, arrays, ids)
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w)
        np.testing.assert_allclose(g, w, atol=tolerance * max(1.0, np.abs(w).max()))


def kernel_products(jaxpr, inside=False):
    """Every dot_general inside the Pallas kernels of a program: lowered text holds bytecode."""
    found = []
    for equation in jaxpr.eqns:
        if inside and equation.primitive.name == "dot_general":
            found.append(equation)
        within = inside or equation.primitive.name == "pallas_call"
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += kernel_products(inner, within)
    return found
