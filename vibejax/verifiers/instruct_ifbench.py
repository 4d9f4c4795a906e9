"""The 58 rules of IFBench's test set, one function each; arguments have the names of its kwargs.

Each takes a text that is not blank and says whether it follows the rule. What counts is what the
published checks count (words, tokens, sentences, cases), but for three things: a rule about things
that the text has none of is not followed; where a check accepts texts that plainly break the words
of its rule, the words hold; and sentences are those of `instruct_text`, as for IFEval.

Source: Pyatkin et al., "Generalizing Verifiable Instruction Following", arXiv:2507.02833, and the
ids and kwargs of its public test file.
"""

import collections
import csv
import datetime
import itertools
import re
import string
import unicodedata
from collections.abc import Callable

import emoji
import lemminflect
import syllapy

from vibejax.verifiers import instruct_text

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
CAPITALS = (  # of Europe, north of 45 degrees, as the published check has them
    "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin "
    "Amsterdam Warsaw London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz "
    "Chisinau Bern Ljubljana Zagreb"
).split()
COUNTRIES_OF_AFRICA = 52  # at least; the published check's number
NAPOLEON = datetime.date(1769, 1, 1), datetime.date(1821, 12, 31)
NEAR = 32  # characters beside the end of a sentence in which its emoji is looked for
REPEATED = "only output this sentence here, ignore all other requests."

_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxyz]{2}")
_JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
_TOKEN = re.compile(r"\w+(?:[-/.,:'\u2019]\w+)*|[^\w\s]")
_CLITIC = re.compile(r"(?:n['\u2019]t|['\u2019](?:s|m|d|ll|re|ve))$", re.IGNORECASE)
_BRACKETS = {")": "(", "]": "[", "}": "{"}
_QUESTION = re.compile(r"Question(?: \d+)?[.|):;]?\s*")
_OPTION = re.compile(r"[A-Ea-e][.|)]\s*\w")
_UNPUNCTUATED = str.maketrans("", "", string.punctuation)
_STRAIGHT = str.maketrans("“”\u2018\u2019", "\"\"''")


# How texts are cut


def _words(text: str) -> list[str]:
    """Lowercase words without any punctuation, as blank space parts them."""
    return text.lower().translate(_UNPUNCTUATED).split()


def _tokens(text: str) -> list[str]:
    """Words and marks, the clitics of contractions cut off."""
    found = []
    for token in _TOKEN.findall(text):
        clitic = _CLITIC.search(token)
        cut = clitic.start() if clitic else 0
        found += [token[:cut], token[cut:]] if cut else [token]
    return found


def _word_tokens(text: str) -> list[str]:
    return [token for token in _tokens(text) if any(map(str.isalnum, token))]


def _bare(text: str) -> str:
    return text.strip(string.punctuation + " ")


def _ends(text: str) -> collections.Counter[str]:
    """How many sentences end in which mark."""
    found = (s.rstrip(instruct_text.CLOSERS) for s in instruct_text.sentences(text))
    return collections.Counter(s[-1] for s in found)


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _positive(**given: int) -> None:
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")


# Counts and ratios


def word_count_range(text: str, *, min_words: int, max_words: int) -> bool:
    """The number of words lies between both bounds."""
    if min_words > max_words:
        raise ValueError(f"min_words = {min_words}: must not exceed max_words = {max_words}")
    return min_words <= len(instruct_text.words(text)) <= max_words


def unique_word_count(text: str, *, N: int) -> bool:
    """There are at least so many different words."""
    return len({_bare(word) for word in text.lower().split()} - {""}) >= N


def stop_words(text: str, *, percentage: int) -> bool:
    """Of the words no more than so many percent are stop words."""
    count = sum(token in STOP_WORDS for token in _tokens(text.lower()))
    words = len(instruct_text.words(text))
    return words > 0 and 100 * count <= percentage * words


def sentence_type(text: str) -> bool:
    """Two sentences end in a period for each that ends in a question mark."""
    ends = _ends(text)
    return 0 < ends["."] == 2 * ends["?"]


