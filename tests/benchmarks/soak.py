"""20,000 short completions by one engine: `python tests/benchmarks/soak.py`.

The shipped policy and a pool of 100 pages; a call completes 2,000, so few leaks would leave none.
Prints the programs compiled, the live arrays and the resident memory after a tenth, half and all of
them, and how many sequences were put back. Before, calls of few and of many prompts meet every size
that a drain can come to; from then on no program may be new, and after half of all no array.
"""

import gc
import json
import resource
import sys
import time
from pathlib import Path

import jax

from vibejax import batching, decode, sampler_copy, tokenizer, weights
from vibejax.completions import EngineConfig, Request
from vibejax.decode import Sampling
from vibejax.engine import Engine, engine_mesh

PROMPTS, SAMPLES, PARTS, SLOTS = 5_000, 4, 10, 64


def main() -> None:
    path = weights.locate("package:vibejax/quickstart/policy")
    model, tokens = weights.load_config(path), tokenizer.load(path)
    mesh = engine_mesh(model, 1, jax.devices()[:1])
    params = sampler_copy.make(
        weights.load_params(path, model, mesh, "float32"), model, "float32", mesh
    )
    config = EngineConfig(
        model=model, slots=SLOTS, context=64, window=8, page_tokens=16, pool_tokens=1_600
    )
    engine = Engine(params, config, jax.devices()[:1])
    prompts = [
        tuple(tokens.encode(f"{100 + i % 900}+{100 + i * 7 % 900}=")) for i in range(PROMPTS)
    ]
    for count in batching.doublings(SLOTS, 1):
        requests = [Request(i, prompts[i], 8, 1) for i in range(count)]
        assert len(list(engine.generate(requests, Sampling(eos_ids=tokens.eos_ids)))) == count
    warm = programs()
    per_part, start, states, put_back = PROMPTS // PARTS, time.perf_counter(), [], 0
    for part in range(PARTS):
        first = part * per_part
        requests = [
            Request(i, prompts[i], 8 + i % 24, SAMPLES) for i in range(first, first + per_part)
        ]
        done = sum(1 for _ in engine.generate(requests, Sampling(eos_ids=tokens.eos_ids)))
        assert done == per_part * SAMPLES
        put_back += engine.counts.put_back
        gc.collect()
        states.append(
            {
                "programs": programs(),
                "arrays": len(jax.live_arrays()),
                "resident_mib": resident_mib(),
            }
        )
    row = {
        "benchmark": "soak",
        "completions": PROMPTS * SAMPLES,
        "put_back": put_back,
        "programs_of_all_sizes": warm,
        "pages": engine.memory.pages,
        "after_a_tenth": states[0],
        "after_half": states[PARTS // 2 - 1],
        "at_the_end": states[-1],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(row))
    half, end = states[PARTS // 2 - 1], states[-1]
    sys.exit(not (end["programs"] == warm and half["arrays"] >= end["arrays"]))


def programs() -> int:
    return decode.window._cache_size() + decode.fill._cache_size()


def resident_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


if __name__ == "__main__":
    main()
