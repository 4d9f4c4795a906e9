"""The rollout engine on a CPU: what comes out, whatever the slots, pages and neighbours."""

import gc

import jax
import numpy as np
import pytest
import tiny

from vibejax import batching, decode, qwen2, sampler_copy
from vibejax.completions import EngineConfig, EngineError, Request
from vibejax.decode import Sampling
from vibejax.engine import Engine, engine_mesh
from vibejax.rope import Rope

MODEL = tiny.model_config()
REQUESTS = [Request(i, tuple(range(1, 2 + 3 * i % 14)), 12, samples=3) for i in range(7)]
EOS = (3, 9)
DEVICE = jax.devices()[:1]


@pytest.fixture(scope="module")
def params():
    return qwen2.init_params(MODEL, jax.random.key(0))


def make(params, devices=DEVICE, dtype="float32", model=MODEL, **sizes):
    sizes = {"slots": 8, "window": 4, "page_tokens": 4, "chunk_tokens": 16} | sizes
    config = EngineConfig(model=model, **sizes)
    return Engine(sampler_copy.make(params, model, dtype), config, devices)


def run(engine, requests=REQUESTS, **how):
    how = Sampling(**({"eos_ids": EOS} | how))
    done = list(engine.generate(requests, how, seed=5, step=2))
    found = {(requests[c.request].prompt, c.sample): c for c in done}
    assert len(found) == len(done) == sum(r.samples for r in requests)
    return found


@jax.jit
def forward_logits(params, token_T):
    """[T, V] logits of one sequence by the plain forward pass; padding comes after its end."""
    position = jax.numpy.arange(token_T.size)[None]
    segment = jax.numpy.ones_like(position)
    x_BTE = qwen2.hidden_states(params, token_T[None], position, segment, MODEL)
    return qwen2.logits(params, x_BTE[0], MODEL)


def forward_logprobs(params, prompt, completion, temperature=1.0):
    """Log-probs of a completion by the plain forward pass."""
    token_T = np.pad(np.concatenate([prompt, completion]), (0, 40))[:40].astype(np.int32)
    logprob_TV = np.asarray(jax.nn.log_softmax(forward_logits(params, token_T) / temperature))
    place = np.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logprob_TV[place, completion]


def assert_forward_pass(params, found, requests=REQUESTS, temperature=1.0, atol=2e-5):
    tokens = {r.prompt: r.tokens for r in requests}
    for (prompt, _), c in found.items():
        want = forward_logprobs(params, tokens[prompt], c.tokens, temperature)
        np.testing.assert_allclose(c.logprobs, want, atol=atol)


