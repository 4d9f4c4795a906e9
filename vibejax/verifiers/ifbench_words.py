"""IFBench's rules on counts, words and sentences; those on formats are in `ifbench_formats`.

A rule of its test set is a function whose arguments have the names of the rule's kwargs. It takes a
text that is not blank and says whether it follows the rule. What counts is what the published
checks count (words, tokens, sentences, cases), but for three things: a rule about things that the
text has none of is not followed; where a check accepts texts that plainly break the words of its
rule, the words hold; and sentences are those of `instruct_text`, as for IFEval.

Source: Pyatkin et al., "Generalizing Verifiable Instruction Following", arXiv:2507.02833, and the
ids and kwargs of its public test file.
"""

import collections
import itertools
import re
import string
from collections.abc import Callable

import lemminflect
import syllapy

from vibejax.verifiers import instruct_text
from vibejax.verifiers.ifbench_text import (
    UNPUNCTUATED,
    bare,
    cut_tokens,
    endings,
    require_positive,
    split_words,
    word_tokens,
)

CONJUNCTIONS = frozenset("and but for nor or so yet".split())
PRONOUNS = frozenset(
    "i me we us you he him she her it they them my mine our ours your yours his hers its their "
    "theirs myself ourselves yourself yourselves himself herself itself themselves this that these "
    "those who whom whose which what whoever whomever whatever whichever anybody anyone anything "
    "everybody everyone everything nobody nothing somebody someone something each either neither "
    "both all some any none".split()
)
STOP_WORDS = frozenset(  # of English, with what is left of contractions when they are cut
    "i me my myself we our ours ourselves you your yours yourself yourselves he him his himself "
    "she her hers herself it its itself they them their theirs themselves what which who whom this "
    "that these those am is are was were be been being have has had having do does did doing a an "
    "the and but if or because as until while of at by for with about against between into through "
    "during before after above below to from up down in out on off over under again further then "
    "once here there when where why how all any both each few more most other some such no nor not "
    "only own same so than too very s t can will just don should now d ll m o re ve y ain aren "
    "couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan shouldn wasn weren won "
    "wouldn".split()
)
NAMES = (  # those that the prompts list
    "Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte Alexander "
    "Amelia Benjamin Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen Abigail Gabriel "
    "Ella Jacob Scarlett Nathan Victoria Elijah Layla Nicholas Audrey David Hannah Christopher "
    "Penelope Thomas Nora Andrew Aria Joseph Claire Ryan Stella Jonathan"
).split()
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxyz]{2}")
_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")


# Counts and ratios


def word_count_range(text: str, *, min_words: int, max_words: int) -> bool:
    """The number of words lies between both bounds."""
    if min_words > max_words:
        raise ValueError(f"min_words = {min_words}: must not exceed max_words = {max_words}")
    return min_words <= len(instruct_text.words(text)) <= max_words


def unique_word_count(text: str, *, N: int) -> bool:
    """There are at least so many different words."""
    return len({bare(word) for word in text.lower().split()} - {""}) >= N


def stop_words(text: str, *, percentage: int) -> bool:
    """Of the words no more than so many percent are stop words."""
    count = sum(token in STOP_WORDS for token in cut_tokens(text.lower()))
    words = len(instruct_text.words(text))
    return words > 0 and 100 * count <= percentage * words


def sentence_type(text: str) -> bool:
    """Two sentences end in a period for each that ends in a question mark."""
    ends = endings(text)
    return 0 < ends["."] == 2 * ends["?"]


def sentence_balance(text: str) -> bool:
    """As many sentences end in a period as in a question mark and in an exclamation mark."""
    ends = endings(text)
    return 0 < ends["."] == ends["?"] == ends["!"]


def conjunctions(text: str, *, small_n: int) -> bool:
    """At least so many different coordinating conjunctions occur."""
    return len({bare(word).lower() for word in text.split()} & CONJUNCTIONS) >= small_n


