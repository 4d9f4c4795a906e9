"""Numbers with their units, exactly: integers, decimals, fractions, percentages."""

import dataclasses
import re
from fractions import Fraction

MAX_EXPONENT = 400  # of a power of ten that is still written out
APPROXIMATE_DIGITS = 6  # significant digits from which a decimal may stand for 1/3 or a root
FLOAT_DIGITS = 15  # significant digits from which a decimal may be a float's rounding noise
FLOAT_NOISE = Fraction(4, 10**15)

_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"
_PLAIN = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<repeating>\d*\.\d*)(?:\\overline\{{(?P<period>\d+)\}}|\\dot\{{?(?P<dot>\d)\}}?"
    r"|\((?P<parenthesis>\d+)\))"
    rf"|(?P<whole>{_DIGITS})(?: |\*?)(?:\\frac\{{(?P<up>\d+)\}}\{{(?P<down>\d+)\}})"
    r"|(?P<whole2>\d+) (?P<up2>\d+)/(?P<down2>\d+)"
    rf"|\\frac\{{(?P<over>[-+]?{_PLAIN})\}}\{{(?P<under>[-+]?{_PLAIN})\}}"
    rf"|(?P<left>{_PLAIN})/(?P<right>{_PLAIN})"
    rf"|(?:(?P<mantissa>{_PLAIN})\*)?10\^(?:\{{(?P<power>[-+]?\d+)\}}|(?P<digit>\d+))"
    rf"|(?P<mantissa2>{_PLAIN})[eE](?P<e>[-+]?\d+)"
    rf"|(?P<plain>{_PLAIN})"
)
_SIGN = re.compile(r"[-+ ]*")
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
_SUFFIX = re.compile(
    r"(?P<percent>%)$|(?P<unit>(?:\\text\{[^{}]*\}|(?<![\\a-zA-Z])[a-zA-Z]{2,}(?: [a-zA-Z]+)*)"
    r"(?:\^\{?[23]\}?)?(?:/(?:\\text\{[^{}]*\}|[a-zA-Z]+)(?:\^\{?[23]\}?)?)?)$"
)
_ANGLE = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)")
_UNIT_NAMES = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m",
    "metre": "m", "kilometer": "km", "kilometre": "km", "inch": "in", "inche": "in", "foot": "ft",
    "feet": "ft", "yard": "yd", "mile": "mi", "gram": "g", "kilogram": "kg", "pound": "lb",
    "ounce": "oz", "liter": "l", "litre": "l", "L": "l", "milliliter": "ml", "second": "s",
    "sec": "s", "minute": "min", "hour": "h", "hr": "h", "usd": "dollar", "buck": "dollar",
    "newton": "N", "joule": "J", "watt": "W", "volt": "V", "ampere": "A", "amp": "A",
    "radian": "rad", "deg": "degree", "unit": "",
}  # fmt: skip
_SYMBOLS = set(
    "cm mm m km in ft yd mi g kg mg lb oz l L ml s min h hr N J W V A K Pa kPa Hz rad mph kmh bps "
    "USD EUR men man cow pen cat dog day days egg eggs box car cars bag bags cup cups pie pies way "
    "ways toy toys".split()
)
_NO_UNITS = set(
    "and or not no to of than more less fewer most least over under above below minus plus times "
    "half twice thrice dozen hundred thousand million billion trillion greater smaller between "
    "except none undefined infinite each mod modulo base factorial squared cubed sum product "
    "point if when where for is are but".split()
)


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number as it was written.

    Attributes:
        value: its exact value, of a percentage the number before the sign.
        decimals: digits after the point of a plain decimal, None of anything else.
        percent: whether a percent sign follows.
    """

    value: Fraction
    decimals: int | None = None
    percent: bool = False

    @property
    def digits(self) -> int:
        """Significant digits of a plain decimal, 0 of anything else."""
        if not self.decimals:
            return 0
        return len(str(abs(int(self.value * 10**self.decimals))))


def split_unit(text: str) -> tuple[str, str | None]:
    """Splits a cleaned expression from the unit or percent sign that follows it.

    Words count as a unit in `\\text{...}` and after a blank; letters right behind a number are
    variables.

    Returns:
        The expression and its unit in one spelling, "%" for percent, "" for none, or None if words
        follow that are no unit.
    """
    match = _SUFFIX.search(text)
    if match is None or match.start() == 0:
        return text, ""
    body = text[: match.start()]
    if match["percent"]:
        return body.rstrip(), "%"
    unit = match["unit"]
    if "degree" in unit and _ANGLE.search(body):
        return text, None  # the unit of the angle, not of the whole
    if not unit.startswith("\\text") and not body.endswith((" ", "}", ")")):
        return text, ""
    return body.rstrip(), _unit(unit)


def quantity(text: str) -> Quantity | None:
    """Reads a cleaned number without its unit; None for anything else."""
    sign = _SIGN.match(text)[0]
    negative = sign.count("-") % 2 == 1
    match = _NUMBER.fullmatch(text, len(sign))
    if match is None:
        return None
    value, decimals = _value(match)
    if value is None:
        return None
    return Quantity(-value if negative else value, decimals)


def scaled(number: Quantity, unit: str) -> tuple[Quantity, str]:
    """Multiplies a number by the word of number that its unit begins with ("5 million people")."""
    first, _, rest = unit.partition(" ")
    if first not in _SCALES:
        return number, unit
    return Quantity(number.value * _SCALES[first]), rest


def same_unit(a: str, b: str) -> bool:
    """Whether two units agree; a missing one agrees with all."""
    return a == b or not a or not b


def same_number(a: Quantity, b: Quantity) -> bool:
    """Whether two numbers say the same.

    50% is 1/2, and, with the sign taken as a unit, 50. A decimal of six or more significant digits
    stands for a number that no decimal of its length equals, if it is that number rounded or cut
    off: 0.333333 for 1/3, but neither 0.333 nor 0.333334, and never 0.500001 for 1/2.
    """
    if a.percent == b.percent:
        return _close(a, b)
    ratio, number = (a, b) if a.percent else (b, a)
    decimals = None if ratio.decimals is None else ratio.decimals + 2
    if _close(Quantity(ratio.value / 100, decimals), number):
        return True
    # below one percent "0.5%" against 0.5 would be a guess
    return abs(ratio.value) >= 1 and _close(ratio, number)


def rounds_to(value: Fraction, number: Quantity) -> bool:
    """Whether a decimal of enough digits is the value, rounded or cut off to its length."""
    if number.digits < APPROXIMATE_DIGITS:
        return False
    shifted, written = abs(value) * 10**number.decimals, abs(number.value) * 10**number.decimals
    same_sign = (value < 0) == (number.value < 0)
    return same_sign and written in (int(shifted), int(shifted + Fraction(1, 2)))


def _close(a: Quantity, b: Quantity) -> bool:
    if a.value == b.value:
        return True
    if max(a.digits, b.digits) >= FLOAT_DIGITS:
        if abs(a.value - b.value) <= FLOAT_NOISE * max(abs(a.value), abs(b.value)):
            return True
    for number, exact in ((a, b), (b, a)):
        if number.decimals and exact.decimals is None:
            if (exact.value * 10**number.decimals).denominator != 1:
                return rounds_to(exact.value, number)
    return False


def _plain(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip("."))


def _value(match: re.Match) -> tuple[Fraction | None, int | None]:
    """Returns the value of a match of `_NUMBER`, and its decimals if it is a plain decimal."""
    if match["plain"]:
        text = match["plain"]
        return _plain(text), len(text.partition(".")[2]) if "." in text else None
    if match["repeating"] is not None:
        period = match["period"] or match["dot"] or match["parenthesis"]
        start = match["repeating"]
        shift = 10 ** len(start.partition(".")[2])
        tail = Fraction(int(period), 10 ** len(period) - 1)
        return Fraction((start + "0").replace(".", ".0") if start[0] == "." else start + "0") + (
            tail / shift
        ), None
    if exponent := match["power"] or match["digit"] or match["e"]:
        if len(exponent) > 6 or abs(int(exponent)) > MAX_EXPONENT:
            return None, None
        mantissa = match["mantissa"] or match["mantissa2"] or "1"
        return _plain(mantissa) * Fraction(10) ** int(exponent), None
    whole, above, below = (
        (
            match["whole"] or match["whole2"],
            match["up"] or match["up2"],
            match["down"] or match["down2"],
        )
        if match["whole"] or match["whole2"]
        else ("0", match["over"] or match["left"], match["under"] or match["right"])
    )
    denominator = _plain(below)
    if denominator == 0:
        return None, None
    return _plain(whole) + _plain(above) / denominator, None


def _unit(text: str) -> str | None:
    """Returns a unit in one spelling, or None if the words are no unit."""
    written = "\\text" in text
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\{?([23])\}?", r"^\1", text).strip(" .")
    numerator, *denominator = re.split(r"/| per ", text)
    names = [_unit_name(part.strip(), written) for part in (numerator, *denominator)]
    return None if None in names else "/".join(names)


def _unit_name(text: str, written: bool) -> str | None:
    base, _, power = text.partition("^")
    words = base.split()
    if words and words[0] in ("square", "sq", "cubic"):
        power = "3" if words.pop(0) == "cubic" else "2"
    elif len(words) > 1 and words[-1] in ("squared", "cubed"):
        power = "3" if words.pop() == "cubed" else "2"
    if not words or not all(re.fullmatch(r"[a-zA-Z]+", word) for word in words):
        return None
    if words[0].lower() in _SCALES:
        rest = words[1:]
        tail = _unit_name(" ".join(rest), written) if rest else ""
        return None if tail is None else f"{words[0].lower()} {tail}".strip()
    if any(word.lower() in _NO_UNITS for word in words):
        return None
    known = words[0] in _SYMBOLS or words[0] == "degree"
    # unknown words are things that are counted; short ones could be variables
    if not known and (len(words[0]) < (2 if written else 4)):
        return None
    last = words[-1] if words[-1] in _SYMBOLS else words[-1].lower()
    for name in (last, last.removesuffix("s")):
        if name in _UNIT_NAMES:
            words[-1] = _UNIT_NAMES[name]
            break
    else:
        words[-1] = last.removesuffix("s") if len(last) > 3 else last
    name = " ".join(words)
    return f"{name}^{power}" if power and name else name
