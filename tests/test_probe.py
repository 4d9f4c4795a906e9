"""Checkpoints scored on domains: real sampling once, and scripted verdicts for the rest."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from hf_folder import SETTINGS, make_tensors, write_folder

from vibejax import probe, run_folder, sharding
from vibejax.completions import Completion
from vibejax.config.probe import ProbeConfig
from vibejax.config_file import ConfigError, InputError, load
from vibejax.rollout import Rollout
from vibejax.verifiers import Outcome, Verdict

TOML = """
checkpoints = ["{folder}/early", "{folder}/late"]
samples = 4
k = 2
[domains]
math = "{folder}/math.jsonl"
code = "{folder}/code.jsonl"
[rollout]
max_prompt_tokens = 8
max_completion_tokens = 12
slots = 16
"""
# A random policy is never right, but now and then it says a number of one digit.
SUMS = [
    {"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": "1", "last_number": True}
    for a in range(2) for b in range(3)
]  # fmt: skip
# Correct completions of 4, a checkpoint and domain; one number a prompt.
CORRECT = {
    ("early", "math"): [4, 1, 0, 0, 0, 0],
    ("late", "math"): [2, 2, 1, 0, 0, 0],
    ("early", "code"): [1, 0],
    ("late", "code"): [1, 0],
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    settings = SETTINGS | {"vocab_size": 35, "num_hidden_layers": 1}
    tensors = {name: t / 4 for name, t in make_tensors(settings, "float32").items()}
    turned = {name: t[::-1].copy() for name, t in tensors.items()}
    for name, held in (("early", tensors), ("late", turned)):
        tiny.write_tokenizer(write_folder(folder / name, settings, held))
    tiny.write_task(folder / "math.jsonl", SUMS)
    tiny.write_task(folder / "code.jsonl", SUMS[:2])
    (folder / "probe.toml").write_text(TOML.format(folder=folder))
    return folder


@pytest.fixture
def folder(shared, tmp_path):
    shutil.copytree(shared, tmp_path / "in")
    (tmp_path / "in/probe.toml").write_text(TOML.format(folder=tmp_path / "in"))
    return tmp_path / "in"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the eight, for which everything would be compiled."""
    make_mesh = sharding.make_mesh
    one = jax.devices()[:1]
    monkeypatch.setattr(sharding, "make_mesh", lambda sizes, devices=one: make_mesh(sizes, devices))


@pytest.fixture
def sampled(monkeypatch):
    """Verdicts by script instead of sampling; lists the (checkpoint, domain) that were asked."""
    asked = []

    def sample_domains(subject, domains, config, mesh, pool):
        for domain in domains:
            asked.append((subject.policy.path.name, domain))
            counts = CORRECT[asked[-1]]
            yield domain, scripted(subject.prompts[domain], counts, config.samples)

    monkeypatch.setattr(probe, "sample_domains", sample_domains)
    return asked


def scripted(prompts, counts, samples) -> Rollout:
    def verdict(correct):
        outcome = Outcome.CORRECT if correct else Outcome.WRONG
        return Verdict(correct=correct, reward=float(correct), outcome=outcome)

    completion = Completion(0, 0, np.arange(3, dtype=np.int32), np.zeros(3, np.float32), "stop")
    verdicts = [[verdict(g < count) for g in range(samples)] for count in counts]
    return Rollout(prompts, [[completion] * samples for _ in prompts], verdicts)


def run(folder, out, *settings):
    return probe.run(load(ProbeConfig, folder / "probe.toml", [f"out={out}", *settings]))


