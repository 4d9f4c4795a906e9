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
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vibejax import (
    data,
    digests,
    distributed,
    exchange,
    goodput,
    handover,
    memory_plan,
    optimizer,
    preemption,
    programs,
    qwen2,
    rollout,
    run_folder,
    scoring,
    sharding,
    tokenizer,
    train,
    watchdog,
    weights,
)
from vibejax.checkpoint import Checkpoints
from vibejax.completions import EngineConfig
from vibejax.config import RlConfig
from vibejax.config_file import errors_in_one_line, parse_args
from vibejax.data import Prompt
from vibejax.decode import Sampling
from vibejax.engine import Engine
from vibejax.journal import Journal
from vibejax.locations import resolve
from vibejax.losses import importance, mgpo
from vibejax.metrics import Metrics
from vibejax.packing import Document
from vibejax.profiling import Profile
from vibejax.qwen2 import ModelConfig, Params
from vibejax.rollout import Rollout
from vibejax.run_folder import Log, RunError
from vibejax.tokenizer import Tokenizer
from vibejax.train import TrainState, TrainStep
from vibejax.verifiers.pool import Pool, VerifierFailure

DEFAULT = Path(__file__).parent / "quickstart" / "rl.toml"
HELDOUT_DRAWS = 2**31 - 1  # the "step" of held-out draws: always the same, so gains are paired
FILTER_DRAWS = 2**31 - 2
SUMS = ("policy/loss", "policy/clipped_tokens", "policy/entropy", "policy/reference_kl")
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


