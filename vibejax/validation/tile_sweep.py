"""Which tiles are fastest on this chip: each kernel's are tried one after another, and timed.

Two rows are taken together, one of one document and one of many. A tile whose numbers differ from
those of the first, which are the ones in use, is out, and so is one that does not compile.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vibejax.kernels import (
    decode_attention_gpu,
    decode_attention_tpu,
    flash_attention_gpu,
    flash_attention_tpu,
    tiles,
)
from vibejax.kernels.tiles import Fetch, Step, TpuTiles
from vibejax.validation import kernel_checks
from vibejax.validation.checks import Found, Skipped, Timing, timed
from vibejax.validation.machine import Machine
from vibejax.validation.sizes import Sizes

MARGIN = 0.02  # by which a tile must be faster than the one in use, or noise would choose
DTYPE = "bfloat16"


class Sweep(NamedTuple):
    """The choice of one key's tile.

    Attributes:
        key: of the file of tiles.
        candidates: the one in use first.
        inputs: key -> arguments; traceable.
        run: (candidate, *arguments) -> results; traceable.
    """

    key: str
    candidates: Sequence[tuple[int, ...]]
    inputs: Callable[[jax.Array], tuple]
    run: Callable[..., Any]


def chip_of(machine: Machine, backend: str) -> str:
    """The table of the file of tiles that the devices read."""
    kind = machine.devices[0].device_kind
    if backend == "gpu":
        return f"gpu{tiles.gpu_capability(kind)}"
    return "v5e" if machine.interpreted else tiles.tpu_chip(kind)


def sweeps(machine: Machine, backend: str, sizes: Sizes) -> list[Sweep]:
    """All keys of a backend."""
    make = _tpu if backend == "tpu" else _gpu
    return make(chip_of(machine, backend), sizes, machine.interpreted)


def choose(sweep: Sweep, machine: Machine, sizes: Sizes) -> tuple[Found, tuple[int, ...]]:
    """Times a key's candidates; what there is to say, and the winner."""
    inputs = jax.jit(sweep.inputs)(jax.random.key(0))
    ready = _compiled(sweep, inputs)
    first = sweep.candidates[0]
    want, timing = _tried(ready[first], inputs, sizes)
    best, best_s = first, timing.median_s * (1 - MARGIN)
    tried: dict[str, Any] = {str(list(first)): timing.median_s}
    for candidate in sweep.candidates[1:]:
        try:
            got, timing = _tried(ready[candidate], inputs, sizes)
        except Exception as error:  # whatever a compiler says to a tile that it does not like
            tried[str(list(candidate))] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        tried[str(list(candidate))] = timing.median_s
        if not kernel_checks.close(got, want, DTYPE, machine):
            tried[str(list(candidate))] = "wrong numbers"
        elif timing.median_s < best_s:
            best, best_s = candidate, timing.median_s
    before_s = tried[str(list(first))]
    best_s = tried[str(list(best))]
    said = f"{list(best)} {1e3 * best_s:.2f} ms, so far {list(first)} {1e3 * before_s:.2f} ms"
    times = [x for x in tried.values() if isinstance(x, float)]
    said += f"; {len(times)} of {len(tried)} tiles ran"
    figures = {"best": best, "best_s": best_s, "before_s": before_s, "tried": tried}
    return Found(said, figures), best


