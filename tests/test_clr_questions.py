"""What is asked about completions, and what is read from replies."""

import pytest

from vibejax import clr_questions, config_file
from vibejax.clr_questions import (
    Questions,
    ask_for_claims,
    ask_for_verdict,
    read_claims,
    read_verdict,
)
from vibejax.config_file import ConfigError
from vibejax.locations import resolve

SHORT = Questions(
    extraction="{{count}} of {{ problem }}: {{completion}} {{mark}}",
    checking="{{problem}}, {{claim}}",
)


def shipped():
    return config_file.load(Questions, resolve("package:vibejax/clr_questions.toml"))


def test_texts_are_put_in_as_they_are():
    (message,) = ask_for_claims(SHORT, "p {{completion}}", r"\1 {{problem}} {{x}}", 5)
    assert message["role"] == "user"
    text, mark = message["content"].rsplit(" ", 1)
    assert text == r"5 of p {{completion}}: \1 {{problem}} {{x}}" and len(mark) == 6
    (message,) = ask_for_verdict(SHORT, "p", "{{problem}}")
    assert message["content"] == "p, {{problem}}"


def test_no_text_can_know_the_mark_that_ends_it():
    marks = {ask_for_claims(SHORT, "p", text, 5)[0]["content"][-6:] for text in ("a", "b", "c")}
    assert len(marks) == 3


def test_the_shipped_questions_show_all_they_are_about():
    questions = shipped()
    (asked,) = ask_for_claims(questions, "THE PROBLEM", "THE COMPLETION", 5)
    for part in ("THE PROBLEM", "THE COMPLETION", " 5 "):
        assert part in asked["content"]
    (asked,) = ask_for_verdict(questions, "THE PROBLEM", "THE CLAIM")
    assert "THE PROBLEM" in asked["content"] and "THE CLAIM" in asked["content"]
    assert "{{" not in asked["content"]


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("1. a\n2. b\n3. c", ["a", "b", "c"]),
        ("1. a\n2. b\n3. c\n4. d", ["a", "b", "c"]),  # more than were asked for
        ("Claims:\n\n  1) a\n  2) b\n\nThat is all.", ["a", "b"]),
        ("**1.** a\n- **2.** b\n### 3. **c**", ["a", "b", "c"]),
        ("Claim 1: a\n**Claim 2:** b\r\n", ["a", "b"]),
        ("<think>1. x\n2. y\n3. z</think>\n1. a\n2. b", ["a", "b"]),
        ("1. step\n2. step two\nSo:\n1. a\n2. b", ["a", "b"]),  # the last of equals
        ("1. a\n2. b\n3. c\n1. a", ["a", "b", "c"]),  # begins again and stops
        ("1. a\n3. c\n2. b", ["a"]),
        ("1. a\n2. a\n3. b", ["a", "b"]),
        ("1. a\n2. ...\n3. c", ["a"]),
        ("1.5 apples\n2 pears", []),
        ("0. a\n1 a\na. b", []),
        ("<think>1. a\n2. b", []),  # never came to an end
        ("", []),
    ],
)
def test_claims_are_numbered_lines(reply, expected):
    assert read_claims(reply, 3, complete=True) == expected


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("Verdict: TRUE", True),
        ("Verdict: FALSE", False),
        ("2 + 2 is 5.\n\n**Verdict: false.**\n", False),
        ("**Verdict:** `TRUE`", True),
        ("True.", True),
        ("Verdict: TRUE\nOn second thought:\nVerdict: FALSE", False),
        ("<think>\nVerdict: TRUE\n</think>\nVerdict: FALSE", False),
        ("Verdict: TRUE or FALSE", None),
        ("The answer is 3.\n\nThe claim is false.", False),
        ("The verdict is: **TRUE**", True),
        ("The claim is not true", None),
        ("The claim is true of 3", None),
        ("Verdict: TRUE, since 2 + 2 = 4", None),
        ("Verdict: untrue", None),
        ("<think>\nVerdict: TRUE", None),
        ("", None),
    ],
)
def test_a_verdict_is_a_line_of_its_own(reply, expected):
    assert read_verdict(reply, complete=True) is expected


def test_the_last_line_of_a_reply_that_was_cut_is_not_read():
    assert read_claims("1. a\n2. b\n3. the sum is 1", 3, complete=False) == ["a", "b"]
    assert read_verdict("Verdict: TRUE\nVerdict: FALSE", complete=False) is True


def test_long_replies_are_read_in_linear_time():
    for reply in (" " * 200_000, "*" * 200_000, "1" * 200_000, "verdict" * 50_000, "{{" * 100_000):
        assert read_claims(reply, 5, complete=True) == []
        assert read_verdict(reply, complete=True) is None


@pytest.mark.parametrize(
    "change, message",
    [
        (("{{claim}}", "claim"), "q.toml: checking has no {{claim}} in it"),
        (("{{completion}}", ""), "q.toml: extraction has no {{completion}} in it"),
        (
            ("{{count}}", "{{count}} {{answer}}"),
            "q.toml: extraction has {{answer}}, which is none of completion, count, mark, problem",
        ),
        (("checking =", "cheking ="), "q.toml: checking is required"),
        (("'''", "'"), "q.toml: not valid TOML"),
    ],
)
def test_wording_that_cannot_be_used_is_named(change, message, tmp_path):
    path = tmp_path / "q.toml"
    text = resolve("package:vibejax/clr_questions.toml").read_text()
    path.write_text(text.replace(*change))
    with pytest.raises(ConfigError) as error:
        config_file.load(clr_questions.Questions, path)
    assert message in str(error.value)