SETTINGS = {
    "plain": {},
    "chunks": {"chunk_tokens": 16, "page_tokens": 3},
    "put back": {"pool_tokens": 60, "window": 2},
    "in place": {"attention": "xla"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_log_probs_are_the_forward_pass(params, name):
    requests = [*REQUESTS, Request(7, tuple(np.arange(27) % 36), 12, samples=2)]
    engine = make(params, **SETTINGS[name])
    found = run(engine, requests, eos_ids=())
    assert_forward_pass(params, found, requests)
    assert (engine.counts.put_back > 0) == (name == "put back")
    assert all(len(c.tokens) == 12 and c.stop == "length" for c in found.values())


def test_temperature(params):
    assert_forward_pass(params, run(make(params), temperature=0.7), temperature=0.7)


def test_int8_pages_are_near(params):
    found = run(make(params, kv_dtype="int8", page_tokens=8))
    apart = [
        c.logprobs - forward_logprobs(params, REQUESTS[p].tokens, c.tokens)
        for (p, _), c in found.items()
    ]
    assert 1e-5 < np.abs(np.concatenate(apart)).mean() < 0.03


def test_completions_end_at_a_stop_token_or_at_the_limit(params):
    completions = run(make(params)).values()
    assert {c.stop for c in completions} == {"stop", "length"}
    for c in completions:
        assert not np.isin(c.tokens[:-1], EOS).any()
        assert (c.tokens[-1] in EOS) == (c.stop == "stop")
        assert c.stop == "stop" or len(c.tokens) == 12
        assert len(c.tokens) == len(c.logprobs)


def test_min_tokens_put_off_the_stop_and_count_in_the_log_probs(params):
    found = run(make(params), min_tokens=6)
    assert min(len(c.tokens) for c in found.values() if c.stop == "stop") == 7
    for (prompt, _), c in found.items():
        if c.stop != "stop":
            continue
        tokens = np.concatenate([REQUESTS[prompt].tokens, c.tokens])
        logit_TV = np.array(forward_logits(params, np.pad(tokens, (0, 40))[:40].astype(np.int32)))
        n = len(REQUESTS[prompt].tokens)
        logit_TV[n - 1 : n + 5, EOS] = -1e30
        want = np.asarray(jax.nn.log_softmax(logit_TV))[np.arange(n - 1, len(tokens) - 1), c.tokens]
        np.testing.assert_allclose(c.logprobs, want, atol=2e-5)


WIDE = qwen2.ModelConfig(
    layers=1, width=576, heads=9, kv_heads=3, head_dim=64, mlp=1_536, vocab=2_048,
    rope=Rope(theta=1e5), context=256, init_std=0.06,
)  # fmt: skip


def test_completions_are_bit_identical_whatever_runs_beside_them(optimised):
    """On SmolLM2's widths, where products do round: order, slots, page size, chunks, a dry pool."""
    params = qwen2.init_params(WIDE, jax.random.key(0))
    random = np.random.default_rng(0)
    requests = [
        Request(i, tuple(random.integers(0, 2_048, size).tolist()), limit, samples=2)
        for i, (size, limit) in enumerate(
            zip((1, 33, 70, 5, 40, 17), (9, 30, 21, 5, 40, 12), strict=True)
        )
    ]
    sizes = {"slots": 12, "window": 8, "page_tokens": 16, "chunk_tokens": 64}
    want = run(make(params, model=WIDE, **sizes), requests)
    others = [
        (requests[::-1], {}),
        (requests, {"slots": 8, "page_tokens": 32, "chunk_tokens": 32}),
    ]
    for given, other in others:
        found = run(make(params, model=WIDE, **(sizes | other)), given)
        for key, c in want.items():
            np.testing.assert_array_equal(found[key].tokens, c.tokens)
            np.testing.assert_array_equal(found[key].logprobs, c.logprobs)


def test_more_samples_keep_the_first_and_samples_differ(params):
    engine = make(params)
    few = run(engine, [Request(r.prompt, r.tokens, 12, samples=2) for r in REQUESTS])
    many = run(engine)
    for key, c in few.items():
        np.testing.assert_array_equal(many[key].tokens, c.tokens)
    assert len({tuple(c.tokens) for c in many.values()}) > 15


def test_greedy_follows_the_likeliest_token(params):
    (completion,) = run(make(params), [Request(0, (1,), 12)], temperature=0.0).values()
    tokens = [1]
    for token in completion.tokens:
        token_T = np.pad(tokens, (0, 40))[:40].astype(np.int32)
        assert token == int(np.argmax(forward_logits(params, token_T)[len(tokens) - 1]))
        tokens.append(token)


def test_completions_come_as_they_finish(params):
    """The short ones before the long one, and while it still decodes."""
    engine = make(params, slots=8)
    requests = [Request(0, (1, 2), 40), *(Request(i, (1, 2, i), 2) for i in range(1, 4))]
    order = [c.request for c in engine.generate(requests, Sampling())]
    assert order[-1] == 0 and sorted(order) == [0, 1, 2, 3]


def test_nothing_is_compiled_after_a_warm_up(params):
    engine = make(params)
    programs = (decode.window, decode.fill, decode.copy)
    run(engine)
    before = [p._cache_size() for p in programs]
    run(engine, REQUESTS[::-1], eos_ids=EOS)
    run(engine, [Request(i + 50, r.tokens[::-1], 12, r.samples) for i, r in enumerate(REQUESTS)])
    assert [p._cache_size() for p in programs] == before


def test_pools_are_changed_in_place(params):
    """No program holds a second pool: what it was given is what it gives back."""
    engine = make(params, pool_tokens=65_536)
    run(engine, REQUESTS[:2])
    pools = engine._pools
    one = sum(x.nbytes for x in pools[0] if x is not None)
    sampler, B = engine.params, 8
    integer, identity = np.zeros((4, B), np.int32), np.zeros((2, B), np.uint32)
    table, flags = np.zeros((B, 4), np.int32), np.zeros(B, bool)
    rows = decode.Rows(*integer, *identity, table, np.zeros(1, np.int32), flags)
    seed = np.uint32(0)
    how = {"config": MODEL, "implementation": "xla"}
    window = {"how": Sampling(), "steps": 4, "group": 8, **how}
    with jax.set_mesh(engine.mesh):
        copies = decode.empty_copies(MODEL, B, 16, "float32")
        lowered = [
            decode.window.lower(sampler, pools, None, rows, seed, seed, **window),
            decode.window.lower(sampler, pools, copies, rows, seed, seed, **window),
            decode.fill.lower(
                sampler, pools, np.zeros((B, 16), np.int32), *integer[:2], table, **how
            ),
            decode.copy.lower(pools, *integer[:2]),
        ]
        for program in lowered:
            memory = program.compile().memory_analysis()
            assert memory.temp_size_in_bytes < one / 2
            assert memory.alias_size_in_bytes >= MODEL.layers * one


@pytest.mark.parametrize("tensor", [1, 2])
def test_several_devices_equal_one(params, tensor):
    """Four devices with slots and pages of their own; pairs of them that share heads."""
    want = run(make(params))
    devices = jax.devices()[:4]
    config = EngineConfig(
        model=MODEL, slots=32, window=4, page_tokens=4, chunk_tokens=16, tensor=tensor
    )
    mesh = engine_mesh(MODEL, tensor, devices)
    sampler = sampler_copy.make(
        jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.P())), MODEL, "float32", mesh
    )
    found = run(Engine(sampler, config, devices))
    for key, c in want.items():
        np.testing.assert_array_equal(found[key].tokens, c.tokens)
        np.testing.assert_allclose(found[key].logprobs, c.logprobs, atol=1e-5)
    q = sampler["layers"][0]["q"]
    assert q.addressable_shards[0].data.size * tensor == q.size


