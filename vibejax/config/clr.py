"""What `python -m vibejax.clr` reads."""

import pydantic
from pydantic import Field

from vibejax.config.fields import (
    DTYPE,
    OUT,
    Count,
    Dtype,
    Natural,
    NotNegative,
    Resume,
    Seed,
    Share,
    default,
)
from vibejax.config.mesh import MeshConfig
from vibejax.config.sampling import EvaluationRolloutConfig
from vibejax.config.verifiers import VerifiersConfig
from vibejax.config_file import Section


class ReplyConfig(Section):
    """How replies to questions about completions are sampled."""

    max_tokens: Count = default(8_192, "longest reply, stop token included")
    temperature: NotNegative = default(1.0, "divides the logits; 0 decodes greedily")
    top_p: Share = default(0.95, "probability mass kept by nucleus sampling")


class ClrConfig(Section):
    """Answers chosen by the reliability of the claims behind them."""

    policy: str = Field(description="MODEL that answers and checks: HF folder, GGUF or run folder")
    prompts: str = Field(description="prompts with a final answer to verify, JSONL or parquet")
    questions: str = default(
        "package:vibejax/clr_questions.toml", "TOML file of what is asked about completions"
    )
    out: str = OUT
    resume: Resume = default(False, "go on in `out`, where `repeats` may differ")
    seed: Seed = default(0, "of sampling; each repeat has draws of its own")
    samples: Count = default(32, "completions K of each prompt")
    claims: Count = default(5, "claims M of each completion")
    repeats: Count = default(8, "times that all of it is done; the results are means over them")
    context: Natural = default(
        0,
        "tokens of the longest sequence, questions about completions included; 0: "
        "rollout.max_prompt_tokens + rollout.max_completion_tokens, which is the least",
    )
    dtype: Dtype = DTYPE
    mesh: MeshConfig = MeshConfig()
    rollout: EvaluationRolloutConfig = EvaluationRolloutConfig()
    extraction: ReplyConfig = ReplyConfig()
    checking: ReplyConfig = ReplyConfig()
    verifiers: VerifiersConfig = VerifiersConfig()

    @property
    def sequence_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return self.context or self.rollout.sequence_tokens

    @pydantic.model_validator(mode="after")
    def _fits(self):
        if self.sequence_tokens < self.rollout.sequence_tokens:
            raise ValueError(
                f"context = {self.context} must be 0 or at least rollout.max_prompt_tokens + "
                f"rollout.max_completion_tokens = {self.rollout.sequence_tokens}"
            )
        return self
