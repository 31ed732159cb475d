"""Numbers as people and models write them, and when two of them are the same answer.

Exact rationals throughout, so that 0.1 + 0.2 never decides a label. Grammar: optional sign and currency, then digits
with separators, a fraction, a mixed number, scientific notation or number words, then percent sign or unit.

Separators: "1,234" is one thousand two hundred thirty-four, as in English; "1.234" is a decimal. European writing is
accepted where it can mean nothing else: "1.234,5", "1.234.567", "0,5", "3,75".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

_MAX_DIGITS = 120
_MAX_EXPONENT = 400


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number found in a text: its value, its unit ("" if none), whether it is a percentage, and its place."""

    value: Fraction
    unit: str = ""
    is_percent: bool = False
    start: int = 0
    end: int = 0

    @property
    def key(self) -> tuple[Fraction, bool]:
        return (self.value, self.is_percent)


_UNITS: dict[str, tuple[str, Fraction]] = {}
for _dimension, _table in {
    "length": {
        "km kilometer kilometers kilometre kilometres": Fraction(1000),
        "m meter meters metre metres": Fraction(1),
        "dm decimeter decimeters decimetre decimetres": Fraction(1, 10),
        "cm centimeter centimeters centimetre centimetres": Fraction(1, 100),
        "mm millimeter millimeters millimetre millimetres": Fraction(1, 1000),
        "mi mile miles": Fraction(1609344, 1000),
        "yd yard yards": Fraction(9144, 10000),
        "ft foot feet": Fraction(3048, 10000),
        "inch inches": Fraction(254, 10000),
    },
    "mass": {
        "t tonne tonnes": Fraction(1000),
        "kg kilogram kilograms kilo kilos": Fraction(1),
        "g gram grams gm": Fraction(1, 1000),
        "mg milligram milligrams": Fraction(1, 10**6),
        "lb lbs pound pounds": Fraction(45359237, 10**8),
        "oz ounce ounces": Fraction(45359237, 16 * 10**8),
    },
    "time": {
        "day days": Fraction(86400),
        "h hr hrs hour hours": Fraction(3600),
        "min mins minute minutes": Fraction(60),
        "s sec secs second seconds": Fraction(1),
        "ms millisecond milliseconds": Fraction(1, 1000),
    },
    "volume": {
        "l liter liters litre litres": Fraction(1),
        "ml milliliter milliliters millilitre millilitres": Fraction(1, 1000),
    },
}.items():
    for _names, _factor in _table.items():
        for _name in _names.split():
            _UNITS[_name] = (_dimension, _factor)
_METRIC = {name: value for name, value in _UNITS.items() if value[0] == "length"}
_UNITS |= {f"{name}^2": ("area", factor**2) for name, (_, factor) in _METRIC.items()}
_UNITS |= {f"{name}^3": ("cubic", factor**3) for name, (_, factor) in _METRIC.items()}

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
_ONES += ["seventeen", "eighteen", "nineteen"]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: value for value, word in enumerate(_ONES)} | {word: 10 * i for i, word in enumerate(_TENS, 2)}
LARGE_NUMBERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2,
    "halves": 2,
    "third": 3,
    "thirds": 3,
    "quarter": 4,
    "quarters": 4,
    "fourth": 4,
    "fourths": 4,
    "fifth": 5,
    "fifths": 5,
    "sixth": 6,
    "sixths": 6,
    "eighth": 8,
    "eighths": 8,
    "tenth": 10,
    "tenths": 10,
}
_NUMBER_WORD = rf"(?:{'|'.join(sorted([*_SMALL, *LARGE_NUMBERS, 'dozen'], key=len, reverse=True))})"
_WORDS = re.compile(
    rf"(?<![\w-])(?P<sign>minus\s+|negative\s+)?(?P<body>(?:a\s+(?=hundred|thousand|million|billion|dozen))?"
    rf"{_NUMBER_WORD}(?:(?:\s+and\s+|[\s-]+){_NUMBER_WORD}){{0,12}})"
    rf"(?:[\s-]+(?P<part>{'|'.join(_PARTS)}))?(?![\w-])|(?<![\w-])(?:a\s+|one[\s-]+)?(?P<half>half)(?![\w-])",
    re.IGNORECASE,
)

