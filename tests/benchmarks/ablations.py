"""MGPO against GRPO, and Long2Short on and off: five seeds each, paired.

    python tests/benchmarks/ablations.py run OUT            an hour; goes on where it stopped
    python tests/benchmarks/ablations.py report OUT F.png   JSON lines of results, and a picture

All runs train the shipped policy on three-digit sums with one budget of prompts and steps. A seed
fixes a run's prompts and draws, and those of its evaluation, so runs of one seed are pairs. gamma
weights prompts and so also shrinks gradients; each gamma gets the learning rate whose policies are
right most often after training on other seeds, on prompts that are used for nothing else.
Long2Short goes on from one policy that MGPO has trained. Each run that ends is a line of
OUT/results.jsonl, from which alone the report is made, at any time.

A run and its evaluation take one to two minutes of one core, all 48 an hour (jax 0.10.2,
2026-11-22). Programs are compiled once, into OUT/compiled.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from vibejax import data, group_sampling, rl, rl_setup, scoring, weights
from vibejax.config.rl import RlConfig
from vibejax.config_file import InputError, errors_in_one_line, load
from vibejax.data import Prompt
from vibejax.locations import resolve
from vibejax.rl_setup import Setup
from vibejax.run_folder import Log, read_log
from vibejax.train import TrainState
from vibejax.verifiers.pool import Pool

matplotlib.use("Agg")  # files only: no display is needed or opened

from matplotlib import pyplot as plt

GAMMAS = (0.0, 1.0, 2.0, 4.0)
RATES = (0.75e-4, 1.5e-4, 3e-4, 6e-4)
SEEDS, TUNING_SEEDS, START_SEED = (0, 1, 2, 3, 4), (100,), 102
TUNING_PROMPTS = 512
SAMPLES, FEWER_SAMPLES = 8, 2  # fewer where pass@8 is not asked for: tuning and Long2Short
STRENGTHS = (0.0, 0.2)  # Long2Short's lambda, off and on
BUDGET = (
    "steps=12",
    "rollout.prompts_per_step=16",
    "checkpoint.keep=1",
    "samples_per_step=0",
    "verifiers.workers=1",
)
CURVE = ("eval.every=4", "eval.prompts=256")
SCORES = ("pass@1", "pass@8", "length", "correct_length", "truncated")
PER_PROMPT = {"pass@1": 1, "pass@8": 8}  # name -> k
LISTS = ("correct", "accuracy", "mixed", "grad_norm")
T_975 = (12.706, 4.303, 3.182, 2.776)  # Student's t at 97.5% for 1 to 4 degrees of freedom

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Spec:
    """What tells a run from the others."""

    phase: str  # before, tuning, gamma, start or long2short
    gamma: float = 1.0
    rate: float = 0.0  # 0: no training
    seed: int = 0
    strength: float = 0.0


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all runs use."""

    out: Path
    log: Log
    pool: Pool
    setup: Setup  # of evaluations
    heldout: Sequence[Prompt]
    tuning: Sequence[Prompt]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run").add_argument("out", type=Path, metavar="OUT")
    reporting = commands.add_parser("report")
    reporting.add_argument("out", type=Path, metavar="OUT")
    reporting.add_argument("picture", type=Path, metavar="F.png")
    args = parser.parse_args()
    if args.command == "run":
        run(args.out)
    else:
        with errors_in_one_line():
            rows = read_log(args.out / "results.jsonl")
            if not rows:
                raise InputError(f"{args.out}: has no results.jsonl with a run in it")
            report(rows, args.picture)


