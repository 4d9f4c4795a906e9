"""The SFT stage: what is learnt of a record, rows, steps, resumes, exports, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vibejax import qwen2, sft, sharding, tokenizer, train, weights
from vibejax.config.sft import SftConfig
from vibejax.config_file import InputError, load
from vibejax.metrics import VARYING

TOML = """
policy = "{folder}/policy"
data = "{folder}/data.jsonl"
heldout = "{folder}/data.jsonl"
epochs = 2
documents_per_step = 4
export_every = 4
export_dtype = "float32"
[optimizer]
learning_rate = 1e-2
schedule = "cosine"
[train]
row_tokens = 128
[eval]
every = 3
[checkpoint]
every = 2
keep = 9
"""


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "s"}
RECORDS = [
    *[{"messages": [SYSTEM, user(f"{a}+{b}"), assistant(str(a + b))]}
      for a in range(3) for b in range(3)],
    {"messages": [user("1"), assistant("one"), user("2"), assistant("two")]},
    {"prompt": "1+1=", "completion": "2"},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base policy, which stops at <|endoftext|> and has never seen a chat, and its data."""
    folder = tmp_path_factory.mktemp("sft")
    tiny.write_chat_policy(folder / "policy", eos_ids=(0,), context=128)
    tiny.write_task(folder / "data.jsonl", RECORDS)
    (folder / "sft.toml").write_text(TOML.format(folder=folder))
    return folder


def configure(folder, *settings):
    """A configuration that fits the eight devices of a test."""
    mine = ["mesh.data=8", "train.microbatch_rows=8", f"out={folder / 'out'}"]
    return load(SftConfig, folder / "sft.toml", [*mine, *settings])


# What is learnt ---------------------------------------------------------------------------------


def test_a_step_weighs_every_learnt_token_alike(folder):
    """Two turns of four tokens each, their ends included: an eighth each, and 0 elsewhere."""
    tiny.write_task(folder / "one.jsonl", [RECORDS[9]])
    setup = sft.set_up(configure(folder, f"data={folder / 'one.jsonl'}", "epochs=1"))
    (document,) = sft.step_documents(setup, 1)
    tokens = tokenizer.load(folder / "policy")
    learnt = [tokens.backend.id_to_token(i) for i in document.tokens[document.weights > 0]]
    assert learnt == [*"one", "<|im_end|>", *"two", "<|im_end|>"]
    assert set(document.weights.tolist()) == {0, 1 / 8}


def test_loss_by_hand_packed_and_alone(folder):
    """Rows of many documents, rows of one, and a softmax over all logits say the same loss."""
    setup = sft.set_up(configure(folder, "epochs=0", "steps=1", "documents_per_step=11"))
    documents = sft.step_documents(setup, 1)
    assert len(documents) == len(RECORDS)
    params = qwen2.init_params(setup.model, jax.random.key(1))
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    rows = setup.config.train.model_copy(update={"microbatch_rows": 1})
    loss_fn = sft.make_loss(setup.model, setup.config)
    score = jax.jit(lambda params, rows: loss_fn(params, rows)[1][1])

    def loss(*batches):
        total = 0.0
        with jax.set_mesh(mesh):
            for batch in batches:
                values = train.score_documents(score, params, batch, rows, mesh)
                total -= sum((d.weights * v).sum() for d, v in zip(batch, values, strict=True))
        return total

    packed, alone = loss(documents), loss(*([d] for d in documents))
    np.testing.assert_allclose(packed, alone, rtol=1e-5)

    @jax.jit
    def all_logprobs(token_BT):
        position_BT, segment_BT = jnp.arange(96)[None], jnp.ones_like(token_BT)
        x_BTE = qwen2.hidden_states(params, token_BT, position_BT, segment_BT, setup.model)
        return jax.nn.log_softmax((x_BTE[0] @ qwen2.head(params).T)[:, : setup.model.vocab])

    by_hand, learnt = 0.0, 0
    for d in documents:
        logprob_TV = all_logprobs(np.pad(d.tokens, (0, 96 - len(d.tokens)))[None])
        for place in np.flatnonzero(d.weights):
            by_hand -= logprob_TV[place - 1, d.tokens[place]]
            learnt += 1
    np.testing.assert_allclose(packed, by_hand / learnt, rtol=1e-5)


def test_epochs_show_every_document_so_often(folder):
    """Two passes over 11 documents by fours: five steps of 4, and one of 2."""
    setup = sft.set_up(configure(folder))
    steps = [sft.step_documents(setup, step) for step in range(1, setup.steps + 1)]
    assert [len(step) for step in steps] == [4, 4, 4, 4, 4, 2]
    seen = [d.tokens.tobytes() for step in steps for d in step]
    for part in (seen[:11], seen[11:]):  # each pass is complete
        assert sorted(part) == sorted(d.tokens.tobytes() for d in setup.documents)
    for step in steps:
        np.testing.assert_allclose(sum(d.weights.sum() for d in step), 1.0, rtol=1e-6)


