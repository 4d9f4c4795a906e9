"""The verified groups of an RL run: of a step, of the held-out prompts, of those it may drop."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vibejax import data, digests, distributed, exchange, handover, rollout, run_folder
from vibejax.data import Prompt
from vibejax.decode import Sampling
from vibejax.rl_setup import Setup
from vibejax.rollout import Rollout
from vibejax.run_folder import RunError
from vibejax.train import TrainState
from vibejax.verifiers.pool import Pool

HELDOUT_DRAWS = 2**31 - 1  # the "step" of held-out draws: always the same, so gains are paired
FILTER_DRAWS = 2**31 - 2


def roll_out(
    setup: Setup, state: TrainState, prompts: Sequence[Prompt], step: int, pool: Pool
) -> Rollout:
    """The verified groups of one step, whose prompts are a function of (seed, step).

    Where rollout.refills asks for it (DAPO's dynamic sampling), groups that teach nothing, all
    advantages being 0, make way for groups of other prompts.
    """
    config, how = setup.config, _training_draws(setup)
    count, samples = config.rollout.prompts_per_step, config.rollout.group_size
    if config.curriculum_steps:
        prompts = data.easiest(prompts, step / config.curriculum_steps, at_least=count)
    chosen = data.step_prompts(prompts, config.seed, step, count)
    rolled = _sample(setup, state, chosen, pool, how, samples, step)
    asked = {prompt.index for prompt in chosen}
    for refill in range(1, config.rollout.refills + 1):
        teaches_N = rollout.advantages(rolled, config.objective).any(axis=1)
        others = [
            prompt
            for prompt in data.step_prompts(prompts, config.seed, step, count, refill)
            if prompt.index not in asked
        ][: np.count_nonzero(~teaches_N)]
        if not others:
            break
        asked |= {prompt.index for prompt in others}
        fresh = _sample(setup, state, others, pool, how, samples, step)
        rolled = rollout.replaced(rolled, np.flatnonzero(~teaches_N), fresh)
    return rolled


def evaluate_heldout(
    setup: Setup, state: TrainState, prompts: Sequence[Prompt], pool: Pool
) -> Rollout:
    """Verified completions of the held-out prompts, with the same draws every time."""
    config = setup.config
    how = Sampling(
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        eos_ids=setup.policy.tokenizer.eos_ids,
        loop_tokens=config.rollout.loop_tokens,
    )
    return _sample(setup, state, prompts, pool, how, config.eval.samples, HELDOUT_DRAWS)


def mixed_prompts(
    setup: Setup, state: TrainState, prompts: Sequence[Prompt], pool: Pool, folder: Path
) -> list[Prompt]:
    """The prompts whose groups the starting policy answers neither all right nor all wrong.

    The choice is kept in the run folder, so that a resumed run has the same prompts.

    Raises:
        RunError: all groups are all right or all wrong.
    """
    path = folder / "kept_prompts.json"
    stored = distributed.from_first(lambda: run_folder.read_whole(path, None, list))
    if stored is not None:
        kept = set(stored)
    else:
        how, samples = _training_draws(setup), setup.config.rollout.group_size
        rolled = _sample(setup, state, prompts, pool, how, samples, FILTER_DRAWS)
        right_N = rolled.correct_NG.any(axis=1)
        wrong_N = (rolled.scored_NG & ~rolled.correct_NG).any(axis=1)
        kept = {p.index for p, mixed in zip(prompts, right_N & wrong_N, strict=True) if mixed}
        if not kept:
            raise RunError("drop_solved: no prompt has a group that is partly right")
        if distributed.first():
            run_folder.write_whole(path, json.dumps(sorted(kept)))
    return [p for p in prompts if p.index in kept]


def _sample(setup, state, prompts, pool, how, samples, step) -> Rollout:
    """Verified completions by the engines, which hold weights and pages for as long as it takes.

    Raises:
        RunError: the policy gives no numbers any more.
    """
    config, engine = setup.config, setup.engine
    done, entries = int(state.step) // config.objective.updates, None
    if setup.journal:
        entries = setup.journal.open(done, step, digests.of_tree(state.params))
    handover.hand_over(
        engine, state.params, setup.programs.score, prompts[0], setup.policy.tokenizer.eos_ids,
        config, setup.mesh,
    )  # fmt: skip
    began = time.perf_counter()
    own = rollout.sample(
        engine,
        setup.policy.tokenizer,
        exchange.share(prompts),
        pool,
        samples=samples,
        max_tokens=config.rollout.max_completion_tokens,
        how=how,
        seed=config.seed,
        step=step,
        entries=entries,
    )
    if entries:
        entries.close()
    engine.release()
    distributed.LOG.info(
        "step %d: %d prompts, %d tokens in %.1f s", step, len(own.prompts), engine.counts.tokens,
        time.perf_counter() - began,
    )  # fmt: skip
    joined = exchange.joined(own, prompts)
    if not joined.finite:
        raise RunError(
            f"step {done}: the policy's log-probabilities are not finite after it; remove the "
            "checkpoint of that step, if there is one, to go on from one before it"
            if done
            else f"{config.policy}: the policy's log-probabilities are not finite"
        )
    return joined


def _training_draws(setup: Setup) -> Sampling:
    return rollout.draws(setup.config.rollout, setup.policy.tokenizer.eos_ids)