def run(out: Path) -> None:
    """Does all runs of which `out` has no result."""
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = load(RlConfig, rl.DEFAULT, BUDGET)
    lines = resolve(config.prompts).read_text().splitlines(keepends=True)
    (out / "train.jsonl").write_text("".join(lines[:-TUNING_PROMPTS]))
    (out / "tuning.jsonl").write_text("".join(lines[-TUNING_PROMPTS:]))
    setup = rl_setup.set_up(config)
    tokens = setup.policy.tokenizer
    log = Log(out / "results.jsonl", len(read_log(out / "results.jsonl")))
    # The verdict on a sum leaves nothing behind in a worker: none needs to be replaced.
    with Pool(**config.verifiers.pool_arguments(), recycle_after=10**9) as pool:
        heldout, tuning = (
            data.read_prompts(
                path,
                tokens,
                vocab=setup.policy.model.vocab,
                max_tokens=config.rollout.max_prompt_tokens,
            )
            for path in (resolve(config.heldout), out / "tuning.jsonl")
        )
        bench = Bench(out, log, pool, setup, heldout, tuning)
        once(bench, Spec("before"))
        for gammas in (GAMMAS[:2], GAMMAS[2:]):  # what tells most first, in pairs
            for seed, rate, gamma in itertools.product(TUNING_SEEDS, RATES, gammas):
                once(bench, Spec("tuning", gamma, rate, seed))
            for seed, gamma in itertools.product(SEEDS, gammas):
                once(bench, Spec("gamma", gamma, tuned_rate(log.rows, gamma), seed))
        rate = tuned_rate(log.rows, 1.0)
        once(bench, Spec("start", 1.0, rate, START_SEED))
        for seed, strength in itertools.product(SEEDS, STRENGTHS):
            once(bench, Spec("long2short", 1.0, rate, seed, strength))
    log.close()


def once(bench: Bench, spec: Spec) -> None:
    """Trains and evaluates, and logs the result, unless that was done before."""
    if any(dataclasses.asdict(spec).items() <= row.items() for row in bench.log.rows):
        return
    start = time.perf_counter()
    if spec.rate:
        policy, curves = train(bench, spec)
    else:
        policy, curves = bench.setup.policy.path, {}
    trained = time.perf_counter()
    prompts = bench.tuning if spec.phase == "tuning" else bench.heldout
    samples = SAMPLES if spec.phase in ("before", "gamma") else FEWER_SAMPLES
    row = {
        **dataclasses.asdict(spec),
        **evaluate(bench, policy, prompts, samples, spec.seed),
        **curves,
        "train_s": trained - start,
        "evaluate_s": time.perf_counter() - trained,
    }
    bench.log.write(len(bench.log.rows) + 1, row)
    print(json.dumps({name: value for name, value in row.items() if name not in LISTS}), flush=True)


def train(bench: Bench, spec: Spec) -> tuple[Path, Row]:
    """One run of the RL stage: the policy that it exported, and what happened on the way."""
    folder = bench.out / spec.phase  # the last run of a phase stays: Long2Short starts from one
    shutil.rmtree(folder, ignore_errors=True)
    settings = [
        *BUDGET,
        f"out={folder}",
        f"prompts={bench.out / 'train.jsonl'}",
        f"seed={spec.seed}",
        f"objective.gamma={spec.gamma}",
        f"objective.long2short={spec.strength}",
        f"optimizer.learning_rate={spec.rate}",
        *(CURVE if spec.phase == "gamma" else ("heldout=",)),
    ]
    if spec.phase == "long2short":
        settings.append(f"policy={bench.out / 'start' / 'final'}")
    config = load(RlConfig, rl.DEFAULT, settings)
    rl.run(config, open_pool=lambda **_: contextlib.nullcontext(bench.pool))
    rows = read_log(folder / "metrics.jsonl")
    return folder / "final", {
        "heldout": [[r["step"], r["heldout/pass@1"]] for r in rows if "heldout/pass@1" in r],
        "accuracy": [r["rollout/accuracy"] for r in rows if r["step"]],
        "mixed": [r["rollout/groups_mixed"] for r in rows if r["step"]],
        "grad_norm": [r["optimizer/grad_norm"] for r in rows if r["step"]],
    }


