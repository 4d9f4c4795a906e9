"""Completions of prompts: a wave of groups is prefilled together and decoded in one device loop.

Shape suffixes: N prompts of a wave, B = N * G rows, T prompt columns, C completion tokens, S
cache entries, V vocabulary rows.

Prompts are aligned at their ends, so that every row writes the same cache column. A group's
prompt is prefilled once. The seam to the rest is `generate`: requests in, completions out as
they finish, each a function of (parameters, seed, step, prompt, sample) alone.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import qwen2, sampling
from vibejax.qwen2 import ModelConfig, Params

PROMPT_BUCKET = 32  # longer prompts are rounded up to a multiple of it
SHORTEST_PROMPT = 8  # shorter ones to a power of two from here on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The distribution that tokens are drawn from, and when a completion ends."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    eos_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt: its identity among all prompts (for the random draws) and its tokens."""

    prompt: int
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        tokens: [C] int32, the stop token included.
        logprobs: [C] float32, nats, of the distribution sampled from.
        stop: "stop" at a stop token, "length" at the limit.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    stop: Literal["stop", "length"]

    @property
    def text_ids(self) -> list[int]:
        """The tokens that are text: all but the stop token."""
        return self.tokens[: -1 if self.stop == "stop" else None].tolist()


def sampler_params(params: Params, config: ModelConfig, dtype: Any) -> Params:
    """The copy of the parameters that `generate` decodes with."""
    return _unstack(params, config, dtype)


_unstack = jax.jit(qwen2.unstack, static_argnums=(1, 2))


def generate(
    params: Params,
    config: ModelConfig,
    requests: Sequence[Request],
    *,
    samples: int,
    how: Sampling,
    slots: int,
    seed: int,
    step: int,
) -> Iterator[tuple[int, int, Completion]]:
    """Samples completions of each request.

    Args:
        params: from `sampler_params`.
        config: the model.
        requests: the prompts.
        samples: G, completions of each.
        how: the distribution and the limits.
        slots: rows decoded at one time, at least `samples`.
        seed: of the run.
        step: optimizer step, or another number for draws of another kind.

    Yields:
        (index of the request, index of the sample, completion), as they finish.
    """
    per_wave = max(1, min(slots // samples, len(requests)))
    columns = prompt_columns(max(len(r.tokens) for r in requests))
    for start in range(0, len(requests), per_wave):
        wave = requests[start : start + per_wave]
        token_NT = np.zeros((per_wave, columns), np.int32)
        length_N = np.ones(per_wave, np.int32)
        prompt_N = np.zeros(per_wave, np.uint32)
        for n, request in enumerate(wave):
            token_NT[n, columns - len(request.tokens) :] = request.tokens
            length_N[n], prompt_N[n] = len(request.tokens), request.prompt
        active_N = np.arange(per_wave) < len(wave)
        outputs = _wave(
            params, token_NT, length_N, prompt_N, active_N, seed, step, config, samples, how
        )
        token_BC, logprob_BC, length_B, stopped_B = jax.device_get(outputs)
        for b in range(len(wave) * samples):
            length = length_B[b]
            stop = "stop" if stopped_B[b] else "length"
            completion = Completion(token_BC[b, :length], logprob_BC[b, :length], stop)
            yield start + b // samples, b % samples, completion


def prompt_columns(longest: int) -> int:
    """Columns for prompts of at most `longest` tokens, so that few shapes are compiled."""
    if longest > PROMPT_BUCKET:
        return math.ceil(longest / PROMPT_BUCKET) * PROMPT_BUCKET
    return max(SHORTEST_PROMPT, 2 ** math.ceil(math.log2(longest)))


@functools.partial(jax.jit, static_argnames=("config", "samples", "how"))
def _wave(params, token_NT, length_N, prompt_N, active_N, seed, step, config, samples, how):
    """Prefill and the decode loop of one wave."""
    N, T = token_NT.shape
    B, S = N * samples, T + how.max_tokens
    start_N = T - length_N
    column_T = jnp.arange(T)
    position_NT = jnp.maximum(column_T[None] - start_N[:, None], 0)
    segment_NT = (column_T[None] >= start_N[:, None]).astype(jnp.int32)
    dtype = params["norm"].dtype
    x_NTE, kv = qwen2.prefill(params, token_NT, position_NT, segment_NT, config, dtype=dtype)
    room = ((0, 0), (0, 0), (0, 0), (0, how.max_tokens))
    cache = [
        (
            jnp.repeat(jnp.pad(k_NKDT, room), samples, axis=0),
            jnp.repeat(jnp.pad(v_NKTD.swapaxes(2, 3), room).swapaxes(2, 3), samples, axis=0),
        )
        for k_NKDT, v_NKTD in kv
    ]
    start_B = jnp.repeat(start_N, samples)
    sample_B = jnp.tile(jnp.arange(samples, dtype=jnp.uint32), N)
    key_B = sampling.sequence_keys(seed, step, jnp.repeat(prompt_N, samples), sample_B)
    eos = jnp.asarray(how.eos_ids, jnp.int32)

    def draw(x_BE, i, state):
        """Samples token i of every row that has not ended."""
        logit_BV = qwen2.logits(params, x_BE, config)
        uniform_B = sampling.uniforms(key_B, jnp.full(B, i))
        token_B, logprob_B = sampling.sample(
            logit_BV, uniform_B, temperature=how.temperature, top_p=how.top_p, top_k=how.top_k
        )
        token_BC, logprob_BC, length_B, ended_B, stopped_B = state
        token_BC = jax.lax.dynamic_update_slice(token_BC, token_B[:, None], (0, i))
        logprob_BC = jax.lax.dynamic_update_slice(logprob_BC, logprob_B[:, None], (0, i))
        length_B = jnp.where(ended_B, length_B, i + 1)
        stops_B = ~ended_B & jnp.any(token_B[:, None] == eos[None], axis=1)
        return token_B, (token_BC, logprob_BC, length_B, ended_B | stops_B, stopped_B | stops_B)

    def going(carry):
        i, _, _, state = carry
        return (i < how.max_tokens) & ~jnp.all(state[3])

    def advance(carry):
        i, token_B, cache, state = carry
        column = T + i - 1
        visible_BS = (jnp.arange(S)[None] >= start_B[:, None]) & (jnp.arange(S) <= column)[None]
        x_BE, cache = qwen2.decode_step(
            params, token_B, column - start_B, cache, column, visible_BS, config
        )
        token_B, state = draw(x_BE, i, state)
        return i + 1, token_B, cache, state

    state = (
        jnp.zeros((B, how.max_tokens), jnp.int32),
        jnp.zeros((B, how.max_tokens), jnp.float32),
        jnp.zeros(B, jnp.int32),
        jnp.repeat(~active_N, samples),
        jnp.zeros(B, bool),
    )
    token_B, state = draw(jnp.repeat(x_NTE[:, -1], samples, axis=0), 0, state)
    *_, state = jax.lax.while_loop(going, advance, (1, token_B, cache, state))
    token_BC, logprob_BC, length_B, _, stopped_B = state
    return token_BC, logprob_BC, length_B, stopped_B
