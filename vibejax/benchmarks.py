"""Rows of published benchmarks as prompt records; the layout is told from a row's columns.

What a row asks is followed by one of the texts below, the only words that are ours: edit them
here. Rows in verl's columns (AIME, HMMT, BruMO as published for RL) hold whole prompts already.

LiveCodeBench's `private_test_cases`, a pickle, go on as they are: the code verifier unpacks them,
in its own process, and builds text, numbers and containers alone. IMO-AnswerBench gets the math
verifier that asks a judge where it finds answers unlike (`verifiers.math_judge`).
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vibejax.verifiers import choice_options, instruct

Record = dict[str, Any]
Row = Mapping[str, Any]

MATH = r"Please reason step by step, and put your final answer within \boxed{}."
CHOICE = r"Please reason step by step, and put the letter of the right option within \boxed{}."
PROGRAM = (
    "Write a Python program that solves this. It reads standard input and prints its answer to "
    "standard output. Put the whole program into one ```python block."
)
FUNCTION = "Complete this Python code. Put all of it into one ```python block."

LEETCODE_SETUP = """\
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from typing import *
"""
# What solutions on LeetCode may use without importing it. Not all of math and operator: their
# pow would stand for the builtin one, which takes a modulus.

TRUTHS = {"ground_truth", "tests", "public_test_cases", "private_test_cases"}
"""Fields of which a record that can be verified has at least one."""

SHOWN_COLUMNS = 20
_ENTRY_POINT = re.compile(r"([A-Za-z_]\w*)(?:\(\)\.[A-Za-z_]\w*)?", re.ASCII)


def prompt_record(row: Row) -> Record:
    """A row as a prompt record; one that is a prompt record stays as it is.

    Raises:
        ValueError: the columns are of no layout in `LAYOUTS`, or a value cannot be used.
    """
    return _layout(row).read(row)


def problem(row: Row) -> str | None:
    """What a row asks, without a word of ours; None of a prompt record, which may hold others'.

    Raises:
        ValueError: the columns are of no layout in `LAYOUTS`, or a value cannot be used.
    """
    column = _layout(row).problem
    return _text(row, column) if column else None


def _layout(row: Row) -> "Layout":
    held = {name for name, value in row.items() if value is not None}  # parquet fills all columns
    for layout in LAYOUTS:
        if held.issuperset(layout.columns):
            return layout
    found = [f"{name!r:.40}" for name in row][:SHOWN_COLUMNS]
    known = "; ".join(f"{layout.name} ({', '.join(layout.columns)})" for layout in LAYOUTS)
    raise ValueError(f"has the columns {', '.join(found)}, of no known layout; known are {known}")


def asked(record: Record) -> Record:
    """A prompt record without the answer, which the last message of a demonstration is.

    Completions are made, and judged, by what was asked alone.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        return record
    last = messages[-1]
    answered = isinstance(last, Mapping) and last.get("role") == "assistant"
    return record | {"messages": messages[:-1]} if answered else record


def _prompt_record(row: Row) -> Record:
    return dict(row)


def _verl(row: Row) -> Record:
    reward, extra = row["reward_model"], row.get("extra_info") or {}
    for name, value in (("reward_model", reward), ("extra_info", extra)):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} = {value!r:.80}: must be an object")
    prompt = row["prompt"]
    return {
        "id": str(extra.get("index", "")),
        "domain": row.get("ability", ""),
        "verifier": "math",
        "ground_truth": reward.get("ground_truth"),
        "data_source": row.get("data_source"),
        **({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}),
    }


def _imo_answerbench(row: Row) -> Record:
    return {
        **_asked(row, "Problem ID", "math", _text(row, "Problem").strip(), MATH),
        "verifier": "math_judge",
        "ground_truth": _text(row, "Short Answer").strip(),
    }


def _gsm8k(row: Row) -> Record:
    _, mark, answer = _text(row, "answer").rpartition("####")
    if not mark:
        raise ValueError(f"answer = {row['answer']!r:.80}: has no '####' before the number")
    return {
        **_asked(row, "id", "math", _text(row, "question").strip(), MATH),
        "verifier": "math",
        "ground_truth": answer.strip(),
    }


def _gpqa(row: Row) -> Record:
    question = _text(row, "Question").strip()
    options = [" ".join(_text(row, name).split()) for name in _GPQA_OPTIONS]
    right = options[0]
    # The right one comes first in the file; this order knows the texts alone.
    options.sort(key=lambda option: hashlib.sha256(f"{question}\n{option}".encode()).digest())
    asked = f"{question}\n\n{choice_options.render(options)}"
    return {
        **_asked(row, "Record ID", "stem", asked, CHOICE),
        "verifier": "choice",
        "ground_truth": choice_options.LETTERS[options.index(right)],
    }


def _humaneval(row: Row) -> Record:
    prompt = _text(row, "prompt")
    return {
        **_asked(row, "task_id", "code", FUNCTION, _block(prompt)),
        "verifier": "code",
        "tests": _assertions(row, setup=prompt),
    }