def evaluate(bench: Bench, policy: Path, prompts: Sequence[Prompt], samples: int, seed: int) -> Row:
    """What completions of the prompts are like."""
    setup = bench.setup
    how = setup.config.eval.model_copy(update={"samples": samples})
    config = setup.config.model_copy(update={"seed": seed, "eval": how})
    with jax.set_mesh(setup.mesh):
        params = weights.load_params(policy, setup.policy.model, setup.mesh, jnp.float32)
        state = TrainState(jnp.zeros((), jnp.int32), params, ())
        rolled = group_sampling.evaluate_heldout(
            dataclasses.replace(setup, config=config), state, prompts, bench.pool
        )
    correct_NG, length_NG = rolled.correct_NG, rolled.length_NG
    return {
        "pass@1": scoring.pass_at_k(correct_NG, 1),
        f"pass@{samples}": scoring.pass_at_k(correct_NG, samples),
        "length": float(length_NG.mean()),
        "correct_length": float(length_NG[correct_NG].mean()),
        "truncated": float(rolled.truncated_NG.mean()),
        "samples": samples,
        "correct": correct_NG.sum(axis=1).tolist(),
    }


def tuned_rate(rows: Sequence[Row], gamma: float) -> float:
    """The learning rate with the highest mean pass@1 of tuning runs."""
    scores = tuning_scores(rows, gamma)
    return max(scores, key=lambda rate: np.mean(scores[rate]))


def tuning_scores(rows: Sequence[Row], gamma: float) -> dict[float, list[float]]:
    """Learning rate -> pass@1 of its tuning runs."""
    scores: dict[float, list[float]] = {}
    for row in rows:
        if row["phase"] == "tuning" and row["gamma"] == gamma:
            scores.setdefault(row["rate"], []).append(row["pass@1"])
    return scores


def report(rows: Sequence[Row], picture: Path) -> None:
    """Prints what the runs so far say, and draws it."""
    tell("versions", jax=jax.__version__, settings=[*BUDGET, *CURVE])
    for row in rows:
        if row["phase"] in ("before", "start"):
            tell(row["phase"], **{score: row[score] for score in scores_of({0: row})})
    for gamma in GAMMAS:
        for rate, scores in tuning_scores(rows, gamma).items():
            chosen = rate == tuned_rate(rows, gamma)
            tell(
                "tuning",
                gamma=gamma,
                rate=f"{rate:g}",
                chosen=chosen,
                **{"pass@1": rounded(scores)},
            )
    by_gamma = {gamma: runs(rows, "gamma", gamma=gamma) for gamma in GAMMAS}
    by_strength = {strength: runs(rows, "long2short", strength=strength) for strength in STRENGTHS}
    for name, sides in (("gamma", by_gamma), ("long2short", by_strength)):
        base, *others = sides
        for value, side in sides.items():
            for score in scores_of(side):
                found = [row[score] for row in side.values()]
                tell(name, value=value, score=score, mean=np.mean(found), seeds=rounded(found))
        for value in others:
            for score in scores_of(sides[value]):  # none before its first run has ended
                difference = compare(sides[value], sides[base], score)
                tell(f"{name} {value:g} - {name} {base:g}", score=score, **difference)
    draw(by_gamma, by_strength, picture)


def scores_of(side: dict[int, Row]) -> list[str]:
    """The scores that its runs have."""
    return [score for score in SCORES if all(score in row for row in side.values()) and side]


def tell(what: str, **fields: Any) -> None:
    """One JSON line."""
    short = {k: round(float(v), 4) if isinstance(v, float) else v for k, v in fields.items()}
    print(json.dumps({"benchmark": "ablations", "what": what, **short}))


def rounded(values: Sequence[float]) -> list[float]:
    """As JSON lines show them."""
    return np.round(values, 4).tolist()


def runs(rows: Sequence[Row], phase: str, **fields: float) -> dict[int, Row]:
    """Seed -> its run."""
    wanted = {"phase": phase, **fields}
    return {row["seed"]: row for row in rows if wanted.items() <= row.items()}


