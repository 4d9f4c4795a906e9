"""Log-probabilities of given tokens, and losses of them, without ever holding a row's logits.

At T = 65,536 and V = 151,936 the float32 logits of one row are 37 GiB. Everything here goes over
the tokens in chunks. `token_logprobs` is the one function behind scoring and the reference policy;
its backward pass computes each chunk's logits again. `token_loss` is for training: where a loss
is a sum of one term a token, its gradient is taken while the chunk's logits are there, and the
head multiplies three times instead of four.

Under a mesh each device works on its own rows, its own part of the row (`context`) and its own
part of the vocabulary (`tensor`); the head's gradient is summed over devices once, at the end.

Shape suffixes: B rows, T tokens, N = B * T tokens of a device, C tokens of a chunk, E model width,
V vocabulary rows.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vibejax.sharding import shared_axes, spec

Channels = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

MASKED = -1e30
CHUNK_TOKENS = 1_024  # logits of a chunk at V = 151,936: 594 MiB in float32
CHUNKS = 8  # of fewer tokens, so that those of which no value is needed can be skipped
LEAST_CHUNK_TOKENS = 128  # each chunk reads and writes the head's whole gradient
_EXACT = jax.lax.Precision.HIGHEST  # for float32 operands; bfloat16 ones are exact as they are


class TokenLogprobs(NamedTuple):
    """What the policy says of given tokens; of a chunk's tokens, [C] in place of [B, T].

    Attributes:
        logprob_BT: [B, T] float32, nats; 0 where no value was needed.
        entropy_BT: [B, T] float32, nats, of the distribution that the token was drawn from; a
            constant to differentiation.
    """

    logprob_BT: jax.Array
    entropy_BT: jax.Array


TermsFn = Callable[[TokenLogprobs, Channels], tuple[jax.Array, Metrics]]


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


@jax.named_scope("token_loss")
def token_loss(
    terms: TermsFn,
    x_BTE: jax.Array,
    head_VE: jax.Array,
    target_BT: jax.Array,
    needed_BT: jax.Array,
    channels: Channels,
    *,
    vocab: int,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[jax.Array, tuple[Metrics, TokenLogprobs]]:
    """A loss that is a sum over tokens of what depends on that token alone.

    The value and the gradient of `terms(token_logprobs(...), channels)`, which are computed
    together, chunk by chunk. Only the loss can be differentiated.

    Args:
        terms: (log-probs [C], channels [C]) -> (sum over the tokens, sums for the metrics); a token
            whose value is not needed must add nothing. Static: it may close over no array.
        x_BTE: as for `token_logprobs`, which see for the others too.
        head_VE: [V, E].
        target_BT: [B, T] int32.
        needed_BT: [B, T] bool.
        channels: [B, T] arrays that `terms` reads beside the log-probs; constants.
        vocab: ids below it exist.
        temperature: divides the logits.
        chunk_tokens: tokens per device whose logits exist at one time, at most.
    """
    settings = _Settings(vocab, temperature, chunk_tokens)
    return _loss(settings, terms, x_BTE, head_VE, target_BT, needed_BT, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(settings, x_BTE, head_VE, target_BT, needed_BT):
    return _logprobs_forward(settings, x_BTE, head_VE, target_BT, needed_BT)[0]


def _logprobs_forward(settings, x_BTE, head_VE, target_BT, needed_BT):
    rows, tokens = spec("batch", "length"), spec("batch", "length", None)
    run = _on_mesh(
        functools.partial(_local_logprobs, settings),
        in_specs=(tokens, spec("vocab", None), rows, rows),
        out_specs=(rows, rows, rows),
    )
    logprob_BT, entropy_BT, lse_BT = run(x_BTE, head_VE.astype(x_BTE.dtype), target_BT, needed_BT)
    residuals = (x_BTE, head_VE, target_BT, needed_BT, lse_BT)
    return (logprob_BT, entropy_BT), residuals


def _logprobs_backward(settings, residuals, cotangents):
    x_BTE, head_VE, target_BT, needed_BT, lse_BT = residuals
    rows, tokens = spec("batch", "length"), spec("batch", "length", None)
    run = _on_mesh(
        functools.partial(_local_gradients, settings),
        in_specs=(tokens, spec("vocab", None), *(rows,) * 4),
        out_specs=(tokens, spec("vocab", "embed")),
    )
    dx_BTE, dhead_VE = run(
        x_BTE, head_VE.astype(x_BTE.dtype), target_BT, needed_BT, lse_BT, cotangents[0]
    )
    return dx_BTE, dhead_VE.astype(head_VE.dtype), None, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(settings, terms, x_BTE, head_VE, target_BT, needed_BT, channels):
    logprobs = token_logprobs(x_BTE, head_VE, target_BT, needed_BT, **settings._asdict())
    loss, metrics = terms(logprobs, channels)
    return loss, (metrics, logprobs)


def _loss_forward(settings, terms, x_BTE, head_VE, target_BT, needed_BT, channels):
    rows, tokens = spec("batch", "length"), spec("batch", "length", None)
    run = _on_mesh(
        functools.partial(_local_loss, settings, terms),
        in_specs=(tokens, spec("vocab", None), rows, rows, rows),
        out_specs=(spec(), rows, tokens, spec("vocab", "embed")),
    )
    (loss, metrics), logprobs, dx_BTE, dhead_VE = run(
        x_BTE, head_VE.astype(x_BTE.dtype), target_BT, needed_BT, channels
    )
    return (loss, (metrics, logprobs)), (dx_BTE, dhead_VE.astype(head_VE.dtype))


def _loss_backward(settings, terms, gradients, cotangents):
    dloss, _ = cotangents
    dx_BTE, dhead_VE = ((dloss * gradient).astype(gradient.dtype) for gradient in gradients)
    return dx_BTE, dhead_VE, None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _on_mesh(function, in_specs, out_specs):
    """`function` on each device's part."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _local_logprobs(settings, x_BTE, head_VE, target_BT, needed_BT):
    split, join = _chunks(settings, needed_BT)

    def chunk(x_CE, target_C):
        return _statistics(*_logits(settings, x_CE, head_VE, target_C))

    def step(_, parts):
        needed_C, x_CE, target_C = parts
        zeros = (jnp.zeros(target_C.shape, jnp.float32),) * 3
        return None, jax.lax.cond(_anywhere(needed_C), chunk, lambda *_: zeros, x_CE, target_C)

    parts = (split(needed_BT), split(x_BTE), split(target_BT))
    _, outputs = jax.lax.scan(step, None, parts)
    return tuple(jnp.where(needed_BT, join(y), 0.0) for y in outputs)


