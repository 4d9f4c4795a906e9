"""The trainer's programs of an RL run: MGPO's loss of packed rows, its gradient, the update.

Shape suffixes: B rows of a micro-batch, T tokens of a row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vibejax import optimizer, sharding, train
from vibejax.config.rl import ObjectiveConfig, RlConfig
from vibejax.losses import importance, mgpo
from vibejax.losses.logprobs import TokenLogprobs
from vibejax.qwen2 import ModelConfig, Params
from vibejax.train import TrainStep

SUMS = ("policy/loss", "policy/clipped_tokens", "policy/entropy", "policy/reference_kl")


class Programs(NamedTuple):
    """What the trainer's devices run; all compile where they are first called.

    Attributes:
        optimizer: of the updates.
        train_step: gradients of rows, and the update.
        score: (params, rows) -> [B, T] log-probs.
    """

    optimizer: optax.GradientTransformation
    train_step: TrainStep
    score: Callable[[Params, train.Batch], jax.Array]


def make(config: RlConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> Programs:
    """The programs of a run."""
    steps = config.steps * config.objective.updates
    adamw = optimizer.make_optimizer(config.optimizer, steps)
    schedule = optimizer.make_schedule(config.optimizer, steps)
    loss_fn = functools.partial(policy_loss, model=model, config=config)

    def score(params: Params, rows: train.Batch) -> jax.Array:
        return _logprobs(params, rows, model, config).logprob_BT

    return Programs(
        adamw,
        train.make_train_step(loss_fn, adamw, schedule, model, mesh, SUMS),
        jax.jit(score, out_shardings=sharding.replicated(mesh)),
    )


def policy_loss(
    params: Params, rows: train.Batch, *, model: ModelConfig, config: RlConfig
) -> tuple[jax.Array, tuple[train.Metrics, jax.Array]]:
    """MGPO's loss of packed rows, corrected for the sampler; see losses/.

    Rows hold `advantage` and `sampler_logprob`; `old_logprob` where a step makes several updates
    (else the policy is its own old policy), `reference_logprob` where there is a KL term.
    """
    objective = config.objective
    terms = functools.partial(_terms, objective=objective)
    if importance.of_one_token(objective.correction):
        return train.row_loss(terms, params, rows, model, config.train, **_forward_settings(config))
    logprobs = _logprobs(params, rows, model, config)
    loss, metrics = terms(logprobs, rows)
    return loss, (metrics, logprobs.logprob_BT)


def _terms(
    logprobs: TokenLogprobs, rows: train.Batch, *, objective: ObjectiveConfig
) -> tuple[jax.Array, train.Metrics]:
    logprob_BT, entropy_BT = logprobs
    weight_BT = rows["weight"]
    # The sampler is compared with what it sampled from: later updates are the ratio's.
    old_BT = rows.get("old_logprob", logprob_BT)
    importance_BT = importance.weights(
        old_BT,
        rows["sampler_logprob"],
        rows["segment"],
        weight_BT > 0,
        correction=objective.correction,
        cap=objective.correction_cap,
        low=objective.correction_low,
        high=objective.correction_high,
    )
    loss, metrics = mgpo.policy_loss(
        logprob_BT,
        old_BT,
        rows["advantage"],
        weight_BT,
        importance_BT,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
    )
    kl = jnp.zeros(())
    if "reference_logprob" in rows:
        kl = mgpo.reference_kl(logprob_BT, rows["reference_logprob"], weight_BT)
    metrics |= {"policy/entropy": jnp.sum(entropy_BT), "policy/reference_kl": kl}
    return loss + objective.kl * kl, metrics


def _logprobs(
    params: Params, rows: train.Batch, model: ModelConfig, config: RlConfig
) -> TokenLogprobs:
    """Log-probs under the distribution that the sampler draws from, top-p and top-k apart."""
    return train.row_logprobs(params, rows, model, config.train, **_forward_settings(config))


def _forward_settings(config: RlConfig) -> dict[str, Any]:
    return {
        "implementation": config.attention.implementation,
        "temperature": config.rollout.temperature,
    }
