"""The rules of IFEval against lm-eval's implementation, on generated texts and its own sentences.

lm-eval's files are loaded by path: importing `lm_eval.tasks` would import its whole harness. They
split sentences with NLTK's English Punkt model, which lm-eval downloads; here it comes out of the
wheel of llama-index-core, which ships NLTK's files unchanged. Both wheels' own dependencies are
not needed; beside the extra `parity`:

    pip install --no-deps lm-eval==0.4.13 llama-index-core==0.14.25

`DIFFERENCES` lists where we decide otherwise, and why. Each is shown by an example, and a
generated case on which the two disagree must fall under one of them.
"""
# ruff: noqa: RUF001 - texts in many scripts are meant as they stand here

import collections
import dataclasses
import importlib
import importlib.util
import json
import random
import re
import sys
import types
from pathlib import Path

import pytest

from vibejax.verifiers import instruct, instruct_ifeval, instruct_text

CASES_PER_RULE = 120
LANGUAGES = json.loads(
    (Path(__file__).parents[1] / "data" / "human_rights_article_1.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def lm_eval():
    """lm-eval's IFEval functions, reading the Punkt model from an installed wheel."""
    import langdetect
    import nltk

    (llama_index,) = importlib.util.find_spec("llama_index.core").submodule_search_locations
    nltk.data.path[:] = [str(Path(llama_index) / "_static" / "nltk_cache")]
    langdetect.DetectorFactory.seed = 0  # langdetect draws from a random generator
    (root,) = importlib.util.find_spec("lm_eval").submodule_search_locations
    for name in ("lm_eval.tasks", "lm_eval.tasks.ifeval"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(root, *name.split(".")[1:]))]
        sys.modules[name] = package
    return importlib.import_module("lm_eval.tasks.ifeval.utils")


def reference(lm_eval, rule_id, kwargs, text, *, loose):
    example = lm_eval.InputExample(
        key=0, instruction_id_list=[rule_id], prompt="a prompt", kwargs=[kwargs]
    )
    function = (
        lm_eval.test_instruction_following_loose
        if loose
        else lm_eval.test_instruction_following_strict
    )
    return function(example, text).follow_instruction_list[0]


def ours(rule_id, kwargs, text, *, loose):
    rules = instruct.rules({"instruction_id_list": [rule_id], "kwargs": [kwargs]})
    return instruct.follow(rules, text, loose=loose)[0]


# Generated texts

NAMES = ["Maria", "Dr. Chen", "Mr. Okafor", "the council", "our team", "NASA", "Mrs. Lindqvist"]
VERBS = ["visited", "measured", "described", "reported", "forgot", "painted", "rebuilt", "sold"]
THINGS = ["the old bridge", "a river", "three gardens", "the data", "an engine", "its own map"]
TAILS = [
    "in 2019", "for $4.50", "at 3.15 p.m. sharp", "near St. Paul", "on Jan. 5", "by 12.5 percent",
    "with great care", "see www.example.com for more", "because it was cheap", "(again)",
    "in the U.S. and abroad", "which made J. Smith smile", "and then... nothing", "etc. and so on",
]  # fmt: skip
ENDS = [*"......", "!", "?", "...", ".\n", ' and said "go."', "?!"]
SHOUTS = ["WOW", "I'M", "U.S.A.", "IT'S", "A", "I", "DON'T", "X-RAY", "TCP/IP", "NATO's", "R2-D2"]
KEYWORDS = ["bridge", "river", "garden", "the", "map", "engine", "an", "care", "Chen", "team"]


def sentence(rng):
    parts = [rng.choice(NAMES), rng.choice(VERBS), rng.choice(THINGS)]
    if rng.random() < 0.5:
        parts.append(rng.choice(TAILS))
    if rng.random() < 0.2:
        parts.insert(rng.randrange(len(parts)), rng.choice(SHOUTS))
    if rng.random() < 0.2:
        parts[-1] = f"*{parts[-1]}*" if rng.random() < 0.5 else f"**{parts[-1]}**"
    if rng.random() < 0.2:
        parts[0] += ","
    text = " ".join(parts)
    return text[0].upper() + text[1:] + rng.choice(ENDS)


def prose(rng, most=6):
    return " ".join(sentence(rng) for _ in range(rng.randint(1, most)))


def listing(rng):
    mark = rng.choice(["- ", "* ", "1. ", "  - ", "** ", "• ", "-"])
    return "\n".join(mark + prose(rng, 1) for _ in range(rng.randint(1, 5)))


def document(rng):
    pieces = [
        lambda: prose(rng),
        lambda: listing(rng),
        lambda: f"# {prose(rng, 1)}",
        lambda: f"<<{rng.choice(['My title', ' ', 'a > b', ''])}>>",
        lambda: f"Section {rng.randint(1, 9)}\n{prose(rng, 2)}",
        lambda: f"[{rng.choice(['name', '', 'date of birth', 'a [nested'])}] {prose(rng, 1)}",
        lambda: rng.choice(["---", "***", "******", "* * *", "**", "*", "```", '"', "[", "]"]),
        lambda: f"{rng.choice(['P.S.', 'p. s.', 'P.P.S', 'P. P. S.', 'PS'])} {prose(rng, 1)}",
        lambda: rng.choice(instruct_ifeval.CONSTRAINED_RESPONSES),
    ]
    text = rng.choice(pieces)()
    for _ in range(rng.randint(0, 4)):
        text += rng.choice(["\n\n", "\n", " ", "\n***\n", "\n\n\n", " *** ", "\n******\n"])
        text += rng.choice(pieces)()
    style = rng.random()
    if style < 0.05:
        text = f'"{text}"'
    elif style < 0.1:
        text = text.upper()
    elif style < 0.15:
        text = text.lower()
    return text


def json_text(rng):
    value = rng.choice(
        ['{"a": [1, 2.5, null]}', "[]", '"word"', "12", "{'a': 1}", '{"a": 1,}', "NaN", "{", "true"]
    )
    fence = rng.choice(["{}", "```json\n{}\n```", "```\n{}\n```", "```JSON\n{}```", "x {}", "{}\n"])
    return fence.replace("{}", value, 1)


def near(rng, count):
    return max(1, count + rng.choice([-1, 0, 0, 1, 2]))


def case(rng, rule_id):
    """Draws a text and kwargs, with thresholds near the text's own counts."""
    text = document(rng)
    relation = rng.choice(list(instruct_ifeval.RELATIONS))
    words = re.findall(r"[A-Za-z]+", text) or ["a"]
    keyword = rng.choice([rng.choice(KEYWORDS), rng.choice(words)])
    match rule_id:
        case "keywords:existence":
            kwargs = {"keywords": [keyword, rng.choice(words)][: rng.randint(1, 2)]}
        case "keywords:frequency":
            count = text.lower().count(keyword.lower())
            kwargs = {"keyword": keyword, "frequency": near(rng, count), "relation": relation}
        case "keywords:forbidden_words":
            kwargs = {"forbidden_words": [keyword, rng.choice(KEYWORDS)]}
        case "keywords:letter_frequency":
            letter = rng.choice("abeijnqtzAQ")
            count = near(rng, text.lower().count(letter.lower()))
            kwargs = {"letter": letter, "let_frequency": count, "let_relation": relation}
        case "language:response_language":
            code = rng.choice(list(LANGUAGES))
            parts = re.split(r"(?<=[.।۔])\s", LANGUAGES[code])
            text = rng.choice([LANGUAGES[code], parts[0], "\n".join(parts)])
            wanted = code if rng.random() < 0.7 else rng.choice(list(LANGUAGES))
            kwargs = {"language": wanted}
        case "length_constraints:number_sentences":
            count = near(rng, len(instruct_text.sentences(text)))
            kwargs = {"num_sentences": count, "relation": relation}
        case "length_constraints:number_paragraphs":
            kwargs = {"num_paragraphs": near(rng, len(text.split("***")))}
        case "length_constraints:number_words":
            count = near(rng, len(instruct_text.words(text)))
            kwargs = {"num_words": count, "relation": relation}
        case "length_constraints:nth_paragraph_first_word":
            pieces = [piece.split() or ["x"] for piece in text.split("\n\n")]
            total = max(1, len(pieces) + rng.choice([0, 0, 0, -1, 1]))
            nth = rng.randint(1, total)
            first = pieces[min(nth, len(pieces)) - 1][0].strip("\"'.,!?")
            kwargs = {"num_paragraphs": total, "nth_paragraph": nth}
            kwargs["first_word"] = first or "The"
        case "detectable_content:number_placeholders":
            kwargs = {"num_placeholders": near(rng, text.count("["))}
        case "detectable_content:postscript":
            if rng.random() < 0.5:
                text += "\n" + rng.choice(["P.S. x", "p. s. x", "P.P.S x", "PS x", "P.P.S. x"])
            kwargs = {"postscript_marker": rng.choice(["P.S.", "P.P.S"])}
        case "detectable_format:number_bullet_lists":
            if rng.random() < 0.5:
                text = listing(rng)
            count = len(re.findall(r"^\s*[-*]", text, re.MULTILINE))
            kwargs = {"num_bullets": near(rng, count)}
        case "detectable_format:number_highlighted_sections":
            kwargs = {"num_highlights": near(rng, text.count("*") // 2)}
        case "detectable_format:multiple_sections":
            kwargs = {"section_spliter": rng.choice(["Section", "SECTION"]), "num_sections": 1}
            if rng.random() < 0.5:
                text = "\n".join(f"Section {i}\n{prose(rng, 1)}" for i in range(rng.randint(1, 4)))
                kwargs["num_sections"] = rng.randint(1, 4)
        case "detectable_format:json_format":
            text, kwargs = json_text(rng), {}
        case "detectable_format:title":
            if rng.random() < 0.5:
                text = f"{rng.choice(['<<', '<', 'x <<<'])}{keyword}{rng.choice(['>>', '> >'])}\n"
            kwargs = {}
        case "combination:two_responses":
            first, second = prose(rng, 1), prose(rng, 1)
            text = rng.choice([text, f"{first}******{second}", f"{first}\n******\n{first}"])
            text = rng.choice([text, "******" + text, text + "\n******", text.replace("***", "")])
            kwargs = {}
        case "combination:repeat_prompt":
            request = prose(rng, 1)
            text = rng.choice([text, f"{request}\n{text}", request.upper() + text, f" {request}"])
            kwargs = {"prompt_to_repeat": request}
        case "startend:end_checker":
            end = rng.choice([text[-12:], text[-12:].upper(), "Any other questions?"])
            kwargs = {"end_phrase": end if end.strip() else "x"}
        case "startend:quotation":
            text = rng.choice([text, f'"{text}"', f' "{text}"\n', f"“{text}”", '"'])
            kwargs = {}
        case "detectable_format:constrained_response":
            text = rng.choice([text, "My answer is yes.", "I say: My answer is maybe. OK", "No."])
            kwargs = {}
        case "change_case:capital_word_frequency":
            text = rng.choice([text, text.upper(), " ".join(rng.choices(SHOUTS, k=8))])
            count = near(rng, sum(word.isupper() for word in text.split()))
            kwargs = {"capital_frequency": count, "capital_relation": relation}
        case "change_case:english_capital":
            code = rng.choice(["en", "en", "de"])
            text = rng.choice([LANGUAGES[code], LANGUAGES["en"].upper(), text])
            kwargs = {}
        case "change_case:english_lowercase":
            code = rng.choice(["en", "en", "de", "fr", "hi"])
            text = rng.choice([LANGUAGES[code], LANGUAGES[code].lower(), text])
            kwargs = {}
        case "punctuation:no_comma":
            kwargs = {}
    return text, kwargs


# Where we decide otherwise


@dataclasses.dataclass(frozen=True)
class Difference:
    """One decision that differs: `why`, and an example with both answers.

    `reference` is None where the reference draws at random, and an exception where it fails.
    """

    why: str
    rule_id: str
    kwargs: dict
    text: str
    ours: bool
    reference: bool | type[Exception] | None


def _sentences(num_sentences):
    return {"num_sentences": num_sentences, "relation": "at least"}


DIFFERENCES = [
    Difference(
        "a keyword is literal text; the reference takes it for a pattern",
        "keywords:existence",
        {"keywords": ["a.b"]},
        "axb",
        ours=False,
        reference=True,
    ),
    Difference(
        "a keyword that is no valid pattern is still a keyword",
        "keywords:frequency",
        {"keyword": "f(x", "frequency": 1, "relation": "at least"},
        "Write f(x).",
        ours=True,
        reference=re.error,
    ),
    Difference(
        "a forbidden word may end in a mark, where no word boundary follows",
        "keywords:forbidden_words",
        {"forbidden_words": ["U.S."]},
        "In the U.S. it rains.",
        ours=False,
        reference=True,
    ),
    Difference(
        "a character other than a to z is counted; the reference counts a random letter instead",
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 2, "let_relation": "at least"},
        "No! No!",
        ours=True,
        reference=None,
    ),
    Difference(
        "a bound of zero is a bound; the reference draws a random one",
        "keywords:frequency",
        {"keyword": "rain", "frequency": 0, "relation": "at least"},
        "The sun shines.",
        ours=True,
        reference=None,
    ),
    Difference(
        "a text without letters is in no language; the reference lets digits pass for any",
        "language:response_language",
        {"language": "fr"},
        "12345",
        ours=False,
        reference=True,
    ),
    Difference(
        "capitals are lowered before the language is told; langdetect hardly reads capitals",
        "change_case:english_capital",
        {},
        "LET US GO HOME",
        ours=True,
        reference=False,
    ),
    Difference(
        "a lone asterisk is no bullet; the reference's pattern runs on into the next line",
        "detectable_format:number_bullet_lists",
        {"num_bullets": 1},
        "*\n- one",
        ours=True,
        reference=False,
    ),
    Difference(
        "a postscript marker is literal text",
        "detectable_content:postscript",
        {"postscript_marker": "N.B."},
        "The nib is sharp.",
        ours=False,
        reference=True,
    ),
    Difference(
        "a section splitter is literal text",
        "detectable_format:multiple_sections",
        {"section_spliter": "Ch.", "num_sections": 1},
        "Cha 1",
        ours=False,
        reference=True,
    ),
    Difference(
        "brackets nested beyond any parser are no JSON, and no crash",
        "detectable_format:json_format",
        {},
        "[" * 100_000,
        ours=False,
        reference=RecursionError,
    ),
    Difference(
        "CANNOT is one word; the Penn Treebank tokenizer of the reference makes it two",
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "He said CANNOT.",
        ours=False,
        reference=True,
    ),
    Difference(
        "e.g., i.e. and etc. end no sentence before a small letter; the reference's model, trained "
        "on newspapers, does not know them",
        "length_constraints:number_sentences",
        _sentences(2),
        "He likes fruit, e.g. apples.",
        ours=False,
        reference=True,
    ),
    Difference(
        "an ellipsis ends a sentence before any word that often opens one; the model knows few",
        "length_constraints:number_sentences",
        _sentences(2),
        "He left... She stayed.",
        ours=True,
        reference=False,
    ),
    Difference(
        "a piece without a letter or digit (a rule, closing asterisks) is no sentence",
        "length_constraints:number_sentences",
        _sentences(2),
        "**He left.**",
        ours=False,
        reference=True,
    ),
    Difference(
        "after an abbreviation only a word that often opens sentences starts one; the reference "
        "lets any word do so that its newspapers mostly had in small letters",
        "length_constraints:number_sentences",
        _sentences(2),
        "Prof. Strange spoke.",
        ours=False,
        reference=True,
    ),
    Difference(
        "abbreviations of references and amounts (Fig., Eq., approx.) are abbreviations",
        "length_constraints:number_sentences",
        _sentences(2),
        "See Fig. 3 below.",
        ours=False,
        reference=True,
    ),
    Difference(
        "?! is one mark; the reference takes its second half for a sentence of its own",
        "length_constraints:number_sentences",
        _sentences(2),
        "He left?!",
        ours=False,
        reference=True,
    ),
    Difference(
        "a number ends a sentence in small letters too; the reference takes it for an ordinal",
        "length_constraints:number_sentences",
        _sentences(2),
        "it began in 2019. the rest is known.",
        ours=True,
        reference=False,
    ),
    Difference(
        "a single letter ends a sentence before a word that often opens one; the reference's list "
        "has eleven letters that never do",
        "length_constraints:number_sentences",
        _sentences(2),
        "This is plan C. The rest is known.",
        ours=True,
        reference=False,
    ),
    Difference(
        "the marks of other scripts end sentences",
        "length_constraints:number_sentences",
        _sentences(2),
        "今天下雨。我在家。",
        ours=True,
        reference=False,
    ),
]
# What the differences in counting sentences hang on: once it is taken out, the counts agree.
_SENTENCE_DIFFERENCES = (
    (re.compile(r"\b(e\.g|i\.e|etc)\.", re.IGNORECASE), r"\1"),
    (re.compile(r"\.{2,}"), ""),
    (re.compile(r"\?!"), "?"),
    (re.compile(r"\b(\d+|s)\. (?=[a-z]|The |Our )", re.IGNORECASE), r"\1 "),
    (re.compile(r"(?<=[.?!])[*_]+(?=\s|$)"), ""),
    (re.compile(r"(?:(?<=\s)|^)[^\w\s]+(?=\s|$)"), ""),
    (re.compile(r"\bU\.S\.A\.", re.IGNORECASE), "USA"),
)


def _without_listed_differences(text):
    for pattern, replacement in _SENTENCE_DIFFERENCES:
        text = pattern.sub(replacement, text)
    return text


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.why[:50])
def test_listed_differences_are_as_described(lm_eval, difference):
    example = (difference.rule_id, difference.kwargs, difference.text)
    assert ours(*example, loose=False) is difference.ours
    if isinstance(difference.reference, bool):
        assert reference(lm_eval, *example, loose=False) is difference.reference
    elif difference.reference is not None:
        with pytest.raises(difference.reference):
            reference(lm_eval, *example, loose=False)


@pytest.mark.parametrize("rule_id", instruct_ifeval.RULES)
def test_generated_cases_agree(lm_eval, rule_id):
    rng = random.Random(rule_id)
    outcomes, unexplained = collections.Counter(), []
    for _ in range(CASES_PER_RULE):
        text, kwargs = case(rng, rule_id)
        for loose in (False, True):
            expected = reference(lm_eval, rule_id, kwargs, text, loose=loose)
            outcomes[expected] += 1
            if ours(rule_id, kwargs, text, loose=loose) == expected:
                continue
            if rule_id == "length_constraints:number_sentences" and _is_listed(lm_eval, text):
                outcomes["listed"] += 1
                continue
            unexplained.append((text, kwargs, loose, expected))
    assert not unexplained
    assert min(outcomes[True], outcomes[False]) >= 10, "the cases must exercise both answers"
    assert outcomes["listed"] <= 0.2 * CASES_PER_RULE * 2


def _is_listed(lm_eval, text):
    count = sys.modules["lm_eval.tasks.ifeval.instructions_util"].count_sentences
    plain = _without_listed_differences(text)
    return count(plain) == len(instruct_text.sentences(plain))


def test_the_rules_are_those_of_the_reference(lm_eval):
    assert set(instruct_ifeval.RULES) == set(lm_eval.instructions_registry.INSTRUCTION_DICT)
    assert len(instruct_ifeval.RULES) * CASES_PER_RULE >= 2_000
