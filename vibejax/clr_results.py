"""From claims and verdicts to votes, and from votes to scores.

Shape suffixes: N prompts, K completions of a prompt, R repeats.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vibejax import reliability, scoring, votes
from vibejax.verifiers import Outcome

SCORED = (Outcome.CORRECT, Outcome.WRONG, Outcome.NO_ANSWER)

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Examined:
    """What came of a completion's examination.

    Attributes:
        claims: as read; none where there is no answer, or where none could be read.
        holds: of each claim, whether it held; None where no verdict could be read.
        claims_tokens: of the reply that lists the claims.
        verdicts_tokens: of the replies with the verdicts.
    """

    claims: Sequence[str] = ()
    holds: Sequence[bool | None] = ()
    claims_tokens: int = 0
    verdicts_tokens: int = 0


def vote(
    completions: Sequence[Row],
    examined: Sequence[Examined],
    claims: int,
    equal: Callable[[votes.Pairs], list[bool]],
) -> dict[str, Any]:
    """The vote on one prompt, as clr.jsonl has it.

    A cluster's answer, and whether it is correct, are those of its first completion.

    Args:
        completions: as `policy.answers` stores them.
        examined: what came of each.
        claims: M, how many were asked for.
        equal: as for `votes.clusters`.
    """
    reliability_K = [reliability.reliability(e.holds, claims) for e in examined]
    clusters = votes.clusters([c["answer"] for c in completions], equal)
    scores = reliability.scores(clusters, reliability_K)
    chosen, majority = reliability.vote(clusters, reliability_K), reliability.majority(clusters)
    nobody = {"answer": None, "correct": False}
    first = {place: completions[cluster[0]] for place, cluster in enumerate(clusters)}
    return {
        "chosen": first.get(chosen, nobody)["answer"],
        "chosen_correct": first.get(chosen, nobody)["correct"],
        "majority": first.get(majority, nobody)["answer"],
        "majority_correct": first.get(majority, nobody)["correct"],
        "clusters": [
            {"answer": first[c]["answer"], "completions": clusters[c], "score": float(scores[c])}
            for c in range(len(clusters))
        ],
        "completions": [
            {
                "answer": completion["answer"],
                "correct": completion["correct"],
                "scored": completion["outcome"] in SCORED,
                "truncated": completion["stop"] == "length",
                "tokens": completion["length"],
                "reliability": float(r),
                "claims": [
                    {"text": text, "holds": holds}
                    for text, holds in zip(e.claims, e.holds, strict=True)
                ],
                "claims_tokens": e.claims_tokens,
                "verdicts_tokens": e.verdicts_tokens,
            }
            for completion, e, r in zip(completions, examined, reliability_K, strict=True)
        ],
    }


def results(rows: Sequence[Row], *, claims: int, repeats: int) -> dict[str, Any]:
    """What all votes come to; means over repeats, with 95% intervals over prompts.

    Args:
        rows: as `vote` returns them, repeat by repeat, each in the order of the prompts.
        claims: M, how many were asked for.
        repeats: R.
    """
    samples = len(rows[0]["completions"])
    chosen_RN = _values_RN([row["chosen_correct"] for row in rows], repeats)
    majority_RN = _values_RN([row["majority_correct"] for row in rows], repeats)
    average_RN = _values_RN(
        [np.mean([c["correct"] for c in row["completions"]]) for row in rows], repeats
    )
    completions = [c for row in rows for c in row["completions"]]
    asked = [c for c in completions if c["answer"]]
    verdicts = [claim["holds"] for c in asked for claim in c["claims"]]
    return {
        "prompts": len(rows) // repeats,
        "samples": samples,
        "claims": claims,
        "repeats": repeats,
        "scores": {
            "CLR": _score(chosen_RN),
            f"maj@{samples}": _score(majority_RN),
            f"avg@{samples}": _score(average_RN),
            f"CLR - maj@{samples}": _score(chosen_RN - majority_RN),
        },
        "completions": {
            "no_answer": _share(not c["answer"] for c in completions),
            "truncated": _share(c["truncated"] for c in completions),
            "unscored": _share(not c["scored"] for c in completions),
        },
        "unparsed": {  # of completions with an answer, and of claims
            "all_claims": _share(not c["claims"] for c in asked),
            "some_claims": _share(0 < len(c["claims"]) < claims for c in asked),
            "verdicts": _share(holds is None for holds in verdicts),
        },
        "claims_that_hold": _share(holds is True for holds in verdicts),
        "reliability": {
            "correct": _mean(c["reliability"] for c in asked if c["correct"]),
            "wrong": _mean(c["reliability"] for c in asked if not c["correct"]),
        },
        "tokens_a_prompt": {
            "completions": sum(c["tokens"] for c in completions) / len(rows),
            "claims": sum(c["claims_tokens"] for c in completions) / len(rows),
            "verdicts": sum(c["verdicts_tokens"] for c in completions) / len(rows),
        },
    }


def table(found: Row) -> str:
    """The results as people read them."""
    width = max(map(len, found["scores"]))
    lines = [f"{'':{width}}    mean  95% interval      of single repeats"]
    for name, score in found["scores"].items():
        least, most = min(score["repeats"]), max(score["repeats"])
        lines.append(
            f"{name:{width}}  {score['mean']:6.3f}  [{score['low']:6.3f}, {score['high']:6.3f}]  "
            f"{least:6.3f} to {most:6.3f}"
        )
    lost, unparsed = found["completions"], found["unparsed"]
    return "\n".join(
        [
            *lines,
            f"{found['prompts']} prompts, K = {found['samples']} completions, M = "
            f"{found['claims']} claims, repeats: {found['repeats']}",
            f"of the completions {lost['no_answer']:.1%} give no answer, {lost['truncated']:.1%} "
            f"are truncated, {lost['unscored']:.1%} could not be verified",
            f"not parsed: all claims of {unparsed['all_claims']:.1%} and some claims of "
            f"{unparsed['some_claims']:.1%} of those with an answer, {unparsed['verdicts']:.1%} "
            f"of the verdicts; {found['claims_that_hold']:.1%} of the claims hold",
        ]
    )


def _values_RN(values: Sequence[float], repeats: int) -> np.ndarray:
    return np.array(values, float).reshape(repeats, -1)


def _score(value_RN: np.ndarray) -> dict[str, Any]:
    low, high = scoring.bootstrap_interval(value_RN.mean(axis=0))
    repeats = value_RN.mean(axis=1).tolist()
    return {"mean": float(value_RN.mean()), "low": low, "high": high, "repeats": repeats}


def _mean(values) -> float | None:
    """None of nothing: JSON has no NaN."""
    values = list(values)
    return float(np.mean(values)) if values else None


def _share(flags) -> float:
    return _mean(flags) or 0.0