def test_a_repeating_completion_is_cut_where_it_is_a_loop(params):
    """Greedy decoding of random weights falls into a cycle."""
    request = [Request(0, (1, 2), 60)]
    whole = run(make(params), request, temperature=0.0, eos_ids=())[0, 0]
    cut = run(make(params), request, temperature=0.0, eos_ids=(), loop_tokens=10)[0, 0]
    assert cut.stop == "loop" and len(cut.tokens) < len(whole.tokens) == 60
    np.testing.assert_array_equal(cut.tokens, whole.tokens[: len(cut.tokens)])
    assert batching.loop_end(whole.tokens[: len(cut.tokens) - 1], 60, 10) is None


@pytest.mark.parametrize(
    "tokens, new, want",
    [
        ([1, 2, 3, 4, 5, 6], 6, None),
        ([7, 1, 2, 1, 2, 1, 2], 7, 6),  # 1 2 1 of the second and third pair: at the sixth token
        ([7, 1, 2, 1, 2, 1, 2], 1, 7),  # the others were looked at before
        ([5, 5, 5, 5, 5], 5, 4),
        ([1, 2, 9, 1, 2, 1], 6, None),
    ],
)
def test_loops_by_hand(tokens, new, want):
    assert batching.loop_end(np.array(tokens), new, 3) == want


def ends_in_a_loop(tokens, loop_tokens):
    """Whether the last tokens stand at most 64 places before too."""
    first = len(tokens) - loop_tokens
    starts = range(max(0, first - batching.LOOP_PERIOD), first)
    return any((tokens[s : s + loop_tokens] == tokens[first:]).all() for s in starts)


@pytest.mark.parametrize("loop_tokens, new", [(3, 7), (12, 4), (20, 1), (70, 16)])
def test_loops_are_those_that_are_found_one_by_one(loop_tokens, new):
    random = np.random.default_rng(loop_tokens)
    for _ in range(60):
        cycle = random.integers(0, 3, random.integers(1, 70))
        tokens = np.concatenate([random.integers(0, 3, random.integers(0, 90)), np.tile(cycle, 3)])
        tokens = tokens[: max(new, len(tokens) - random.integers(0, 60))]

        ends = range(max(loop_tokens, len(tokens) - new) + 1, len(tokens) + 1)
        loops = [end for end in ends if ends_in_a_loop(tokens[:end], loop_tokens)]
        assert batching.loop_end(tokens, new, loop_tokens) == (loops[0] if loops else None)


