"""Equality of expressions that are no plain numbers: parsed by math-verify, decided by value.

Two expressions are equal if they agree to 25 digits where they are evaluated: once without
variables, else at fixed points with positive and with negative variables. That is fast and cannot
run away like a simplification can. Where only negative variables make a difference, as between
sqrt(a) sqrt(b) and sqrt(a b), or nothing can be evaluated, math-verify's own comparison decides.

The parser guesses where a reader would not: "3 4" is 7 to it, "1011_2" is 1011, "A" is "a", and a
prime vanishes. `_parse` refuses such text instead.
"""

import dataclasses
import functools
import logging
import random
import re
from fractions import Fraction
from typing import Any

from vibejax.verifiers import clock

DIGITS = 30
AGREEMENT = 1e-25
TINY = 1e-40
POINTS = 3  # of each sign

_COMMANDS = set(
    "frac sqrt pi sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp binom "
    "theta alpha beta gamma delta lambda mu phi omega sigma rho lfloor rfloor lceil rceil "
    "sum prod int infty max min gcd".split()
)
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_READABLE = re.compile(r"[\w\s+\-*/^(){}\[\]|!.]*", re.ASCII)
_UNCLEAR = re.compile(r"\d \d|\d_|!!|[a-zA-Z]{4}")
# powers that sympy would write out; \sqrt10 and \sqrt{2}1, which LaTeX reads unlike people
_REFUSED = re.compile(r"\^\{?[-+]?[\d.]{5}|\^\{?\w+\^\{?\w+\^|\\sqrt\d|[})]\d")
_WORDS_OF_TWO = {"no", "on", "is", "so", "up", "to", "of", "or", "if", "at"}


@functools.cache
def load() -> tuple[Any, Any, Any]:
    """Imports math-verify and sympy, at the first expression that is no plain number.

    Returns:
        The two modules and the configuration with which math-verify parses.
    """
    with clock.stopped():
        import math_verify
        import sympy

    # it warns of each call without its own time limit, which needs SIGALRM on the main thread
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    latex = math_verify.LatexExtractionConfig()
    # `units` would read 5m as 5; boxes and delimiters are gone already
    normalization = dataclasses.replace(
        latex.normalization_config, units=False, boxed="none", nits=False
    )
    return math_verify, sympy, [dataclasses.replace(latex, normalization_config=normalization)]


