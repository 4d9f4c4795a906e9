"""Numbers with units: reading them from text or LaTeX, and comparing them in the same unit.

Own code, because a units library evaluates what it reads as an expression and takes longer to
import than a worker to start; the answers of science questions need some sixty units.
"""
# ruff: noqa: RUF001 - signs of all kinds for minus, times, micro, ohm and degree are meant

import dataclasses
import math
import re

# Dimensions are exponents of (metre, kilogram, second, ampere, kelvin, mole, candela).
_NONE = (0, 0, 0, 0, 0, 0, 0)
_M, _KG, _S, _A, _K, _MOL, _CD = (tuple(int(i == j) for j in range(7)) for i in range(7))
_FORCE, _ENERGY, _POWER = (1, 1, -2, 0, 0, 0, 0), (2, 1, -2, 0, 0, 0, 0), (2, 1, -3, 0, 0, 0, 0)
_PRESSURE, _VOLUME = (-1, 1, -2, 0, 0, 0, 0), (3, 0, 0, 0, 0, 0, 0)
_VOLT, _OHM = (2, 1, -3, -1, 0, 0, 0), (2, 1, -3, -2, 0, 0, 0)
_DECAY, _DOSE = (0, 0, -1, 0, 0, 0, 0), (2, 0, -2, 0, 0, 0, 0)
PREFIXES = {
    "Y": 1e24, "Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "h": 1e2,
    "d": 1e-1, "c": 1e-2, "m": 1e-3, "u": 1e-6, "n": 1e-9, "p": 1e-12, "f": 1e-15, "a": 1e-18,
    "giga": 1e9, "mega": 1e6, "kilo": 1e3, "centi": 1e-2, "milli": 1e-3, "micro": 1e-6,
    "nano": 1e-9, "pico": 1e-12, "femto": 1e-15,
}  # fmt: skip
# symbols and words -> (size in SI units, dimensions); all of these take a prefix
_PREFIXED = {
    "m meter metre": (1, _M),
    "g gram": (1e-3, _KG),
    "s sec second": (1, _S),
    "A amp ampere": (1, _A),
    "K kelvin": (1, _K),
    "mol mole": (1, _MOL),
    "cd candela": (1, _CD),
    "N newton": (1, _FORCE),
    "J joule": (1, _ENERGY),
    "W watt": (1, _POWER),
    "Pa pascal": (1, _PRESSURE),
    "Hz hertz": (1, _DECAY),
    "Bq becquerel": (1, _DECAY),
    "Gy gray Sv sievert": (1, _DOSE),
    "C coulomb": (1, (0, 0, 1, 1, 0, 0, 0)),
    "V volt": (1, _VOLT),
    "ohm": (1, _OHM),
    "S siemens": (1, (-2, -1, 3, 2, 0, 0, 0)),
    "F farad": (1, (-2, -1, 4, 2, 0, 0, 0)),
    "T tesla": (1, (0, 1, -2, -1, 0, 0, 0)),
    "Wb weber": (1, (2, 1, -2, -1, 0, 0, 0)),
    "H henry": (1, (2, 1, -2, -2, 0, 0, 0)),
    "eV electronvolt": (1.602176634e-19, _ENERGY),
    "cal calorie": (4.184, _ENERGY),
    "L l liter litre": (1e-3, _VOLUME),
    "M molar": (1e3, (-3, 0, 0, 0, 0, 1, 0)),
    "bar": (1e5, _PRESSURE),
    "pc parsec": (3.0856775814913673e16, _M),
    "Da dalton": (1.66053906660e-27, _KG),
    "G gauss": (1e-4, (0, 1, -2, -1, 0, 0, 0)),
}
_PLAIN = {
    "% percent": (1e-2, _NONE),
    "ppm": (1e-6, _NONE),
    "ppb": (1e-9, _NONE),
    "rad radian": (1, _NONE),
    "deg degree": (math.pi / 180, _NONE),
    "rev revolution": (2 * math.pi, _NONE),
    "rpm": (2 * math.pi / 60, _DECAY),
    "min minute": (60, _S),
    "h hr hour": (3600, _S),
    "d day": (86400, _S),
    "yr year": (31557600, _S),
    "atm atmosphere": (101325, _PRESSURE),
    "torr Torr mmHg": (101325 / 760, _PRESSURE),
    "psi": (6894.757293168, _PRESSURE),
    "erg": (1e-7, _ENERGY),
    "dyn dyne": (1e-5, _FORCE),
    "hp": (745.6998715822702, _POWER),
    "angstrom": (1e-10, _M),
    "in inch": (0.0254, _M),
    "ft foot feet": (0.3048, _M),
    "mi mile": (1609.344, _M),
    "AU au": (149597870700, _M),
    "ly lightyear": (9460730472580800, _M),
    "lb pound": (0.45359237, _KG),
    "t ton tonne": (1e3, _KG),
    "u amu": (1.66053906660e-27, _KG),
    "degC celsius": (1, _K),
    "degF fahrenheit": (5 / 9, _K),
}
_CELSIUS, _FAHRENHEIT = 273.15, 459.67 * 5 / 9  # kelvin at the zero of the scale
_OFFSETS = {"degc": _CELSIUS, "celsius": _CELSIUS, "degf": _FAHRENHEIT, "fahrenheit": _FAHRENHEIT}
_UNITS = {
    word: unit
    for table in (_PREFIXED, _PLAIN)
    for words, unit in table.items()
    for word in words.split()
}
_TAKES_PREFIX = frozenset(word for words in _PREFIXED for word in words.split())

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_REWRITES = [  # LaTeX and Unicode -> plain text, in this order
    (re.compile(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+"), lambda found: "^" + found[0].translate(_SUPERSCRIPTS)),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|\\deg(?![a-z])|°|º"), " deg "),
    (re.compile(r"deg\s+([CF])(?![a-zA-Z])"), r"deg\1"),
    (re.compile(r"℃"), " degC "),
    (re.compile(r"\\(?:text|mathrm|textrm|mathit|textbf|mathbf|rm|operatorname)\s*(?=\{)"), ""),
    (re.compile(r"\\d?t?frac\s*\{([^{}]{1,40})\}\s*\{([^{}]{1,40})\}"), r"(\1)/(\2)"),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])|[×·⋅∙]"), "*"),
    (re.compile(r"\\mu(?![a-zA-Z])\s*|[µμ]"), "u"),
    (re.compile(r"\\Omega(?![a-zA-Z])|[ΩΩ]"), "ohm"),
    (re.compile(r"\\(?:AA|angstrom)(?![a-zA-Z])|[ÅÅ]"), "angstrom"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;:! ]|~|\\(?:quad|left|right|displaystyle)(?![a-zA-Z])|\$|\\[()\[\]]"), " "),
    (re.compile(r"\{"), ""),
    (re.compile(r"\}"), " "),
    (re.compile(r"\s+"), " "),
]
_SYMBOL_EQUALS = re.compile(r"\s*[A-Za-z\\][A-Za-z0-9_\\ ]{0,30}(?:=|≈|\\approx)\s*")
_ABOUT = re.compile(r"\s*(?:=|≈|~|\\approx|\\sim|about|approximately|roughly)\s*", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?P<mantissa>[+-]?\s?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+))"
    r"(?:[eE](?P<e>[+-]?\d{1,3})(?![\w.])|\s?(?:\*|x)\s?10\s?\^\s?\(?\s?(?P<times>[+-]?\s?\d{1,3})\s?\)?)?"
)
_POWER_OF_TEN = re.compile(r"(?P<sign>[+-]?)\s?10\s?\^\s?\(?\s?(?P<power>[+-]?\s?\d{1,3})\s?\)?")
_FRACTION = re.compile(r"([+-]?)\(?\s?(\d{1,15})\s?\)?\s?/\s?\(?\s?(\d{1,15})\s?\)?(?![\d.])")
_FACTOR = re.compile(r"([A-Za-z%]+)\s?(?:\^\s?\(?\s?([+-]?\s?\d)\s?\)?|(-?\d))?")
MAX_CHARS = 200  # no quantity is longer


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number and the text of its unit, in plain text; the unit is empty if there is none."""

    value: float
    unit: str


def read(text: str) -> Quantity | None:
    """Reads a text that is one number with or without a unit, and nothing else.

    `9.81 m/s^2`, `1.6 \\times 10^{-19}\\,\\mathrm{C}`, `E = 3,000 kJ/mol`, `1/2`, `25 °C`.

    Returns:
        The quantity, or None: no number, several numbers, or words around it.
    """
    if len(text) > MAX_CHARS:
        return None
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip().strip("*").strip()
    if symbol := _SYMBOL_EQUALS.match(text):
        text = text[symbol.end() :]
    if about := _ABOUT.match(text):
        text = text[about.end() :]
    value, rest = _number(text.strip())
    if value is None or not math.isfinite(value):
        return None
    rest = rest.strip().rstrip(".").strip().strip("*").strip()
    if rest and _factors(rest) is None:
        return None
    return Quantity(value, rest)


def _number(text: str) -> tuple[float | None, str]:
    for pattern in (_FRACTION, _POWER_OF_TEN, _NUMBER):
        found = pattern.match(text)
        if not found:
            continue
        if pattern is _FRACTION:
            sign = -1 if found[1] == "-" else 1
            value = sign * int(found[2]) / int(found[3]) if int(found[3]) else None
        elif pattern is _POWER_OF_TEN:
            value = float(f"{found['sign']}1e{found['power'].replace(' ', '')}")
        else:
            exponent = found["e"] or found["times"] or "0"
            plain = found["mantissa"].replace(",", "").replace(" ", "")
            value = float(f"{plain}e{exponent.replace(' ', '')}")
        return value, text[found.end() :]
    return None, text


def _factors(unit: str) -> list[tuple[str, int]] | None:
    """Cuts a unit into (name, exponent); every name after a slash or "per" divides.

    Returns:
        None if the text is not of that form: it has other numbers or marks.
    """
    text = re.sub(r"\bper\b", "/", unit)
    factors, sign, at = [], 1, 0
    while at < len(text):
        if text[at] in " *()-.":  # a hyphen or point between units multiplies
            at += 1
        elif text[at] == "/":
            sign, at = -1, at + 1
        elif found := _FACTOR.match(text, at):
            exponent = int((found[2] or found[3] or "1").replace(" ", ""))
            factors.append((found[1], sign * exponent))
            at = found.end()
        else:
            return None
    names = [name for name, _ in factors]
    if not names or len(names) > 6 or {"or", "and", "to"} & set(names):
        return None
    return factors


def _resolve(unit: str) -> tuple[float, tuple[int, ...], float] | None:
    """Turns a unit into (size in SI units, dimensions, offset in kelvin), None if it is unknown."""
    factors = _factors(unit)
    if factors is None:
        return None
    offset = 0.0
    if len(factors) == 1 and factors[0][1] == 1:
        offset = _OFFSETS.get(factors[0][0].lower(), 0.0)
    size, dimensions = 1.0, _NONE
    for name, exponent in factors:
        known = _look_up(name)
        if known is None:
            return None
        size *= known[0] ** exponent
        dimensions = tuple(a + b * exponent for a, b in zip(dimensions, known[1], strict=True))
    return size, dimensions, offset


def _look_up(name: str) -> tuple[float, tuple[int, ...]] | None:
    words = [name, name.removesuffix("s"), name.removesuffix("es")]
    if len(name) > 3:  # words may be capitalised; in symbols the case tells M from m
        words += [word.lower() for word in words]
    for word in words:
        if word in _UNITS:
            return _UNITS[word]
        for length in (1, 4, 5):
            prefix, base = word[:length], word[length:]
            if prefix in PREFIXES and base in _TAKES_PREFIX:
                size, dimensions = _UNITS[base]
                return PREFIXES[prefix] * size, dimensions
    return None


def equal(answer: Quantity, truth: Quantity, *, rel_tol: float) -> bool:
    """Says whether an answer is the true quantity, in whatever unit of the same dimensions.

    The answer is converted into the truth's unit; the tolerance is relative to the truth there.
    Where one of the two names no unit, the numbers are compared as written (the question asked for
    a unit, and the other side left it out), except that a percentage equals its fraction where the
    truth is a plain number from -1 to 1. Units that are not known must read the same.
    """
    value = answer.value
    if answer.unit and truth.unit:
        given, wanted = _resolve(answer.unit), _resolve(truth.unit)
        if given is None or wanted is None:
            if _plain_unit(answer.unit) != _plain_unit(truth.unit):
                return False
        elif given[1] != wanted[1]:
            return False
        else:
            value = (answer.value * given[0] + given[2] - wanted[2]) / wanted[0]
    elif answer.unit in ("%", "percent") and abs(truth.value) <= 1:
        value = answer.value / 100
    # Below 1e-9 the conversion's own rounding shows. Zero is met only by zero.
    return abs(value - truth.value) <= max(rel_tol, 1e-9) * abs(truth.value)


def _plain_unit(unit: str) -> str:
    return re.sub(r"[\s*]+", " ", unit).lower().rstrip("s")