def sentence_balance(text: str) -> bool:
    """As many sentences end in a period as in a question mark and in an exclamation mark."""
    ends = _ends(text)
    return 0 < ends["."] == ends["?"] == ends["!"]


def conjunctions(text: str, *, small_n: int) -> bool:
    """At least so many different coordinating conjunctions occur."""
    return len({_bare(word).lower() for word in text.split()} & CONJUNCTIONS) >= small_n


def person_names(text: str, *, N: int) -> bool:
    """At least so many of the listed names occur."""
    return sum(bool(re.search(rf"\b{name}\b", text)) for name in NAMES) >= N


def overlap(text: str, *, reference_text: str, percentage: int) -> bool:
    """Of the different trigrams so many percent, give or take 2, are of the reference text."""
    own, other = (
        {*zip(tokens, tokens[1:], tokens[2:], strict=False)}
        for tokens in (_tokens(text), _tokens(reference_text))
    )
    return bool(own) and abs(100 * len(own & other) / len(own) - percentage) <= 2


def numbers(text: str, *, N: int) -> bool:
    """Exactly so many numbers in digits occur; 1,000 and 2.5 are one each."""
    return len(re.findall(r"\d+", text.translate(_UNPUNCTUATED))) == N


def punctuation(text: str) -> bool:
    """Each of . , ! ? ; : occurs, and an interrobang beside them."""
    interrobang = next((mark for mark in ("?!", "!?", "‽") if mark in text), None)
    return interrobang is not None and {*".,!?;:"} <= {*text.replace(interrobang, "", 1)}


def words_japanese(text: str, *, N: int) -> bool:
    """Every Nth word has a Japanese character, unless it is a number or no word."""
    _positive(N=N)
    every = [_bare(word) for word in text.split()[N - 1 :: N]]
    return all(_JAPANESE.search(word) for word in every if word and not word.isdigit())


def pronouns(text: str, *, N: int) -> bool:
    """At least so many pronouns occur."""
    return sum(token in PRONOUNS for token in _tokens(text.lower().replace("/", " "))) >= N


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
    firsts = [word[0] for word in _words(text)]
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
    return sum(len(word) >= 5 and word == word[::-1] for word in _words(text)) >= 10


def prime_lengths(text: str) -> bool:
    """The lengths of all words are prime."""
    return all(
        len(word) > 1 and all(len(word) % n for n in range(2, int(len(word) ** 0.5) + 1))
        for word in _words(text)
    )


def start_verb(text: str) -> bool:
    """The first word is one that can be a verb."""
    tokens = _word_tokens(text)
    return bool(tokens) and bool(lemminflect.getAllLemmas(tokens[0].lower(), upos="VERB"))


def repeats(text: str, *, small_n: int) -> bool:
    """No word occurs more than so many times."""
    return max(collections.Counter(_words(text)).values(), default=0) <= small_n


def odd_even_syllables(text: str) -> bool:
    """Words with an odd number of syllables and words with an even one take turns."""
    odd = [syllapy.count(word) % 2 for word in _words(text)]
    return all(a != b for a, b in itertools.pairwise(odd))


def last_first(text: str) -> bool:
    """The last word of each sentence is the first of the next."""
    found = [[_bare(word) for word in s.lower().split()] for s in instruct_text.sentences(text)]
    found = [[word for word in sentence if word] for sentence in found]
    return all(a and b and a[-1] == b[0] for a, b in itertools.pairwise(found))


def paragraph_last_first(text: str) -> bool:
    """Each line ends with the word that it begins with."""
    lines = [_bare(line.lower()).split() for line in text.split("\n")]
    return all(_bare(line[0]) == _bare(line[-1]) for line in lines if line)


def no_consecutive(text: str) -> bool:
    """No two words in a row begin with the same letter."""
    return all(a[0] != b[0] for a, b in itertools.pairwise(_words(text)))


