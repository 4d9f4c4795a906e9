"""tpu/plan.py: slices, what is read from compiled programs, memory, time, exit codes."""

import dataclasses
import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from vibejax import memory_plan, sharding
from vibejax.config.rl import RlConfig
from vibejax.kernels.tiles import Tile
from vibejax.planning import compiling, hlo, jobs, plan, projection, search, slices, tiles_run, work
from vibejax.planning.compiling import Compiled
from vibejax.planning.hlo import Collective
from vibejax.planning.slices import SliceError

ROOT = Path(__file__).parents[1]
MODEL_3B = ROOT / "tpu" / "models" / "qwen2.5-coder-3b-64k.json"
MODEL_15B = ROOT / "tpu" / "models" / "qwen2.5-math-1.5b-32k.json"
ALL = np.arange(16)[None]

PROGRAM = """\
HloModule jit_accumulate, is_scheduled=true

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %bound = s32[] constant(12)
  %p = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%spread (x: bf16[8,128]) -> (bf16[8,128], bf16[128,128]) {
  %x = bf16[8,128]{1,0} parameter(0)
  %gather.1 = bf16[128,128]{1,0} all-gather(%x), channel_id=5, replica_groups=[1,16]<=[16], \
dimensions={0}, metadata={op_name="layer/gather"}
  ROOT %t = (bf16[8,128]{1,0}, bf16[128,128]{1,0}) tuple(%x, %gather.1)
}

%body (p.1: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x.1 = bf16[8,128]{1,0} get-tuple-element(%p.1), index=1
  %two = s32[] constant(2)
  %f.1 = (bf16[8,128]{1,0}, bf16[128,128]{1,0}) fusion(%x.1), kind=kCustom, calls=%spread, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  %f.2 = (bf16[8,128]{1,0}, bf16[128,128]{1,0}) fusion(%x.1), kind=kCustom, calls=%spread, \
backend_config={"window_config":{"estimated_cycles":"500"}}
  %next = s32[] add(%i.1, %two)
  ROOT %t.1 = (s32[], bf16[8,128]{1,0}) tuple(%next, %x.1)
}

%rare (x.2: f32[256]) -> f32[256] {
  %x.2 = f32[256]{0} parameter(0)
  ROOT %n.1 = f32[256]{0} negate(%x.2), backend_config={"estimated_cycles":"7"}
}

%often (x.3: f32[256]) -> f32[256] {
  %x.3 = f32[256]{0} parameter(0)
  ROOT %n.2 = f32[256]{0} exponential(%x.3), backend_config={"estimated_cycles":"90"}
}

ENTRY %main (a: (s32[], bf16[8,128]), b: f32[256], c: pred[]) -> f32[256] {
  %a = (s32[], bf16[8,128]{1,0}) parameter(0)
  %b = f32[256]{0} parameter(1)
  %c = pred[] parameter(2)
  %loop = (s32[], bf16[8,128]{1,0}) while(%a), condition=%condition, body=%body
  %chosen = f32[256]{0} conditional(%c, %b, %b), true_computation=%rare, false_computation=%often
  ROOT %sum = f32[256]{0} all-reduce(%chosen), channel_id=9, replica_groups={{0,1},{2,3}}, \
to_apply=%add, metadata={op_name="sum"}
}
"""


def config_of(**changes) -> RlConfig:
    table = {
        "policy": str(MODEL_3B),
        "prompts": "-",
        "mesh": {"context": 16},
        "rollout": {"slots": 64},
        "train": {"dtype": "bfloat16", "remat": "attention"},
    }
    for name, fields in changes.items():
        table[name] = table.get(name, {}) | fields
    return RlConfig.model_validate(table)


def setting(where="v5e-16", **changes) -> plan.Setting:
    settings = jobs.read_settings(MODEL_3B)
    return plan.prepare(config_of(**changes), settings, slices.find(where), 16_384)


# Slices