def person_names(text: str, *, N: int) -> bool:
    """At least so many of the listed names occur."""
    return sum(bool(re.search(rf"\b{name}\b", text)) for name in NAMES) >= N


def overlap(text: str, *, reference_text: str, percentage: int) -> bool:
    """Of the different trigrams so many percent, give or take 2, are of the reference text."""
    own, other = (
        {*zip(tokens, tokens[1:], tokens[2:], strict=False)}
        for tokens in (cut_tokens(text), cut_tokens(reference_text))
    )
    return bool(own) and abs(100 * len(own & other) / len(own) - percentage) <= 2


def numbers(text: str, *, N: int) -> bool:
    """Exactly so many numbers in digits occur; 1,000 and 2.5 are one each."""
    return len(re.findall(r"\d+", text.translate(UNPUNCTUATED))) == N


def punctuation(text: str) -> bool:
    """Each of . , ! ? ; : occurs, and an interrobang beside them."""
    interrobang = next((mark for mark in ("?!", "!?", "‽") if mark in text), None)
    return interrobang is not None and {*".,!?;:"} <= {*text.replace(interrobang, "", 1)}


def words_japanese(text: str, *, N: int) -> bool:
    """Every Nth word has a Japanese character, unless it is a number or no word."""
    require_positive(N=N)
    every = [bare(word) for word in text.split()[N - 1 :: N]]
    return all(_JAPANESE.search(word) for word in every if word and not word.isdigit())


def pronouns(text: str, *, N: int) -> bool:
    """At least so many pronouns occur."""
    return sum(token in PRONOUNS for token in cut_tokens(text.lower().replace("/", " "))) >= N


def keywords_multiple(
    text: str, *, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str
) -> bool:
    """The keywords occur once, twice, three, five and seven times, as words of their own."""
    keywords = (keyword1, keyword2, keyword3, keyword4, keyword5)
    return all(
        len(re.findall(rf"\b{re.escape(word.strip())}\b", text, re.IGNORECASE)) == count
        for word, count in zip(keywords, (1, 2, 3, 5, 7), strict=True)
    )


# Words


def alphabet(text: str) -> bool:
    """Each word begins with the letter after that of the word before, z before a."""
    firsts = [word[0] for word in split_words(text)]
    places = [string.ascii_lowercase.find(letter) for letter in firsts]
    return (
        bool(places)
        and -1 not in places
        and all((a + 1) % 26 == b for a, b in itertools.pairwise(places))
    )


def vowel(text: str) -> bool:
    """One paragraph, with at most three of the five vowels."""
    return "\n" not in text.strip() and len({*text.lower()} & {*"aeiou"}) <= 3


def consonants(text: str) -> bool:
    """Each word has two consonants side by side."""
    return all(_CONSONANTS.search(word) for word in text.lower().split())


def palindrome(text: str) -> bool:
    """At least ten palindromes of five letters or more occur."""
    return sum(len(word) >= 5 and word == word[::-1] for word in split_words(text)) >= 10


def prime_lengths(text: str) -> bool:
    """The lengths of all words are prime."""
    return all(
        len(word) > 1 and all(len(word) % n for n in range(2, int(len(word) ** 0.5) + 1))
        for word in split_words(text)
    )


def start_verb(text: str) -> bool:
    """The first word is one that can be a verb."""
    tokens = word_tokens(text)
    return bool(tokens) and bool(lemminflect.getAllLemmas(tokens[0].lower(), upos="VERB"))


def repeats(text: str, *, small_n: int) -> bool:
    """No word occurs more than so many times."""
    return max(collections.Counter(split_words(text)).values(), default=0) <= small_n


def odd_even_syllables(text: str) -> bool:
    """Words with an odd number of syllables and words with an even one take turns."""
    words = [word for word in split_words(text) if any(map(str.isalnum, word))]  # no emoji
    odd = [syllapy.count(word) % 2 for word in words]
    return all(a != b for a, b in itertools.pairwise(odd))


