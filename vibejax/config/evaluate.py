"""What `python -m vibejax.evaluate` reads."""

from typing import Annotated

from pydantic import Field

from vibejax.config.fields import DTYPE, OUT, Count, Dtype, Natural, Resume, Seed, default
from vibejax.config.mesh import MeshConfig
from vibejax.config.sampling import EvaluationRolloutConfig
from vibejax.config.verifiers import VerifiersConfig
from vibejax.config_file import Section


class EvaluationSetConfig(Section):
    """One evaluation set."""

    path: str = Field(description="JSONL, CSV or parquet, in its published layout or ours")
    samples: Natural = default(0, "completions of each problem; 0: the stage's `samples`")


class EvaluateConfig(Section):
    """A checkpoint judged on evaluation sets."""

    policy: str = Field(description="MODEL to judge: HF folder, GGUF file or run folder")
    sets: dict[Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")], EvaluationSetConfig] = Field(
        min_length=1,
        description="table of NAME = {path = JSONL, CSV or parquet, samples = completions of each "
        "problem (0 or none: the stage's `samples`)}",
    )
    out: str = OUT
    resume: Resume = default(False, "go on in `out` with what is not answered yet")
    seed: Seed = default(0, "of sampling")
    samples: Count = default(16, "completions of each problem, where a set does not say")
    dtype: Dtype = DTYPE
    mesh: MeshConfig = MeshConfig()
    rollout: EvaluationRolloutConfig = EvaluationRolloutConfig()
    verifiers: VerifiersConfig = VerifiersConfig()
