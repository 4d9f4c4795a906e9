"""Brings the many ways of writing one answer, Unicode and LaTeX, to one spelling.

`clean` keeps what an answer says and drops how it looks: delimiters, spacing, sizes, fonts. In its
result multiplication is `*`, a fraction `\\frac{a}{b}`, a root `\\sqrt{a}`, percent `%`, degrees
`\\text{degree}`; prose stands in `\\text{...}` where the answer had it so, functions carry their
backslash, rows of a table are separated by `ROW`, and blanks remain only between two letters or
digits, where dropping them would change a meaning ("1 1/2").
"""

import re
import unicodedata

ROW = "\ue000"  # a character of private use, which no answer means
_THIN = "\x1f"  # a thin space, which may separate thousands

_CHARACTERS = {
    "\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u00b7": "*", "\u22c5": "*", "\u2217": "*",
    "\u2219": "*", "\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2248": r"\approx ",
    "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset ",
    "\u00b1": r"\pm ", "\u2213": r"\mp ", "\u00b0": r"^\circ ", "\u211d": r"\mathbb{R}",
    "\u221a": r"\sqrt ", "\u03b8": r"\theta ", "\u03b1": r"\alpha ", "\u03b2": r"\beta ",
    "\u03b3": r"\gamma ", "\u03bb": r"\lambda ", "\u03bc": r"\mu ", "\u03c6": r"\phi ",
    "\u2220": r"\angle ", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2009": _THIN,
    "\u202f": _THIN,
}  # fmt: skip
_CHARACTER = re.compile("[" + "".join(_CHARACTERS) + "]")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_SUPERSCRIPT = re.compile("(\u207b?)([\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+)")

_BARE_NAMES = (
    r"sqrt arcsin arccos arctan sin cos tan cot sec csc log ln exp pi theta alpha beta gamma "
    r"infinity infty inf oo"
).split()
_BARE_NAME = re.compile(
    r"\\text\{[^{}]*\}|(?<![\\a-zA-Z])(" + "|".join(_BARE_NAMES) + r")(?![a-zA-Z])"
)
_FONT = re.compile(
    r"\\(text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|cal)|operatorname\*?|mbox|hbox"
    r"|boldsymbol|bm|emph|underline)\s*\{([^{}]*)\}"
)
_FONT_OF_GROUP = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|boldsymbol|bm|underline)\{")
_TABLE = re.compile(r"\\begin\{(?:[a-z]*matrix|array|cases)\}")

_END = r"(?![a-zA-Z])"
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[()\[\]]", " "),
        (r"\\?\$", " "),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)" + _END, ""),
        (r"\\(?:display|text|script)style" + _END + r"|\\limits" + _END + r"|\\!", ""),
        (r"\{([,:])\}", r"\1"),
        (r"\\[lc]?dots" + _END, "..."),
        (r"_\{(\w)\}", r"_\1"),
        (r"\\,|\\ |~", _THIN),
        (r"\\[;:>]|\\q?quad" + _END + r"|\\h(?:space|skip)\*?\{[^{}]*\}", " "),
        (r"\\[dtc]frac" + _END, r"\\frac"),
        (r"\\(?:leqslant|leq|le)" + _END + r"|<=", r"\\le "),
        (r"\\(?:geqslant|geq|ge)" + _END + r"|>=", r"\\ge "),
        (r"\\neq?" + _END + r"|!=|\\not\s*=", r"\\ne "),
        (r"\\lt" + _END, "<"),
        (r"\\gt" + _END, ">"),
        (r"\\(?:cdot|times|ast)" + _END, "*"),
        (r"\\div" + _END, "/"),
        (r"\*\*", "^"),
        (r"\\lbrace" + _END, r"\\{"),
        (r"\\rbrace" + _END, r"\\}"),
        (r"\\langle" + _END, "("),
        (r"\\rangle" + _END, ")"),
        (r"\\[lr]?vert" + _END, "|"),
        (r"\\varnothing" + _END, r"\\emptyset"),
        (r"\\var(phi|theta|epsilon)" + _END, r"\\\1"),
        (r"\\(?:lor|vee)" + _END, " or "),
        (r"\\(?:land|wedge)" + _END, " and "),
        (r"\\mathbb\s*R" + _END + r"|\\R" + _END, r"\\mathbb{R}"),
        (r"\^\s*(?:\\circ" + _END + r"|\{\s*\\circ\s*\})|\\degree" + _END, r"\\text{degree}"),
        (r"\\text\{degree\}\s*(?:\\text\{\s*)?([CF])(?![a-zA-Z])\}?", r"\\text{degree \1}"),
        (r"\\%|\\text\{per ?cent\}|(?<![a-zA-Z{])per ?cent" + _END, "%"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    )
]
_LATE_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\in(?:finity|f)" + _END + r"|\\oo" + _END, r"\\infty"),
        (r"(?<![\w)}])\+\s*\\infty", r"\\infty"),
        (r"\\frac\s*([0-9a-zA-Z])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
        (r"\\sqrt\s*([0-9a-zA-Z](?![0-9])|\\pi" + _END + ")", r"\\sqrt{\1}"),
        (rf"(?<![\d.,])(\d{{1,3}}(?:{_THIN}\d{{3}})+)(?!\d)", lambda m: m[1].replace(_THIN, "")),
        (r"\s+", " "),
        (r"\\log_([0-9a-zA-Z])\s*", r"\\log_{\1}"),
        # "1, 234" is two numbers
        (r" (?!\w)|(?<!\w)(?<!\d,) |(?<=,) (?!\d)", ""),
    )
]
_TRIMMED = re.compile(
    r"^[\s:=]+|^\\approx|^(?:approximately|about|exactly|roughly)"
    + _END
    + r"|(?<!\.)(?!\.\.\.)[.,;:\s]+$"
)


