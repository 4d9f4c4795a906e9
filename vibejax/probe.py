"""Which checkpoint is best at what: `python -m vibejax.probe CONFIG [--set key=value ...]`.

Each checkpoint t completes each domain i's probing set, several times a prompt. Its score there,
P_i(t), is pass@k; the specialist of a domain is the checkpoint with the highest, the earliest of
equals. The run folder gets scores.jsonl (a line for each checkpoint and domain, which a resumed
run does not score again), probe.json with pass@k of every k and the specialists, and probe.png;
the table is printed, and the command that merges the specialists.

Source: VibeThinker-3B (arXiv 2606.16140) sec. 2.1, Diversity-Exploring Distillation.
"""

import collections
import dataclasses
import glob
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vibejax import buckets, digests, meshes, policy, programs, report, rollout, run_folder, scoring
from vibejax.checkpoint_reader import checksums
from vibejax.config.probe import ProbeConfig
from vibejax.config_file import errors_in_one_line, parse_args
from vibejax.data import Prompt
from vibejax.locations import resolve
from vibejax.policy import Policy
from vibejax.rollout import Rollout
from vibejax.run_folder import Log, RunError
from vibejax.safetensors_folder import write_json
from vibejax.verifiers.pool import Pool, VerifierFailure

CHANGEABLE = ("checkpoints", "domains")  # fields in which a resumed run may differ
DRAWS = 0  # the "step" of the engine's draws: the same for all checkpoints, so scores are paired


