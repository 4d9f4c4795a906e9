"""Each published layout, as a small file: a right completion is accepted, a wrong one is not."""

import base64
import json
import os
import pickle
import zlib

import pyarrow
import pyarrow.parquet
import pytest

from vibejax import benchmarks
from vibejax.records import read_records
from vibejax.verifiers import choice, code, instruct, math, math_judge
from vibejax.verifiers.worker import names

VERIFIERS = {
    "math": math, "math_judge": math_judge, "choice": choice, "code": code, "instruct": instruct,
}  # fmt: skip

DOUBLE = "def double(x):\n    return 2 * x\n"
WRONG = "def double(x):\n    return 2 + x\n"
SOLUTION = "class Solution:\n    def double(self, x):\n        return 2 * x\n"
WRONG_SOLUTION = SOLUTION.replace("2 * x", "2 + x")
PROGRAM, WRONG_PROGRAM = "print(2 * int(input()))", "print(2 + int(input()))"
CHECK = "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(0) == 0\n"


def block(source: str) -> str:
    return f"So:\n```python\n{source}\n```"


def packed(cases) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


VERL = {
    "data_source": "",
    "prompt": [{"role": "user", "content": "Half of one? Put it within \\boxed{}."}],
    "ability": "math",
    "reward_model": {"ground_truth": "\\frac{1}{2}", "style": "rule"},
    "extra_info": {"index": 7, "split": "test"},
}
IMO = {
    "Problem ID": "imo-bench-algebra-002", "Problem": "Find $f$.\n", "Short Answer": " $2^{u-2}$ ",
    "Category": "Algebra", "Level": "IMO-Medium", "Subcategory": "Inequality", "Source": "IMO",
}  # fmt: skip
GSM8K = {"question": "Eggs?", "answer": "He has 2 * 600 = <<2*600=1200>>1200.\n#### 1,200"}
GPQA = {
    "Record ID": "rec1", "Question": "What is \nH2O?", "Correct Answer": "water\n",
    "Incorrect Answer 1": "iron", "Incorrect Answer 2": "gold", "Incorrect Answer 3": "salt",
    "Subdomain": "Chemistry",
}  # fmt: skip
HUMANEVAL = {
    "task_id": "HumanEval/0", "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double", "canonical_solution": "    return 2 * x\n", "test": CHECK,
}  # fmt: skip
LEETCODE_DATASET = {
    "task_id": "two", "problem_description": "Double x.", "entry_point": "Solution().double",
    "starter_code": "class Solution:\n    def double(self, x: int) -> int:\n        ",
    "prompt": "from typing import *\n", "test": CHECK, "completion": SOLUTION,
}  # fmt: skip
LEETCODE_CONTEST = {
    "task_id": "weekly-contest-1-double", "title": "double", "meta": {"difficulty": "Easy"},
    "prompt": '"""\nDouble x.\n"""\nclass Solution:\n    def double(self, x: int):\n        ',
    "prompt_sft": "Double x.\n```python\nclass Solution:\n    def double(self, x: int):\n```",
    "test": "my_solution = Solution()\ntest_input = {'x': 3}\n"
    "assert my_solution.double(**test_input) == 6\n",
}  # fmt: skip
LIVECODEBENCH = {
    "question_title": "Double", "question_content": "Double the number.", "platform": "atcoder",
    "question_id": "abc_a", "contest_id": "abc", "contest_date": "2025-04-01", "difficulty": "easy",
    "starter_code": "", "metadata": "{}",
    "public_test_cases": json.dumps([{"input": "2", "output": "4", "testtype": "stdin"}]),
    "private_test_cases": packed([{"input": "3", "output": "6", "testtype": "stdin"}]),
}  # fmt: skip
LIVECODEBENCH_CALL = LIVECODEBENCH | {
    "starter_code": "class Solution:\n    def double(self, x: int) -> int:\n        ",
    "metadata": '{"func_name": "double"}',
    "public_test_cases": json.dumps([{"input": "2", "output": "4", "testtype": "functional"}]),
    "private_test_cases": packed([{"input": "3", "output": "6", "testtype": "functional"}]),
}
OJBENCH = {
    "id": 1000, "prompt": "用Python。Double the number.", "dataset": "NOI", "language": "python",
    "difficulty": "easy", "test_cases": [{"input": "2\n", "output": "4\n"},
                                         {"input": "3\n", "output": "6\n"}],
}  # fmt: skip
IFEVAL = {
    "key": 1000, "prompt": "Write without commas.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"relation": "at least", "num_words": 2}],
}  # fmt: skip

CASES = {  # row, suffix, right, wrong
    "verl": (VERL, ".parquet", r"\boxed{0.5}", r"\boxed{2}"),
    "IMO-AnswerBench": (IMO, ".csv", r"\boxed{\frac{2^u}{4}}", r"\boxed{2^u}"),
    "GSM8K": (GSM8K, ".jsonl", r"\boxed{1200}", r"\boxed{1}"),
    "HumanEval": (HUMANEVAL, ".jsonl", block(DOUBLE), block(WRONG)),
    "LeetCodeDataset": (LEETCODE_DATASET, ".jsonl", block(SOLUTION), block(WRONG_SOLUTION)),
    "LeetCode contests": (LEETCODE_CONTEST, ".jsonl", block(SOLUTION), block(WRONG_SOLUTION)),
    "LiveCodeBench": (LIVECODEBENCH, ".jsonl", block(PROGRAM), block(WRONG_PROGRAM)),
    "call": (LIVECODEBENCH_CALL, ".jsonl", block(SOLUTION), block(WRONG_SOLUTION)),
    "OJBench": (OJBENCH, ".jsonl", block(PROGRAM), block(WRONG_PROGRAM)),
    "IFEval": (IFEVAL, ".jsonl", "no commas here", "well, commas"),
    "prompt record": (
        {"prompt": "1+1=", "verifier": "math", "ground_truth": "2", "question": "?", "answer": "!"},
        ".jsonl", r"\boxed{2}", r"\boxed{3}",
    ),
}  # fmt: skip