def clean(text: str) -> str:
    """Returns the text in the one spelling that the module docstring describes."""
    text = re.sub(r"[\x00-\x1f\x7f\ue000]", " ", text)
    text = re.sub("\u221a(\\d+)", r"\\sqrt{\1}", text)
    text = _VULGAR.sub(_vulgar, text)
    text = _SUPERSCRIPT.sub(_superscript, text)
    text = _CHARACTER.sub(lambda m: _CHARACTERS[m[0]], text)
    text = unicodedata.normalize("NFKC", text)
    if r"\\begin" in text:  # escaped once too often, as in a JSON string
        text = text.replace(r"\\", "\\")
    elif not _TABLE.search(text):
        text = re.sub(r"\\\\(?=\\?[a-zA-Z{}%$,;!()\[\]\\])", r"\\", text)
    if _TABLE.search(text):
        text = re.sub(r"\\\\(?:\s*\[[^\]]*\])?", ROW, text)
    text = trim(text)
    text = _FONT.sub(_font, text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _FONT_OF_GROUP.sub(lambda m: m[0] if m[0] == r"\text{" else "{", text)
    text = _BARE_NAME.sub(lambda m: "\\" + m[1] if m[1] else m[0], text)
    text = _root_of_parentheses(text)
    for pattern, replacement in _LATE_RULES:
        text = pattern.sub(replacement, text)
    return trim(text)


def trim(text: str) -> str:
    """Drops what surrounds an answer: blanks, final full stops, "=", emphasis, quotes, braces."""
    while True:
        before = text
        text = _TRIMMED.sub("", text.strip())
        for mark in ("**", "`", '"', "'"):
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)]
        if text.startswith("{") and closing(text, 0) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            return text


_BRACKET = re.compile(r"\\[{}]|\\begin\{\w+\}|\\end\{\w+\}|\\.|[()\[\]{}]", re.DOTALL)
_OPENING = ("(", "[", "{", r"\{")


def depths(text: str) -> list[int]:
    """Returns for each character how many brackets are open before it.

    Square and round brackets close each other, as in [1, 2).
    """
    result = [0] * len(text)
    depth = last = 0
    for match in _BRACKET.finditer(text):
        token = match[0]
        opens = token in _OPENING or token.startswith(r"\begin")
        closes = token in (")", "]", "}", r"\}") or token.startswith(r"\end")
        if not opens and not closes:
            continue
        result[last : match.start()] = [depth] * (match.start() - last)
        last = match.start()
        depth += 1 if opens else -1
        if closes:
            result[last : match.end()] = [depth + 1] * (match.end() - last)
            last = match.end()
    result[last:] = [depth] * (len(text) - last)
    return result


def closing(text: str, start: int) -> int | None:
    """Returns where the last character of the bracket lies that closes the one at `start`."""
    depth = 0
    for match in _BRACKET.finditer(text, start):
        token = match[0]
        if token in _OPENING or token.startswith(r"\begin"):
            depth += 1
        elif token in (")", "]", "}", r"\}") or token.startswith(r"\end"):
            depth -= 1
            if depth == 0:
                return match.end() - 1
    return None


def split(text: str, separator: re.Pattern) -> tuple[list[str], list[str]]:
    """Splits a text where a separator stands outside of all brackets.

    Returns:
        The parts, and the separators between them.
    """
    level = depths(text)
    parts, separators, last = [], [], 0
    for match in separator.finditer(text):
        if level[match.start()] == 0:
            parts.append(text[last : match.start()])
            separators.append(match[0].strip())
            last = match.end()
    return [*parts, text[last:]], separators


def _vulgar(match: re.Match) -> str:
    above, below = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def _superscript(match: re.Match) -> str:
    return "^{" + ("-" if match[1] else "") + unicodedata.normalize("NFKC", match[2]) + "}"


def _font(match: re.Match) -> str:
    command, content = match[1], match[2].strip(" ~")
    if content.lower() in ("and", "or"):
        return f" {content.lower()} "
    if content in _BARE_NAMES:
        return f"\\{content} "
    # a letter in a mathematical font is that letter, but \mathrm{m} may be a metre
    letter = len(content) == 1 and not command.startswith("text")
    if letter and (command not in ("mathrm", "mbox", "hbox") or content in "eid"):
        return f" {content} "
    if not any(c.isalpha() for c in content):
        return f" {content} "
    return rf"\text{{{content}}}"


def _root_of_parentheses(text: str) -> str:
    while match := re.search(r"\\sqrt\s*\(", text):
        start = match.end() - 1
        end = closing(text, start)
        if end is None:
            return text
        text = rf"{text[: match.start()]}\sqrt{{{text[start + 1 : end]}}}{text[end + 1 :]}"
    return text