@pytest.mark.parametrize(
    "name, chips, devices, host",
    [
        ("v5e-16", 16, 16, 4),
        ("v5litepod-8", 8, 8, 8),
        ("v5p-8", 4, 4, 4),  # it counts cores, two a chip
        ("tpu7x-8", 4, 8, 8),
        ("2xtpu7x-16", 16, 32, 8),
        ("2xv5e-256", 512, 512, 4),
        ("h100-8", 8, 8, 8),
    ],
)
def test_a_slice_by_its_cloud_name(name, chips, devices, host):
    where = slices.find(name)
    assert (where.chips, where.devices, where.devices_a_host) == (chips, devices, host)
    assert (where.host.devices, where.host.devices_a_host) == (host, host)


@pytest.mark.parametrize("name", ["v5e-12", "v5p-4", "v9-8", "0xv5e-8", "v5e", ""])
def test_a_slice_that_is_not_sold_lists_those_that_are(name):
    with pytest.raises(SliceError, match=r"v5e-1\|4\|8\|16.*h100-1\|2\|4\|8") as error:
        slices.find(name)
    assert "\n" not in str(error.value)


def test_a_mesh_must_have_the_devices_of_its_slice():
    sizes = {"data": 1, "fsdp": 2, "context": 4, "tensor": 1}
    with pytest.raises(SliceError, match="fsdp 2 x context 4 x tensor 1 = 8 devices, but v5e-16 h"):
        slices.check_mesh(slices.find("v5e-16"), sizes)
    slices.check_mesh(slices.find("2xv5e-4"), sizes | {"data": 2, "fsdp": 1})
    with pytest.raises(SliceError, match=r"mesh\.data must be a multiple of the 2 slices"):
        slices.check_mesh(slices.find("2xv5e-4"), sizes)


def test_a_group_waits_for_its_corner():
    square = np.array([[x, y, 0] for x in range(4) for y in range(4)])
    row = square[:4]
    assert slices.find("v5e-16").bandwidth(square) == 2 * 50e9  # no rings: one link an axis
    assert slices.find("v5e-16").bandwidth(row) == 50e9
    whole = np.array([[x, y, 0] for x in range(16) for y in range(16)])
    assert slices.find("v5e-256").bandwidth(whole) == 4 * 50e9
    cube = np.array([[x, y, z] for x in range(4) for y in range(4) for z in range(4)])
    assert slices.find("v5p-128").bandwidth(cube) == 6 * 100e9
    assert slices.find("v5p-256").bandwidth(cube) == (2 + 2 + 1) * 100e9  # half of the last axis
    cores = np.zeros((2, 3), int)
    assert slices.find("tpu7x-8").bandwidth(cores) == 3690e9 / 2  # through the chip's memory


# Compiled programs


def test_loops_and_branches_run_as_often_as_they_do():
    found = hlo.parse(PROGRAM)
    runs = hlo.executions(found, hlo.entry(PROGRAM))
    assert runs == {"main": 1, "body": 6, "often": 1}  # 12 in steps of 2; the costlier branch
    assert hlo.cycles(found, runs) == 6 * 1_500 + 90


def test_a_loop_of_unknown_length_runs_as_often_as_said():
    text = PROGRAM.replace("direction=LT", "direction=NE")
    assert hlo.executions(hlo.parse(text), "main", 16)["body"] == 16


def test_a_collective_that_is_spread_over_fusions_counts_once():
    found = hlo.parse(PROGRAM)
    gather, total = sorted(
        hlo.collectives(found, hlo.executions(found, "main"), 16), key=lambda c: c.kind
    )
    assert (gather.kind, gather.payload, gather.times) == ("all-gather", 128 * 128 * 2, 6)
    assert gather.source == "layer/gather" and gather.groups.tolist() == ALL.tolist()
    assert (total.kind, total.payload, total.times) == ("all-reduce", 1_024, 1)
    assert total.groups.tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
    ],
)
def test_who_takes_part_in_a_collective(text, groups):
    assert hlo.replica_groups(text, 4).tolist() == groups