_INT = rf"\d{{1,{_MAX_DIGITS}}}"
_GROUPED = r"\d{1,3}(?:(?:,|\{,\}|\\,)\d{3}){1,30}(?!\d)(?:\.\d{1,60})?"
_SPACED = r"\d{1,3}(?:[ ']\d{3}){1,30}(?![\d.])"
_INDIAN = r"\d{1,2}(?:,\d{2}){1,8},\d{3}(?!\d)(?:\.\d{1,60})?"
_EUROPEAN = (
    r"\d{1,3}(?:\.\d{3}){1,30},\d{1,60}(?!\d)|\d{1,3}(?:\.\d{3}){2,30}(?![\d.])|\d{1,60},(?:\d{1,2}|\d{4,60})(?![\d,])"
)
_EUROPEAN_ALONE, _GROUPED_ALONE = re.compile(_EUROPEAN), re.compile(f"{_GROUPED}|{_INDIAN}")
_DECIMAL = rf"{_INT}\.\d{{1,{_MAX_DIGITS}}}|{_INT}\.(?![\d\w])|\.\d{{1,{_MAX_DIGITS}}}|{_INT}"
_BRACE_NUMBER = r"(?:\{\s*([+-]?\d{1,40}(?:\.\d{1,40})?)\s*\}|(\d))"
_QUANTITY = re.compile(
    r"(?<![\w.^_])(?<!\^\{)(?<!_\{)(?<!\^\{[-+])(?P<sign>[+-]\s?|minus\s|negative\s)?(?:[€£¥₹₽₩]\s?|(?:usd|eur|us\$|rs\.?)\s?)?(?P<sign2>-)?"
    r"(?:"
    rf"(?P<mixed>\d{{1,20}})?\s*\\[dtc]?frac\s*{_BRACE_NUMBER}\s*{_BRACE_NUMBER}"
    rf"|(?P<whole>\d{{1,20}})\s+(?:and\s+)?(?P<top>\d{{1,20}})\s?/\s?(?P<bottom>\d{{1,20}})(?![\d./])"
    rf"|(?P<num>\d{{1,40}}(?:\.\d{{1,40}})?)\s?/\s?(?P<den>\d{{1,40}}(?:\.\d{{1,40}})?)(?!\s?[\d/]|\.\d)"
    rf"|(?P<plain>{_INDIAN}|{_GROUPED}|{_EUROPEAN}|{_SPACED}|{_DECIMAL})"
    r"(?:(?:\s?(?:\\times|\\cdot|×|·|\*|x)\s?10\s?(?:\^|\*\*)\s?[{(]?\s?(?P<power>[+-]?\s?\d{1,6})\s?[})]?)"
    r"|[eE](?P<exponent>[+-]?\d{1,6})(?!\w))?"
    r")"
    r"(?P<scale>\s?(?:hundred|thousand|million|billion|trillion)\b)?",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"\s{0,2}(?:\\?%|percent(?:age)?\b|per\s?cent\b|pct\b)", re.IGNORECASE)
_DEGREES = re.compile(r"\^?\s?\{?\s?(?:\\circ|°|\\degree)")
_POWER_OF_TEN = re.compile(
    r"(?<![\w.^])(?P<sign>-\s?)?10\s?(?:\^|\*\*)\s?[{(]?\s?(?P<power>[+-]?\d{1,6})\s?[})]?(?![\w])"
)
_UNIT = re.compile(
    r"\s{0,3}(?:\^?\s?\{?\\circ\s?\}?|°|\\degree)(?:\s?[CF]\b)?"
    r"|\s{0,3}(?P<power>square|cubic|sq\.?)?\s?(?P<name>[A-Za-zµμ]{1,20})\.?\s?(?:\^\s?\{?\s?(?P<exp>[23])\s?\}?|(?P<digit>[23])(?!\w))?",
    re.IGNORECASE,
)


def find_quantities(text: str, *, with_words: bool = True) -> list[Quantity]:
    """Returns the numbers in a text of unified characters without markup, in order.

    Exponents and indices ("x^2", "a_1"), digits inside words ("H2O") and the digits of a ratio or time ("3:2") are not
    numbers of their own.
    """
    found = [quantity for match in _QUANTITY.finditer(text) if (quantity := _quantity_of(text, match)) is not None]
    if "10" in text:
        found = _added(found, [quantity for match in _POWER_OF_TEN.finditer(text) if (quantity := _power(text, match))])
    if with_words:
        found = _added(found, _word_quantities(text))
    return sorted(found, key=lambda quantity: quantity.start)


