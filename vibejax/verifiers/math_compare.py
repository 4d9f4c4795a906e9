"""Equality of answers part by part.

Lists, sets and tuples are compared element by element, intervals with inequalities, equations up to
a factor, single expressions as numbers with units, as words, or by `math_symbolic`. An answer that
lists several values equals only an answer that lists the same ones, so a dump of guesses equals
nothing.
"""

import dataclasses
import re

from vibejax.verifiers import math_intervals, math_quantity, math_symbolic
from vibejax.verifiers.math_tree import GROUPED, OPPOSITE, Node, brackets, is_name, read


def equal(a: Node, b: Node) -> bool:
    """Whether two answers say the same; symmetric."""
    if a == b:
        return bool(a.text or a.items)
    pieces = math_intervals.same_set(a, b, equal)
    if pieces is not None:
        return pieces
    named_a, named_b = _assignments(a), _assignments(b)
    if named_a is not None and named_b is not None:
        return named_a.keys() == named_b.keys() and all(
            equal(named_a[name], named_b[name]) for name in named_a
        )
    if named_a is not None or named_b is not None:
        named, other = (named_a, b) if named_a is not None else (named_b, a)
        if other.kind == "set" and len({name.partition("_")[0] for name in named}) == 1:
            return _equal_in_any_order(tuple(named.values()), other.items)  # roots x_1, x_2
        in_order = tuple(named[name] for name in sorted(named))
        return _is_point(other) and _equal_in_order(in_order, other.items)
    if a.kind == b.kind == "relation":
        return _equal_relations(a, b)
    if "relation" in (a.kind, b.kind):
        relation, other = (a, b) if a.kind == "relation" else (b, a)
        return _value_of(relation, other)
    if a.kind == b.kind == "leaf":
        return equal_leaves(a.text, b.text)
    if a.kind == b.kind == "tuple":
        return brackets(a) == brackets(b) and _equal_in_order(a.items, b.items)
    if a.kind == b.kind == "matrix":
        return _equal_in_order(a.items, b.items)
    if a.kind == b.kind == "row" or (a.kind == b.kind == "union"):
        return _equal_in_order(a.items, b.items)
    for one, other in ((a, b), (b, a)):
        if one.kind == "leaf" and other.kind in ("list", "set") and GROUPED.fullmatch(one.text):
            # "100,200" beside a list is a list
            values = tuple(Node("leaf", part) for part in one.text.split(","))
            return _equal_in_any_order(values, other.items)
        if one.kind == "matrix" and other.kind == "tuple":
            return _same_matrix(one, other)
    if {a.kind, b.kind} <= {"list", "set"}:
        return _equal_lists(a, b)
    if {a.kind, b.kind} == {"list", "tuple"}:
        return _is_point(a) and _is_point(b) and _equal_in_order(a.items, b.items)
    for one, other in ((a, b), (b, a)):
        if one.kind == "set" and len(one.items) == 1 and other.kind != "set":
            return equal(one.items[0], other)
    return False


def equal_leaves(a: str, b: str) -> bool:
    """Whether two single expressions or words, cleaned, say the same."""
    if not a or not b:
        return False
    words_a, words_b = _words(a), _words(b)
    if words_a and words_b:
        if words_a == words_b:
            return True
        if len(words_a) > 2 or r"\text" in a + b:
            if len(words_a) > 1 and words_a.lower() == words_b.lower():
                return True
    body_a, unit_a = math_quantity.split_unit(a)
    body_b, unit_b = math_quantity.split_unit(b)
    if unit_a is None or unit_b is None:
        return False
    number_a, number_b = math_quantity.quantity(body_a), math_quantity.quantity(body_b)
    percent_a, percent_b = unit_a == "%", unit_b == "%"
    unit_a, unit_b = unit_a.removeprefix("%"), unit_b.removeprefix("%")
    if number_a is not None:
        number_a, unit_a = math_quantity.scaled(number_a, unit_a)
        number_a = dataclasses.replace(number_a, percent=percent_a)
    if number_b is not None:
        number_b, unit_b = math_quantity.scaled(number_b, unit_b)
        number_b = dataclasses.replace(number_b, percent=percent_b)
    if (
        not math_quantity.same_unit(unit_a, unit_b)
        or (percent_a and unit_b)
        or (percent_b and unit_a)
    ):
        return False
    if number_a is not None and number_b is not None:
        return math_quantity.same_number(number_a, number_b)
    if percent_a != percent_b:
        return False
    body_a, body_b = _unscaled(body_a, number_a), _unscaled(body_b, number_b)
    if len(body_a) == 1 and len(body_b) == 1:
        return body_a == body_b
    for number, text in ((number_a, body_b), (number_b, body_a)):
        if number is not None and number.digits >= math_quantity.APPROXIMATE_DIGITS:
            value = math_symbolic.real_value(text, number.decimals)
            if value is not None:
                return value == number.value or math_quantity.rounds_to(value, number)
    return math_symbolic.same_value(body_a, body_b)


