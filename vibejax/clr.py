"""Claim-level reliability at test time: `python -m vibejax.clr CONFIG [--set key=value ...]`.

Of each prompt K completions are sampled and verified. The model that wrote one then lists the M
claims that its answer rests on and, in a chat of its own for each claim, tries to prove it false.
The completion's reliability r is the share of claims that withstood, to the power of M; the answer
with the largest sum of r wins (reliability.py). All of it is repeated with draws of its own, and
the results are means over the repeats, beside maj@K and avg@K of the same completions.

A completion without an answer is asked for no claims and votes for nothing. Where a question would
not fit the context, the middle of the completion is left out of it.

The run folder gets, a repeat, completions-R.jsonl, claims-R.jsonl and verdicts-R.jsonl with every
text, which a resumed run does not sample again; clr.jsonl with the vote on each prompt; and
results.json. The table is printed.

Source: VibeThinker-3B technical report, section 3.1, claim-level reliability, equations 5 and 6.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vibejax import (
    clr_questions,
    clr_results,
    config_file,
    meshes,
    policy,
    programs,
    run_folder,
)
from vibejax.clr_questions import Questions
from vibejax.clr_results import Examined
from vibejax.config.clr import ClrConfig, ReplyConfig
from vibejax.config_file import errors_in_one_line, parse_args
from vibejax.data import Prompt, Record
from vibejax.decode import Sampling
from vibejax.engine import Engine
from vibejax.locations import resolve
from vibejax.policy import Answers, Policy
from vibejax.replies import Place, Question, fitting, replies
from vibejax.run_folder import Log, RunError
from vibejax.safetensors_folder import write_json
from vibejax.verifiers import worker
from vibejax.verifiers.pool import Pool, VerifierFailure
from vibejax.votes import equal_answers

CHANGEABLE = ("repeats",)  # fields in which a resumed run may differ
EXTRACTION, CHECKING = 1, 2  # the "steps" of the engine's draws; completions have 0
ANSWERING = (
    "math",
    "math_judge",
    "choice",
)  # verifiers that say what is answered


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be answered, by whom, and what is asked about the answers."""

    policy: Policy
    prompts: list[Prompt]
    questions: Questions


def main() -> None:
    """Runs the stage that the command line configures."""
    config = parse_args(ClrConfig, doc=__doc__)
    with errors_in_one_line(VerifierFailure, OSError):
        run(config)


def run(config: ClrConfig, open_pool: Callable[..., Pool] = Pool) -> Path:
    """Samples what is not there yet, votes, and returns the run folder.

    Args:
        config: the stage's configuration.
        open_pool: makes the verifier pool.

    Raises:
        InputError: something the user gave cannot be used; nothing was sampled then.
    """
    run_folder.check_run(config, CHANGEABLE)
    programs.prepare()
    task = read_task(config)
    mesh = meshes.make(config.mesh, [task.policy.model])
    folder = run_folder.open_run(config, "clr", CHANGEABLE)
    longest = config.sequence_tokens - config.rollout.max_completion_tokens
    sizes = config.rollout.model_copy(update={"max_prompt_tokens": longest})  # questions included
    load = functools.cache(lambda: policy.load_engine(task.policy, sizes, config.dtype, mesh))
    with run_folder.kept(config, folder):
        policy.claim(folder, task.policy, policy.judge_of(task.prompts))
        log = Log(folder / "clr.jsonl", 0)
        with open_pool(**config.verifiers.pool_arguments()) as pool, jax.set_mesh(mesh):
            for repeat in range(1, config.repeats + 1):
                for row in votes(task, config, load, pool, folder, repeat):
                    log.append(row)
        log.close()
        found = clr_results.results(log.rows, claims=config.claims, repeats=config.repeats)
        write_json(folder / "results.json", {"policy": config.policy, **found})
    print(clr_results.table(found))
    return folder


def read_task(config: ClrConfig) -> Task:
    """What is needed short of the weights.

    Raises:
        InputError: the checkpoint, the prompts or the questions cannot be used: one is missing or
            malformed, a prompt has no final answer, or something would not fit the context.
    """
    opened = policy.open_policy(config.policy, config.rollout)
    if config.sequence_tokens > opened.model.context:
        raise RunError(
            f"context = {config.context} is more than the {opened.model.context} positions of "
            f"{config.policy}"
        )
    prompts = policy.read_prompts(opened, config.prompts, config.rollout)
    questions = config_file.load(Questions, resolve(config.questions))
    for number, prompt in enumerate(prompts, start=1):
        where = f"{resolve(config.prompts)}:{number}"
        names = worker.names(prompt.record)
        if len(names) != 1 or names[0] not in ANSWERING:
            raise RunError(
                f"{where}: verifier = {prompt.record['verifier']!r} gives no answer to vote on; "
                f"must be one of {', '.join(ANSWERING)}"
            )
        problem = problem_of(prompt.record)
        for name, chat in (
            ("extraction", clr_questions.ask_for_claims(questions, problem, "", config.claims)),
            ("checking", clr_questions.ask_for_verdict(questions, problem, "")),
        ):
            tokens = len(opened.tokenizer.encode_chat(chat, control_in_content=False))
            reply = getattr(config, name).max_tokens
            if tokens + reply > config.sequence_tokens:
                raise RunError(
                    f"{where}: a question has {tokens} tokens without what it is about, which with "
                    f"{name}.max_tokens = {reply} is more than context = {config.sequence_tokens}"
                )
    return Task(opened, prompts, questions)


