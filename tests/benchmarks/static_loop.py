"""The loop that an engine is measured against: a batch decodes until its last row is done.

Prompts are prefilled together and aligned at their ends, so that every row writes the same cache
column. Model and sampling are the package's; nothing is refilled, and no row leaves.

Shape suffixes: B rows, T prompt columns, C completion tokens, S cache entries, V vocabulary rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import qwen2, sampling
from vibejax.kernels.reference import MASKED, product


def generate(
    params, config, prompts: np.ndarray, limits: np.ndarray, rows: int, longest: int
) -> int:
    """Completes prompts in batches of `rows`: the number of tokens within their limits.

    Args:
        params: as `sampler_copy.make` returns them.
        config: the model.
        prompts: [N, T] int32 of one length.
        limits: [N] int32 tokens of each completion.
        rows: B, dividing N.
        longest: completion that the cache has room for.
    """
    tokens = 0
    for start in range(0, len(prompts), rows):
        limit_B = limits[start : start + rows]
        outputs = _batch(params, prompts[start : start + rows], limit_B, start, config, longest)
        token_BC, logprob_BC = jax.device_get(outputs)
        assert np.isfinite(logprob_BC).all() and token_BC.shape == logprob_BC.shape
        tokens += int(limit_B.sum())
    return tokens


@functools.partial(jax.jit, static_argnames=("config", "longest"))
def _batch(params, token_BT, limit_B, first, config, longest):
    B, T = token_BT.shape
    S = T + longest
    shape_k, shape_v = (
        (B, config.kv_heads, config.head_dim, S),
        (B, config.kv_heads, S, config.head_dim),
    )
    caches = [(jnp.zeros(shape_k), jnp.zeros(shape_v))] * config.layers
    prompt_B = (first + jnp.arange(B)).astype(jnp.uint32)
    key_B = sampling.sequence_keys(0, 0, prompt_B, jnp.zeros(B, jnp.uint32))

    def forward(token_BN, column, caches):
        position_BN = jnp.broadcast_to(column + jnp.arange(token_BN.shape[1])[None], token_BN.shape)
        attend = functools.partial(_attend, column=column)
        return qwen2.cached_states(params, token_BN, position_BN, caches, attend, config)

    def draw(x_BE, i):
        uniform_B = sampling.uniforms(key_B, jnp.full(B, i))
        return sampling.sample(qwen2.logits(params, x_BE, config), uniform_B, temperature=1.0)

    def step(carry):
        i, token_B, caches, token_BC, logprob_BC = carry
        x_B1E, caches = forward(token_B[:, None], T + i - 1, caches)
        token_B, logprob_B = draw(x_B1E[:, 0], i)
        return i + 1, token_B, caches, *_put(i, token_B, logprob_B, token_BC, logprob_BC)

    x_BTE, caches = forward(token_BT, 0, caches)
    token_B, logprob_B = draw(x_BTE[:, -1], 0)
    out = _put(0, token_B, logprob_B, jnp.zeros((B, longest), jnp.int32), jnp.zeros((B, longest)))
    most = limit_B.max()
    *_, token_BC, logprob_BC = jax.lax.while_loop(
        lambda carry: carry[0] < most, step, (jnp.int32(1), token_B, caches, *out)
    )
    return token_BC, logprob_BC


def _attend(cache, q_BTHD, k_BTKD, v_BTKD, column):
    k_BKDS = jax.lax.dynamic_update_slice(cache[0], k_BTKD.transpose(0, 2, 3, 1), (0, 0, 0, column))
    v_BKSD = jax.lax.dynamic_update_slice(cache[1], v_BTKD.swapaxes(1, 2), (0, 0, column, 0))
    B, T, H, D = q_BTHD.shape
    K, S = v_BKSD.shape[1:3]
    q_BKTGD = q_BTHD.reshape(B, T, K, H // K, D).swapaxes(1, 2) * D**-0.5
    score_BKTGS = product("BKTGD,BKDS->BKTGS", q_BKTGD, k_BKDS)
    seen_TS = jnp.arange(S)[None] <= column + jnp.arange(T)[:, None]
    score_BKTGS = jnp.where(seen_TS[None, None, :, None], score_BKTGS, MASKED)
    weight_BKTGS = jax.nn.softmax(score_BKTGS, axis=-1)
    a_BKTGD = product("BKTGS,BKSD->BKTGD", weight_BKTGS, v_BKSD)
    return a_BKTGD.swapaxes(1, 2).reshape(B, T, H, D), (k_BKDS, v_BKSD)


def _put(i, token_B, logprob_B, token_BC, logprob_BC):
    return (
        jax.lax.dynamic_update_slice(token_BC, token_B[:, None], (0, i)),
        jax.lax.dynamic_update_slice(logprob_BC, logprob_B[:, None], (0, i)),
    )
