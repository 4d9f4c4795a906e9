"""Options, letters and quantities: what is accepted, and above all what is not."""

# ruff: noqa: RUF001 - signs of all kinds for minus, times, micro, ohm and degree are meant

import collections
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibejax.verifiers import Outcome, choice, choice_options, choice_units

CELL = ["the nucleus", "the mitochondrion", "A good conductor", "9.8 m/s^2"]
PROMPT = "What is the powerhouse?\n\nA) the nucleus\nB) the mitochondrion\nC) the wall\nD) none"


def letter(completion, truth="B", options=CELL):
    return choice.verify({"ground_truth": truth, "options": options}, completion)


def number(completion, truth, **settings):
    return choice.verify({"ground_truth": truth}, completion, **settings)


@pytest.mark.parametrize(
    "completion",
    [
        "B",
        "b",
        "(B).",
        "\\boxed{B}",
        "\\boxed{\\text{B}}",
        "\\boxed {\\textbf{(B)}}",
        "$\\boxed{b}$",
        "\\boxed{B. the mitochondrion}",
        "\\boxed{the Mitochondrion}",
        "\\boxed{\\boxed{B}}",
        "\\boxed{A} was my first thought. \\boxed{B}",
        "\\boxed{B} and then \\boxed{A",
        "The answer is B.",
        "The correct answer is (B) the mitochondrion.",
        "The answer is **B**, because A is the nucleus.",
        "**Answer: B**",
        "ANSWER: $B$",
        "Answer: B) the mitochondrion\n\nI checked it.",
        "Final answer is option B.",
        "Therefore the correct choice is: B",
        "The answer is the mitochondrion.",
        "A looks right, but option B is correct.",
        "(B) is the right answer.",
        "#### B",
        "The answer is A. No: the answer is B.",
        "The answer is B. This answer is consistent with biology.",
        "Let me see.\nB) the mitochondrion",
        "<think>The answer is A.</think>The answer is B.",
        "The answer is A.</think>\\boxed{B}",
    ],
)
def test_the_right_option_is_accepted(completion):
    verdict = letter(completion)
    assert (verdict.correct, verdict.reward, verdict.outcome) == (True, 1.0, Outcome.CORRECT)
    assert verdict.answer == "B"  # by which votes are counted, however it is written


@pytest.mark.parametrize(
    "completion",
    [
        "A",
        "\\boxed{A}",
        "\\boxed{A, B}",
        "\\boxed{AB}",
        "\\boxed{A or B}",
        "\\boxed{B and C}",
        "\\boxed{A, B, C, D}",
        "\\boxed{B. C. D.}",
        "\\boxed{(B)(C)}",
        "\\boxed{B) the nucleus}",
        "\\boxed{}",
        "\\boxed{Boron}",
        "The answer is A or B.",
        "The answer is either B or A",
        "The answer is B, C or D.",
        "The answer is B/C.",
        "The answer is B B C.",
        "Answer: B: 50% C: 50%",
        "The answer is B. The answer is not B.",
        "The answer is B. The answer is unclear, A perhaps.",
        "The answer is not A.",
        "Option B is correct. Option C is correct.",
        "Answer: E",
        "The answer is Boron.",
        "The answer is bold.",
        "The answer is the mitochondrion or the nucleus.",
    ],
)
def test_other_options_and_several_at_once_are_wrong(completion):
    verdict = letter(completion)
    assert (verdict.correct, verdict.reward) == (False, 0.0)
    assert verdict.outcome in (Outcome.WRONG, Outcome.NO_ANSWER)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " \n",
        "<think>\\boxed{B}",
        "</think>",
        "Vitamin B is the best source of it.",
        "B vitamins",
    ],
)
def test_no_answer_is_told_apart_from_a_wrong_one(completion):
    verdict = letter(completion)
    assert (verdict.outcome, verdict.correct) == (Outcome.NO_ANSWER, False)
    assert verdict.detail


def test_verdicts_say_what_was_read():
    assert letter("so \\boxed{ A or B }").answer == "A or B"
    assert letter("so \\boxed{A or B}").detail == "names no single option"
    assert letter("The answer is (B) as it makes ATP.").answer == "B"
    assert letter("\\boxed{A}").detail == ""


def test_an_article_is_no_option_and_option_texts_may_start_with_one():
    assert letter("The answer is A good conductor.", truth="C").correct
    assert not letter("The answer is A good conductor.", truth="A").correct
    assert letter("\\boxed{9.8\\,\\mathrm{m}/\\mathrm{s}^2}", truth="D").correct
    assert letter("\\boxed{980 cm/s^2}", truth="D").correct


