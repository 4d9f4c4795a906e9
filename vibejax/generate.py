"""Completions from a model: `python -m vibejax.generate MODEL --prompt TEXT`.

MODEL is an HF folder, a GGUF file or a run folder. A text is a user's message in the model's
chat template unless --raw is given. With --prompts, records with `messages` or `prompt` are
completed, and each comes out as itself plus `completions`: a list of `text`, `tokens`,
`logprobs` and `stop`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp

from vibejax import buckets, data, programs, qwen2, sampler_copy, tokenizer, weights
from vibejax.checkpoint_reader import checksums
from vibejax.completions import Completion, EngineConfig, Request
from vibejax.config_file import InputError, errors_in_one_line
from vibejax.decode import Sampling
from vibejax.engine import Engine, engine_mesh
from vibejax.locations import resolve

RECORDS_AT_ONCE = 256


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="one prompt; the completion is printed")
    given.add_argument("--prompts", metavar="F.jsonl", help="records to complete")
    parser.add_argument("--out", help="where records go; default: standard output")
    parser.add_argument("--resume", action="store_true",
                        help="go on behind what the same command has written to --out")  # fmt: skip
    parser.add_argument("--raw", action="store_true", help="encode TEXT as it is, without a chat")
    parser.add_argument("--samples", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--max-tokens", type=int, default=None,
                        help="longest completion; default: at most 512")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=1.0, help="0 decodes greedily")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all")
    parser.add_argument("--min-tokens", type=int, default=0, help="none stops before so many")
    parser.add_argument("--loop-tokens", type=int, default=0,
                        help="end what repeats itself for so many tokens; 0: never")  # fmt: skip
    parser.add_argument("--slots", type=int, default=32, help="completions decoded at one time")
    parser.add_argument("--kv-dtype", choices=("compute", "int8"), default="compute",
                        help="of cached keys and values")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None,
                        help="default: bfloat16 on accelerators, float32 on CPU")  # fmt: skip
    with errors_in_one_line(OSError):
        run(parser.parse_args(arguments))


def run(args: argparse.Namespace) -> None:
    """Loads the model and completes what `args` asks for.

    Raises:
        InputError: an argument, the model or a record cannot be used.
    """
    for name, holds, rule in (
        ("samples", args.samples >= 1, "at least 1"),
        ("max-tokens", args.max_tokens is None or args.max_tokens >= 1, "at least 1"),
        ("temperature", args.temperature >= 0, "at least 0"),
        ("top-p", 0 < args.top_p <= 1, "in (0, 1]"),
        ("top-k", args.top_k >= 0, "at least 0"),
        ("min-tokens", args.min_tokens >= 0, "at least 0"),
        ("loop-tokens", args.loop_tokens >= 0, "at least 0"),
        ("slots", args.slots >= 1, "at least 1"),
        ("seed", 0 <= args.seed < 2**32, "at least 0 and below 2**32"),
    ):
        if not holds:
            value = getattr(args, name.replace("-", "_"))
            raise InputError(f"--{name} {value}: must be {rule}")
    if args.raw and args.prompts is not None:
        raise InputError("--raw: is for --prompt; records say `prompt` or `messages`")
    if args.out is not None and args.prompt is not None:
        raise InputError("--out: is for --prompts; the completion of --prompt is printed")
    if args.out is not None and Path(args.out).resolve() == Path(args.prompts).resolve():
        raise InputError(f"--out {args.out}: is the file of the prompts")
    if args.out is not None and not args.resume and _holds_something(Path(args.out)):
        raise InputError(f"--out {args.out}: exists; name another file, or go on with --resume")
    programs.prepare()
    path = weights.locate(args.model)
    model = weights.load_config(path)
    tokens = tokenizer.load(path)
    args.max_tokens = args.max_tokens or min(512, -(-model.context // 2))
    dtype = jnp.dtype(args.dtype or qwen2.default_dtype())
    settings = _settings(args, path, dtype) if args.out is not None else {}
    requests, records = _requests(args, tokens, model)
    if args.resume:
        done = _resumed(args, records, settings)
        requests, records = requests[done:], records[done:]
        if not requests:
            return
    how = Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        eos_ids=tokens.eos_ids,
        min_tokens=args.min_tokens,
        loop_tokens=args.loop_tokens,
    )
    slots = min(args.slots, args.samples * len(requests))
    devices = jax.local_devices()
    config = EngineConfig(
        model=model,
        slots=-(-slots // len(devices)) * len(devices),
        context=max(len(r.tokens) + r.max_tokens for r in requests),
        kv_dtype=args.kv_dtype,
    )
    mesh = engine_mesh(model, 1, devices)
    params = sampler_copy.make(weights.load_params(path, model, mesh, dtype), model, dtype, mesh)
    engine = Engine(params, config, devices)
    print(engine.memory, file=sys.stderr)
    groups = _groups(engine, requests, how, args.seed)
    if args.prompt is not None:
        for completion in next(groups):
            say(tokens.decode(completion.text_ids))
        return
    with _sink(args, settings) as out:
        for record, group in zip(records, groups, strict=True):
            out.write(json.dumps({**record, "completions": _rows(group, tokens)}) + "\n")
            out.flush()


def say(text: str) -> None:
    """Prints a text; characters that the terminal does not know are spelled out."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _requests(args, tokens, model) -> tuple[list[Request], list[data.Record]]:
    room = model.context - args.max_tokens
    if args.prompts is not None:
        prompts = data.read_prompts(
            resolve(args.prompts),
            tokens,
            vocab=model.vocab,
            max_tokens=room,
            limited_by=f"the context without --max-tokens {args.max_tokens}",
        )
        return [Request(p.index, p.tokens, args.max_tokens, args.samples) for p in prompts], [
            p.record for p in prompts
        ]
    record = {"prompt": args.prompt}
    if not args.raw:
        record = {"messages": [{"role": "user", "content": args.prompt}]}
    ids = data.encode_prompt(record, tokens, "--prompt")
    if not ids:
        raise InputError("--prompt: the prompt is empty")
    data.require_known(ids, tokens, model.vocab, "--prompt")
    if len(ids) > room:
        raise InputError(
            f"--prompt has {len(ids)} tokens; with --max-tokens {args.max_tokens} the model has "
            f"room for {room}"
        )
    return [Request(0, tuple(ids), args.max_tokens, args.samples)], [record]


