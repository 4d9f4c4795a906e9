"""Pipelines of real stages that need no training: order, manifests, going on, and bad input."""

import itertools
import json
from pathlib import Path

import pytest

from vibejax import domains, generate, merge, pipeline, run_folder
from vibejax import manifest as manifest_of
from vibejax.config_file import ConfigError, InputError

POLICY = "package:vibejax/quickstart/policy"
TOML = """
out = "OUT"
[defaults.curate]
workers = 1
[[stages]]
name = "tasks"
run = "domains"
arguments = ["{out}", "--seed", "5"]
[[stages]]
name = "cleaned"
run = "curate"
set = {inputs = ["{tasks}/sft.jsonl"], length = {max_trace = 40}}
[[stages]]
name = "merged"
run = "merge"
arguments = ["{out}", "POLICY=1", "POLICY=3"]
""".replace("POLICY", POLICY)


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    counts = {"sft": 30, "hard": 4, "train": 8, "probe": 4, "heldout": 8}
    monkeypatch.setattr(domains, "COUNTS", counts)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "pipeline.toml"
    path.write_text(TOML.replace("OUT", str(tmp_path / "out")))
    return path


def run(config, *arguments):
    pipeline.main([str(config), *arguments])


def manifest(config, stage):
    return json.loads((config.parent / "out" / stage / "manifest.json").read_text())


def test_every_stage_can_be_run():
    for command in pipeline.CONFIGURED:
        assert callable(pipeline.stage_module(command).run)
    for command in pipeline.WITH_ARGUMENTS:
        assert callable(pipeline.stage_module(command).main)


def test_stages_run_in_order_and_say_what_they_took_and_made(config, capsys):
    run(config)
    said = capsys.readouterr().out
    places = [
        said.index(f"[{n}/3] {name}: ") for n, name in enumerate(("tasks", "cleaned", "merged"), 1)
    ]
    assert places == sorted(places)
    out = config.parent / "out"
    cleaned = manifest(config, "cleaned")
    assert cleaned["settings"]["inputs"] == [f"{out}/tasks/sft.jsonl"]
    assert cleaned["settings"]["workers"] == 1  # of the defaults
    sums = manifest(config, "tasks")["outputs"]
    assert cleaned["inputs"][f"{out}/tasks/sft.jsonl"] == {"sft.jsonl": sums["sft.jsonl"]}
    lines = (out / "cleaned/records.jsonl").read_text().splitlines()
    traces = [json.loads(line) for line in lines]
    assert traces and max(len(trace["completion"]) for trace in traces) <= 40
    merged = manifest(config, "merged")
    assert "model.safetensors" in merged["outputs"]
    assert [s["weight"] for s in merged["metrics"]["sources"]] == [0.25, 0.75]
    assert merged["versions"].keys() == {"vibejax", "jax", "numpy"}


def test_a_pipeline_goes_on_after_the_last_finished_stage(config, monkeypatch, capsys):
    def broken(*_):
        raise InputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(merge, "merge", broken)
        with pytest.raises(SystemExit):
            run(config)
    assert not (config.parent / "out/merged/manifest.json").exists()
    first = manifest(config, "tasks")
    capsys.readouterr()
    run(config)
    said = capsys.readouterr().out
    assert "[1/3] tasks: finished before" in said and "[2/3] cleaned: finished before" in said
    assert "[3/3] merged: merge" in said
    assert manifest(config, "tasks") == first
    run(config)
    assert capsys.readouterr().out.count("finished before") == 3


def test_completions_of_a_stopped_stage_are_not_sampled_again(config, monkeypatch, capsys):
    arguments = ["{merged}", "--prompts", "{tasks}/math_train.jsonl", "--max-tokens", "4",
                 "--out", "{out}/rollouts.jsonl"]  # fmt: skip
    stage = f'[[stages]]\nname = "sampled"\nrun = "generate"\narguments = {json.dumps(arguments)}\n'
    config.write_text(config.read_text() + stage)
    rows, count = generate._rows, itertools.count()

    def broken(*given):
        if next(count) == 2:
            raise InputError("the disk is full")
        return rows(*given)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "_rows", broken)
        with pytest.raises(SystemExit):
            run(config)
    path = config.parent / "out/sampled/rollouts.jsonl"
    held = path.read_text()
    assert held.count("\n") == 2
    monkeypatch.setattr(generate, "_rows", lambda *given: next(count) and rows(*given))
    run(config)
    assert path.read_text().startswith(held) and path.read_text().count("\n") == 8
    assert next(count) == 3 + 6, "the first two are not made again"