def problem_of(record: Record) -> str:
    """A record's prompt as text: its messages but the system's, each with its role if several."""
    if "messages" not in record:
        return record["prompt"]
    messages = [m for m in record["messages"] if m["role"] != "system"]
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"[{m['role']}] {m['content']}" for m in messages)


def votes(
    task: Task,
    config: ClrConfig,
    load: Callable[[], Engine],
    pool: Pool,
    folder: Path,
    repeat: int,
) -> list[dict[str, Any]]:
    """One time the whole flow: a row of clr.jsonl for each prompt.

    Args:
        task: prompts, policy and questions.
        config: the stage's configuration.
        load: makes the engine; called only where something is to be sampled.
        pool: the verifiers.
        folder: where texts are stored, and found again.
        repeat: which time, from 1.
    """
    start = time.perf_counter()

    def say(what: str) -> None:
        seconds = time.perf_counter() - start
        print(f"repeat {repeat} of {config.repeats}: {what} after {seconds:.0f} s", file=sys.stderr)

    # Runs of neighbouring seeds must not share draws, as they would with seed + repeat.
    seed = int(np.random.SeedSequence([config.seed, repeat]).generate_state(1)[0])
    answered = policy.answers(
        task.policy,
        load,
        task.prompts,
        pool,
        config.rollout,
        folder / f"completions-{repeat}.jsonl",
        samples=config.samples,
        seed=seed,
    )
    say(f"{len(answered)} prompts answered")

    def ask(questions: Sequence[Question], how: ReplyConfig, file: str, step: int):
        sampling = Sampling(
            temperature=how.temperature,
            top_p=how.top_p,
            eos_ids=task.policy.tokenizer.eos_ids,
            loop_tokens=config.rollout.loop_tokens,
        )
        return replies(
            load,
            task.policy.tokenizer,
            questions,
            sampling,
            folder / f"{file}-{repeat}.jsonl",
            max_tokens=how.max_tokens,
            seed=seed,
            step=step,
        )

    listed = ask(claim_questions(task, config, answered), config.extraction, "claims", EXTRACTION)
    claims = {
        place: clr_questions.read_claims(reply["text"], config.claims, complete=_complete(reply))
        for place, reply in listed.items()
    }
    say(f"{len(listed)} completions asked for claims")
    judged = ask(verdict_questions(task, config, claims), config.checking, "verdicts", CHECKING)
    say(f"{len(judged)} claims checked")
    equal = functools.partial(equal_answers, pool)
    rows = []
    for n, (prompt, completions) in enumerate(answered):
        found = [examined((n, k), listed, claims, judged) for k in range(len(completions))]
        about = {
            "repeat": repeat,
            "prompt": n,
            "id": prompt.record.get("id"),
            "ground_truth": prompt.record["ground_truth"],
        }
        rows.append(about | clr_results.vote(completions, found, config.claims, equal))
    return rows


def claim_questions(task: Task, config: ClrConfig, answered: Sequence[Answers]) -> list[Question]:
    """What each completion that gives an answer is asked; its place is (prompt, completion)."""
    limit = config.sequence_tokens - config.extraction.max_tokens
    questions = []
    for n, (prompt, completions) in enumerate(answered):
        problem = problem_of(prompt.record)

        def chat(text: str, problem: str = problem):
            return clr_questions.ask_for_claims(task.questions, problem, text, config.claims)

        for k, completion in enumerate(completions):
            if completion["answer"]:
                tokens = fitting(task.policy.tokenizer, chat, completion["text"], limit)
                questions.append(Question((n, k), n * config.samples + k, tokens))
    return questions


def verdict_questions(
    task: Task, config: ClrConfig, claims: Mapping[Place, Sequence[str]]
) -> list[Question]:
    """What is asked about each claim; its place is (prompt, completion, claim)."""
    limit = config.sequence_tokens - config.checking.max_tokens
    questions = []
    for (n, k), texts in claims.items():
        problem = problem_of(task.prompts[n].record)

        def chat(text: str, problem: str = problem):
            return clr_questions.ask_for_verdict(task.questions, problem, text)

        for m, claim in enumerate(texts):
            number = (n * config.samples + k) * config.claims + m
            tokens = fitting(task.policy.tokenizer, chat, claim, limit)
            questions.append(Question((n, k, m), number, tokens))
    return questions


def examined(
    place: Place,
    listed: Mapping[Place, Mapping[str, Any]],
    claims: Mapping[Place, Sequence[str]],
    judged: Mapping[Place, Mapping[str, Any]],
) -> Examined:
    """What the replies about one completion say.

    Args:
        place: the completion's.
        listed: the replies with claims.
        claims: what was read from them.
        judged: the replies with verdicts.
    """
    if place not in listed:  # it gives no answer
        return Examined()
    verdicts = [judged[*place, m] for m in range(len(claims[place]))]
    return Examined(
        claims=claims[place],
        holds=[
            clr_questions.read_verdict(reply["text"], complete=_complete(reply))
            for reply in verdicts
        ],
        claims_tokens=listed[place]["length"],
        verdicts_tokens=sum(reply["length"] for reply in verdicts),
    )


def _complete(reply: Mapping[str, Any]) -> bool:
    return reply["stop"] == "stop"


if __name__ == "__main__":
    main()
