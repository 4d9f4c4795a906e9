"""IFBench's rules: of each, texts that follow it and texts that do not, judged by hand."""
# ruff: noqa: RUF001 - quotes of all kinds are meant as they stand here

import time

import pytest

from vibejax import benchmarks
from vibejax.verifiers import Outcome, ifbench_formats, ifbench_words, instruct

STAIRS = "up\n we\n   go"
ALPHABET = " ".join(f"{chr(97 + i)}nts marched on day {i}." for i in range(26))
PALINDROMES = "Level radar, civic rotor kayak madam refer stats tenet solos."
COUNTRIES = "\n".join(["Zimbabwe", *(f"Country {n:02}" for n in range(53, 0, -1))])
CITIES = "ID,Country,City,Year,Count\n" + "\n".join(f"{i},Peru,Lima,2001,{i}" for i in range(7))
PRODUCTS = 'ProductID,Category,Brand,Price,Stock\n1,Tea,"A&B",2,3\n' + "\n".join(
    f"{i},Tea,Acme,2,3" for i in range(13)
)
STUDENTS = '"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"\n' + "\n".join(
    f'"{i}"\t"Art"\t"B"\t"Fall"\t"8{i}"' for i in range(3)
)
CAPITALS = ", ".join(ifbench_formats.CAPITALS)


def questions(stems=("Who?", "Who was it?", "Who was it then?", "Who was it in the end?"), count=5):
    parts = []
    for n, stem in enumerate(stems, 1):
        options = [f"{letter}) Klee" for letter in "ABCDE"[:count]]
        parts.append("\n".join([f"Question {n}: {stem}", *options]))
    return "\n\n".join(parts)


KEYWORDS = {f"keyword{i}": word for i, word in enumerate(["oak", "elm", "fir", "ash", "yew"], 1)}
KEYWORD_TEXT = "oak " + "elm " * 2 + "fir " * 3 + "ash " * 5 + "yew " * 7

