"""Offline self-distillation: `python -m vibejax.distill CONFIG [--set key=value ...]`.

Teachers complete the prompts of their domains; the student scores what the verifiers accept by how
much there is to learn in it; and inside each cell, a domain and a bucket of lengths, the middle to
high scores are chosen. The run folder gets trajectories/ (all completions), scores.jsonl,
chosen.jsonl (records for `python -m vibejax.sft`), report.json and report.png. A resumed run
neither samples nor scores again what is there, so another `selection` costs nothing.

Source: VibeThinker-3B (arXiv 2606.16140) sec. 2.3.
"""

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from vibejax import buckets, data, meshes, policy, programs, report, run_folder
from vibejax.config.distill import DistillConfig
from vibejax.config_file import errors_in_one_line, parse_args
from vibejax.distill import summary
from vibejax.distill.scores import score_traces
from vibejax.distill.summary import Decided
from vibejax.distill.traces import Lesson, Setup, Trace, sample_traces, taught_record
from vibejax.locations import resolve
from vibejax.losses import distillation
from vibejax.losses.distillation import Fate
from vibejax.safetensors_folder import write_json
from vibejax.verifiers.pool import Pool, VerifierFailure

CHANGEABLE = ("domains", "selection")


def main() -> None:
    """Runs the stage that the command line configures."""
    config = parse_args(DistillConfig, doc=__doc__)
    with errors_in_one_line(VerifierFailure, OSError):
        run(config)


def run(config: DistillConfig, open_pool: Callable[..., Pool] = Pool) -> Path:
    """Samples and scores what is missing, chooses, and returns the run folder.

    Args:
        config: the stage's configuration.
        open_pool: makes the verifier pool.

    Raises:
        InputError: something the user gave cannot be used, or a domain ends without a trace.
    """
    run_folder.check_run(config, CHANGEABLE)
    programs.prepare()
    setup = set_up(config)
    folder = run_folder.open_run(config, "distill", CHANGEABLE)
    with run_folder.kept(config, folder):
        chosen = folder / "chosen.jsonl"
        chosen.unlink(missing_ok=True)  # it may be another selection's
        (folder / "trajectories").mkdir(exist_ok=True)
        with jax.set_mesh(setup.mesh):
            with open_pool(**config.verifiers.pool_arguments()) as pool:
                sampled = sample_traces(setup, pool, folder / "trajectories")
            for domain, traces in sampled.traces.items():
                summary.require(traces, domain, summary.count(sampled, {}), config)
            decided = decide(setup, sampled.traces, folder / "scores.jsonl")
        counts = summary.count(sampled, decided)
        cells = summary.summarize(decided, counts, config)
        teachers = summary.by_teacher(setup.lessons, decided, config.samples)
        write_json(folder / "report.json", {"teachers": teachers, "cells": cells})
        for domain, found in decided.items():
            summary.require(found.chosen_B, domain, counts, config)
        report.draw_distillation(
            {
                domain: (found.score_B, np.array([t.length for t in found.traces]), found.chosen_B)
                for domain, found in decided.items()
            },
            config.selection.edges,
            folder / "report.png",
        )
        write_chosen(decided, chosen)
        print(summary.table(cells))
        data_file = buckets.join(config.out, chosen.name) if buckets.named(config.out) else chosen
        settings = (f"policy={config.student}", f"data={data_file}")
        words = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
        print(f"python -m vibejax.sft configs/sft_distill.toml {words}")
    return folder


def set_up(config: DistillConfig) -> Setup:
    """Reads what the run starts from, short of weights.

    Raises:
        InputError: a checkpoint is missing, a trace would not fit its context, the mesh does not
            fit, or prompts cannot be used: one is too long, has no ground truth, or is nothing
            that the student can learn to answer.
    """
    student = policy.open_policy(config.student, config.rollout)
    lessons = []
    for name in dict.fromkeys(n for taught in config.domains.values() for n in taught.teachers):
        teacher = policy.open_policy(name, config.rollout)
        for domain, taught in config.domains.items():
            if name in taught.teachers:
                prompts = policy.read_prompts(teacher, taught.prompts, config.rollout)
                place = taught.teachers.index(name) + 1
                lessons.append(Lesson(domain, place, teacher, prompts))
    for lesson in lessons:
        source = resolve(config.domains[lesson.domain].prompts)
        for prompt in lesson.prompts if lesson.place == 1 else ():  # the others have the same
            where = f"{source}:{prompt.index + 1}"
            data.learning_document(taught_record(prompt.record, "1"), student.tokenizer, where)
    models = [student.model, *(lesson.teacher.model for lesson in lessons)]
    return Setup(config, student, lessons, meshes.make(config.mesh, models, config.train))


def decide(setup: Setup, traces: Mapping[str, list[Trace]], path: Path) -> dict[str, Decided]:
    """Scores the traces and chooses among them.

    Args:
        setup: the run's.
        traces: of each domain.
        path: where scores are stored.
    """
    selection = setup.config.selection
    lengths = {domain: np.array([t.length for t in own]) for domain, own in traces.items()}
    long_enough = {
        domain: ~distillation.too_short(
            length_B, min_tokens=selection.min_tokens, quantile=selection.short_quantile
        )
        for domain, length_B in lengths.items()
    }
    places = [(domain, i) for domain in traces for i in np.flatnonzero(long_enough[domain])]
    scores = score_traces(setup, [traces[domain][i] for domain, i in places], path)
    score_of = {domain: np.full(len(own), np.nan) for domain, own in traces.items()}
    for (domain, i), score in zip(places, scores, strict=True):
        score_of[domain][i] = np.nan if score is None else score
    decided = {}
    for domain, own in traces.items():
        score_B = score_of[domain]
        fate_B = np.where(long_enough[domain], Fate.UNFIT, Fate.TOO_SHORT).astype(object)
        bucket_B = distillation.buckets(lengths[domain], selection.edges)
        ranked_B = ~np.isnan(score_B)
        fate_B[ranked_B] = distillation.select(
            score_B[ranked_B],
            bucket_B[ranked_B],
            min_cell=selection.min_cell,
            deviations=selection.deviations,
            low=selection.low,
            high=selection.high,
        )
        decided[domain] = Decided(own, bucket_B, score_B, fate_B)
    if selection.shares and all(found.chosen_B.any() for found in decided.values()):
        mix_domains(decided, selection.shares, setup.config.seed)
    return decided


def mix_domains(decided: Mapping[str, Decided], shares: Mapping[str, float], seed: int) -> None:
    """Makes surplus of what goes beyond a domain's share, drawn at random from all its cells."""
    chosen_D = np.array([found.chosen_B.sum() for found in decided.values()])
    kept_D = distillation.mix(chosen_D, np.array([shares[domain] for domain in decided]))
    for d, found in enumerate(decided.values()):
        order = np.random.default_rng((seed, d)).permutation(np.flatnonzero(found.chosen_B))
        found.fate_B[order[kept_D[d] :]] = Fate.SURPLUS


def write_chosen(decided: Mapping[str, Decided], path: Path) -> None:
    """Writes the chosen traces as records for SFT; the file appears whole or not at all."""
    part = path.with_suffix(".part")
    with part.open("w") as file:
        for found in decided.values():
            for i in np.flatnonzero(found.chosen_B):
                trace = found.traces[i]
                about = {"id": trace.id, "domain": trace.domain, "teacher": trace.teacher}
                about |= {"score": float(found.score_B[i]), "length": trace.length}
                file.write(json.dumps(about | trace.record) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
