"""Planted copies found, clean records flagged, records a second: `curate.py DATA [RECORDS]`.

DATA holds aime.parquet, aime25.parquet and hmmt25.parquet, the evaluation sets, and gsm8k/ with
train.jsonl and test.jsonl. 100,000 records of 2 KB go through `python -m vibejax.curate`:

200 planted: items of the sets with case, punctuation, spacing, LaTeX spelling, up to three
    words cut and others put before or after, one of these six ways or all at once;
10,000 clean: gsm8k's 8,792 problems, and competition problems of the phrases that such sets are
    full of ("where m and n are relatively prime positive integers");
the rest: words without a meaning.

A last row has each item of the sets against all the others, with the rule of a single common
10-gram beside ours: how many of these different problems are called copies.

peer: the bound that is to be kept: all planted, no clean one, 2 KB records a second so that a
    million takes five minutes.
"""

import json
import os
import random
import re
import resource
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet

from vibejax.curate import evaluation, letters

RECORDS, PLANTED, CLEAN, BYTES = 100_000, 200, 10_000, 2_000
SETS = ("aime", "aime25", "hmmt25")
INSTRUCTION = "Let's think step by step and output the final answer within \\boxed{}."
BEFORE = ("Solve this: ", "Problem 7 (5 points). ", "# Task\nYou are a tutor.\n\n", "Q: ")
AFTER = (" Show your work.", "\n\nAnswer with one number.", " ANSWER:", " " + INSTRUCTION)
PROBLEMS = (
    "A triangle has sides {a}, {b} and {c}. Its area can be written as",
    "A bag holds {a} red and {b} blue marbles, and {c} are drawn at random. The probability that "
    "all are red is",
    "The sum of all solutions of x^{a} - {b}x + {c} = 0 that are real can be expressed as",
    "Two circles of radii {a} and {b} have centres {c} apart. The length of their common chord is",
    "An ant walks {a} steps on the edges of a cube, then {b} steps more. The chance that it is "
    "back after {c} of them can be written as",
)
ENDINGS = (
    " $\\frac{m}{n}$, where $m$ and $n$ are relatively prime positive integers. Find $m+n$.",
    " $m\\sqrt{n}$, where $m$ and $n$ are positive integers and $n$ is not divisible by the square "
    "of any prime. Find $m+n$.",
    " $\\frac{a\\sqrt{b}}{c}$, where $a$, $b$, and $c$ are positive integers, $a$ and $c$ are "
    "relatively prime, and $b$ is not divisible by the square of any prime. Find $a+b+c$.",
    " $p$. Find the remainder when $p$ is divided by $1000$. " + INSTRUCTION,
)


def problem_texts(data: Path) -> dict[str, list[str]]:
    """The evaluation sets' prompts."""
    tables = {name: pyarrow.parquet.read_table(data / f"{name}.parquet") for name in SETS}
    return {
        name: [row["prompt"][0]["content"] for row in table.to_pylist()]
        for name, table in tables.items()
    }


def changed(text: str, way: int, rng: random.Random) -> str:
    """A near-copy."""
    body = text.replace(INSTRUCTION, "").strip()
    if way in (0, 6):
        body = rng.choice((str.upper, str.lower, str.title))(body) if "\\" not in body else body
    if way in (1, 6):
        marks = rng.choice((string.punctuation, ".,;:!?$", "$\\{}"))
        body = body.translate(str.maketrans(dict.fromkeys(marks, rng.choice(("", " ")))))
    if way in (2, 6):
        body = re.sub(r" +", lambda _: rng.choice((" ", "  ", "\n", "\t", "\u00a0")), body)
    if way in (3, 6):
        for old, new in (("\\frac", "\\dfrac"), ("\\left", ""), ("\\right", ""), ("\\cdot", "*")):
            body = body.replace(old, new)
        body = re.sub(r"\$([^$]*)\$", r"\\( \1 \\)", body)
    if way in (4, 6):
        body = rng.choice(BEFORE) + body.split(maxsplit=rng.randint(0, 3))[-1]
    if way in (5, 6):
        body = body.rsplit(maxsplit=rng.randint(0, 3))[0] + rng.choice(AFTER)
    return body


