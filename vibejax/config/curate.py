"""What `python -m vibejax.curate` reads."""

from typing import Annotated, Literal

from pydantic import Field

from vibejax.config.fields import Count, Natural, Share, default
from vibejax.config.verifiers import VerifiersConfig
from vibejax.config_file import Section


class DecontaminateConfig(Section):
    """What records must not repeat (curate/evaluation.py)."""

    sets: list[str] = default(
        [], "evaluation sets, as published: paths, or NAME=PATH; empty: no decontamination"
    )
    field: str = default("", "the sets' column of the problem; empty: their layout's")
    n: Count = default(10, "words of an n-gram")
    share: Share = default(
        0.5, "of an item's words in shared n-grams that makes a copy, n at least; 4 n always do"
    )


class LengthConfig(Section):
    """How long prompts and traces may be; the report's second SFT stage: min_trace = 5000."""

    tokenizer: str = default("", "MODEL whose tokens are counted; empty: characters")
    min_prompt: Natural = default(1, "a shorter prompt is dropped")
    max_prompt: Natural = default(0, "a longer prompt is dropped; 0: none is")
    min_trace: Natural = default(0, "a shorter trace is dropped")
    max_trace: Natural = default(0, "a longer trace is dropped; 0: none is")


class RepetitionConfig(Section):
    """How much traces may repeat themselves and each other (curate/repetition.py)."""

    max_share: Share = default(
        0.3, "of a trace's n-grams of 48 letters that stood before in it; 1: no repetition filter"
    )
    max_count: Count = default(10, "times that one of them may stand in a trace")
    max_template_share: Share = default(
        0.8, "of a trace in lines that stood in template_records others; 1: no template filter"
    )
    template_records: Count = default(100, "records after which a line is a template")


class DuplicatesConfig(Section):
    """Which records count as there before (curate/duplicates.py)."""

    exact: bool = default(True, "drop records with the letters and formulas of an earlier one")
    near: Annotated[float, Field(ge=0, le=1)] = default(
        0.85, "share of n-grams that makes two with the same formulas nearly the same; 0: none are"
    )


class RolloutFilterConfig(Section):
    """What is made of a record's `accuracy`, or of its `completions` (curate/rollouts.py)."""

    keep: Literal["all", "hard", "mixed"] = default(
        "all", "hard: error rate >= min_error_rate, for SFT; mixed: accuracy not 0 or 1, for RL"
    )
    min_error_rate: Share = default(0.75, "of the completions, for keep = hard")
    pseudo_labels: bool = default(
        False, "give math records without a ground truth the answer of most of their completions"
    )
    min_votes: Share = default(0.5, "of the completions that the answer needs")


class CurateConfig(Section):
    """What is dropped from raw records."""

    inputs: list[str] = Field(description="records, JSONL or parquet")
    out: str = Field(description="where kept records go, .jsonl or .parquet")
    workers: Count = default(2, "processes that look at records; 1: no others than this one")
    verify_traces: bool = default(False, "drop traces that their verifiers do not accept")
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    length: LengthConfig = LengthConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    rollouts: RolloutFilterConfig = RolloutFilterConfig()
    verifiers: VerifiersConfig = VerifiersConfig()
