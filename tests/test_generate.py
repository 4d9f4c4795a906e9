"""python -m vibejax.generate on files: what is stopped goes on, and other settings do not mix."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny

from vibejax import generate
from vibejax.locations import resolve

POLICY = "package:vibejax/quickstart/policy"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with prompts and all their completions."""
    folder = tmp_path_factory.mktemp("generate")
    tiny.write_task(folder / "p.jsonl", tiny.TASK[:4])
    run(folder, folder / "whole.jsonl")
    return folder


def run(folder, out, *options):
    generate.main([POLICY, "--prompts", f"{folder}/p.jsonl", "--out", str(out), "--samples", "2",
                   "--max-tokens", "6", *options])  # fmt: skip


def stopped(whole, out):
    """Stopped amid the third record."""
    lines = (whole / "whole.jsonl").read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:2]) + lines[2][:-9])
    settings = (whole / "whole.jsonl.settings.json").read_text()
    out.with_name(f"{out.name}.settings.json").write_text(settings)


def test_what_was_stopped_goes_on_as_if_it_had_not(whole, tmp_path):
    out = tmp_path / "a.jsonl"
    run(whole, out, "--resume")  # nothing is there
    want = (whole / "whole.jsonl").read_bytes()
    assert out.read_bytes() == want
    stopped(whole, out)
    run(whole, out, "--resume")
    assert out.read_bytes() == want
    run(whole, out, "--resume")
    assert out.read_bytes() == want


@pytest.mark.parametrize(
    "options, message",
    [
        (("--seed", "4"), "a.jsonl was written with seed = 0, not 4"),
        (("--temperature", "0.5"), "a.jsonl was written with temperature = 1.0, not 0.5"),
        (("--prompts", "OTHER"), "a.jsonl:2 is of another record of the prompts"),
        (("--seed", "4294967296"), "--seed 4294967296: must be at least 0 and below 2**32"),
    ],
)
def test_what_others_have_written_stays(whole, tmp_path, capsys, options, message):
    tiny.write_task(tmp_path / "other.jsonl", [*tiny.TASK[:1], *tiny.TASK[2:5]])
    stopped(whole, tmp_path / "a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    options = [option.replace("OTHER", f"{tmp_path}/other.jsonl") for option in options]
    with pytest.raises(SystemExit):
        run(whole, tmp_path / "a.jsonl", "--resume", *options)
    assert message in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_completions_stand_beside_all_of_the_record(whole):
    rows = [json.loads(line) for line in (whole / "whole.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "completions"} for row in rows] == tiny.TASK[:4]
    assert all(len(row["completions"]) == 2 for row in rows)


@pytest.mark.parametrize("line", ["{", "[1]", "3"])
def test_a_line_that_is_no_record_is_named(whole, tmp_path, capsys, line):
    stopped(whole, tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(f"{line}\n")
    with pytest.raises(SystemExit):
        run(whole, tmp_path / "a.jsonl", "--resume")
    assert "a.jsonl:1 is of another record of the prompts" in capsys.readouterr().err


def test_completions_of_another_model_are_not_gone_on_with(whole, tmp_path, capsys):
    stopped(whole, tmp_path / "a.jsonl")
    policy = shutil.copytree(resolve(POLICY), tmp_path / "policy")
    options = ["--out", f"{tmp_path}/a.jsonl", "--samples", "2", "--max-tokens", "6", "--resume"]
    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        file = policy / name
        before = file.read_text() if file.exists() else None
        file.write_text((before or "x") + "\n")
        with pytest.raises(SystemExit):
            generate.main([str(policy), "--prompts", f"{whole}/p.jsonl", *options])
        assert "a.jsonl was written with checkpoint = " in capsys.readouterr().err
        file.write_text(before) if before else file.unlink()
    generate.main([str(policy), "--prompts", f"{whole}/p.jsonl", *options])


def test_what_is_there_is_not_written_over(whole, tmp_path, capsys):
    out = tmp_path / "a.jsonl"
    out.write_text("precious")
    for there in (out, tmp_path):
        with pytest.raises(SystemExit):
            run(whole, there)
        assert f"--out {there}: exists; name another file, or go on" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_a_terminal_cannot_write_is_spelled_out():
    done = subprocess.run(
        [sys.executable, "-c", "from vibejax.generate import say; say('1 \\u00fc 2')"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("1 \\xfc 2\n", "")


@pytest.mark.parametrize("settings", ["", "[1]", "{"])
def test_settings_that_were_not_written_whole(whole, tmp_path, capsys, settings):
    stopped(whole, tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.settings.json").write_text(settings)
    with pytest.raises(SystemExit):
        run(whole, tmp_path / "a.jsonl", "--resume")
    assert "a.jsonl.settings.json is not a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--prompt", "1+1=", "--out", "F"), "--out: is for --prompts"),
        (("--prompts", "F", "--raw"), "--raw: is for --prompt; records say"),
        (("--prompts", "F", "--out", "./F"), "--out ./F: is the file of the prompts"),
    ],
)
def test_options_that_would_do_nothing(capsys, options, message):
    with pytest.raises(SystemExit):
        generate.main([POLICY, *options])
    assert message in capsys.readouterr().err


def test_one_sequence_with_int8_pages(capsys):
    """With the default limit of 512 tokens."""
    generate.main([POLICY, "--prompt", "1+1=", "--raw", "--kv-dtype", "int8", "--temperature", "0"])
    printed = capsys.readouterr()
    assert printed.out.strip() and "engine memory of a device: weights" in printed.err
