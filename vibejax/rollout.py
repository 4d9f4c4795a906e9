"""Prompts to groups of verified completions, and groups to what the loss needs.

Shape suffixes: N prompts, G completions of a prompt.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from vibejax import engine
from vibejax.config import ObjectiveConfig
from vibejax.data import Prompt
from vibejax.engine import Completion, Sampling
from vibejax.losses import long2short, mgpo
from vibejax.packing import Document
from vibejax.qwen2 import ModelConfig, Params
from vibejax.tokenizer import Tokenizer
from vibejax.verifiers import Outcome, Verdict
from vibejax.verifiers.pool import Pool


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The groups of one step: `completions[n][g]` answers `prompts[n]`, judged `verdicts[n][g]`."""

    prompts: Sequence[Prompt]
    completions: list[list[Completion]]
    verdicts: list[list[Verdict]]

    @property
    def finite(self) -> bool:
        """Whether every sampled log-probability is a number."""
        return all(np.isfinite(c.logprobs).all() for group in self.completions for c in group)

    @property
    def correct_NG(self) -> np.ndarray:
        """[N, G] bool."""
        return np.array([[v.correct for v in group] for group in self.verdicts])

    @property
    def scored_NG(self) -> np.ndarray:
        """[N, G] bool, False where the verifier could not say."""
        return np.array([[v.scored for v in group] for group in self.verdicts])

    @property
    def reward_NG(self) -> np.ndarray:
        """[N, G] float32."""
        return np.array([[v.reward for v in group] for group in self.verdicts], np.float32)

    @property
    def length_NG(self) -> np.ndarray:
        """[N, G] int, completion tokens."""
        return np.array([[len(c.tokens) for c in group] for group in self.completions])

    @property
    def truncated_NG(self) -> np.ndarray:
        """[N, G] bool, True where the limit ended the completion."""
        return np.array([[c.stop == "length" for c in group] for group in self.completions])


def sample(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    pool: Pool,
    *,
    samples: int,
    how: Sampling,
    slots: int,
    seed: int,
    step: int,
) -> Rollout:
    """Samples and verifies `samples` completions of each prompt.

    Completions go to the verifiers as they finish, while others decode.
    """
    completions: list[list[Completion]] = [[None] * samples for _ in prompts]  # type: ignore
    requests = [engine.Request(p.index, p.tokens) for p in prompts]
    finished = engine.generate(
        params, config, requests, samples=samples, how=how, slots=slots, seed=seed, step=step
    )
    for n, g, completion in finished:
        completions[n][g] = completion
        pool.submit((n, g), prompts[n].record, tokenizer.decode(completion.text_ids))
    verdicts: list[list[Verdict]] = [[None] * samples for _ in prompts]  # type: ignore
    for (n, g), verdict in pool.finished():
        verdicts[n][g] = verdict
    return Rollout(prompts, completions, verdicts)


def advantages(rollout: Rollout, config: ObjectiveConfig) -> np.ndarray:
    """[N, G] float32, w(q) * A_i of every completion; Long2Short moves rewards before."""
    reward_NG = rollout.reward_NG
    if config.long2short:
        reward_NG = long2short.redistribute(
            reward_NG,
            rollout.correct_NG & rollout.scored_NG,
            rollout.length_NG,
            strength=config.long2short,
        )
    advantage_NG = mgpo.group_advantages(reward_NG, rollout.scored_NG)
    weight_N = mgpo.prompt_weights(rollout.correct_NG, rollout.scored_NG, gamma=config.gamma)
    return weight_N[:, None] * advantage_NG


def documents(
    rollout: Rollout, advantage_NG: np.ndarray, config: ObjectiveConfig, *, max_tokens: int
) -> list[Document]:
    """One document a completion, prompt first, with its per-token weights and channels."""
    weight_NG = mgpo.token_weights(
        rollout.length_NG.ravel(), config.aggregation, constant=max_tokens
    ).reshape(advantage_NG.shape)
    out = []
    for n, prompt in enumerate(rollout.prompts):
        for g, completion in enumerate(rollout.completions[n]):
            before = np.zeros(len(prompt.tokens), np.float32)
            ones = np.ones(len(completion.tokens), np.float32)
            channels = {
                "advantage": np.concatenate([before, advantage_NG[n, g] * ones]),
                "sampler_logprob": np.concatenate([before, completion.logprobs]),
            }
            out.append(
                Document(
                    tokens=np.concatenate([np.asarray(prompt.tokens, np.int32), completion.tokens]),
                    weights=np.concatenate([before, weight_NG[n, g] * ones]),
                    channels=channels,
                )
            )
    return out


def group_metrics(rollout: Rollout) -> dict[str, float]:
    """What a step's groups look like, as metrics."""
    correct_NG, scored_NG = rollout.correct_NG, rollout.scored_NG
    right_N = (correct_NG | ~scored_NG).all(axis=1)
    wrong_N = (~correct_NG | ~scored_NG).all(axis=1)
    length_NG = rollout.length_NG
    outcomes = collections.Counter(v.outcome for group in rollout.verdicts for v in group)
    return {
        **{f"verifier/{outcome}": outcomes[outcome] for outcome in Outcome},
        "rollout/accuracy": float(correct_NG[scored_NG].mean()) if scored_NG.any() else 0.0,
        "rollout/reward": float(rollout.reward_NG[scored_NG].mean()) if scored_NG.any() else 0.0,
        "rollout/groups_all_right": float((right_N & ~wrong_N).mean()),
        "rollout/groups_all_wrong": float((wrong_N & ~right_N).mean()),
        "rollout/unscored": float((~scored_NG).mean()),
        "rollout/length": float(length_NG.mean()),
        "rollout/length_max": int(length_NG.max()),
        "rollout/truncated": float(rollout.truncated_NG.mean()),
        "rollout/tokens": int(length_NG.sum()),
    }