def test_a_finished_stage_whose_settings_or_inputs_changed_is_not_passed_over(config, capsys):
    run(config)
    text = config.read_text()
    config.write_text(text.replace("max_trace = 40", "max_trace = 30"))
    with pytest.raises(SystemExit):
        run(config)
    assert "stage cleaned is finished, but settings.length changed since" in capsys.readouterr().err
    config.write_text(text)
    records = config.parent / "out/tasks/sft.jsonl"
    records.write_text(records.read_text() + records.read_text().splitlines()[0] + "\n")
    with pytest.raises(SystemExit):
        run(config)
    assert f"inputs.{records} changed since; --from cleaned" in capsys.readouterr().err
    before = (config.parent / "out/cleaned/records.jsonl").read_text()
    run(config, "--from", "cleaned")
    assert (config.parent / "out/cleaned.before-1/records.jsonl").read_text() == before
    assert "tasks: finished before" in capsys.readouterr().out


def test_a_pipeline_belongs_to_one_process(config, capsys):
    (config.parent / "out").mkdir()
    with run_folder.locked(config.parent / "out/lock", "this one"), pytest.raises(SystemExit):
        run(config, "--from", "tasks")
    assert "out: another process is at this run" in capsys.readouterr().err
    assert [path.name for path in (config.parent / "out").iterdir()] == ["lock"]


def test_a_torn_manifest_is_named(config, capsys):
    run(config)
    (config.parent / "out/cleaned/manifest.json").write_text("")
    with pytest.raises(SystemExit):
        run(config)
    assert "cleaned/manifest.json: damaged (" in capsys.readouterr().err


def test_inputs_within_a_value_count(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("1")
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    found = [
        {*manifest_of.inputs({"key": [value]}, tmp_path / "out")}
        for value in (f"{a}", f"set={a}", f"{b}=0.5", f"{tmp_path}/*.jsonl", f"{tmp_path}/c=")
    ]
    assert found == [{str(a)}, {str(a)}, {str(b)}, {str(a), str(b)}, set()]


def test_a_dry_run_prints_the_plan_and_does_nothing(config, capsys):
    training = """
[[stages]]
name = "learnt"
run = "rl"
[stages.set]
policy = "{merged}"
prompts = "{tasks}/math_train.jsonl"
steps = 5
rollout = {prompts_per_step = 4, group_size = 2, max_completion_tokens = 100}
"""
    config.write_text(config.read_text() + training)
    run(config, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["1", "tasks", "domains"], ["2", "cleaned", "curate"], ["3", "merged", "merge"],
        ["4", "learnt", "rl"],
    ]  # fmt: skip
    assert "samples at most 4,000 tokens in 5 steps" in lines[3]
    assert not (config.parent / "out").exists()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('run = "domains"', 'run = "domain"', "stage tasks: run = 'domain': must be one of curate"),
        ("{tasks}", "{task}", "stage cleaned: {task} in '{task}/sft.jsonl' is no earlier"),
        ("max_trace", "max_traces", "cleaned: unknown key length.max_traces; did you mean"),
        ('name = "merged"', 'name = "tasks"', "stage tasks: the name is taken"),
        ('name = "merged"', 'name = "a/b"', "String should match pattern"),
        ("[defaults.curate]", "[defaults.curates]", "defaults.curates: no such stage"),
        ('run = "merge"', 'run = "merge"\nconfig = "x.toml"', "merge has `arguments`, no config"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_anything_runs(config, capsys, old, new, message):
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises((SystemExit, ConfigError)):
        run(config)
    assert message in capsys.readouterr().err
    assert not (config.parent / "out").exists()


def test_two_complaints_come_together(config, capsys):
    text = config.read_text().replace("max_trace", "max_traces").replace('"domains"', '"domain"')
    config.write_text(text)
    with pytest.raises(SystemExit):
        run(config)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2


@pytest.mark.parametrize(
    "path", sorted(Path("configs").glob("pipeline_*.toml")), ids=lambda p: p.name
)
def test_shipped_pipelines_are_plans(path):
    config = pipeline.load(pipeline.PipelineConfig, path)
    steps = pipeline.plan(config, path.parent)
    assert len({step.folder for step in steps}) == len(steps) > 5
    pipeline.describe(steps)
