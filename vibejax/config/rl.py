"""What `python -m vibejax.rl` reads."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from vibejax.config.fields import (
    DETERMINISTIC,
    EVALUATED_EVERY,
    OUT,
    RESUME,
    WATCHDOG_S,
    Count,
    Natural,
    NotNegative,
    Positive,
    Resume,
    Seed,
    Share,
    default,
)
from vibejax.config.mesh import MeshConfig
from vibejax.config.sampling import SamplerConfig
from vibejax.config.training import (
    AttentionConfig,
    CheckpointConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainConfig,
    check_rows,
)
from vibejax.config.verifiers import VerifiersConfig
from vibejax.config_file import Section


class RolloutConfig(SamplerConfig):
    """The groups of one step."""

    prompts_per_step: Count = default(128, "prompts N drawn for one step")
    group_size: Annotated[int, Field(ge=2)] = default(
        16, "completions G of a prompt, at least 2: advantages compare a group"
    )
    refills: Natural = default(
        0, "times that groups without an advantage make way for others (DAPO's dynamic sampling)"
    )


class ObjectiveConfig(Section):
    """MGPO and what surrounds it (losses/mgpo.py, long2short.py, importance.py)."""

    gamma: NotNegative = default(1.0, "sharpness of MGPO's prompt weights; 0 is GRPO")
    clip_low: Share = default(0.2, "the ratio is clipped below 1 - clip_low")
    clip_high: Positive = default(0.28, "the ratio is clipped above 1 + clip_high")
    updates: Count = default(
        1, "optimizer updates of a step, each on its share of the prompts; the report's RL: 1"
    )
    aggregation: Literal["sequence", "token", "constant"] = default(
        "sequence", "which mean over tokens the loss is: the report's, DAPO's or Dr. GRPO's"
    )
    long2short: NotNegative = default(0.0, "lambda of Long2Short; the report's second stage: 0.2")
    mask_truncated: bool = default(
        False, "leave completions that the limit ended out of the loss (DAPO's overlong filtering)"
    )
    kl: NotNegative = default(0.0, "weight of the KL divergence to the starting policy")
    correction: Literal[
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "geometric_mask",
        "none",
    ] = default("token_truncate", "how the sampler's mismatch is corrected (losses/importance.py)")
    correction_cap: Positive = default(2.0, "largest weight of a truncating correction")
    correction_low: NotNegative = default(0.5, "masking keeps ratios from here ...")
    correction_high: Positive = default(2.0, "... to here")
    max_mean_dlogp: Positive = default(
        0.1,
        "mean |sampler - trainer log-prob| in nats above which the run stops; of rollouts with "
        "top_p, top_k or min_tokens only the canary's is looked at",
    )


class EvalConfig(Section):
    """Held-out evaluation during training."""

    every: Natural = EVALUATED_EVERY
    prompts: Count = default(512, "held-out prompts, the first of the file")
    samples: Count = default(1, "completions of each")
    temperature: NotNegative = default(1.0, "0 decodes greedily")
    top_p: Share = default(1.0, "probability mass kept by nucleus sampling")


class RlConfig(Section):
    """One reinforcement-learning stage."""

    policy: str = Field(description="MODEL to start from: HF folder, GGUF file or run folder")
    prompts: str = Field(description="training prompts, JSONL or parquet")
    heldout: str = default("", "held-out prompts; empty: no evaluation")
    out: str = OUT
    resume: Resume = RESUME
    watchdog_s: NotNegative = WATCHDOG_S
    steps: Count = default(1_000, "optimizer steps")
    seed: Seed = default(0, "of the prompt order and of sampling")
    deterministic: bool = DETERMINISTIC
    drop_solved: bool = default(
        False, "before training, drop prompts whose group is all right or all wrong"
    )
    curriculum_steps: Natural = default(
        0, "steps until all prompts are in use, the records' highest `accuracy` first; 0: at once"
    )
    samples_per_step: Natural = default(4, "completions written to samples.jsonl each step")
    mesh: MeshConfig = MeshConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    attention: AttentionConfig = AttentionConfig()
    verifiers: VerifiersConfig = VerifiersConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()

    @pydantic.model_validator(mode="after")
    def _fits(self):
        check_rows(self.train, self.rollout)
        if self.rollout.prompts_per_step % self.objective.updates:
            raise ValueError(
                f"objective.updates = {self.objective.updates} must divide "
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step}"
            )
        return self