def _leetcode_dataset(row: Row) -> Record:
    description, starter = _text(row, "problem_description"), _text(row, "starter_code")
    return {
        **_asked(row, "task_id", "code", description.strip(), FUNCTION, _block(starter)),
        "verifier": "code",
        "tests": _assertions(row, setup=_text(row, "prompt")),
    }


def _leetcode_contest(row: Row) -> Record:
    # Its prompt ends with the code to complete, and its tests name what they call: Solution.
    return {
        **_asked(row, "task_id", "code", _text(row, "prompt_sft").strip(), FUNCTION),
        "verifier": "code",
        "tests": {"type": "assert", "setup": LEETCODE_SETUP, "code": _text(row, "test")},
    }


def _livecodebench(row: Row) -> Record:
    question, starter = _text(row, "question_content").strip(), _text(row, "starter_code")
    how = [FUNCTION, _block(starter)] if starter.strip() else [PROGRAM]
    tests = ("public_test_cases", "private_test_cases", "metadata")
    return {
        **_asked(row, "question_id", "code", question, *how),
        "verifier": "code",
        **{name: row[name] for name in tests},
    }


def _ojbench(row: Row) -> Record:
    language, cases = _text(row, "language"), row.get("test_cases")
    if language != "python":
        raise ValueError(f"language = {language!r:.40}: only 'python' can be run; keep its rows")
    if cases is None:
        raise ValueError(
            "has no 'test_cases': put a list of {input, output} into each row, from OJBench's "
            "folders NOI and ICPC"
        )
    return {
        **_asked(row, "id", "code", _text(row, "prompt").strip(), PROGRAM),
        "verifier": "code",
        "tests": {"type": "stdin", "cases": cases},
    }


def _ifeval(row: Row) -> Record:
    instruct.rules(row)  # an unknown one would make a verdict of nothing
    return {
        "id": str(row["key"]),
        "domain": "instruct",
        "messages": [{"role": "user", "content": _text(row, "prompt")}],
        "verifier": "instruct",
        "ground_truth": {name: row[name] for name in ("instruction_id_list", "kwargs")},
    }


def _asked(row: Row, name: str, domain: str, *parts: str) -> Record:
    """What all have in common: the row's id, by its column, and one message of the user."""
    content = "\n\n".join(parts)
    return {
        "id": str(row.get(name, "")),
        "domain": domain,
        "messages": [{"role": "user", "content": content}],
    }


def _assertions(row: Row, setup: str) -> Record:
    """Tests of a `check(candidate)`, where `entry_point` is a name or as in Solution().twoSum."""
    entry_point, code = _text(row, "entry_point").strip(), _text(row, "test")
    named = _ENTRY_POINT.fullmatch(entry_point)
    if not named:
        raise ValueError(f"entry_point = {entry_point!r:.80}: must be like f or Solution().f")
    if named[1] != entry_point:
        code += f"\ncheck({entry_point})\n"
    return {"type": "assert", "setup": setup, "entry_point": named[1], "code": code}


def _block(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} = {value!r:.80}: must be text")
    return value


class Layout(NamedTuple):
    """How a file's rows look.

    Attributes:
        name: of the benchmark.
        columns: that a row must have; others do not matter.
        read: a row to a prompt record; raises ValueError.
        problem: the column that asks; empty: the prompt does.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Record]
    problem: str = ""


_GPQA_OPTIONS = ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))

LAYOUTS = (  # the first that fits counts: a prompt record may have any other field
    Layout("prompt record", ("messages",), _prompt_record),
    Layout("prompt record", ("prompt", "verifier"), _prompt_record),
    Layout("verl", ("prompt", "reward_model"), _verl),
    Layout(
        "IFEval, IFBench", ("key", "prompt", "instruction_id_list", "kwargs"), _ifeval, "prompt"
    ),
    Layout(
        "LeetCodeDataset",
        ("prompt", "problem_description", "starter_code", "entry_point", "test"),
        _leetcode_dataset,
        "problem_description",
    ),
    Layout("HumanEval", ("prompt", "entry_point", "test"), _humaneval, "prompt"),
    Layout("LeetCode contests", ("prompt_sft", "test"), _leetcode_contest, "prompt_sft"),
    Layout("OJBench", ("id", "prompt", "dataset", "language"), _ojbench, "prompt"),
    Layout("prompt without a verifier", ("prompt",), _prompt_record),
    Layout(
        "LiveCodeBench",
        ("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata"),
        _livecodebench,
        "question_content",
    ),
    Layout(
        "IMO-AnswerBench", ("Problem ID", "Problem", "Short Answer"), _imo_answerbench, "Problem"
    ),
    Layout("GPQA", ("Question", *_GPQA_OPTIONS), _gpqa, "Question"),
    Layout("GSM8K", ("question", "answer"), _gsm8k, "question"),
)
