"""Sets of the real line: intervals, their unions, and inequalities, compared piece by piece."""

import dataclasses
import re
from collections.abc import Callable

from vibejax.verifiers.math_tree import INFINITE, OPPOSITE, Node, brackets, is_name, read

_ALL_REALS = (r"\mathbb{R}", r"\text{all real numbers}", "all real numbers", r"\text{all reals}")
_ALL_BUT = re.compile(r"\\mathbb\{R\}\s*(?:\\setminus|\\backslash|-)\s*\\\{([^,]*)\\\}")
_PLUS, _MINUS = (Node("leaf", text) for text in INFINITE)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A part of the real line."""

    low: Node
    high: Node
    closed_low: bool
    closed_high: bool


def same_set(a: Node, b: Node, equal: Callable[[Node, Node], bool]) -> bool | None:
    """Whether two answers are the same set of the real line.

    Args:
        a: an answer, as `read` returns it.
        b: another.
        equal: compares ends of intervals.

    Returns:
        None if one of the answers is no such set, or both are pairs, which may be points.
    """
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
        match = next((other for other in left if _same_piece(piece, other, equal)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_piece(a: _Piece, b: _Piece, equal: Callable[[Node, Node], bool]) -> bool:
    closed = (a.closed_low, a.closed_high) == (b.closed_low, b.closed_high)
    return closed and equal(a.low, b.low) and equal(a.high, b.high)


def _pieces(node: Node) -> tuple[str, list[_Piece]] | None:
    """Returns the variable ("" if none is named) and the intervals of a set of the real line."""
    if node.kind == "leaf":
        if node.text in _ALL_REALS:
            return "", [_Piece(_MINUS, _PLUS, False, False)]
        without = _ALL_BUT.fullmatch(node.text)
        return ("", _around(read(without[1]))) if without else None
    if node.kind == "tuple" and len(node.items) == 2:
        opening, end = brackets(node)
        return "", [_Piece(*node.items, opening == "[", end == "]")]
    if node.kind == "set" and len(node.items) == 1:
        return "", [_Piece(*node.items, *node.items, True, True)]
    if node.kind == "union" or (node.kind == "list" and node.marks == ("or",)):
        found = [_pieces(item) for item in node.items]
        if None in found or (node.kind == "list" and any(i.kind != "relation" for i in node.items)):
            return None
        names = {name for name, _ in found}
        return (names.pop(), [p for _, ps in found for p in ps]) if len(names) == 1 else None
    return _pieces_of_relation(node) if node.kind == "relation" else None


def _around(value: Node) -> list[_Piece]:
    return [_Piece(_MINUS, value, False, False), _Piece(value, _PLUS, False, False)]


def _pieces_of_relation(node: Node) -> tuple[str, list[_Piece]] | None:
    operands, operators = list(node.items), list(node.marks)
    names = [operand.text if is_name(operand.text) else "" for operand in operands]
    if operators == [r"\ne"] and names[0]:
        return names[0], _around(operands[1])
    if not set(operators) <= set(OPPOSITE):
        return None
    if operators[0] in (">", r"\ge"):
        operands, names = operands[::-1], names[::-1]
        operators = [OPPOSITE[mark] for mark in operators[::-1]]
    if not set(operators) <= {"<", r"\le"}:
        return None
    closed = [
        mark == r"\le" and not {before.text, after.text} & set(INFINITE)
        for mark, before, after in zip(operators, operands, operands[1:], strict=False)
    ]
    if len(operands) == 3 and names[1]:
        return names[1], [_Piece(operands[0], operands[2], *closed)]
    if len(operands) == 2 and names[0]:
        return names[0], [_Piece(_MINUS, operands[1], False, *closed)]
    if len(operands) == 2 and names[1]:
        return names[1], [_Piece(operands[0], _PLUS, *closed, False)]
    return None