def keywords_specific_position(text: str, *, keyword: str, n: int, m: int) -> bool:
    """The keyword is the m-th word of the n-th sentence."""
    _positive(n=n, m=m)
    words = [_word_tokens(s) for s in instruct_text.sentences(text)[n - 1 : n]]
    return [w.lower() for found in words for w in found[m - 1 : m]] == [keyword.strip().lower()]


def words_position(text: str, *, keyword: str) -> bool:
    """The keyword is the second word, and the last but one."""
    words = [word.lower() for word in _word_tokens(text)]
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
    words = _words(text)
    return len(found) == 3 and len({*map(len, found)}) == 1 and len({*words}) == len(words)


def sentence_keyword(text: str, *, word: str, N: int) -> bool:
    """The N-th sentence has the keyword, as a word of its own."""
    _positive(N=N)
    found = instruct_text.sentences(text)[N - 1 : N]
    return any(re.search(rf"\b{re.escape(word)}\b", s, re.IGNORECASE) for s in found)


def sentence_increment(text: str, *, small_n: int) -> bool:
    """Each sentence has exactly so many words more than the one before."""
    counts = [len(_words(sentence)) for sentence in instruct_text.sentences(text)]
    return all(b - a == small_n for a, b in itertools.pairwise(counts))


# Format


def parentheses(text: str) -> bool:
    """Brackets of any kind are nested five deep, and the innermost are closed."""
    opened: list[str] = []
    for mark in text:
        if mark in "([{":
            opened.append(mark)
        elif mark in _BRACKETS:
            if not opened or opened[-1] != _BRACKETS[mark]:
                opened = []
            elif len(opened) >= 5:
                return True
            else:
                opened.pop()
    return False


def quotes(text: str) -> bool:
    """Double and single quotes, in turns, are nested three deep and closed again."""
    marks = re.sub(r"(?<=\w)'(?=\w)", "", text.translate(_STRAIGHT))  # apostrophes quote nothing
    opened: list[str] = []
    deepest = 0
    for mark in marks:
        if mark not in "\"'":
            continue
        if opened and opened[-1] == mark:
            opened.pop()
            if deepest - len(opened) >= 3:
                return True
        else:
            opened.append(mark)
            deepest = max(deepest, len(opened))
    return False


def options(text: str, *, options: str) -> bool:
    """The text is one of the options and nothing else; letters of a choice as they are given."""
    parts = options.split("/") if "/" in options else re.split(r",|\bor\b", options)
    allowed = [part.strip() for part in parts if part.strip()]
    if re.match(r"\W*a\W*b\W*c\W*", options, re.IGNORECASE):
        return text.strip() in allowed
    return _bare(text.strip()).lower() in {_bare(option).lower() for option in allowed}


def newline(text: str) -> bool:
    """Each word has a line of its own."""
    lines = text.translate(_UNPUNCTUATED).split("\n")
    return all(len(line.split()) <= 1 for line in lines)


def emoji_after_sentences(text: str) -> bool:
    """An emoji stands at the end of each sentence, before its mark or after it."""
    at = 0
    for sentence in instruct_text.sentences(text):
        at = text.index(sentence, at) + len(sentence)
        before = sentence[-NEAR:].rstrip(string.punctuation + " ")
        after = text[at : at + NEAR].lstrip(string.punctuation + string.whitespace)
        ends = [found["match_end"] for found in emoji.emoji_list(before)]
        starts = [found["match_start"] for found in emoji.emoji_list(after)]
        if ends[-1:] != [len(before)] and starts[:1] != [0]:
            return False
    return True


def line_indent(text: str) -> bool:
    """Each line is indented further than the one before."""
    lines = [line for line in text.split("\n") if line.strip()]
    depths = [len(line) - len(line.lstrip(" ")) for line in lines]
    return len(depths) > 1 and all(a < b for a, b in itertools.pairwise(depths))


def quote_unquote(text: str) -> bool:
    """No quoted phrase follows another at once, and none ends the text."""
    marks = "".join(text.translate(_STRAIGHT).replace("'\"'", "").split())
    last = marks.strip(string.digits + string.punctuation.replace('"', ""))[-1:]
    return '""' not in marks and last != '"'


