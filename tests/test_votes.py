from vibejax import votes


def asked_of(same):
    """An `equal` that remembers what it was asked."""
    pairs_seen = []

    def equal(pairs):
        pairs_seen.extend(pairs)
        return [same(a, b) for a, b in pairs]

    return equal, pairs_seen


def test_clusters_by_hand():
    equal, pairs = asked_of(lambda a, b: a.lower() == b.lower())
    answers = ["4", "x", None, "four", "X", "4", "", "X"]
    assert votes.clusters(answers, equal) == [[0, 5], [1, 4, 7], [3]]
    assert len(pairs) == len(set(pairs))  # a spelling is compared once
    assert votes.clusters([None, ""], equal) == []


def test_a_chain_of_answers_is_not_one():
    near, _ = asked_of(lambda a, b: abs(float(a) - float(b)) <= 1)
    assert votes.clusters(["1", "2", "3"], near) == [[0, 1], [2]]