def write_records(path: Path, data: Path, count: int) -> None:
    """The records, their kind in their ids."""
    rng = random.Random(0)
    items = [text for texts in problem_texts(data).values() for text in texts]
    texts = [(f"planted-{i}", changed(rng.choice(items), i % 7, rng)) for i in range(PLANTED)]
    gsm8k = [
        json.loads(line)["question"]
        for name in ("train", "test")
        for line in (data / "gsm8k" / f"{name}.jsonl").read_text().splitlines()
    ]
    for i in range(CLEAN):
        a, b, c = (rng.randint(2, 999) for _ in range(3))
        made = rng.choice(PROBLEMS).format(a=a, b=b, c=c) + rng.choice(ENDINGS)
        texts.append((f"clean-{i}", gsm8k[i] if i < len(gsm8k) else made))
    vocabulary = [
        "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9))) for _ in range(20_000)
    ]

    def fill(size: int) -> str:
        return " ".join(rng.choices(vocabulary, k=size // 6 + 1))[:size]

    texts += [(f"other-{i}", fill(500)) for i in range(count - len(texts))]
    rng.shuffle(texts)
    with path.open("w") as file:
        for name, text in texts:
            record = {"id": name, "prompt": text, "completion": fill(max(BYTES - len(text), 9))}
            file.write(json.dumps(record) + "\n")


def command_rows(data: Path, count: int) -> None:
    """Prints what the command finds, and how fast."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "raw.jsonl"), Path(folder, "clean.jsonl")
        write_records(source, data, count)
        config = Path(folder, "curate.toml")
        sets = [str(data / f"{name}.parquet") for name in SETS]
        config.write_text(
            f"inputs = {json.dumps([str(source)])}\nout = {json.dumps(str(out))}\n"
            f"[decontaminate]\nsets = {json.dumps(sets)}\n"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "vibejax.curate", str(config)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            check=True,
            stderr=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        dropped = out.with_suffix(".dropped.jsonl").read_text().splitlines()
        found = [r["id"] for r in map(json.loads, dropped) if r["reason"] == "contaminated"]
        kept = [json.loads(line)["id"] for line in out.read_text().splitlines()]
        report = json.loads(out.with_suffix(".report.json").read_text())
        row("planted", sum(i.startswith("planted") for i in found), PLANTED, "found", True)
        row("clean", len([i for i in found if not i.startswith("planted")]), 0, "flagged", False)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        row(
            f"{count} records of {source.stat().st_size // count} bytes, 2 workers",
            round(count / seconds, 1),
            1e6 / 300,
            "records/s",
            True,
            cpu_ms_a_record=round(cpu / count * 1e3, 3),
            peak_bytes=after.ru_maxrss * 1024,
            kept=len(kept),
            dropped=report["dropped"],
        )


def left_out_row(data: Path) -> None:
    """Prints how many items are called copies of another."""
    sets = problem_texts(data)
    called = {}
    for share in (0.5, 1e-9):  # the second asks for n words, which is one n-gram
        called[share] = 0
        for name, texts in sets.items():
            for number, text in enumerate(texts):
                rest = sets | {name: texts[:number] + texts[number + 1 :]}
                index = evaluation.build(rest, n=10, share=share)
                called[share] += bool(evaluation.find(index, batch(text)))
    row("each item against the others", called[0.5], called[1e-9], "flagged", False)


def batch(text: str) -> letters.Batch:
    """A prompt alone."""
    return letters.Batch([letters.without_layout(letters.letters(text)), b""])


def row(case: str, ours: float, peer: float, unit: str, higher_is_better: bool, **more) -> None:
    """Prints one result as a JSON object."""
    fields = {
        "benchmark": "curate",
        "case": case,
        "ours": ours,
        "peer": round(peer, 1),
        "unit": unit,
        "higher_is_better": higher_is_better,
    }
    print(json.dumps(fields | more), flush=True)


def main() -> None:
    """Prints every row."""
    data = Path(sys.argv[1])
    left_out_row(data)
    command_rows(data, int(sys.argv[2]) if len(sys.argv) > 2 else RECORDS)


if __name__ == "__main__":
    main()
