"""tpu/validate.py: verdicts, what counts as right, the choice of tiles, exit codes.

`.ci/run` runs all of it, interpreted.
"""

import functools
import importlib.util
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibejax.kernels import tiles
from vibejax.validation import checks, kernel_checks, machine, speeds, tile_sweep
from vibejax.validation.checks import Found, Skipped, Timing
from vibejax.validation.kernel_checks import Case
from vibejax.validation.machine import Machine
from vibejax.validation.sizes import FULL, TINY
from vibejax.validation.tile_sweep import Sweep

ROOT = Path(__file__).parents[1]
FACTS = {"devices": 1, "device_kind": "TPU v5 lite", "versions": {"jax": "0.10.2"}}


@pytest.fixture
def validate():
    spec = importlib.util.spec_from_file_location("validate", ROOT / "tpu" / "validate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here():
    return Machine(jax.devices(), True, machine.as_slice(jax.devices(), True))


def raises(error):
    def check():
        raise error

    return check


@pytest.mark.parametrize(
    "check, verdict, said",
    [
        (lambda: Found("fast", {}), "measured", "fast"),
        (lambda: Found("good", {}, True), "ok", "good"),
        (lambda: Found("bad", {}, False), "FAILED", "bad"),
        (raises(Skipped("there is one device")), "skipped", "there is one device"),
        (raises(ValueError("no\nmore")), "FAILED", "ValueError: no"),
        (raises(MemoryError()), "FAILED", "MemoryError"),
    ],
)
def test_every_check_ends_as_a_row(check, verdict, said):
    row = checks.make("name", check)
    assert (row.verdict, row.said) == (verdict, said)


def test_a_timing_warms_up_and_takes_the_median(monkeypatch):
    """Repeats of 1, 5 and 2 seconds: 2, between 1 and 5."""
    clock = iter([0, 1, 10, 15, 20, 22])
    monkeypatch.setattr(checks.time, "perf_counter", lambda: next(clock))
    calls = []
    assert checks.timed(lambda: calls.append(0), 3) == Timing(2, 4, 3)
    assert len(calls) == 5 and Timing(2, 4, 3).spread == 2


@pytest.mark.parametrize("off, right", [(0, True), (0.01, True), (0.05, False), (np.nan, False)])
def test_a_kernel_is_right_within_its_tolerance(here, off, right):
    """bfloat16: 2e-2 of the largest number, 3; the gradient counts as much as the output."""
    case = Case(
        "case",
        lambda key: (jnp.full(4, 3.0, jnp.bfloat16),),
        lambda x: (x, x + jnp.bfloat16(3 * off)),
        lambda x: (x, x),
        "bfloat16",
    )
    found = kernel_checks.check(case, here)
    assert found.right is right


def test_rows_are_ragged_and_end_in_padding():
    position, segment = kernel_checks.row_ids(4_096)
    assert position.shape == segment.shape == (1, 4_096)
    lengths = np.bincount(segment[0])
    assert lengths[0] == 256 and segment[0, -256:].max() == 0
    assert len(lengths) == 12 and len(set(lengths[1:] % 128)) > 6
    assert (np.diff(segment[0, :-256]) >= 0).all()
    starts = np.flatnonzero(position[0] == 0)[:11]
    assert (np.diff(starts) == lengths[1:11]).all()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_sequences_share_pages_that_all_of_them_fill(kv_dtype):
    make = jax.jit(functools.partial(kernel_checks.page_inputs, TINY, 4, 1, kv_dtype))
    q, pages, table, length, shared = make(jax.random.key(3))
    table, length = np.asarray(table), np.asarray(length)
    assert q.dtype == jnp.bfloat16 and pages.kv_PKsC.dtype == kv_dtype
    assert length[0] == TINY.context and length[-1] == 0 and shared.tolist() == [1]
    assert (table[:, 0] == table[0, 0]).all() and len(set(np.ravel(table[:, 1:]).tolist())) == 12
    assert (length[:-1] > TINY.page_tokens).all()


def test_every_kernel_of_a_chip_is_tried_in_each_dtype():
    """Those of the chip, and what stands in for them elsewhere."""
    chip = SimpleNamespace(device_kind="TPU v5 lite", platform="tpu")
    names = [case.name for case in kernel_checks.cases(Machine([chip], False, None), FULL)]
    assert len(names) == len(set(names)) == 14
    for part in ("tpu packed attention, output and gradients, 65536 tokens, bfloat16",
                 "tpu packed attention, output and gradients, 512 tokens, float32",
                 "tpu attention over pages, one token, 4096 cached, int8 pages",
                 "xla attention over pages", "row copies"):  # fmt: skip
        assert any(name.startswith(part) for name in names), part
    other = SimpleNamespace(device_kind="TPU v3", platform="tpu")
    assert Machine([other], False, None).kernels == ()


def devices(kind, places):
    return [SimpleNamespace(device_kind=kind, platform="tpu", coords=p, id=0) for p in places]


@pytest.mark.parametrize(
    "found, kind, shape",
    [
        (devices("TPU v5 lite", [(x, y, 0) for x in (0, 1) for y in range(4)]), "v5e", (2, 4)),
        (devices("TPU v5 lite", [(2, 3, 0)]), "v5e", (1, 1)),
        (devices("TPU v5", [(x, y, 1) for x in (0, 1) for y in (2, 3)]), "v5p", (2, 2, 1)),
        (devices("TPU7x", [(0, 0, 0)] * 2), "tpu7x", (1, 1, 1)),
        ([SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu")] * 4, "h100", (4,)),
    ],
)  # fmt: skip
def test_devices_as_a_slice(found, kind, shape):
    where = machine.as_slice(found)
    assert (where.kind, where.shape, where.devices) == (kind, shape, len(found))


def test_devices_without_published_peaks():
    device = SimpleNamespace(device_kind="NVIDIA L4", platform="gpu")
    assert machine.as_slice([device]) is None
    row = checks.make("stream", lambda: speeds.bandwidth(Machine([device], True, None), TINY))
    assert row.verdict == "measured" and "share" not in row.figures


@pytest.mark.parametrize("kind", speeds.COLLECTIVES, ids=lambda kind: kind.name)
def test_what_devices_exchange(here, kind):
    found = speeds.collective(kind, here, TINY)
    assert found.right and found.figures["bytes_per_s"] > 0
    wrong = kind._replace(want=lambda x_C, n: kind.want(x_C, n) + 1)
    found = speeds.collective(wrong, here, TINY)
    assert not found.right and found.said.startswith("the result is wrong")


def test_bytes_that_come_into_a_device():
    """Of 8 MB on 8 devices: 7 others' MB, 7/8 of the own MB's part, and so on."""
    moved = {kind.name: 8 * kind.moved(8) for kind in speeds.COLLECTIVES}
    assert moved == {"all-gather": 7, "reduce-scatter": 0.875, "all-reduce": 1.75,
                     "all-to-all": 0.875, "permute": 1}  # fmt: skip


def test_one_device_exchanges_nothing(here):
    alone = Machine(here.devices[:1], True, here.where)
    row = checks.make("all-gather", lambda: speeds.collective(speeds.COLLECTIVES[0], alone, TINY))
    assert (row.verdict, row.said) == ("skipped", "there is one device")


def test_the_fastest_tile_that_is_right_wins(here, monkeypatch):
    """Of 10, 9.9, 8, 1 and 2 ms: 1 ms has wrong numbers, 2 ms does not compile."""
    times = {(1,): 0.010, (2,): 0.0099, (3,): 0.008, (4,): 0.001}
    in_order = itertools.chain(times.values(), times.values())

    def run(candidate, x):
        if candidate == (5,):
            raise ValueError("does not fit\nat all")
        return x + (candidate == (4,))

    monkeypatch.setattr(tile_sweep, "timed", lambda call, n: Timing(next(in_order), 0.0, n))
    sweep = Sweep("forward", [*times, (5,)], lambda key: (jnp.ones(3, jnp.bfloat16),), run)
    found, best = tile_sweep.choose(sweep, here, TINY)
    assert best == (3,) and "4 of 5" not in found.said and "3 of 5 tiles ran" in found.said
    assert found.figures["tried"]["[4]"] == "wrong numbers"
    assert found.figures["tried"]["[5]"] == "ValueError: does not fit"
    sweep = sweep._replace(candidates=[(1,), (2,)])
    assert tile_sweep.choose(sweep, here, TINY)[1] == (1,)  # 1% is noise


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5p", "TPU v6 lite", "TPU7x"])
def test_tiles_that_are_tried_on_a_tpu_fit_and_differ(kind):
    chip = Machine([SimpleNamespace(device_kind=kind, platform="tpu")], False, None)
    name = tile_sweep.chip_of(chip, "tpu")
    forward, backward, decode = tile_sweep.sweeps(chip, "tpu", FULL)
    assert decode.candidates[0] == tiles.Fetch() and len(set(decode.candidates)) == 9
    for sweep in (forward, backward):
        assert sweep.candidates[0] == tiles.built_in(name)[sweep.key]
        found = [tiles.tpu_tiles(name, "bfloat16", 128, 8, tiles.built_in(name) | {sweep.key: x})
                 for x in sweep.candidates]  # fmt: skip
        assert len({getattr(x, sweep.key) for x in found}) == len(found) >= 3


def test_winners_are_what_the_kernels_read(tmp_path, monkeypatch):
    path = tmp_path / "tiles.toml"
    chosen = {"v5e": {"forward": (1024, 256), "backward": (1024, 512), "decode": (2**18, 8)}}
    assert tile_sweep.write(path, chosen, FACTS).right
    monkeypatch.setenv(tiles.VARIABLE, str(path))
    assert tiles.chosen("v5e") == chosen["v5e"]
    assert tiles.tpu_tiles("v5e", "bfloat16", 128, 8).forward == (128, 256)
    with pytest.raises(Skipped, match="no kernels have been tried"):
        tile_sweep.write(path, {}, FACTS)


@pytest.mark.parametrize("right, code", [(True, 0), (False, 1)])
def test_a_wrong_result_is_exit_code_1(validate, tmp_path, monkeypatch, capsys, right, code):
    found = [("one", lambda: Found("said", {"error": 0.5}, right)), ("two", raises(Skipped("no")))]
    monkeypatch.setattr(validate, "_checks", lambda *_: iter(found))
    out = tmp_path / "out.json"
    assert validate.main(["--json", str(out), "--quick"]) == code
    summary = json.loads(out.read_text())
    assert [c["verdict"] for c in summary["checks"]] == ["ok" if right else "FAILED", "skipped"]
    assert summary["failed"] == ([] if right else ["one"])
    assert summary["machine"]["device_kind"] == "cpu" and summary["machine"]["interpreted"]
    assert "8 x cpu" in capsys.readouterr().out


def test_what_it_cannot_begin_with_is_one_line(validate, tmp_path, monkeypatch, capsys):
    assert validate.main(["--json", str(tmp_path / "none" / "x.json")]) == 2
    assert capsys.readouterr().err.endswith("x.json: is no file in a folder that there is\n")
    monkeypatch.setenv(tiles.VARIABLE, str(tmp_path / "absent.toml"))
    assert validate.main(["--quick"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: VIBEJAX_TILES = ") and said.count("\n") == 1
