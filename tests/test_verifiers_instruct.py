"""Instruction rules: by hand, their bad input, hostile texts, IFEval's file format."""

# ruff: noqa: RUF001 - texts in many scripts are meant as they stand here

import json
import time
from pathlib import Path

import pytest

from vibejax.verifiers import (
    Outcome,
    ifbench_formats,
    ifbench_words,
    instruct,
    instruct_ifeval,
    instruct_text,
    language,
)

LANGUAGES = json.loads(
    (Path(__file__).parent / "data" / "human_rights_article_1.json").read_text(encoding="utf-8")
)
TABLE = "| a | b |\n|---|:-:|\n| 1 | 2 |\n| 3 | 4 |"


def record(*rules):
    return {
        "instruction_id_list": [rule_id for rule_id, _ in rules],
        "kwargs": [kwargs for _, kwargs in rules],
    }


def follows(rule_id, kwargs, text, *, loose=False):
    return instruct.follow(instruct.rules(record((rule_id, kwargs))), text, loose=loose)[0]


# One line a decision: rule, kwargs, a text that follows it, a text that does not.
BY_HAND = [
    ("keywords:existence", {"keywords": ["sun", "Rain"]}, "SUNNY, then rain", "only sun"),
    (
        "keywords:frequency",
        {"keyword": "cat", "frequency": 2, "relation": "less than"},
        "A cat.",
        "A cat, two cats.",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "Concatenate.", "A Cat."),
    (
        "keywords:letter_frequency",
        {"letter": "Q", "let_frequency": 2, "let_relation": "at least"},
        "quick Q",
        "quick",
    ),
    ("language:response_language", {"language": "de"}, LANGUAGES["de"], LANGUAGES["en"]),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "Dr. No left. She stayed.",
        "Dr. No left at 3.15 p.m. sharp.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", "a\n\nb"),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "two words",
        "now three words",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "hello"},
        "Some text\n\n'Hello, you",
        "Hello\n\nsome text",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "HI"},
        "hi! You",
        "hi\n\nyou",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[][b]", "[a [b]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\np. p. s. y", "P.S. y"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b"),
    ("detectable_format:constrained_response", {}, "My answer is no. Sorry.", "No."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and **b**",
        "*a* and ** **",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Part", "num_sections": 2},
        "Part 1 a Part2 b",
        "Part 1 a Part b",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', '{"a": 1} is it'),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>\n<<A\ntitle>>"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:two_responses", {}, "******a******b******", "a******b******c"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Do it."}, " do it. Done", "I do it."),
    ("startend:end_checker", {"end_phrase": "The end."}, '"x, the END."', "The end. Bye"),
    ("startend:quotation", {}, '"a"\n', '"'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        "NASA's X-RAY is U.S. made",
        "Nasa made AN X-ray",
    ),
    ("change_case:english_capital", {}, LANGUAGES["en"].upper(), LANGUAGES["de"].upper()),
    ("change_case:english_lowercase", {}, LANGUAGES["en"].lower(), LANGUAGES["en"]),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
    ("format:json", {"keys": ["a"]}, '```\n{"a": []}\n```', '{"b": 1}'),
    ("format:json", {}, "[1, 2]", "[NaN]"),
    ("format:json", {}, '{"a": 1}', '{"a": 1, "a": 2}'),
    ("format:json", {}, '{"a": 1}', '"a"'),
    ("format:markdown", {}, f"# A\n\n{TABLE}", f"# A\n\n{TABLE}\n| 5 |"),
    ("format:markdown", {}, "- **a**", "- **a"),
    ("format:markdown", {}, "```\nx\n```", "```\nx"),
    ("format:markdown", {}, "## A", "##A\n- b"),
    ("format:markdown", {}, "1. a", "just words"),
    ("format:table", {"num_columns": 2, "at_least": 2, "at_most": 2}, TABLE, TABLE + "\n| 5 | 6 |"),
    ("format:table", {"columns": ["A", "b"]}, TABLE, TABLE.replace("b", "c")),
    ("format:table", {}, "a \\| b | c\n--|--\n1|2", "a | b\n---\n1 | 2"),
    ("format:code_block", {"language": "Python"}, "```python\nx\n```", "```\nx\n```"),
    ("order:keywords", {"keywords": ["one", "two"]}, "One, then two", "two, then one"),
    ("order:headings", {"headings": ["A", "C"]}, "# a\n# b\n# c #", "# c\n# a"),
    ("order:items", {"order": "ascending"}, "- **ant**\n- Bee", "- bee\n- ant"),
    ("order:items", {"order": "descending"}, "1. b\n2. a", "1. b"),
    ("order:numbered_list", {"at_least": 2}, "1. a\n\ntext\n\n2) b", "1. a\n3. b"),
    ("count:list_items", {"at_least": 2, "at_most": 2}, "- a\n1. b", "- a\n- b\n- c"),
    ("count:headings", {"level": 2, "at_most": 1}, "# a\n## b", "## a\n## b"),
    ("count:questions", {"at_least": 2}, "Who? Me?", "Who? Me."),
    ("keyword:count", {"keyword": "cat", "at_most": 1}, "a cat concatenates", "Cat, cat"),
    (
        "keyword:in_sentence",
        {"keyword": "cat", "nth_sentence": -1},
        "Dogs bark. A cat meows.",
        "A cat meows. Dogs bark.",
    ),
    ("keyword:in_every_paragraph", {"keyword": "cat"}, "# A\n\na cat\n\nthe cat", "a cat\n\na dog"),
    ("completion:parts", {"parts": ["Pro:", "Con:"]}, "Pro: good\nCon: bad", "Pro: \nCon: bad"),
    ("completion:finished", {}, 'He said "done."', "He said"),
    ("completion:finished", {}, "```\nx\n```", "```\nx."),
    ("completion:no_filler", {}, "Dear [sic] Ann", "Dear [your name]"),
    ("completion:start", {"phrase": "Dear"}, " dear Ann", "My dear"),
    (
        "language:every_paragraph",
        {"language": "fr"},
        LANGUAGES["fr"],
        f"{LANGUAGES['fr']} {LANGUAGES['fr']}\n\n{LANGUAGES['en']}",
    ),
    ("language:script", {"script": "latin"}, "Déjà vu: 3?", "Is it 是?"),
    ("length:words", {"at_least": 2, "at_most": 3}, "two words", "these are four words"),
    (
        "length:sentences",
        {"at_most": 3},
        "1. One\n2. Two.\n\nThree",
        "# Zero\nOne. Two.\n- Three\n- Four",
    ),
    ("length:sentence_words", {"at_most": 2}, "One two. Three.", "One two three. Four."),
    ("length:paragraphs", {"at_least": 2}, "# A\n\none\n\n- two", "# A\n\none\n\n```\ntwo\n```"),
    ("length:characters", {"at_most": 3}, " abc ", "abcd"),
]


