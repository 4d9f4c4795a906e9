"""How good a checkpoint is: `python -m vibejax.evaluate CONFIG [--set key=value ...]`.

The checkpoint completes each problem of each evaluation set several times, and the set's verifier
judges every completion. The run folder gets completions/NAME.jsonl (every completion with its
verdict, a line a problem, which a resumed run does not sample again) and results.json: avg@n,
pass@k for all k, maj@n, 95% intervals over problems, completion length, the truncated share, the
checkpoint's checksums and the configuration. The table is printed.

What cannot be verified (a time-out, a judge that does not answer) counts as not correct, and its
share is shown. maj@n is for sets whose answers can be told apart: math and choice.

Source: VibeThinker-3B technical report, section 3.1; `configs/evaluate_3b.toml` is its protocol.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from vibejax import digests, meshes, policy, programs, run_folder, scoring, votes
from vibejax.config.evaluate import EvaluateConfig
from vibejax.config_file import errors_in_one_line, parse_args
from vibejax.data import Prompt
from vibejax.locations import resolve
from vibejax.policy import Answers
from vibejax.run_folder import RunError
from vibejax.safetensors_folder import write_json
from vibejax.verifiers import Outcome
from vibejax.verifiers.pool import Pool, VerifierFailure
from vibejax.verifiers.worker import names

VOTING = {"math", "math_judge", "choice"}
"""Verifiers whose answers are compared by what they say; code is not, nor is prose."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over problems, and its 95% interval by resampling them."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A checkpoint's score on a set.

    Attributes:
        problems: in the set.
        samples: n, completions of each.
        avg: avg@n, the mean accuracy.
        pass_at: pass@k for k = 1, 2, ..., n.
        pass_n: pass@n with its interval.
        maj: maj@n, the accuracy of the answer that most completions give; None where completions
            cannot vote.
        correct: correct completions of each problem.
        length: mean tokens of a completion.
        truncated: share of completions that the limit ended.
        unscored: share that the verifier could not judge; they count as not correct.
    """

    problems: int
    samples: int
    avg: Estimate
    pass_at: list[float]
    pass_n: Estimate
    maj: Estimate | None
    correct: list[int]
    length: float
    truncated: float
    unscored: float


def main() -> None:
    """Runs the stage that the command line configures."""
    config = parse_args(EvaluateConfig, doc=__doc__)
    with errors_in_one_line(VerifierFailure, OSError):
        run(config)


def run(config: EvaluateConfig, open_pool: Callable[..., Pool] = Pool) -> Path:
    """Evaluates, and returns the run folder.

    Args:
        config: the stage's configuration.
        open_pool: makes a verifier pool.

    Raises:
        InputError: something the user gave cannot be used; nothing was sampled then.
    """
    run_folder.check_run(config)
    programs.prepare()
    opened = policy.open_policy(config.policy, config.rollout)
    prompts = {
        name: policy.read_prompts(opened, given.path, config.rollout)
        for name, given in config.sets.items()
    }
    mesh = meshes.make(config.mesh, [opened.model])
    arguments = config.verifiers.pool_arguments()
    with open_pool(**arguments | {"max_failure_rate": 1.0}) as pool:
        for name, given in config.sets.items():
            require_verifiable(pool, prompts[name], given.path)
    folder = run_folder.open_run(config, "evaluate")
    with run_folder.kept(config, folder):
        asked = [prompt for group in prompts.values() for prompt in group]
        judge = policy.judge_of(asked)
        held = policy.claim(folder, opened, judge)
        load = functools.cache(
            lambda: policy.load_engine(opened, config.rollout, config.dtype, mesh)
        )
        scores = {}
        start = time.perf_counter()
        with open_pool(**arguments) as pool, jax.set_mesh(mesh):
            for name, given in config.sets.items():
                (folder / "completions").mkdir(exist_ok=True)
                answered = policy.answers(
                    opened,
                    load,
                    prompts[name],
                    pool,
                    config.rollout,
                    folder / f"completions/{name}.jsonl",
                    samples=given.samples or config.samples,
                    seed=config.seed,
                )
                scores[name] = score_of(answered, functools.partial(votes.equal_answers, pool))
                seconds = time.perf_counter() - start
                print(f"{name}: {len(answered)} problems after {seconds:.0f} s", file=sys.stderr)
        write_json(
            folder / "results.json",
            {
                "checkpoint": held,
                "judge": judge,
                "config": config.model_dump(),
                "sets": {
                    name: {"sha256": digests.of_file(resolve(given.path))}
                    | dataclasses.asdict(scores[name])
                    for name, given in config.sets.items()
                },
            },
        )
        print(table(scores))
    return folder


def require_verifiable(pool: Pool, prompts: Sequence[Prompt], source: str) -> None:
    """Checks that the verifiers can use every record, by a completion that says nothing.

    What a record holds is unpacked, parsed and refused in their processes: tests, pickled ones
    too, are a stranger's.

    Raises:
        RunError: one cannot be used.
    """
    verdicts = pool.verify((prompt.record, "") for prompt in prompts)
    for number, verdict in enumerate(verdicts, start=1):
        if not verdict.outcome.scored:
            why = verdict.detail or verdict.outcome
            raise RunError(f"{resolve(source)}:{number}: cannot be verified: {why}")


def score_of(answered: Sequence[Answers], equal: Callable[[votes.Pairs], list[bool]]) -> Score:
    """What a set's completions come to.

    Args:
        answered: its problems, each with as many completions.
        equal: says of pairs of answers whether they are equivalent.
    """
    rows = [answer.completions for answer in answered]
    correct_NG = np.array([[row["correct"] for row in group] for group in rows])
    curve_NK = scoring.pass_curves(correct_NG.sum(axis=1), correct_NG.shape[1])
    voting = all(VOTING.issuperset(names(answer.prompt.record)) for answer in answered)
    return Score(
        problems=len(rows),
        samples=correct_NG.shape[1],
        avg=_estimate(curve_NK[:, 0]),
        pass_at=curve_NK.mean(axis=0).tolist(),
        pass_n=_estimate(curve_NK[:, -1]),
        maj=_estimate(_majority_scores(rows, correct_NG, equal)) if voting else None,
        correct=correct_NG.sum(axis=1).tolist(),
        length=float(np.mean([[row["length"] for row in group] for group in rows])),
        truncated=float(np.mean([[row["stop"] == "length" for row in group] for group in rows])),
        unscored=float(
            np.mean([[not Outcome(row["outcome"]).scored for row in group] for group in rows])
        ),
    )


def table(scores: Mapping[str, Score]) -> str:
    """The scores as people read them."""
    heads = ("set", "problems", "n", "avg@n", "pass@n", "maj@n", "tokens", "truncated", "unscored")
    cells = [heads]
    for name, s in scores.items():
        estimates = [
            "-" if e is None else f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]"
            for e in (s.avg, s.pass_n, s.maj)
        ]
        shares = f"{s.truncated:.1%}", f"{s.unscored:.1%}"
        counts = str(s.problems), str(s.samples)
        cells.append((name, *counts, *estimates, f"{s.length:.0f}", *shares))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def _estimate(value_N: np.ndarray) -> Estimate:
    return Estimate(float(value_N.mean()), *scoring.bootstrap_interval(value_N))


def _majority_scores(rows, correct_NG, equal) -> np.ndarray:
    """[N] float64, of each problem the chance that the vote is correct."""
    return np.array(
        [
            scoring.majority_score(
                votes.clusters([row["answer"] for row in group], equal), correct_G
            )
            for group, correct_G in zip(rows, correct_NG, strict=True)
        ]
    )


if __name__ == "__main__":
    main()