class Programs(NamedTuple):
    """What the trainer's devices run.

    Attributes:
        optimizer: of the updates.
        train_step: gradients of rows, and the update.
        score: (params, rows) -> [B, T] log-probs.
    """

    optimizer: optax.GradientTransformation
    train_step: TrainStep
    score: Callable[[Params, train.Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays the same over a run; `journal`, of what is sampled, lies in its folder."""

    config: RlConfig
    source: Path
    model: ModelConfig
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    engine: Engine
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    score: Callable[[Params, train.Batch], jax.Array]
    journal: Journal | None = None


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
    setup = set_up(config)
    prompts = _prompts(setup, config.prompts)
    if config.curriculum_steps:
        data.easiest(prompts, 1.0, at_least=1)  # names a record without accuracy before all else
    heldout = _prompts(setup, config.heldout)[: config.eval.prompts] if config.heldout else []
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
        reference = _load(setup) if config.objective.kl else None
        state = train.init_state(_load(setup), setup.optimizer)
        if config.resume:
            state = checkpoints.restore_latest(state)
        done = int(state.step) // config.objective.updates
        metrics = Metrics(folder, done, COLUMNS)
        evaluations = Log(folder / "heldout.jsonl", done)
        samples = Log(folder / "samples.jsonl", done)
        profile = Profile(folder / "profile", config.profile.steps)
        distributed.announce(memory_plan.trainer_line(state, setup.mesh.local_devices[0]))

        def evaluate(state: TrainState, step: int) -> dict[str, float]:
            if not heldout:
                return {}
            rolled = evaluate_heldout(setup, state, heldout, pool)
            evaluations.write(step, {"accuracy": rolled.correct_NG.mean(axis=1).tolist()})
            return scoring.heldout_metrics(rolled.correct_NG, rolled.length_NG, rolled.truncated_NG)

        if config.drop_solved:
            prompts = _mixed_prompts(setup, state, prompts, pool, folder)
        if done == 0:
            metrics.write(0, evaluate(state, 0))
        for step in range(done + 1, config.steps + 1):
            start = time.perf_counter()
            profile.begin(step)
            rolled = roll_out(setup, state, prompts, step, pool)
            sampled = time.perf_counter()
            if not rolled.finite:
                raise RunError(
                    f"step {step}: sampled log-probabilities are not finite; what the last update "
                    f"made is of no use, the checkpoint of step {checkpoints.latest_step()} is"
                )
            state, values = update(setup, state, rolled, reference)
            if not values["optimizer/finite"]:
                checkpoints.save(step - 1, state)
                raise RunError(
                    f"step {step}: the loss or the gradient is not finite; the state after step "
                    f"{step - 1} is saved in {checkpoints.folder}"
                )
            values |= rollout.engine_metrics(exchange.total(setup.engine.counts)) | {
                "time/step_s": time.perf_counter() - start,
                "time/sample_s": sampled - start,
                "time/sampled_tokens_per_s": rolled.length_NG.sum() / (sampled - start),
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
            state.params, setup.model, folder / "final", dtype="bfloat16", source=setup.source
        )
    _announce_gain(evaluations.rows, time.perf_counter() - began)
    return folder


def set_up(config: RlConfig) -> Setup:
    """Reads what the run starts from, short of its weights, and prepares its programs.

    Raises:
        InputError: the checkpoint cannot be used, or the completions do not fit its context.
    """
    source = weights.locate(config.policy)
    model = weights.load_config(source)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_completion_tokens
    if longest > model.context:
        raise RunError(
            f"rollout.max_prompt_tokens + rollout.max_completion_tokens = {longest} is more than "
            f"the {model.context} positions of {config.policy}"
        )
    mesh = _mesh(config, model)
    limit = memory_plan.device_bytes(mesh.local_devices[0])
    engine = Engine(
        qwen2.sampler_shapes(model, config.train.dtype),
        engine_config(config, model, mesh, limit),
        mesh.local_devices,
    )
    distributed.announce(engine.memory)
    return Setup(
        config=config,
        source=source,
        model=model,
        tokenizer=tokenizer.load(source),
        mesh=mesh,
        engine=engine,
        **make_programs(config, model, mesh)._asdict(),
    )


def engine_config(
    config: RlConfig, model: ModelConfig, mesh: jax.sharding.Mesh, device_bytes: int
) -> EngineConfig:
    """The engine of a run.

    Of a device's bytes it may have what the trainer's state leaves, and the scoring by which a
    hand-over is checked while there are pages.
    """
    copies = memory_plan.float32_copies(updating=False, reference=bool(config.objective.kl))
    tokens = handover.short_rows(config).row_tokens // config.mesh.context
    taken = (
        copies * memory_plan.sharded_bytes(model, mesh)
        + memory_plan.scoring_bytes(model, tokens)
        + int(memory_plan.SPARE_SHARE * device_bytes)
    )
    return dataclasses.replace(
        rollout.engine_config(config.rollout, model), memory_bytes=max(1, device_bytes - taken)
    )


def make_programs(config: RlConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> Programs:
    """The trainer's programs, which compile where they are first called."""
    steps = config.steps * config.objective.updates
    adamw = optimizer.make_optimizer(config.optimizer, steps)
    schedule = optimizer.make_schedule(config.optimizer, steps)
    loss_fn = functools.partial(policy_loss, model=model, config=config)
    return Programs(
        adamw,
        train.make_train_step(loss_fn, adamw, schedule, model, mesh, SUMS),
        jax.jit(
            lambda params, rows: _logprobs(params, rows, model, config).logprob_BT,
            out_shardings=sharding.replicated(mesh),
        ),
    )


def _checkpoints(folder: Path, config: RlConfig) -> Checkpoints:
    kept = config.checkpoint
    place = run_folder.checkpoints(config, folder)
    return Checkpoints(place, keep=kept.keep, keep_every=kept.keep_every)


def policy_loss(
    params: Params, rows: train.Batch, *, model: ModelConfig, config: RlConfig
) -> tuple[jax.Array, tuple[train.Metrics, jax.Array]]:
    """MGPO's loss of packed rows, corrected for the sampler; see losses/.

    Rows hold `advantage` and `sampler_logprob`; `old_logprob` where a step makes several updates
    (else the policy is its own old policy), `reference_logprob` where there is a KL term.
    """
    objective = config.objective
    logprob_BT, entropy_BT = _logprobs(params, rows, model, config)
    weight_BT = rows["weight"]
    importance_BT = importance.weights(
        logprob_BT,
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
        rows.get("old_logprob", logprob_BT),
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
    return loss + objective.kl * kl, (metrics, logprob_BT)


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
        eos_ids=setup.tokenizer.eos_ids,
        loop_tokens=config.rollout.loop_tokens,
    )
    return _sample(setup, state, prompts, pool, how, config.eval.samples, HELDOUT_DRAWS)


@goodput.phase("train")
def update(
    setup: Setup, state: TrainState, rolled: Rollout, reference: Params | None
) -> tuple[TrainState, dict[str, Any]]:
    """The optimizer update (or updates) on one rollout, and the step's metrics.

    A completion whose advantage is 0 has no gradient and is left out of the rows; loss weights
    are those of the whole rollout.

    Raises:
        RunError: sampler and trainer disagree by more than objective.max_mean_dlogp.
    """
    config, objective = setup.config, setup.config.objective
    advantage_NG = rollout.advantages(rolled, objective)
    documents = rollout.documents(
        rolled, advantage_NG, objective, max_tokens=config.rollout.max_completion_tokens
    )
    slices = np.array_split(np.arange(len(documents)), objective.updates)
    if objective.updates > 1:
        documents = _with_channel(setup, state.params, documents, "old_logprob")
    if reference is not None:
        documents = _with_channel(setup, reference, documents, "reference_logprob")
    metrics: dict[str, float] = rollout.group_metrics(rolled)
    metrics["rollout/groups_mixed"] = float((advantage_NG != 0).any(axis=1).mean())
    here = [completion.here for group in rolled.completions for completion in group]
    for part, indices in enumerate(slices):
        if reference is None:
            indices = [i for i in indices if documents[i].channels["advantage"].any()]
        chosen = [documents[i] for i in indices]
        sums, logprobs = train.sum_documents(
            setup.train_step, state.params, chosen, config.train, setup.mesh, exchange.place
        )
        if part == 0 and chosen:
            own = [(d, x) for i, d, x in zip(indices, chosen, logprobs, strict=True) if here[i]]
            metrics |= _agreement(own, objective)
        state, values = setup.train_step.apply(state, sums)
        metrics |= {name: float(value) for name, value in values.items()}
        learnt = sum(np.count_nonzero(d.weights) for d in chosen)
        metrics["policy/clipped"] = metrics.pop("policy/clipped_tokens") / max(learnt, 1)
        metrics["policy/entropy"] /= max(learnt, 1)
    return state, metrics


def _logprobs(params: Params, rows: train.Batch, model: ModelConfig, config: RlConfig):
    """Log-probs under the distribution that the sampler draws from, top-p and top-k apart."""
    return train.row_logprobs(
        params,
        rows,
        model,
        config.train,
        implementation=config.attention.implementation,
        temperature=config.rollout.temperature,
    )


def _agreement(own: Sequence[tuple[Document, np.ndarray]], objective) -> dict[str, float]:
    """Sampler and trainer on all tokens, from this process's documents and their log-probs."""
    count, metrics = 0, {}
    if own:
        logprob_T = np.concatenate([x[d.weights > 0] for d, x in own])
        sampled_T = np.concatenate([d.channels["sampler_logprob"][d.weights > 0] for d, _ in own])
        count = len(logprob_T)
        metrics = importance.agreement(logprob_T, sampled_T, cap=objective.correction_cap)
    metrics = importance.combined_agreement(distributed.gather([count, metrics]))
    apart = metrics["agreement/mean_abs_dlogp"]
    if apart > objective.max_mean_dlogp:
        raise RunError(
            f"sampler and trainer disagree: mean |d logp| = {apart:.3g} nats is above "
            f"objective.max_mean_dlogp = {objective.max_mean_dlogp}"
        )
    return metrics


def _with_channel(setup: Setup, params: Params, documents: list[Document], name: str):
    """The documents with their log-probs under `params` as a further channel."""
    config = setup.config.train
    values = train.score_documents(
        setup.score, params, documents, config, setup.mesh, exchange.place
    )
    return [
        dataclasses.replace(d, channels=d.channels | {name: value})
        for d, value in zip(documents, values, strict=True)
    ]


def _training_draws(setup: Setup) -> Sampling:
    return rollout.draws(setup.config.rollout, setup.tokenizer.eos_ids)


def _sample(setup, state, prompts, pool, how, samples, step) -> Rollout:
    """Verified completions by the engines, which hold weights and pages for as long as it takes."""
    config, engine = setup.config, setup.engine
    entries = None
    if setup.journal:
        done = int(state.step) // config.objective.updates
        entries = setup.journal.open(done, step, digests.of_tree(state.params))
    handover.hand_over(engine, state.params, setup.score, prompts[0], config, setup.mesh)
    began = time.perf_counter()
    own = rollout.sample(
        engine,
        setup.tokenizer,
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
    return exchange.joined(own, prompts)


def _mixed_prompts(setup, state, prompts, pool, folder: Path) -> list[Prompt]:
    """The prompts whose groups the starting policy answers neither all right nor all wrong.

    The choice is kept in the run folder, so that a resumed run has the same prompts.
    """
    path = folder / "kept_prompts.json"
    stored = distributed.from_first(lambda: path.read_text() if path.is_file() else None)
    if stored is not None:
        kept = set(json.loads(stored))
    else:
        how, samples = _training_draws(setup), setup.config.rollout.group_size
        rolled = _sample(setup, state, prompts, pool, how, samples, FILTER_DRAWS)
        accuracy_N = rolled.correct_NG.mean(axis=1)
        kept = {p.index for p, a in zip(prompts, accuracy_N, strict=True) if 0 < a < 1}
        if not kept:
            raise RunError("drop_solved: no prompt has a group that is partly right")
        if distributed.first():
            part = path.with_suffix(".part")
            part.write_text(json.dumps(sorted(kept)))
            part.replace(path)
    return [p for p in prompts if p.index in kept]


def _mesh(config: RlConfig, model: ModelConfig) -> jax.sharding.Mesh:
    """The mesh, once all that will lie on it is known to divide over it."""
    try:
        mesh = sharding.make_mesh(config.mesh.model_dump())
        qwen2.param_shardings(model, mesh)
        shape = (config.train.microbatch_rows, config.train.row_tokens)
        sharding.sharding(mesh, shape, "batch", "length")
        sharding.context_chunk(config.train.row_tokens, config.mesh.context)
    except ValueError as error:
        raise RunError(f"mesh: {error}") from None
    return mesh


def _prompts(setup: Setup, name: str) -> list[Prompt]:
    path = resolve(name)
    prompts = data.read_prompts(
        path, setup.tokenizer, max_tokens=setup.config.rollout.max_prompt_tokens
    )
    data.require_ground_truth(prompts, path)
    return prompts


def _load(setup: Setup) -> Params:
    return weights.load_params(setup.source, setup.model, setup.mesh, jnp.float32)


def _write_samples(samples: Log, step: int, rolled: Rollout, setup: Setup) -> None:
    """Some completions of the step as people read them, spread over its groups."""
    count = min(setup.config.samples_per_step, len(rolled.prompts))
    rows = {}
    for n in np.linspace(0, len(rolled.prompts) - 1, count).astype(int).tolist():
        completion, verdict = rolled.completions[n][0], rolled.verdicts[n][0]
        if not completion.here:
            continue
        rows[n] = {
            "prompt": setup.tokenizer.decode(rolled.prompts[n].tokens, skip_special_tokens=False),
            "completion": setup.tokenizer.decode(completion.text_ids),
            "ground_truth": rolled.prompts[n].record.get("ground_truth"),
            "stop": completion.stop,
            "tokens": len(completion.tokens),
            **dataclasses.asdict(verdict),
        }
    for _, row in sorted(pair for told in distributed.gather([*rows.items()]) for pair in told):
        samples.write(step, row)


def _announce_gain(evaluations: list[dict[str, Any]], seconds: float) -> None:
    if not evaluations:
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