def test_no_loop_ends_a_completion_before_its_least_length(params):
    how = {"temperature": 0.0, "eos_ids": (), "loop_tokens": 10}
    request = [Request(0, (1, 2), 60)]
    early = run(make(params), request, **how)[0, 0]
    late = run(make(params), request, **how, min_tokens=35)[0, 0]
    assert early.stop == late.stop == "loop"
    assert len(early.tokens) < 35 <= len(late.tokens) < 50


def test_a_window_longer_than_the_context(params):
    want = run(make(params))
    found = run(make(params, window=64, context=29))
    for key, c in want.items():
        np.testing.assert_array_equal(found[key].tokens, c.tokens)


def test_int8_pages_have_room_for_one_sequence_of_the_context(params):
    config = {"slots": 1, "kv_dtype": "int8", "context": 36, "page_tokens": 4}
    engine = make(params, **config)
    assert engine.memory.pages == 16  # 9 would do; a multiple of 8
    assert len(run(engine, [Request(0, (1,) * 4, 32)])[0, 0].tokens) > 0


@pytest.mark.parametrize("samples", [1, 16])
def test_few_prompts_keep_all_devices_busy(params, samples):
    engine = make(params, devices=jax.devices()[:4], slots=16)
    found = run(engine, [Request(0, (1, 2), 40, samples=samples)], eos_ids=())
    assert sorted(found) == [(0, sample) for sample in range(samples)]
    assert engine.counts.windows == 10
    alone = run(make(params, slots=16), [Request(0, (1, 2), 40, samples=samples)], eos_ids=())
    for key, c in alone.items():
        np.testing.assert_array_equal(found[key].tokens, c.tokens)


def test_what_is_learnt_of_a_prompt_is_of_its_tokens_and_limit(params):
    engine = make(params, slots=1)
    long, short = Request(0, (5, 6), 12), Request(1, (7, 8), 3)
    run(engine, [long, short], eos_ids=())
    list(engine.generate([Request(0, (5, 6), 2), Request(0, (1,), 1)], Sampling()))
    done = engine.generate([short, long], Sampling(eos_ids=()))
    assert [c.request for c in done] == [1, 0]  # the longer first, still


def test_logits_that_are_not_numbers_end_their_request_only(params):
    """Token 30 has an embedding of NaN: prompts with it fail, the others do not change."""
    want = run(make(params), eos_ids=(), **{})
    broken = jax.tree.map(lambda x: x, params)
    head = params["embed"]
    untied = qwen2.ModelConfig(**(vars(MODEL) | {"tied": False}))
    broken = {**params, "embed": head.at[30].set(np.nan), "head": head}
    requests = [*REQUESTS, Request(90, (1, 30, 2), 12, samples=2)]
    found = run(make(broken, model=untied), requests, eos_ids=())
    for key in ((90, 0), (90, 1)):
        assert found[key].stop == "not_finite" and not len(found[key].tokens)
    for key, c in want.items():
        if 30 not in c.tokens:
            np.testing.assert_array_equal(found[key].tokens, c.tokens)


def test_a_soak_leaks_nothing(params):
    """Many short completions: pages, memory and programs are what they were."""
    engine = make(params, slots=16, pool_tokens=400)
    requests = [Request(i, (1 + i % 30, 2), 1 + i % 5, samples=4) for i in range(250)]
    list(engine.generate(requests, Sampling()))
    compiled, arrays = decode.window._cache_size(), len(gc.collect() * [0] + jax.live_arrays())
    for seed in range(2):
        assert len(list(engine.generate(requests, Sampling(), seed=seed))) == 1_000
    assert decode.window._cache_size() == compiled
    gc.collect()
    assert len(jax.live_arrays()) <= arrays


