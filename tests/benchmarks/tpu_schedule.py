"""What the TPU compiler made of a kernel: its final schedule, replayed.

The compiler writes each kernel as bundles of operations that issue together. A bundle is an issue
slot, not a cycle: it does not say how long a matrix unit is busy. The replay goes through them in
order and lets one wait until the matrix unit it names is free. Waits for copies and conflicts in
memory are not modelled, so a figure is an optimistic bound: good for ranking two kernels or two
tile sizes on one chip, not for claims about time.
"""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from vibejax.planning import slices
from vibejax.planning.compiling import ENVIRONMENT

LIMIT_S = 400
DUMP = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
)


class Chip(NamedTuple):
    """Of one core.

    Attributes:
        topology: a name that the compiler knows.
        rows_a_cycle: of its left operand that a matrix unit takes in.
        clock: cycles a second, from the public peak (units x width^2 x rows_a_cycle x 2 x clock).
        bandwidth: bytes a second of HBM, the core's part.
    """

    topology: str
    rows_a_cycle: int
    clock: float
    bandwidth: float


def _chip(kind: str, topology: str, rows_a_cycle: int) -> Chip:
    whole = slices.CHIPS[kind]
    return Chip(topology, rows_a_cycle, whole.clock, whole.bandwidth / whole.cores)


CHIPS = {
    "v4": _chip("v4", "v4:2x2x1", 1),
    "v5e": _chip("v5e", "v5e:2x2", 1),
    "v5p": _chip("v5p", "v5p:2x2x1", 1),
    "v6e": _chip("v6e", "v6e:2x2", 2),
    "tpu7x": _chip("tpu7x", "tpu7x:2x2x1", 2),
}


class Piece(NamedTuple):
    """A stretch of bundles without a branch or a branch target inside.

    Attributes:
        depth: of the loops around it.
        conditional: whether the branch before it may go past it.
        cycles: of its replay.
        matrix_cycles: during which the busiest matrix unit works.
        operations: how many of each kind.
    """

    depth: int
    conditional: bool
    cycles: float
    matrix_cycles: float
    operations: dict[str, int]


LINE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+((?:[A-Z]{2})?)\s*:\s*((?:>\s*)*)\s*\{(.*)")
NAME = re.compile(r"^(?:%\S+ = )?(?:\([^)]*\)\s*)?([a-z_0-9.]+)")
UNIT = re.compile(r"mxu(\d)")


def pieces(text: str, chip: Chip) -> list[Piece]:
    """The pieces of one kernel, in order, from the text of its final bundles."""
    stretches: list[tuple[int, bool, list[list[str]]]] = []
    open_new, conditional = True, False
    for line in text.split("control target key end", 1)[1].splitlines():
        match = LINE.match(line)
        if not match:
            continue
        label, depth, body = match[1], match[2].count(">"), match[3]
        body = re.sub(r"/\*.*?\*/", "", body).split("} /*")[0].strip().rstrip("}")
        operations = [part.strip() for part in body.split(";;") if part.strip()]
        if label or open_new or depth != stretches[-1][0]:
            stretches.append((depth, conditional and not label, []))
        stretches[-1][2].append(operations)
        open_new = conditional = any("sbr.rel" in operation for operation in operations)
    return [_replay(*stretch, chip) for stretch in stretches]


def _replay(depth: int, conditional: bool, bundles: list[list[str]], chip: Chip) -> Piece:
    now, free, busy = 0.0, defaultdict(float), defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for operations in bundles:
        names = [NAME.match(operation)[1] for operation in operations]
        for name in names:
            counts[name.split(".")[0]] += 1
        products = [
            (UNIT.search(operation)[1], (16 if "bf16" in name else 8) / chip.rows_a_cycle)
            for name, operation in zip(names, operations, strict=True)
            if name.startswith("vmatmul")
        ]
        now = max([now, *(free[unit] for unit, _ in products)])
        for unit, cycles in products:
            free[unit] = now + cycles
            busy[unit] += cycles
        now += 1
    return Piece(depth, conditional, now, max(busy.values(), default=0.0), dict(counts))


def of_kernels(folder: Path, chip: Chip) -> dict[str, list[Piece]]:
    """The pieces of every kernel that a compile with `DUMP` left in `folder`, by its name."""
    found = {}
    for path in sorted(folder.glob("*final_bundles.txt")):
        text = path.read_text()
        if "schedule-analysis" not in path.name and "control target key end" in text:
            found[re.sub(r"^\d+-(.*?)-\d+-final_bundles\.txt$", r"\1", path.name)] = pieces(
                text, chip
            )
    return found


def in_a_process(script: str, *arguments: str, dump: Path | None = None) -> str:
    """The last line that `script` prints, run with the compiler's environment.

    Raises:
        SystemExit: it failed, with the end of what it said, or took too long.
    """
    environment = os.environ | ENVIRONMENT
    if dump is not None:
        environment["LIBTPU_INIT_ARGS"] = DUMP.format(dump)
    command = [sys.executable, script, *arguments]
    try:
        done = subprocess.run(
            command, env=environment, timeout=LIMIT_S, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"{' '.join(arguments)}: no compile within {LIMIT_S} s") from error
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: no compile\n{done.stderr[-2_000:]}")
    return done.stdout.splitlines()[-1]