def compare(ours: dict[int, Row], base: dict[int, Row], score: str) -> Row:
    """The mean difference of paired runs and its 95% intervals.

    `t` is Student's over the seeds' differences, each of them a mean over all prompts. `bootstrap`
    draws seeds and prompts anew, the same ones for both sides; of so few seeds it is too narrow.
    """
    seeds = sorted(ours.keys() & base.keys())
    d_S = np.array([ours[seed][score] - base[seed][score] for seed in seeds])
    row: Row = {"difference": d_S.mean(), "seeds": rounded(d_S)}
    if len(seeds) > 1:
        half = T_975[len(seeds) - 2] * d_S.std(ddof=1) / len(seeds) ** 0.5
        row["t"] = rounded([d_S.mean() - half, d_S.mean() + half])
    if seeds and score in PER_PROMPT:
        sides = (
            np.stack([per_prompt(side[seed], score) for seed in seeds]) for side in (ours, base)
        )
        row["bootstrap"] = rounded(bootstrap(next(sides) - next(sides)))
    return row


def per_prompt(row: Row, score: str) -> np.ndarray:
    """[N] float, pass@k of each prompt."""
    curve_NK = scoring.pass_curves(np.array(row["correct"]), row["samples"])
    return curve_NK[:, PER_PROMPT[score] - 1]


def bootstrap(d_SN: np.ndarray, draws: int = 2_000) -> tuple[float, float]:
    """95% interval of the mean over [seeds, prompts], by drawing both anew."""
    rng = np.random.default_rng(0)
    seeds, prompts = d_SN.shape
    d_DN = d_SN[rng.integers(0, seeds, (draws, seeds))].mean(axis=1)
    mean_D = np.take_along_axis(d_DN, rng.integers(0, prompts, d_DN.shape), axis=1).mean(axis=1)
    low, high = np.percentile(mean_D, [2.5, 97.5])
    return float(low), float(high)


def draw(
    by_gamma: dict[float, dict[int, Row]], by_strength: dict[float, dict[int, Row]], out: Path
) -> None:
    """Writes the picture: curves of each gamma, their differences, and Long2Short's two sides."""
    figure, (curves, gains, lengths) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for n, (gamma, side) in enumerate(by_gamma.items()):
        if not side:
            continue
        heldout_SPX = np.array([row["heldout"] for row in side.values()])
        step_P, value_SP = heldout_SPX[0, :, 0], heldout_SPX[:, :, 1]
        mean_P, std_P = value_SP.mean(axis=0), value_SP.std(axis=0)
        curves.plot(step_P, mean_P, "o-", color=f"C{n}", label=f"gamma {gamma:g}", markersize=3)
        curves.fill_between(step_P, mean_P - std_P, mean_P + std_P, color=f"C{n}", alpha=0.15)
        if gamma == GAMMAS[0]:
            continue
        for place, score in enumerate(PER_PROMPT):
            found = compare(side, by_gamma[GAMMAS[0]], score)
            x = n + 0.3 * (place - 0.5)
            error = None if "t" not in found else [[found["difference"] - found["t"][0]]] * 2
            color = f"C{4 + place}"
            label = f"{score}, 95% interval (t)" if n == 1 else None
            gains.errorbar(
                [x], [found["difference"]], error, fmt="o", capsize=3, color=color, label=label
            )
            gains.plot(
                [x + 0.08] * len(found["seeds"]), found["seeds"], ".", color=color, alpha=0.4
            )
    curves.set(title="held-out pass@1, mean and spread", xlabel="step")
    gains.axhline(0, color="black", linewidth=0.8)
    gains.set_xticks(range(1, len(GAMMAS)), [f"gamma {gamma:g}" for gamma in GAMMAS[1:]])
    gains.set(title="difference to gamma 0, paired by seed")
    for strength, side in by_strength.items():
        points = [(row["correct_length"], row["pass@1"]) for row in side.values()]
        if points:
            lengths.plot(*zip(*points, strict=True), "o", label=f"lambda {strength:g}")
    lengths.set(title="Long2Short", xlabel="tokens of a correct completion", ylabel="pass@1")
    for axis in (curves, gains, lengths):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(out, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
