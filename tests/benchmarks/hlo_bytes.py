"""What a compiled loop body moves to and from a chip's memory, from its text.

Every instruction reads its operands and writes its results once; what lies in a core's own memory
(memory space 1 of a TPU) is free. Of an array that is only gathered or sliced, the part that comes
out counts, and of one that is updated in place, the update.
"""

import dataclasses
import re

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
ARRAY = re.compile(r"\b(" + "|".join(SIZES) + r")\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "after-all",
        "partition-id", "copy-done", "opt-barrier", "async-done", "slice-done"}  # fmt: skip
PARTIAL = {"gather": 0, "dynamic-slice": 0, "slice": 0}
IN_PLACE = {"scatter": 2, "dynamic-update-slice": 1}  # which operand is the update


@dataclasses.dataclass
class Instruction:
    """One line of a computation: its name, the text of its type, what it does, and to what."""

    name: str
    type: str
    kind: str
    operands: list[str]
    rest: str


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if head:
            current = computations.setdefault(head[1], [])
        found = INSTRUCTION.match(line)
        if found and not head:
            inside = found[4].split(")", 1)[0] if "(" not in found[4].split(")", 1)[0] else found[4]
            operands = re.findall(r"%([\w.\-]+)", inside.split("), ")[0])
            current.append(Instruction(found[1], found[2], found[3], operands, found[4]))
    return computations


def array_bytes(type_: str) -> int:
    """Bytes of the arrays of a type that lie in the chip's memory."""
    total = 0
    for dtype, shape, layout in ARRAY.findall(type_):
        if "S(1)" in layout or "S(2)" in layout or "S(5)" in layout:
            continue
        size = SIZES[dtype]
        for n in shape.split(","):
            size *= int(n) if n else 1
        total += size
    return total


def loop_bodies(computations: dict[str, list[Instruction]]) -> list[str]:
    """The bodies of while loops, the largest first."""
    names = [
        re.search(r"body=%?([\w.\-]+)", i.rest)[1]
        for instructions in computations.values()
        for i in instructions
        if i.kind == "while"
    ]
    return sorted(names, key=lambda name: -len(computations[name]))


def moved(computations, body: str, kernels: str) -> tuple[int, int, dict[str, int]]:
    """Bytes of one pass through a computation.

    Args:
        computations: from `parse`.
        body: which.
        kernels: a pattern of the custom calls that are left out, since they count for themselves.

    Returns:
        The bytes, how many kernels were left out, and the largest movers.
    """
    types = {i.name: i.type for i in computations[body]}
    total, left_out, by_name = 0, 0, {}
    for i in computations[body]:
        if i.kind in FREE:
            continue
        if i.kind == "custom-call" and re.search(kernels, i.rest):
            left_out += 1
            continue
        if i.kind == "while":
            inner = re.search(r"body=%?([\w.\-]+)", i.rest)[1]
            raise ValueError(f"a loop in the loop: {inner}")
        count = _fusion(computations, i, types) if "calls=" in i.rest else _plain(i, types)
        total += count
        by_name[f"{i.kind} {i.name}"] = count
    largest = dict(sorted(by_name.items(), key=lambda x: -x[1])[:12])
    return total, left_out, largest


def _plain(i: Instruction, types: dict[str, str]) -> int:
    if i.kind == "copy-start":  # (destination, source, ...)
        return sum(array_bytes(part) for part in _members(i.type)[:2])
    if i.kind == "slice-start":  # ((source), destination, ...): reads as much as it writes
        destination = _members(i.type)[1]
        return array_bytes(re.sub(r"S\(\d\)", "", destination)) + array_bytes(destination)
    if i.kind in PARTIAL:
        return 2 * array_bytes(i.type)
    if i.kind in IN_PLACE:
        return 2 * array_bytes(types.get(i.operands[IN_PLACE[i.kind]], ""))
    return array_bytes(i.type) + sum(array_bytes(types.get(x, "")) for x in set(i.operands))


def _members(type_: str) -> list[str]:
    """The members of a tuple's type."""
    members, depth, start = [], 0, 1
    for place, character in enumerate(type_):
        depth += (character in "({[") - (character in ")}]")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            members.append(type_[start:place])
            start = place + 1
    return members


def _fusion(computations, i: Instruction, types: dict[str, str]) -> int:
    called = computations[re.search(r"calls=%?([\w.\-]+)", i.rest)[1]]
    inner_types = {x.name: x.type for x in called}
    alias: dict[str, str] = {}  # a bitcast of a parameter is the parameter
    for x in called:
        if x.kind in ("bitcast", "reshape") and x.operands:
            alias[x.name] = alias.get(x.operands[0], x.operands[0])
    total, updated = 0, 0
    for p in (x for x in called if x.kind == "parameter"):
        number = int(re.match(r"(\d+)", p.rest)[1])
        users = [
            (x, [alias.get(o, o) for o in x.operands].index(p.name))
            for x in called
            if x.kind not in ("bitcast", "reshape")
            and p.name in [alias.get(o, o) for o in x.operands]
        ]
        if users and all(x.kind in PARTIAL and place == 0 for x, place in users):
            total += sum(array_bytes(x.type) for x, _ in users)
        elif users and all(x.kind in IN_PLACE and place == 0 for x, place in users):
            for x, _ in users:
                update = array_bytes(inner_types[x.operands[IN_PLACE[x.kind]]])
                total += update
                updated += array_bytes(x.type)
        else:
            total += array_bytes(types.get(i.operands[number], ""))
    return total + max(0, array_bytes(i.type) - updated)
