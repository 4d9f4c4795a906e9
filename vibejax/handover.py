"""Weights from the trainer to the engine, and a canary: the trainer scores what they then say."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import distributed, goodput, rollout, sampler_copy, sharding, train
from vibejax.completions import Request
from vibejax.config.rl import RlConfig
from vibejax.config.training import TrainConfig
from vibejax.data import Prompt
from vibejax.engine import Engine
from vibejax.packing import Document
from vibejax.qwen2 import Params
from vibejax.run_folder import RunError

DRAWS = 2**31 - 3  # the "step" of the canary's draws
TOKENS = 8  # drawn and scored after every hand-over


@goodput.phase("handover")
def hand_over(
    engine: Engine,
    params: Params,
    score: Callable[[Params, train.Batch], jax.Array],
    prompt: Prompt,
    eos_ids: Sequence[int],
    config: RlConfig,
    mesh: jax.sharding.Mesh,
) -> None:
    """Gives the engine the trainer's weights; a few tokens are drawn and compared.

    Every process has an engine, and the trainer scores what each of them draws.

    Args:
        engine: which gets them.
        params: the trainer's.
        score: their log-probabilities of packed rows.
        prompt: that the tokens are drawn after.
        eos_ids: at which completions end.
        config: of the run.
        mesh: the trainer's.

    Raises:
        RunError: the two disagree by more than objective.max_mean_dlogp.
    """
    dtype = jnp.dtype(config.train.dtype)
    engine.load(sampler_copy.make(params, engine.config.model, dtype, engine.mesh))
    # As completions are drawn, and mostly by the same program, but from all tokens: the trainer
    # scores those.
    how = rollout.draws(config.rollout, eos_ids)
    how = dataclasses.replace(how, top_p=1.0, top_k=0, min_tokens=0)
    max_tokens = min(TOKENS, config.rollout.max_completion_tokens)
    (completion,) = engine.generate(
        [Request(prompt.index, prompt.tokens, max_tokens)], how, step=DRAWS
    )
    finite = completion.stop != "not_finite"
    drawn = distributed.gather([completion.tokens.tolist(), completion.logprobs.tolist(), finite])
    if not all(finite for *_, finite in drawn):
        return  # no hand-over's fault: the rollout says so
    before = len(prompt.tokens)
    documents = [
        Document(
            tokens=np.array([*prompt.tokens, *tokens], np.int32),
            weights=np.repeat(np.float32([0, 1]), [before, len(tokens)]),
        )
        for tokens, *_ in drawn
    ]
    scored = train.score_documents(score, params, documents, short_rows(config), mesh)
    for process, (logprob_T, (tokens, logprobs, _)) in enumerate(zip(scored, drawn, strict=True)):
        apart = np.abs(logprob_T[before:] - np.float32(logprobs)).mean()
        if not apart <= config.objective.max_mean_dlogp:
            raise RunError(
                f"the weights of process {process}'s engine are not the trainer's: |d logp| = "
                f"{apart:.3g} nats over {len(tokens)} tokens is above objective.max_mean_dlogp = "
                f"{config.objective.max_mean_dlogp}"
            )


def short_rows(config: RlConfig) -> TrainConfig:
    """Rows for a prompt and a few tokens more, one for each device that has rows."""
    longest, shards = config.rollout.max_prompt_tokens + TOKENS, config.mesh.context
    chunk = sharding.CONTEXT_CHUNK
    row_tokens = min(config.train.row_tokens, -(-longest // (chunk * shards)) * chunk * shards)
    rows = config.mesh.data * config.mesh.fsdp
    return config.train.model_copy(update={"row_tokens": row_tokens, "microbatch_rows": rows})
