"""Whether this machine computes right, and how fast: the first ten minutes on a TPU or GPU host.

    python tpu/validate.py [--json FILE] [--quick]

Tries the devices of one host: every kernel against its reference, memory and matrix units against
what is published of them, exchanges between the devices, the programs of a run against what
tpu/plan.py projects for them, and which tiles of the kernels are fastest. These go into --tiles
FILE, which the kernels read where VIBEJAX_TILES names it. --json FILE has all figures.

On a CPU the kernels are interpreted at tiny sizes: that tries this program, and no figure means
anything.

Exits with 1 where something was computed wrong or not at all, with 2 where it could not begin.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from vibejax import programs, sharding
from vibejax.kernels import tiles
from vibejax.validation import checks, kernel_checks, machine, program_runs, speeds, tile_sweep
from vibejax.validation.checks import Found, Row
from vibejax.validation.machine import Machine
from vibejax.validation.sizes import FULL, QUICK, TINY, Sizes

INTERPRETED_DEVICES = 2  # so that there is somebody to exchange with


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go")
    parser.add_argument("--quick", action="store_true", help="no long rows, and no tiles")
    parser.add_argument("--interpret", action="store_true", help="use the CPU, whatever there is")
    parser.add_argument(
        "--tiles", type=Path, default=Path("tiles.toml"), metavar="FILE",
        help="where the fastest tiles go; default: %(default)s",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        for path in filter(None, (args.json, args.tiles)):
            if not path.absolute().parent.is_dir() or path.is_dir():
                raise ValueError(f"{path}: is no file in a folder that there is")
        tiles.overrides()
        programs.take_gpu_memory()
        if args.interpret:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", INTERPRETED_DEVICES)
        found = machine.find(interpret=args.interpret)
    except (ValueError, RuntimeError) as error:  # JAX's, of devices that it cannot use
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if found.interpreted:  # most of the time is compiling
        jax.config.update("jax_disable_most_optimizations", True)
    sizes = TINY if found.interpreted else QUICK if args.quick else FULL
    facts = machine.describe(found)
    print(machine.line(facts), flush=True)
    rows: list[Row] = []
    for name, check in _checks(found, sizes, None if args.quick else args.tiles, facts):
        row = checks.make(name, check)
        rows.append(row)
        print(f"{row.verdict:<9} {row.name}: {row.said} [{row.seconds:.0f} s]", flush=True)
        if args.json:  # after each: what a hanging compiler leaves is worth having
            args.json.write_text(json.dumps(_summary(facts, sizes, rows), indent=2) + "\n")
    failed = [row for row in rows if row.verdict == "FAILED"]
    print(f"{len(rows)} checks, {len(failed)} failed, {sum(row.seconds for row in rows):.0f} s")
    return 1 if failed else 0


def _checks(
    found: Machine, sizes: Sizes, path: Path | None, facts: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], Found]]]:
    """All checks by name, in their order; tiles are chosen where a path says so."""
    mesh = sharding.make_mesh({}, found.devices[:1])

    def on_one_device(check: Callable[..., Found], *arguments) -> Callable[[], Found]:
        def run() -> Found:
            with jax.set_mesh(mesh):
                return check(*arguments)

        return run

    for case in kernel_checks.cases(found, sizes):
        yield case.name, on_one_device(kernel_checks.check, case, found)
    yield from speeds.checks(found, sizes)
    yield from program_runs.checks(found, sizes)
    if path is None:
        return
    chosen: dict[str, dict[str, tuple[int, ...]]] = {}

    def choose(backend: str, sweep: tile_sweep.Sweep) -> Found:
        said, best = tile_sweep.choose(sweep, found, sizes)
        chosen.setdefault(tile_sweep.chip_of(found, backend), {})[sweep.key] = best
        return said

    for backend in found.kernels:
        for sweep in tile_sweep.sweeps(found, backend, sizes):
            name = f"tiles of the {backend} kernels, {sweep.key}"
            yield name, on_one_device(choose, backend, sweep)
    yield "file of tiles", lambda: tile_sweep.write(path, chosen, facts)


def _summary(facts: dict[str, Any], sizes: Sizes, rows: list[Row]) -> dict[str, Any]:
    """What the JSON has."""
    return {
        "machine": facts,
        "sizes": dataclasses.asdict(sizes),
        "checks": [dataclasses.asdict(row) for row in rows],
        "failed": [row.name for row in rows if row.verdict == "FAILED"],
    }


if __name__ == "__main__":
    sys.exit(main())