def _words(text: str) -> str | None:
    """Returns prose in one spelling, None if the text is an expression."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    if "\\" in plain or not re.fullmatch(r"[a-zA-Z0-9 :.'()-]+", plain):
        return None
    if not re.search(r"[a-zA-Z]", plain):
        return None
    if option := re.fullmatch(r"\s*(?:(?:[oO]ption|[cC]hoice)\s+)?\(?([a-zA-Z])\)?\s*", plain):
        return option[1]
    if plain == text and re.search(r"[0-9()-]", plain):
        return None
    words = re.sub(r"[.']", "", plain).split()
    if len(words) > 1 and words[0].lower() in ("the", "a", "an"):
        words = words[1:]
    return " ".join(words)


def _unscaled(body: str, number: math_quantity.Quantity | None) -> str:
    """Writes out what a word of number multiplied; other numbers stay as they were written."""
    if number is None or number.value == math_quantity.quantity(body).value:
        return body
    return rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"


def _equal_in_order(a: tuple[Node, ...], b: tuple[Node, ...]) -> bool:
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


def _equal_in_any_order(a: tuple[Node, ...], b: tuple[Node, ...]) -> bool:
    if len(a) != len(b):
        return False
    left = list(b)
    for item in a:
        match = next((other for other in left if equal(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_matrix(matrix: Node, pair: Node) -> bool:
    """Compares a matrix with nested lists, a column with a point."""
    if all(item.kind == "tuple" for item in pair.items):
        rows = tuple(Node("row", item.text, item.items) for item in pair.items)
        return pair.marks == ("[", "]") and _equal_in_order(matrix.items, rows)
    column = all(len(row.items) == 1 for row in matrix.items)
    cells = tuple(row.items[0] for row in matrix.items)
    return column and pair.marks == ("(", ")") and _equal_in_order(cells, pair.items)


def _assignments(node: Node) -> dict[str, Node] | None:
    """Returns name -> value of "x = 1, y = 2" and of "(x, y) = (1, 2)"."""
    if node.kind == "relation" and node.marks == ("=",):
        left, right = node.items
        if left.kind == right.kind == "tuple" and len(left.items) == len(right.items):
            names = [item.text for item in left.items]
            return dict(zip(names, right.items, strict=True)) if _distinct(names) else None
        return None
    if node.kind != "list" or any(i.kind != "relation" or i.marks != ("=",) for i in node.items):
        return None
    names = [item.items[0].text for item in node.items]
    if not _distinct(names):
        return None
    return {item.items[0].text: item.items[1] for item in node.items}


def _distinct(names: list[str]) -> bool:
    return len(set(names)) == len(names) and all(is_name(name) for name in names)


def _is_point(node: Node) -> bool:
    """Whether a tuple or a bare list gives coordinates in their order."""
    if node.kind == "list":
        return node.marks == (",",) and not _has_relations(node)
    return node.kind == "tuple" and node.marks == ("(", ")")


def _equal_lists(a: Node, b: Node) -> bool:
    """Compares lists without order; "x = 1 or x = 2" beside bare values is 1 or 2."""
    if _has_relations(a) == _has_relations(b):
        return _equal_in_any_order(a.items, b.items)
    named, bare = (a, b) if _has_relations(a) else (b, a)
    names = {
        item.items[0].text if item.kind == "relation" and item.marks == ("=",) else ""
        for item in named.items
    }
    if len(names) != 1 or not is_name(*names):
        return False
    return _equal_in_any_order(tuple(item.items[1] for item in named.items), bare.items)


def _has_letters(text: str) -> bool:
    return re.search(r"(?<![\\a-zA-Z])[a-zA-Z]|\\(?:theta|alpha|beta|gamma)", text) is not None


def _has_relations(node: Node) -> bool:
    return any(item.kind == "relation" for item in node.items)


def _value_of(relation: Node, other: Node) -> bool:
    """Compares "x = 3" or "1 + 2 = 3" with an answer that is no relation."""
    if relation.marks[-1] == r"\approx" and set(relation.marks[:-1]) <= {"="}:
        return _equal_with_approximation(relation, other)
    if set(relation.marks) != {"="}:
        return False
    first, *_, last = relation.items
    if is_name(first.text):
        return equal(last, other)
    if is_name(last.text) and len(relation.items) == 2:
        return equal(first, other)
    return all(equal(item, other) for item in relation.items)


def _equal_with_approximation(relation: Node, other: Node) -> bool:
    r"""Compares "10/3 \approx 3.33" with a value: either side counts if they agree."""
    *_, exact, decimal = relation.items
    number = math_quantity.quantity(decimal.text)
    if number is None or number.decimals is None:
        return False
    stated = math_quantity.quantity(exact.text)
    value = (
        math_symbolic.real_value(exact.text, number.decimals) if stated is None else stated.value
    )
    if value is None or abs(value - number.value) * 10**number.decimals >= 1:
        return False
    return equal(exact, other) or equal(decimal, other)


def _equal_relations(a: Node, b: Node) -> bool:
    if len(a.items) == len(b.items) and a.marks == b.marks and _equal_in_order(a.items, b.items):
        return True
    operators = set(a.marks), set(b.marks)
    if operators == ({"="}, {"="}):
        sides = [(node.items[0].text, node.items[-1].text) for node in (a, b)]
        for i, (left, right) in enumerate(sides):
            if is_name(right) and not is_name(left):
                sides[i] = (right, left)
        if all(is_name(left) for left, _ in sides) and sides[0][0] == sides[1][0]:
            return equal(read(sides[0][1]), read(sides[1][1]))
        solved = [is_name(left) and not _has_letters(right) for left, right in sides]
        # an equation is not its solution: repeating the problem must not pass for solving it
        return solved[0] == solved[1] and math_symbolic.constant_ratio(*sides) != 0
    if len(a.items) != 2 or len(b.items) != 2:
        return False
    sides = []
    for node in (a, b):
        left, right = (item.text for item in node.items)
        mark = node.marks[0]
        if mark in (">", r"\ge"):
            left, right, mark = right, left, OPPOSITE[mark]
        sides.append((left, right, mark))
    if sides[0][2] != sides[1][2] or sides[0][2] not in ("<", r"\le", r"\ne"):
        return False
    ratio = math_symbolic.constant_ratio(sides[0][:2], sides[1][:2])
    return ratio > 0 or (ratio != 0 and sides[0][2] == r"\ne")
