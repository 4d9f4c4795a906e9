"""What the benchmarks share: two sides in processes of their own, in turn, and one row a case."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 2


def measure(script: str, case: str, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Runs both sides of `case`, ours and the peer in turn, and takes medians.

    Each side is `script SIDE CASE`, which prints one JSON object of numbers as its last line.
    """
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(rounds):
        for side, results in runs.items():
            results.append(measure_side(script, side, case))
    return {
        side: {name: statistics.median(r[name] for r in results) for name in results[0]}
        for side, results in runs.items()
    }


def measure_side(script: str, side: str, case: str) -> dict[str, float]:
    """The numbers of `script SIDE CASE`, run once."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, script, side, case]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    line = done.stdout.splitlines()[-1]
    print(f"{Path(script).stem} {side} {case}: {line}", file=sys.stderr, flush=True)
    return json.loads(line)


def row(
    benchmark: str, case: str, results, name: str, unit: str, *, higher_is_better: bool, **more
):
    """Prints one result as a JSON object."""
    ours, peer = results["ours"][name], results["peer"][name]
    fields = {
        "benchmark": benchmark,
        "case": case,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "ratio": round(ours / peer, 3),
        "unit": unit,
        "higher_is_better": higher_is_better,
        **more,
    }
    print(json.dumps(fields), flush=True)


def seconds(function, repeats: int = 1, warm_up=None) -> float:
    """Median seconds of `function`, which must wait for its own work.

    Args:
        function: what is timed.
        repeats: how often.
        warm_up: run once before, untimed: compiles and fills caches; None takes `function`.
    """
    (warm_up or function)()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def report(**numbers: float) -> None:
    """Prints a side's numbers, and the most memory that its process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**numbers, "peak_bytes": peak}), flush=True)


def matmul_rows(benchmark: str) -> None:
    """The probe of both libraries that stands beside a benchmark."""
    results = measure(__file__, "matmul")
    row(benchmark, "matmul 2048x576x1536", results, "large", "GFLOP/s", higher_is_better=True)
    row(benchmark, "matmul 32x576x1536", results, "small", "GFLOP/s", higher_is_better=True)


def _matmul(side: str) -> None:
    speeds = {}
    for name, m in (("large", 2048), ("small", 32)):
        if side == "ours":
            import jax
            import jax.numpy as jnp

            x, w = jnp.ones((m, 576)), jnp.ones((576, 1536))
            product = jax.jit(jnp.matmul)
            run = lambda: product(x, w).block_until_ready()  # noqa: B023, E731 - run at once
        else:
            import torch

            torch.set_num_threads(os.cpu_count())
            layer, x = torch.nn.Linear(576, 1536, bias=False), torch.ones(m, 576)
            run = lambda: layer(x)  # noqa: B023, E731 - run at once
        speeds[name] = 2 * m * 576 * 1536 / seconds(run, 30) / 1e9
    report(**speeds)


if __name__ == "__main__":
    _matmul(sys.argv[1])
