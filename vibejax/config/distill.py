"""What `python -m vibejax.distill` reads."""

from typing import Annotated

import pydantic
from pydantic import Field

from vibejax.config.fields import OUT, Count, Name, Natural, Positive, Resume, Seed, Share, default
from vibejax.config.mesh import MeshConfig
from vibejax.config.sampling import EvaluationRolloutConfig
from vibejax.config.training import AttentionConfig, TrainConfig, check_rows
from vibejax.config.verifiers import VerifiersConfig
from vibejax.config_file import Section


class TaughtDomain(Section):
    """What is taught of one domain, and by whom."""

    teachers: list[str] = Field(
        min_length=1, description="MODELs, each of which completes all the prompts"
    )
    prompts: str = Field(description="prompts with their ground truth, JSONL or parquet")


class SelectionConfig(Section):
    """Which traces are learnt (losses/distillation.py); the report publishes none of the values."""

    min_tokens: Natural = default(64, "a shorter trace is not scored")
    short_quantile: Annotated[float, Field(ge=0, lt=1)] = default(
        0.01, "share of a domain's traces, the shortest, that is not scored either"
    )
    edges: list[Count] = default(
        [2_048, 4_096, 8_192, 16_384, 32_768],
        "tokens at which the next length bucket begins, rising; empty: a domain is one cell",
    )
    min_cell: Count = default(8, "a cell of fewer scored traces is left out: nothing ranks there")
    deviations: Positive = default(
        5.0, "a score is an outlier so many median absolute deviations above its cell's median"
    )
    low: Annotated[float, Field(ge=0, lt=1)] = default(
        0.4, "quantile of a cell's scores, without outliers, from which traces are chosen ..."
    )
    high: Share = default(1.0, "... up to this one")
    shares: dict[Name, Positive] = default(
        {}, "table of each domain's part of the chosen set, relative; empty: as they come"
    )

    @pydantic.model_validator(mode="after")
    def _rises(self):
        if self.edges != sorted(set(self.edges)):
            raise ValueError(f"edges = {self.edges} must rise")
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self


class DistillConfig(Section):
    """Traces of teachers from which a student learns most."""

    student: str = Field(description="MODEL that is to learn, and scores the traces")
    domains: dict[Name, TaughtDomain] = Field(
        min_length=1, description="table of a table for each domain"
    )
    out: str = OUT
    resume: Resume = default(
        False, "go on in `out`; `domains` and `selection` may differ, samples and scores stay"
    )
    seed: Seed = default(0, "of sampling, and of what goes beyond a domain's share")
    samples: Count = default(8, "completions of each prompt by each of its teachers")
    mesh: MeshConfig = MeshConfig()
    rollout: EvaluationRolloutConfig = EvaluationRolloutConfig()
    train: TrainConfig = TrainConfig()
    attention: AttentionConfig = AttentionConfig()
    verifiers: VerifiersConfig = VerifiersConfig()
    selection: SelectionConfig = SelectionConfig()

    @pydantic.model_validator(mode="after")
    def _fits(self):
        for domain, taught in self.domains.items():
            for name in taught.teachers:
                if taught.teachers.count(name) > 1:
                    raise ValueError(f"domains.{domain}.teachers: {name!r} is named twice")
        shares = self.selection.shares
        if shares and shares.keys() != self.domains.keys():
            raise ValueError(
                f"selection.shares names {', '.join(shares)}: must name all of domains "
                f"({', '.join(self.domains)}), or none"
            )
        check_rows(self.train, self.rollout)
        return self