def test_real_checkpoints_are_sampled_verified_and_scored(folder, tmp_path, capsys):
    settings = ("samples=32", "rollout.slots=64", "rollout.max_completion_tokens=3")
    run(folder, tmp_path / "out", *settings)
    rows = run_folder.read_log(tmp_path / "out/scores.jsonl")
    assert [(row["checkpoint"], row["domain"]) for row in rows] == [
        (f"{folder}/{name}", domain) for name in ("early", "late") for domain in ("math", "code")
    ]
    for row in rows:
        assert len(row["correct"]) == (6 if row["domain"] == "math" else 2)
        assert 0 <= min(row["correct"]) <= max(row["correct"]) <= 32
        assert row["unscored"] == 0.0
    assert rows[0]["correct"] != rows[2]["correct"]
    assert any(rows[0]["correct"])
    # The sets share prompts and their places: the draws, and so the counts, are the same.
    assert rows[1]["correct"] == rows[0]["correct"][:2]
    result = json.loads((tmp_path / "out/probe.json").read_text())
    for score, row in zip(result["scores"], rows, strict=True):
        assert score["pass_at"][0] == pytest.approx(np.mean(row["correct"]) / 32)
        assert len(score["pass_at"]) == 32
    assert (tmp_path / "out/probe.png").stat().st_size > 1_000
    assert "python -m vibejax.merge OUT " in capsys.readouterr().out


def test_scores_and_specialists_by_hand(folder, tmp_path, sampled, capsys):
    run(folder, tmp_path / "out")
    result = json.loads((tmp_path / "out/probe.json").read_text())
    # pass@2 of 4: 4 right 1, 2 right 1 - 1/6, 1 right 1 - 3/6, none 0
    early, _, late, _ = result["scores"]
    np.testing.assert_allclose(early["pass_at"][:2], [5 / 24, 1.5 / 6])
    np.testing.assert_allclose(late["pass_at"][:2], [5 / 24, (5 / 6 + 5 / 6 + 1 / 2) / 6])
    np.testing.assert_allclose([early["pass_at"][3], late["pass_at"][3]], [2 / 6, 3 / 6])
    assert early["low"] < early["pass_at"][1] < early["high"]
    assert early["length"] == 3.0 and early["truncated"] == 0.0 and early["prompts"] == 6
    assert result["specialists"] == {  # of equals, the earliest
        "math": f"{folder}/late", "code": f"{folder}/early",
    }  # fmt: skip
    head, *rows, command = capsys.readouterr().out.splitlines()
    assert head.split() == ["pass@2", "of", "4", "math", "code"]
    assert [row.split()[:2] for row in rows] == [
        [f"{folder}/early", "0.250"], [f"{folder}/late", "0.361*"],
    ]  # fmt: skip
    assert "0.250* [" in rows[0] and "0.250  [" in rows[1]  # code
    assert command == f"python -m vibejax.merge OUT {folder}/late=1 {folder}/early=1"


def test_what_has_a_score_is_not_scored_again(folder, tmp_path, sampled):
    out = tmp_path / "out"
    one = f'checkpoints=["{folder}/early"]'
    run(folder, out, one)
    assert sampled == [("early", "math"), ("early", "code")]
    log = out / "scores.jsonl"
    first, _ = log.read_text().splitlines(keepends=True)
    log.write_text(first + '{"step": 2, "checkp')  # killed while it wrote the second
    run(folder, out, one, "resume=true")
    assert sampled[2:] == [("early", "code")]
    run(folder, out, "resume=true")  # and a checkpoint more
    assert sampled[3:] == [("late", "math"), ("late", "code")]
    run(folder, out, "resume=true")
    assert len(sampled) == 5
    run(folder, tmp_path / "at_once")
    assert (out / "probe.json").read_text() == (tmp_path / "at_once/probe.json").read_text()
    assert f"{folder}/late" in (out / "config.toml").read_text()


def test_a_score_of_other_weights_or_other_prompts_is_none(folder, tmp_path, sampled):
    out = tmp_path / "out"
    run(folder, out)
    tiny.write_task(folder / "code.jsonl", SUMS[2:4])
    run(folder, out, "resume=true")
    assert sampled[4:] == [("early", "code"), ("late", "code")]
    shutil.copy(folder / "early/model.safetensors", folder / "late")
    run(folder, out, "resume=true")
    assert sampled[6:] == [("late", "math"), ("late", "code")]
    assert len(json.loads((out / "probe.json").read_text())["scores"]) == 4


