"""Groups by hand: which of them teach, and what takes their place."""

import dataclasses
import types

import numpy as np
import pytest

from vibejax import data, policy_update, rollout
from vibejax.completions import Completion, Counts
from vibejax.config.rl import ObjectiveConfig, RlConfig
from vibejax.data import Prompt
from vibejax.records import DataError
from vibejax.rollout import Rollout
from vibejax.run_folder import RunError
from vibejax.verifiers import Outcome, Verdict


def group_of(pattern: str) -> tuple[list[Completion], list[Verdict]]:
    """`r` right, `w` wrong, `R` and `W` the same but ended by the limit."""
    completions, verdicts = [], []
    for letter in pattern:
        right = letter in "rR"
        stop = "length" if letter.isupper() else "stop"
        completions.append(Completion(0, 0, np.zeros(4, np.int32), np.zeros(4, np.float32), stop))
        outcome = Outcome.CORRECT if right else Outcome.WRONG
        verdicts.append(Verdict(correct=right, reward=float(right), outcome=outcome))
    return completions, verdicts


def rolled(*patterns: str, first: int = 0) -> Rollout:
    groups = [group_of(pattern) for pattern in patterns]
    prompts = [Prompt(first + n, (1,), {}) for n in range(len(patterns))]
    return Rollout(prompts, [c for c, _ in groups], [v for _, v in groups])


def test_a_truncated_completion_has_no_advantage_but_counts_in_its_group():
    given = rolled("rwwW", "rrrr")
    plain = rollout.advantages(given, ObjectiveConfig(gamma=0))
    np.testing.assert_allclose(plain[0], [3**0.5, *[-(3**-0.5)] * 3], rtol=1e-6)
    masked = rollout.advantages(given, ObjectiveConfig(gamma=0, mask_truncated=True))
    np.testing.assert_array_equal(masked[0, :3], plain[0, :3])
    assert masked[0, 3] == 0 and not masked[1].any()


def test_groups_that_teach_nothing_make_way_for_others():
    given, other = rolled("rrrr", "rwww", "wwww", "WWWW"), rolled("rrww", "wwwr", first=10)
    given = dataclasses.replace(given, counts=Counts(tokens=16, host_s=1.5))
    given = rollout.replaced(given, [0, 2, 3], dataclasses.replace(other, counts=Counts(tokens=8)))
    assert given.counts == Counts(tokens=24, host_s=1.5)
    assert [p.index for p in given.prompts] == [10, 1, 11, 3]
    assert given.correct_NG.sum(axis=1).tolist() == [2, 1, 1, 0]
    assert given.refilled == 2 and rollout.group_metrics(given)["rollout/refilled"] == 2


def test_refills_have_an_order_of_their_own_and_steps_keep_theirs():
    prompts = [Prompt(i, (1,), {}) for i in range(64)]
    steps = [data.step_prompts(prompts, 5, step, 8) for step in (1, 2)]
    refills = [data.step_prompts(prompts, 5, 1, 8, refill) for refill in (1, 2)]
    assert len({tuple(p.index for p in part) for part in (*steps, *refills)}) == 4
    assert steps[0] == [prompts[i] for i in data.step_indices(64, 5, 0, 8)]


def test_a_curriculum_begins_with_what_is_easiest():
    accuracies = [0.1, 0.9, 0.5, 0.7, 0.3]
    prompts = [Prompt(i, (1,), {"accuracy": a}) for i, a in enumerate(accuracies)]

    def indices(share, least):
        return [p.index for p in data.easiest(prompts, share, at_least=least)]

    assert indices(0.2, 1) == [1]
    assert indices(0.2, 2) == [1, 3]
    assert indices(0.5, 1) == [1, 3, 2]
    assert indices(3.0, 1) == [1, 3, 2, 4, 0]
    with pytest.raises(DataError, match="prompt 2: a curriculum needs its 'accuracy'"):
        data.easiest([prompts[0], Prompt(1, (1,), {})], 0.5, at_least=1)


class State(int):
    """Counts its updates."""

    params = None

    def __add__(self, other):
        return State(int(self) + other)