def test_a_refusal_says_what_is_needed_and_by_what():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.\n"
        '  1. Size: 4.00G\n     Operator: op_name="jit(f)/dot"\n     Shape: f32[1024,8]{1,0}\n'
    )
    found = compiling.refusal(said)
    assert found["needed"] == int(20.5 * 2**30)
    assert found["largest"] == [("f32[1024,8] of jit(f)/dot", 4 * 2**30)]


def test_results_are_kept_whole(tmp_path):
    made = Compiled(
        "apply", arguments=5, largest=[["x", 3]], coordinates=[[0, 0]], slices=[0], text=PROGRAM
    )
    compiling.write(made, tmp_path / "a.json")
    assert compiling.read(tmp_path / "a.json") == made


# Time


def collective(kind, payload, groups, times=1.0, place="main"):
    return Collective(kind, payload, np.asarray(groups), times, place, "source")


def test_what_collectives_cost_by_hand():
    where = slices.find("v5e-16")
    places = [[x, y, 0] for x in range(4) for y in range(4)]
    all_of = cost_of(where, places, [0] * 16)
    gather = all_of(collective("all-gather", 16e6, ALL, times=3))
    assert gather.link_bytes == 3 * 15e6 and gather.seconds == pytest.approx(3 * 15e6 / 100e9)
    assert all_of(collective("all-reduce", 16e6, ALL)).link_bytes == 2 * 15e6
    row = all_of(collective("reduce-scatter", 16e6, ALL.reshape(4, 4)))
    assert row.seconds == pytest.approx(12e6 / 50e9)
    step = collective("collective-permute", 1e6, [[0, 1], [1, 2]])
    back = collective("collective-permute", 1e6, [[1, 0], [2, 1]])
    both = projection.traffic([step, back], where, places, [0] * 16)
    assert both.link_bytes == 2e6 and both.seconds == pytest.approx(1e6 / 50e9)


def cost_of(where, places, of_slice):
    return lambda one: projection.traffic([one], where, places, of_slice)


def test_between_slices_only_the_network_carries():
    where = slices.find("2xv5e-4")
    places = [[x, y, 0] for x in range(2) for y in range(2)] * 2
    cost = cost_of(where, places, [0] * 4 + [1] * 4)
    copies = cost(collective("all-reduce", 8e6, [[i, i + 4] for i in range(4)]))
    assert copies.link_bytes == 0 and copies.network_bytes == 8e6
    assert copies.seconds == pytest.approx(8e6 / 3.1e9)
    # Over all: reduced inside first, so that each device sends a quarter.
    whole = cost(collective("all-reduce", 8e6, [[*range(8)]]))
    assert whole.link_bytes == 2 * 8e6 * 3 / 4 and whole.network_bytes == 8e6 / 4


def test_tiles_of_a_causal_row_by_hand():
    """Four tiles of 128: of 4 x 4 the lower half and the diagonal, 10, all but 4 unmasked."""
    (found,) = tiles_run.counts(Tile(128, 128), (512,), 1, "backward")
    assert found == (10, 6, 4)
    halves = tiles_run.counts(Tile(128, 128), (256, 256), 1, "backward")
    assert halves == [(6, 2, 4)]


def test_tiles_are_shared_evenly_by_context_shards():
    """Of a packed row tiles that documents share cost some more than pairs do."""
    for lengths, most in (((65_536,), 1.05), (tiles_run.PACKED, 1.15)):
        run = [c.run for c in tiles_run.counts(Tile(256, 512), lengths, 16, "forward")]
        assert len(run) == 16 and max(run) <= most * np.mean(run)
    assert sum(tiles_run.packed_row(32_768)) == 32_768


