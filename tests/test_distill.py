"""The shipped policy teaches itself sums: sampled once, and scripted trajectories for the rest."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from vibejax import config_file, policy, qwen2, run_folder, sft, sharding, tokenizer, weights
from vibejax.config.distill import DistillConfig
from vibejax.config.sft import SftConfig
from vibejax.config_file import ConfigError, InputError, load
from vibejax.distill import __main__ as distill
from vibejax.distill import scores, traces
from vibejax.losses.distillation import Fate
from vibejax.verifiers import Outcome, Verdict

NAME = "package:vibejax/quickstart/policy"
TOML = f"""
student = "{NAME}"
samples = 16
[domains.sums]
teachers = ["{NAME}"]
prompts = "IN/sums.jsonl"
[rollout]
max_prompt_tokens = 16
max_completion_tokens = 68
slots = 32
window = 8
page_tokens = 128
[train]
row_tokens = 128
[selection]
min_tokens = 6
short_quantile = 0.0
edges = [40]
min_cell = 2
"""
SUMS = [
    {"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": str(a + b)}
    for a in (123, 700, 111, 345)
    for b in (456, 200, 111, 130)
]
FILES = ("scores.jsonl", "chosen.jsonl", "report.json")


@pytest.fixture(scope="module", autouse=True)
def small():
    """One device of the eight, one engine, programs that compile fast, parts of a few traces."""
    make_mesh, one = sharding.make_mesh, jax.devices()[:1]
    load_engine, engines = policy.load_engine, {}

    def shared(opened, *rest):
        if opened.name not in engines:
            engines[opened.name] = load_engine(opened, *rest)
        return engines[opened.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda sizes, devices=one: make_mesh(sizes, devices))
        patch.setattr(policy, "load_engine", shared)
        patch.setattr(scores, "TRACES_AT_ONCE", 8)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    tiny.write_task(folder / "sums.jsonl", SUMS)
    (folder / "distill.toml").write_text(TOML.replace("IN", str(folder)))
    return folder


@pytest.fixture(scope="module")
def whole(inputs):
    """The folder of a run that nothing interrupted."""
    return run(inputs, inputs / "whole")


def configure(inputs, out, *settings):
    return load(DistillConfig, inputs / "distill.toml", [f"out={out}", *settings])


def run(inputs, out, *settings):
    return distill.run(configure(inputs, out, *settings))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def completion(text, *, stop="stop", outcome="correct"):
    """As `policy.answers` stores it."""
    return {
        "text": text, "length": len(text) + 1, "stop": stop, "correct": outcome == "correct",
        "reward": 1.0, "outcome": outcome, "answer": None,
    }  # fmt: skip


def script(config, *groups):
    """A run's folder as it is once each lesson got these groups, one a prompt."""
    folder = run_folder.open_run(config, "distill")
    (folder / "trajectories").mkdir()
    setup = distill.set_up(config)
    for lesson, completions in zip(setup.lessons, groups, strict=True):
        name = f"{lesson.domain}-{traces.fingerprint(lesson.teacher)[:16]}.jsonl"
        lines = [
            {"step": n + 1, "prompt": n, "record_sha256": traces.digest(prompt.record),
             "completions": group}
            for n, (prompt, group) in enumerate(zip(lesson.prompts, completions, strict=True))
        ]  # fmt: skip
        tiny.write_task(folder / "trajectories" / name, lines)
    return config.model_copy(update={"resume": True})


def never(*args, **kwargs):
    raise AssertionError("is there already")


def copy_of_the_teacher(folder):
    """The same policy but for one weight."""
    path = weights.locate(NAME)
    model = weights.load_config(path)
    mesh = sharding.make_mesh({})
    params = weights.load_params(path, model, mesh, "float32")
    params["embed"] = params["embed"].at[0, 0].add(0.01)
    weights.save_params(params, model, folder, dtype="float32", source=path)
    return folder


# A whole run ------------------------------------------------------------------------------------


