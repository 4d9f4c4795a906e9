"""Loss and gradients on every mesh of eight devices: `python tests/benchmarks/meshes.py`.

The nine documents of tests/test_train.py, packed into rows of 64 tokens on each of the twenty ways
to cut eight CPU devices into data, fsdp, context and tensor, against one device in float32. Prints
the largest difference of a loss, log-prob or gradient as a share of the largest value of its kind
beside the bound of 1e-5.
"""

import itertools
import math
import os
import sys
from pathlib import Path

os.environ["NPROC"] = "64"  # before XLA: its devices wait for each other in threads

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import jax
import numpy as np
import test_train
import tiny

from vibejax import sharding

BOUND = 1e-5
DEVICES = 8


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_disable_most_optimizations", True)
    test_train.MODEL = tiny.model_config(vocab=128, heads=8, kv_heads=8)  # tensor = 8 divides it
    one = test_train.gradient({}, 64, 1)
    good = True
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(sharding.MESH_AXES)):
        if math.prod(sizes) != DEVICES:
            continue
        mesh = dict(zip(sharding.MESH_AXES, sizes, strict=True))
        got = test_train.gradient(mesh, 64, mesh["data"] * mesh["fsdp"])
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(one), strict=True)
        apart = max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs)
        good &= apart <= BOUND
        case = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)
        results = {"ours": {"apart": float(apart)}, "peer": {"apart": BOUND}}
        harness.row(
            "meshes", case, results, "apart", "share of the largest value",
            higher_is_better=False, share=f"{apart:.1e}",
        )  # fmt: skip
    sys.exit(not good)


if __name__ == "__main__":
    main()
