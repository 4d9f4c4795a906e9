"""What teachers complete, and those completions that are traces: whole, accepted, said once."""

import collections
import dataclasses
import enum
import functools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vibejax import digests, policy
from vibejax.checkpoint_reader import checksums
from vibejax.config.distill import DistillConfig
from vibejax.data import Prompt, Record
from vibejax.losses import distillation
from vibejax.policy import Answers, Policy
from vibejax.verifiers import Outcome
from vibejax.verifiers.pool import Pool


class Rejection(enum.StrEnum):
    """Why a completion is no trace, in the order in which it is decided."""

    TRUNCATED = "truncated"  # no stop token ended it
    UNVERIFIED = "unverified"  # the verifier could not say
    WRONG = "wrong"
    CONTROL = "control"  # its text writes a control token, which would open or end a turn
    DUPLICATE = "duplicate"  # the prompt has a trace of this text


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What one teacher is asked of one domain.

    Attributes:
        domain: its name.
        place: the teacher's among those of the domain, from 1.
        teacher: the checkpoint.
        prompts: in its tokens.
    """

    domain: str
    place: int
    teacher: Policy
    prompts: list[Prompt]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays the same over a run; the lessons of a teacher stand together."""

    config: DistillConfig
    student: Policy
    lessons: list[Lesson]
    mesh: jax.sharding.Mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """An accepted completion.

    Attributes:
        id: domain, place of the teacher in it, line of the prompt, sample; from 1.
        domain: its name.
        teacher: as the user named it.
        length: tokens that the teacher wrote, stop token included.
        record: prompt and completion, as SFT reads them.
    """

    id: str
    domain: str
    teacher: str
    length: int
    record: Record


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What came of all lessons.

    Attributes:
        traces: of each domain, in an order that a resumed run repeats.
        rejected: (domain, length bucket, why) -> completions that are no traces.
    """

    traces: dict[str, list[Trace]]
    rejected: collections.Counter[tuple[str, int, Rejection]]


def taught_record(record: Record, text: str) -> Record:
    """A prompt's record and a completion of it as SFT reads them; only the completion is learnt."""
    if "messages" not in record:
        return {"prompt": record["prompt"], "completion": text}
    before = [m | {"weight": 0} if m["role"] == "assistant" else m for m in record["messages"]]
    return {"messages": [*before, {"role": "assistant", "content": text}]}


def sample_traces(setup: Setup, pool: Pool, folder: Path) -> Sampled:
    """Samples what `folder` does not hold yet, and rejects what is no trace.

    Raises:
        RunError: a teacher's logits are not numbers.
    """
    added = setup.student.tokenizer.backend.get_added_tokens_decoder().values()
    control = [token.content for token in added if token.special]
    edges = setup.config.selection.edges
    sampled = Sampled({domain: [] for domain in setup.config.domains}, collections.Counter())
    seen: set[tuple[str, int, str]] = set()
    start = time.perf_counter()
    for lesson, answers in _answered(setup, pool, folder):
        domain, teacher = lesson.domain, lesson.teacher.name
        for prompt, g, completion in _flat(answers):
            key = (domain, prompt.index, completion["text"])
            rejected = rejection(completion, control) or (
                Rejection.DUPLICATE if key in seen else None
            )
            if rejected:
                bucket = int(distillation.buckets([completion["length"]], edges)[0])
                sampled.rejected[domain, bucket, rejected] += 1
                continue
            seen.add(key)
            trace = Trace(
                id=f"{domain}-{lesson.place}-{prompt.index + 1}-{g}",
                domain=domain,
                teacher=teacher,
                length=completion["length"],
                record=taught_record(prompt.record, completion["text"]),
            )
            sampled.traces[domain].append(trace)
        seconds = time.perf_counter() - start
        print(f"{teacher}: {domain} sampled after {seconds:.0f} s", file=sys.stderr)
    return sampled


def rejection(completion: Mapping[str, Any], control: Sequence[str]) -> Rejection | None:
    """Why a completion by itself is no trace, None if it is one.

    Args:
        completion: as `policy.answers` stores it.
        control: the texts of the student's control tokens.
    """
    if completion["stop"] != "stop":
        return Rejection.TRUNCATED
    if not completion["correct"]:
        decided = completion["outcome"] in (Outcome.WRONG, Outcome.NO_ANSWER)
        return Rejection.WRONG if decided else Rejection.UNVERIFIED
    if any(name in completion["text"] for name in control):
        return Rejection.CONTROL
    return None


def fingerprint(checkpoint: Policy) -> str:
    """A hash of the weights, the configuration, the tokenizer and the chat template."""
    return digest(checksums(checkpoint.path))


def digest(value: Any) -> str:
    """A hash of plain data."""
    text = json.dumps(value, sort_keys=True, default=str)
    return digests.of_text(text)


def _flat(answers: list[Answers]) -> Iterator[tuple[Prompt, int, dict[str, Any]]]:
    """Each completion with its prompt and its place in the group, from 1."""
    for prompt, completions in answers:
        for g, completion in enumerate(completions, start=1):
            yield prompt, g, completion


def _answered(setup: Setup, pool: Pool, folder: Path) -> Iterator[tuple[Lesson, list[Answers]]]:
    """The completions of all lessons, with one teacher's weights in memory at a time."""
    for name in dict.fromkeys(lesson.teacher.name for lesson in setup.lessons):
        lessons = [lesson for lesson in setup.lessons if lesson.teacher.name == name]
        yield from _answers_of(lessons, setup, pool, folder)


def _answers_of(
    lessons: list[Lesson], setup: Setup, pool: Pool, folder: Path
) -> Iterator[tuple[Lesson, list[Answers]]]:
    """The completions of one teacher."""
    config, teacher = setup.config, lessons[0].teacher
    held = fingerprint(teacher)[:16]  # another checkpoint writes another file

    @functools.cache
    def load():
        return policy.load_engine(teacher, config.rollout, config.train.dtype, setup.mesh)

    for lesson in lessons:
        answers = policy.answers(
            teacher,
            load,
            lesson.prompts,
            pool,
            config.rollout,
            folder / f"{lesson.domain}-{held}.jsonl",
            samples=config.samples,
            seed=config.seed,
        )
        yield lesson, answers
