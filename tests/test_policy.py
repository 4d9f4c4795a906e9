"""The shipped policy answers prompts, and what it answered is taken up again."""

import json

import jax
import pytest

from vibejax import policy, run_folder, sharding
from vibejax.config.sampling import EvaluationRolloutConfig
from vibejax.config_file import InputError
from vibejax.verifiers import Outcome, Verdict

NAME = "package:vibejax/quickstart/policy"
CONFIG = EvaluationRolloutConfig(
    max_prompt_tokens=16, max_completion_tokens=40, slots=8, window=8, page_tokens=16
)
SUMS = [
    {"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": str(a + b)}
    for a, b in ((123, 456), (700, 200), (111, 111))
]


class LengthPool:
    """Calls right what has an even number of characters, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.waiting = [], []

    def submit(self, key, record, completion):
        self.asked.append((record["prompt"], completion))
        right = len(completion) % 2 == 0
        outcome = Outcome.CORRECT if right else Outcome.WRONG
        self.waiting.append((key, Verdict(correct=right, reward=float(right), outcome=outcome)))

    def verify(self, items, *, counted):
        assert not counted
        for number, item in enumerate(items):
            self.submit(number, *item)
        return [verdict for _, verdict in self.finished(wait=True)]

    def finished(self, *, wait):
        done = self.waiting if wait else self.waiting[1:]  # one is always behind
        self.waiting = [] if wait else self.waiting[:1]
        yield from done


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The opened policy, its prompts and its engine."""
    file = tmp_path_factory.mktemp("policy") / "sums.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in SUMS))
    opened = policy.open_policy(NAME, CONFIG)
    prompts = policy.read_prompts(opened, str(file), CONFIG)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield opened, prompts, policy.load_engine(opened, CONFIG, "float32", mesh)


def answers(asked, path, load=None, prompts=None):
    opened, all_prompts, engine = asked
    pool = LengthPool()
    given = policy.answers(
        opened, load or (lambda: engine), prompts or all_prompts, pool, CONFIG, path,
        samples=8, seed=3,
    )  # fmt: skip
    return given, pool


def test_every_completion_comes_with_the_verdict_of_its_own_text(asked, tmp_path):
    given, pool = answers(asked, tmp_path / "a.jsonl")
    encode = asked[0].tokenizer.encode
    assert [a.prompt.record for a in given] == SUMS
    for answer in given:
        assert len(answer.completions) == 8
        for completion in answer.completions:
            assert completion["correct"] == (len(completion["text"]) % 2 == 0)
            stopped = completion["stop"] == "stop"
            assert completion["length"] == len(encode(completion["text"])) + stopped
    texts = {(a.prompt.record["prompt"], c["text"]) for a in given for c in a.completions}
    assert sorted(pool.asked) == sorted(texts)  # the same text is verified once


def test_stored_groups_are_not_sampled_again_and_missing_ones_come_out_the_same(asked, tmp_path):
    path = tmp_path / "a.jsonl"
    whole, _ = answers(asked, path)

    def never():
        raise AssertionError("all groups are there")

    again, pool = answers(asked, path, load=never)
    assert again == whole and not pool.asked
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:-9])  # stopped amid a line
    kept = run_folder.read_log(path)[0]["prompt"]
    again, pool = answers(asked, path)
    assert again == whole
    assert SUMS[kept]["prompt"] not in {prompt for prompt, _ in pool.asked}


def test_a_changed_record_is_answered_anew(asked, tmp_path):
    _, prompts, _ = asked
    answers(asked, tmp_path / "a.jsonl")
    changed = [*prompts[:2], prompts[2].__class__(2, prompts[2].tokens, SUMS[2] | {"id": "new"})]
    _, pool = answers(asked, tmp_path / "a.jsonl", prompts=changed)
    assert {prompt for prompt, _ in pool.asked} == {SUMS[2]["prompt"]}


def test_completions_that_cannot_fit_are_refused():
    with pytest.raises(InputError, match="is more than the 512 positions of package:"):
        policy.open_policy(NAME, CONFIG.model_copy(update={"max_completion_tokens": 600}))


def test_what_could_not_be_verified_is_verified_again(asked, tmp_path):
    path = tmp_path / "a.jsonl"
    whole, _ = answers(asked, path)
    lines = run_folder.read_log(path)
    unsure = lines[1]["completions"][2]
    unsure |= {"correct": False, "reward": 0.0, "outcome": "unscored"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again, pool = answers(asked, path)
    prompt = SUMS[lines[1]["prompt"]]["prompt"]
    assert again == whole and pool.asked == [(prompt, unsure["text"])]
    again, pool = answers(asked, path)
    assert again == whole and not pool.asked, "the verdict is stored"


def test_nobody_who_judges_sees_the_answer_of_a_demonstration(asked, tmp_path):
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    record = {"messages": chat, "verifier": "math", "ground_truth": "2"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    long = CONFIG.model_copy(update={"max_prompt_tokens": 99})
    (prompt,) = policy.read_prompts(asked[0], str(tmp_path / "p.jsonl"), long)
    assert prompt.record == record | {"messages": chat[:1]}
    assert list(prompt.tokens) == asked[0].tokenizer.encode_chat(chat[:1])
