"""Prompts to groups of verified completions, and groups to what the loss needs.

Shape suffixes: N prompts, G completions of a prompt.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from vibejax import goodput, progress
from vibejax.completions import Completion, Counts, EngineConfig, Request
from vibejax.config.rl import ObjectiveConfig
from vibejax.config.sampling import SamplerConfig
from vibejax.data import Prompt
from vibejax.decode import Sampling
from vibejax.engine import Engine
from vibejax.journal import Entries
from vibejax.losses import long2short, mgpo
from vibejax.packing import Document
from vibejax.qwen2 import ModelConfig
from vibejax.tokenizer import Tokenizer
from vibejax.verifiers import Outcome, Verdict
from vibejax.verifiers.pool import Pool


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The groups of one step.

    Attributes:
        prompts: N.
        completions: `completions[n][g]` answers `prompts[n]`.
        verdicts: `verdicts[n][g]` judges it.
        refilled: groups that took the place of others.
        journaled: completions that were sampled before a restart.
        counts: what the engines did for it, for groups that made way too.
    """

    prompts: Sequence[Prompt]
    completions: list[list[Completion]]
    verdicts: list[list[Verdict]]
    refilled: int = 0
    journaled: int = 0
    counts: Counts = dataclasses.field(default_factory=Counts)

    @property
    def finite(self) -> bool:
        """Whether the logits of every token were numbers."""
        return all(c.stop != "not_finite" for group in self.completions for c in group)

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


def draws(config: SamplerConfig, eos_ids: Sequence[int]) -> Sampling:
    """The distribution that a stage's `rollout` section asks for."""
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        eos_ids=tuple(eos_ids),
        min_tokens=config.min_tokens,
        loop_tokens=config.loop_tokens,
    )


def is_cut(config: SamplerConfig) -> bool:
    """Whether tokens are drawn from a part of the model's distribution only."""
    return config.top_p < 1 or config.top_k > 0 or config.min_tokens > 0


def engine_config(config: SamplerConfig, model: ModelConfig) -> EngineConfig:
    """The engine that it asks for."""
    return EngineConfig(
        model=model,
        slots=config.slots,
        context=config.sequence_tokens,
        window=config.window,
        page_tokens=config.page_tokens,
        pool_tokens=config.pool_tokens,
        chunk_tokens=config.chunk_tokens,
        kv_dtype=config.kv_dtype,
        tensor=config.tensor,
        attention=config.attention,
    )


@goodput.phase("rollout")
def sample(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    pool: Pool,
    *,
    samples: int,
    max_tokens: int,
    how: Sampling,
    seed: int,
    step: int,
    entries: Entries | None = None,
) -> Rollout:
    """Samples and verifies `samples` completions of each prompt, of at most `max_tokens` tokens.

    Those in `entries`, of a journal, are taken from there; all others are added to it.
    """
    completions: list[list[Completion]] = [[] for _ in prompts]
    verdicts: list[list[Verdict]] = [[] for _ in prompts]
    for n, group, judged in groups(
        engine,
        tokenizer,
        prompts,
        pool,
        samples=samples,
        max_tokens=max_tokens,
        how=how,
        seed=seed,
        step=step,
        entries=entries,
    ):
        completions[n], verdicts[n] = group, judged
    reused = entries.reused if entries else 0
    return Rollout(prompts, completions, verdicts, journaled=reused, counts=engine.counts)