@pytest.fixture
def update(monkeypatch):
    """The update of a rollout with a made-up trainer; gives what each update learnt from too."""

    def update(given, updates, apart=None, finite=(1.0,) * 9, **objective):
        """`apart`: of each document, how far the trainer's log-probs are from the sampler's."""
        finite, learnt = iter(finite), []

        def apply(state, sums):
            number, good = len(learnt), next(finite)
            return state + int(good), {
                "policy/loss": 1.0 * number, "policy/clipped_tokens": 1.0, "policy/entropy": 2.0,
                "policy/reference_kl": 3.0 * number, "optimizer/finite": good,
                "optimizer/grad_norm": 4.0, "optimizer/learning_rate": 5.0 * number,
            }  # fmt: skip

        def scores(step, params, documents, *_):
            learnt.append(documents)
            return None, [d.channels["trainer"] for d in documents]

        def with_channel(_, __, documents, name):
            return [
                dataclasses.replace(d, channels=d.channels | {name: d.channels["trainer"]})
                for d in documents
            ]

        def documents(*args, real=rollout.documents, **options):
            made = real(*args, **options)
            for d, x in zip(made, apart or [0.0] * len(made), strict=True):
                d.channels["trainer"] = d.channels["sampler_logprob"] + np.float32(x)
            return made

        config = RlConfig(
            policy="", prompts="", objective={"updates": updates} | objective,
            train={"row_tokens": 64},
            rollout={"prompts_per_step": updates, "max_prompt_tokens": 8,
                     "max_completion_tokens": 8},
        )  # fmt: skip
        monkeypatch.setattr(policy_update.train, "sum_documents", scores)
        monkeypatch.setattr(policy_update.rollout, "documents", documents)
        monkeypatch.setattr(policy_update, "_with_channel", with_channel)
        programs = types.SimpleNamespace(train_step=types.SimpleNamespace(apply=apply))
        setup = types.SimpleNamespace(config=config, programs=programs, mesh=None)
        reference = {} if objective.get("kl") else None
        return (*policy_update.update(setup, State(0), given, reference), learnt)

    return update


def test_the_first_update_that_is_not_finite_is_the_last(update):
    state, metrics, _ = update(rolled("rw", "rw", "rw"), 3, finite=(1.0, 0.0, 1.0))
    assert (state, metrics["optimizer/finite"]) == (1, 0.0)
    assert metrics["policy/entropy"] == 4 / 16  # of the tokens of two updates


@pytest.mark.parametrize("updates", [1, 2])
def test_all_tokens_of_a_step_are_compared_before_any_is_learnt_from(update, updates):
    given = rolled("rw", "rw")
    with pytest.raises(RunError, match=r"mean \|d logp\| = 2.5 nats is above"):
        update(given, updates, [0, 0, 5, 5])
    _, metrics, _ = update(given, updates, [0, 0, 0.01, 0.01])
    assert metrics["agreement/mean_abs_dlogp"] == pytest.approx(0.005)
    _, metrics, _ = update(rolled("rr", "rw"), updates, [0, 0, 0.01, 0.01])  # one group teaches
    assert metrics["agreement/mean_abs_dlogp"] == pytest.approx(0.01)
    _, metrics, _ = update(rolled("rr", "ww"), updates)
    assert "agreement/mean_abs_dlogp" not in metrics


def test_a_steps_metrics_are_of_all_its_updates(update):
    _, metrics, learnt = update(rolled("rw", "rw"), 2)
    assert [metrics[f"policy/{name}"] for name in ("loss", "reference_kl")] == [1.5, 4.5]
    assert metrics["policy/clipped"] == 2 / 16 and metrics["policy/entropy"] == 4 / 16
    assert metrics["optimizer/learning_rate"] == 10.0
    # Each update's loss is a mean: of two completions, 4 tokens each.
    assert [sum(d.weights.sum() for d in part) for part in learnt] == [1.0, 1.0]


def test_nothing_is_learnt_from_what_is_left_out_of_the_loss(update):
    for objective, counts in (({}, [4]), ({"mask_truncated": True}, [3])):
        _, _, learnt = update(rolled("rwwW"), 1, kl=0.1, **objective)
        assert [len(part) for part in learnt] == counts