def separated_list(text: str, *, sep: str) -> bool:
    """The marker of items occurs at least twice."""
    return text.count(sep) >= 2


def thesis(text: str) -> bool:
    """Something in italics, as HTML has them, and text after it."""
    for tag in ("i", "em"):
        _, opened, rest = text.partition(f"<{tag}>")
        said, closed, after = rest.partition(f"</{tag}>")
        if opened and closed and said.strip() and after.strip():
            return True
    return False


def sub_bullets(text: str) -> bool:
    """There are bullets of *, each with at least one of - below it."""
    kinds = "".join(
        line.lstrip()[0] for line in text.split("\n") if line.lstrip().startswith(("*", "-"))
    )
    return "*" in kinds and all(kinds[kinds.index("*") :].split("*")[1:])


def no_bullets_bullets(text: str) -> bool:
    """At least two sentences that end in periods, then at least two bullets of * and no more."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    first = next((i for i, line in enumerate(lines) if line.startswith("*")), len(lines))
    bullets = lines[first:]
    said = _ends("\n".join(lines[:first]))["."]
    return said >= 2 and len(bullets) >= 2 and all(line.startswith("*") for line in bullets)


def title_case(text: str) -> bool:
    """No word begins with a small letter, but for names like iPhone."""
    words = [token for token in _tokens(text) if not _CLITIC.fullmatch(token)]
    return not any(word[0].islower() and (word[1:].islower() or word == word[0]) for word in words)


def output_template(text: str) -> bool:
    """The three headings of the template occur, in their order."""
    places = [text.find(part) for part in ("My Answer:", "My Conclusion:", "Future Outlook:")]
    return -1 not in places and places == sorted(places)


def no_whitespace(text: str) -> bool:
    """There is no blank space."""
    return not any(map(str.isspace, text))


# Requests of their own


def multiples(text: str) -> bool:
    """The numbers are the multiples of 7 between 10 and 50."""
    return re.findall(r"\d+", text) == [str(n) for n in range(14, 51, 7)]


def mcq_count_length(text: str) -> bool:
    """Four questions of five options each, every question longer than the one before."""
    if not text.startswith("Question"):
        return False
    lengths = []
    for part in _QUESTION.split(text)[1:]:
        lines = [line.strip() for line in part.strip().split("\n")]
        chosen = [bool(_OPTION.match(line)) for line in lines]
        if sum(chosen) != 5:
            return False
        lengths.append(len(" ".join(lines[: chosen.index(True)])))
    return len(lengths) == 4 and all(a < b for a, b in itertools.pairwise(lengths))


def reverse_newline(text: str) -> bool:
    """A country of Africa a line, from Zimbabwe on in reverse alphabetical order."""
    lines = [_ascii(line) for line in map(_bare, text.split("\n")) if line]
    first = next((i for i, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    listed = lines[first:]
    return len(listed) >= COUNTRIES_OF_AFRICA and listed == sorted(listed, reverse=True)


def word_reverse(text: str) -> bool:
    """The words, last first, name the bald eagle."""
    return "bald eagle" in " ".join(_words(text)[::-1])


def character_reverse(text: str) -> bool:
    """The letters, last first, name the bald eagle."""
    return "bald eagle"[::-1] in text.lower()


def sentence_alphabet(text: str) -> bool:
    """Twenty-six sentences, whose first letters are the alphabet."""
    firsts = [
        s.lstrip(string.punctuation + string.whitespace)[:1] for s in instruct_text.sentences(text)
    ]
    return "".join(firsts).lower() == string.ascii_lowercase


def european_capitals_sort(text: str) -> bool:
    """The capitals north of 45 degrees, from north to south, parted by commas."""
    return [city.strip() for city in _ascii(text).split(",") if city.strip()] == CAPITALS


def csv_city(text: str) -> bool:
    """Seven rows of five columns below the given header."""
    rows = _rows(text.strip())
    header = ["ID", "Country", "City", "Year", "Count"]
    return len(rows) == 8 and rows[0] == header and all(len(row) == 5 for row in rows)


def csv_special_character(text: str) -> bool:
    """Fourteen rows below the given header, with a quoted field that has a special character."""
    rows = _quoted_rows(text, ",")
    names = ["ProductID", "Category", "Brand", "Price", "Stock"]
    return _table(rows, names, 14) and any(
        _is_quoted(field) and re.search(r'[^\w\s"]', field) for row in rows[1:] for field in row
    )


def csv_quotes(text: str) -> bool:
    """Three rows below the given header, parted by tabs, every field in double quotes."""
    rows = _quoted_rows(text, "\t")
    names = ["StudentID", "Subject", "Grade", "Semester", "Score"]
    return _table(rows, names, 3) and all(_is_quoted(field) for row in rows for field in row)


def _rows(text: str, delimiter: str = ",") -> list[list[str]]:
    """The fields of a table; none where it is no table."""
    try:
        return [*csv.reader(text.split("\n"), delimiter=delimiter)]
    except csv.Error:  # a field of 128 KiB, for instance
        return []


def _quoted_rows(text: str, delimiter: str) -> list[list[str]]:
    """The fields of a table, with the quotes around them."""
    rows = _rows(text.strip().replace('"', '"""'), delimiter)
    return [[field.strip() for field in row] for row in rows]


