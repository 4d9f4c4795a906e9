"""The math verifier: a table of hand-checked pairs, real answer keys, hostile completions."""

import json
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibejax.verifiers import Outcome
from vibejax.verifiers.math import MAX_ANSWER_CHARS, equivalent, extract, verify

PAIRS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "math_pairs.jsonl").read_text().splitlines()
]
SHARED = Path(__file__).parents[2] / "shared" / "data"


def pairs(*, equal, known_reject=False):
    return [
        pytest.param(p["answer"], p["ground_truth"], id=f"{p['kind']}-{i}")
        for i, p in enumerate(PAIRS)
        if p["equal"] == equal and p.get("known_reject", False) == known_reject
    ]


def test_table_is_large_enough_and_has_no_pair_twice():
    written = {(p["answer"], str(p["ground_truth"])) for p in PAIRS}
    assert len(written) == len(PAIRS) >= 300


@pytest.mark.parametrize("answer, ground_truth", pairs(equal=True))
def test_equal_pairs_are_accepted(answer, ground_truth):
    assert equivalent(answer, ground_truth)
    assert equivalent(str(ground_truth), answer)


@pytest.mark.parametrize("answer, ground_truth", pairs(equal=False))
def test_unequal_pairs_are_never_accepted(answer, ground_truth):
    assert not equivalent(answer, ground_truth)
    assert not equivalent(str(ground_truth), answer)


@pytest.mark.parametrize("answer, ground_truth", pairs(equal=True, known_reject=True))
def test_known_wrong_rejects_are_what_the_table_says(answer, ground_truth):
    assert not equivalent(answer, ground_truth)


@pytest.mark.parametrize("text", sorted({str(p["ground_truth"]) for p in PAIRS if p["equal"]}))
def test_every_answer_equals_itself_in_a_box(text):
    assert verify({"ground_truth": text}, rf"Hence \boxed{{{text}}}.").correct


@given(st.text(alphabet="0123456789.,+-/^*_{}()[]|=<>%$ \\xyiAB\n\0", max_size=30), st.data())
@settings(max_examples=150, deadline=None)
def test_equivalence_is_symmetric_and_survives_any_text(text, data):
    truth = data.draw(st.sampled_from(PAIRS))["ground_truth"]
    assert equivalent(text, truth) == equivalent(str(truth), text)


@given(st.integers(-(10**6), 10**6), st.integers(1, 999))
@settings(max_examples=100, deadline=None)
def test_fractions_equal_exactly_their_multiples(above, below):
    assert equivalent(rf"\frac{{{7 * above}}}{{{7 * below}}}", f"{above}/{below}")
    assert not equivalent(f"{above}/{below}", f"{above + 1}/{below}")


def test_gsm8k_solutions_match_their_own_answer_only():
    lines = (SHARED / "gsm8k" / "test.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["answer"] for line in lines]
    truths = [solution.rpartition("####")[2].strip() for solution in solutions]
    numbers = [float(truth.replace(",", "")) for truth in truths]
    assert len(solutions) == 1319
    for i, solution in enumerate(solutions):
        assert verify({"ground_truth": truths[i]}, solution).correct
        following = (i + 1) % len(solutions)
        accepted = verify({"ground_truth": truths[following]}, solution).correct
        assert accepted == (numbers[i] == numbers[following])


@pytest.mark.parametrize("name", ["aime", "aime25", "hmmt25"])
def test_competition_ground_truths_equal_themselves_and_no_other(name):
    rows = pyarrow.parquet.read_table(SHARED / f"{name}.parquet")["reward_model"].to_pylist()
    truths = [row["ground_truth"] for row in rows]
    assert len(truths) == 30
    for i, truth in enumerate(truths):
        assert verify({"ground_truth": truth}, rf"\boxed{{{truth}}}").correct
        for other in truths[:i]:
            assert equivalent(str(truth), other) == (str(truth) == str(other))


@pytest.mark.parametrize(
    "completion, answer",
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{x = \boxed{3}}", "x = {3}"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\boxed{4 and \boxed{3}", "3"),
        (r"\boxed{}", ""),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> I give up.", None),
        (r"\boxed{1}</think> The answer is 2.", "2."),
        (r"<think>It must be \boxed{1}, wait", None),
        ("The answer is 42. I checked.", "42"),
        ("the final answer is: $\\frac{1}{2}$", r"$\frac{1}{2}$"),
        ("**Answer:** 12 cm\nBye", "12 cm"),
        ("The answer is 3.5", "3.5"),
        ("reasoning\n#### 1,234", "1,234"),
        ("The answer is 1. No: #### 2", "2"),
        ("I counted 17 of them", None),
        ("", None),
    ],
)
def test_extraction(completion, answer):
    assert extract(completion) == answer


