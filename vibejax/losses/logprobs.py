"""Log-probabilities of given tokens, without ever holding the logits of a whole row.

At T = 65,536 and V = 151,936 the float32 logits of one row are 37 GiB. `token_logprobs` goes
over the tokens in chunks and its backward pass recomputes each chunk. It is the one function
behind the training loss, the reference policy and scoring, so that all agree to the last bit.

Under a mesh each device works on its own rows, its own part of the row (`context`) and its own
part of the vocabulary (`tensor`); the head's gradient is summed over devices once, at the end.

Shape suffixes: B rows, T tokens, C tokens of a chunk, E model width, V vocabulary rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vibejax.sharding import mesh_axes, spec

MASKED = -1e30
CHUNK_TOKENS = 1_024  # logits of a chunk at V = 151,936: 594 MiB in float32
_EXACT = jax.lax.Precision.HIGHEST  # for float32 operands; bfloat16 ones are exact as they are


class TokenLogprobs(NamedTuple):
    """What the policy says of given tokens.

    Attributes:
        logprob_BT: [B, T] float32, nats; 0 where no value was needed.
        entropy_BT: [B, T] float32, nats, of the distribution that the token was drawn from; a
            constant to differentiation.
    """

    logprob_BT: jax.Array
    entropy_BT: jax.Array


class _Settings(NamedTuple):
    vocab: int
    temperature: float
    chunk_tokens: int


@jax.named_scope("token_logprobs")
def token_logprobs(
    x_BTE: jax.Array,
    head_VE: jax.Array,
    target_BT: jax.Array,
    needed_BT: jax.Array,
    *,
    vocab: int,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenLogprobs:
    """The log-probability and the entropy of the distribution of each target.

    The logits are products of x's dtype accumulated in float32; softmax statistics are float32.
    Tokens of which no value is needed are moved to the end of their row, and chunks that hold
    nothing else are skipped.

    Args:
        x_BTE: [B, T, E] outputs of the model.
        head_VE: [V, E] output head, of any float dtype; its gradient is summed in float32.
        target_BT: [B, T] int32, the token that follows each position.
        needed_BT: [B, T] bool, where a value is wanted.
        vocab: ids below it exist; the rows above are padding and have probability 0.
        temperature: divides the logits, as the sampler divides them.
        chunk_tokens: tokens per device whose logits exist at one time.
    """
    settings = _Settings(vocab, temperature, chunk_tokens)
    logprob_BT, entropy_BT = _logprobs(settings, x_BTE, head_VE, target_BT, needed_BT)
    return TokenLogprobs(logprob_BT, jax.lax.stop_gradient(entropy_BT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(settings, x_BTE, head_VE, target_BT, needed_BT):
    return _forward(settings, x_BTE, head_VE, target_BT, needed_BT)[0]


def _forward(settings, x_BTE, head_VE, target_BT, needed_BT):
    rows, tokens = spec("batch", "length"), spec("batch", "length", None)
    run = _on_mesh(
        functools.partial(_local_forward, settings),
        in_specs=(tokens, spec("vocab", None), rows, rows),
        out_specs=(rows, rows, rows),
    )
    logprob_BT, entropy_BT, lse_BT = run(x_BTE, head_VE.astype(x_BTE.dtype), target_BT, needed_BT)
    residuals = (x_BTE, head_VE, target_BT, needed_BT, lse_BT)
    return (logprob_BT, entropy_BT), residuals


def _backward(settings, residuals, cotangents):
    x_BTE, head_VE, target_BT, needed_BT, lse_BT = residuals
    rows, tokens = spec("batch", "length"), spec("batch", "length", None)
    run = _on_mesh(
        functools.partial(_local_backward, settings),
        in_specs=(tokens, spec("vocab", None), *(rows,) * 4),
        out_specs=(tokens, spec("vocab", "embed")),
    )
    dx_BTE, dhead_VE = run(
        x_BTE, head_VE.astype(x_BTE.dtype), target_BT, needed_BT, lse_BT, cotangents[0]
    )
    return dx_BTE, dhead_VE.astype(head_VE.dtype), None, None


_logprobs.defvjp(_forward, _backward)


def _on_mesh(function, in_specs, out_specs):
    """`function` on each device's part, told whether there is a mesh to reduce over."""
    if jax.sharding.get_abstract_mesh().empty:
        return functools.partial(function, False)
    return jax.shard_map(
        functools.partial(function, True), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _local_forward(settings, sharded, x_BTE, head_VE, target_BT, needed_BT):
    first_id = _first_id(sharded, head_VE)

    def chunk(x_BCE, target_BC):
        logit_BCV, is_target_BCV = _logits(settings, x_BCE, head_VE, target_BC, first_id)
        largest_BC = _reduce(jax.lax.pmax, sharded, jnp.max(logit_BCV, axis=-1))
        # Sums of differences from the largest: those of the logits would cancel when subtracted.
        logit_BCV -= largest_BC[..., None]
        exp_BCV = jnp.exp(logit_BCV)
        sums = (
            jnp.sum(exp_BCV, axis=-1),
            jnp.sum(exp_BCV * logit_BCV, axis=-1),
            jnp.sum(jnp.where(is_target_BCV, logit_BCV, 0.0), axis=-1),
        )
        mass_BC, weighted_BC, target_logit_BC = _reduce(jax.lax.psum, sharded, sums)
        log_mass_BC = jnp.log(mass_BC)
        entropy_BC = log_mass_BC - weighted_BC / mass_BC
        return target_logit_BC - log_mass_BC, entropy_BC, largest_BC + log_mass_BC

    split, join = _chunks(settings, needed_BT)

    def step(_, parts):
        needed_BC, x_BCE, target_BC = parts
        zeros = (jnp.zeros(target_BC.shape, jnp.float32),) * 3
        some = _anywhere(sharded, needed_BC)
        return None, jax.lax.cond(some, chunk, lambda *_: zeros, x_BCE, target_BC)

    parts = (split(needed_BT), split(x_BTE), split(target_BT))
    _, outputs = jax.lax.scan(step, None, parts)
    return tuple(jnp.where(needed_BT, join(y), 0.0) for y in outputs)


def _local_backward(settings, sharded, x_BTE, head_VE, target_BT, needed_BT, lse_BT, dlogprob_BT):
    first_id = _first_id(sharded, head_VE)
    split, join = _chunks(settings, needed_BT)

    def chunk(dhead_VE, x_BCE, target_BC, lse_BC, dlogprob_BC):
        logit_BCV, is_target_BCV = _logits(settings, x_BCE, head_VE, target_BC, first_id)
        # log p <= 0; the bound keeps exp finite at tokens whose lse was not computed
        p_BCV = jnp.exp(jnp.minimum(logit_BCV - lse_BC[..., None], 0.0))
        dlogit_BCV = (is_target_BCV - p_BCV) * (dlogprob_BC / settings.temperature)[..., None]
        dlogit_BCV = dlogit_BCV.astype(x_BCE.dtype)
        dx_BCE = jnp.einsum("BCV,VE->BCE", dlogit_BCV, head_VE, precision=_EXACT)
        dhead_VE += jnp.einsum(
            "BCV,BCE->VE", dlogit_BCV, x_BCE, precision=_EXACT, preferred_element_type=jnp.float32
        )
        return dhead_VE, dx_BCE

    def skip(dhead_VE, x_BCE, target_BC, lse_BC, dlogprob_BC):
        return dhead_VE, jnp.zeros_like(x_BCE)

    def step(dhead_VE, parts):
        needed_BC, *arrays = parts
        return jax.lax.cond(_anywhere(sharded, needed_BC), chunk, skip, dhead_VE, *arrays)

    dlogprob_BT = jnp.where(needed_BT, dlogprob_BT, 0.0)
    parts = tuple(split(y) for y in (needed_BT, x_BTE, target_BT, lse_BT, dlogprob_BT))
    dhead_VE, dx = jax.lax.scan(step, jnp.zeros(head_VE.shape, jnp.float32), parts)
    dx_BTE = join(dx)
    if sharded:
        dx_BTE = jax.lax.psum(dx_BTE.astype(jnp.float32), mesh_axes("vocab")).astype(x_BTE.dtype)
        scattered = mesh_axes("embed")
        others = {*mesh_axes("batch"), *mesh_axes("length")} - set(scattered)
        dhead_VE = jax.lax.psum(dhead_VE, tuple(sorted(others)))
        dhead_VE = jax.lax.psum_scatter(dhead_VE, scattered, scatter_dimension=1, tiled=True)
    return dx_BTE, dhead_VE


def _logits(settings, x_BCE, head_VE, target_BC, first_id):
    """Float32 logits of this device's vocabulary, and which of them is each token's target."""
    logit_BCV = jnp.einsum(
        "BCE,VE->BCV", x_BCE, head_VE, precision=_EXACT, preferred_element_type=jnp.float32
    )
    id_V = first_id + jnp.arange(head_VE.shape[0])
    logit_BCV = jnp.where((id_V < settings.vocab)[None, None], logit_BCV, MASKED)
    return logit_BCV / settings.temperature, id_V[None, None] == target_BC[..., None]


def _chunks(settings, needed_BT):
    """How a [B, T, ...] array is cut into chunks, those with needed tokens first, and joined."""
    B, T = needed_BT.shape
    size = min(T, max(1, settings.chunk_tokens // B))
    count = math.ceil(T / size)
    order_BT = jnp.argsort(~needed_BT, axis=1, stable=True)
    back_BT = jnp.argsort(order_BT, axis=1)

    def take(y, index_BT):
        return jnp.take_along_axis(y, index_BT.reshape(B, -1, *(1,) * (y.ndim - 2)), axis=1)

    def split(y):
        y = take(y, order_BT)
        y = jnp.pad(y, ((0, 0), (0, count * size - T), *((0, 0),) * (y.ndim - 2)))
        return y.reshape(B, count, size, *y.shape[2:]).swapaxes(0, 1)

    def join(y):
        return take(y.swapaxes(0, 1).reshape(B, count * size, *y.shape[3:]), back_BT)

    return split, join


def _first_id(sharded: bool, head_VE: jax.Array):
    """The token id of this device's first vocabulary row."""
    if not sharded:
        return 0
    return jax.lax.axis_index(mesh_axes("vocab")) * head_VE.shape[0]


def _reduce(collective, sharded: bool, values):
    """`values` reduced over the devices that share the vocabulary."""
    return collective(values, mesh_axes("vocab")) if sharded else values


def _anywhere(sharded: bool, needed_BC: jax.Array) -> jax.Array:
    """Whether any device needs a token of its chunk: all must take the same branch."""
    some = jnp.any(needed_BC)
    if sharded:
        axes = (*mesh_axes("batch"), *mesh_axes("length"), *mesh_axes("vocab"))
        some = jax.lax.pmax(some.astype(jnp.int32), axes) > 0
    return some
