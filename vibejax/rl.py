"""Reinforcement learning with MGPO: `python -m vibejax.rl [CONFIG] [--set key=value ...]`.

Each step samples G completions of N prompts, verifies them, and takes one on-policy update;
Long2Short is the same stage with objective.long2short above 0. Without CONFIG it trains the
policy that ships with the package on three-digit sums, in minutes on a CPU. On several hosts the
same command runs once on each (see `distributed`): every host samples and verifies its share of
the prompts, and all take one update together.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import (
    data,
    digests,
    distributed,
    goodput,
    group_sampling,
    memory_plan,
    policy,
    policy_update,
    preemption,
    programs,
    rl_setup,
    rollout,
    run_folder,
    scoring,
    train,
    watchdog,
    weights,
)
from vibejax.checkpoint import Checkpoints
from vibejax.config.rl import RlConfig
from vibejax.config_file import errors_in_one_line, parse_args
from vibejax.data import Prompt
from vibejax.journal import Journal
from vibejax.metrics import Metrics
from vibejax.profiling import Profile
from vibejax.qwen2 import Params
from vibejax.rl_setup import Setup
from vibejax.rollout import Rollout
from vibejax.run_folder import Log, RunError
from vibejax.train import TrainState
from vibejax.verifiers.pool import Pool, VerifierFailure

DEFAULT = Path(__file__).parent / "quickstart" / "rl.toml"
COLUMNS = {
    "accuracy": ("rollout/accuracy", ".3f"),
    "all right": ("rollout/groups_all_right", ".2f"),
    "all wrong": ("rollout/groups_all_wrong", ".2f"),
    "length": ("rollout/length", ".1f"),
    "truncated": ("rollout/truncated", ".3f"),
    "entropy": ("policy/entropy", ".3f"),
    "|dlogp|": ("agreement/mean_abs_dlogp", ".1e"),
    "grad norm": ("optimizer/grad_norm", ".3f"),
    "seconds": ("time/step_s", ".1f"),
    "held-out": ("heldout/pass@1", ".3f"),
}


def main() -> None:
    """Runs the stage that the command line configures."""
    config = parse_args(RlConfig, doc=__doc__, default=DEFAULT)
    with (
        preemption.handled(),
        errors_in_one_line(VerifierFailure, OSError),
        distributed.joined(config),
    ):
        run(config)


def run(config: RlConfig, open_pool: Callable[..., Pool] = Pool) -> Path:
    """Trains, and returns the run folder.

    Args:
        config: the stage's configuration.
        open_pool: makes the verifier pool; a control experiment puts another judge here.

    Raises:
        InputError: something the user gave cannot be used, or the run cannot go on.
    """
    began = time.perf_counter()
    run_folder.check_run(config)
    goodput.start()
    programs.prepare(deterministic=config.deterministic)
    setup = rl_setup.set_up(config)
    read = functools.partial(policy.read_prompts, setup.policy, config=config.rollout)
    prompts = read(config.prompts)
    _require_enough(prompts, config, f"{config.prompts} has")
    if config.curriculum_steps:
        data.easiest(prompts, 1.0, at_least=1)  # names a record without accuracy before all else
    heldout = read(config.heldout)[: config.eval.prompts] if config.heldout else []
    longest = max(len(prompt.tokens) for prompt in [*prompts, *heldout])
    limit = config.rollout.max_completion_tokens
    setup.engine.require_room("the longest prompt", longest, limit)
    folder = run_folder.open_run(config, "rl")
    journal = Journal(folder / "journal", config, distributed.process())
    setup = dataclasses.replace(setup, journal=journal)
    with (
        run_folder.kept(config, folder) as keep,
        watchdog.watching(config.watchdog_s),
        distributed.log_file(folder),
        open_pool(**config.verifiers.pool_arguments()) as pool,
        jax.set_mesh(setup.mesh),
        contextlib.closing(_checkpoints(folder, config)) as checkpoints,
    ):
        params, tokens = _load(setup), setup.policy.tokenizer
        run_folder.require_same_data(
            config, folder, "prompts", "heldout", tokenizer=tokens.digest,
            policy=digests.of_tree(params),
        )  # fmt: skip
        reference = _load(setup) if config.objective.kl else None
        state = train.init_state(params, setup.programs.optimizer)
        if config.resume:
            state = checkpoints.restore_latest(state)
        done = int(state.step) // config.objective.updates
        metrics = Metrics(folder, done, COLUMNS)
        evaluations = Log(folder / "heldout.jsonl", done)
        samples = Log(folder / "samples.jsonl", done)
        profile = Profile(folder / "profile", config.profile.steps)
        distributed.announce(memory_plan.trainer_line(state, setup.mesh.local_devices[0]))
        programs.compile_ahead(rl_setup.lowerings(setup))

        def evaluate(state: TrainState, step: int) -> dict[str, float]:
            if not heldout:
                return {}
            rolled = group_sampling.evaluate_heldout(setup, state, heldout, pool)
            evaluations.write(step, {"accuracy": rolled.correct_NG.mean(axis=1).tolist()})
            return scoring.heldout_metrics(
                rolled.correct_NG, rolled.scored_NG, rolled.length_NG, rolled.truncated_NG
            )

        if config.drop_solved:
            prompts = group_sampling.mixed_prompts(setup, state, prompts, pool, folder)
            _require_enough(prompts, config, "drop_solved leaves")
        if done == 0:
            metrics.write(0, evaluate(state, 0))
        for step in range(done + 1, config.steps + 1):
            start = time.perf_counter()
            profile.begin(step)
            rolled = group_sampling.roll_out(setup, state, prompts, step, pool)
            sampled = time.perf_counter()
            state, values = policy_update.update(setup, state, rolled, reference)
            if not values["optimizer/finite"]:
                last = checkpoints.latest_step()
                if int(state.step) == (step - 1) * config.objective.updates:  # not amid a step
                    checkpoints.save(last := step - 1, state)
                saved = f"the state after step {last}" if last is not None else "nothing"
                raise RunError(
                    f"step {step}: the loss or the gradient is not finite; {saved} is saved in "
                    f"{checkpoints.folder}"
                )
            values |= rollout.engine_metrics(rolled.counts) | {
                "time/step_s": time.perf_counter() - start,
                "time/sample_s": sampled - start,
                "time/sampled_tokens_per_s": rolled.counts.tokens / (sampled - start),
            }
            if step == config.steps or (config.eval.every and step % config.eval.every == 0):
                values |= evaluate(state, step)
            _write_samples(samples, step, rolled, setup)
            metrics.write(step, values | goodput.shares())
            if step == config.steps or step % config.checkpoint.every == 0:
                for log in (metrics.log, evaluations, samples):
                    log.sync()
                with goodput.phase("save"):
                    keep()
                saved = checkpoints.latest_step()
                checkpoints.save(step, state)
                journal.drop(saved or 0)  # that one is finished now
        for file in (metrics, evaluations, samples, checkpoints, profile):
            file.close()
        journal.drop(config.steps + 1)
        weights.save_params(
            state.params,
            setup.policy.model,
            folder / "final",
            dtype="bfloat16",
            source=setup.policy.path,
        )
    _announce_gain(evaluations.rows, time.perf_counter() - began)
    return folder


def _checkpoints(folder: Path, config: RlConfig) -> Checkpoints:
    kept = config.checkpoint
    place = run_folder.checkpoints(config, folder)
    return Checkpoints(place, keep=kept.keep, keep_every=kept.keep_every)


def _require_enough(prompts: Sequence[Prompt], config: RlConfig, who: str) -> None:
    """Raises RunError where a step would have to sample a prompt twice, with the same draws."""
    count = config.rollout.prompts_per_step
    if len(prompts) < count:
        raise RunError(
            f"{who} {len(prompts)} prompts, fewer than rollout.prompts_per_step = {count}"
        )


def _load(setup: Setup) -> Params:
    return weights.load_params(setup.policy.path, setup.policy.model, setup.mesh, jnp.float32)


def _write_samples(samples: Log, step: int, rolled: Rollout, setup: Setup) -> None:
    """Some completions of the step as people read them, spread over its groups."""
    decode = setup.policy.tokenizer.decode
    count = min(setup.config.samples_per_step, len(rolled.prompts))
    rows = {}
    for n in np.linspace(0, len(rolled.prompts) - 1, count).astype(int).tolist():
        completion, verdict = rolled.completions[n][0], rolled.verdicts[n][0]
        if not completion.here:
            continue
        rows[n] = {
            "prompt": decode(rolled.prompts[n].tokens, skip_special_tokens=False),
            "completion": decode(completion.text_ids),
            "ground_truth": rolled.prompts[n].record.get("ground_truth"),
            "stop": completion.stop,
            "tokens": len(completion.tokens),
            **dataclasses.asdict(verdict),
        }
    for _, row in sorted(pair for told in distributed.gather([*rows.items()]) for pair in told):
        samples.write(step, row)


def _announce_gain(evaluations: list[dict[str, Any]], seconds: float) -> None:
    if len(evaluations) < 2:
        return
    before_N, after_N = (np.asarray(evaluations[i]["accuracy"]) for i in (0, -1))
    low, high = scoring.bootstrap_interval(after_N - before_N)
    distributed.announce(
        f"gain {(after_N - before_N).mean():+.3f}, 95% interval [{low:+.3f}, {high:+.3f}]"
    )
    distributed.announce(
        f"held-out pass@1: {before_N.mean():.3f} -> {after_N.mean():.3f} "
        f"({len(after_N)} prompts, {seconds:.0f} s)"
    )


if __name__ == "__main__":
    main()
