"""One process of `compiling`: `python -m vibejax.planning.compile_job JOB.json OUT.json DUMP`."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax

from vibejax.planning import compiling, jobs
from vibejax.planning.compiling import Compiled, Job


def compile_job(job: Job, dump: Path) -> Compiled:
    """What the compiler makes of a job; the process dumps programs into `dump`."""
    traced, mesh = jobs.trace(job)
    platform = "cuda" if mesh.devices.flat[0].platform == "gpu" else "tpu"
    start = time.perf_counter()
    try:
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
        if "RESOURCE_EXHAUSTED" not in said and "Ran out of memory" not in said:
            raise
        return Compiled(job.program, **compiling.refusal(said), **compiling.places(mesh))
    found = compiling.described(job.program, compiled, mesh, dump)
    return dataclasses.replace(found, seconds=round(time.perf_counter() - start, 1))


if __name__ == "__main__":
    request, out, dumped = map(Path, sys.argv[1:])
    compiling.write(compile_job(Job(**json.loads(request.read_text())), dumped), out)
