"""A checkpoint that completes prompts: what stages that sample but do not train have in common."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vibejax import (
    benchmarks,
    data,
    digests,
    distributed,
    meshes,
    rollout,
    run_folder,
    sampler_copy,
    tokenizer,
    weights,
)
from vibejax.checkpoint_reader import checksums
from vibejax.completions import Completion
from vibejax.config.sampling import SamplerConfig
from vibejax.data import Prompt
from vibejax.engine import Engine, engine_mesh
from vibejax.locations import resolve
from vibejax.qwen2 import ModelConfig
from vibejax.run_folder import Log, RunError
from vibejax.tokenizer import Tokenizer
from vibejax.verifiers import Outcome, Verdict, rubric_endpoint, worker
from vibejax.verifiers.pool import Pool

BROKEN = (Outcome.UNSCORED, Outcome.CRASH)
GROUPS_AT_ONCE = 32  # verified again before their verdicts are stored


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is known of a checkpoint before its weights are read.

    Attributes:
        name: as the user gave it.
        path: where it lies.
        model: its configuration.
        tokenizer: its tokenizer.
    """

    name: str
    path: Path
    model: ModelConfig
    tokenizer: Tokenizer


class Answers(NamedTuple):
    """A prompt and what a policy answered.

    Attributes:
        prompt: the prompt.
        completions: as stored, see `answers`.
    """

    prompt: Prompt
    completions: list[dict[str, Any]]


def open_policy(name: str, config: SamplerConfig) -> Policy:
    """Finds a checkpoint.

    Raises:
        InputError: it is missing, a completion would not fit its context, or attention is to be
            computed for other devices.
    """
    path = weights.locate(name)
    model, tokens = weights.load_config(path), tokenizer.load(path)
    check_context(name, model, config)
    meshes.require_attention(config.attention, "rollout.attention")
    return Policy(name, path, model, tokens)


def check_context(name: str, model: ModelConfig, config: SamplerConfig) -> None:
    """Checks that the longest completion of the longest prompt fits a model's context.

    Raises:
        RunError: it does not.
    """
    longest = config.sequence_tokens
    if longest > model.context:
        raise RunError(
            f"rollout.max_prompt_tokens + rollout.max_completion_tokens = {longest} is more than "
            f"the {model.context} positions of {name}"
        )


def read_prompts(policy: Policy, source: str, config: SamplerConfig) -> list[Prompt]:
    """The prompts of a file, which all can be verified; their records hold no answers.

    Raises:
        InputError: a prompt is too long or has no ground truth.
    """
    file = resolve(source)
    prompts = data.read_prompts(
        file, policy.tokenizer, vocab=policy.model.vocab, max_tokens=config.max_prompt_tokens
    )
    data.require_ground_truth(prompts, file)
    return [dataclasses.replace(p, record=benchmarks.asked(p.record)) for p in prompts]


def load_engine(
    policy: Policy, config: SamplerConfig, dtype: str, mesh: jax.sharding.Mesh
) -> Engine:
    """An engine on this process's devices of `mesh`, with the checkpoint's weights."""
    on = engine_mesh(policy.model, config.tensor, mesh.local_devices)
    params = weights.load_params(policy.path, policy.model, mesh, jnp.dtype(dtype))
    params = sampler_copy.make(params, policy.model, jnp.dtype(dtype), on)
    engine = Engine(params, rollout.engine_config(config, policy.model), mesh.local_devices)
    distributed.announce(engine.memory)
    return engine


def judge_of(prompts: Sequence[Prompt]) -> str | None:
    """The model behind the endpoint, where one is named and a record may ask it."""
    asking = {name for prompt in prompts for name in worker.names(prompt.record)}
    named = os.environ.get(rubric_endpoint.URL) and asking & {"rubric", "math_judge"}
    return os.environ.get(rubric_endpoint.MODEL) if named else None


def claim(folder: Path, policy: Policy, judge: str | None) -> dict[str, Any]:
    """Says in a run's folder whose completions it holds, and whose verdicts.

    Raises:
        RunError: those of another checkpoint, or of another judge.
    """
    held = {"name": policy.name, "sha256": checksums(policy.path)}
    path = folder / "checkpoint.json"
    stored = {"judge": judge} | run_folder.read_whole(path, held)
    if {name: stored.get(name) for name in held} != held:
        raise RunError(
            f"{folder}: holds completions of another checkpoint than {policy.name} is now; choose "
            "another out"
        )
    if stored["judge"] != judge:
        raise RunError(
            f"{folder}: holds verdicts of the judge {stored['judge']}, and "
            f"{rubric_endpoint.MODEL} names {judge}; choose another out"
        )
    run_folder.write_whole(path, json.dumps(held | {"judge": judge}, indent=2))
    return held