def _groups(
    engine: Engine, requests: list[Request], how: Sampling, seed: int
) -> Iterator[list[Completion]]:
    """Each request's completions, in the order of the requests.

    Raises:
        InputError: the model's logits are not numbers.
    """
    for start in range(0, len(requests), RECORDS_AT_ONCE):
        part = requests[start : start + RECORDS_AT_ONCE]
        groups: list[dict[int, Completion]] = [{} for _ in part]
        for completion in engine.generate(part, how, seed=seed):
            if completion.stop == "not_finite":
                raise InputError(
                    f"prompt {part[completion.request].prompt + 1}: the model's logits are not "
                    f"numbers after {len(completion.tokens)} tokens"
                )
            groups[completion.request][completion.sample] = completion
        yield from ([group[g] for g in range(len(group))] for group in groups)


def _rows(group: list[Completion], tokens: tokenizer.Tokenizer) -> list[dict[str, Any]]:
    return [
        {
            "text": tokens.decode(c.text_ids),
            "tokens": c.tokens.tolist(),
            "logprobs": c.logprobs.tolist(),
            "stop": c.stop,
        }
        for c in group
    ]


def _sink(args: argparse.Namespace, settings: dict[str, Any]) -> TextIO:
    """Where records go; standard output is closed with the process."""
    if args.out is None:
        return sys.stdout
    path = buckets.on_disk(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.resume and path.exists():
        return path.open("a")
    _settings_file(path).write_text(json.dumps(settings) + "\n")
    return path.open("w")


def _resumed(args: argparse.Namespace, records: list[data.Record], settings: dict[str, Any]) -> int:
    """How many of the records are in --out already; half of a line is cut off.

    Raises:
        InputError: other settings or other records made what is there.
    """
    if args.out is None or args.prompts is None:
        raise InputError("--resume: needs --prompts and --out")
    path = buckets.on_disk(args.out)
    if not path.exists():
        return 0
    beside = _settings_file(path)
    try:
        stored = dict(json.loads(beside.read_text())) if beside.is_file() else {}
    except (TypeError, ValueError):
        raise InputError(f"--resume: {beside} is not a JSON object; start {path} anew") from None
    for name, value in settings.items():
        if stored.get(name) != value:
            raise InputError(
                f"--resume: {path} was written with {name} = {stored.get(name)!r}, not {value!r}"
            )
    done, size = 0, 0
    with path.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if done == len(records) or _read(line) != _asked(records[done]):
                raise InputError(f"--resume: {path}:{done + 1} is of another record of the prompts")
            done, size = done + 1, size + len(line)
        file.truncate(size)
    return done


def _read(line: bytes) -> str | None:
    """What a line of --out was asked; None where it is no line of one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return _asked(record) if isinstance(record, dict) else None


def _asked(record: data.Record) -> str:
    return json.dumps({k: v for k, v in record.items() if k != "completions"}, sort_keys=True)


def _settings(args: argparse.Namespace, path: Path, dtype: jnp.dtype) -> dict[str, Any]:
    """What completions depend on, but for the records."""
    apart = ("model", "prompt", "prompts", "out", "resume", "slots")
    given = {name: value for name, value in vars(args).items() if name not in apart}
    return given | {"dtype": dtype.name, "checkpoint": checksums(path)}


def _holds_something(path: Path) -> bool:
    return path.is_dir() or (path.is_file() and path.stat().st_size > 0)


def _settings_file(path: Path) -> Path:
    return path.with_name(path.name + ".settings.json")


if __name__ == "__main__":
    main()