def test_the_truth_may_be_the_text_of_an_option_or_the_options_stand_in_the_prompt():
    assert letter("B", truth="The mitochondrion.").correct
    assert letter("20", truth=20, options=["10", "20"]).correct
    assert choice.verify({"ground_truth": "C", "prompt": PROMPT}, "the answer is the wall.").correct
    messages = [{"role": "system", "content": "A) x\nB) y"}, {"role": "user", "content": PROMPT}]
    record = {"ground_truth": "C", "messages": messages}
    assert choice.verify(record, "\\boxed{the wall}").correct
    assert choice.verify({"ground_truth": "J"}, "J").correct


@pytest.mark.parametrize(
    ("truth", "completion"),
    [
        ("9.81 m/s^2", "\\boxed{9.8 \\, \\text{m/s}^2}"),
        ("9.81 m/s^2", "The answer is 981 cm s^{-2}."),
        ("9.81 m/s^2", "The answer is 9.81."),
        ("9.81", "\\boxed{g = 9.81\\ \\mathrm{m\\,s^{-2}}}"),
        ("1.6e-19 C", "$\\boxed{1.6 \\times 10^{-19}\\,\\mathrm{C}}$"),
        ("1.6e-19 C", "\\boxed{0.16 aC}"),
        ("1.6e-19 C", "Answer: 1.6 × 10⁻¹⁹ C"),
        ("3000 kJ/mol", "\\boxed{3,000\\;\\mathrm{kJ\\,mol^{-1}}}"),
        ("3000 kJ/mol", "**Answer: 3.0 MJ per mole**"),
        ("8.314 J/(mol K)", "\\boxed{8.314\\ \\mathrm{J \\cdot mol^{-1} \\cdot K^{-1}}}"),
        ("25 °C", "\\boxed{298.15\\text{ K}}"),
        ("300 K", "The final answer is 26.85 ^\\circ C"),
        ("0 °C", "\\boxed{32 °F}"),
        ("4.7 kΩ", "\\boxed{4700\\ \\Omega}"),
        ("12 μm", "\\boxed{12\\,\\mu\\mathrm{m}}"),
        ("2.5 nm", "\\boxed{25 Å}"),
        ("90 degrees", "\\boxed{\\pi}\n\\boxed{1.5708 rad}"),
        ("90", "\\boxed{90^\\circ}"),
        ("100 km/h", "\\boxed{27.78 Meters per second}"),
        ("1 atm", "\\boxed{101325\\ \\text{Pa}}"),
        ("1 eV", "\\boxed{1.602e-19 J}"),
        ("0.5", "\\boxed{50\\%}"),
        ("50", "\\boxed{50\\%}"),
        ("0.75", "\\boxed{\\frac{3}{4}}"),
        ("0.75", "The answer is 3/4."),
        (42, "The answer is 42, because 6 times 7 is 42."),
        (2.0, "\\boxed{2}"),
        ("3 apples", "\\boxed{3 apple}"),
        ("-5 V", "\\boxed{−5\\,V}"),
        ("5 m/s", "It moves at\n5 m/s"),
        ("5 m/s", "The answer is approximately 5.0 m/s (to two figures)."),
        ("1e-5 mol/L", "\\boxed{10^{-5} M}"),
        ("0", "\\boxed{0.0}"),
    ],
)
def test_equal_quantities_are_accepted(truth, completion):
    verdict = number(completion, truth)
    assert verdict.correct, verdict


@pytest.mark.parametrize(
    ("truth", "completion"),
    [
        ("9.81 m/s^2", "\\boxed{9.6 m/s^2}"),
        ("9.81 m/s^2", "\\boxed{9.81 m/s}"),
        ("9.81 m/s^2", "\\boxed{9.81 km/s^2}"),
        ("9.81 m/s^2", "\\boxed{-9.81 m/s^2}"),
        ("1.6e-19 C", "\\boxed{1.7e-19 C}"),
        ("1.6e-19 C", "\\boxed{0 C}"),
        ("1.6e-19 C", "\\boxed{10^{-19} C}"),
        ("25 °C", "\\boxed{27 °C}"),
        ("25 °C", "\\boxed{25 K}"),
        ("5 mg", "\\boxed{5 Mg}"),
        ("5", "\\boxed{5, 6}"),
        ("5", "\\boxed{5 or 6}"),
        ("5", "The answer is 5, 6."),
        ("5", "The answer is 5 or 6."),
        ("5", "The answer is 5 (or 6)."),
        ("5", "The answer is between 5 and 6."),
        ("5", "The answer is not 5."),
        ("5", "\\boxed{55}"),
        ("5", "\\boxed{5^2}"),
        ("5", "\\boxed{1.5.5}"),
        ("0.5", "\\boxed{0.5\\%}"),
        ("0", "\\boxed{1e-300}"),
        ("5 m", "\\boxed{5 apples}"),
        ("1", "\\boxed{1e400}"),
        ("1", "\\boxed{1/0}"),
        ("1", "\\boxed{nan}"),
        ("1", "\\boxed{}"),
    ],
)
def test_other_quantities_are_not(truth, completion):
    verdict = number(completion, truth)
    assert not verdict.correct, verdict
    assert verdict.outcome in (Outcome.WRONG, Outcome.NO_ANSWER)