def answers(
    policy: Policy,
    load: Callable[[], Engine],
    prompts: Sequence[Prompt],
    pool: Pool,
    config: SamplerConfig,
    path: Path,
    *,
    samples: int,
    seed: int,
) -> list[Answers]:
    """Verified completions of all prompts, in their order, each group stored once it is verified.

    A group is a function of (weights, seed, prompt), so what `path` holds of an earlier run is
    taken from there, unless the record has changed since; what a broken verifier, or a judge that
    did not answer, left open is verified again.

    Args:
        policy: the checkpoint.
        load: makes its engine; called only where something is to be sampled.
        prompts: as `read_prompts` returns them.
        pool: the verifiers.
        config: the distribution and the limits.
        path: JSONL, a line a prompt: `prompt`, `record_sha256` and `completions`, each with its
            `text`, `length` in tokens, `stop`, and its verdict.
        samples: completions of each prompt.
        seed: of sampling.

    Raises:
        RunError: the logits are not numbers.
    """
    sums = [_digest(prompt.record) for prompt in prompts]
    with contextlib.closing(Log(path)) as log:
        found = {(row["prompt"], row["record_sha256"]): row["completions"] for row in log.rows}

        def store(n: int, rows: list[dict[str, Any]]) -> None:
            found[n, sums[n]] = rows
            log.append({"prompt": n, "record_sha256": sums[n], "completions": rows})

        held = {n: found[n, digest] for n, digest in enumerate(sums) if (n, digest) in found}
        for n, rows in _verified_again(held, prompts, pool):
            store(n, rows)
        missing = [n for n in range(len(prompts)) if n not in held]
        groups = ()
        if missing:
            groups = rollout.groups(
                load(),
                policy.tokenizer,
                [prompts[n] for n in missing],
                pool,
                samples=samples,
                max_tokens=config.max_completion_tokens,
                how=rollout.draws(config, policy.tokenizer.eos_ids),
                seed=seed,
                step=0,
            )
        for place, completions, verdicts in groups:
            if any(c.stop == "not_finite" for c in completions):
                raise RunError(f"{policy.name}: the model's logits are not numbers")
            n = missing[place]
            store(n, [_row(policy, c, v) for c, v in zip(completions, verdicts, strict=True)])
    return [
        Answers(prompt, found[n, digest])
        for n, (prompt, digest) in enumerate(zip(prompts, sums, strict=True))
    ]


def _row(policy: Policy, completion: Completion, verdict: Verdict) -> dict[str, Any]:
    return {
        "text": policy.tokenizer.decode(completion.text_ids),
        "length": len(completion.tokens),
        "stop": completion.stop,
        **_said(verdict),
    }


def _said(verdict: Verdict) -> dict[str, Any]:
    return {name: getattr(verdict, name) for name in ("correct", "reward", "outcome", "answer")}


def _verified_again(
    held: Mapping[int, list[dict[str, Any]]], prompts: Sequence[Prompt], pool: Pool
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The stored groups whose verifiers broke, with the verdicts of now.

    Not those that ran out of time or memory, which is the completion's own doing.
    """
    unsure = {
        n: sorted({row["text"] for row in rows if row["outcome"] in BROKEN})
        for n, rows in held.items()
    }
    unsure = {n: texts for n, texts in unsure.items() if texts}
    for start in range(0, len(unsure), GROUPS_AT_ONCE):
        part = [*unsure][start : start + GROUPS_AT_ONCE]
        asked = [(n, text) for n in part for text in unsure[n]]
        given = ((prompts[n].record, text) for n, text in asked)
        # They have failed before: that some do so again must not keep a run from going on.
        now = dict(zip(asked, map(_said, pool.verify(given, counted=False)), strict=True))
        for n in part:
            yield n, [row | now.get((n, row["text"]), {}) for row in held[n]]


def _digest(record: data.Record) -> str:
    text = json.dumps(record, sort_keys=True, default=str)
    return digests.of_text(text)