BAD_REQUESTS = {
    "context": (Request(4, (1,) * 60, 12), "prompt 4: 60 tokens and 12 more are above the context"),
    "pool": (Request(4, (1,) * 30, 12), "prompt 4: .* need 11 pages of 4, a device has 8"),
    "no tokens": (Request(4, (), 12), "prompt 4: has no tokens"),
    "max tokens": (Request(4, (1,), 0), "prompt 4: max_tokens 0 and samples 1 must be at least 1"),
    "vocabulary": (Request(4, (36,), 3), "prompt 4: has tokens outside of the vocabulary of 36"),
    "identity": (Request(-4, (1,), 3), "prompt -4: prompt and numbers must be at least 0"),
    "number": (Request(4, (1,), 3, numbers=(2**32,)), "prompt 4: prompt and numbers must be"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_request_that_cannot_be_used_is_named(params, name):
    request, message = BAD_REQUESTS[name]
    engine = make(params, pool_tokens=32)
    engine.require_room("the longest", 21, 12)  # its last token is not cached
    with pytest.raises(EngineError, match=message):
        engine.generate([Request(1, (1,), 3), request], Sampling())
    assert len(run(engine, [Request(1, (1,), 3)])) == 1


def test_settings_that_cannot_be_used(params):
    engine = make(params)
    for how, message in (
        ({"eos_ids": (36,)}, r"eos_ids \(36,\): must be a tuple of ids in \[0, 36\)"),
        ({"eos_ids": [3]}, r"eos_ids \[3\]: must be a tuple"),
        ({"top_p": 0}, "top_p 0: must be"),
        ({"top_k": 2**31}, "top_k 2147483648: must be at least 0 and below"),
        ({"min_tokens": 2**31}, "min_tokens 2147483648: must be"),
        ({"temperature": 1e-30}, "temperature 1e-30: must be 0 or in"),
        ({"temperature": float("inf")}, "temperature inf: must be 0 or in"),
    ):
        with pytest.raises(EngineError, match=message):
            engine.generate([], Sampling(**how))
    with pytest.raises(EngineError, match="seed -1: must be at least 0 and below"):
        engine.generate([], Sampling(), seed=-1)
    with pytest.raises(EngineError, match="params: layers are stacked"):
        Engine(params, EngineConfig(model=MODEL), DEVICE)
    with pytest.raises(EngineError, match="params: bfloat16, the engine was made for float32"):
        engine.load(sampler_copy.make(params, MODEL, "bfloat16"))
    with pytest.raises(EngineError, match="slots 0: must be at least 1"):
        make(params, slots=0)
    with pytest.raises(EngineError, match="page_tokens 3: int8 pages"):
        make(params, page_tokens=3, kv_dtype="int8")
    with pytest.raises(EngineError, match=r"weights .* pages .* does not fit"):
        make(params, memory_bytes=1_000)
    with pytest.raises(EngineError, match="tensor 2: must divide 1 devices"):
        make(params, tensor=2)


def test_a_closed_or_reloaded_engine(params):
    engine = make(params)
    first = engine.generate(REQUESTS, Sampling())
    next(first)
    engine.load(sampler_copy.make(params, MODEL, "float32"))
    with pytest.raises(EngineError, match="closed, loaded or asked"):
        list(first)
    waits = engine.generate(REQUESTS, Sampling())
    engine.release()
    with pytest.raises(EngineError, match="closed, loaded or asked"):
        next(waits)
    with pytest.raises(EngineError, match="has no parameters"):
        engine.generate(REQUESTS, Sampling())
    engine.close()
    for use in (lambda: engine.generate(REQUESTS, Sampling()), lambda: engine.load(params)):
        with pytest.raises(EngineError, match="the engine is closed"):
            use()


def test_requests_that_were_given_up_change_nothing(params):
    """One that had not begun, and a list that its owner empties."""
    engine, mine = make(params), list(REQUESTS)
    how = Sampling(eos_ids=EOS)
    old = engine.generate([Request(50, (4, 5, 6), 12)], how)
    new = engine.generate(mine, how, seed=5, step=2)
    mine.clear()
    found = [next(new)]
    with pytest.raises(EngineError, match="closed, loaded or asked"):
        next(old)
    found += new
    for key, c in run(make(params)).items():
        (got,) = (x for x in found if (x.request, x.sample) == key)
        np.testing.assert_array_equal(got.tokens, c.tokens)
