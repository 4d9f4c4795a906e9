"""Slots, pages and the queue of the rollout engine, without a device."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vibejax.job_queue import Job, Queue
from vibejax.scheduler import Scheduler


def make(slots, pages, page_tokens, window, jobs=()):
    queue = Queue()
    queue.submit(jobs)
    return Scheduler(queue, slots, pages, page_tokens, window)


def fill(scheduler, plan, chunk=10**9):
    """Computes a part of each fill, and copies what is then to be copied."""
    for f in plan.fills:
        f.done = min(f.tokens, f.done + chunk)
    for sequence in plan.running.values():
        if sequence.ready and sequence.copies is not None:
            scheduler.copied(sequence)


def play(scheduler, plan, lengths):
    """One window: the sequences that ended in it."""
    sampled, ended = {}, []
    for slot, sequence in plan.running.items():
        if not sequence.ready:
            continue
        left = lengths[sequence.job.id, sequence.sample] - sequence.sampled
        sampled[slot] = min(left, scheduler.window)
        if left <= scheduler.window:
            ended.append(slot)
    return scheduler.account(sampled, ended)


def drain(scheduler, lengths, check=lambda plan: None, chunk=10**9):
    """Plays windows until all is done: the completions in the order in which they end."""
    done = []
    for _ in range(100_000):
        if scheduler.idle:
            return done
        plan = scheduler.plan()
        check(plan)
        assert plan.running or plan.fills, "nothing can run"
        fill(scheduler, plan, chunk)
        done += [(s.job.id, s.sample, s.sampled) for s in play(scheduler, plan, lengths)]
    raise AssertionError("does not end")


def test_pages_by_hand():
    """11 tokens in pages of 4, the last of them not cached: two pages are shared, one is copied."""
    scheduler = make(2, 20, 4, 2, [Job(7, 11, 3, 6)])
    plan = scheduler.plan()
    [prompt] = plan.fills
    assert (prompt.job.id, prompt.tokens, len(prompt.pages)) == (7, 10, 3)
    first, second = plan.running.values()
    assert first.pages[:2] == second.pages[:2] == prompt.pages[:2]
    assert first.copies == second.copies == prompt.pages[2]
    assert len({*first.pages, *second.pages, *prompt.pages}) == 5  # one each for tokens 8 to 11
    assert scheduler.pool.free == 15
    assert not first.ready
    fill(scheduler, plan)
    assert first.ready and first.copies is None
    scheduler.account({0: 2, 1: 2}, [1])  # the second ended after two tokens
    plan = scheduler.plan()
    assert [s.sample for s in plan.started] == [2] and plan.running[1].pages[:2] == prompt.pages[:2]
    assert plan.fills == []
    fill(scheduler, plan)
    # The first has 12 cached tokens and needs room for two more: a fourth page.
    assert len(plan.running[0].pages) == 4
    scheduler.account({0: 2, 1: 2}, [0, 1])
    assert scheduler.idle and scheduler.pool.free == 20


def test_one_sample_is_filled_into_its_own_pages():
    scheduler = make(2, 20, 4, 2, [Job(0, 11, 1, 6), Job(1, 1, 1, 6)])
    plan = scheduler.plan()
    [own] = plan.fills
    assert (own.tokens, own.sample, own.pages) == (10, 0, plan.running[0].pages)
    assert plan.running[0].copies is None and plan.running[0].shared == 0
    assert plan.running[1].ready, "a single token has nothing before it"


def test_a_prompt_in_chunks_decodes_when_all_is_there():
    scheduler = make(1, 20, 4, 2, [Job(0, 11, 2, 6)])
    for done in (4, 8, 10):
        plan = scheduler.plan()
        assert not plan.running[0].ready and len(plan.fills) == 1
        fill(scheduler, plan, 4)
        assert plan.fills[0].done == done
    assert plan.running[0].ready


def test_longest_expected_first_and_the_mean_for_the_unknown():
    jobs = [Job(0, 4, 1, 50), Job(1, 4, 1, 50, 5.0), Job(2, 4, 1, 50, 40.0), Job(3, 4, 1, 50)]
    scheduler = make(1, 99, 4, 8, jobs)
    lengths = {(0, 0): 20, (1, 0): 3, (2, 0): 45, (3, 0): 10}
    # Nothing is known at first: job 0 goes ahead; then the mean, 20, stands for job 3.
    assert [job for job, *_ in drain(scheduler, lengths)] == [0, 2, 3, 1]


def test_a_dry_pool_puts_the_youngest_back_and_loses_nothing():
    scheduler = make(3, 10, 4, 4, [Job(name, 4, 1, 28) for name in range(3)])
    lengths = {(name, 0): 28 for name in range(3)}
    put_back, refills = [], []

    def check(plan):
        put_back.extend(s.job.id for s in plan.put_back)
        refills.extend((f.job.id, f.tokens) for f in plan.fills if f.done == 0)

    done = drain(scheduler, lengths, check)
    assert put_back[0] == 1 and scheduler.put_back_count == len(put_back)
    assert sorted(done) == [(name, 0, 28) for name in range(3)]
    assert done[0][0] == 0
    # What goes on has its prompt and all but the last of its own tokens computed again.
    assert refills[:2] == [(0, 3), (1, 3)] and refills[2][0] == 1 and refills[2][1] > 7
    assert scheduler.pool.free == 10


def test_a_job_fills_the_pool_to_the_last_page():
    largest = Job(0, 7, 1, 10)  # its last token is drawn, and never cached
    scheduler = make(1, 4, 4, 2, [largest])
    assert drain(scheduler, {(0, 0): 10}) == [(0, 0, 10)]


def test_devices_take_from_one_queue():
    queue = Queue()
    queue.submit([Job(i, 3, 1, 8) for i in range(6)])
    parts = [Scheduler(queue, 4, 20, 4, 2) for _ in range(2)]
    plans = [part.plan(most=3) for part in parts]
    assert [[s.job.id for s in plan.started] for plan in plans] == [[0, 1, 2], [3, 4, 5]]
    assert not queue and not parts[0].idle


def test_a_device_goes_on_with_the_samples_of_what_it_has_begun():
    queue = Queue()
    queue.submit([Job(0, 3, 6, 8), Job(1, 3, 1, 8)])
    parts = [Scheduler(queue, 4, 20, 4, 2) for _ in range(2)]
    plans = [part.plan(most=2) for part in parts]
    assert [[s.job.id for s in plan.started] for plan in plans] == [[0] * 4, [1]]


def test_a_job_in_parts_has_the_same_samples():
    parts = Job(5, 3, 7, 8, 2.0).split(3)
    assert [(job.first_sample, job.samples) for job in parts] == [(0, 3), (3, 3), (6, 1)]
    done = drain(make(4, 30, 4, 2, parts), {(5, sample): 3 for sample in range(7)})
    assert sorted(done) == [(5, sample, 3) for sample in range(7)]
    assert Job(5, 3, 2, 8).split(4) == [Job(5, 3, 1, 8), Job(5, 3, 1, 8, first_sample=1)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_everything_ends_no_page_leaks_and_none_is_written_by_two(data):
    draw = data.draw
    page_tokens, window = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    shapes = st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 20))
    sizes = draw(st.lists(shapes, max_size=5))
    least = max((-(-(p + m - 1) // page_tokens) for p, _, m in sizes), default=1)
    pages, slots = least + draw(st.integers(0, 12)), draw(st.integers(1, 5))
    expected = draw(st.lists(st.none() | st.floats(0, 30), min_size=5, max_size=5))
    jobs = [Job(i, p, g, m, expected[i]) for i, (p, g, m) in enumerate(sizes)]
    scheduler = make(slots, pages, page_tokens, window, jobs)
    lengths = {
        (job.id, g): draw(st.integers(1, job.max_tokens))
        for job in jobs
        for g in range(job.samples)
    }

    def check(plan):
        own = [page for s in plan.running.values() for page in s.pages[s.shared :]]
        assert len(own) == len(set(own)), "a page of two sequences"
        read = {page for s in plan.running.values() for page in s.pages[: s.shared]}
        read |= {s.copies for s in plan.running.values()} - {None}
        read |= {page for f in plan.fills if f.sample is None for page in f.pages}
        assert not read & set(own)
        for f in plan.fills:
            assert len(f.pages) * page_tokens >= f.tokens
        for sequence in plan.running.values():
            full = (sequence.job.prompt_tokens - 1) // page_tokens
            assert sequence.shared in (0, full)
            left = lengths[sequence.job.id, sequence.sample] - sequence.sampled
            room = len(sequence.pages) * page_tokens
            assert room >= sequence.cached_tokens + min(left, window)

    done = drain(scheduler, lengths, check, chunk=draw(st.integers(1, 12)))
    assert sorted(done) == sorted((*key, length) for key, length in lengths.items())
    assert scheduler.pool.free == pages