def same_value(a: str, b: str) -> bool:
    """Whether two cleaned expressions are equal for all values of their variables."""
    if not _same_letters(a, b):
        return False
    if a.isalpha() and b.isalpha():  # letters alone are a word before they are a product
        return len(a) == 2 and a.islower() and a not in _WORDS_OF_TWO and sorted(a) == sorted(b)
    parsed_a, parsed_b = _parse(a), _parse(b)
    if parsed_a is None or parsed_b is None:
        return False
    points = _points(parsed_a, parsed_b)
    values = [(_value(parsed_a, point), _value(parsed_b, point)) for point in points]
    compared = [None if None in pair else _close(*pair) for pair in values]
    positive, negative = compared[: len(points) // 2 or 1], compared[len(points) // 2 :]
    if False in positive:
        return False
    if True in positive and False not in negative:
        return True
    library, _, _ = load()
    return library.verify(parsed_a, parsed_b, timeout_seconds=None) or library.verify(
        parsed_b, parsed_a, timeout_seconds=None
    )


def constant_ratio(a: tuple[str, str], b: tuple[str, str]) -> float:
    """Returns by which constant the difference of one pair is a multiple of the other's.

    Two equations are the same if there is such a constant, two inequalities if it is positive.

    Args:
        a: left and right side of a relation, cleaned.
        b: the same of another.

    Returns:
        (a0 - a1) / (b0 - b1), or 0.0 if that is no real constant or cannot be told.
    """
    if not _same_letters("".join(a), "".join(b)):
        return 0.0
    a0, a1, b0, b1 = (_parse(side) for side in (*a, *b))
    if a0 is None or a1 is None or b0 is None or b1 is None:
        return 0.0
    points = _points(a0, a1, b0, b1)
    if points == [{}]:  # 3 = 4 is no equation
        return 0.0
    ratio = None
    for point in points:
        values = [_value(side, point) for side in (a0, a1, b0, b1)]
        if None in values:
            return 0.0
        above, below = values[0] - values[1], values[2] - values[3]
        if abs(below) < TINY or abs(above) < TINY:
            return 0.0
        here = above / below
        if ratio is not None and not _close(ratio, here):
            return 0.0
        ratio = here
    return float(ratio) if ratio.is_real else 0.0


def real_value(text: str, decimals: int) -> Fraction | None:
    """Returns an expression without variables as a fraction good to more than `decimals` digits."""
    parsed = _parse(text)
    if parsed is None or parsed.free_symbols:
        return None
    value = _value(parsed, {})
    if value is None or not value.is_real or abs(value) > 10 ** max(1, 20 - decimals):
        return None
    return Fraction(str(value))


def _same_letters(a: str, b: str) -> bool:
    """Whether no letter is upper case here and lower case there, which the parser would merge."""
    plain_a, plain_b = _COMMAND.sub(" ", a), _COMMAND.sub(" ", b)
    letters = {c for c in plain_a + plain_b if c.isalpha()}
    return all(c == c.lower() or c.lower() not in letters for c in letters)


@functools.lru_cache(maxsize=512)  # the completions of a group share their ground truth
def _parse(text: str) -> Any:
    """Returns the sympy expression of a cleaned text, or None if it is none or is unclear."""
    plain = _COMMAND.sub(" ", text)
    aggregate = "\\sum" in text or "\\prod" in text
    if aggregate:
        plain = plain.replace("=", " ")
    if "\\max" in text or "\\min" in text or "\\gcd" in text:
        plain = plain.replace(",", " ")
    if not _READABLE.fullmatch(plain) or _UNCLEAR.search(_COMMAND.sub("\\\\", text)):
        return None
    if _REFUSED.search(re.sub(r"\\log_\{\w+\}", r"\\log ", text)) or not _COMMANDS.issuperset(
        _COMMAND.findall(text)
    ):
        return None
    library, sympy, config = load()
    parsed = library.parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    if not parsed or not isinstance(parsed[0], sympy.Expr):
        return None
    expression = parsed[0]
    names = {symbol: sympy.Symbol(symbol.name) for symbol in expression.free_symbols}
    if not aggregate:
        names |= {symbol: sympy.I for symbol in names if symbol.name == "i"}
    floats = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    return expression.xreplace(names | floats)


def _points(*expressions: Any) -> list[dict[Any, Any]]:
    """Returns the points at which to evaluate: first the positive, then as many negative ones."""
    _, sympy, _ = load()
    symbols = sorted(set().union(*(e.free_symbols for e in expressions)), key=str)
    if not symbols:
        return [{}]
    draw = random.Random(0)
    positive = [
        {symbol: sympy.Rational(draw.randint(500, 3000), 1009) for symbol in symbols}
        for _ in range(POINTS)
    ]
    negative = [
        {symbol: -value * draw.choice((1, 1, -1)) for symbol, value in point.items()}
        for point in positive
    ]
    return positive + negative


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """Returns the expression's number at a point, or None if it has none there."""
    _, sympy, _ = load()
    try:
        value = sympy.N(expression.subs(point), DIGITS)
    except (ArithmeticError, ValueError, TypeError, AttributeError, RecursionError):
        return None  # sympy's ways to say that it cannot evaluate
    return value if value.is_number and value.is_finite else None


def _close(a: Any, b: Any) -> bool:
    difference = abs(a - b)
    return bool(difference < TINY or difference < AGREEMENT * max(abs(a), abs(b)))