@pytest.mark.parametrize(("rule_id", "kwargs", "good", "bad"), BY_HAND)
def test_rules_by_hand(rule_id, kwargs, good, bad):
    assert follows(rule_id, kwargs, good)
    assert not follows(rule_id, kwargs, bad)


def test_every_rule_has_an_example_by_hand():
    published = ifbench_words.RULES | ifbench_formats.RULES  # have tests of their own
    assert {rule_id for rule_id, *_ in BY_HAND} == set(instruct.RULES) - set(published)
    assert len(instruct_ifeval.RULES) == 25


@pytest.mark.parametrize("code", sorted(LANGUAGES))
def test_every_language_of_ifeval_is_told_apart(code):
    assert language.detect(LANGUAGES[code]) == code


def test_capitals_do_not_hide_a_language_and_digits_have_none():
    assert language.detect("LET US GO HOME NOW MY DEAR") == "en"
    assert language.detect("12345 - 67") is None


def test_language_codes_are_normalised():
    assert language.code("zh-cn") == "zh"
    assert language.code("nb") == "no"
    assert language.code("DE_at") == "de"
    with pytest.raises(ValueError, match=r"language = 'xx': must be one of af, ar"):
        language.code("xx")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three? Four", 4),
        ("He paid $4.50 to J. Smith of Acme Inc. on Jan. 5.", 1),
        ("In the U.S. and in the U.K. it rains. The rest is dry.", 2),
        ("It closed at 5 p.m. The crowd left.", 2),
        ('"Stop!" he said. (He left.) Then: nothing...', 4),
        ("wait... and see", 1),
        ("Fruit, e.g. apples, pears, etc. is cheap.", 1),
        ("***\n---\n!!!", 0),
        ("今天下雨。我在家！", 2),
        ("", 0),
    ],
)
def test_sentences_by_hand(text, count):
    assert len(instruct_text.sentences(text)) == count


