"""Compiles a run's programs for a slice, each in a process of its own, and keeps what came out.

`compile_job` is such a process. The compilers are the real ones (extra `compile`: libtpu, the CUDA
plugin); no device is looked for. What is kept is a folder's `KEY.json` (memory, places of the
devices, what failed) and `KEY.hlo.gz` (the program); KEY is a hash of the job, of this package's
code but for `planning`'s arithmetic, of the tiles of VIBEJAX_TILES, and of the versions of jax and
the compiler.
"""

import concurrent.futures
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vibejax.kernels import tiles
from vibejax.planning import hlo

ENVIRONMENT = {  # the compiler alone: no device is looked for
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
PROCESS = "vibejax.planning.compile_job"
AS_TEXT = "--xla_dump_hlo_as_text"
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
SHAPING = ("jobs.py", "slices.py")  # of planning: what a program depends on
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile.

    Attributes:
        program: of `rl_shapes.trainer` or `rl_shapes.sampler`.
        slice: by name.
        config: the run's `RlConfig`, as a table.
        model: the policy's config.json.
    """

    program: str
    slice: str
    config: dict[str, Any]
    model: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a job.

    Attributes:
        program: its name.
        arguments, outputs, temporaries, aliased, code: bytes of a device.
        needed: of a program that does not fit, all its bytes; else 0.
        failure: the compiler's refusal, or empty.
        largest: buffers by name, for people.
        coordinates: [devices, axes] place in the torus, in the order of the mesh.
        slices: [devices] of several joined by a network.
        seconds: that it took.
        text: the program.
    """

    program: str
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    aliased: int = 0
    code: int = 0
    needed: int = 0
    failure: str = ""
    largest: Sequence[tuple[str, int]] = ()
    coordinates: Sequence[Sequence[int]] = ()
    slices: Sequence[int] = ()
    seconds: float = 0.0
    text: str = dataclasses.field(default="", repr=False)

    @property
    def peak(self) -> int:
        """Bytes of a device while it runs, the code apart."""
        return self.needed or self.arguments + self.outputs + self.temporaries - self.aliased

    @functools.cached_property
    def computations(self) -> dict[str, list[hlo.Instruction]]:
        """The program, parsed."""
        return hlo.parse(self.text)


def compile_all(
    jobs: Sequence[Job], folder: Path, *, workers: int, limit_s: float
) -> dict[str, Compiled]:
    """The compiled programs by their names, from `folder` where they are there.

    Args:
        jobs: what to compile.
        folder: where results are kept.
        workers: processes at one time.
        limit_s: seconds that one may take; one that takes longer has failed, and is not kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda job: _compiled(job, folder, limit_s), jobs)
        return {job.program: result for job, result in zip(jobs, results, strict=True)}


def _compiled(job: Job, folder: Path, limit_s: float) -> Compiled:
    path = folder / f"{_key(job)}.json"
    if not path.is_file():
        print(f"compiling {job.program} for {job.slice}", file=sys.stderr, flush=True)
        request = path.with_suffix(".job")
        request.write_text(json.dumps(dataclasses.asdict(job)))
        with tempfile.TemporaryDirectory() as dump:
            command = [sys.executable, "-m", PROCESS, str(request), str(path), dump]
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} {AS_TEXT}".strip()
            told = {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": flags}
            try:
                done = subprocess.run(
                    command,
                    env=os.environ | ENVIRONMENT | told,
                    timeout=limit_s,
                    capture_output=True,
                    text=True,
                )
            except subprocess.TimeoutExpired:
                return Compiled(job.program, failure=f"no compile within {limit_s:g} s")
            finally:
                request.unlink(missing_ok=True)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            named = [line for line in said if line.startswith("jax.errors.")] or said[-1:]
            return Compiled(job.program, failure=named[0][:300])
    return read(path)


def read(path: Path) -> Compiled:
    """A result as it was kept."""
    with gzip.open(path.with_suffix(".hlo.gz"), "rt") as file:
        return Compiled(**json.loads(path.read_text()), text=file.read())


def write(compiled: Compiled, path: Path) -> None:
    """Keeps a result; the JSON comes last, so that half of one is none."""
    with gzip.open(path.with_suffix(".hlo.gz"), "wt") as file:
        file.write(compiled.text)
    fields = dataclasses.asdict(compiled)
    del fields["text"]
    part = path.with_suffix(".part")
    part.write_text(json.dumps(fields, indent=1))
    part.replace(path)


def versions() -> dict[str, str]:
    """What compiles, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _key(job: Job) -> str:
    facts = [dataclasses.asdict(job), versions(), _code(), tiles.overrides()]
    said = json.dumps(facts, sort_keys=True)
    return f"{job.slice}-{job.program}-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


@functools.cache
def _code() -> str:
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.glob("kernels/*.py")]):  # kernels: maybe a link
        if path.parent.name != "planning" or path.name in SHAPING:
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def places(mesh) -> dict[str, Any]:
    """The fields of a `Compiled` that say where the devices are."""
    return {
        "coordinates": [[*getattr(d, "coords", [d.id])] for d in mesh.devices.flat],
        "slices": [getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat],
    }


def described(program: str, compiled, mesh, dump: Path | None = None) -> Compiled:
    """What came out of a compile.

    Args:
        program: its name.
        compiled: as `jax.stages.Lowered.compile` returns it.
        mesh: the devices that it is for.
        dump: where the compiler has written it, if it has.

    Raises:
        JaxRuntimeError: jaxlib cannot read the program, and the compiler has not written it.
    """
    memory, text = compiled.memory_analysis(), _text(compiled, dump)
    computations = hlo.parse(text)
    runs = hlo.executions(computations, hlo.entry(text))
    return Compiled(
        program,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        largest=hlo.largest_buffers(computations, runs),
        text=text,
        **places(mesh),
    )


def _text(compiled, dump: Path | None) -> str:
    """The text of a compiled program.

    jaxlib refuses to read some of what newer TPUs' compiler makes, calls to a SparseCore of several
    operands. What the compiler itself has written is the same program.
    """
    import jax

    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        if dump is None:
            raise
        written = max(dump.glob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
        return written.read_text()


def refusal(said: str) -> dict[str, Any]:
    """What the TPU compiler says of a program that is larger than the memory."""
    used = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", said)
    needed = int(float(used[1]) * UNITS[used[2]]) if used else 0
    largest = [
        (f"{shape} of {source}", int(float(size) * UNITS[unit]))
        for size, unit, source, shape in re.findall(
            r"Size: ([\d.]+)([KMGT]?)\b.*?op_name=\"([^\"]*)\".*?Shape: ([^\s{]+)", said, re.DOTALL
        )
    ]
    return {"failure": said.splitlines()[0], "needed": needed, "largest": largest[:5]}
