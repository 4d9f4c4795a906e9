"""The rollout journal: bits, torn files, what is reused, and rollouts that go on from it."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from vibejax import qwen2, rollout, sampler_copy, tokenizer
from vibejax.completions import Completion, EngineConfig
from vibejax.config.rl import RlConfig
from vibejax.data import Prompt
from vibejax.decode import Sampling
from vibejax.engine import Engine
from vibejax.journal import Journal
from vibejax.run_folder import RunError
from vibejax.verifiers import Outcome, Verdict
from vibejax.verifiers.pool import Pool

CONFIG = RlConfig(policy="p", prompts="q", train={"row_tokens": 65_536})
PROMPTS = [Prompt(i, (1, 2, 3 + i), {"ground_truth": str(i)}) for i in range(3)]
RIGHT = Verdict(correct=True, reward=0.1, outcome=Outcome.CORRECT, answer="1", detail="é\n")


def completion(sample, logprobs=(-0.5, -1.25), stop="stop"):
    tokens = np.arange(len(logprobs), dtype=np.int32) + 100_000 * sample
    return Completion(0, sample, tokens, np.asarray(logprobs, np.float32), stop)


def bits(found):
    return [
        (c.sample, c.tokens.tolist(), c.logprobs.view(np.uint32).tolist(), c.stop, verdict)
        for c, verdict in found
    ]


def opened(folder, process=0, config=CONFIG, **more):
    return Journal(folder, config, process).open(**({"done": 3, "draws": 4, "params": "x"} | more))


@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_any_float32_comes_back_bit_for_bit(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("journal")
    entries = opened(folder)
    given_ = completion(7, np.array(words, np.uint32).view(np.float32), "length")
    entries.add(PROMPTS[0], given_)
    entries.judge(PROMPTS[0], 7, RIGHT)
    entries.close()
    found = opened(folder).completions(PROMPTS[0])
    assert bits(found) == bits([(given_, RIGHT)])
    (read, _) = found[0]
    assert read.tokens.dtype == np.int32 and read.logprobs.dtype == np.float32


def write(folder, **more):
    """Four frames after the heading: two completions, their verdicts, in turn."""
    entries = opened(folder, **more)
    for sample in (0, 1):
        entries.add(PROMPTS[1], completion(sample))
        entries.judge(PROMPTS[1], sample, RIGHT)
    entries.close()
    (path,) = folder.glob("*-00000")
    return path


def test_a_file_torn_anywhere_gives_what_was_whole_and_takes_more(tmp_path):
    whole = write(tmp_path / "whole").read_bytes()
    counts = []
    for length in range(0, len(whole), 3):
        folder = tmp_path / str(length)
        folder.mkdir()
        path = folder / "00000003-0000000004-00000"
        path.write_bytes(whole[:length])
        found = opened(folder).completions(PROMPTS[1])
        counts.append(len(found) + sum(verdict is not None for _, verdict in found))
        entries = opened(folder)
        entries.add(PROMPTS[2], completion(5))
        entries.close()
        again = opened(folder)
        assert bits(again.completions(PROMPTS[1])) == bits(found)
        assert bits(again.completions(PROMPTS[2])) == bits([(completion(5), None)])
        shutil.rmtree(folder)
    assert counts == sorted(counts) and {*counts} == {0, 1, 2, 3}


def test_a_flipped_bit_or_a_tail_of_zeros_ends_what_is_read(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    for change in (
        whole[:-40] + bytes([whole[-40] ^ 4]) + whole[-39:],
        whole[:-200] + bytes(200),
    ):
        path.write_bytes(change)
        found = opened(tmp_path).completions(PROMPTS[1])
        assert bits(found[:1]) == bits([(completion(0), RIGHT)])
        assert len(found) + sum(verdict is not None for _, verdict in found) < 4


@pytest.mark.parametrize(
    "other",
    [
        {"done": 4},
        {"draws": 5},
        {"params": "y"},
        {"config": CONFIG.model_copy(update={"seed": 1})},
    ],
    ids=lambda x: next(iter(x)),
)
def test_another_rollout_finds_nothing_and_begins_anew(tmp_path, other):
    write(tmp_path)
    entries = opened(tmp_path, **other)
    assert not entries.completions(PROMPTS[1]) and entries.reused == 0
    entries.add(PROMPTS[0], completion(0))
    entries.close()
    assert len(opened(tmp_path, **other).completions(PROMPTS[0])) == 1


def test_where_a_run_stops_and_goes_on_makes_no_difference(tmp_path):
    write(tmp_path)
    config = CONFIG.model_copy(update={"out": "elsewhere", "resume": "auto"})
    assert len(opened(tmp_path, config=config).completions(PROMPTS[1])) == 2


def test_a_changed_record_is_sampled_again(tmp_path):
    write(tmp_path)
    changed = dataclasses.replace(PROMPTS[1], record={"ground_truth": "5"})
    assert not opened(tmp_path).completions(changed)


def test_processes_read_what_others_sampled(tmp_path):
    write(tmp_path)
    entries = opened(tmp_path, process=6)
    assert len(entries.completions(PROMPTS[1])) == 2
    entries.add(PROMPTS[0], completion(0))
    entries.close()
    found = opened(tmp_path, process=2)
    assert [len(found.completions(p)) for p in PROMPTS] == [1, 2, 0] and found.reused == 3


def test_what_a_restart_should_try_again_is_not_kept(tmp_path):
    entries = opened(tmp_path)
    entries.add(PROMPTS[0], completion(0, stop="not_finite"))
    entries.add(PROMPTS[0], completion(1))
    for sample, outcome in enumerate((Outcome.CORRECT, Outcome.TIMEOUT)):
        entries.judge(PROMPTS[0], sample, dataclasses.replace(RIGHT, outcome=outcome))
    entries.close()
    assert bits(opened(tmp_path).completions(PROMPTS[0])) == bits([(completion(1), None)])


def test_entries_of_finished_steps_are_dropped(tmp_path):
    for done in (3, 4, 5):
        entries = opened(tmp_path, done=done)
        entries.add(PROMPTS[0], completion(0))
        entries.close()
    Journal(tmp_path, CONFIG, process=1).drop(9)  # process 0 does that
    Journal(tmp_path, CONFIG).drop(4)
    assert [path.name[:8] for path in sorted(tmp_path.iterdir())] == ["00000004", "00000005"]


def test_a_journal_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "journal").write_text("in the way")
    with pytest.raises(RunError, match=r"journal/0+3-0+4-0+: a completion could not be written"):
        opened(tmp_path / "journal").add(PROMPTS[0], completion(0))


# Rollouts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An engine on one device, a tokenizer and prompts of a task."""
    folder = tmp_path_factory.mktemp("rollout")
    model = tiny.write_policy(folder / "policy")
    params = sampler_copy.make(qwen2.init_params(model, jax.random.key(0)), model, "float32")
    config = EngineConfig(model=model, slots=8, window=4, page_tokens=8)
    tokens = tokenizer.load(folder / "policy")
    record = {"verifier": "math", "ground_truth": "1", "last_number": True}
    prompts = [Prompt(i, tuple(tokens.encode(f"{i}+1=")), record) for i in range(3)]
    return Engine(params, config, jax.devices()[:1]), tokens, prompts