def _local_gradients(settings, x_BTE, head_VE, target_BT, needed_BT, lse_BT, dlogprob_BT):
    split, join = _chunks(settings, needed_BT)

    def chunk(dhead_VE, x_CE, target_C, lse_C, dlogprob_C):
        logits = _logits(settings, x_CE, head_VE, target_C)
        dx_CE, added_VE = _gradients(settings, x_CE, head_VE, *logits, lse_C, dlogprob_C)
        return dhead_VE + added_VE, dx_CE

    def skip(dhead_VE, x_CE, target_C, lse_C, dlogprob_C):
        return dhead_VE, jnp.zeros_like(x_CE)

    def step(dhead_VE, parts):
        needed_C, *arrays = parts
        return jax.lax.cond(_anywhere(needed_C), chunk, skip, dhead_VE, *arrays)

    dlogprob_BT = jnp.where(needed_BT, dlogprob_BT, 0.0)
    parts = tuple(split(y) for y in (needed_BT, x_BTE, target_BT, lse_BT, dlogprob_BT))
    dhead_VE, dx = jax.lax.scan(step, jnp.zeros(head_VE.shape, jnp.float32), parts)
    return _summed_over_devices(join(dx), dhead_VE)


def _local_loss(settings, terms, x_BTE, head_VE, target_BT, needed_BT, channels):
    split, join = _chunks(settings, needed_BT)

    def chunk(sums, needed_C, x_CE, target_C, channels):
        dhead_VE, totals = sums
        logits = _logits(settings, x_CE, head_VE, target_C)
        *values, lse_C = _statistics(*logits)
        logprobs = TokenLogprobs(*(jnp.where(needed_C, y, 0.0) for y in values))
        loss, pullback, metrics = jax.vjp(
            lambda logprob_C: terms(logprobs._replace(logprob_BT=logprob_C), channels),
            logprobs.logprob_BT,
            has_aux=True,
        )
        dlogprob_C = jnp.where(needed_C, *pullback(jnp.ones_like(loss)), 0.0)
        dx_CE, added_VE = _gradients(settings, x_CE, head_VE, *logits, lse_C, dlogprob_C)
        totals = jax.tree.map(jnp.add, totals, (loss, metrics))
        return (dhead_VE + added_VE, totals), (logprobs, dx_CE)

    def skip(sums, needed_C, x_CE, target_C, channels):
        zeros_C = jnp.zeros(target_C.shape, jnp.float32)
        return sums, (TokenLogprobs(zeros_C, zeros_C), jnp.zeros_like(x_CE))

    def step(sums, parts):
        return jax.lax.cond(_anywhere(parts[0]), chunk, skip, sums, *parts)

    parts = jax.tree.map(split, (needed_BT, x_BTE, target_BT, channels))
    floats_BT = jnp.zeros(needed_BT.shape, jnp.float32)
    totals = jax.eval_shape(terms, TokenLogprobs(floats_BT, floats_BT), channels)
    zeros = (jnp.zeros(head_VE.shape, jnp.float32), jax.tree.map(jnp.zeros_like, totals))
    (dhead_VE, totals), (logprobs, dx) = jax.lax.scan(step, zeros, parts)
    totals = jax.lax.psum(totals, shared_axes("batch", "length"))
    return totals, jax.tree.map(join, logprobs), *_summed_over_devices(join(dx), dhead_VE)


