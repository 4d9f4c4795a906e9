"""How a run's programs are kept, which is to be settled before the first, and compiled ahead."""

import concurrent.futures
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from jax._src.xla_bridge import backends_are_initialized  # has no public name

from vibejax import distributed, goodput, preemption
from vibejax.kernels import tiles
from vibejax.run_folder import RunError

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
# Else processes that compile wait for what the first has tried, which compiles nothing that it
# finds on its disk.
EACH_TUNES = "--xla_gpu_shard_autotuning=false"
GPU_MEMORY = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX's; the old name
GPU_MEMORY_SHARE = 0.95  # the rest is the driver's, and the libraries' of products and exchanges
LOOK_S = 0.5  # between two looks at whether the run is to end
SAY_S = 5.0  # at least, between two lines about what is compiled

Lowering = Callable[[], jax.stages.Lowered]


def take_gpu_memory() -> None:
    """Lets JAX take `GPU_MEMORY_SHARE` of each GPU, where its own settings name no share.

    Its default is three quarters; what is left out is no room for pages. To be called before
    anything asks for devices; of no effect on CPUs and TPUs.
    """
    if not any(name in os.environ for name in GPU_MEMORY):
        os.environ[GPU_MEMORY[0]] = str(GPU_MEMORY_SHARE)


def prepare(*, deterministic: bool = False) -> None:
    """Keeps compiled programs on disk, so that a run that is started again finds them there.

    On GPUs it also takes their memory (`take_gpu_memory`).

    Where, JAX's own settings say, else it is ~/.cache/vibejax/compiled. Those of a CPU are only
    kept where JAX is told so: they take seconds, and are for one kind of processor. Of several
    processes the first writes them: the others find them where they share the folder.

    Args:
        deterministic: whether a program must give the same bits each time on GPUs too, where fast
            sums and the choice of the fastest kernel otherwise differ between runs; CPUs and TPUs
            are so anyway.

    Raises:
        RunError: programs have been compiled before, otherwise; or the file of VIBEJAX_TILES
            cannot be used.
    """
    take_gpu_memory()
    try:
        tiles.overrides()
    except ValueError as error:
        raise RunError(str(error)) from None
    flags = os.environ.get("XLA_FLAGS", "").split()
    wanted = [DETERMINISTIC] * deterministic + [EACH_TUNES] * (distributed.count() > 1)
    missing = [flag for flag in wanted if flag not in flags]
    if DETERMINISTIC in missing and backends_are_initialized() and jax.default_backend() == "gpu":
        raise RunError(
            f"deterministic: this process uses its GPUs already; set XLA_FLAGS={DETERMINISTIC}"
        )
    if missing:
        os.environ["XLA_FLAGS"] = " ".join([*flags, *missing])
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "vibejax" / "compiled"))


def lowerings(
    traces: Mapping[str, Callable[[], jax.stages.Traced]], mesh: jax.sharding.Mesh
) -> dict[str, Lowering]:
    """What lowers the programs of a mesh while that is in force, as it is when they are called.

    A call in another mesh's force does not find what was compiled.
    """

    def lowering(trace: Callable[[], jax.stages.Traced]) -> Lowering:
        def lower() -> jax.stages.Lowered:
            with jax.set_mesh(mesh):
                return trace().lower()

        return lower

    return {name: lowering(trace) for name, trace in traces.items()}


@goodput.phase("compile")
def compile_ahead(lowerings: Mapping[str, Lowering], workers: int | None = None) -> None:
    """Compiles programs at the start of a run, several at a time, and says how far it has come.

    So a program that does not fit is refused before hours of sampling. A later call of the same
    program with arguments of the same shapes, dtypes and shardings compiles nothing.

    Args:
        lowerings: by the names that are shown.
        workers: programs at one time; None: one for each processor.

    Raises:
        RunError: the compiler refuses a program.
        Preempted: the process was asked to end.
    """
    began, last = time.perf_counter(), 0.0
    pool = concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count())
    try:
        names = {}
        for name, lower in lowerings.items():
            names[pool.submit(lower().compile)] = name
        waiting = set(names)
        while waiting:
            done, waiting = concurrent.futures.wait(
                waiting, LOOK_S, return_when=concurrent.futures.FIRST_COMPLETED
            )
            preemption.check()
            for future in done:
                try:
                    future.result()
                except jax.errors.JaxRuntimeError as error:
                    reason = str(error).strip().splitlines()[0]
                    raise RunError(f"{names[future]} cannot be compiled: {reason}") from None
            seconds = time.perf_counter() - began
            if done and waiting and seconds - last > SAY_S:
                last = seconds
                distributed.announce(
                    f"{len(names) - len(waiting)} of {len(names)} programs compiled, "
                    f"{seconds:.0f} s; left: {', '.join(sorted(names[f] for f in waiting))}"
                )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    distributed.announce(f"{len(names)} programs compiled in {time.perf_counter() - began:.1f} s")
