"""What a model replies to chats about strangers' texts, stored and taken up again."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vibejax.completions import Request
from vibejax.decode import Sampling
from vibejax.engine import Engine
from vibejax.run_folder import Log, RunError
from vibejax.tokenizer import Message, Tokenizer

Place = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """One chat that the model is to reply to.

    Attributes:
        place: what it is about: numbers by which its reply is found.
        number: its identity among all of its kind, for the random draws.
        tokens: of the chat.
    """

    place: Place
    number: int
    tokens: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Of the tokens."""
        return hashlib.sha256(np.asarray(self.tokens, np.int32).tobytes()).hexdigest()


def fitting(
    tokenizer: Tokenizer, ask: Callable[[str], Sequence[Message]], text: str, limit: int
) -> tuple[int, ...]:
    """The tokens of a chat about `text`, of which the middle is left out where it is too long.

    A quarter of what is kept is the beginning, the rest the end, where conclusions stand. The text
    is a stranger's: it cannot open a turn of its own.

    Args:
        tokenizer: of the model.
        ask: makes the chat; the one about an empty text must fit.
        text: what it is about.
        limit: tokens of the chat.
    """
    kept = len(text)
    while True:
        chat = ask(_shortened(text, kept))
        tokens = tokenizer.encode_chat(chat, control_in_content=False)
        if len(tokens) <= limit or not kept:
            return tuple(tokens)
        kept = kept * 9 * limit // (10 * len(tokens))  # a tenth less: tokens differ in length


def _shortened(text: str, kept: int) -> str:
    if kept in (0, len(text)):
        return text[:kept]
    head = kept // 4
    left_out = len(text) - kept
    return f"{text[:head]}\n[... {left_out} characters left out ...]\n{text[head + left_out :]}"


def replies(
    load: Callable[[], Engine],
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    how: Sampling,
    path: Path,
    *,
    max_tokens: int,
    seed: int,
    step: int,
) -> dict[Place, dict[str, Any]]:
    """The replies to questions, each stored once it is there.

    A reply is a function of (weights, seed, step, question), so what `path` holds of an earlier
    run is taken from there, unless the question has changed since.

    Args:
        load: makes the engine; called only where something is to be sampled.
        tokenizer: of the model.
        questions: what is asked.
        how: the distribution.
        path: JSONL, a line a reply: the `place` and `question_sha256` of its question, its
            `text`, `length` in tokens and `stop`.
        max_tokens: of the longest reply.
        seed: of sampling.
        step: sets draws of one kind apart from those of others.

    Returns:
        The lines by the places of their questions.

    Raises:
        RunError: the logits are not numbers.
    """
    log = Log(path)
    found = {(tuple(row["place"]), row["question_sha256"]): row for row in log.rows}
    keys = [(question.place, question.sha256) for question in questions]
    missing = [n for n, key in enumerate(keys) if key not in found]
    if missing:
        requests = [Request(questions[n].number, questions[n].tokens, max_tokens) for n in missing]
        for completion in load().generate(requests, how, seed=seed, step=step):
            if completion.stop == "not_finite":
                raise RunError(f"{path}: the model's logits are not numbers")
            place, digest = keys[missing[completion.request]]
            row = {
                "place": list(place),
                "question_sha256": digest,
                "text": tokenizer.decode(completion.text_ids),
                "length": len(completion.tokens),
                "stop": completion.stop,
            }
            found[place, digest] = row
            log.append(row)
    log.close()
    return {key[0]: found[key] for key in keys}