def test_work_by_hand():
    found = setting()
    parameters = 36 * (2048 * 128 * (2 * 16 + 2 * 2) + 3 * 2048 * 11008) + 2048 * 151936
    done = work.accumulate(found.config, found.model, found.mesh, (65_536,))
    attention = 36 * 4 * 16 * 128 * 65_537 / 2
    useful = 65_536 / 16 * 3 * (2 * parameters + attention)
    assert done.useful_flops == pytest.approx(useful)
    assert done.flops > useful  # layers and the head are computed again
    full = work.accumulate(found.config, found.model, found.mesh, (65_536,), full=True)
    assert full.useful_flops == pytest.approx(
        65_536 / 16 * 3 * (2 * parameters + attention * 65_536 / 32_768.5)
    )
    step = work.decode_step(found.engine, found.memory, 8, 1_000.0)
    cached = 36 * 2 * 2 * 128 * 2  # bytes of a token's keys and values
    assert step.bytes == pytest.approx(found.memory.weight_bytes + 1_000 * cached)


def test_a_gpus_attention_takes_what_it_was_measured_to_take():
    """By attention_gpu.py on an H100: a layer of 65,536 tokens, forward 41.9 ms, gradient 151.8."""
    found = setting()
    model = dataclasses.replace(found.model, layers=1)
    where, mesh = slices.find("h100-1"), jax.sharding.AbstractMesh((1,) * 4, found.mesh.axis_names)

    def seconds(name, remat):
        config = RlConfig.model_validate(
            found.config.model_dump() | {"train": found.config.train.model_dump() | {
                "remat": remat, "microbatch_rows": 1}}
        )  # fmt: skip
        return projection.kernel_seconds(name, config, model, mesh, where, (65_536,))

    assert seconds("score", "full") == pytest.approx(41.9e-3, rel=0.01)
    assert seconds("accumulate", "attention") == pytest.approx(151.8e-3, rel=0.01)
    assert seconds("accumulate", "full") == pytest.approx(193.7e-3, rel=0.01)
    done = work.accumulate(found.config, found.model, found.mesh, (65_536,))
    pairs = 65_536 / 16 * 65_537 / 2 * 36 * 16 * 128
    again = work.forwards_again(found.config)
    assert done.attention_flops == pytest.approx((12 + 4 * again) * pairs)
    alone = (
        "HloModule m\n\nENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2] parameter(0)\n}\n"
    )
    empty = Compiled("accumulate", text=alone, coordinates=[[0]], slices=[0])
    rest = (done.flops - done.attention_flops) / 671e12
    estimate = projection.estimate("accumulate", empty, done, where, kernel_s=1.0)
    assert estimate.compute_s == pytest.approx(1 + max(rest, done.bytes / 2617e9))


# Memory


def test_what_lies_on_a_device_by_hand():
    found = setting()
    copy = memory_plan.sharded_bytes(found.model, found.mesh)
    assert copy == pytest.approx(4 * 3_085_938_688 / 16, rel=1e-3)
    made = {
        "accumulate": Compiled("accumulate", arguments=2 * copy + 10, outputs=copy, aliased=copy,
                               temporaries=1_000, code=7),
        "window": Compiled("window", arguments=found.memory.weight_bytes + 5, temporaries=300),
    }  # fmt: skip
    train, rollout = projection.phases(found.config, found.model, found.mesh, found.memory, made)
    assert train.held == {"weights": copy, "optimizer": 2 * copy, "gradients": copy,
                          "activations": 1_010, "code": 7}  # fmt: skip
    pages = found.memory.pages * found.memory.page_bytes
    assert rollout.held["KV pages"] == pages
    assert rollout.held["sampler copy"] == found.memory.weight_bytes
    assert rollout.total >= 3 * copy + pages + found.memory.weight_bytes


