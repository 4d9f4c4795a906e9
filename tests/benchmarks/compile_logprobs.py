"""Temporaries of `token_logprobs` and `token_loss` with gradients, compiled for one TPU chip.

    python tests/benchmarks/compile_logprobs.py [--limit SECONDS]

Compiles for v5e and v6e through libtpu (extra `compile`); needs no TPU and runs nothing on one.
65,536 tokens, width 2,048 in bfloat16, a float32 master head of 151,936 rows, gradients of both:
the shape of Qwen2.5-Coder-3B at its training length. Without a mesh, on a mesh of one chip, and
as the loss of which the trainer takes the gradient in the forward pass.

ours: temporaries in GiB by the compiler's memory analysis.
peer: those of the plain form, log_softmax over all logits, by the same compiler for the same
    chip; it does not fit, so the figure is the one in the compiler's refusal.

Prints one JSON object a row; exits with 1 if `token_logprobs` is not below 2 GiB everywhere. The
loss holds a chunk's float32 logits beside their derivative, and is shown without a bound.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys

from tpu_schedule import ENVIRONMENT

TOKENS, WIDTH, VOCAB = 65_536, 2_048, 151_936
BOUND_GIB = 2.0
CHIPS = ("v5e", "v6e")
FORMS = ("ours", "ours on a mesh", "ours as a loss", "plain")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a compile may take")
    parser.add_argument("--compile", nargs=2, metavar=("CHIP", "FORM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        print(json.dumps(temporaries_gib(*arguments.compile)))
        return 0
    missed = False
    for chip in CHIPS:
        *ours, peer = (_in_a_process(chip, form, arguments.limit) for form in FORMS)
        for form, gib in zip(FORMS, ours, strict=False):
            case = f"{chip} T={TOKENS} E={WIDTH} V={VOCAB}"
            row = {
                "benchmark": "compile_logprobs",
                "case": case + form.removeprefix("ours"),
                "ours": round(gib, 3),
                "peer": round(peer, 3),
                "ratio": round(gib / peer, 4),
                "unit": "GiB of temporaries",
                "higher_is_better": False,
            }
            print(json.dumps(row), flush=True)
            missed |= gib >= BOUND_GIB and form != "ours as a loss"
    return int(missed)


def _in_a_process(chip: str, form: str, limit: float) -> float:
    command = [sys.executable, __file__, "--compile", chip, form]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, env=environment, timeout=limit, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{chip}, {form}: the compile failed\n{done.stderr[-2_000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def temporaries_gib(chip: str, form: str) -> float:
    """Compiles one form for one chip, in this process."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from vibejax import sharding
    from vibejax.losses.logprobs import token_logprobs, token_loss
    from vibejax.losses.nll import nll_loss

    device = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2").devices[0]
    if form in ("ours on a mesh", "ours as a loss"):
        mesh = sharding.make_mesh({}, [device])
        placement, context = sharding.replicated(mesh), jax.set_mesh(mesh)
    else:
        placement, context = SingleDeviceSharding(device), contextlib.nullcontext()

    def ours(x_BTE, head_VE, target_BT, needed_BT):
        return token_logprobs(x_BTE, head_VE, target_BT, needed_BT, vocab=VOCAB).logprob_BT

    def plain(x_BTE, head_VE, target_BT, needed_BT):
        logit_BTV = jnp.einsum(
            "BTE,VE->BTV",
            x_BTE,
            head_VE.astype(x_BTE.dtype),
            preferred_element_type=jnp.float32,
        )
        logprob_BTV = jax.nn.log_softmax(logit_BTV)
        logprob_BT = jnp.take_along_axis(logprob_BTV, target_BT[..., None], axis=-1)[..., 0]
        return jnp.where(needed_BT, logprob_BT, 0.0)

    def terms(logprobs, channels):
        return nll_loss(logprobs.logprob_BT, channels["weight"])

    def loss(x_BTE, head_VE, target_BT, needed_BT):
        if form == "ours as a loss":
            channels = {"weight": needed_BT.astype(jnp.float32)}
            return token_loss(terms, x_BTE, head_VE, target_BT, needed_BT, channels, vocab=VOCAB)[0]
        function = plain if form == "plain" else ours
        return -jnp.sum(function(x_BTE, head_VE, target_BT, needed_BT))

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)

    arguments = (
        array(jnp.bfloat16, 1, TOKENS, WIDTH),
        array(jnp.float32, VOCAB, WIDTH),
        array(jnp.int32, 1, TOKENS),
        array(jnp.bool_, 1, TOKENS),
    )
    with context:
        lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments)
        try:
            return lowered.compile().memory_analysis().temp_size_in_bytes / 2**30
        except jax.errors.JaxRuntimeError as error:
            refusal = re.search(r"HLO temporaries \(([\d.]+)G\) exceeds", str(error))
            if not refusal:
                raise
            return float(refusal[1])


if __name__ == "__main__":
    sys.exit(main())
