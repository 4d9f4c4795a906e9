"""Records as prompts or as demonstrations, and their order.

A prompt record holds `messages` (or `prompt`, text that is encoded as it is), the name of its
`verifier`, its `ground_truth`, and optionally `id`, `domain` and free metadata. Published
benchmarks are read in their own layouts (`benchmarks`).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from vibejax import benchmarks
from vibejax.chat_template import TextError
from vibejax.records import DataError, Record, read_records
from vibejax.tokenizer import Tokenizer
from vibejax.verifiers import worker

REFILL_SEEDS = 1_000_003  # apart, so that runs of neighbouring seeds share no order


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a source.

    Attributes:
        index: place in the source, the prompt's identity for random draws.
        tokens: prompt token ids.
        record: the record, which its verifier reads.
    """

    index: int
    tokens: tuple[int, ...]
    record: Record


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One document to learn from.

    Attributes:
        tokens: [T] int32.
        learnt: [T] bool, True on what the policy is to say; never on the first token.
    """

    tokens: np.ndarray
    learnt: np.ndarray


class Demonstrations(NamedTuple):
    """What a file holds to learn from.

    Attributes:
        documents: in the file's order.
        ends: the tokens that end the last turns of all documents, long ones included.
        dropped: documents left out because they are too long.
        truncated: documents that lost their end.
    """

    documents: list[Demonstration]
    ends: set[int]
    dropped: int
    truncated: int


def read_prompts(
    path: Path,
    tokenizer: Tokenizer,
    *,
    vocab: int,
    max_tokens: int,
    limited_by: str = "rollout.max_prompt_tokens",
) -> list[Prompt]:
    """All prompts of a file, encoded.

    Args:
        path: of the file.
        tokenizer: the policy's.
        vocab: ids below it are known to the model.
        max_tokens: of one prompt.
        limited_by: that bound's name, for messages.

    Raises:
        DataError: a record is of no known layout, lacks a field or has a prompt of more than
            `max_tokens` tokens, or one with a token that the model does not know.
    """
    prompts = []
    for number, row in read_records(path):
        where = f"{path}:{number}"
        try:
            record = benchmarks.prompt_record(row)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        tokens = encode_prompt(record, tokenizer, where)
        if not tokens:
            raise DataError(f"{where}: the prompt is empty")
        require_known(tokens, tokenizer, vocab, where)
        if len(tokens) > max_tokens:
            raise DataError(
                f"{where}: the prompt has {len(tokens)} tokens, more than the {max_tokens} of "
                f"{limited_by}"
            )
        prompts.append(Prompt(len(prompts), tuple(tokens), record))
    return prompts


def require_known(ids: Sequence[int], tokenizer: Tokenizer, vocab: int, where: str) -> None:
    """Checks that a model has an embedding of each token; a tokenizer may have got more of them.

    Raises:
        DataError: it has not.
    """
    if max(ids) >= vocab:
        text = tokenizer.decode([max(ids)], skip_special_tokens=False)
        raise DataError(
            f"{where}: the tokenizer's {text!r} is token {max(ids)}, the model knows those below "
            f"{vocab}"
        )


def require_ground_truth(prompts: list[Prompt], path: Path) -> None:
    """Checks that every prompt can be verified.

    Raises:
        DataError: a record names no verifier, or none that there is, or has nothing to verify
            against.
    """
    for number, prompt in enumerate(prompts, start=1):
        if "verifier" not in prompt.record:
            raise DataError(f"{path}:{number}: has no 'verifier'")
        if not benchmarks.TRUTHS & prompt.record.keys():
            raise DataError(f"{path}:{number}: has no 'ground_truth'")
        try:
            worker.names(prompt.record)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from None


def encode_prompt(record: Record, tokenizer: Tokenizer, where: str) -> list[int]:
    """Token ids of a record's `messages` (through the chat template) or `prompt` (as it is).

    Of a demonstration, whose messages end with the assistant's turn, what comes before that is
    the prompt.

    Raises:
        DataError: the record has neither, or in a form that cannot be used.
    """
    try:
        if "messages" in record:
            messages = benchmarks.asked(record)["messages"]
            _require_chat(messages, where)
            return tokenizer.encode_chat(messages)
        if isinstance(record.get("prompt"), str):
            return tokenizer.encode(record["prompt"])
    except TextError as error:
        raise DataError(f"{where}: {error}") from None
    raise DataError(f"{where}: has neither 'messages' nor a 'prompt' text")


def encode_conversation(messages: Any, tokenizer: Tokenizer, where: str) -> list[int]:
    """Token ids of a finished conversation, at least one.

    Raises:
        DataError: it is no list of messages, or the chat template refuses them.
    """
    _require_chat(messages, where)
    try:
        ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    except TextError as error:
        raise DataError(f"{where}: {error}") from None
    if not ids:
        raise DataError(f"{where}: the chat template makes nothing of the messages")
    return ids


def _require_chat(messages: Any, where: str) -> None:
    texts = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not texts or not messages:
        raise DataError(f"{where}: messages must be a list of {{role, content}} texts")


def order(count: int, seed: int) -> grain.MapDataset:
    """An endless order of `count` records in which every pass is a shuffle of its own.

    Item i is a pure function of (count, seed, i), so a resumed run continues where it stopped.
    """
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def step_indices(count: int, seed: int, step: int, per_step: int) -> list[int]:
    """The records of one optimizer step."""
    indices = order(count, seed)
    return [int(indices[i]) for i in range(step * per_step, (step + 1) * per_step)]


def step_prompts(
    prompts: Sequence[Prompt], seed: int, step: int, count: int, refill: int = 0
) -> list[Prompt]:
    """The prompts of a step (from 1), or those that a refill of its groups may take.

    All are different, as the same prompt would get the same draws: what the end of one pass and
    the beginning of the next have in common is taken once, and what comes next fills up.

    Args:
        prompts: all there are, at least `count`.
        seed: of the run.
        step: of the run.
        count: prompts of it.
        refill: 0: the step's own.
    """
    # Each refill has an order of its own, so that a step's prompts do not depend on refills.
    indices = order(len(prompts), seed + REFILL_SEEDS * refill)
    chosen: dict[int, None] = {}
    for place in itertools.count((step - 1) * count):
        if len(chosen) == count:
            break
        chosen.setdefault(int(indices[place]))
    return [prompts[i] for i in chosen]


def easiest(prompts: Sequence[Prompt], share: float, *, at_least: int) -> list[Prompt]:
    """The share of the prompts that has the highest `accuracy` in its records.

    Raises:
        DataError: a record has no accuracy between 0 and 1.
    """
    for number, prompt in enumerate(prompts, start=1):
        accuracy = prompt.record.get("accuracy")
        if not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
            raise DataError(
                f"prompt {number}: a curriculum needs its 'accuracy' between 0 and 1 (curate with "
                f"rollouts.keep = 'mixed' writes it), not {accuracy!r}"
            )
    ordered = sorted(prompts, key=lambda prompt: -prompt.record["accuracy"])
    return ordered[: max(at_least, math.ceil(min(share, 1.0) * len(ordered)))]


def read_demonstrations(
    path: Path,
    tokenizer: Tokenizer,
    *,
    vocab: int,
    max_tokens: int,
    limited_by: str,
    longer: Literal["error", "drop", "truncate"],
) -> Demonstrations:
    """All demonstrations of a file, encoded.

    Args:
        path: JSONL or parquet of records as `learning_document` reads them.
        tokenizer: the policy's.
        vocab: ids below it are known to the model.
        max_tokens: of one document.
        limited_by: the configuration's name for that bound, for messages.
        longer: what becomes of a longer one: it is an error, is left out, or loses its end.

    Raises:
        DataError: a record cannot be learnt from, is too long, has a token that the model does not
            know, or none is left.
    """
    documents, ends, dropped, truncated = [], set(), 0, 0
    for number, record in read_records(path):
        document = learning_document(record, tokenizer, f"{path}:{number}")
        count = len(document.tokens)
        require_known(document.tokens, tokenizer, vocab, f"{path}:{number}")
        if count > max_tokens and longer == "error":
            raise DataError(
                f"{path}:{number}: has {count} tokens, more than {limited_by} = {max_tokens}; "
                "long_documents = 'drop' leaves such out, 'truncate' cuts them"
            )
        ends.add(int(document.tokens[-1]))
        if count > max_tokens:
            document = Demonstration(document.tokens[:max_tokens], document.learnt[:max_tokens])
            if longer == "drop" or not document.learnt.any():
                dropped += 1
                continue
            truncated += 1
        documents.append(document)
    if not documents:
        raise DataError(
            f"{path}: no document is left: all have more than {limited_by} = {max_tokens} tokens"
        )
    return Demonstrations(documents, ends, dropped, truncated)


def learning_document(record: Record, tokenizer: Tokenizer, where: str) -> Demonstration:
    """The tokens of a demonstration, and which of them are learnt.

    A record holds `messages`, of which the assistant's are learnt with the token that ends them
    (those with `weight` 0 apart), or `prompt` and `completion`, two texts that are encoded as they
    are; the completion is learnt and ends with the tokenizer's first stop token.

    Raises:
        DataError: the record has neither form, or nothing to learn in it.
    """
    try:
        tokens, learnt = _learnt_tokens(record, tokenizer, where)
    except TextError as error:
        raise DataError(f"{where}: {error}") from None
    learnt[0] = False  # nothing comes before it that could predict it
    return Demonstration(np.asarray(tokens, np.int32), np.asarray(learnt, bool))


def _learnt_tokens(
    record: Record, tokenizer: Tokenizer, where: str
) -> tuple[list[int], list[bool]]:
    if "messages" in record:
        _check_conversation(record["messages"], where)
        tokens, owners = tokenizer.encode_turns(record["messages"])
        left_out = {i for i, m in enumerate(record["messages"]) if m.get("weight") == 0}
        return tokens, [owner >= 0 and owner not in left_out for owner in owners]
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        if not record["completion"]:
            raise DataError(f"{where}: the completion is empty")
        prompt = tokenizer.encode(record["prompt"])
        # no BOS amid the document
        ids = tokenizer.encode(record["completion"], add_special_tokens=False)
        tokens = [*prompt, *ids, tokenizer.eos_ids[0]]
        return tokens, [i >= len(prompt) for i in range(len(tokens))]
    raise DataError(f"{where}: has neither 'messages' nor 'prompt' and 'completion' texts")


def _check_conversation(messages: Any, where: str) -> None:
    """Raises DataError, with the message's place, unless an assistant's turn can be learnt."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of {{role, content}} texts")
    for i, message in enumerate(messages):
        at = f"{where}: messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{at} has no 'role'")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{at}, of role {message['role']!r}, has no 'content' text")
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError(f"{at}: the assistant's turn is empty")
        if message.get("weight") not in (None, 0, 1):
            raise DataError(f"{at}: weight = {message['weight']!r} must be 0 or 1")
    turns = [message for message in messages if message["role"] == "assistant"]
    if not turns:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise DataError(f"{where}: has no message of role 'assistant' to learn from, only {roles}")
    if all(message.get("weight") == 0 for message in turns):
        raise DataError(f"{where}: all the assistant's turns have weight 0")
    if messages[0]["role"] == "assistant":
        raise DataError(f"{where}: messages[0]: nothing comes before the assistant's turn")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: messages must end with one of role 'assistant'")