def last_first(text: str) -> bool:
    """The last word of each sentence is the first of the next."""
    found = [[bare(word) for word in s.lower().split()] for s in instruct_text.sentences(text)]
    found = [[word for word in sentence if word] for sentence in found]
    return all(a and b and a[-1] == b[0] for a, b in itertools.pairwise(found))


def paragraph_last_first(text: str) -> bool:
    """Each line ends with the word that it begins with."""
    lines = [bare(line.lower()).split() for line in text.split("\n")]
    return all(bare(line[0]) == bare(line[-1]) for line in lines if line)


def no_consecutive(text: str) -> bool:
    """No two words in a row begin with the same letter."""
    return all(a[0] != b[0] for a, b in itertools.pairwise(split_words(text)))


def keywords_specific_position(text: str, *, keyword: str, n: int, m: int) -> bool:
    """The keyword is the m-th word of the n-th sentence."""
    require_positive(n=n, m=m)
    words = [word_tokens(s) for s in instruct_text.sentences(text)[n - 1 : n]]
    return [w.lower() for found in words for w in found[m - 1 : m]] == [keyword.strip().lower()]


def words_position(text: str, *, keyword: str) -> bool:
    """The keyword is the second word, and the last but one."""
    words = [word.lower() for word in word_tokens(text)]
    return len(words) > 1 and words[1] == words[-2] == keyword.strip().lower()


# Sentences


def alliteration_increment(text: str) -> bool:
    """Each sentence has more words that begin like a neighbour than the one before."""
    found = []
    for sentence in instruct_text.sentences(text):
        words = [word.lstrip(string.punctuation) for word in sentence.lower().split()]
        runs = [len([*run]) for _, run in itertools.groupby(word[0] for word in words if word)]
        found.append(sum(n for n in runs if n > 1))
    return all(a < b for a, b in itertools.pairwise(found))


def sentence_words(text: str) -> bool:
    """Three sentences of as many characters each, and no word twice."""
    found = instruct_text.sentences(text)
    words = split_words(text)
    return len(found) == 3 and len({*map(len, found)}) == 1 and len({*words}) == len(words)


def sentence_keyword(text: str, *, word: str, N: int) -> bool:
    """The N-th sentence has the keyword, as a word of its own."""
    require_positive(N=N)
    found = instruct_text.sentences(text)[N - 1 : N]
    return any(re.search(rf"\b{re.escape(word)}\b", s, re.IGNORECASE) for s in found)


def sentence_increment(text: str, *, small_n: int) -> bool:
    """Each sentence has exactly so many words more than the one before."""
    counts = [len(split_words(sentence)) for sentence in instruct_text.sentences(text)]
    return all(b - a == small_n for a, b in itertools.pairwise(counts))


RULES: dict[str, Callable[..., bool]] = {
    "count:word_count_range": word_count_range,
    "count:unique_word_count": unique_word_count,
    "count:conjunctions": conjunctions,
    "count:person_names": person_names,
    "count:numbers": numbers,
    "count:punctuation": punctuation,
    "count:words_japanese": words_japanese,
    "count:pronouns": pronouns,
    "count:keywords_multiple": keywords_multiple,
    "ratio:stop_words": stop_words,
    "ratio:sentence_type": sentence_type,
    "ratio:sentence_balance": sentence_balance,
    "ratio:overlap": overlap,
    "ratio:sentence_words": sentence_words,
    "words:alphabet": alphabet,
    "words:vowel": vowel,
    "words:consonants": consonants,
    "words:palindrome": palindrome,
    "words:prime_lengths": prime_lengths,
    "words:start_verb": start_verb,
    "words:repeats": repeats,
    "words:odd_even_syllables": odd_even_syllables,
    "words:last_first": last_first,
    "words:paragraph_last_first": paragraph_last_first,
    "words:no_consecutive": no_consecutive,
    "words:keywords_specific_position": keywords_specific_position,
    "words:words_position": words_position,
    "sentence:alliteration_increment": alliteration_increment,
    "sentence:keyword": sentence_keyword,
    "sentence:increment": sentence_increment,
}
