"""Whether a run fits on a slice, and how fast it would be there, before there is one.

    python tpu/plan.py CONFIG --slice v5e-16 [--set key=value ...] [--search] [--json FILE]

Compiles the run's real programs (micro-batch and update, log-probs, prefill, decode window,
hand-over of the weights) for that slice, on any Linux x86-64 machine; needs the extra `compile`. No
weights are read: a policy is a folder or a file with its config.json, as in
--set policy=tpu/models/NAME.json.

All that it prints is projected from compiled programs. Nothing is run on a TPU or GPU.

Exits with 1 where the run does not fit, with 2 where it cannot be planned.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax: no device is looked for

from vibejax import config_file
from vibejax.config.rl import RlConfig
from vibejax.config_file import InputError
from vibejax.locations import resolve
from vibejax.planning import compiling, jobs, plan, search, slices
from vibejax.planning.plan import Plan, gib
from vibejax.planning.slices import Slice

MODELS = Path(__file__).parent / "models"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vibejax" / "plan"
COMPILED = 3  # of the candidates of a search


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="of an RL run")
    parser.add_argument("--slice", required=True, help="as the cloud names it, or 2xv5e-256")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--search", action="store_true", help="choose mesh, micro-batch and remat policy"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go")
    parser.add_argument(
        "--tokens", type=int, default=0, help="of a mean completion; 0: a quarter of the longest"
    )
    parser.add_argument("--workers", type=int, default=2, help="compiles at one time")
    parser.add_argument("--limit", type=float, default=1_800.0, help="seconds of one compile")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where compiles are kept")
    args = parser.parse_args(argv)
    try:
        where = slices.find(args.slice)
        config = config_file.load(RlConfig, args.config, args.set)
        settings = jobs.read_settings(_policy(config.policy))
        tokens = args.tokens or config.rollout.max_completion_tokens // 4
        configs = [config]
        if args.search:
            configs = _searched(config, settings, where, tokens)
        plans = [_plan(c, settings, where, tokens, args) for c in configs]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    best = min(plans, key=_rank)
    if args.search:
        for line in _comparison(plans):
            print(line)
    print("\n".join(_report(best)))
    if args.json:
        found = plan.summary(best) | {"versions": compiling.versions()}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if best.fits else 1


def _policy(name: str) -> Path:
    path = resolve(name)
    for place in (path, path / "config.json", path / "final" / "config.json"):
        if place.is_file():
            return place
    known = ", ".join(str(p) for p in sorted(MODELS.glob("*.json")))
    raise InputError(
        f"policy {name}: no config.json there; name one by --set policy=FILE, as one of {known}"
    )


def _plan(config: RlConfig, settings: dict[str, Any], where: Slice, tokens: int, args) -> Plan:
    setting = plan.prepare(config, settings, where, tokens)
    compiled = compiling.compile_all(
        jobs.of_run(config, settings, where), args.cache, workers=args.workers, limit_s=args.limit
    )
    return plan.make(setting, compiled)


def _searched(config: RlConfig, settings, where: Slice, tokens: int) -> list[RlConfig]:
    found = search.candidates(config, settings, where, tokens)
    if not found:
        raise InputError(
            f"{where.name}: by arithmetic no mesh, micro-batch and remat policy fits its "
            f"{gib(where.chip.memory_bytes)} a device"
        )
    print(f"{len(found)} choices fit by arithmetic; the best {COMPILED} are compiled")
    return [candidate.config for candidate in found[:COMPILED]]


def _rank(found: Plan) -> tuple[bool, float]:
    estimate = found.estimates.get("accumulate")
    return not found.fits, -plan.mfu(found.setting, estimate, hidden=False) if estimate else 0.0


def _comparison(plans: list[Plan]) -> Iterator[str]:
    for found in plans:
        out = plan.summary(found)
        mesh = " ".join(f"{axis}={n}" for axis, n in out["mesh"].items())
        exposed = out["mfu_causal_exposed"]
        yield (
            f"  {mesh}, {out['microbatch_rows']} rows, remat {out['remat']}: "
            f"{'fits' if out['fits'] else 'does not fit'}, peak {gib(out['peak_bytes'])}, MFU "
            + (f"{exposed:.1%}" if exposed else "unknown")
        )


def _report(found: Plan) -> Iterator[str]:
    setting, out = found.setting, plan.summary(found)
    where, chip = setting.where, setting.where.chip
    mesh = " ".join(f"{axis}={n}" for axis, n in out["mesh"].items())
    yield (
        f"{where.name}: {where.chips} chips, {where.devices} devices of {gib(chip.memory_bytes)}, "
        f"{where.devices_a_host} a host; mesh {mesh}, {out['microbatch_rows']} rows of "
        f"{setting.config.train.row_tokens} tokens, remat {out['remat']}"
    )
    yield "Projected from compiled programs; nothing was run."
    for name, why in found.failures.items():
        yield f"not compiled: {name}: {why}"
    yield ""
    yield from _memory(found)
    yield ""
    yield from _times(found, out)


def _memory(found: Plan) -> Iterator[str]:
    room = found.setting.where.chip.memory_bytes
    kinds = list(dict.fromkeys(kind for phase in found.phases for kind in phase.held))
    yield "GiB a device".ljust(14) + "".join(f"{kind:>14}" for kind in [*kinds, "all"])
    for phase in found.phases:
        cells = [*(phase.held.get(kind, 0) for kind in kinds), phase.total]
        yield phase.name.ljust(14) + "".join(f"{x / slices.GIB:>14.2f}" for x in cells)
    if found.fits:
        yield f"fits: {gib(room - found.peak.total)} to spare in {found.peak.name}"
        return
    over = found.peak.total - room
    if over > 0:
        rolling = "KV pages" in found.peak.held
        change = search.cheapest_rollout_change if rolling else search.cheapest_change
        yield f"does not fit: {gib(over)} too much in {found.peak.name}"
        for name, count in plan.largest(found, found.peak):
            yield f"  {gib(count)}  {name}"
        yield f"cheapest change: {change(found.setting, over)}"
    else:
        yield f"does not fit: {', '.join(found.failures)} could not be compiled"


def _times(found: Plan, out: dict[str, Any]) -> Iterator[str]:
    heads = ("TFLOP", "GB", "roofline ms", "compute ms", "collect. ms", "ICI MB", "DCN MB")
    yield "a call".ljust(14) + "".join(f"{head:>13}" for head in heads)
    for name, one in out["programs"].items():
        cells = (
            one["flops"] / 1e12, one["bytes"] / 1e9, 1e3 * one["roofline_s"],
            1e3 * one["compute_s"], 1e3 * one["collectives_s"], one["ici_bytes"] / 1e6,
            one["dcn_bytes"] / 1e6,
        )  # fmt: skip
        yield name.ljust(14) + "".join(f"{x:>13,.2f}" for x in cells)
    if "accumulate" in out["programs"]:
        yield (
            f"train step: MFU causal {out['mfu_causal_exposed']:.1%} with collectives exposed, "
            f"{out['mfu_causal_hidden']:.1%} hidden; packed row {out['mfu_packed_exposed']:.1%}, "
            f"{out['mfu_packed_hidden']:.1%}; attention counted in full "
            f"{out['mfu_full_exposed']:.1%}, {out['mfu_full_hidden']:.1%}; "
            f"{out['train_tokens_per_s_per_chip']:,.0f} tokens/s a chip"
        )
    for name, words in (("decode", "rows half grown"), ("decode_full", "pages full")):
        if name in out:
            one = out[name]
            yield (
                f"decode step, {words}: {one['rows_per_device']} rows and "
                f"{one['live_tokens']:,.0f} tokens a device, {1e3 * one['step_s']:.2f} ms, "
                f"{one['share_of_roofline']:.0%} of the bandwidth roofline, "
                f"{one['tokens_per_s_per_chip']:,.0f} tokens/s a chip"
            )
    yield (
        f"recommended for a host: rollout.slots = {out['slots']}, rollout.pool_tokens = "
        f"{out['pool_tokens']}"
    )
    step = ", ".join(f"{name.removesuffix('_s')} {s:,.1f} s" for name, s in out["step"].items())
    yield (
        f"a step of {out['micro_batches']} micro-batches, completions of {out['mean_tokens']} "
        f"tokens on average (assumed), no drain: {step}"
    )


if __name__ == "__main__":
    sys.exit(main())
