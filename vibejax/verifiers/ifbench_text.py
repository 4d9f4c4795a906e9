"""How IFBench cuts texts: words, tokens, ends of sentences (which are those of `instruct_text`)."""

import collections
import re
import string
import unicodedata

from vibejax.verifiers import instruct_text

UNPUNCTUATED = str.maketrans("", "", string.punctuation)
CLITIC = re.compile(r"(?:n['\u2019]t|['\u2019](?:s|m|d|ll|re|ve))$", re.IGNORECASE)
_TOKEN = re.compile(r"\w+(?:[-/.,:'\u2019]\w+)*|[^\w\s]")


def split_words(text: str) -> list[str]:
    """Lowercase words without any punctuation, as blank space parts them."""
    return text.lower().translate(UNPUNCTUATED).split()


def cut_tokens(text: str) -> list[str]:
    """Words and marks, the clitics of contractions cut off."""
    found = []
    for token in _TOKEN.findall(text):
        clitic = CLITIC.search(token)
        cut = clitic.start() if clitic else 0
        found += [token[:cut], token[cut:]] if cut else [token]
    return found


def word_tokens(text: str) -> list[str]:
    """Tokens that are more than marks."""
    return [token for token in cut_tokens(text) if any(map(str.isalnum, token))]


def bare(text: str) -> str:
    """The text without punctuation around it."""
    return text.strip(string.punctuation + " ")


def endings(text: str) -> collections.Counter[str]:
    """How many sentences end in which mark."""
    found = (s.rstrip(instruct_text.CLOSERS) for s in instruct_text.sentences(text))
    return collections.Counter(s[-1] for s in found)


def as_ascii(text: str) -> str:
    """The text without accents; what has no letter of ASCII is dropped."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def require_positive(**given: int) -> None:
    """Refuses a kwarg below 1.

    Raises:
        ValueError: there is one; the message names it.
    """
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