def test_the_engine_of_a_run_leaves_the_trainers_state_its_room():
    found = setting()
    held = found.memory.total_bytes + 3 * memory_plan.sharded_bytes(found.model, found.mesh)
    assert held < found.where.chip.memory_bytes
    assert found.memory.total_bytes > 0.6 * found.where.chip.memory_bytes


def test_a_search_finds_meshes_of_the_slice_that_fit():
    where = slices.find("v5e-16")
    settings = jobs.read_settings(MODEL_3B)
    found = search.candidates(config_of(mesh={"context": 1}), settings, where, 16_384)
    assert found and found == sorted(found, key=lambda c: c.seconds)
    for candidate in found:
        assert np.prod([*candidate.config.mesh.model_dump().values()]) == 16
        assert candidate.peak_bytes <= where.chip.memory_bytes
    assert found[0].config.train.remat != "full"  # there is room to keep what attention gave
    small = slices.find("v5e-4")
    assert search.candidates(config_of(mesh={"context": 1}), settings, small, 16_384) == []


def test_the_cheapest_change_saves_enough():
    found = setting()
    assert search.cheapest_change(found, 2**28) == 'train.remat = "full"'
    assert search.cheapest_change(found, 2**40).startswith("a larger slice")
    several = setting(train={"microbatch_rows": 2}, mesh={"context": 8, "fsdp": 2})
    assert search.cheapest_change(several, 10 * 2**30).startswith("a larger slice")
    page = found.memory.page_bytes
    tokens = (found.memory.pages - 3) * 64 * found.parts
    assert search.cheapest_rollout_change(found, 3 * page) == f"rollout.pool_tokens = {tokens}"


# The command