def test_last_number_counts_only_where_the_record_asks_for_it():
    completion = "first 3, then -1,234.5"
    assert extract(completion) is None
    assert extract(completion, last_number=True) == "-1,234.5"
    record = {"ground_truth": "-1234.5"}
    assert verify(record, completion).outcome is Outcome.NO_ANSWER
    assert verify({**record, "last_number": True}, completion).correct


def test_verdict_tells_wrong_from_missing_answers():
    wrong = verify({"ground_truth": 3}, r"\boxed{4}")
    assert (wrong.correct, wrong.reward, wrong.outcome, wrong.answer) == (False, 0.0, "wrong", "4")
    missing = verify({"ground_truth": 3}, r"\boxed{ }")
    assert (missing.outcome, missing.answer) == (Outcome.NO_ANSWER, None)
    right = verify({"ground_truth": 3.0}, r"\boxed{3}")
    assert (right.correct, right.reward, right.outcome) == (True, 1.0, Outcome.CORRECT)


HOSTILE = {
    "60,000 tokens of garbage": r"lorem \frac{ipsum} {} answer is \boxed 12 " * 10_000,
    "null bytes": "\0" * 300_000,
    "null bytes in a box": rf"\boxed{{{chr(0) * 900}}}",
    "a million open braces": "{" * 1_000_000,
    "a million closing braces": "}" * 1_000_000,
    "boxes never closed": r"\boxed{" * 200_000,
    "boxes in boxes": r"\boxed{" * 100_000 + "4" + "}" * 100_000,
    "braces in a box": r"\boxed{" + "{" * 500_000 + "4" + "}" * 500_001,
    "blanks after a box": r"\boxed" + " " * 1_000_000 + "{4}",
    "backslashes": "\\" * 500_000,
    "answer is": "answer is " * 100_000,
    "answer and blanks": "answer" + " " * 500_000,
    "digits": r"\boxed{" + "9" * 500_000 + "}",
    "thinking without end": "</think><think>" * 50_000,
}


@pytest.mark.parametrize("completion", HOSTILE.values(), ids=HOSTILE)
def test_hostile_completions_get_a_verdict_in_linear_time(completion):
    start = time.process_time()
    verdict = verify({"ground_truth": "3", "last_number": True}, completion)
    assert not verdict.correct and verdict.scored
    assert time.process_time() - start < 2  # quadratic time would be minutes


@pytest.mark.parametrize(
    "answer",
    [
        "(" * 900,
        "(" * 450 + "3" + ")" * 450,
        r"\frac{" * 150,
        r"\sqrt{" * 100 + "3" + "}" * 100,
        "9" * 900,
        "9^{9^{9^{9}}}",
        "10^{999999999}",
        "1e999999999",
        "1.5^{1000000000}",
        "(x+1)^{1000000}",
        r"\prod_{k=1}^{1000000} k",
        "1," * 400 + "1",
        r"\pm 1" * 10,
        "[1," * 200,
        "()" * 400,
        r"\text{" * 150,
    ],
)
def test_hostile_answers_are_rejected_quickly(answer):
    start = time.process_time()
    assert not equivalent(answer, "x^2+3")
    assert time.process_time() - start < 2


def test_answers_beyond_the_limit_are_wrong():
    assert equivalent("3" + " " * (MAX_ANSWER_CHARS - 1), 3)
    assert not equivalent("3 " + "+ 0" * MAX_ANSWER_CHARS, 3)