def _logits(settings, x_CE, head_VE, target_C):
    """Float32 logits of this device's vocabulary, and which of them is each token's target."""
    logit_CV = jnp.einsum(
        "CE,VE->CV", x_CE, head_VE, precision=_EXACT, preferred_element_type=jnp.float32
    )
    part = jax.lax.axis_index(axes) if (axes := shared_axes("vocab")) else 0
    id_V = part * head_VE.shape[0] + jnp.arange(head_VE.shape[0])
    logit_CV = jnp.where((id_V < settings.vocab)[None], logit_CV, MASKED)
    return logit_CV / settings.temperature, id_V[None] == target_C[:, None]


def _statistics(logit_CV, is_target_CV):
    """Log-probability of the target, entropy and log of the sum of exponentials, all [C]."""
    axes = shared_axes("vocab")
    largest_C = jax.lax.pmax(jnp.max(logit_CV, axis=-1), axes)
    # Sums of differences from the largest: those of the logits would cancel when subtracted.
    logit_CV -= largest_C[:, None]
    exp_CV = jnp.exp(logit_CV)
    sums = (
        jnp.sum(exp_CV, axis=-1),
        jnp.sum(exp_CV * logit_CV, axis=-1),
        jnp.sum(jnp.where(is_target_CV, logit_CV, 0.0), axis=-1),
    )
    mass_C, weighted_C, target_logit_C = jax.lax.psum(sums, axes)
    log_mass_C = jnp.log(mass_C)
    entropy_C = log_mass_C - weighted_C / mass_C
    return target_logit_C - log_mass_C, entropy_C, largest_C + log_mass_C


def _gradients(settings, x_CE, head_VE, logit_CV, is_target_CV, lse_C, dlogprob_C):
    """Of x, in its dtype, and of this device's part of the head, in float32."""
    # log p <= 0; the bound keeps exp finite at tokens whose lse was not computed
    p_CV = jnp.exp(jnp.minimum(logit_CV - lse_C[:, None], 0.0))
    dlogit_CV = (is_target_CV - p_CV) * (dlogprob_C / settings.temperature)[:, None]
    # Without the barrier XLA for TPUs computes it in both products, and keeps the logits for that.
    dlogit_CV = jax.lax.optimization_barrier(dlogit_CV.astype(x_CE.dtype))
    dx_CE = jnp.einsum("CV,VE->CE", dlogit_CV, head_VE, precision=_EXACT)
    dhead_VE = jnp.einsum(
        "CV,CE->VE", dlogit_CV, x_CE, precision=_EXACT, preferred_element_type=jnp.float32
    )
    return dx_CE, dhead_VE


def _summed_over_devices(dx_BTE, dhead_VE):
    """Gradients of this device's tokens and of its part of the head, laid out as both are."""
    if axes := shared_axes("vocab"):
        dx_BTE = jax.lax.psum(dx_BTE.astype(jnp.float32), axes).astype(dx_BTE.dtype)
    scattered = shared_axes("embed")
    others = set(shared_axes("batch", "length")) - set(scattered)
    dhead_VE = jax.lax.psum(dhead_VE, tuple(sorted(others)))
    if scattered:
        dhead_VE = jax.lax.psum_scatter(dhead_VE, scattered, scatter_dimension=1, tiled=True)
    return dx_BTE, dhead_VE


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


def _anywhere(needed_C: jax.Array) -> jax.Array:
    """Whether any device needs a token of its chunk: all must take the same branch."""
    some = jnp.any(needed_C).astype(jnp.int32)
    return jax.lax.pmax(some, shared_axes("batch", "length", "vocab")) > 0
