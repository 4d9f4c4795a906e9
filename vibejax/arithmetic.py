"""Generated arithmetic: demonstrations and prompts whose answers are known.

    python -m vibejax.arithmetic digits DST    the quickstart's task: three-digit sums
    python -m vibejax.arithmetic chat DST      sums of numbers up to 24 as chat prompts

`digits` writes tokenizer.json, sft.jsonl, train.jsonl and heldout.jsonl. Its demonstrations mix
three ways to write a sum: the bare answer, which is hard to learn; digit by digit with carries,
which is easy; and the latter written twice, which is as right but longer. A policy trained on
them mixes the ways as it samples, which gives reinforcement learning something to amplify.
`chat` writes train.jsonl and heldout.jsonl. No held-out prompt occurs in training or
demonstrations.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

END = "<|end|>"
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
STRINGS = ("\\boxed{", "```python\ndef f(x):\n return ", "\n```")  # of one token each
STYLE_SHARES = {"bare": 0.6, "carries": 0.3, "twice": 0.1}
DIGITS_COUNTS = {"sft": 20_000, "train": 4_096, "heldout": 1_024}
CHAT_COUNTS = {"train": 320, "heldout": 256}
CHAT_LARGEST = 24
CHAT_OPENING = (  # one worked example, without which a small model rambles
    {"role": "system", "content": "You compute."},
    {"role": "user", "content": "2 + 3"},
    {"role": "assistant", "content": "2 + 3 = 5"},
)


def main() -> None:
    """Writes one of the tasks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("digits", "chat"))
    parser.add_argument("folder", type=Path, metavar="DST")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    files = digits_task(args.seed) if args.task == "digits" else chat_task(args.seed)
    for name, records in files.items():
        with (args.folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    if args.task == "digits":
        write_tokenizer(args.folder)


def digits_task(seed: int) -> dict[str, list[dict]]:
    """Demonstrations and prompts of three-digit sums, on disjoint pairs of numbers."""
    rng = random.Random(seed)
    pairs = rng.sample(range(900 * 900), sum(DIGITS_COUNTS.values()))
    numbers = iter([(100 + pair // 900, 100 + pair % 900) for pair in pairs])
    styles = list(STYLE_SHARES)
    demonstrations = []
    for _ in range(DIGITS_COUNTS["sft"]):
        a, b = next(numbers)
        (style,) = rng.choices(styles, STYLE_SHARES.values())
        demonstrations.append({"prompt": f"{a}+{b}=", "completion": solution(a, b, style)})
    return {
        "sft": demonstrations,
        "train": list(_sum_prompts(numbers, DIGITS_COUNTS["train"])),
        "heldout": list(_sum_prompts(numbers, DIGITS_COUNTS["heldout"])),
    }


def _sum_prompts(numbers: Iterator[tuple[int, int]], count: int) -> Iterator[dict]:
    for _ in range(count):
        a, b = next(numbers)
        yield {"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": str(a + b)}


def solution(a: int, b: int, style: str) -> str:
    """The sum a + b written out in one of `STYLE_SHARES`, ending in its boxed answer."""
    times = {"bare": 0, "carries": 1, "twice": 2}[style]
    return " ".join([carries(a, b, places=3)] * times + [f"\\boxed{{{a + b}}}"])


def carries(a: int, b: int, *, places: int) -> str:
    """The steps of a sum of numbers of so many digits, from the last, each with its carry."""
    steps, carry = [], 0
    for place in range(places):
        x, y = a // 10**place % 10, b // 10**place % 10
        steps.append(f"{x}+{y}+{carry}={x + y + carry:02d}")
        carry = (x + y + carry) // 10
    return " ".join(steps)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of one id a printable ASCII character, a few strings, and the end token."""
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(string, normalized=False) for string in STRINGS])
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {"eos_token_id": tokenizer.token_to_id(END)}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def chat_task(seed: int) -> dict[str, list[dict]]:
    """Chat prompts of small sums; no pair of numbers is in both files.

    The last number of a completion is its answer: a model of this size does not box it.
    """
    largest = CHAT_LARGEST
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(1, largest + 1)]
    random.Random(seed).shuffle(pairs)
    prompts = [
        {
            "messages": [*CHAT_OPENING, {"role": "user", "content": f"{a} + {b}"}],
            "verifier": "math",
            "ground_truth": str(a + b),
            "last_number": True,
        }
        for a, b in pairs
    ]
    train, heldout = CHAT_COUNTS["train"], CHAT_COUNTS["heldout"]
    return {"train": prompts[:train], "heldout": prompts[train : train + heldout]}


if __name__ == "__main__":
    main()