def test_what_is_chosen_is_right_and_all_completions_are_counted(inputs, whole):
    chosen = read(whole / "chosen.jsonl")
    assert len(chosen) >= 5
    tokens = tokenizer.load(weights.locate(NAME))
    for record in chosen:
        a, b = record["prompt"].rstrip("=").split("+")
        assert f"\\boxed{{{int(a) + int(b)}}}" in record["completion"]
        assert record["length"] == len(tokens.encode(record["completion"])) + 1
        assert record["domain"] == "sums" and record["teacher"] == NAME
    assert len({(r["prompt"], r["completion"]) for r in chosen}) == len(chosen)
    result = json.loads((whole / "report.json").read_text())
    *cells, together = result["cells"]
    assert [cell["tokens"] for cell in cells] == ["0-39", "40+"]
    assert together["sampled"] == 16 * 16 and together["chosen"] == len(chosen)
    ends = {*traces.Rejection, *Fate}
    for cell in result["cells"]:
        assert sum(cell[end] for end in ends) == cell["sampled"]
    for step in ("sampled", "accepted", *ends):
        assert sum(cell[step] for cell in cells) == together[step]
    assert result["teachers"] == [
        {"domain": "sums", "teacher": NAME, "sampled": 256, "accepted": together["accepted"],
         "chosen": len(chosen)}
    ]  # fmt: skip
    assert (whole / "report.png").stat().st_size > 1_000


def test_the_chosen_are_the_upper_scores_of_their_cells(whole):
    scored = read(whole / "scores.jsonl")
    chosen = {record["id"] for record in read(whole / "chosen.jsonl")}
    for low, high in ((0, 40), (40, 99)):
        cell = sorted((r["score"], r["id"]) for r in scored if low <= r["length"] < high)
        kept = [(score, name) for score, name in cell if name in chosen]
        inside = [(score, name) for score, name in cell if score <= kept[-1][0]]  # no outliers
        least = np.quantile([score for score, _ in inside], 0.4)
        assert kept == [(score, name) for score, name in inside if score >= least]


def test_scores_by_hand_packed_and_alone(inputs, whole):
    """A softmax over all logits of one trace at a time says what the packed rows said."""
    student = policy.open_policy(NAME, configure(inputs, "x").rollout)
    params = weights.load_params(student.path, student.model, sharding.make_mesh({}), "float32")

    @jax.jit
    def all_logprobs(token_BT):
        position_BT, segment_BT = np.arange(96)[None], np.ones((1, 96), np.int32)
        x_BTE = qwen2.hidden_states(params, token_BT, position_BT, segment_BT, student.model)
        logit_TV = x_BTE[0] @ qwen2.head(params).T
        return jax.nn.log_softmax(logit_TV[:, : student.model.vocab])

    score_of = {row["id"]: row for row in read(whole / "scores.jsonl")}
    for record in read(whole / "chosen.jsonl"):
        prompt = student.tokenizer.encode(record["prompt"])
        trace = [*student.tokenizer.encode(record["completion"]), student.tokenizer.eos_ids[0]]
        ids = np.array([*prompt, *trace], np.int32)
        logprob_TV = all_logprobs(np.pad(ids, (0, 96 - len(ids)))[None])
        by_hand = [-logprob_TV[t - 1, ids[t]] for t in range(len(prompt), len(ids))]
        np.testing.assert_allclose(record["score"], np.mean(by_hand), atol=1e-5)
        row = score_of[record["id"]]
        assert row["learnt"] == len(trace) == row["length"] and row["score"] == record["score"]


def test_sft_learns_the_chosen_as_they_are(inputs, whole):
    text = f'policy = "{NAME}"\ndata = "{whole}/chosen.jsonl"\nepochs = 1\ntrain.row_tokens = 128'
    (inputs / "sft.toml").write_text(text)
    setup = sft.set_up(load(SftConfig, inputs / "sft.toml"))
    chosen = read(whole / "chosen.jsonl")
    assert [int(d.learnt.sum()) for d in setup.documents] == [r["length"] for r in chosen]
    assert not setup.eos_ids  # the policy stops where the traces do


# Resuming ---------------------------------------------------------------------------------------


def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(inputs, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    want = {name: (whole / name).read_bytes() for name in FILES}
    (path,) = (out / "trajectories").iterdir()
    # amid sampling
    for name in (*FILES, "report.png"):
        (out / name).unlink()
    first, second, *_ = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:-9])
    run(inputs, out, "resume=true")
    assert {name: (out / name).read_bytes() for name in FILES} == want
    # amid scoring, in the second part
    monkeypatch.setattr(policy, "load_engine", never)
    lines = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    (out / "scores.jsonl").write_text("".join(lines[:9]) + lines[9][:-9])
    (out / "chosen.jsonl").unlink()
    run(inputs, out, "resume=true")
    assert {name: (out / name).read_bytes() for name in FILES} == want
    # after scoring
    monkeypatch.setattr(weights, "load_params", never)
    (out / "chosen.jsonl").unlink()
    run(inputs, out, "resume=true")
    assert {name: (out / name).read_bytes() for name in FILES} == want


