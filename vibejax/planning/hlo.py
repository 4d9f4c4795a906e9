"""What a compiled program does, from its text: how often each computation runs, the cycles that the
compiler estimates, the bytes that a loop body moves, the collectives and who takes part in them.

Every instruction reads its operands and writes its results once; what lies in a core's own memory
(memory space 1 of a TPU) is free. Of an array that is only gathered or sliced, the part that comes
out counts, and of one that is updated in place, the update.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
         "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
ARRAY = re.compile(r"\b(" + "|".join(SIZES) + r")\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "after-all",
        "partition-id", "copy-done", "opt-barrier", "async-update", "async-done",
        "slice-done"}  # fmt: skip
PARTIAL = {"gather": 0, "dynamic-slice": 0, "slice": 0}
IN_PLACE = {"scatter": 2, "dynamic-update-slice": 1}  # which operand is the update
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
KERNEL = r"tpu_custom_call|__gpu\$xla|triton"
BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)


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


def entry(text: str) -> str:
    """The name of the computation that a program begins with."""
    return re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)[1]


def executions(
    computations: dict[str, list[Instruction]], first: str, unknown_trips: int = 1
) -> dict[str, float]:
    """How often each computation runs; what a fusion calls counts as part of the fusion.

    Of a conditional's branches the costliest counts.

    Args:
        computations: from `parse`.
        first: with which the program begins.
        unknown_trips: of a loop whose trips the compiler does not know.
    """
    runs: dict[str, float] = defaultdict(float)

    def visit(name: str, times: float) -> None:
        runs[name] += times
        for i in computations.get(name, ()):
            if i.kind == "while":
                trips = _trips(computations, i) or unknown_trips
                visit(re.search(r"body=%?([\w.\-]+)", i.rest)[1], times * trips)
            elif i.kind == "call":
                visit(re.search(r"to_apply=%?([\w.\-]+)", i.rest)[1], times)
            elif i.kind == "conditional":
                visit(_costliest(computations, _branches(i)), times)

    visit(first, 1.0)
    return dict(runs)


def _trips(computations: dict[str, list[Instruction]], loop: Instruction) -> int | None:
    """Of a loop that counts from 0 up to a constant; None: it is no such loop."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition, body = (
        {x.name: x for x in computations[re.search(rf"{part}=%?([\w.\-]+)", loop.rest)[1]]}
        for part in ("condition", "body")
    )
    last = [*condition.values()][-1]
    if last.kind != "compare" or "direction=LT" not in last.rest:
        return None
    counter, bound = (condition.get(name) for name in last.operands)
    if counter is None or bound is None or bound.kind != "constant":
        return None
    index = re.search(r"index=(\d+)", counter.rest)
    if counter.kind != "get-tuple-element" or not index:
        return None
    following = body.get([*body.values()][-1].operands[int(index[1])])
    step = 1
    if following is not None and following.kind == "add":
        constants = [body[x] for x in following.operands if body[x].kind == "constant"]
        step = _value(constants[0]) if constants else 1
    return -(-_value(bound) // step)


def _value(constant: Instruction) -> int:
    return int(re.match(r"-?\d+", constant.rest)[0])


def _branches(i: Instruction) -> list[str]:
    found = []
    for several, one in BRANCHES.findall(i.rest):
        found += re.findall(r"[\w.\-]+", several.replace("%", "")) if several else [one]
    return found


def _costliest(computations: dict[str, list[Instruction]], names: list[str]) -> str:
    """The branch with most cycles, or without any the longest."""

    def cost(name: str) -> tuple[float, int]:
        runs = executions(computations, name)
        return cycles(computations, runs), sum(len(computations[n]) for n in runs)

    return max(names, key=cost)


def cycles(computations: dict[str, list[Instruction]], runs: dict[str, float]) -> float:
    """Cycles that the TPU compiler estimates, without Pallas kernels and collectives."""
    total = 0.0
    for name, times in runs.items():
        for i in computations.get(name, ()):
            found = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
            if found and not i.kind.startswith(COLLECTIVES):
                total += times * int(found[1])
    return total


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: of `COLLECTIVES`.
        payload: bytes of the whole array, in the memory of the device that has all of it.
        groups: [groups, members] places of devices in the program's mesh.
        times: that it runs.
        place: the computation that it is in.
        source: where in the program it comes from.
    """

    kind: str
    payload: int
    groups: np.ndarray
    times: float
    place: str
    source: str


def collectives(
    computations: dict[str, list[Instruction]], runs: dict[str, float], devices: int
) -> list[Collective]:
    """The collectives between more than one device, with those inside fusions and async calls.

    One that is spread over several fusions, even inside a loop that it runs beside, stands in each
    with the same channel: it counts where it runs the fewest times.
    """
    found: list[Collective] = []
    seen: set[tuple] = set()
    for name, times in sorted(runs.items(), key=lambda run: run[1]):
        for i in computations.get(name, ()):
            inside = [i]
            if i.kind in ("fusion", "async-start"):
                called = re.search(r"calls=%?([\w.\-]+)", i.rest)
                inside = computations.get(called[1], []) if called else []
            for x in inside:
                kind = x.kind.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                groups = replica_groups(x.rest, devices)
                if groups.shape[1] < 2:
                    continue
                source = re.search(r'op_name="([^"]*)"', x.rest)
                label = source[1] if source else x.name
                payload = _payload(x, kind, groups.shape[1])
                channel = re.search(r"channel_id=(\d+)", x.rest)
                same = (channel and channel[1], kind, payload, label)
                if channel and same in seen:
                    continue
                seen.add(same)
                found.append(Collective(kind, payload, groups, times, name, label))
    return found


def _payload(i: Instruction, kind: str, members: int) -> int:
    """Bytes of the whole array; a `-start` has operands and results in its type."""
    parts = _members(i.type) if i.type.startswith("(") else [i.type]
    if i.kind.endswith("-start") and kind != "all-reduce" and len(parts) > 1:
        parts = parts[1:2]  # (operands, results, contexts)
    size = sum(array_bytes(re.sub(r"S\(\d\)", "", part)) for part in parts)
    return size * members if kind == "reduce-scatter" else size


def replica_groups(rest: str, devices: int) -> np.ndarray:
    """[groups, members] of a collective, from any of the forms in which XLA writes them.

    Raises:
        ValueError: the form is none of them.
    """
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
    if pairs:
        return np.array([[*map(int, x.split(","))] for x in re.findall(r"\{([\d,]+)\}", pairs[1])])
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest)
    if listed:
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        if not groups:
            return np.arange(devices)[None]
        return np.array([[*map(int, group.split(","))] for group in groups])
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        ids = np.arange(math.prod(shape := [*map(int, iota[3].split(","))])).reshape(shape)
        if iota[4]:
            ids = ids.transpose([*map(int, iota[4].split(","))])
        return ids.reshape(int(iota[1]), int(iota[2]))
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
    if mesh:
        return _of_mesh(mesh[1], mesh[2])
    raise ValueError(f"replica groups of an unknown form: {rest[:200]}")


def _of_mesh(axes: str, chosen: str) -> np.ndarray:
    """Groups over the axes {'a'} of a mesh ['a'=2,'b'=4]; 'b':(1)2 is a part of an axis."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values())).reshape([*sizes.values()])
    shape, over, place = [], [], 0
    parts = {n: (int(pre), int(size)) for n, pre, size in
             re.findall(r"'([^']+)':\((\d+)\)(\d+)", chosen)}  # fmt: skip
    names = re.findall(r"'([^']+)'", chosen)
    for name, size in sizes.items():
        if name in parts:
            before, part = parts[name]
            shape += [before, part, size // before // part]
            over.append(place + 1)
            place += 3
        else:
            shape.append(size)
            if name in names:
                over.append(place)
            place += 1
    rest = [axis for axis in range(place) if axis not in over]
    members = math.prod(shape[axis] for axis in over)
    return ids.reshape(shape).transpose(rest + over).reshape(-1, members)


def largest_buffers(
    computations: dict[str, list[Instruction]], runs: dict[str, float], count: int = 5
) -> list[tuple[str, int]]:
    """The largest arrays that a program makes in the device's memory, by where they come from."""
    sizes: dict[str, int] = {}
    for name in runs:
        for i in computations.get(name, ()):
            if i.kind in FREE | {"while", "conditional", "call"} or i.type.startswith("("):
                continue
            source = re.search(r'op_name="([^"]*)"', i.rest)
            label = f"{i.type.split('{')[0]} of {source[1] if source else i.name}"
            sizes[label] = max(sizes.get(label, 0), array_bytes(i.type))
    return sorted(sizes.items(), key=lambda x: -x[1])[:count]


def kernels(
    computations: dict[str, list[Instruction]], runs: dict[str, float]
) -> Iterator[tuple[str, float]]:
    """The Pallas kernels of a program, by where they come from, and how often each runs."""
    for name, times in runs.items():
        for i in computations.get(name, ()):
            if i.kind == "custom-call" and re.search(KERNEL, i.rest):
                source = re.search(r'op_name="([^"]*)"', i.rest)
                yield source[1] if source else i.name, times


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
