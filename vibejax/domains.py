"""Four domains of generated tasks for a small policy: `python -m vibejax.domains DST`.

    math      a sum of three digits:            "123+456="
    code      a program, run in the sandbox:    "f(x)=x*3+17+25"
    stem      one of four options:              "482-137 tens: A 0-2 B 3-4 C 5-7 D 8-9"
    instruct  a text under constraints:         "5 words, fox, owl, end yes:"

DST gets, over all domains, base.jsonl (demonstrations, those of which the shipped policy was made),
sft.jsonl (others) and hard.jsonl (several demonstrations of a prompt, of which a second stage keeps
the hard ones); and for each domain DOMAIN_train.jsonl, DOMAIN_probe.jsonl and DOMAIN_heldout.jsonl
(prompts with what verifies them). What a prompt asks about is drawn without replacement, so no
question stands in two files.

Demonstrations mix ways to answer: the bare answer, short and hard; the way written out, easy; and
for sums that after the numbers in full, longer than it need be. A policy that has learnt all of
them gives reinforcement learning something to amplify, and Long2Short something to shorten. Some
are wrong, as in any large corpus: those of `instruct` follow all constraints only in some cases,
and in sft.jsonl some of `stem` end in a letter that is guessed, whatever was worked out before it.
"""

import argparse
import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from vibejax.arithmetic import carries, digits_task
from vibejax.config_file import errors_in_one_line

# The shipped policy has read base.jsonl of seed 0. Other counts draw other prompts, of which it has
# read some: it must then be made anew.
COUNTS = {"base": 20_000, "sft": 6_000, "hard": 128, "train": 1_024, "probe": 64, "heldout": 512}
STYLES = {"bare": 0.6, "written": 0.4}
MATH_STYLES = {"bare": 0.5, "written": 0.25, "in full": 0.25}
DEMONSTRATIONS = {"base": 1, "sft": 1, "hard": 2}  # of each prompt
STEM_GUESSED = {"sft": 0.4}  # demonstrations of `stem` that guess
INSTRUCT_RIGHT = 0.5  # demonstrations of `instruct` that follow all constraints
WORDS = (
    "cat dog fox owl hen bee ant elk yak emu sun sky sea ice fog hut jar key pen cup "
    "red tan sad big old wet dry hot low new run sit dig hop fly eat nap row sew win"
).split()
TENS = "AAABBCCCDD"  # letter of the range that each digit lies in
ENDINGS = ("yes", "now", "fin", "bye", "too")

Task = tuple[dict, Callable[[random.Random, str], str]]
"""A prompt record, and a demonstration of it, in a way that is drawn, for a file of that name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the files of all domains."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DST")
    parser.add_argument(
        "--seed", type=int, default=0,
        help="of what is drawn; the shipped policy has seen prompts of seed 0's base.jsonl, some "
        "of which stand in the held-out files of other seeds",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    with errors_in_one_line(OSError):
        write(args.folder, args.seed)


def write(folder: Path, seed: int) -> None:
    """Writes all files; see the module's docstring."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in all_files(seed).items():
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def all_files(seed: int) -> dict[str, list[dict]]:
    """Name of a file -> its records."""
    files: dict[str, list[dict]] = {kind: [] for kind in DEMONSTRATIONS}
    for domain, tasks in (
        ("math", math_tasks),
        ("code", code_tasks),
        ("stem", stem_tasks),
        ("instruct", instruct_tasks),
    ):
        rng = random.Random(f"{domain} {seed}")
        drawn = tasks(rng)
        for kind, count in COUNTS.items():
            some = itertools.islice(drawn, count)
            if kind in DEMONSTRATIONS:
                files[kind] += [
                    {**record, "domain": domain, "completion": demonstrate(rng, kind)}
                    for record, demonstrate in some
                    for _ in range(DEMONSTRATIONS[kind])
                ]
            else:
                files[f"{domain}_{kind}"] = [{**record, "domain": domain} for record, _ in some]
    for kind in DEMONSTRATIONS:
        random.Random(seed).shuffle(files[kind])
    return files


def math_tasks(rng: random.Random) -> Iterator[Task]:
    """Sums of three-digit numbers, none of them one of `arithmetic`."""
    taken = {record["prompt"] for records in digits_task(0).values() for record in records}
    for pair in rng.sample(range(900 * 900), 2 * sum(COUNTS.values())):
        a, b = 100 + pair // 900, 100 + pair % 900
        record = {"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": str(a + b)}
        if record["prompt"] not in taken:
            answer = f"\\boxed{{{a + b}}}"
            way = carries(a, b, places=3)
            forms = {"bare": answer, "written": f"{way} {answer}"}
            forms["in full"] = f"{in_full(a)} {in_full(b)} {way} {answer}"
            yield record, _in_styles(forms, MATH_STYLES)