@dataclasses.dataclass(frozen=True)
class Subject:
    """A checkpoint to probe, and domain -> the prompts of its probing set in its tokens."""

    policy: Policy
    prompts: Mapping[str, Sequence[Prompt]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A checkpoint's score on a domain.

    Attributes:
        checkpoint: as the user named it.
        domain: its name.
        prompts: in the probing set.
        pass_at: pass@k for k = 1, 2, ... up to the completions of a prompt.
        low: lower end of the 95% interval of pass@k at the k that chooses specialists.
        high: its upper end.
        length: mean tokens of a completion.
        truncated: share of completions that the limit ended.
        unscored: share that the verifier could not judge; they count as not correct.
    """

    checkpoint: str
    domain: str
    prompts: int
    pass_at: list[float]
    low: float
    high: float
    length: float
    truncated: float
    unscored: float


def main() -> None:
    """Runs the stage that the command line configures."""
    config = parse_args(ProbeConfig, doc=__doc__)
    with errors_in_one_line(VerifierFailure, OSError):
        run(config)


def run(config: ProbeConfig, open_pool: Callable[..., Pool] = Pool) -> Path:
    """Scores what has no score yet, and returns the run folder.

    Args:
        config: the stage's configuration.
        open_pool: makes the verifier pool.

    Raises:
        InputError: something the user gave cannot be used; nothing was sampled then.
    """
    config = _expanded(config)
    run_folder.check_run(config, CHANGEABLE)
    programs.prepare()
    subjects = [read_subject(config, name) for name in config.checkpoints]
    mesh = meshes.make(config.mesh, [subject.policy.model for subject in subjects])
    folder = run_folder.open_run(config, "probe", CHANGEABLE)
    with run_folder.kept(config, folder):
        _score(config, subjects, mesh, folder, open_pool)
    return folder


def _score(
    config: ProbeConfig,
    subjects: Sequence[Subject],
    mesh: jax.sharding.Mesh,
    folder: Path,
    open_pool: Callable[..., Pool],
) -> None:
    """Writes the table of all scores, old and new, into the run folder."""
    path = folder / "scores.jsonl"
    log = Log(path)
    rows = []
    with open_pool(**config.verifiers.pool_arguments()) as pool, jax.set_mesh(mesh):
        for subject in subjects:
            rows += _rows_of(subject, config, mesh, pool, log)
    log.close()
    scores = [score_of(row, config) for row in rows]
    best = specialists(scores, config.k)
    write_json(
        folder / "probe.json",
        {
            "k": config.k,
            "samples": config.samples,
            "scores": [dataclasses.asdict(score) for score in scores],
            "specialists": best,
        },
    )
    report.draw_probe(
        config.checkpoints,
        {
            domain: np.array(
                [(s.pass_at[config.k - 1], s.low, s.high) for s in scores if s.domain == domain]
            )
            for domain in config.domains
        },
        f"pass@{config.k}, 95% interval",
        folder / "probe.png",
    )
    print(table(scores, best, config))


def _expanded(config: ProbeConfig) -> ProbeConfig:
    """The configuration with every pattern replaced by the folders it matches, by their names."""
    names = []
    for name in config.checkpoints:
        if buckets.named(name) and glob.has_magic(name):
            raise RunError(f"checkpoints: {name}: patterns match folders on disk; name each")
        found = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not found:
            raise RunError(f"checkpoints: nothing matches {name}")
        names += found
    if twice := [name for name in names if names.count(name) > 1]:
        raise RunError(f"checkpoints: {twice[0]} is named twice")
    return config.model_copy(update={"checkpoints": names})


def read_subject(config: ProbeConfig, name: str) -> Subject:
    """What is needed of a checkpoint short of its weights.

    Raises:
        InputError: the checkpoint is missing, a completion would not fit its context, or a
            probing set cannot be used: a prompt is too long or has no ground truth.
    """
    opened = policy.open_policy(name, config.rollout)
    return Subject(
        opened,
        {
            domain: policy.read_prompts(opened, source, config.rollout)
            for domain, source in config.domains.items()
        },
    )


def sample_domains(
    subject: Subject,
    domains: Sequence[str],
    config: ProbeConfig,
    mesh: jax.sharding.Mesh,
    pool: Pool,
) -> Iterator[tuple[str, Rollout]]:
    """Verified completions of a checkpoint on probing sets, one set after the other.

    All that probing asks of the engine is asked here. The weights are read once.

    Yields:
        (domain, the verified completions of all its prompts).
    """
    engine = policy.load_engine(subject.policy, config.rollout, config.dtype, mesh)
    for domain in domains:
        rolled = rollout.sample(
            engine,
            subject.policy.tokenizer,
            subject.prompts[domain],
            pool,
            samples=config.samples,
            max_tokens=config.rollout.max_completion_tokens,
            how=rollout.draws(config.rollout, subject.policy.tokenizer.eos_ids),
            seed=config.seed,
            step=DRAWS,
        )
        if not rolled.finite:
            raise RunError(f"{subject.policy.name}: the model's logits are not numbers on {domain}")
        yield domain, rolled


def score_of(row: Mapping[str, Any], config: ProbeConfig) -> Score:
    """What a line of scores.jsonl says."""
    curve_NK = scoring.pass_curves(np.asarray(row["correct"]), config.samples)
    low, high = scoring.bootstrap_interval(curve_NK[:, config.k - 1])
    return Score(
        checkpoint=row["checkpoint"],
        domain=row["domain"],
        prompts=len(curve_NK),
        pass_at=curve_NK.mean(axis=0).tolist(),
        low=low,
        high=high,
        length=row["length"],
        truncated=row["truncated"],
        unscored=row["unscored"],
    )


def specialists(scores: Sequence[Score], k: int) -> dict[str, str]:
    """Domain -> the checkpoint with the highest pass@k there, the earliest of equals."""
    best: dict[str, Score] = {}
    for score in scores:
        held = best.setdefault(score.domain, score)
        if score.pass_at[k - 1] > held.pass_at[k - 1]:
            best[score.domain] = score
    return {domain: score.checkpoint for domain, score in best.items()}


def table(scores: Sequence[Score], best: Mapping[str, str], config: ProbeConfig) -> str:
    """The scores as people read them, and how to merge the specialists."""
    cells = [[f"pass@{config.k} of {config.samples}", *config.domains]]
    for checkpoint in config.checkpoints:
        cells.append([checkpoint])
        for s in (s for s in scores if s.checkpoint == checkpoint):
            mark = "*" if best[s.domain] == checkpoint else " "
            cells[-1].append(f"{s.pass_at[config.k - 1]:.3f}{mark} [{s.low:.3f}, {s.high:.3f}]")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    lines += [
        f"{s.checkpoint} on {s.domain}: {s.unscored:.1%} of the completions could not be verified"
        for s in scores
        if s.unscored
    ]
    counts = collections.Counter(best[domain] for domain in config.domains)
    named = [shlex.quote(f"{checkpoint}={count}") for checkpoint, count in counts.items()]
    return "\n".join([*lines, f"python -m vibejax.merge OUT {' '.join(named)}"])


def _rows_of(subject: Subject, config: ProbeConfig, mesh, pool: Pool, log: Log) -> list[dict]:
    """A checkpoint's line of scores.jsonl for each domain, sampled where there is none."""
    held = checksums(subject.policy.path)
    keys = {
        domain: {
            "checkpoint": subject.policy.name,
            "domain": domain,
            "checkpoint_sha256": held,
            "prompts_sha256": digests.of_file(resolve(source)),
        }
        for domain, source in config.domains.items()
    }
    rows = {
        domain: row
        for row in log.rows
        for domain, key in keys.items()
        if key.items() <= row.items()
    }
    missing = [domain for domain in keys if domain not in rows]
    start = time.perf_counter()
    for domain, rolled in sample_domains(subject, missing, config, mesh, pool) if missing else ():
        row = keys[domain] | {
            "correct": rolled.correct_NG.sum(axis=1).tolist(),
            "length": float(rolled.length_NG.mean()),
            "truncated": float(rolled.truncated_NG.mean()),
            "unscored": float((~rolled.scored_NG).mean()),
        }
        log.append(row)
        rows[domain] = row
        seconds = time.perf_counter() - start
        print(f"{subject.policy.name}: {domain} scored after {seconds:.0f} s", file=sys.stderr)
    return [rows[domain] for domain in config.domains]


if __name__ == "__main__":
    main()
