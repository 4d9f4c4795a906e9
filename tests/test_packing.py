import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vibejax import packing
from vibejax.packing import Document


def document(tokens, weights, **channels):
    arrays = {name: np.asarray(x, np.float32) for name, x in channels.items()}
    return Document(
        tokens=np.asarray(tokens, np.int32),
        weights=np.asarray(weights, np.float32),
        channels=arrays,
    )


def test_row_by_hand():
    documents = [
        document([5, 6, 7], [0, 1, 2], advantage=[0, 3, 3]),
        document([8, 9], [0, 4], advantage=[0, -1]),
    ]
    rows = packing.pack(documents, [[0, 1]], 6)
    want = {
        "token": [5, 6, 7, 8, 9, 0],
        "target": [6, 7, 0, 9, 0, 0],
        "position": [0, 1, 2, 0, 1, 0],
        "segment": [1, 1, 1, 2, 2, 0],
        "weight": [1, 2, 0, 4, 0, 0],  # the last token of a document predicts nothing
        "advantage": [3, 3, 0, -1, 0, 0],
    }
    assert rows.keys() == want.keys()
    for name, row in want.items():
        np.testing.assert_array_equal(rows[name], [row], err_msg=name)


@settings(deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=30))
def test_plan_places_every_document_once_and_never_overfills(lengths):
    plan = packing.plan(lengths, 16)
    assert sorted(i for row in plan for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 16 for row in plan)
    # Any two rows could not be one: best fit leaves at most one row half empty.
    assert sum(sum(lengths[i] for i in row) * 2 <= 16 for row in plan) <= 1


def test_plan_and_fill_by_hand():
    """Longest first, each where it leaves the least room: 8, 5 + 3, 4 + 2, in three rows of 8."""
    assert packing.plan([2, 8, 3, 5, 4], 8) == [[1], [3, 2], [4, 0]]
    assert packing.fill([2, 8, 3, 5, 4], 8, microbatch_rows=1) == 22 / 24
    assert packing.fill([2, 8, 3, 5, 4], 8, microbatch_rows=2) == 22 / 32  # one row of padding


def test_a_document_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match="document 1 has 9 tokens; a row holds 8"):
        packing.plan([3, 9], 8)


@settings(deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=20))
def test_unpack_returns_what_pack_placed(lengths):
    rng = np.random.default_rng(0)
    documents = [
        document(rng.integers(1, 9, n), np.ones(n), value=np.r_[0, rng.random(n - 1)])
        for n in lengths
    ]
    plan = packing.plan(lengths, 16)
    rows = packing.pack(documents, plan, 16)
    for got, d in zip(packing.unpack(rows["value"], documents, plan), documents, strict=True):
        np.testing.assert_array_equal(got, d.channels["value"])


def test_last_microbatch_is_filled_with_padding():
    rows = packing.pack([document([1, 2], [0, 1])] * 5, [[i] for i in range(5)], 2)
    parts = list(packing.microbatches(rows, 2))
    assert [part["token"].shape for part in parts] == [(2, 2)] * 3
    assert [part["segment"].any(axis=1).sum() for part in parts] == [2, 2, 1]


def test_a_segment_in_two_runs_is_refused():
    rows = {"token": np.zeros((2, 6), np.int32)}
    rows["segment"] = np.array([[1, 1, 0, 2, 2, 0], [1, 1, 2, 1, 0, 0]])
    with pytest.raises(ValueError, match="row 1: segment 1 must be one run of tokens"):
        list(packing.microbatches(rows, 1))
    rows["segment"][1, 3] = 0
    assert len(list(packing.microbatches(rows, 1))) == 2


def test_spread_balances_the_work_of_context_shards():
    """One causal document: in order the last quarter sees 7/16 of all pairs."""
    whole = packing.pack([document([1] * 4_096, [1] * 4_096)], [[0]], 4_096)
    rows = packing.spread(whole, 4)
    work = (rows["position"] + 1).reshape(4, -1).sum(axis=1)
    assert work.max() / work.mean() < 1.01
    assert (work.sum(), rows["token"].sum()) == (4_096 * 4_097 // 2, 4_096)
    np.testing.assert_array_equal(packing.gather(rows["position"], rows["place"])[0], range(4_096))


@pytest.mark.parametrize("shards", [8, 16])
def test_spread_balances_a_row_of_many_documents(shards):
    """Of 65,536 tokens; dealt out from both ends in turn, the most would be 1.71 of the mean."""
    lengths = (17421, 1203, 8850, 402, 5117, 12044, 2961, 6710, 731, 7399, 2698)
    documents = [document([1] * n, [1] * n) for n in lengths]
    rows = packing.pack(documents, [range(len(lengths))], sum(lengths))
    work = (packing.spread(rows, shards)["position"] + 1).reshape(shards, -1).sum(axis=1)
    assert work.max() / work.mean() < 1.01


def test_spread_keeps_chunks_whole_and_rows_together():
    documents = [document(range(n), [1] * n) for n in (700, 900, 2_500)]
    rows = packing.pack(documents, [[2, 1], [0]], 4_096)
    spread = packing.spread(rows, 2)
    assert (np.diff(spread["place"].reshape(2, 8, 512), axis=2) == 1).all()
    for name in rows:
        np.testing.assert_array_equal(packing.gather(spread[name], spread["place"]), rows[name])
    with pytest.raises(ValueError, match="4096 tokens on 3 context shards"):
        packing.spread(rows, 3)