def _added(found: list[Quantity], further: list[Quantity]) -> list[Quantity]:
    """Returns the quantities with those further ones that overlap none of them ("million" in "2 million" does)."""
    if not further:
        return found
    taken = {position for quantity in found for position in range(quantity.start, quantity.end)}
    return found + [quantity for quantity in further if taken.isdisjoint(range(quantity.start, quantity.end))]


def _power(text: str, match: re.Match[str]) -> Quantity | None:
    power = int(match.group("power"))
    if abs(power) > _MAX_EXPONENT:
        return None
    value = Fraction(10) ** power * (-1 if match.group("sign") else 1)
    return _with_unit(text, value, match.start(), match.end())


@lru_cache(maxsize=4096)
def whole_quantity(text: str) -> Quantity | None:
    """Returns the number that the whole text is, apart from its unit and outer punctuation; else None."""
    text = text.strip().strip("\"'").rstrip(".,;!?:").strip()
    bracketed = re.fullmatch(r"\(([^(),;]*)\)|\[([^\[\],;]*)\]|\{([^{},;]*)\}", text[:200])
    text = next(filter(None, bracketed.groups()), "").strip() if bracketed else text
    text = re.sub(r"^(?:approximately|about|around|roughly|exactly|only|just|is|=|≈|~|\\approx)\s*", "", text)
    found = find_quantities(text)
    if len(found) != 1 or found[0].start != 0:
        return None
    rest = text[found[0].end :].strip(" .,;!?:)\"'")
    is_noun_phrase = re.fullmatch(r"(?:[^\W\d_]+(?:[-'][^\W\d_]+)?\s?){0,3}", rest) is not None
    return found[0] if is_noun_phrase and not re.search(r"\b(?:or|and|to|of|plus|minus|times)\b", rest) else None


def parse_plain(text: str) -> Fraction | None:
    """Returns the value of a text that is one number without a unit, else None."""
    quantity = whole_quantity(text)
    return quantity.value if quantity and not quantity.unit and not quantity.is_percent else None


def _quantity_of(text: str, match: re.Match[str]) -> Quantity | None:
    groups = match.group
    after = text[match.end() : match.end() + 2]
    before = text[max(0, match.start() - 2) : match.start()]
    if re.match(r":\d", after) or re.search(r"\d:$", before):  # ratios and times
        return None
    if (after.startswith("^") and not _DEGREES.match(text, match.end())) or (
        after == "**" and text[match.end() + 2 : match.end() + 3].strip()
    ):  # powers
        return None
    start, sign_text = match.start(), (groups("sign") or "") + (groups("sign2") or "")
    if sign_text.startswith(("-", "+")) and _is_operator(text, start):
        start, sign_text = start + 1, ""
    value = _value_of(match)
    if value is None:
        return None
    if sign_text.lower().startswith(("-", "minus", "negative")) or (groups("sign2") and sign_text.endswith("-")):
        value = -value
    if groups("scale"):
        value *= LARGE_NUMBERS[groups("scale").strip().lower()]
    return _with_unit(text, value, start, match.end())


def _is_operator(text: str, start: int) -> bool:
    """Whether the sign at a place joins two terms: "3-4", "7 - 2", "20 coins - 5 coins", but not "is -5"."""
    before, after = text[:start][-2:], text[start + 1 : start + 2]
    is_attached = re.search(r"[\w)\]}%°]$", before) is not None
    return is_attached or (before.endswith(" ") and after == " " and before.strip() != "")


def _value_of(match: re.Match[str]) -> Fraction | None:
    groups = match.group
    numerator, denominator = match.group(4) or match.group(5), match.group(6) or match.group(7)
    if numerator is not None:
        return _ratio(numerator, denominator, groups("mixed"))
    if groups("top"):
        return _ratio(groups("top"), groups("bottom"), groups("whole"))
    if groups("num"):
        return _ratio(groups("num"), groups("den"), None)
    value = _plain_value(groups("plain"))
    power = (groups("power") or groups("exponent") or "").replace(" ", "")
    if not power:
        return value
    return value * Fraction(10) ** int(power) if abs(int(power)) <= _MAX_EXPONENT else None


