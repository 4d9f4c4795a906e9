"""What `python -m vibejax.probe` reads."""

import pydantic
from pydantic import Field

from vibejax.config.fields import DTYPE, OUT, Count, Dtype, Name, Resume, Seed, default
from vibejax.config.mesh import MeshConfig
from vibejax.config.sampling import EvaluationRolloutConfig
from vibejax.config.verifiers import VerifiersConfig
from vibejax.config_file import Section


class ProbeConfig(Section):
    """Scores of checkpoints on the probing sets of domains."""

    checkpoints: list[str] = Field(
        min_length=1,
        description="MODELs to score, in the order of their training; * matches folders",
    )
    domains: dict[Name, str] = Field(
        min_length=1, description="table of a probing set for each domain, JSONL or parquet"
    )
    out: str = OUT
    resume: Resume = default(
        False, "go on in `out`; `checkpoints` and `domains` may differ, scores that it has stay"
    )
    seed: Seed = default(0, "of sampling; all checkpoints get the same draws")
    samples: Count = default(16, "completions of each prompt")
    k: Count = default(8, "a domain's specialist has the highest pass@k; at most `samples`")
    dtype: Dtype = DTYPE
    mesh: MeshConfig = MeshConfig()
    rollout: EvaluationRolloutConfig = EvaluationRolloutConfig()
    verifiers: VerifiersConfig = VerifiersConfig()

    @pydantic.model_validator(mode="after")
    def _fits(self):
        for name in self.checkpoints:
            if self.checkpoints.count(name) > 1:
                raise ValueError(f"checkpoints: {name!r} is named twice")
        if self.k > self.samples:
            raise ValueError(f"k = {self.k} must be at most samples = {self.samples}")
        return self