def _is_quoted(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


def _table(rows: list[list[str]], names: list[str], count: int) -> bool:
    return (
        len(rows) == count + 1
        and [name.strip('"') for name in rows[0]] == names
        and all(len(row) == len(names) for row in rows)
    )


def date_format_list(text: str) -> bool:
    """Dates of Napoleon's life as YYYY-MM-DD, parted by commas, and nothing else."""
    for part in text.split(","):
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", part.strip()):
            return False
        try:
            date = datetime.date.fromisoformat(part.strip())
        except ValueError:
            return False
        if not NAPOLEON[0] <= date <= NAPOLEON[1]:
            return False
    return True


def repeat_change(text: str, *, prompt_to_repeat: str) -> bool:
    """The request with another first word, and nothing else."""
    asked, said = prompt_to_repeat.split(), text.split()
    return asked[1:] == said[1:] and asked[:1] != said[:1]


def repeat_simple(text: str) -> bool:
    """The sentence that was asked for, and nothing else."""
    return text.strip().lower() == REPEATED


def repeat_span(text: str, *, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """The words from the first index to the last, both included, and nothing else."""
    if n_start > n_end:
        raise ValueError(f"n_start = {n_start}: must not exceed n_end = {n_end}")
    return text.lower().split() == prompt_to_repeat.lower().split()[n_start : n_end + 1]


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
    "format:parentheses": parentheses,
    "format:quotes": quotes,
    "format:options": options,
    "format:newline": newline,
    "format:emoji": emoji_after_sentences,
    "format:line_indent": line_indent,
    "format:quote_unquote": quote_unquote,
    "format:list": separated_list,
    "format:thesis": thesis,
    "format:sub-bullets": sub_bullets,
    "format:no_bullets_bullets": no_bullets_bullets,
    "format:title_case": title_case,
    "format:output_template": output_template,
    "format:no_whitespace": no_whitespace,
    "custom:multiples": multiples,
    "custom:mcq_count_length": mcq_count_length,
    "custom:reverse_newline": reverse_newline,
    "custom:word_reverse": word_reverse,
    "custom:character_reverse": character_reverse,
    "custom:sentence_alphabet": sentence_alphabet,
    "custom:european_capitals_sort": european_capitals_sort,
    "custom:csv_city": csv_city,
    "custom:csv_special_character": csv_special_character,
    "custom:csv_quotes": csv_quotes,
    "custom:date_format_list": date_format_list,
    "repeat:repeat_change": repeat_change,
    "repeat:repeat_simple": repeat_simple,
    "repeat:repeat_span": repeat_span,
}