def _plain_value(digits: str) -> Fraction:
    """Returns the value of digits with separators; see the module's docstring for what they mean."""
    whole, point, part = digits.partition(".")
    if whole.isdecimal() and (part.isdecimal() or not point):  # most numbers: no separator could mean anything else
        return Fraction(int(whole + part), 10 ** len(part))
    digits = digits.replace("{,}", ",").replace("\\,", ",")
    if _EUROPEAN_ALONE.fullmatch(digits) and not _GROUPED_ALONE.fullmatch(digits):
        digits = digits.replace(".", "").replace(",", ".")
    return Fraction(re.sub(r"[ ',]", "", digits).rstrip(".") or "0")


def _ratio(numerator: str, denominator: str | None, whole: str | None) -> Fraction | None:
    bottom = Fraction(denominator or "0")
    return None if bottom == 0 else Fraction(whole or 0) + Fraction(numerator) / bottom


def _with_unit(text: str, value: Fraction, start: int, end: int) -> Quantity:
    percent = _PERCENT.match(text, end)
    if percent:
        return Quantity(value, "", True, start, percent.end())
    unit = _UNIT.match(text, end)
    if unit is None:
        return Quantity(value, "", False, start, end)
    if unit.group("name") is None:
        return Quantity(value, "°", False, start, unit.end())
    name = unit.group("name") if len(unit.group("name")) == 1 else unit.group("name").lower()
    name = name.lower() if name in "MLGS" else name
    power = {"square": "2", "sq": "2", "sq.": "2", "cubic": "3"}.get((unit.group("power") or "").lower())
    power = power or unit.group("exp") or unit.group("digit")
    if name in ("degree", "degrees", "deg"):
        return Quantity(value, "°", False, start, unit.end())
    full = f"{name}^{power}" if power else name
    return Quantity(value, full, False, start, unit.end()) if full in _UNITS else Quantity(value, "", False, start, end)


def _word_quantities(text: str) -> list[Quantity]:
    found = []
    for match in _WORDS.finditer(text):
        value = Fraction(1, 2) if match.group("half") else _words_value(match.group("body"))
        if match.group("part"):
            value /= _PARTS[match.group("part").lower()]
        if match.group("sign"):
            value = -value
        found.append(_with_unit(text, value, match.start(), match.end()))
    return found


def _words_value(body: str) -> Fraction:
    total = current = 0
    for word in re.split(r"[\s-]+", body.lower()):
        if word in _SMALL:
            current += _SMALL[word]
        elif word == "hundred":
            current = max(current, 1) * 100
        elif word == "dozen":
            current = max(current, 1) * 12
        elif word in LARGE_NUMBERS:
            total += max(current, 1) * LARGE_NUMBERS[word]
            current = 0
    return Fraction(total + current)


@lru_cache(maxsize=64)
def _exact(tolerance: float) -> Fraction:
    return Fraction(tolerance)


def same_number(
    reference: Quantity,
    candidate: Quantity,
    *,
    relative_tolerance: float,
    asks_percent: bool = False,
    is_relaxed: bool = False,
) -> bool:
    """Whether a candidate is the reference number.

    Whole numbers must be equal: a relative tolerance would take 10001 for 10000. Otherwise the difference may be the
    tolerance times the reference. Percentages: "50%" is 50 percent and 0.5, so a reference "50%" accepts 50 and 0.5;
    a reference "0.5" accepts "50%", and "0.5%" only where the question asks for a percentage. Units: one side may
    leave its unit out; units of one dimension are converted ("150 cm" is "1.5 m"); different dimensions differ.

    is_relaxed: whole numbers enjoy the tolerance too (ChartQA's relaxed accuracy).
    """

    def is_close(expected: Fraction, given: Fraction) -> bool:
        both_whole = expected.denominator == 1 and given.denominator == 1 and not is_relaxed
        return expected == given or (
            not both_whole and abs(expected - given) <= _exact(relative_tolerance) * abs(expected)
        )

    shown, given = reference.value, candidate.value
    if reference.unit in _UNITS and candidate.unit in _UNITS and reference.unit != candidate.unit:
        (dimension, factor), (other, other_factor) = _UNITS[reference.unit], _UNITS[candidate.unit]
        return dimension == other and is_close(shown * factor, given * other_factor)
    if reference.is_percent == candidate.is_percent:
        return is_close(shown, given)
    if reference.is_percent:
        return is_close(shown, given) or is_close(shown / 100, given)
    return is_close(shown, given / 100) or (asks_percent and is_close(shown, given))