@pytest.fixture(scope="module")
def pool():
    with Pool(workers=1, limit_s=60) as pool:
        yield pool


def roll(parts, pool, journal_folder, draws=1):
    engine, tokens, prompts = parts
    entries = opened(journal_folder, draws=draws)
    how = Sampling(eos_ids=tokens.eos_ids)
    rolled = rollout.sample(
        engine, tokens, prompts, pool, samples=4, max_tokens=9, how=how, seed=1, step=draws,
        entries=entries,
    )  # fmt: skip
    entries.close()
    everything = [
        (c.request, *bits([(c, v)]))
        for group, verdicts in zip(rolled.completions, rolled.verdicts, strict=True)
        for c, v in zip(group, verdicts, strict=True)
    ]
    return everything, rolled.journaled, engine.counts.tokens


def test_a_rollout_goes_on_wherever_it_was_cut(parts, pool, tmp_path):
    """The same bits, and nothing is sampled twice; all of it, and again from nothing."""
    whole, reused, drawn = roll(parts, pool, tmp_path)
    assert reused == 0 and drawn == sum(len(tokens) for _, (_, tokens, *_) in whole)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    counts = []
    for share in (1.0, 0.7, 0.4, 0.1):
        path.write_bytes(content[: int(len(content) * share)])
        found, reused, drawn_again = roll(parts, pool, tmp_path)
        assert found == whole
        counts.append((reused, drawn_again))
    assert counts[0] == (12, 0)
    assert counts == sorted(counts, key=lambda pair: (-pair[0], pair[1]))
    assert 0 < counts[2][0] < 12 and 0 < counts[2][1] < drawn
    assert roll(parts, pool, tmp_path)[1] == 12  # what was missing was added


def test_verdicts_are_reused_and_missing_ones_made(parts, tmp_path):
    with Pool(workers=1, limit_s=60) as pool:
        whole, *_ = roll(parts, pool, tmp_path)
        verified = sum(pool.outcomes.values())
        assert roll(parts, pool, tmp_path)[0] == whole
        assert sum(pool.outcomes.values()) == verified, "a journaled verdict was made again"
        (path,) = tmp_path.iterdir()
        content, last = path.read_bytes(), b'"verdict"'
        assert content.count(last) == verified
        path.write_bytes(content[: content.rindex(last)])  # tears the last verdict
        assert roll(parts, pool, tmp_path)[0] == whole
        assert sum(pool.outcomes.values()) == verified + 1
