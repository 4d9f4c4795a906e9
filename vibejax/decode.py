"""The engine's programs on the device: fill pages, copy a page, decode a window of steps.

Each is compiled for few shapes and takes the pools and gives them back: they are donated, and
changed in place. What a row computes depends on no other row, so it does not matter which
sequences share a call.

Shape suffixes: B rows, T tokens of a chunk, M pages of a row, W steps of a window, V vocabulary.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vibejax import attention, qwen2, sampling
from vibejax.attention import Implementation
from vibejax.kernels import pages, row_copies
from vibejax.kernels.pages import Pages
from vibejax.kernels.row_copies import Copies
from vibejax.qwen2 import ModelConfig, Params
from vibejax.sharding import constrain

RUNNING, STOP, LENGTH, NOT_FINITE = range(4)  # why a row ended

Pools = list[Pages]  # one a layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that tokens are drawn from, and what ends a completion before its limit.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: probability mass kept.
        top_k: likeliest tokens kept; 0 keeps all.
        eos_ids: tokens that end a completion.
        min_tokens: before that many no `eos_ids` is drawn.
        loop_tokens: a completion ends once its last `loop_tokens` tokens repeat what stands a
            fixed distance of at most `engine.LOOP_PERIOD` before them; 0: never.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eos_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    loop_tokens: int = 0


class Rows(NamedTuple):
    """What decodes in a window, a sequence a row.

    Attributes:
        token_B: [B] int32 the last token of each, not cached yet.
        cached_B: [B] int32 how many are.
        drawn_B: [B] int32 tokens of its completion so far.
        left_B: [B] int32 how many more there may be; 0: an idle row.
        prompt_B: [B] uint32 identity of its prompt.
        sample_B: [B] uint32 which completion of it.
        table_BM: [B, M] int32 its pages in order.
        shared_G: [B / group] int32 leading pages that all rows of a group have in common.
        fresh_B: [B] bool, rows whose sequence was not there in the window before.
    """

    token_B: jax.Array
    cached_B: jax.Array
    drawn_B: jax.Array
    left_B: jax.Array
    prompt_B: jax.Array
    sample_B: jax.Array
    table_BM: jax.Array
    shared_G: jax.Array
    fresh_B: jax.Array


class Drawn(NamedTuple):
    """What a window drew.

    Attributes:
        token_BW: [B, W] int32.
        logprob_BW: [B, W] float32 nats.
        count_B: [B] int32 tokens of each row.
        why_B: [B] int32, `RUNNING` or what ended it.
    """

    token_BW: jax.Array
    logprob_BW: jax.Array
    count_B: jax.Array
    why_B: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "count", "page_tokens", "dtype"))
def empty_pools(config: ModelConfig, count: int, page_tokens: int, dtype) -> Pools:
    """Pages of zeros for every layer, on the mesh in force.

    Args:
        config: the model.
        count: pages of all devices together.
        page_tokens: tokens of a page.
        dtype: of keys and values.
    """
    create = lambda: pages.empty(  # noqa: E731
        count, config.kv_heads, page_tokens, config.head_dim, dtype
    )
    return [_placed(create()) for _ in range(config.layers)]


@functools.partial(jax.jit, static_argnames=("config", "rows", "tokens", "dtype"))
def empty_copies(config: ModelConfig, rows: int, tokens: int, dtype) -> list[Copies]:
    """Copies for every layer, on the mesh in force.

    Args:
        config: the model.
        rows: of all devices together.
        tokens: that each has room for.
        dtype: of the computation.
    """
    create = lambda: row_copies.empty(  # noqa: E731
        rows, tokens, config.kv_heads, config.head_dim, dtype
    )
    return [_placed(create()) for _ in range(config.layers)]


def _placed(arrays):
    return jax.tree.map(lambda x: constrain(x, "batch", "kv_heads", None, None), arrays)


@functools.partial(
    jax.jit,
    static_argnames=("config", "how", "steps", "group", "implementation"),
    donate_argnames=("pools", "copies"),
)
def window(
    params: Params,
    pools: Pools,
    copies: list[Copies] | None,
    rows: Rows,
    seed: jax.Array,
    step: jax.Array,
    *,
    config: ModelConfig,
    how: Sampling,
    steps: int,
    group: int,
    implementation: Implementation,
) -> tuple[Pools, list[Copies] | None, Drawn]:
    """At most `steps` tokens of each row; fewer once all have ended.

    Args:
        params: as `sampler_copy.make` returns them.
        pools: the pages of every layer.
        copies: of every layer, what each row has (`kernels.row_copies`), for attention that does
            not read pages where they lie; else None.
        rows: what decodes.
        seed: scalar int32, of the run.
        step: scalar int32, the optimizer step that the rollout is for.
        config: the model.
        how: the distribution.
        steps: W.
        group: rows of a group, adjacent ones.
        implementation: of attention over pages, where there are no copies.
    """
    rows = Rows(*(constrain(x, "batch", *(None,) * (x.ndim - 1)) for x in rows))
    B = rows.token_B.shape[0]
    key_B = sampling.sequence_keys(seed, step, rows.prompt_B, rows.sample_B)
    is_eos_V = jnp.zeros(config.vocab_rows, bool).at[jnp.asarray(how.eos_ids, jnp.int32)].set(True)
    state: list = pools  # what the steps change
    if copies is not None:
        copies = [
            attention.refresh_copies(copy, pool, rows.table_BM, rows.cached_B, rows.fresh_B)
            for copy, pool in zip(copies, pools, strict=True)
        ]
        state = [row_copies.empty_recent(copy, steps) for copy in copies]

    def advance(carry):
        i, token_B, why_B, count_B, token_BW, logprob_BW, state = carry
        live_B = why_B == RUNNING
        position_B1 = jnp.where(live_B, rows.cached_B + i, -1)[:, None]

        def attend_in_place(pool, q_B1HD, k_B1KD, v_B1KD):
            pool = attention.write_pages(pool, k_B1KD, v_B1KD, rows.table_BM, position_B1)
            length_B = position_B1[:, 0] + 1
            return attention.paged_attention(
                q_B1HD, pool, rows.table_BM, length_B, rows.shared_G, group, implementation
            ), pool

        def attend_to_copies(cache, q_B1HD, k_B1KD, v_B1KD):
            a_BHD, recent = row_copies.attend(
                *cache, q_B1HD[:, 0], k_B1KD[:, 0], v_B1KD[:, 0], rows.cached_B, i,
                rounded=pools[0].scale_PKal is not None,
            )  # fmt: skip
            return a_BHD[:, None], recent

        # Copies stay outside of what the loop carries: they do not change in it.
        x_B1E, state = qwen2.cached_states(
            params,
            token_B[:, None],
            position_B1,
            state if copies is None else list(zip(copies, state, strict=True)),
            attend_in_place if copies is None else attend_to_copies,
            config,
        )
        with jax.named_scope("sample"):
            logit_BV = qwen2.logits(params, x_B1E[:, 0], config)
            drawn_B = rows.drawn_B + i
            if how.min_tokens:
                early_B = drawn_B < how.min_tokens
                logit_BV = jnp.where(early_B[:, None] & is_eos_V[None], sampling.MASKED, logit_BV)
            next_B, logprob_B = sampling.sample(
                logit_BV, sampling.uniforms(key_B, drawn_B),
                temperature=how.temperature, top_p=how.top_p, top_k=how.top_k,
            )  # fmt: skip
        # The token of a row of NaN means nothing; it must not index anything.
        finite_B = jnp.isfinite(logprob_B)
        next_B = jnp.where(finite_B, next_B, 0)
        why_B = jnp.where(
            ~live_B, why_B,
            jnp.where(~finite_B, NOT_FINITE,
            jnp.where(is_eos_V[next_B], STOP,
            jnp.where(i + 1 >= rows.left_B, LENGTH, RUNNING))),
        )  # fmt: skip
        count_B = jnp.where(live_B & finite_B, i + 1, count_B)
        token_BW = jax.lax.dynamic_update_slice(token_BW, next_B[:, None], (0, i))
        logprob_BW = jax.lax.dynamic_update_slice(logprob_BW, logprob_B[:, None], (0, i))
        return i + 1, next_B, why_B, count_B, token_BW, logprob_BW, state

    start = (
        jnp.int32(0),
        rows.token_B,
        jnp.where(rows.left_B > 0, RUNNING, LENGTH),
        jnp.zeros(B, jnp.int32),
        jnp.zeros((B, steps), jnp.int32),
        jnp.zeros((B, steps), jnp.float32),
        state,
    )
    going = lambda carry: (carry[0] < steps) & jnp.any(carry[2] == RUNNING)  # noqa: E731
    _, _, why_B, count_B, token_BW, logprob_BW, state = jax.lax.while_loop(going, advance, start)
    if copies is None:
        pools = state
    else:
        kept = [
            attention.keep_recent(*layer, rows.table_BM, rows.cached_B, count_B)
            for layer in zip(copies, pools, state, strict=True)
        ]
        copies, pools = [c for c, _ in kept], [p for _, p in kept]
    return pools, copies, Drawn(token_BW, logprob_BW, count_B, why_B)


@functools.partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="pools")
def fill(
    params: Params,
    pools: Pools,
    token_BT: jax.Array,
    first_B: jax.Array,
    count_B: jax.Array,
    table_BM: jax.Array,
    *,
    config: ModelConfig,
    implementation: Implementation,
) -> Pools:
    """Computes a chunk of each row's tokens into its pages.

    Args:
        params: as `sampler_copy.make` returns them.
        pools: the pages of every layer.
        token_BT: [B, T] int32 the chunks, aligned at their ends.
        first_B: [B] int32 position of each chunk's first token; what is before is cached.
        count_B: [B] int32 tokens of each chunk; 0: an idle row.
        table_BM: [B, M] int32 the pages of each row.
        config: the model.
        implementation: of attention over pages.
    """
    rows = (token_BT, first_B, count_B, table_BM)
    rows = (constrain(x, "batch", *(None,) * (x.ndim - 1)) for x in rows)
    token_BT, first_B, count_B, table_BM = rows
    T = token_BT.shape[1]
    within_BT = jnp.arange(T)[None] - (T - count_B)[:, None]
    position_BT = jnp.where(within_BT >= 0, first_B[:, None] + within_BT, -1)
    length_B = jnp.where(count_B > 0, first_B + count_B, 0)

    def attend(pool, q_BTHD, k_BTKD, v_BTKD):
        pool = attention.write_pages(pool, k_BTKD, v_BTKD, table_BM, position_BT)
        a_BTHD = attention.paged_attention(
            q_BTHD, pool, table_BM, length_B, implementation=implementation
        )
        return a_BTHD, pool

    return qwen2.cached_states(params, token_BT, position_BT, pools, attend, config)[1]


@functools.partial(jax.jit, donate_argnames="pools")
def copy(pools: Pools, from_B: jax.Array, to_B: jax.Array) -> Pools:
    """Copies pages to others, [B] int32 each; -1 is neither.

    As the tokens that they hold, read and written: of any other form a TPU copies the whole pool.
    """

    def copy_pages(pool: Pages) -> Pages:
        k_BTKD, v_BTKD = attention.read_pages(pool, from_B[:, None])
        step_T = jnp.arange(pool.page_tokens)
        position_BT = jnp.where((to_B >= 0)[:, None], step_T[None], -1)
        return attention.write_pages(pool, k_BTKD, v_BTKD, to_B[:, None], position_BT)

    return [copy_pages(pool) for pool in pools]
