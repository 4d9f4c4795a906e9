"""Log-probabilities of given tokens, without ever holding the logits of a whole row.

At T = 65,536 and V = 151,936 the float32 logits of one row are 37 GiB. `token_logprobs` goes
over the tokens in chunks and its backward pass recomputes each chunk. It is the one function
behind the training loss, the reference policy and scoring, so that all agree to the last bit.

Under a mesh each device works on its own rows, its own part of the row (`context`) and its own
part of the vocabulary (`tensor`); the head's gradient is summed over devices once, at the end.

Shape suffixes: B rows, T tokens, N = B * T tokens of a device, C tokens of a chunk, E model width,
V vocabulary rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vibejax.sharding import mesh_axes, spec

MASKED = -1e30
CHUNK_TOKENS = 1_024  # logits of a chunk at V = 151,936: 594 MiB in float32
CHUNKS = 8  # of fewer tokens, so that those of which no value is needed can be skipped
LEAST_CHUNK_TOKENS = 128  # each chunk reads and writes the head's whole gradient
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
    Tokens of which no value is needed are moved behind those of a device's other rows, and chunks
    that hold nothing else are skipped.

    Args:
        x_BTE: [B, T, E] outputs of the model.
        head_VE: [V, E] output head, of any float dtype; its gradient is summed in float32.
        target_BT: [B, T] int32, the token that follows each position.
        needed_BT: [B, T] bool, where a value is wanted.
        vocab: ids below it exist; the rows above are padding and have probability 0.
        temperature: divides the logits, as the sampler divides them.
        chunk_tokens: tokens per device whose logits exist at one time, at most.
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

    def chunk(x_CE, target_C):
        logit_CV, is_target_CV = _logits(settings, x_CE, head_VE, target_C, first_id)
        largest_C = _reduce(jax.lax.pmax, sharded, jnp.max(logit_CV, axis=-1))
        # Sums of differences from the largest: those of the logits would cancel when subtracted.
        logit_CV -= largest_C[:, None]
        exp_CV = jnp.exp(logit_CV)
        sums = (
            jnp.sum(exp_CV, axis=-1),
            jnp.sum(exp_CV * logit_CV, axis=-1),
            jnp.sum(jnp.where(is_target_CV, logit_CV, 0.0), axis=-1),
        )
        mass_C, weighted_C, target_logit_C = _reduce(jax.lax.psum, sharded, sums)
        log_mass_C = jnp.log(mass_C)
        entropy_C = log_mass_C - weighted_C / mass_C
        return target_logit_C - log_mass_C, entropy_C, largest_C + log_mass_C

    split, join = _chunks(settings, needed_BT)

    def step(_, parts):
        needed_C, x_CE, target_C = parts
        zeros = (jnp.zeros(target_C.shape, jnp.float32),) * 3
        some = _anywhere(sharded, needed_C)
        return None, jax.lax.cond(some, chunk, lambda *_: zeros, x_CE, target_C)

    parts = (split(needed_BT), split(x_BTE), split(target_BT))
    _, outputs = jax.lax.scan(step, None, parts)
    return tuple(jnp.where(needed_BT, join(y), 0.0) for y in outputs)


def _local_backward(settings, sharded, x_BTE, head_VE, target_BT, needed_BT, lse_BT, dlogprob_BT):
    first_id = _first_id(sharded, head_VE)
    split, join = _chunks(settings, needed_BT)

    def chunk(dhead_VE, x_CE, target_C, lse_C, dlogprob_C):
        logit_CV, is_target_CV = _logits(settings, x_CE, head_VE, target_C, first_id)
        # log p <= 0; the bound keeps exp finite at tokens whose lse was not computed
        p_CV = jnp.exp(jnp.minimum(logit_CV - lse_C[:, None], 0.0))
        dlogit_CV = (is_target_CV - p_CV) * (dlogprob_C / settings.temperature)[:, None]
        dlogit_CV = dlogit_CV.astype(x_CE.dtype)
        dx_CE = jnp.einsum("CV,VE->CE", dlogit_CV, head_VE, precision=_EXACT)
        dhead_VE += jnp.einsum(
            "CV,CE->VE", dlogit_CV, x_CE, precision=_EXACT, preferred_element_type=jnp.float32
        )
        return dhead_VE, dx_CE

    def skip(dhead_VE, x_CE, target_C, lse_C, dlogprob_C):
        return dhead_VE, jnp.zeros_like(x_CE)

    def step(dhead_VE, parts):
        needed_C, *arrays = parts
        return jax.lax.cond(_anywhere(sharded, needed_C), chunk, skip, dhead_VE, *arrays)

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


def _logits(settings, x_CE, head_VE, target_C, first_id):
    """Float32 logits of this device's vocabulary, and which of them is each token's target."""
    logit_CV = jnp.einsum(
        "CE,VE->CV", x_CE, head_VE, precision=_EXACT, preferred_element_type=jnp.float32
    )
    id_V = first_id + jnp.arange(head_VE.shape[0])
    logit_CV = jnp.where((id_V < settings.vocab)[None], logit_CV, MASKED)
    return logit_CV / settings.temperature, id_V[None] == target_C[:, None]


def _chunks(settings, needed_BT):
    """How a [B, T, ...] array is cut into chunks, those with needed tokens first, and joined."""
    N = needed_BT.size
    size = min(N, settings.chunk_tokens, max(LEAST_CHUNK_TOKENS, math.ceil(N / CHUNKS)))
    count = math.ceil(N / size)
    order_N = jnp.argsort(~needed_BT.reshape(N), stable=True)
    back_N = jnp.argsort(order_N)

    def split(y):
        y = jnp.take(y.reshape(N, *y.shape[2:]), order_N, axis=0)
        y = jnp.pad(y, ((0, count * size - N), *((0, 0),) * (y.ndim - 1)))
        return y.reshape(count, size, *y.shape[1:])

    def join(y):
        y = jnp.take(y.reshape(-1, *y.shape[2:]), back_N, axis=0)
        return y.reshape(*needed_BT.shape, *y.shape[1:])

    return split, join


def _first_id(sharded: bool, head_VE: jax.Array):
    """The token id of this device's first vocabulary row."""
    if not sharded:
        return 0
    return jax.lax.axis_index(mesh_axes("vocab")) * head_VE.shape[0]


def _reduce(collective, sharded: bool, values):
    """`values` reduced over the devices that share the vocabulary."""
    return collective(values, mesh_axes("vocab")) if sharded else values


def _anywhere(sharded: bool, needed_C: jax.Array) -> jax.Array:
    """Whether any device needs a token of its chunk: all must take the same branch."""
    some = jnp.any(needed_C)
    if sharded:
        axes = (*mesh_axes("batch"), *mesh_axes("length"), *mesh_axes("vocab"))
        some = jax.lax.pmax(some.astype(jnp.int32), axes) > 0
    return some
