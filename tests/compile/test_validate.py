"""What tpu/validate.py runs on a chip, through the real compilers, for chips that are not here.

The kernels and the micro-batch take minutes, and are compiled by hand:
    JAX_PLATFORMS=cpu python tests/compile/test_validate.py v5e-1 kernels
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("window", "tiles")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["v5e-1", "h100-1"])
def test_what_is_tried_on_a_chip_compiles_for_it(name, kind):
    done = subprocess.run(
        [sys.executable, __file__, name, kind],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=900, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]


def compile_all(name: str, kind: str) -> None:
    """Compiles what one part of validate.py runs on a slice of one device."""
    import dataclasses

    import jax

    from vibejax import sharding
    from vibejax.planning import slices
    from vibejax.validation import kernel_checks, program_runs, tile_sweep
    from vibejax.validation.machine import Machine, as_slice
    from vibejax.validation.sizes import FULL

    where = slices.find(name)
    devices = where.topology().devices
    platform = "cuda" if where.chip.platform == "cuda" else "tpu"
    sizes = dataclasses.replace(FULL, model=dataclasses.replace(FULL.model, layers=2))
    mesh = sharding.make_mesh({}, devices)
    here = Machine(devices, interpreted=False, where=where)
    assert as_slice(devices) is not None or platform == "cuda"
    on_device = sharding.replicated(mesh)

    def compiled(function, inputs):
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device),
            jax.eval_shape(inputs, jax.random.key(0)),
        )
        with jax.set_mesh(mesh):
            lowered = jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,))
        return lowered.compile()

    room = where.chip.memory_bytes
    if kind == "kernels":
        for case in kernel_checks.cases(here, sizes):
            for function in (case.kernel, case.reference):
                memory = compiled(function, case.inputs).memory_analysis()
                peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
                # Beside them lie the inputs in both dtypes and the other side's results.
                assert 3 * peak + memory.temp_size_in_bytes < room, case.name
    elif kind == "tiles":
        for backend in here.kernels:
            for sweep in tile_sweep.sweeps(here, backend, sizes):
                assert len(sweep.candidates) > 3
                for candidate in sweep.candidates[:2]:
                    compiled(functools.partial(sweep.run, candidate), sweep.inputs)
    else:
        if kind == "window":
            engine = program_runs.engine(devices, sizes, room)
            program = program_runs.window_program(engine)
        else:
            program, _, _ = program_runs.train_program(devices, sizes, room)
        done = program.traced.lower(lowering_platforms=(platform,)).compile()
        described = program_runs.compiling.described(kind, done, program.mesh)
        assert described.peak < room
        assert program.project(described, where) > 0


if __name__ == "__main__":
    from vibejax.planning.compiling import ENVIRONMENT

    os.environ.update(ENVIRONMENT)  # before jax is there
    compile_all(*sys.argv[1:])