def write(path, row):
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    elif path.suffix == ".csv":
        cells = [
            ['"' + str(v).replace('"', '""') + '"' for v in part] for part in (row, row.values())
        ]
        path.write_text("".join(",".join(line) + "\r\n" for line in cells), newline="")
    else:
        path.write_text(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_each_layout_gives_records_that_its_verifier_judges(name, tmp_path):
    row, suffix, right, wrong = CASES[name]
    ((_, read),) = read_records(write(tmp_path / f"b{suffix}", row))
    record = benchmarks.prompt_record(read)
    assert "messages" in record or "prompt" in record
    assert benchmarks.TRUTHS & record.keys()
    (verifier,) = names(record)
    json.dumps(record)
    assert VERIFIERS[verifier].verify(record, right).correct
    assert not VERIFIERS[verifier].verify(record, wrong).correct


@pytest.mark.parametrize(
    "row, identity, begin, end",
    [
        (IMO, "imo-bench-algebra-002", "Find $f$.\n\n", benchmarks.MATH),
        (GSM8K, "", "Eggs?\n\n", benchmarks.MATH),
        (GPQA, "rec1", "What is \nH2O?\n\nA) ", benchmarks.CHOICE),
        (HUMANEVAL, "HumanEval/0", f"{benchmarks.FUNCTION}\n\n```python\ndef double", '."""\n```'),
        (LEETCODE_DATASET, "two", f"Double x.\n\n{benchmarks.FUNCTION}\n", "-> int:\n```"),
        (LEETCODE_CONTEST, "weekly-contest-1-double", "Double x.", benchmarks.FUNCTION),
        (LIVECODEBENCH, "abc_a", "Double the number.\n\n", benchmarks.PROGRAM),
        (LIVECODEBENCH_CALL, "abc_a", "Double the number.\n\nComplete", "-> int:\n```"),
        (OJBENCH, "1000", "用Python。", benchmarks.PROGRAM),
        (IFEVAL, "1000", "Write", "without commas."),
    ],
)
def test_what_is_asked(row, identity, begin, end):
    record = benchmarks.prompt_record(row)
    (message,) = record["messages"]
    assert message["role"] == "user"
    assert message["content"].startswith(begin) and message["content"].endswith(end)
    assert record["id"] == identity


def test_options_are_shuffled_by_their_texts_alone():
    letters = set()
    for number in range(12):
        row = GPQA | {"Question": f"What is H2O, {number}?"}
        record = benchmarks.prompt_record(row)
        assert benchmarks.prompt_record(row) == record
        letter = record["ground_truth"]
        letters.add(letter)
        assert f"{letter}) water\n" in record["messages"][0]["content"]
        assert choice.verify(record, rf"\boxed{{{letter}}}").correct
        assert choice.verify(record, r"\boxed{water}").correct
        assert not choice.verify(record, r"\boxed{iron}").correct
        # Which of them the file calls right changes nothing of what the policy sees.
        swapped = row | {"Correct Answer": "iron", "Incorrect Answer 1": "water"}
        assert benchmarks.prompt_record(swapped)["messages"] == record["messages"]
    assert letters == set("ABCD")


def test_all_cases_of_livecodebench_count():
    record = benchmarks.prompt_record(LIVECODEBENCH)
    assert not code.verify(record, block("print(4)")).correct  # the public one alone
    assert not code.verify(record, block("print(6)")).correct  # the private one alone


def test_a_hostile_pickle_is_neither_loaded_nor_accepted(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    held = base64.b64encode(zlib.compress(pickle.dumps(Hostile()))).decode()
    record = benchmarks.prompt_record(LIVECODEBENCH | {"private_test_cases": held})
    assert record["private_test_cases"] == held
    with pytest.raises(ValueError, match="is not base64 of zlib of a pickle: it asks for"):
        code.verify(record, "")
    assert not (tmp_path / "made").exists()


def test_columns_that_a_parquet_file_fills_with_nothing_do_not_count():
    assert benchmarks.prompt_record(GSM8K | {"messages": None, "prompt": None})["ground_truth"]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "?", "solution": "!"}, "has the columns 'text', 'solution', of no known layout"),
        ({"problem": 1, "answer": 2}, "known are prompt record (messages); prompt record (prompt,"),
        ({f"c{i}" * 99: 0 for i in range(99)}, "'c19c19c19"),
        (GSM8K | {"answer": "1200"}, "answer = '1200': has no '####' before the number"),
        (GSM8K | {"question": 5}, "question = 5: must be text"),
        (
            OJBENCH | {"language": "cpp"},
            "language = 'cpp': only 'python' can be run; keep its rows",
        ),
        (OJBENCH | {"test_cases": None}, "has no 'test_cases': put a list of {input, output}"),
        (HUMANEVAL | {"entry_point": "f(__import__('os'))"}, "must be like f or Solution().f"),
        (VERL | {"reward_model": "5"}, "reward_model = '5': must be an object"),
        (VERL | {"extra_info": "x"}, "extra_info = 'x': must be an object"),
        (IFEVAL | {"instruction_id_list": ["no:rule", "x:y"]}, "instruction id 'no:rule' is unkno"),
        (IFEVAL | {"kwargs": [{}]}, "kwargs = [{}]: must be a list of 2, one per id"),
    ],
)
def test_rows_that_cannot_be_used(row, message):
    with pytest.raises(ValueError) as error:
        benchmarks.prompt_record(row)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 3_000