CASES = {  # kwargs, texts that follow the rule, texts that do not
    "count:word_count_range": (
        {"min_words": 2, "max_words": 3.0},
        ["Two words.", "a b c"],
        ["one"],
    ),
    "count:unique_word_count": ({"N": 3}, ["Red, green red blue."], ["Red red, red green - !"]),
    "count:conjunctions": ({"small_n": 2}, ["Tea and milk, but no sugar"], ["And, and and; and-"]),
    "count:person_names": ({"N": 2}, ["Mia met Noah."], ["Mia met Mia.", "Noahs and Miami"]),
    "count:numbers": ({"N": 2}, ["In 1,000 years 2.5"], ["In 1000 years", "1 2 3"]),
    "count:punctuation": (
        {},
        ["So: a, b; c. Go! Why? What?!", "So: a, b; c. Go! Why? What‽"],
        ["So: a, b; c. Go! What?!", "So: a, b; c. Go! Why?", "?!"],
    ),
    "count:words_japanese": ({"N": 2}, ["I 日本 go カメラ.", "a 12 b"], ["I go 日本 now"]),
    "count:pronouns": ({"N": 3}, ["She/her and you"], ["She and her dog", "Them? Bob, Ann"]),
    "count:keywords_multiple": (
        KEYWORDS,
        [KEYWORD_TEXT, KEYWORD_TEXT.upper()],
        [KEYWORD_TEXT + "yew", KEYWORD_TEXT[4:]],
    ),
    "ratio:stop_words": ({"percentage": 50}, ["The cat", "Cats purr"], ["The cat and the dog"]),
    "ratio:sentence_type": ({}, ["It is. It was. Is it?"], ["It is. Is it?", "No mark at all"]),
    "ratio:sentence_balance": ({}, ["It is. Is it? Go!"], ["It is. Is it?", "No mark at all"]),
    "ratio:overlap": (
        {"reference_text": "a b c d e", "percentage": 50.0},
        ["a b c d z y", "x c d e"],
        ["a b c d e", "a b"],
    ),
    "ratio:sentence_words": (
        {},
        ["Ab cd. Ef gh! Ij kl?"],
        ["Ab cd. Ef gh! Ij ab?", "Ab. Cd.", "Ab. C. D."],
    ),
    "words:alphabet": ({}, ["Yes, zebras ate berries", "one"], ["ants can", "1 ant", "- -"]),
    "words:vowel": ({}, ["A big old dog"], ["A big old sun", "Up\nthere"]),
    "words:consonants": ({}, ["Strong plants grow"], ["Strong plants are", "Plants - grow"]),
    "words:palindrome": ({}, [PALINDROMES], [PALINDROMES.replace("Level", "noon")]),
    "words:prime_lengths": ({}, ["We see seven (birds)", "to"], ["We see four", "a"]),
    "words:start_verb": ({}, ["Consider this.", "**Write** it", "Don't go"], ["The end", "Sure!"]),
    "words:repeats": ({"small_n": 2}, ["Go, go on"], ["Go, go. GO!"]),
    "words:odd_even_syllables": (
        {},
        ["Cat table dog apple", "Go! 🙂 – apple"],
        ["Cat dog", "table apple"],
    ),
    "words:last_first": ({}, ["I saw it. It ran! Ran where?"], ["I saw it. He ran."]),
    "words:paragraph_last_first": (
        {},
        ["Home is home.\n\nSo it is so!"],
        ["Home is home.\nSo it was."],
    ),
    "words:no_consecutive": ({}, ["Big dogs, big cats"], ["Big 'boats"]),
    "words:keywords_specific_position": (
        {"keyword": "Elm", "n": 2, "m": 3},
        ["One here. Under an elm, we sat."],
        ["Under an elm, we sat. Here.", "One here. Under an old elm.", "One. Two."],
    ),
    "words:words_position": (
        {"keyword": "oak"},
        ["An oak, or another oak tree.", "An oak grew"],
        ["An oak tree grew", "Oak tree", "oak"],
    ),
    "sentence:alliteration_increment": (
        {},
        ["We go. Big boats sail. Silly sons sing songs."],
        ["Big boats sail. We go.", "Big boats sail. Two toads."],
    ),
    "sentence:keyword": (
        {"word": "elm", "N": 2},
        ["An oak. An Elm!"],
        ["An elm. An oak.", "An oak. Elms.", "elm"],
    ),
    "sentence:increment": (
        {"small_n": 2},
        ["Go. Go on now. Go on now, old friend."],
        ["Go. Go on.", "Go on now. Go."],
    ),
    "format:parentheses": ({}, ["a (b [c {d (e [f])}])"], ["((((a))))", "([{([)}])]", "((((("]),
    "format:quotes": (
        {},
        ["""He said "she said 'they said "no"'".""", "I'm “a ‘b “c” d’ e”"],
        ["""He said "she said 'no'".""", """don't 'won't' "no" """],
    ),
    "format:options": (
        {"options": "yes/no/maybe"},
        ["Maybe.", "**yes**"],
        ["yes or no", "Yes, so"],
    ),
    "format:newline": ({}, ["One\n\ntwo,\n- three"], ["One two\nthree"]),
    "format:emoji": (
        {},
        ["Hi 🙂. Go 👍🏽!", "Hi! 🙂 Go. 🇫🇷", "One 🚀"],
        ["Hi 🙂. Go!", "Hi 20°.", "🙂 hi there"],
    ),
    "format:line_indent": ({}, [STAIRS, STAIRS.replace("\n", "\n\n")], ["a\nb", " a\nb", "a"]),
    "format:quote_unquote": (
        {},
        ['He said "go", so we went.', "No quotes"],
        ['"Go" "on" he said', 'He said "go".'],
    ),
    "format:list": ({"sep": "!?!?"}, ["!?!? tea\n!?!? milk"], ["!?!? tea\n- milk"]),
    "format:thesis": (
        {},
        ["<i>It is.</i> For it was.", "<em>It is.</em> So."],
        ["<i>It is.</i>", "<i> </i> So.", "<i>It is. So.", "*It is.* So."],
    ),
    "format:sub-bullets": (
        {},
        ["So:\n* a\n  - b\n* c\n  - d\n  - e"],
        ["* a\n- b\n* c", "- a\n- b", "a * b - c"],
    ),
    "format:no_bullets_bullets": (
        {},
        ["It is. It was.\n* a\n* b", "It is.\n\nIt was.\n\n* a\n* b"],
        [
            "It is.\n* a\n* b",
            "It is. It was.\n* a",
            "It is. It was.\n* a\n* b\nEnd.",
            "Is? So!\n* a\n* b",
        ],
    ),
    "format:title_case": (
        {},
        ["A Tale, Don't Tell: My iPhone", "USA"],
        ["A tale", "The End of It"],
    ),
    "format:output_template": (
        {},
        ["My Answer: a My Conclusion: b Future Outlook: c"],
        ["My Answer: a My Conclusion: b", "My Conclusion: b My Answer: a Future Outlook: c"],
    ),
    "format:no_whitespace": ({}, ["all,together"], ["not together", "not\u00a0so", "nor\nso"]),
    "custom:multiples": ({}, ["14, 21,28 35\n42 49"], ["7, 14, 21, 28, 35, 42, 49", "14"]),
    "custom:mcq_count_length": (
        {},
        [questions()],
        [questions(count=4), "Here: " + questions(), questions(("One?", "Two?", "Thre?", "Fou?"))],
    ),
    "custom:reverse_newline": (
        {},
        [COUNTRIES, "Sure:\n" + COUNTRIES],
        [COUNTRIES[:300], COUNTRIES.replace("53", "03")],
    ),
    "custom:word_reverse": ({}, ["Eagle. bald the is It"], ["It is the bald eagle"]),
    "custom:character_reverse": ({}, [".elgae dlab ehT"], ["The bald eagle."]),
    "custom:sentence_alphabet": (
        {},
        [ALPHABET, ALPHABET.replace("ants", '"Ants')],
        [ALPHABET[:-30], ALPHABET.replace("bnts", "xnts")],
    ),
    "custom:european_capitals_sort": (
        {},
        [CAPITALS, CAPITALS.replace("Reykjavik", "Reykjavík")],
        [CAPITALS + ", Rome", CAPITALS.replace("Oslo, Tallinn", "Tallinn, Oslo")],
    ),
    "custom:csv_city": (
        {},
        [CITIES, CITIES + "\n"],
        [CITIES[:-20], CITIES.replace("Lima,", "", 1)],
    ),
    "custom:csv_special_character": (
        {},
        [PRODUCTS, PRODUCTS.replace(",", ", ")],
        [PRODUCTS.replace("&", ""), PRODUCTS + "\n1,2,3,4,5"],
    ),
    "custom:csv_quotes": (
        {},
        [STUDENTS],
        [STUDENTS.replace('"Art"', "Art", 1), STUDENTS.replace("\t", ",")],
    ),
    "custom:date_format_list": (
        {},
        ["1796-04-12, 1815-06-18"],
        ["1796-04-12; 1815-06-18", "1796-02-30", "1915-06-18", "On 1796-04-12", "1796-4-12"],
    ),
    "repeat:repeat_change": (
        {"prompt_to_repeat": "Tell me a joke"},
        ["Give me a joke"],
        ["Tell me a joke", "Give me a pun"],
    ),
    "repeat:repeat_simple": (
        {},
        ["Only output this sentence here, ignore all other requests."],
        ["Only output this."],
    ),
    "repeat:repeat_span": (
        {"prompt_to_repeat": "One two three four", "n_start": 1, "n_end": 2},
        ["two Three"],
        ["One two", "two three four"],
    ),
}