def code_tasks(rng: random.Random) -> Iterator[Task]:
    """Functions of one line, whose constant is a sum to be worked out."""
    numbers = range(10, 100)
    triples = [*itertools.product(range(2, 10), numbers, numbers)]
    for m, a, b in rng.sample(triples, sum(COUNTS.values())):
        cases = [{"args": [x], "expected": x * m + a + b} for x in (0, 1, 7)]
        record = {
            "prompt": f"f(x)=x*{m}+{a}+{b}\n",
            "verifier": "code",
            "tests": {"type": "call", "function": "f", "cases": cases},
        }
        program = f"```python\ndef f(x):\n return x*{m}+{a + b}\n```"
        written = f"{carries(a, b, places=2)}\n{program}"
        yield record, _in_styles({"bare": program, "written": written})


def stem_tasks(rng: random.Random) -> Iterator[Task]:
    """Differences of three-digit numbers: among which of four ranges is the tens digit?

    The ranges are always the same. To look an answer up among options that change is more than a
    policy of this size learns in minutes.
    """
    pairs = rng.sample([*itertools.combinations(range(100, 1_000), 2)], sum(COUNTS.values()))
    for b, a in pairs:
        tens = (a - b) // 10 % 10
        letter = TENS[tens]
        record = {
            "prompt": f"{a}-{b} tens: A 0-2 B 3-4 C 5-7 D 8-9\n",
            "verifier": "choice",
            "ground_truth": letter,
        }
        yield record, functools.partial(_choice, f"{borrows(a, b)} {tens} ", letter)


def _choice(way: str, letter: str, rng: random.Random, kind: str) -> str:
    demonstrate = _in_styles({"bare": "", "written": way})
    if kind in STEM_GUESSED and rng.random() < STEM_GUESSED[kind]:
        letter = rng.choice("ABCD")
    return f"{demonstrate(rng, kind)}\\boxed{{{letter}}}"


def borrows(a: int, b: int) -> str:
    """The difference a - b of three-digit numbers, a above b, digit by digit from the last."""
    steps, borrow = [], 0
    for place in range(3):
        x, y = a // 10**place % 10 - borrow, b // 10**place % 10
        borrow = int(x < y)
        steps.append(f"{x + 10 * borrow}-{y}={x + 10 * borrow - y}")
    return " ".join(steps)


def instruct_tasks(rng: random.Random) -> Iterator[Task]:
    """Texts of a number of words, with two given ones, ending in a third."""
    asked = itertools.product(range(4, 8), itertools.permutations(WORDS, 2), ENDINGS)
    for count, keywords, ending in rng.sample([*asked], sum(COUNTS.values())):
        rules = {
            "length:words": {"at_least": count, "at_most": count},
            "keywords:existence": {"keywords": [*keywords]},
            "startend:end_checker": {"end_phrase": ending},
        }
        record = {
            "prompt": f"{count} words, {keywords[0]}, {keywords[1]}, end {ending}:\n",
            "verifier": "instruct",
            "ground_truth": {"instruction_id_list": [*rules], "kwargs": [*rules.values()]},
        }
        yield (
            record,
            functools.partial(_text, count, keywords, ending),
        )


def _text(
    count: int, keywords: tuple[str, str], ending: str, rng: random.Random, _kind: str
) -> str:
    """A demonstration, which in some cases breaks one or two of the constraints."""
    if rng.random() > INSTRUCT_RIGHT:
        count = max(3, count + rng.choice([-2, -1, 0, 1, 2]))
        keywords = tuple(word if rng.random() < 0.7 else rng.choice(WORDS) for word in keywords)
    words = [*keywords, *rng.choices(WORDS, k=count - 3)]
    rng.shuffle(words)
    return " ".join([*words, ending])


def _in_styles(
    forms: Mapping[str, str], styles: Mapping[str, float] = STYLES
) -> Callable[[random.Random, str], str]:
    """Demonstrations in one of several forms, by their shares."""

    def demonstrate(rng: random.Random, _kind: str) -> str:
        (style,) = rng.choices([*styles], styles.values())
        return forms[style]

    return demonstrate


def in_full(number: int) -> str:
    """A number of three digits as the sum of its places."""
    hundreds, tens, ones = number // 100, number // 10 % 10, number % 10
    return f"{number}={hundreds}00+{tens}0+{ones}"


if __name__ == "__main__":
    main()