@pytest.fixture
def command(monkeypatch, tmp_path):
    """tpu/plan.py's main, with compiles that are made up; returns (exit code, JSON)."""
    spec = importlib.util.spec_from_file_location("tpu_plan", ROOT / "tpu" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tpu_plan", module)
    spec.loader.exec_module(module)

    def run(*arguments, temporaries=2**30, failure=""):
        def compile_all(given, folder, *, workers, limit_s):
            return {job.program: made_up(job, temporaries, failure) for job in given}

        monkeypatch.setattr(compiling, "compile_all", compile_all)
        out = tmp_path / "plan.json"
        code = module.main([*arguments, "--json", str(out)])
        return code, json.loads(out.read_text()) if out.exists() else None

    return run


def made_up(job, temporaries, failure):
    if failure and job.program == "accumulate":
        return Compiled(
            job.program, failure=failure, needed=30 * 2**30, largest=[("a heap", 2**33)]
        )
    found = slices.find(job.slice)
    places = [[x, y, 0] for x in range(found.shape[0]) for y in range(found.shape[1])]
    text = PROGRAM.replace("direction=LT", "direction=NE") if job.program == "window" else PROGRAM
    text = text.replace("calls=%spread", "calls=%often") if job.program == "window" else text
    return Compiled(
        job.program, temporaries=temporaries, coordinates=places, slices=[0] * len(places),
        text=text, largest=[("a heap", temporaries)],
    )  # fmt: skip


LONG = {"train.row_tokens": 65_536, "rollout.max_completion_tokens": 63_488}


def arguments(**sets):
    chosen = {
        "policy": MODEL_3B, "mesh.context": 16, "train.remat": "attention",
        "train.row_tokens": 8_192, "rollout.max_completion_tokens": 6_144,
    } | sets  # fmt: skip
    of_sets = [x for k, v in chosen.items() for x in ("--set", f"{k}={v}")]
    return [str(ROOT / "configs" / "rl_math.toml"), "--slice", "v5e-16", *of_sets]


def test_a_run_that_fits(command, capsys):
    code, found = command(*arguments())
    said = capsys.readouterr().out
    assert code == 0 and found["fits"] and found["peak_bytes"] <= found["memory_bytes"]
    assert 0 < found["mfu_causal_exposed"] <= found["mfu_causal_hidden"]
    assert found["mfu_full_exposed"] > found["mfu_causal_exposed"]
    assert found["slots"] % 4 == 0 and found["pool_tokens"] >= 65_536
    assert "nothing was run" in said and "fits: " in said
    assert {"accumulate", "apply", "canary", "hand_over", "fill"} <= found["programs"].keys()
    assert found["versions"]["jax"] == jax.__version__


def test_a_run_that_does_not_fit_names_buffers_and_a_change(command, capsys):
    code, found = command(*arguments(), temporaries=13 * 2**30 + 2**28)
    said = capsys.readouterr().out
    assert code == 1 and not found["fits"]
    assert "does not fit: " in said and "a heap" in said and "cheapest change: " in said


def test_a_program_that_the_compiler_refuses_does_not_fit(command, capsys):
    code, found = command(*arguments(), failure="RESOURCE_EXHAUSTED: no")
    said = capsys.readouterr().out
    assert code == 1 and found["failures"] == {"accumulate": "RESOURCE_EXHAUSTED: no"}
    assert "not compiled: accumulate" in said and "8.00 GiB  a heap" in said
    assert found["mfu_causal_exposed"] is None


@pytest.mark.parametrize(
    "sets, options, message",
    [
        ({}, ["--slice", "v5e-12"], "error: slice 'v5e-12': did you mean v5e-1"),
        ({"mesh.context": 8}, [], "error: mesh data 1 x fsdp 1 x context 8 x tensor 1 = 8 devic"),
        ({"policy": "runs/none"}, [], "error: policy runs/none: no config.json there; name one by"),
        ({"rollout.slots": 7}, [], "error: rollout.slots = 7: must be a multiple of the 4 devices"),
        ({"rollout.tensor": 4}, [], "error: rollout.tensor = 4: must divide the 4 devices of a h"),
        (
            LONG | {"policy": MODEL_15B},
            [],
            "error: rollout.max_prompt_tokens + rollout.max_completion_",
        ),
        ({"train.microbatch_rows": 0}, [], "train.microbatch_rows = 0"),
        ({"mesh.fsdp": 16, "mesh.context": 1}, [], "error: mesh: axis 'batch' of size 1 is not a"),
    ],
)
def test_what_cannot_be_planned_is_one_line(command, capsys, sets, options, message):
    code, found = command(*arguments(**sets), *options)
    said = capsys.readouterr().err
    assert code == 2 and found is None
    assert message in said and said.count("\n") == 1


def test_a_search_shows_what_it_compiled(command, capsys):
    code, found = command(*arguments(), "--search")
    said = capsys.readouterr().out
    assert code == 0 and "the best 3 are compiled" in said
    assert said.count("peak ") == 3
    assert np.prod([*found["mesh"].values()]) == 16


def test_models_that_come_with_it_are_the_reports():
    for path, layers, width, mlp in ((MODEL_3B, 36, 2048, 11008), (MODEL_15B, 28, 1536, 8960)):
        model = jobs.model_of(jobs.read_settings(path))
        assert (model.layers, model.width, model.mlp, model.tied) == (layers, width, mlp, True)
    assert sharding.MESH_AXES == ("data", "fsdp", "context", "tensor")


def test_a_program_that_jaxlib_cannot_read_is_read_as_the_compiler_wrote_it(tmp_path):
    def refuse():
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update should have 1 operands")

    compiled = types.SimpleNamespace(as_text=refuse)
    for name, text in (("0.jit_cast", "small"), ("1.jit_step", "the program")):
        (tmp_path / f"module_000{name}.after_codegen.txt").write_text(text)
    (tmp_path / "module_0001.jit_step.before_optimizations.txt").write_text("longer than all else")
    assert compiling._text(compiled, tmp_path) == "the program"
    with pytest.raises(jax.errors.JaxRuntimeError):
        compiling._text(compiled, None)
    assert compiling._text(types.SimpleNamespace(as_text=lambda: "read"), tmp_path) == "read"
