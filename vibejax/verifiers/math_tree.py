"""Takes a cleaned answer apart: lists, sets, tuples, unions, matrices, relations, and leaves."""

import dataclasses
import re

from vibejax.verifiers import math_text

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
GROUPED = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")
_SEPARATED = re.compile(r",\s|;|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])")
_NAME = re.compile(
    r"(?:\\(?!frac|sqrt|text|pi(?![a-z]))[a-zA-Z]+(?:\s?\{[a-zA-Z]+\}|\s?[a-zA-Z]{1,3})?|[a-z]|[A-Z]{1,4})"
    r"'*(?:_(?:\{\w+\}|\w))?(?:\((?:[a-zA-Z0-9]|\\theta)(?:,[a-zA-Z])*\))?"
    r"|\\text\{[^{}]*\}|(?:sum|[a-zA-Z]{4,})(?: [a-zA-Z]+)*|\([a-z](?:,[a-z])+\)|\|[A-Z]{2}\|"
)
OPPOSITE = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
INFINITE = (r"\infty", r"-\infty")


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
        items = tuple(read(operand, level + 1) for operand in operands)
        if operators == [r"\approx"] and is_name(operands[0]):
            operators = ["="]
        return Node("relation", text, items, tuple(operators))
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


def is_name(text: str) -> bool:
    """Whether a text names a quantity: x, a_1, f(x), AB, area, (x, y); not a product or a sum."""
    return bool(text) and _NAME.fullmatch(text) is not None


def brackets(node: Node) -> tuple[str, str]:
    """Returns a tuple's brackets; those at an infinite end say nothing."""
    opening, end = node.marks
    if len(node.items) == 2:
        opening = "(" if node.items[0].text in INFINITE else opening
        end = ")" if node.items[1].text in INFINITE else end
    return opening, end


def _list_parts(text: str, *, bare: bool) -> tuple[list[str], list[str]]:
    """Splits a list; commas that separate thousands stay where the writing tells them apart."""
    if bare or _SEPARATED.search(text):
        text = GROUPED.sub(lambda match: match[0].replace(",", "{,}"), text)
    parts, connectors = math_text.split(text, _LIST)
    pairs = [(part.replace("{,}", ","), i) for i, part in enumerate(parts) if part.strip()]
    return [part for part, _ in pairs], [mark.strip(" ,;") or "," for mark in connectors]


def _read_list(text: str, items: list[Node], connectors: list[str]) -> Node:
    flat: list[Node] = []
    for item in items:
        flat += item.items if item.kind == "list" else [item]
    first = flat[0]
    if first.kind == "relation" and first.marks == ("=",) and is_name(first.items[0].text):
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
