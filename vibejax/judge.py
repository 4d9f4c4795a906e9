"""A local checkpoint as judge: `python -m vibejax.judge MODEL FILE.jsonl --out F`.

The same as `python -m vibejax.verifiers FILE.jsonl --out F`, with MODEL (an HF folder, a GGUF file
or a run folder) scoring what asks for `rubric` in place of an endpoint. It is loaded once and all
judgements are sampled greedily in batches; what is asked, how an answer is read and how scores
are combined is `verifiers.rubric`'s in either case.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vibejax import programs, qwen2, sampler_copy, tokenizer, weights
from vibejax.completions import EngineConfig, Request
from vibejax.config_file import errors_in_one_line
from vibejax.decode import Sampling
from vibejax.engine import Engine, engine_mesh
from vibejax.verifiers import Verdict, rubric
from vibejax.verifiers import __main__ as verifiers_command

SLOTS = 16  # judgements sampled at one time
MAX_TOKENS = 512  # of a judgement, unless the settings of `rubric` say otherwise


def main() -> int:
    """Runs the command line; returns its exit status."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
    model = sys.argv[1]
    with errors_in_one_line():
        weights.locate(model)  # before anything is verified
        return verifiers_command.main(sys.argv[2:], functools.partial(judge, model))


def judge(
    model: str, items: Sequence[tuple[Mapping[str, Any], str]], settings: Mapping[str, Any]
) -> list[Verdict]:
    """Scores completions with a checkpoint.

    Args:
        model: HF folder, GGUF file or run folder of the judge.
        items: (record, completion) pairs, as `rubric.verify` takes them.
        settings: keyword arguments of `rubric.verify`.

    Returns:
        A verdict each, `unscored` where the judge's answer breaks the schema, where the text to
        be judged does not fit its context, or where there is no request to judge by.

    Raises:
        InputError: the checkpoint cannot be used.
        ValueError: a setting is out of range.
    """
    path = weights.locate(model)
    config, tokens = weights.load_config(path), tokenizer.load(path)
    max_tokens = settings.get("max_tokens", MAX_TOKENS)
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError(f"rubric.max_tokens = {max_tokens!r}: must be a whole number of 1 or more")
    max_chars = {k: settings[k] for k in ("max_chars",) if k in settings}
    requests, troubles = [], {}
    for n, (record, completion) in enumerate(items):
        try:
            messages = rubric.judge_messages(record, completion, **max_chars)
            if messages is None:
                continue
            # What is judged is a stranger's text: it must not open a turn of its own.
            ids = tokens.encode_chat(messages, control_in_content=False)
        except ValueError as error:  # a TextError among them
            troubles[n] = str(error)
            continue
        if len(ids) + max_tokens <= config.context:
            requests.append(Request(n, tuple(ids), max_tokens))
        else:
            troubles[n] = f"{len(ids)} tokens and {max_tokens} of answer pass its {config.context}"
    answers = dict(_answers(path, config, tokens, requests)) if requests else {}

    return [
        rubric.unscored(troubles[n])
        if n in troubles
        else rubric.verify(record, completion, judge=lambda _, n=n: answers[n], **settings)
        for n, (record, completion) in enumerate(items)
    ]


def _answers(path, config, tokens, requests):
    """(index of the item, text of the judgement), as they come."""
    programs.prepare()
    dtype = jnp.dtype(qwen2.default_dtype())
    devices = jax.local_devices()
    mesh = engine_mesh(config, 1, devices)
    params = sampler_copy.make(weights.load_params(path, config, mesh, dtype), config, dtype, mesh)
    slots = -(-min(SLOTS, len(requests)) // len(devices)) * len(devices)
    longest = max(len(r.tokens) + r.max_tokens for r in requests)
    engine = Engine(params, EngineConfig(model=config, slots=slots, context=longest), devices)
    how = Sampling(temperature=0.0, eos_ids=tokens.eos_ids)
    for completion in engine.generate(requests, how):
        yield requests[completion.request].prompt, tokens.decode(completion.text_ids)


if __name__ == "__main__":
    sys.exit(main())