def test_sentences_are_cut_after_their_closing_marks():
    assert instruct_text.sentences(' "Go!" (He left.)\n*Really?*  ') == [
        '"Go!"',
        "(He left.)",
        "*Really?*",
    ]
    assert instruct_text.block_sentences("# No. 1\nOne\ntwo. Three\n\n2. Four") == [
        "One\ntwo.",
        "Three",
        "Four",
    ]


def test_blocks_read_markdown_in_one_pass():
    found = instruct_text.blocks(
        f"# Title #\n\nIntro\n- a\n2. b\n\n{TABLE}\n\n~~~Py x\n# no heading\n```\n~~~\n\n***\n```"
    )
    assert [(heading.level, heading.text) for heading in found.headings] == [(1, "Title")]
    assert [(item.number, item.text) for item in found.items] == [(None, "a"), (2, "b")]
    assert found.tables == (instruct_text.Table(("a", "b"), (("1", "2"), ("3", "4"))),)
    assert found.fences == (
        instruct_text.Fence("py x", "# no heading\n```", True),
        instruct_text.Fence("", "", False),
    )
    assert found.paragraphs == ("Intro\n- a\n2. b", TABLE)
    found = instruct_text.blocks("a\n \t\nb|c\\|\n-|-\nd\n~~~ Sh\n~~~ x\n")
    assert found.paragraphs == ("a", "b|c\\|\n-|-\nd")
    assert found.tables == (instruct_text.Table(("b", "c\\|"), ()),)
    assert found.fences == (instruct_text.Fence("sh", "~~~ x\n", False),)


@pytest.mark.parametrize(
    "text", ["Sure!\nwanted", "wanted\nBye!", "Sure!\nwanted\nBye!", "**wanted**", "Hi\n*wanted*"]
)
def test_loose_forgives_a_first_line_a_last_line_and_asterisks(text):
    kwargs = {"end_phrase": "wanted"}
    rules = record(("combination:repeat_prompt", {"prompt_to_repeat": "wanted"}))
    rules = record(*zip(rules["instruction_id_list"], rules["kwargs"], strict=True))
    listed = instruct.rules(rules) + instruct.rules(record(("startend:end_checker", kwargs)))
    assert instruct.follow(listed, text, loose=True) == [True, True]
    assert instruct.follow(listed, text, loose=False) != [True, True]


def test_verdict_says_what_was_not_followed():
    two = record(("punctuation:no_comma", {}), ("startend:quotation", {}))
    verdict = instruct.verify({"ground_truth": two}, "a b")
    assert (verdict.correct, verdict.reward, verdict.outcome) == (False, 0.0, Outcome.WRONG)
    assert verdict.answer == "1 of 2 rules followed"
    assert verdict.detail == "not followed: startend:quotation"
    assert instruct.verify(two, "a b", partial=True).reward == 0.5
    good = instruct.verify({"ground_truth": json.dumps(two)}, '"a b"')
    assert (good.correct, good.reward, good.detail) == (True, 1.0, "")
    assert instruct.verify(two, 'Sure!\n"a b"').correct is False
    assert instruct.verify(two, 'Sure!\n"a b"', mode="loose").correct is True


def test_thinking_is_not_judged_and_its_end_must_come():
    rule = record(("punctuation:no_comma", {}))
    assert instruct.verify(rule, "<think>a, b</think>\nfine").correct
    assert instruct.verify(rule, "a, b</think> fine").correct
    for cut in ("<think>no comma here", "<think>x</think>\n ", "", " \n"):
        assert instruct.verify(rule, cut).outcome is Outcome.NO_ANSWER


