"""Answers that say the same are found, each pair asked about once."""

from vibejax import equivalence
from vibejax.verifiers.pool import Pool


def test_clusters_by_hand():
    asked = []

    def same(pairs):
        asked.append(pairs)
        return [a.lower() == b.lower() for a, b in pairs]

    answers = ["x", None, "y", "X", "", "x", "Y", "X"]
    assert equivalence.clusters(answers, same) == [[0, 3, 5, 7], [2, 6]]
    assert asked == [[], [("x", "y")], [("x", "X"), ("y", "X")], [("x", "Y"), ("y", "Y")]]
    assert equivalence.clusters([None, ""], same) == []


def test_equal_answers_are_the_math_verifiers():
    with Pool(workers=1) as pool:
        pairs = [("1/2", "0.5"), ("1/2", r"\frac{1}{2}"), ("1/2", "2"), ("50%", "1/2")]
        assert equivalence.equal_answers(pool, pairs) == [True, True, False, True]