def test_settings_of_quantities():
    assert number("\\boxed{104}", "100", rel_tol=0.05).correct
    assert not number("\\boxed{104}", "100").correct
    assert not number("\\boxed{100.1}", "100", rel_tol=0).correct
    assert number("\\boxed{0.005 km}", "5 m", rel_tol=0).correct
    exact = {"ground_truth": "100", "rel_tol": 0}
    assert not choice.verify(exact, "\\boxed{100.5}").correct
    assert number("\\boxed{5}", "5 m").correct
    assert number("\\boxed{5}", "5 m", require_unit=True).detail == "has no unit"
    assert number("\\boxed{5}", "5", require_unit=True).correct
    assert number("so it is 1,234 then", "1234").outcome is Outcome.NO_ANSWER
    assert number("so it is 1,234 then", "1234", last_number=True).correct


@given(
    value=st.floats(-1e12, 1e12).filter(lambda value: value == 0 or abs(value) > 1e-12),
    prefix=st.sampled_from(["", "k", "m", "u", "G"]),
    unit=st.sampled_from(["m", "J", "Pa", "mol", "V"]),
)
@settings(max_examples=200, deadline=None)
def test_a_quantity_equals_itself_in_another_prefix(value, prefix, unit):
    size = choice_units.PREFIXES.get(prefix, 1.0)
    truth = choice_units.Quantity(value, unit)
    answer = choice_units.read(f"{value / size!r} {prefix}{unit}")
    assert answer is not None
    assert choice_units.equal(answer, truth, rel_tol=0)
    assert choice_units.equal(choice_units.Quantity(2 * value, unit), truth, rel_tol=0.4) == (
        value == 0
    )


# Options in prompts


def records(count, truth="A"):
    return [
        {
            "id": i,
            "prompt": f"Question {i}?\n\n{choice_options.render(CELL)}",
            "ground_truth": truth,
        }
        for i in range(count)
    ]


def test_a_set_whose_answers_are_all_a_is_refused_unless_shuffled():
    with pytest.raises(
        ValueError, match=r"all 20 choice records have the answer 'A'.*shuffle_seed"
    ):
        choice_options.prepare(records(20), shuffle_seed=None)
    shuffled = choice_options.prepare(records(200), shuffle_seed=0)
    counts = collections.Counter(record["ground_truth"] for record in shuffled)
    assert set(counts) == set("ABCD") and min(counts.values()) > 25
    assert choice_options.prepare(records(7), shuffle_seed=None) == records(7)
    mixed = records(20) + records(1, "B")
    assert choice_options.prepare(mixed, shuffle_seed=None) == mixed


def test_shuffled_records_keep_their_question_options_and_truth():
    for record in records(50):
        moved = choice_options.shuffle(record, seed=3)
        assert sorted(moved["options"]) == sorted(CELL)
        assert moved["options"]["ABCD".index(moved["ground_truth"])] == CELL[0]
        before, options, after = choice_options.split(moved["prompt"])
        assert (before, options, after) == (f"Question {record['id']}?\n\n", moved["options"], "")
        assert choice.verify(moved, f"\\boxed{{{moved['ground_truth']}}}").correct
        assert choice.verify(moved, f"The answer is {CELL[0]}.").correct


def test_the_order_depends_on_the_seed_and_the_record_alone():
    one, two = records(2)
    assert choice_options.shuffle(one, seed=1) == choice_options.shuffle(dict(one), seed=1)
    orders = {tuple(choice_options.shuffle(one, seed=seed)["options"]) for seed in range(50)}
    assert len(orders) > 10
    assert choice_options.prepare([one, two], shuffle_seed=1) == [
        choice_options.shuffle(record, seed=1) for record in (one, two)
    ]
    # Pinned, so that a set does not change its right letters with a version of Python.
    assert choice_options.shuffle(one, seed=0)["ground_truth"] == "D"