def test_kwargs_as_tables_store_them_are_read():
    filled = {"num_words": 3.0, "relation": "less than", "keyword": None, "letter": None}
    assert follows("length_constraints:number_words", filled, "two words")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, r"instruction_id_list = None: must be a list of at least one id"),
        ({"ground_truth": "{"}, r"ground_truth = '\{': must be JSON"),
        ({"ground_truth": 3}, r"ground_truth = 3: must be an object"),
        (record(), r"instruction_id_list = \[\]: must be a list"),
        ({"instruction_id_list": ["a"], "kwargs": []}, r"kwargs = \[\]: must be a list of 1"),
        (record(("no:rule", {})), r"instruction id 'no:rule' is unknown, known are keywords:exist"),
        (record((["x"], {})), r"instruction id \['x'\] is unknown"),
        (record(("startend:quotation", 3)), r"startend:quotation: kwargs = 3: must be an object"),
        (record(("startend:quotation", {"x": 1})), r"unknown kwarg 'x', it takes none"),
        (record(("keywords:existence", {})), r"keywords:existence: kwarg 'keywords' is missing"),
        (record(("keywords:existence", {"keywords": "a"})), r"keywords = 'a': must be a list of"),
        (record(("keywords:existence", {"keywords": []})), r"keywords = \[\]: must be a list of"),
        (record(("keywords:existence", {"keywords": [" "]})), r"must not hold a blank text"),
        (record(("startend:end_checker", {"end_phrase": ""})), r"end_phrase = '': must be text"),
        (
            record(("length_constraints:number_paragraphs", {"num_paragraphs": True})),
            r"num_paragraphs = True: must be a whole number",
        ),
        (
            record(("length_constraints:number_paragraphs", {"num_paragraphs": 1.5})),
            r"num_paragraphs = 1.5: must be a whole number",
        ),
        (
            record(("length_constraints:number_paragraphs", {"num_paragraphs": float("inf")})),
            r"num_paragraphs = inf: must be a whole number",
        ),
        (
            record(("length_constraints:number_paragraphs", {"num_paragraphs": -1})),
            r"num_paragraphs = -1: must not be negative",
        ),
        (
            record(("length_constraints:number_words", {"num_words": 1, "relation": "exactly"})),
            r"number_words: relation = 'exactly': must be one of less than, at least",
        ),
        (
            record(
                (
                    "keywords:letter_frequency",
                    {"letter": "ab", "let_frequency": 1, "let_relation": "at least"},
                )
            ),
            r"letter = 'ab': must be one character",
        ),
        (
            record(
                (
                    "length_constraints:nth_paragraph_first_word",
                    {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"},
                )
            ),
            r"nth_paragraph = 3: must be 1 to 2",
        ),
        (
            record(("language:response_language", {"language": "klingon"})),
            r"language:response_language: language = 'klingon': must be one of",
        ),
        (record(("length:words", {})), r"length:words: at_least, at_most: one of them must be"),
        (
            record(("length:words", {"at_least": 3, "at_most": 2})),
            r"at_least = 3: must not exceed at_most = 2",
        ),
        (record(("order:items", {"order": "up"})), r"order = 'up': must be one of ascending"),
        (record(("language:script", {"script": "runes"})), r"script = 'runes': must be one of lat"),
        (
            record(("keyword:in_sentence", {"keyword": "a", "nth_sentence": 0})),
            r"nth_sentence = 0: must be 1 or more",
        ),
    ],
)
def test_bad_records_are_refused_whatever_the_text_is(bad, message):
    for text in ("", "some text"):
        with pytest.raises(ValueError, match=message):
            instruct.verify(bad, text)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode = 'lax': must be one of strict, loose"):
        instruct.verify(record(("startend:quotation", {})), "x", mode="lax")


KWARGS = {rule_id: kwargs for rule_id, kwargs, *_ in BY_HAND}
HOSTILE = {
    "null bytes": "\0" * 240_000,
    "brackets": "[" * 240_000,
    "braces": "{" * 1_000_000,
    "asterisks": "*" * 240_000,
    "open titles": "<<" * 120_000,
    "blank space": " " * 240_000 + "x",
    "line breaks": "\n" * 240_000 + "x",
    "one word": "a" * 240_000,
    "capitals": "A'S" * 80_000,
    "digits": "9" * 240_000,
    "periods": ". " * 120_000,
    "marks": "?!" * 120_000,
    "fences": ("```" + " " * 50 + "`\n") * 4_000,
    "a long fence": "```" + " " * 240_000 + "`",
    "a long heading": "#" + " " * 240_000,
    "a long item": "-" + " " * 240_000,
    "bars": "|" * 120_000 + "\n" + "|-" * 60_000,
    "dashes": "-|\n" * 80_000,
    "sections": "Part " * 48_000,
    "lone surrogates": "\ud800 \udfff" * 40_000,
    "every script": "".join(map(chr, range(32, 60_000))),
    "sixty thousand tokens": "the quick, [brown] *fox* jumps. " * 12_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_take_every_rule_under_two_seconds_in_all(name):
    rules = instruct.rules(record(*KWARGS.items()))
    instruct.load()
    started = time.process_time()
    instruct.follow(rules, HOSTILE[name], loose=False)
    assert time.process_time() - started < 2.0
