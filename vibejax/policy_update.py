"""A rollout to an optimizer update, and what there is to say about both."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vibejax import distributed, exchange, goodput, rollout, train
from vibejax.config.rl import ObjectiveConfig
from vibejax.losses import importance
from vibejax.packing import Document
from vibejax.qwen2 import Params
from vibejax.rl_setup import Setup
from vibejax.rollout import Rollout
from vibejax.run_folder import RunError
from vibejax.train import TrainState


@goodput.phase("train")
def update(
    setup: Setup, state: TrainState, rolled: Rollout, reference: Params | None
) -> tuple[TrainState, dict[str, Any]]:
    """The optimizer update (or updates) on one rollout, and the step's metrics.

    A completion whose advantage is 0 has no gradient and is left out of the rows; loss weights
    are those of the whole rollout. One that is not finite changes nothing and is the last.

    Raises:
        RunError: sampler and trainer disagree by more than objective.max_mean_dlogp.
    """
    config, objective, step = setup.config, setup.config.objective, setup.programs.train_step
    advantage_NG = rollout.advantages(rolled, objective)
    documents = rollout.documents(
        rolled, advantage_NG, objective, max_tokens=config.rollout.max_completion_tokens
    )
    metrics: dict[str, float] = rollout.group_metrics(rolled)
    metrics["rollout/groups_mixed"] = float((advantage_NG != 0).any(axis=1).mean())
    if objective.updates > 1:
        # Weights are those of the whole rollout, of which an update has a share.
        documents = [
            dataclasses.replace(d, weights=objective.updates * d.weights) for d in documents
        ]
        documents = _with_channel(setup, state.params, documents, "old_logprob")
    if reference is not None:
        documents = _with_channel(setup, reference, documents, "reference_logprob")
    here = [completion.here for group in rolled.completions for completion in group]
    before = {  # any update, of the documents that there is something to learn from
        i: d.channels.get("old_logprob")
        for i, d in enumerate(documents)
        if d.weights.any() and (reference is not None or d.channels["advantage"].any())
    }
    updates, learnt = [], 0
    for part in np.array_split(np.arange(len(documents)), objective.updates):
        indices = sorted({*part.tolist()} & before.keys())
        sums, logprobs = train.sum_documents(
            step, state.params, [documents[i] for i in indices], config.train, setup.mesh,
            exchange.place,
        )  # fmt: skip
        if not updates and before:
            if objective.updates == 1:
                before = dict(zip(indices, logprobs, strict=True))
            own = [(documents[i], x) for i, x in before.items() if here[i]]
            metrics |= _agreement(own, objective, cut=rollout.is_cut(config.rollout))
        state, values = step.apply(state, sums)
        updates.append({name: float(value) for name, value in values.items()})
        learnt += sum(np.count_nonzero(documents[i].weights) for i in indices)
        if not updates[-1]["optimizer/finite"]:
            break
    return state, metrics | _means(updates, learnt)


def _means(updates: Sequence[dict[str, float]], learnt: int) -> dict[str, float]:
    """A step's metrics from those of its updates, which learnt from that many tokens together."""
    total = {name: sum(update[name] for update in updates) for name in updates[0]}
    tokens = max(learnt, 1)
    clipped, entropy = total.pop("policy/clipped_tokens"), total.pop("policy/entropy")
    return {
        **{name: value / len(updates) for name, value in total.items()},
        **{name: updates[-1][name] for name in ("optimizer/finite", "optimizer/learning_rate")},
        "policy/clipped": clipped / tokens,
        "policy/entropy": entropy / tokens,
    }


def _agreement(
    own: Sequence[tuple[Document, np.ndarray]], objective: ObjectiveConfig, *, cut: bool
) -> dict[str, float]:
    """Sampler and trainer on all tokens, from this process's documents and their log-probs.

    Where the sampler drew from a `cut` distribution, its log-probs are of what was kept; the
    hand-over's canary compares the two without the cut.
    """
    count, metrics = 0, {}
    if own:
        logprob_T = np.concatenate([x[d.weights > 0] for d, x in own])
        sampled_T = np.concatenate([d.channels["sampler_logprob"][d.weights > 0] for d, _ in own])
        count = len(logprob_T)
        metrics = importance.agreement(logprob_T, sampled_T, cap=objective.correction_cap)
    metrics = importance.combined_agreement(distributed.gather([count, metrics]))
    apart = metrics["agreement/mean_abs_dlogp"]
    # Of the same distribution alone the two must say the same.
    if apart > objective.max_mean_dlogp and not cut:
        raise RunError(
            f"sampler and trainer disagree: mean |d logp| = {apart:.3g} nats is above "
            f"objective.max_mean_dlogp = {objective.max_mean_dlogp}"
        )
    return metrics


def _with_channel(
    setup: Setup, params: Params, documents: list[Document], name: str
) -> list[Document]:
    """The documents with their log-probs under `params` as a further channel."""
    config = setup.config.train
    bare = [dataclasses.replace(d, channels={}) for d in documents]  # all that a score looks at
    values = train.score_documents(
        setup.programs.score, params, bare, config, setup.mesh, exchange.place
    )
    return [
        dataclasses.replace(d, channels=d.channels | {name: value})
        for d, value in zip(documents, values, strict=True)
    ]