def test_another_selection_costs_nothing_and_another_seed_is_another_run(
    inputs, whole, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    monkeypatch.setattr(policy, "load_engine", never)
    monkeypatch.setattr(weights, "load_params", never)
    run(inputs, out, "resume=true", "selection.low=0.0")
    assert len(read(out / "chosen.jsonl")) > len(read(whole / "chosen.jsonl"))
    with pytest.raises(InputError, match="another configuration: seed: 0 -> 1"):
        run(inputs, out, "resume=true", "seed=1")
    with pytest.raises(InputError, match=r"none is left; 0-39 tokens: .* sparse; 40\+ tokens: "):
        run(inputs, out, "resume=true", "selection.min_cell=99")
    assert not (out / "chosen.jsonl").exists()
    *_, together = json.loads((out / "report.json").read_text())["cells"]
    assert together["sparse"] == together["accepted"] and together["chosen_scores"] is None


# Scripted trajectories --------------------------------------------------------------------------


class BrokenPool(contextlib.nullcontext):
    """Verifiers that are broken when they are asked again."""

    def __init__(self, **_):
        super().__init__(self)

    def verify(self, items, *, counted):
        return [Verdict(correct=False, reward=0.0, outcome=Outcome.CRASH) for _ in items]


def test_what_is_no_trace_is_counted_for_its_reason(inputs, tmp_path):
    """Two teachers of one domain: the second says again what the first said."""
    other = copy_of_the_teacher(tmp_path / "other")
    tiny.write_task(tmp_path / "two.jsonl", SUMS[:2])
    config = configure(
        inputs, tmp_path / "out", f'domains.sums.teachers=["{NAME}", "{other}"]',
        f"domains.sums.prompts={tmp_path}/two.jsonl", "samples=5", "selection.deviations=1e6",
    )  # fmt: skip
    first, second = (f"\\boxed{{{record['ground_truth']}}}" for record in SUMS[:2])
    config = script(
        config,
        [
            [completion(first), completion(first), completion(first + " ", stop="length"),
             completion("1", outcome="no_answer"), completion("2", outcome="timeout")],
            [completion(second), completion("1+" * 30, stop="loop"), completion("<|end|>" + second),
             completion("\\boxed{}"), completion("1", outcome="wrong")],
        ],
        [
            [completion(first), completion("1+1=2 " + first), *[completion("")] * 3],
            [completion("0" + second), *[completion("1", outcome="crash")] * 4],
        ],
    )  # fmt: skip
    out = distill.run(config, BrokenPool)
    result = json.loads((out / "report.json").read_text())
    together = result["cells"][-1]
    counted = {end: n for end, n in together.items() if isinstance(n, int) and n}
    assert counted == {
        "sampled": 20, "accepted": 6,
        "truncated": 2, "unverified": 5, "wrong": 2, "control": 1, "duplicate": 4,
        # "" has one token, the stop token, and "\boxed{}" is no answer but was called one
        "too_short": 1, "below": 2, "chosen": 3,
    }  # fmt: skip
    assert [row["accepted"] for row in result["teachers"]] == [3, 3]
    ids = [record["id"] for record in read(out / "scores.jsonl")]
    assert ids == ["sums-1-1-1", "sums-1-2-1", "sums-1-2-4", "sums-2-1-2", "sums-2-2-1"]


def test_shares_mix_the_domains(inputs, whole, tmp_path, monkeypatch):
    (path,) = (whole / "trajectories").iterdir()
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.copy(path, out / "trajectories" / path.name.replace("sums", "more"))
    monkeypatch.setattr(policy, "load_engine", never)
    more = [f"domains.more.teachers=['{NAME}']", f"domains.more.prompts={inputs}/sums.jsonl"]
    shares = ["selection.shares.sums=1.0", "selection.shares.more=3"]
    with pytest.raises(ConfigError, match="must be a valid number"):
        configure(inputs, out, *more, "selection.shares.sums=1.0", "selection.shares.more=true")
    run(inputs, out, "resume=true", *more, *shares)
    chosen = [record["domain"] for record in read(out / "chosen.jsonl")]
    count = len(read(whole / "chosen.jsonl"))
    assert chosen == ["sums"] * (count // 3) + ["more"] * count
    *_, together = [cell for cell in json.loads((out / "report.json").read_text())["cells"]
                    if cell["domain"] == "sums"]  # fmt: skip
    assert together["surplus"] == count - count // 3


def test_a_domain_without_a_trace_is_named_with_what_became_of_it(inputs, tmp_path):
    wrong = [[completion("1", outcome="wrong")] * 5 + [completion("1" * 45, stop="length")]] * 16
    config = script(configure(inputs, tmp_path / "out"), wrong)
    with pytest.raises(InputError) as error:
        distill.run(config)
    assert str(error.value) == (
        "domain sums: of 96 completions none is left; 0-39 tokens: 80 wrong; "
        "40+ tokens: 16 truncated"
    )


# Records ----------------------------------------------------------------------------------------


def test_only_the_trace_of_a_chat_is_learnt():
    shown = {"role": "assistant", "content": "5"}
    asked = [{"role": "user", "content": "2+3"}, shown, {"role": "user", "content": "1+1"}]
    record = traces.taught_record({"messages": asked, "ground_truth": "2"}, "2")
    answer = {"role": "assistant", "content": "2"}
    assert record == {"messages": [asked[0], shown | {"weight": 0}, asked[2], answer]}
    assert "weight" not in shown


def test_a_trace_that_the_student_cannot_read_is_unfit(inputs):
    config = configure(inputs, "x")
    student = policy.open_policy(NAME, config.rollout)
    setup = traces.Setup(config, student, [], sharding.make_mesh({}))

    def document(text):
        record = {"prompt": "1+1=", "completion": text}
        return scores.read_trace(
            traces.Trace(id="a", domain="d", teacher="t", length=9, record=record), setup
        )

    assert document("1" * 123).weights.sum() == 124
    assert document("1" * 124) is None  # 129 tokens, and a row has 128
    assert document("") is None


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, message",
    [
        ("student=IN/gone", "IN/gone: no such file or folder"),
        ('domains.sums.teachers=["IN/gone"]', "IN/gone: no such file or folder"),
        ("domains.sums.prompts=IN/gone.jsonl", "IN/gone.jsonl: no such file"),
        ("domains.sums.prompts=IN/empty.jsonl", "IN/empty.jsonl: is empty"),
        ("domains.sums.prompts=IN/bare.jsonl", "IN/bare.jsonl:2: has no 'ground_truth'"),
        ("rollout.max_prompt_tokens=3", "IN/sums.jsonl:1: the prompt has 8 tokens, more than"),
        (
            "rollout.max_completion_tokens=600 train.row_tokens=999",
            "= 616 is more than the 512 positions of package:",
        ),
        ("mesh.data=3", "mesh: mesh data=3 x fsdp=1 x context=1 x tensor=1 needs 3 devices"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sampled(
    setting, message, inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(policy, "load_engine", never)
    (inputs / "empty.jsonl").write_text("")
    bare = {key: value for key, value in SUMS[1].items() if key != "ground_truth"}
    tiny.write_task(inputs / "bare.jsonl", [SUMS[0], bare])
    with pytest.raises(InputError) as error:
        run(inputs, tmp_path / "out", *setting.replace("IN", str(inputs)).split(" "))
    assert message.replace("IN", str(inputs)) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (('prompts = "IN/sums.jsonl"', ""), "domains.sums.prompts is required"),
        ((f'teachers = ["{NAME}"]', "teachers = []"), "domains.sums.teachers = []: List should"),
        (("prompts =", "promts ="), "domains.sums.promts; did you mean domains.NAME.prompts?"),
        (("[domains.sums]", '[domains."../sums"]'), "domains.../sums.[key] = '../sums': String"),
        (("[domains.sums]", "[domain.sums]"), "unknown key domain; did you mean domains?"),
        (("teachers = [", f'teachers = ["{NAME}", '), "domains.sums.teachers: 'package:"),
        (("[40]", "[50, 20]"), "selection: edges = [50, 20] must rise"),
        (("edges =", "low = 0.9\nhigh = 0.9\nedges ="), "low = 0.9 must be below high = 0.9"),
        (("edges =", "shares = {math = 1}\nedges ="), "selection.shares names math: must name all"),
        (("row_tokens = 128", "row_tokens = 64"), "train.row_tokens = 64 must be at least rollout"),
    ],
)
def test_configurations_that_cannot_be_run(change, message, tmp_path):
    path = tmp_path / "distill.toml"
    path.write_text(TOML.replace(*change))
    with pytest.raises(ConfigError) as error:
        load(DistillConfig, path)
    assert message in str(error.value)


def test_help_lists_the_fields_of_a_domain(capsys):
    with pytest.raises(SystemExit):
        config_file.parse_args(DistillConfig, doc="", argv=["--help"])
    shown = capsys.readouterr().out
    assert "domains.NAME.teachers (list" in shown and "selection.low (float, default 0.4" in shown
