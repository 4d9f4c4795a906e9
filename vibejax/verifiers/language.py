"""Which natural language a text is in.

By py3langid, a maintained naive Bayes classifier over byte n-grams: its 5 MB model ships in the
wheel (nothing is fetched), it needs only numpy, gives the same answer every time, and takes 0.3 ms
a text. The detector IFEval uses, langdetect, is drawn from a random generator and unmaintained;
lingua and fastText are an order of magnitude larger. It is imported at the first use, so that
workers that meet no language rule start without numpy and the model.
"""

import functools
import re

# ISO 639-1 codes of the languages langdetect knows, so that both choose among the same ones.
CODES = (
    "af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr "
    "ne nl no pa pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh"
).split()
_NORWEGIAN_FORMS = ("nn",)  # written forms that the model tells apart and rules do not
_LETTER = re.compile(r"[^\W\d_]")
_MAX_CHARS = 10_000  # more text does not change the answer and costs time


def code(name: str) -> str:
    """Normalises a language code: `zh-cn` and `ZH` to `zh`, `nb` and `nn` to `no`.

    Raises:
        ValueError: the code is not one of `CODES`.
    """
    short = name.lower().replace("_", "-").partition("-")[0]
    short = "no" if short in ("nb", "nn") else short
    if short not in CODES:
        raise ValueError(f"language = {name!r}: must be one of {', '.join(CODES)}")
    return short


def detect(text: str) -> str | None:
    """Returns the code of the language most of a text is in, None if it has no letters.

    A text of less than about twenty letters is a guess.
    """
    if not _LETTER.search(text):
        return None
    # Case says nothing about the language, and the model has seen few capitals.
    found, _ = _identifier().classify(text[:_MAX_CHARS].lower())
    return "no" if found in _NORWEGIAN_FORMS else found


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages([*CODES, *_NORWEGIAN_FORMS])
    return identifier
