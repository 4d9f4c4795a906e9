"""What curation calls a copy, a duplicate or a repetition, on texts whose answer is plain."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibejax.curate import duplicates, evaluation, letters, repetition

INSTRUCTION = "Please reason in steps, and put the final answer into a box at the end."
ITEMS = (
    r"Let $P$ be a point inside $\triangle ABC$ with $AP = 7$, $BP = \frac{9}{2}$. The area of "
    r"$\triangle ABC$ is $\frac{m}{n}$, where $m$ and $n$ are relatively prime positive integers. "
    r"Find $m+n$.",
    r"A committee of $5$ is drawn from $9$ sailors and $4$ cooks so that no two cooks sit side by "
    r"side. The probability of this is $\frac{m}{n}$, where $m$ and $n$ are relatively prime "
    r"positive integers. Find $m+n$.",
    r"Find the greatest real root of $x^4 - 3x^2 + \left(x-1\right)\cdot 2 = 0$ above zero.",
    "How many paths of length 12 avoid the diagonal?",
    "What is 17 + 25?",
    "2 + 2?",
)
STOCK = (
    r"A jar has 12 red and 30 blue beads. The chance of two red ones is $\frac{m}{n}$, where $m$ "
    r"and $n$ are relatively prime positive integers. Find $m+n$."
)


def index(*sets, n=10, share=0.5):
    named = {f"set{i}": list(texts) for i, texts in enumerate(sets)}
    return evaluation.build(named, n=n, share=share)


def batch(*texts):
    """Prompts, or (prompt, trace) pairs."""
    pairs = [text if isinstance(text, tuple) else (text, "") for text in texts]
    return letters.Batch([letters.without_layout(letters.letters(t)) for p in pairs for t in p])


def copies(found_in, *texts):
    """Of each text the item that it is a copy of."""
    found = evaluation.find(found_in, batch(*texts))
    return [found[i]["item"] if i in found else None for i in range(len(texts))]


ALL = index(ITEMS)
COPIES = [
    ITEMS[0].upper().replace(r"\TRIANGLE", r"\triangle").replace(r"\FRAC", r"\frac"),
    ITEMS[0].replace("$", "").replace("\\", "").replace("{", " ").replace("}", " "),
    "".join(c for c in ITEMS[0] if c.isalnum() or c == " "),
    "".join(c for c in ITEMS[0] if not c.isspace()),
    "\n\t ".join(ITEMS[0].split()),
    ITEMS[0].replace(r"\frac", r"\dfrac").replace("$P$", r"\( P \)"),
    ITEMS[0].replace(r"\triangle", "△").replace("ABC", "\uff21\uff22\uff23"),
    "Problem 3. You are a tutor. " + ITEMS[0] + "\nShow your work!",
    "Suppose " + ITEMS[0].partition("be a")[2].partition("Find")[0],
    ("Solve what follows.", "The problem says: " + ITEMS[0] + " So let us begin."),
]


@pytest.mark.parametrize("text", COPIES, ids=range(len(COPIES)))
def test_a_copy_is_found_however_it_looks(text):
    assert copies(ALL, text) == ["set0:1"]


def test_phrases_of_all_problems_are_no_copy():
    """A common 10-gram alone would call it one: the rule that share = 0 comes to."""
    assert copies(ALL, STOCK) == [None]
    assert copies(index(ITEMS[:1]), STOCK) == [None]
    assert copies(index(ITEMS[:1], share=1e-9), STOCK) == ["set0:1"]


def test_ngrams_of_two_problems_count_for_neither():
    with_two, with_one = index(ITEMS[:2], share=0.1), index(ITEMS[:1], share=0.1)
    assert copies(with_two, STOCK) == [None]
    assert copies(with_one, STOCK) == ["set0:1"]


def test_one_problem_in_two_sets_is_found_and_named_for_both():
    both = index(ITEMS[:2], [ITEMS[0].replace("Find", "Compute"), "Name the capital of Peru, now."])
    assert copies(both, ITEMS[0]) == ["set0:1+set1:1"]


def test_the_instruction_of_a_set_is_not_the_item():
    many = index([f"{text} {INSTRUCTION}" for text in ITEMS])
    assert many.instructions == {"set0": [" ".join(letters.words(INSTRUCTION))]}
    clean = "Name a prime above 90. " + INSTRUCTION
    assert copies(many, clean, ITEMS[2]) == [None, "set0:3"]
    assert copies(index([f"{INSTRUCTION} {text}" for text in ITEMS]), clean) == [None]


def test_short_items_must_be_half_of_the_prompt():
    short = "How many paths of length 12 avoid the diagonal?"
    longer = short + " Of those, count the ones that end at (6, 6) and turn at most three times."
    assert copies(ALL, short, "Q: what is 17 + 25", longer) == ["set0:4", "set0:5", None]
    assert copies(ALL, ("Go on.", short)) == [None]
    assert ALL.too_short == ["set0:6"]
    assert copies(ALL, "2 + 2?") == [None]


def test_the_evidence_says_what_is_shared():
    found = evaluation.find(ALL, batch("So: " + ITEMS[2]))[0]
    assert found["item"] == "set0:3" and found["share"] == 1.0
    assert found["text"].startswith("find the greatest real root of x 4 3 x 2")


def test_other_numbers_make_another_problem():
    other = ITEMS[2].replace("x^4", "x^6").replace("3x", "8x").replace("greatest", "smallest")
    assert copies(ALL, other) == [None]


@given(st.lists(st.text("ab \n$\\.,", max_size=40), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_hashes_of_stretches_are_those_of_their_text(texts):
    runs = [letters.letters(text) for text in texts]
    whole = letters.Batch(runs + [b""] * (len(runs) % 2))
    for i, run in enumerate(runs):
        stretch = whole.hashes(whole.start_S[i : i + 1], np.array([len(run)]))
        assert int(stretch[0]) == letters.text_hash(run)


def test_grams_lie_in_one_segment():
    hashes, record = batch(("abcd", "ef"), ("", "ghi")).grams_within(3)
    assert record.tolist() == [0, 0, 1]
    assert [int(h) for h in hashes] == [letters.text_hash(t) for t in (b"abc", b"bcd", b"ghi")]
    hashes, record = batch(("abcd", "ef"), ("", "ghi")).grams_within(3, traces_only=True)
    assert record.tolist() == [1]


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("Let $x$ be, an ice-cream!", "let x be an ICE cream", True),
        ("Let's see x-y", "Lets see x − y", True),  # noqa: RUF001 - a minus sign
        ("area of $x y$", "area of xy", True),
        ("find x + 3", "find x - 3", False),
        ("f(1,2)", "f(12)", False),
        ("1.5", "15", False),
        (r"a \leq b", r"a \geq b", False),
        ("a ≤ b", "a ≥ b", False),
        ("x-y", "xy", False),
        ("n! is", "n is", False),
        ("the left end", "the right end", False),
    ],
)
def test_exact_duplicates_keep_formulas_apart(a, b, same):
    keys = [duplicates.exact_key(letters.letters(t), duplicates.formula(t)) for t in (a, b)]
    assert (keys[0] == keys[1]) is same


def test_relations_are_part_of_formulas():
    assert duplicates.formula(r"x \leq 3") == duplicates.formula(r"x \le 3") == "x ~ l 3"
    assert duplicates.formula(r"x \leq 3") != duplicates.formula(r"x \geq 3")


def words(rng, count):
    return ["".join(rng.choices("abcdefghijkl", k=rng.randint(2, 9))) for _ in range(count)]


def take(seen, *texts, first=0):
    pairs = [(text, "") for text in texts]
    signs = [duplicates.formula(text) for text in texts]
    keys = [duplicates.exact_key(letters.letters(t), s) for t, s in zip(texts, signs, strict=True)]
    near = [
        duplicates.near_key(s) if len(letters.letters(t)) >= duplicates.MIN_LETTERS else None
        for t, s in zip(texts, signs, strict=True)
    ]
    numbers = range(first, first + len(texts))
    return seen.take(numbers, keys, near, duplicates.min_hashes(batch(*pairs)))


def jaccard(a, b):
    grams = [
        {run[i : i + duplicates.GRAM_LETTERS] for i in range(len(run) - 23)}
        for run in map(letters.letters, (a, b))
    ]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_min_hashes_estimate_the_jaccard_index():
    rng = random.Random(0)
    errors = []
    for count in (20, 60, 200) * 20:
        text = words(rng, count)
        other = list(text)
        for i in rng.sample(range(count), max(1, count // 40)):
            other[i] = "zzz"
        a, b = " ".join(text), " ".join(other)
        hashes = duplicates.min_hashes(batch(a, b))
        errors.append((hashes[0] == hashes[1]).mean() - jaccard(a, b))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.06


@pytest.mark.parametrize("apart", [False, True], ids=["in one chunk", "in two"])
def test_near_duplicates_are_found_and_other_numbers_are_not(apart):
    rng = random.Random(1)
    text = " ".join(words(rng, 150))
    near, numbers = text.replace(text.split()[70], "zebra", 1), text + " with 17 of 30"
    other_numbers, reverse = text + " with 18 of 30", " ".join(reversed(text.split()))
    texts = (text, near, numbers, other_numbers, reverse, text.upper())
    seen = duplicates.Seen(exact=True, near=0.85)
    if apart:
        found = [f for i, t in enumerate(texts) for f in take(seen, t, first=i)]
    else:
        found = take(seen, *texts)
    assert [f and f.number for f in found] == [None, 0, None, None, None, 0]
    assert found[1].share > 0.85 and found[5].share is None


def test_near_duplicates_are_found_among_many():
    rng = random.Random(2)
    seen = duplicates.Seen(exact=False, near=0.75)
    texts = [" ".join(words(rng, 16)) for _ in range(4_500)]  # beyond the first table
    for begin in range(0, len(texts), 500):
        assert take(seen, *texts[begin : begin + 500], first=begin) == [None] * 500
    again = [t.rsplit(maxsplit=1)[0] for t in texts[:200]]
    found = take(seen, *again, first=len(texts))
    assert np.mean([f is not None and f.number == i for i, f in enumerate(found)]) > 0.98


def test_near_duplicates_can_be_switched_off():
    text = " ".join(words(random.Random(3), 100))
    assert take(duplicates.Seen(exact=False, near=0), text, text + " zebra", text) == [None] * 3


def test_loops_and_repeated_traces():
    sentence = "So the sum of all of these is equal to the other value of y and no more. "
    prose = " ".join(words(random.Random(4), 400))
    traces = [sentence * 30, sentence, prose + sentence * 12, "wait " * 300, "", prose]
    share, most = repetition.repeated(batch(*(("p " * 99, trace) for trace in traces)))
    assert share[0] > 0.9 and share[3] > 0.9 and share[2] < 0.5
    assert share[[1, 4, 5]].tolist() == [0, 0, 0]
    assert most[0] == 30 and most[2] == 12 and most[[1, 4, 5]].tolist() == [1, 0, 1]
    # by hand: 3 x 48 letters have 97 n-grams; 48 are different, each the first of its kind
    share, most = repetition.repeated(batch(("", ("abcdefgh" * 6).join(["", "", "", ""]))))
    run = 3 * 48 - 47
    assert share[0] == pytest.approx((run - 8) / run) and most[0] == 13


def test_lines_that_many_records_share_are_templates():
    templates = repetition.Templates(3)
    own = words(random.Random(5), 40)
    shares = [
        templates.share(
            *repetition.line_hashes(
                f"As your helpful tutor I will now solve problem number {i} in all detail.\n"
                f"{own[i]} it is {own[i + 9]}\n"
            )
        )
        for i in range(6)
    ]
    assert shares[:3] == [0, 0, 0] and min(shares[3:]) > 0.7
    assert templates.share(*repetition.line_hashes("short\n" * 9)) == 0
