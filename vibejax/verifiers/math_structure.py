"""Equality of answers that are made of others: lists, sets, tuples, intervals, matrices, relations.

`read` takes a cleaned text apart into a tree of `Node`s whose leaves are single expressions or
words; `equal` compares two trees, both ways alike. An answer that lists several values equals only
an answer that lists the same ones, so a dump of guesses equals nothing.
"""

import dataclasses
import re

from vibejax.verifiers import math_quantity, math_symbolic, math_text

MAX_DEPTH = 40  # brackets inside each other; people write four


@dataclasses.dataclass(frozen=True)
class Node:
    """One part of an answer.

    Attributes:
        kind: leaf, list (bare), set, tuple, union, matrix, row or relation.
        text: its cleaned text.
        items: its parts; the operands of a relation.
        marks: brackets of a tuple, operators of a relation, connectors of a list.
    """

    kind: str
    text: str
    items: tuple["Node", ...] = ()
    marks: tuple[str, ...] = ()


_LIST = re.compile(r"\s*[,;]?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*|\s*[,;]\s*")
_UNION = re.compile(r"\\cup(?![a-zA-Z])|(?<=[)\]])\s*[uU]\s*(?=[(\[])")
_RELATION = re.compile(r"\\(?:le|ge|ne|equiv|approx)(?![a-zA-Z])\s*|[=<>]")
_MEMBER = re.compile(r"\\?[a-zA-Z]\w{0,6}\s*\\in(?![a-zA-Z])\s*")
_SUCH_THAT = re.compile(r"\\mid(?![a-zA-Z])|\||:")
_CONDITION = re.compile(r"\s*(?:\\text\{\s*(?:for|where|with)|\\quad)")
_TABLE = re.compile(
    r"\\begin\{([bp]?matrix|array|cases)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL
)
_GROUPED = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")
_SEPARATED = re.compile(r",\s|;|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
_NAME = re.compile(
    r"(?:\\(?!frac|sqrt|text|pi(?![a-z]))[a-zA-Z]+(?:\s?\{[a-zA-Z]+\}|\s?[a-zA-Z]{1,3})?|[a-z]|[A-Z]{1,4})"
    r"'*(?:_(?:\{\w+\}|\w))?(?:\((?:[a-zA-Z0-9]|\\theta)(?:,[a-zA-Z])*\))?"
    r"|\\text\{[^{}]*\}|(?:sum|[a-zA-Z]{4,})(?: [a-zA-Z]+)*|\([a-z](?:,[a-z])+\)|\|[A-Z]{2}\|"
)
_OPPOSITE = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
_INFINITE = (r"\infty", r"-\infty")
_ALL_REALS = (r"\mathbb{R}", r"\text{all real numbers}", "all real numbers", r"\text{all reals}")


def read(text: str, level: int = 0) -> Node:
    """Takes a cleaned text apart.

    Raises:
        ValueError: brackets lie deeper inside each other than `MAX_DEPTH`.
    """
    if level > MAX_DEPTH:
        raise ValueError(f"brackets inside each other exceed the limit of {MAX_DEPTH}")
    text = math_text.trim(text)
    parts, connectors = _list_parts(text, bare=True)
    if len(parts) > 1:
        return _read_list(text, [read(part, level + 1) for part in parts], connectors)
    operands, operators = math_text.split(text, _RELATION)
    if operators:
        marks = ("=" if mark == r"\approx" else mark for mark in operators)
        items = tuple(read(operand, level + 1) for operand in operands)
        return Node("relation", text, items, tuple(marks))
    if member := _MEMBER.match(text):
        inner = read(text[member.end() :], level + 1)
        # as a set: beside x in (1, 2), the list "1, 2" is something else
        return Node("union", text, (inner,)) if inner.kind == "tuple" else inner
    parts, _ = math_text.split(text, _UNION)
    if len(parts) > 1:
        return Node("union", text, tuple(read(part, level + 1) for part in parts))
    if table := _TABLE.fullmatch(text):
        return _read_table(text, table, level)
    if text[:1] in ("(", "[") or text.startswith(r"\{"):
        if math_text.closing(text, 0) == len(text) - 1:
            return _read_enclosed(text, level)
    if r"\pm" in text or r"\mp" in text:
        upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
        lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
        both = [read(side, level + 1) for side in (upper, lower)]
        return _read_list(text, both, ["or"])
    if text == r"\emptyset":
        return Node("set", text)
    return Node("leaf", text)


def equal(a: Node, b: Node) -> bool:
    """Whether two answers say the same; symmetric."""
    if a == b:
        return bool(a.text or a.items)
    pieces = _same_intervals(a, b)
    if pieces is not None:
        return pieces
    named_a, named_b = _assignments(a), _assignments(b)
    if named_a is not None and named_b is not None:
        return named_a.keys() == named_b.keys() and all(
            equal(named_a[name], named_b[name]) for name in named_a
        )
    if a.kind == b.kind == "relation":
        return _equal_relations(a, b)
    points = _point(a), _point(b)
    if None not in points and (a.kind, b.kind) != ("tuple", "tuple"):
        return _equal_in_order(*points)
    if "relation" in (a.kind, b.kind):
        relation, other = (a, b) if a.kind == "relation" else (b, a)
        return _value_of(relation, other)
    if a.kind == b.kind == "leaf":
        return equal_leaves(a.text, b.text)
    if a.kind == b.kind == "tuple":
        return _brackets(a) == _brackets(b) and _equal_in_order(a.items, b.items)
    if a.kind == b.kind == "matrix":
        return _equal_in_order(a.items, b.items)
    if a.kind == b.kind == "row" or (a.kind == b.kind == "union"):
        return _equal_in_order(a.items, b.items)
    for one, other in ((a, b), (b, a)):
        if one.kind == "leaf" and other.kind in ("list", "set") and _GROUPED.fullmatch(one.text):
            # "100,200" beside a list is a list
            values = tuple(Node("leaf", part) for part in one.text.split(","))
            return _equal_in_any_order(values, other.items)
        if one.kind == "matrix" and other.kind == "tuple":
            return _same_matrix(one, other)
    if {a.kind, b.kind} <= {"list", "set"}:
        return _equal_lists(a, b)
    if {a.kind, b.kind} == {"list", "tuple"}:
        bare, pair = (a, b) if a.kind == "list" else (b, a)
        alike = bare.marks == (",",) and pair.marks == ("(", ")") and not _has_relations(bare)
        return alike and _equal_in_order(a.items, b.items)
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
    if len(body_a) == 1 and len(body_b) == 1:
        return body_a == body_b
    for number, text in ((number_a, body_b), (number_b, body_a)):
        if number is not None and number.digits >= math_quantity.APPROXIMATE_DIGITS:
            value = math_symbolic.real_value(text, number.decimals)
            if value is not None:
                return value == number.value or math_quantity.rounds_to(value, number)
    return math_symbolic.same_value(body_a, body_b)


def _list_parts(text: str, *, bare: bool) -> tuple[list[str], list[str]]:
    """Splits a list; commas that separate thousands stay where the writing tells them apart."""
    if bare or _SEPARATED.search(text):
        text = _GROUPED.sub(lambda match: match[0].replace(",", "{,}"), text)
    parts, connectors = math_text.split(text, _LIST)
    pairs = [(part.replace("{,}", ","), i) for i, part in enumerate(parts) if part.strip()]
    return [part for part, _ in pairs], [mark.strip(" ,;") or "," for mark in connectors]


def _read_list(text: str, items: list[Node], connectors: list[str]) -> Node:
    flat: list[Node] = []
    for item in items:
        flat += item.items if item.kind == "list" else [item]
    first = flat[0]
    if first.kind == "relation" and first.marks == ("=",) and _is_name(first.items[0].text):
        if all(item.kind != "relation" for item in flat[1:]):  # x = 1, 2
            flat[0] = first.items[1]
            connectors = ["or"]
    return Node("list", text, tuple(flat), tuple(sorted(set(connectors))))


def _read_table(text: str, table: re.Match, level: int) -> Node:
    rows = [row for row in table[2].split(math_text.ROW) if row.strip()]
    if table[1] == "cases":
        return _read_list(text, [read(row.replace("&", " "), level + 1) for row in rows], [","])
    return Node(
        "matrix",
        text,
        tuple(
            Node("row", row, tuple(read(cell, level + 1) for cell in row.split("&")))
            for row in rows
        ),
    )


def _read_enclosed(text: str, level: int) -> Node:
    if text.startswith(r"\{"):
        inner = text[2:-2]
        halves, _ = math_text.split(inner, _SUCH_THAT)
        if len(halves) == 2 and halves[0].strip() and len(halves[0]) < 30:
            return read(halves[1], level + 1)
        parts, _ = _list_parts(inner, bare=False)
        items = [read(part, level + 1) for part in parts]
        return (
            dataclasses.replace(_read_list(text, items, []), kind="set")
            if items
            else (Node("set", r"\emptyset"))
        )
    inner = text[1:-1]
    parts, _ = _list_parts(inner, bare=False)
    items = tuple(read(part, level + 1) for part in parts)
    if len(items) == 1 and ((text[0] == "(" and text[-1] == ")") or items[0].kind == "matrix"):
        return items[0]
    return Node("tuple", text, items, (text[0], text[-1]))


def _is_name(text: str) -> bool:
    return bool(text) and _NAME.fullmatch(text) is not None


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


def _brackets(node: Node) -> tuple[str, str]:
    """Returns a tuple's brackets; those at an infinite end say nothing."""
    opening, end = node.marks
    if len(node.items) == 2:
        opening = "(" if node.items[0].text in _INFINITE else opening
        end = ")" if node.items[1].text in _INFINITE else end
    return opening, end


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
    return len(set(names)) == len(names) and all(_is_name(name) for name in names)


def _point(node: Node) -> tuple[Node, ...] | None:
    """Returns the coordinates of a point, those of named ones in the order of their names."""
    if node.kind == "tuple" and node.marks == ("(", ")"):
        return node.items
    named = _assignments(node)
    return None if named is None else tuple(named[name] for name in sorted(named))


def _equal_lists(a: Node, b: Node) -> bool:
    """Compares lists without order; of named values beside bare ones the names give the order."""
    if _has_relations(a) == _has_relations(b):
        return _equal_in_any_order(a.items, b.items)
    named, bare = (a, b) if _has_relations(a) else (b, a)
    if (values := _assignments(named)) is not None:
        return _equal_in_order(tuple(values[name] for name in sorted(values)), bare.items)
    names = {
        item.items[0].text if item.kind == "relation" and item.marks == ("=",) else ""
        for item in named.items
    }
    if len(names) != 1 or not _is_name(*names):
        return False
    return _equal_in_any_order(tuple(item.items[1] for item in named.items), bare.items)


def _has_relations(node: Node) -> bool:
    return any(item.kind == "relation" for item in node.items)


def _value_of(relation: Node, other: Node) -> bool:
    """Compares "x = 3" or "1 + 2 = 3" with an answer that is no relation."""
    if set(relation.marks) != {"="}:
        return False
    first, *_, last = relation.items
    if _is_name(first.text):
        return equal(last, other)
    if _is_name(last.text) and len(relation.items) == 2:
        return equal(first, other)
    return all(equal(item, other) for item in relation.items)


def _equal_relations(a: Node, b: Node) -> bool:
    if len(a.items) == len(b.items) and a.marks == b.marks and _equal_in_order(a.items, b.items):
        return True
    operators = set(a.marks), set(b.marks)
    if operators == ({"="}, {"="}):
        sides = [(node.items[0].text, node.items[-1].text) for node in (a, b)]
        for i, (left, right) in enumerate(sides):
            if _is_name(right) and not _is_name(left):
                sides[i] = (right, left)
        if all(_is_name(left) for left, _ in sides) and sides[0][0] == sides[1][0]:
            return equal(read(sides[0][1]), read(sides[1][1]))
        return math_symbolic.constant_ratio(*sides) != 0
    if len(a.items) != 2 or len(b.items) != 2:
        return False
    sides = []
    for node in (a, b):
        left, right = (item.text for item in node.items)
        mark = node.marks[0]
        if mark in (">", r"\ge"):
            left, right, mark = right, left, _OPPOSITE[mark]
        sides.append((left, right, mark))
    if sides[0][2] != sides[1][2] or sides[0][2] not in ("<", r"\le", r"\ne"):
        return False
    ratio = math_symbolic.constant_ratio(sides[0][:2], sides[1][:2])
    return ratio > 0 or (ratio != 0 and sides[0][2] == r"\ne")


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A part of the real line."""

    low: str
    high: str
    closed_low: bool
    closed_high: bool

    def equals(self, other: "_Piece") -> bool:
        return (
            (self.closed_low, self.closed_high) == (other.closed_low, other.closed_high)
            and equal(read(self.low), read(other.low))
            and equal(read(self.high), read(other.high))
        )


def _same_intervals(a: Node, b: Node) -> bool | None:
    """Compares two sets of the real line, None if one of the answers is none or both are pairs."""
    if a.kind == b.kind == "tuple":
        return None
    pieces_a, pieces_b = _pieces(a), _pieces(b)
    if pieces_a is None or pieces_b is None:
        return None
    (name_a, list_a), (name_b, list_b) = pieces_a, pieces_b
    if (name_a and name_b and name_a != name_b) or len(list_a) != len(list_b):
        return False
    left = list(list_b)
    for piece in list_a:
        match = next((other for other in left if piece.equals(other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _pieces(node: Node) -> tuple[str, list[_Piece]] | None:
    """Returns the variable ("" if none is named) and the intervals of a set of the real line."""
    if node.kind == "leaf" and node.text in _ALL_REALS:
        return "", [_Piece(*reversed(_INFINITE), False, False)]
    if node.kind == "leaf":
        without = re.fullmatch(
            r"\\mathbb\{R\}\s*(?:\\setminus|\\backslash|-)\s*\\\{(.*)\\\}", node.text
        )
        return ("", _around(without[1])) if without and "," not in without[1] else None
    if node.kind == "tuple" and len(node.items) == 2:
        opening, end = _brackets(node)
        low, high = (item.text for item in node.items)
        return "", [_Piece(low, high, opening == "[", end == "]")]
    if node.kind == "set" and len(node.items) == 1:
        value = node.items[0].text
        return "", [_Piece(value, value, True, True)]
    if node.kind == "union" or (node.kind == "list" and node.marks == ("or",)):
        found = [_pieces(item) for item in node.items]
        if None in found or (node.kind == "list" and any(i.kind != "relation" for i in node.items)):
            return None
        names = {name for name, _ in found}
        return (names.pop(), [p for _, ps in found for p in ps]) if len(names) == 1 else None
    return _pieces_of_relation(node) if node.kind == "relation" else None


def _around(value: str) -> list[_Piece]:
    return [
        _Piece(r"-\infty", value, False, False),
        _Piece(value, r"\infty", False, False),
    ]


def _pieces_of_relation(node: Node) -> tuple[str, list[_Piece]] | None:
    operands, operators = [item.text for item in node.items], list(node.marks)
    if operators == [r"\ne"] and _is_name(operands[0]):
        return operands[0], _around(operands[1])
    if not set(operators) <= set(_OPPOSITE):
        return None
    if operators[0] in (">", r"\ge"):
        operands, operators = operands[::-1], [_OPPOSITE[mark] for mark in operators[::-1]]
    if not set(operators) <= {"<", r"\le"}:
        return None
    closed = [mark == r"\le" for mark in operators]
    if len(operands) == 3 and _is_name(operands[1]):
        low, name, high = operands
        piece = _Piece(
            low, high, closed[0] and low not in _INFINITE, closed[1] and high not in _INFINITE
        )
        return name, [piece]
    if len(operands) == 2 and _is_name(operands[0]):
        return operands[0], [_Piece(r"-\infty", operands[1], False, closed[0])]
    if len(operands) == 2 and _is_name(operands[1]):
        return operands[1], [_Piece(operands[0], r"\infty", closed[0], False)]
    return None