def groups(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    pool: Pool,
    *,
    samples: int,
    max_tokens: int,
    how: Sampling,
    seed: int,
    step: int,
    entries: Entries | None = None,
) -> Iterator[tuple[int, list[Completion], list[Verdict]]]:
    """The groups as they are done: (place of the prompt, its completions, their verdicts).

    Completions go to the verifiers as they finish, while others decode; a text that a prompt got
    before is not verified again. Completions in `entries`, and verdicts, are taken from there.
    """
    completions: list[list[Completion]] = [[None] * samples for _ in prompts]  # type: ignore
    texts: list[list[str]] = [[None] * samples for _ in prompts]  # type: ignore
    judged: list[dict[str, Verdict | None]] = [{} for _ in prompts]  # None: not yet

    def done(n: int) -> bool:
        return all(judged[n].get(text) is not None for text in texts[n])

    def group(n: int) -> tuple[int, list[Completion], list[Verdict]]:
        return n, completions[n], [judged[n][text] for text in texts[n]]

    def take(n: int, completion: Completion, verdict: Verdict | None = None) -> None:
        """Puts a completion into its place, and sends a new text to the verifiers."""
        g = completion.sample
        completions[n][g] = dataclasses.replace(completion, request=n)
        text = texts[n][g] = tokenizer.decode(completion.text_ids)
        if verdict is not None:
            judged[n][text] = verdict
        elif text not in judged[n]:
            judged[n][text] = None
            pool.submit((n, text), prompts[n].record, text)

    def verified(*, wait: bool) -> Iterator[tuple[int, list[Completion], list[Verdict]]]:
        for (n, text), verdict in pool.finished(wait=wait):
            judged[n][text] = verdict
            if entries:
                entries.judge(prompts[n], texts[n].index(text), verdict)
            progress.beat()
            if done(n):
                yield group(n)

    requests, places = [], []
    for n, prompt in enumerate(prompts):
        found = entries.completions(prompt) if entries else []
        # Verdicts first: a text that has one is not verified again for a sample that has none.
        for completion, verdict in sorted(found, key=lambda pair: pair[1] is None):
            take(n, completion, verdict)
        missing = tuple(g for g in range(samples) if completions[n][g] is None)
        if missing:
            requests.append(Request(prompt.index, prompt.tokens, max_tokens, len(missing), missing))
            places.append(n)
        elif done(n):
            yield group(n)
    for completion in engine.generate(requests, how, seed=seed, step=step):
        n = places[completion.request]
        if entries:
            entries.add(prompts[n], completion)
        take(n, completion)
        if done(n):
            yield group(n)
        yield from verified(wait=False)
    with goodput.phase("verify"):
        yield from verified(wait=True)


def replaced(rollout: Rollout, places: Sequence[int], other: Rollout) -> Rollout:
    """A rollout with another's groups at the first of `places`, which are at least as many."""
    prompts, completions = [*rollout.prompts], [*rollout.completions]
    verdicts = [*rollout.verdicts]
    for n, prompt, group, judged in zip(
        places, other.prompts, other.completions, other.verdicts, strict=False
    ):
        prompts[n], completions[n], verdicts[n] = prompt, group, judged
    return Rollout(
        prompts,
        completions,
        verdicts,
        refilled=rollout.refilled + len(other.prompts),
        journaled=rollout.journaled + other.journaled,
        counts=rollout.counts + other.counts,
    )


def engine_metrics(counts: Counts) -> dict[str, float]:
    """What the engine did for a rollout, as metrics; a restart inside of it does less."""
    return {
        "time/efficiency": counts.tokens / max(counts.slot_steps, 1),
        "time/put_back": counts.put_back,
        "time/filled_tokens": counts.filled_tokens,
        "time/host_s": counts.host_s,
    }


def advantages(rollout: Rollout, config: ObjectiveConfig) -> np.ndarray:
    """[N, G] float32, w(q) * A_i of every completion; Long2Short moves rewards before.

    With objective.mask_truncated (DAPO's overlong filtering) a completion that the limit ended
    has none: what it would have said is not known.
    """
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
    if config.mask_truncated:
        advantage_NG = np.where(rollout.truncated_NG, 0, advantage_NG)
    return weight_N[:, None] * advantage_NG


def documents(
    rollout: Rollout, advantage_NG: np.ndarray, config: ObjectiveConfig, *, max_tokens: int
) -> list[Document]:
    """One document a completion, prompt first, with its per-token weights and channels.

    Of a completion that is not here the prompt is zeros too. Those that objective.mask_truncated
    leaves out weigh nothing.
    """
    weight_NG = mgpo.token_weights(
        rollout.length_NG.ravel(), config.aggregation, constant=max_tokens
    ).reshape(advantage_NG.shape)
    if config.mask_truncated:
        weight_NG = np.where(rollout.truncated_NG, 0, weight_NG)
    out = []
    for n, prompt in enumerate(rollout.prompts):
        for g, completion in enumerate(rollout.completions[n]):
            before = np.zeros(len(prompt.tokens), np.float32)
            ones = np.ones(len(completion.tokens), np.float32)
            channels = {
                "advantage": np.concatenate([before, advantage_NG[n, g] * ones]),
                "sampler_logprob": np.concatenate([before, completion.logprobs]),
            }
            tokens = np.concatenate([np.asarray(prompt.tokens, np.int32), completion.tokens])
            out.append(
                Document(
                    tokens=tokens if completion.here else np.zeros_like(tokens),
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
        "rollout/loops": sum(c.stop == "loop" for group in rollout.completions for c in group),
        "rollout/tokens": int(length_NG.sum()),
        "rollout/refilled": rollout.refilled,
        "time/journaled": rollout.journaled,
    }