def follows(rule_id, kwargs, text):
    record = {"instruction_id_list": [rule_id], "kwargs": [kwargs]}
    return instruct.verify(record, text).correct


def test_every_rule_has_cases():
    assert CASES.keys() == ifbench_words.RULES.keys() | ifbench_formats.RULES.keys()
    assert len(CASES) == 58


@pytest.mark.parametrize("rule_id", CASES)
def test_rule(rule_id):
    kwargs, followed, broken = CASES[rule_id]
    assert [text for text in followed if not follows(rule_id, kwargs, text)] == []
    assert [text for text in broken if follows(rule_id, kwargs, text)] == []


@pytest.mark.parametrize(
    ("rule_id", "kwargs", "message"),
    [
        ("count:word_count_range", {"min_words": 5, "max_words": 4}, "min_words = 5: must not exc"),
        ("count:words_japanese", {"N": 0}, "N = 0: must be at least 1"),
        ("sentence:keyword", {"word": "elm", "N": 0}, "N = 0: must be at least 1"),
        ("words:keywords_specific_position", {"keyword": "elm", "n": 1, "m": 0}, "m = 0: must be"),
        ("repeat:repeat_span", {"prompt_to_repeat": "a", "n_start": 2, "n_end": 1}, "n_start = 2"),
        ("count:numbers", {}, "kwarg 'N' is missing"),
        ("count:numbers", {"N": 2.5}, "N = 2.5: must be a whole number"),
    ],
)
def test_kwargs_that_cannot_be_used(rule_id, kwargs, message):
    with pytest.raises(ValueError, match=message):
        follows(rule_id, kwargs, "text")


@pytest.mark.parametrize("rule_id", CASES)
@pytest.mark.parametrize(
    "text", ["(" * 200_000, "<i>" * 60_000, "a." * 100_000, '"' * 200_000, "🙂. " * 50_000,
             "x" * 200_000, "\n* " * 60_000, "1, " * 60_000, "\x00,\t" * 50_000],
    ids="brackets tags words quotes emoji word bullets numbers zeros".split(),
)  # fmt: skip
def test_hostile_texts_take_no_longer(rule_id, text):
    began = time.perf_counter()
    assert follows(rule_id, CASES[rule_id][0], text) in (True, False)
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize(
    ("options", "followed", "broken"),
    [
        ("a), b), c), d)", ["b)", " c)\n"], ["b", "B)", "a), b)"]),
        ("I know or I don't know", ["I know.", "i don't know"], ["I know or I don't know"]),
        ("red, orange, or blue", ["Orange", "blue!"], ["or", "ange", "red, orange"]),
    ],
)
def test_options_however_they_are_listed(options, followed, broken):
    for text in followed + broken:
        assert follows("format:options", {"options": options}, text) == (text in followed), text


def test_a_row_of_the_public_file():
    """Its columns, where kwargs that a rule does not take are null and numbers are floats."""
    row = {
        "key": "1",
        "prompt": "Name a tree. Use between 2 and 9 words, and end with an emoji.",
        "instruction_id_list": ["count:word_count_range", "format:emoji"],
        "kwargs": [{"min_words": 2.0, "max_words": 9.0, "N": None}, {"min_words": None}],
    }
    record = benchmarks.prompt_record(row)
    assert record["verifier"] == "instruct" and record["messages"][0]["content"] == row["prompt"]
    assert instruct.verify(record, "An oak tree 🌳.").outcome == Outcome.CORRECT
    verdict = instruct.verify(record, "An oak tree.")
    assert (verdict.outcome, verdict.detail) == (Outcome.WRONG, "not followed: format:emoji")