def _compiled(sweep: Sweep, inputs: tuple) -> dict[tuple[int, ...], Future[jax.stages.Compiled]]:
    """All candidates, compiled at one time, as most of a sweep is compiling.

    One that is refused throws when it is asked for.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        ready = {}
        for candidate in sweep.candidates:
            try:
                lowered = jax.jit(functools.partial(sweep.run, candidate)).lower(*inputs)
                ready[candidate] = threads.submit(lowered.compile)
            except Exception as error:  # not even traced, as with a tile that is too large
                ready[candidate] = Future()
                ready[candidate].set_exception(error)
    return ready


def _tried(ready: Future[jax.stages.Compiled], inputs: tuple, sizes: Sizes) -> tuple[Any, Timing]:
    run = ready.result()
    return run(*inputs), timed(lambda: run(*inputs), sizes.repeats)


def write(
    path: Path, chosen: dict[str, dict[str, tuple[int, ...]]], facts: dict[str, Any]
) -> Found:
    """Writes the file that VIBEJAX_TILES names, and reads it back as the kernels do.

    Args:
        path: of the file.
        chosen: winners by chip and key.
        facts: of the machine, for the comment.

    Raises:
        Skipped: nothing was chosen.
    """
    if not chosen:
        raise Skipped("no kernels have been tried")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"# tpu/validate.py: the fastest on {facts['devices']} x {facts['device_kind']}, {versions}"
    ]
    for chip, table in chosen.items():
        lines += [f"[{chip}]", *(f"{key} = {list(sizes)}" for key, sizes in table.items())]
    path.write_text("\n".join(lines) + "\n")
    tiles.read.cache_clear()
    right = tiles.read(str(path)) == chosen
    return Found(f"{path}: kernels read it with {tiles.VARIABLE}={path}", {"tiles": chosen}, right)


def _pairs(sizes: Sizes, key: jax.Array) -> tuple:
    """q, k, v, dout and ids of two rows: one document, and many with padding."""
    model, tokens = sizes.model, sizes.sweep_tokens
    heads = (model.heads, model.kv_heads, model.kv_heads, model.heads)
    arrays = [
        jax.random.normal(k, (2, tokens, n, model.head_dim), DTYPE)
        for k, n in zip(jax.random.split(key, 4), heads, strict=True)
    ]
    position_1T, segment_1T = kernel_checks.row_ids(tokens)
    position_BT = jnp.concatenate([jnp.arange(tokens, dtype=jnp.int32)[None], position_1T])
    segment_BT = jnp.concatenate([jnp.ones((1, tokens), jnp.int32), segment_1T])
    return *arrays, position_BT, segment_BT


def _forward(attend, q, k, v, dout, position, segment):
    return attend(q, k, v, position, segment, position, segment)


def _backward(attend, q, k, v, dout, position, segment):
    whole = kernel_checks.with_gradients(
        lambda q, k, v, *ids: attend(q, k, v, *ids, *ids)  # the row's queries are its keys
    )
    return whole(q, k, v, dout, position, segment)[1:]


def _pages(sizes: Sizes, key: jax.Array) -> tuple:
    return kernel_checks.page_inputs(sizes, sizes.slots, 1, DTYPE, key)[:4]


def _unlike(first: tuple[int, ...], others: Iterator[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [first, *(x for x in others if x != first)]


def _tpu(chip: str, sizes: Sizes, interpreted: bool) -> list[Sweep]:
    """Rows and keys as in `kernels/tiles.py`; only tiles that fit into the on-chip memory."""
    model = sizes.model
    group = model.heads // model.kv_heads
    in_use = tiles.built_in(chip) | tiles.chosen(chip)

    def tpu_tiles(name: str, candidate: tuple[int, ...]) -> TpuTiles:
        return tiles.tpu_tiles(chip, DTYPE, model.head_dim, group, in_use | {name: candidate})

    def attend(name: str, candidate, *args):
        return flash_attention_tpu.attention(*args, tpu_tiles(name, candidate), interpreted)

    def fits(name: str, candidate) -> bool:
        try:
            tiles.check_rows(chip, in_use | {name: candidate})
        except ValueError:
            return False
        return True

    def candidates(name: str) -> list[tuple[int, ...]]:
        rows, keys = in_use[name]
        near = ((r, k) for r in (rows // 2, rows, 2 * rows) for k in (keys // 2, keys, 2 * keys))
        found = [x for x in _unlike((rows, keys), near) if fits(name, x)]
        # Different rows may give the same tokens of a query tile, of which there are few.
        different = {getattr(tpu_tiles(name, x), name): x for x in reversed(found)}
        return [x for x in found if x in different.values()][: 2 if interpreted else None]

    fetch = Fetch(*in_use.get("decode", ()))
    fetches = ((size, buffers) for size in (2**18, 2**19, 2**20) for buffers in (3, 6, 8))
    decodes = _unlike(tuple(fetch), fetches)[: 2 if interpreted else None]
    return [
        Sweep(
            name,
            candidates(name),
            functools.partial(_pairs, sizes),
            lambda candidate, *args, name=name, run=run: run(
                functools.partial(attend, name, candidate), *args
            ),
        )
        for name, run in (("forward", _forward), ("backward", _backward))
    ] + [
        Sweep(
            "decode",
            decodes,
            functools.partial(_pages, sizes),
            lambda candidate, *args: decode_attention_tpu.paged_attention(
                *args, fetch=Fetch(*candidate), interpret=interpreted
            ),
        )
    ]


def _gpu(chip: str, sizes: Sizes, interpreted: bool) -> list[Sweep]:
    """Query tokens, key tokens, warps and stages."""
    model = sizes.model
    shape = jax.ShapeDtypeStruct((1, 1, 1, model.head_dim), DTYPE)
    capability = int(chip.removeprefix("gpu"))
    in_use = flash_attention_gpu.tiles_for(shape, shape, shape, capability)
    step = Step(*tiles.chosen(chip).get("decode", ()))

    def attend(name: str, candidate, *args):
        chosen = in_use._replace(**{name: flash_attention_gpu.Tile(*candidate)})
        return flash_attention_gpu.attention(*args, chosen, interpreted)

    def near(tile: flash_attention_gpu.Tile) -> list[tuple[int, ...]]:
        others = (
            (q, k, warps, stages)
            for q, k in ((64, 64), (64, 128), (128, 64), (128, 128), (32, 64))
            for warps in (4, 8)
            for stages in (2, 3)
        )
        return _unlike(tuple(tile), others)[: 2 if interpreted else None]

    steps = ((t, w, s) for t in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4))
    return [
        Sweep(
            name,
            near(getattr(in_use, name)),
            functools.partial(_pairs, sizes),
            lambda candidate, *args, name=name, run=run: run(
                functools.partial(attend, name, candidate), *args
            ),
        )
        for name, run in (("forward", _forward), ("dq", _backward), ("dkv", _backward))
    ] + [
        Sweep(
            "decode",
            _unlike(tuple(step), steps)[: 2 if interpreted else None],
            functools.partial(_pages, sizes),
            lambda candidate, *args: decode_attention_gpu.paged_attention(
                *args, step=Step(*candidate), interpret=interpreted
            ),
        )
    ]
