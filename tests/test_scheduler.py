"""Slots, pages and the queue of the rollout engine, without a device."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibejax.scheduler import Job, PoolTooSmallError, Scheduler


def drain(scheduler, lengths, check=lambda plan: None):
    """Plays windows until all is done: the completions in the order in which they end."""
    done = []
    for _ in range(100_000):
        if scheduler.idle:
            return done
        plan = scheduler.plan()
        check(plan)
        assert plan.running, "nothing can run"
        sampled, ended = {}, []
        for slot, sequence in plan.running.items():
            left = lengths[sequence.job.id, sequence.sample] - sequence.sampled
            sampled[slot] = min(left, scheduler.window)
            if left <= scheduler.window:
                ended.append(slot)
        done += [(s.job.id, s.sample, s.sampled) for s in scheduler.account(sampled, ended)]
    raise AssertionError("does not end")


def held(plan):
    """How many sequences use each page that a running one holds."""
    pages = [page for sequence in plan.running.values() for page in sequence.pages]
    return np.bincount(pages) if pages else np.zeros(1, int)


def test_pages_by_hand():
    """A prompt of 10 tokens in pages of 4: two whole pages are shared, the third is each one's."""
    scheduler = Scheduler(slots=2, pages=20, page_tokens=4, window=2, max_tokens=6)
    scheduler.submit([Job("a", 10, 3)])
    plan = scheduler.plan()
    [(job, pages)] = plan.prefill
    assert (job.id, len(pages), len(plan.started)) == ("a", 2, 2)
    first, second = plan.running.values()
    assert first.pages[:2] == second.pages[:2] == pages
    assert len({*first.pages, *second.pages}) == 4  # one page each for tokens 8 to 11
    assert scheduler.pool.free == 16
    scheduler.account({0: 2, 1: 2}, [1])  # the second ended after two tokens
    plan = scheduler.plan()
    assert [s.sample for s in plan.started] == [2] and plan.running[1].pages[:2] == pages
    assert plan.prefill == []
    # The first has 11 cached tokens and needs room for two more: a fourth page.
    assert len(plan.running[0].pages) == 4
    scheduler.account({0: 2, 1: 2}, [0, 1])
    assert scheduler.idle and scheduler.pool.free == 20


def test_longest_expected_first_and_the_mean_for_the_unknown():
    scheduler = Scheduler(slots=1, pages=99, page_tokens=4, window=8, max_tokens=50)
    jobs = [Job("new", 4, 1), Job("short", 4, 1, 5.0), Job("long", 4, 1, 40.0), Job("late", 4, 1)]
    scheduler.submit(jobs)
    lengths = {("new", 0): 20, ("short", 0): 3, ("long", 0): 45, ("late", 0): 10}
    # Nothing is known at first: "new" goes ahead; then the mean, 20, stands for "late".
    assert [job for job, *_ in drain(scheduler, lengths)] == ["new", "long", "late", "short"]


def test_a_dry_pool_puts_the_youngest_back_and_loses_nothing():
    scheduler = Scheduler(slots=3, pages=10, page_tokens=4, window=4, max_tokens=28)
    scheduler.submit([Job(name, 4, 1) for name in "abc"])
    lengths = {(name, 0): 28 for name in "abc"}
    put_back = []
    done = drain(scheduler, lengths, lambda plan: put_back.extend(s.job.id for s in plan.put_back))
    assert put_back[0] == "b" and scheduler.put_back_count == len(put_back)
    assert sorted(done) == [(name, 0, 28) for name in "abc"]
    assert done[0][0] == "a"
    assert scheduler.pool.free == 10


def test_a_job_that_can_never_fit_is_refused():
    scheduler = Scheduler(slots=1, pages=4, page_tokens=4, window=2, max_tokens=10)
    scheduler.submit([Job("fits", 6, 1)])
    with pytest.raises(PoolTooSmallError, match="job 'x': a prompt of 7 tokens and 10 more need 5"):
        scheduler.submit([Job("x", 7, 1)])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_everything_ends_no_page_leaks_and_none_is_written_by_two(data):
    draw = data.draw
    page_tokens, window = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    max_tokens = draw(st.integers(1, 20))
    prompts = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), max_size=5))
    least = max((-(-(p + max_tokens) // page_tokens) for p, _ in prompts), default=1)
    pages, slots = least + draw(st.integers(0, 12)), draw(st.integers(1, 5))
    scheduler = Scheduler(slots, pages, page_tokens, window, max_tokens)
    expected = draw(st.lists(st.none() | st.floats(0, 30), min_size=5, max_size=5))
    jobs = [Job(i, p, g, expected[i]) for i, (p, g) in enumerate(prompts)]
    scheduler.submit(jobs)
    lengths = {
        (job.id, g): draw(st.integers(1, max_tokens)) for job in jobs for g in range(job.samples)
    }

    def check(plan):
        own = [page for s in plan.running.values() for page in s.pages[s.shared :]]
        assert len(own) == len(set(own)), "a page of two sequences"
        shared = {page for s in plan.running.values() for page in s.pages[: s.shared]}
        assert not shared & set(own)
        for sequence in plan.running.values():
            assert sequence.shared <= sequence.job.prompt_tokens // page_tokens
            left = lengths[sequence.job.id, sequence.sample] - sequence.sampled
            room = len(sequence.pages) * page_tokens
            assert room >= sequence.cached_tokens + min(left, window)

    done = drain(scheduler, lengths, check)
    assert sorted(done) == sorted((*key, length) for key, length in lengths.items())
    assert scheduler.pool.free == pages
