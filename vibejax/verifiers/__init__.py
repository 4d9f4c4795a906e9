"""Verifiable rewards: what a verdict is, for every verifier and for the pool that runs them."""

import dataclasses
import enum


class Outcome(enum.StrEnum):
    """How a verification ended.

    Only `CORRECT`, `WRONG` and `NO_ANSWER` say something about the completion. The others say
    that the verifier itself failed: they are counted and shown, and never pass for a wrong answer.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TIMEOUT = "timeout"
    CRASH = "crash"
    MEMORY = "memory"
    UNSCORED = "unscored"

    @property
    def scored(self) -> bool:
        """Whether it says something about the completion."""
        return self in (Outcome.CORRECT, Outcome.WRONG, Outcome.NO_ANSWER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a verifier says of one completion.

    Attributes:
        correct: the binary correctness that p(q) of MGPO counts.
        reward: the float that enters the advantage; 1.0 or 0.0 unless a verifier grades finer.
        outcome: how the verification ended.
        answer: what was extracted from the completion, for people who debug rewards.
        detail: one line on what went wrong, empty if nothing did.
    """

    correct: bool
    reward: float
    outcome: Outcome
    answer: str | None = None
    detail: str = ""

    @property
    def scored(self) -> bool:
        """Whether the verdict says something about the completion."""
        return self.outcome.scored