def test_options_outside_the_prompt_are_put_into_it():
    record = {"prompt": "Why?", "options": ["x", "y"], "ground_truth": "x"}
    seen = {choice_options.shuffle(record, seed=seed)["prompt"] for seed in range(20)}
    assert seen == {"Why?\n\nA) x\nB) y", "Why?\n\nA) y\nB) x"}


def test_messages_are_shuffled_in_the_last_user_message_and_not_in_place():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    record = {"messages": messages, "ground_truth": "B"}
    moved = choice_options.shuffle(record, seed=1)
    assert messages[1]["content"] == PROMPT
    assert moved["messages"][0] == messages[0]
    assert sorted(choice_options.split(moved["messages"][1]["content"])[1]) == sorted(
        ["the nucleus", "the mitochondrion", "the wall", "none"]
    )


@pytest.mark.parametrize("last", ["All of the above", "Both A and B", "None of these", "A and C"])
def test_options_that_speak_of_others_stay_where_they_are(last):
    record = {"prompt": "Why?", "options": ["x", "y", "z", last], "ground_truth": "D"}
    assert choice_options.shuffle(record, seed=5) == record


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Q\nA. x\nB. y\n\nThink.", ("Q\n", ["x", "y"], "\n\nThink.")),
        ("(A) x\n(B) y\nmore\n(C) z", ("", ["x", "y\nmore", "z"], "")),
        ("A) old\nB) old\n\nQ\nA: x\nB: y", ("A) old\nB) old\n\nQ\n", ["x", "y"], "")),
        ("A) only one", ("A) only one", [], "")),
        ("A) x\nC) y", ("A) x\nC) y", [], "")),
        ("No options", ("No options", [], "")),
    ],
)
def test_prompts_are_cut_at_their_last_list_of_options(prompt, expected):
    assert choice_options.split(prompt) == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, r"record 'without id': ground_truth = None: must be an option letter"),
        ({"ground_truth": True}, r"ground_truth = True: must be"),
        ({"ground_truth": ""}, r"ground_truth = '': must be"),
        ({"ground_truth": ["A"]}, r"ground_truth = \['A'\]: must be"),
        ({"id": 7, "ground_truth": "Q"}, r"record 7: ground_truth = 'Q': is neither an option"),
        ({"ground_truth": "2\\pi"}, r"ground_truth = '2.*pi': is neither an option letter nor a"),
        ({"ground_truth": "E", "options": CELL}, r"neither a letter nor the text of one of its 4"),
        ({"ground_truth": "A", "options": "ABCD"}, r"options must be a list of texts"),
        ({"ground_truth": "A", "options": ["x", " "]}, r"options must be a list of texts"),
        ({"ground_truth": "A", "options": ["x"]}, r"1 options: must be 2 to 26"),
        ({"ground_truth": "A", "options": ["x", " X."]}, r"two options read the same"),
        ({"ground_truth": "A", "options": ["B", "A"]}, r"'A': is letter A and also the text of op"),
        ({"ground_truth": "A", "prompt": 3}, r"has no prompt text and no user message"),
        ({"ground_truth": "A", "rel_tol": 0.5}, r"rel_tol = 0.5: must be a number from 0 to"),
        ({"ground_truth": "A", "rel_tol": "1"}, r"rel_tol = '1': must be a number"),
    ],
)
def test_bad_records_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        choice.verify(record, "A")


def test_a_record_without_options_cannot_be_shuffled():
    for record in (
        {"id": 1, "prompt": "Q", "ground_truth": "A"},
        {"prompt": "Q", "ground_truth": 3},
    ):
        with pytest.raises(ValueError, match="no options to shuffle, in `options` or prompt"):
            choice_options.shuffle(record, seed=0)
    numbers = [{"prompt": "Q", "ground_truth": "3 m"}]
    assert choice_options.prepare(numbers, shuffle_seed=0) == numbers


HOSTILE = {
    "braces": "\\boxed" + "{" * 1_000_000,
    "boxes": "\\boxed{" * 140_000,
    "null bytes": "\0" * 240_000,
    "digits": "The answer is " + "9" * 240_000,
    "statements": "answer is " * 100_000,
    "letters": "A) B) C) D) " * 20_000,
    "one line": "x" * 240_000 + " the answer is",
    "blank space": "answer is" + " " * 240_000 + "B",
    "commas": "\\boxed{" + "1,234" * 300 + "}",
    "garbage": "".join(map(chr, range(32, 55_000))) * 4,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "record", [{"ground_truth": "B", "options": CELL}, {"ground_truth": "5 m"}]
)
def test_hostile_completions_are_wrong_and_quick(name, record):
    started = time.process_time()
    verdict = choice.verify(record, HOSTILE[name], last_number=True)
    assert time.process_time() - started < 1.0
    assert not verdict.correct