def test_steps_say_how_long_as_well(folder):
    setup = sft.set_up(configure(folder, "epochs=0", "steps=5"))
    assert (setup.steps, setup.total) == (5, 20)


@pytest.mark.parametrize("stage, epochs, steps", [("stage1", 5, 391), ("stage2", 2, 157)])
def test_schedule_of_the_report(stage, epochs, steps):
    """Of 10,000 documents: a twentieth of the steps rises to 5e-5, the last ones near 8e-8."""
    from vibejax import optimizer

    config = load(SftConfig, Path(__file__).parents[1] / f"configs/sft_{stage}.toml")
    assert (config.epochs, config.documents_per_step) == (epochs, 128)
    assert steps == -(-epochs * 10_000 // 128)
    rate = optimizer.make_schedule(config.optimizer, steps)
    warmup = round(0.05 * steps)
    np.testing.assert_allclose(rate(warmup - 1), 5e-5, rtol=1e-5)
    assert rate(warmup - 2) < rate(warmup - 1) and rate(warmup + 1) < rate(warmup)
    np.testing.assert_allclose(rate(steps), 8e-8, rtol=1e-3)


# Runs -------------------------------------------------------------------------------------------


def start(folder, out, *settings):
    """The command, on one device; the second run finds the programs that the first compiled."""
    options = [part for pair in [f"out={out}", *settings] for part in ("--set", pair)]
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in conftest.py
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "vibejax.sft", str(folder / "sft.toml"), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def run(folder, out, *settings):
    process = start(folder, out, *settings)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def metrics(out):
    """The rows of a run without what differs from run to run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(folder):
    out = folder / "uninterrupted"
    done = run(folder, out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_run_leaves_its_record(folder, uninterrupted):
    out, done = uninterrupted
    rows = metrics(out)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "heldout/loss" in row] == [0, 3, 6]
    assert rows[6]["heldout/loss"] < rows[3]["heldout/loss"] < rows[0]["heldout/loss"]
    assert [round(row["sft/epoch"], 3) for row in rows[1:]] == [
        0.364, 0.727, 1.091, 1.455, 1.818, 2.0,
    ]  # fmt: skip
    for row in rows[1:]:  # rows of 128 tokens, one a micro-batch
        rows_computed = row["sft/tokens"] / row["sft/fill"] / 128
        np.testing.assert_allclose(rows_computed, round(rows_computed))
    assert "11 documents of " in done.stdout and "rows filled to 0." in done.stdout
    assert done.stdout.splitlines()[-1].startswith("held-out loss: ")
    assert " fill " in done.stderr


def test_exports_stop_where_the_turns_end(folder, uninterrupted):
    """The base policy did not know <|im_end|> as a stop token; what learnt chats must."""
    out, done = uninterrupted
    assert "stops at '<|im_end|>' too" in done.stdout
    exported = sorted(path.name for path in (out / "exports").iterdir())
    assert exported == ["step-000004", "step-000006"]  # the last step's too
    for name in ("final", "exports/step-000004"):
        assert tokenizer.load(out / name).eos_ids == (2, 0)
        assert weights.load_config(out / name).context == 128
    texts = [(out / n / "model.safetensors").read_bytes() for n in ("final", "exports/step-000004")]
    assert texts[0] != texts[1]


def test_a_resumed_run_is_the_uninterrupted_one(folder, uninterrupted):
    """A run stopped dead in step 5 has a checkpoint of step 4 and half a line of step 5."""
    out = folder / "stopped"
    shutil.copytree(uninterrupted[0], out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "6")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    done = run(folder, out, "resume=true")
    assert done.returncode == 0, done.stderr
    steps = [line.split()[0] for line in done.stderr.splitlines()]
    assert steps == ["step", "5", "6"]
    assert metrics(out) == metrics(uninterrupted[0])
    exports = [f"exports/step-{step:06d}/model.safetensors" for step in (4, 6)]
    for name in ("final/model.safetensors", *exports):
        assert (out / name).read_bytes() == (uninterrupted[0] / name).read_bytes()


def test_sigterm_and_the_same_command_again(folder, uninterrupted):
    out = folder / "preempted"
    process = start(folder, out, "resume=auto")
    path, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (path.exists() and len(path.read_text().splitlines()) > 3) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("ended by SIGTERM; ")
    assert not (out / "final").exists()
    done = run(folder, out, "resume=auto")
    assert done.returncode == 0, done.stderr
    assert metrics(out) == metrics(uninterrupted[0])
    final = "final/model.safetensors"
    assert (out / final).read_bytes() == (uninterrupted[0] / final).read_bytes()


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, "messages must be a list of {role, content} texts"),
        ({"messages": [{"content": "a"}]}, "messages[0] has no 'role'"),
        ({"messages": [user("a"), "b"]}, "messages[1] has no 'role'"),
        ({"messages": [user(None)]}, "messages[0], of role 'user', has no 'content' text"),
        ({"messages": [user("a"), assistant(" \n")]}, "messages[1]: the assistant's turn is empty"),
        ({"messages": [SYSTEM]}, "no message of role 'assistant' to learn from, only system"),
        ({"messages": [SYSTEM, user("a")]}, "'assistant' to learn from, only system, user"),
        ({"messages": [assistant("a")]}, "messages[0]: nothing comes before the assistant's turn"),
        ({"messages": [user("a"), assistant("b"), user("c")]}, "must end with one of role 'assi"),
        ({"messages": [user("a"), assistant("b", weight=0.5)]}, "[1]: weight = 0.5 must be 0 or 1"),
        ({"messages": [user("a"), assistant("b", weight=0)]}, "all the assistant's turns have wei"),
        ({"prompt": "a"}, "has neither 'messages' nor 'prompt' and 'completion' texts"),
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
        ({"prompt": "a" * 99, "completion": "b" * 99}, "has 199 tokens, more than train.row_tokens "
         "= 128; long_documents = 'drop' leaves such out, 'truncate' cuts them"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_by_file_and_line(folder, record, message):
    path = folder / "bad.jsonl"
    tiny.write_task(path, [*RECORDS[:2], record])
    for settings in ([f"data={path}"], [f"heldout={path}"]):
        with pytest.raises(InputError) as error:
            sft.run(configure(folder, *settings))
        assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)
        assert "\n" not in str(error.value)
    assert not (folder / "out").exists(), "a run that cannot start leaves no folder"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "has no generation prompt"),
        ("{{ raise_exception('no chats') }}", "chat template: no chats"),
    ],
)
def test_a_template_without_boundaries_is_named(folder, tmp_path, template, message):
    shutil.copytree(folder / "policy", tmp_path / "policy")
    (tmp_path / "policy/chat_template.jinja").write_text(template)
    with pytest.raises(InputError) as error:
        sft.run(configure(folder, f"policy={tmp_path / 'policy'}"))
    assert f"data.jsonl:1: chat template: {message.removeprefix('chat template: ')}" in str(
        error.value
    )


def test_a_damaged_policy_leaves_no_folder(folder, tmp_path):
    shutil.copytree(folder / "policy", tmp_path / "policy")
    (file,) = (tmp_path / "policy").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="damaged or truncated"):
        sft.run(configure(folder, f"policy={tmp_path / 'policy'}"))
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        (["heldout={empty}"], "empty.jsonl: is empty"),
        (["heldout=missing.jsonl"], "missing.jsonl: no such file"),
        # said before the data, which may take an hour to encode, are looked at
        (["data=missing.jsonl", "out={policy}"], "policy: exists; choose another out, or go on"),
        (["data=missing.jsonl", "resume=true"], "out: has no config.toml, so there is no run"),
        (["context=32"], "data.jsonl:1: has 35 tokens, more than context = 32"),
        (["train.row_tokens=4", "long_documents=truncate"], "no document is left: all have more"),
        (["epochs=0.01"], "epochs = 0.01 of 11 documents: there is none to learn from"),
        (["epochs=0"], "epochs = 0, steps = 0: one of the two must be above 0"),
        (["steps=3"], "epochs = 2, steps = 3: one of the two must be above 0"),
        (["mesh.data=3"], "mesh: mesh data=3 x fsdp=1 x context=1 x tensor=1 needs 3 devices"),
        (["train.microbatch_rows=4"], "mesh: axis 'batch' of size 4 is not a multiple"),
    ],
)
def test_a_run_that_cannot_start_says_why(folder, settings, message):
    empty = folder / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(InputError) as error:
        sft.run(
            configure(folder, *(s.format(empty=empty, policy=folder / "policy") for s in settings))
        )
    assert message in str(error.value)
    assert not (folder / "out").exists()


def test_long_documents_are_dropped_or_cut(folder, capsys):
    """What a cut leaves of a completion is learnt; nothing is learnt of a prompt alone."""
    path = folder / "long.jsonl"
    long = {"prompt": "1" * 50, "completion": "2" * 50}
    tiny.write_task(path, [RECORDS[10], long, {"prompt": "1" * 99, "completion": "2"}])
    wanted = {"drop": ([6], "2 left out, 0 cut"), "truncate": ([6, 64], "1 left out, 1 cut")}
    for choice, (lengths, said) in wanted.items():
        settings = [f"data={path}", "heldout=", "train.row_tokens=64", f"long_documents={choice}"]
        setup = sft.set_up(configure(folder, *settings))
        assert [len(d.tokens) for d in setup.documents] == lengths
        assert f"longer than train.row_tokens = 64: {said}" in capsys.readouterr().out
    assert setup.documents[1].learnt.sum() == 14
