"""Run folders: begun, gone on with, and by one command both."""

import json
import subprocess
import sys

import pytest

from vibejax import run_folder
from vibejax.config.sft import SftConfig
from vibejax.run_folder import Log, RunError


def configured(out, resume="auto", **more):
    return SftConfig(policy="p", data="d", steps=1, out=str(out), resume=resume, **more)


def test_one_command_begins_and_goes_on(tmp_path):
    config = configured(tmp_path / "run")
    assert not run_folder.resumes(config, tmp_path / "run")
    folder = run_folder.open_run(config, "sft")
    assert run_folder.resumes(config, folder)
    written = (folder / "config.toml").read_text()
    assert run_folder.open_run(config, "sft") == folder
    assert (folder / "config.toml").read_text() == written
    assert run_folder.open_run(configured(folder, resume=True), "sft") == folder
    with pytest.raises(RunError, match="cannot resume with another configuration: seed: 0 -> 3"):
        run_folder.open_run(configured(folder, seed=3), "sft")
    with pytest.raises(RunError, match="exists; choose another out"):
        run_folder.open_run(configured(folder, resume=False), "sft")


def test_a_run_killed_before_it_began_begins(tmp_path):
    """The folder is there, and half a configuration under another name."""
    (tmp_path / "config.part").write_text("policy = ")
    config = configured(tmp_path)
    assert not run_folder.resumes(config, tmp_path)
    run_folder.open_run(config, "sft")
    assert run_folder.resumes(config, tmp_path) and not (tmp_path / "config.part").exists()


def test_what_cannot_be_gone_on_with(tmp_path):
    for resume, given in ((True, "true"), ("auto", '"auto"')):
        with pytest.raises(RunError, match=f"resume = {given} needs out"):
            run_folder.check_run(configured("", resume=resume))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="file: is not a folder"):
        run_folder.check_run(configured(file))


def test_a_run_whose_first_file_found_no_room_begins(tmp_path, monkeypatch):
    out = tmp_path / "r"

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.os, "fsync", full)
        with pytest.raises(RunError, match=r"r/config\.part: No space left on device"):
            run_folder.open_run(configured(out, resume=False), "sft")
    assert run_folder.open_run(configured(out, resume=False), "sft") == out


def test_data_that_has_changed_is_no_data_to_go_on_with(tmp_path, monkeypatch):
    data, heldout = tmp_path / "data.jsonl", tmp_path / "heldout.jsonl"
    data.write_text("one\n")
    heldout.write_text("one\n")
    config = configured(tmp_path / "run", heldout=str(heldout))
    config = config.model_copy(update={"data": str(data)})
    folder = run_folder.open_run(config, "sft")

    def check(policy="1", tokenizer="2"):
        run_folder.require_same_data(
            config, folder, "data", "heldout", policy=policy, tokenizer=tokenizer
        )

    check()
    check()
    data.write_text("two\n")
    with pytest.raises(RunError, match=r"data\.jsonl: changed since the run in .*run began"):
        check()
    data.write_text("one\n")
    with pytest.raises(RunError, match=r"p: the parameters: changed since the run in"):
        check(policy="2")
    with pytest.raises(RunError, match=r"p: the tokenizer: changed since the run in"):
        check(tokenizer="1")
    check()

    other = json.loads((folder / "data.json").read_text()) | {"heldout": "0"}
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.distributed, "gather", lambda value: [value, other])
        with pytest.raises(RunError, match=r"heldout\.jsonl: not the same for process 1"):
            check()
    for torn in ("", "[]", '{"data": '):
        (folder / "data.json").write_text(torn)
        with pytest.raises(RunError, match=r"data\.json: damaged \("):
            check()


HOLDING = """
import sys, time
from vibejax import run_folder
from vibejax.config.sft import SftConfig
config = SftConfig(policy="p", data="d", steps=1, out=sys.argv[1], resume="auto")
with run_folder.kept(config, run_folder.open_run(config, "sft")):
    print("holds", flush=True)
    time.sleep(600)
"""


def test_a_run_belongs_to_one_process(tmp_path):
    config = configured(tmp_path / "run")
    command = [sys.executable, "-c", HOLDING, config.out]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "holds\n"
        for begin in (run_folder.check_run, lambda c: run_folder.open_run(c, "sft")):
            with pytest.raises(RunError, match=r"run: another process is at this run"):
                begin(config)
        with pytest.raises(RunError, match="run: another process is at this run"):
            with run_folder.kept(config, tmp_path / "run"):
                pass
    finally:
        other.kill()
        other.communicate()
    for _ in range(2):
        with run_folder.kept(config, run_folder.open_run(config, "sft")):
            pass


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2: not JSON"):
        run_folder.read_log(tmp_path / "metrics.jsonl")


def test_lines_are_kept_up_to_a_step(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    for step in (1, 2, 3):
        log.write(step, {"x": step})
    log.sync()
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "x"')
    log = Log(tmp_path / "log.jsonl", 2)
    assert [row["x"] for row in log.rows] == [1, 2]
    log.close()
    assert len(run_folder.read_log(tmp_path / "log.jsonl")) == 2