def test_a_domain_may_come_later_but_nothing_else_may_change(
    folder, tmp_path, sampled, monkeypatch
):
    out = tmp_path / "out"
    run(folder, out)
    monkeypatch.setitem(CORRECT, ("early", "stem"), [0] * 6)
    monkeypatch.setitem(CORRECT, ("late", "stem"), [0] * 6)
    run(folder, out, "resume=true", f"domains.stem={folder}/math.jsonl")
    assert sampled[4:] == [("early", "stem"), ("late", "stem")]
    with pytest.raises(InputError, match="cannot resume with another configuration: k: 2 -> 3"):
        run(folder, out, "resume=true", "k=3")


def test_what_could_not_be_verified_is_said(folder, tmp_path, sampled, monkeypatch, capsys):
    def sample_domains(subject, domains, config, mesh, pool):
        for domain in domains:
            rolled = scripted(subject.prompts[domain], [4] * 6, 4)
            lost = Verdict(correct=False, reward=0.0, outcome=Outcome.TIMEOUT)
            rolled.verdicts[0][:3] = [lost] * 3
            yield domain, rolled

    monkeypatch.setattr(probe, "sample_domains", sample_domains)
    table = f'checkpoints=["{folder}/early"]', f'domains={{math="{folder}/math.jsonl"}}'
    run(folder, tmp_path / "out", *table)
    text = f"{folder}/early on math: 12.5% of the completions could not be verified\n"
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    "setting, message",
    [
        ('checkpoints=["IN/early", "IN/gone"]', "IN/gone: no such file or folder"),
        ('checkpoints=["IN/earl*", "IN/early"]', "checkpoints: IN/early is named twice"),
        ("domains.code=IN/gone.jsonl", "IN/gone.jsonl: no such file"),
        ("domains.code=IN/bare.jsonl", "IN/bare.jsonl:2: has no 'ground_truth'"),
        (
            "domains.code=IN/null.jsonl",
            "IN/null.jsonl:1: record of verifier 'math' has no `ground_",
        ),
        ("domains.code=IN/odd.jsonl", "IN/odd.jsonl:1: verifier = 'maths' is unknown, known are"),
        (
            "rollout.max_prompt_tokens=3",
            "IN/math.jsonl:1: the prompt has 4 tokens, more than the 3",
        ),
        ("rollout.max_completion_tokens=99", "= 107 is more than the 64 positions of IN/early"),
        ("mesh.data=3", "mesh: mesh data=3 x fsdp=1 x context=1 x tensor=1 needs 3 devices"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sampled(
    setting, message, folder, tmp_path, sampled
):
    bare = [SUMS[0], {key: value for key, value in SUMS[1].items() if key != "ground_truth"}]
    tiny.write_task(folder / "bare.jsonl", bare)
    tiny.write_task(folder / "null.jsonl", [SUMS[0] | {"ground_truth": None}])
    tiny.write_task(folder / "odd.jsonl", [SUMS[0] | {"verifier": "maths"}])
    with pytest.raises(InputError) as error:
        run(folder, tmp_path / "out", setting.replace("IN", str(folder)))
    assert message.replace("IN", str(folder)) in str(error.value)
    assert "\n" not in str(error.value)
    assert not sampled and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (("code =", "math ="), "not valid TOML: Cannot overwrite a value (at line 7"),
        (("/late", "/early"), "checkpoints: '/x/early' is named twice"),
        (("k = 2", "k = 5"), "k = 5 must be at most samples = 4"),
        (("code =", '"co de" ='), "domains.co de"),
        (("[domains]", "[domain]"), "unknown key domain; did you mean domains?"),
    ],
)
def test_configurations_that_cannot_be_run(change, message, tmp_path):
    path = tmp_path / "probe.toml"
    path.write_text(TOML.format(folder="/x").replace(*change))
    with pytest.raises(ConfigError) as error:
        load(ProbeConfig, path)
    assert message in str(error.value)
