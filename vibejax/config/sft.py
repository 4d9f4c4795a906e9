"""What `python -m vibejax.sft` reads."""

from typing import Literal

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
    default,
)
from vibejax.config.mesh import MeshConfig
from vibejax.config.training import (
    AttentionConfig,
    CheckpointConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainConfig,
)
from vibejax.config_file import Section


class ModelSizes(Section):
    """A model to create from random weights; the vocabulary is the tokenizer's."""

    layers: Count = default(4, "transformer layers")
    width: Count = default(128, "model width")
    heads: Count = default(4, "query heads")
    kv_heads: Count = default(2, "key/value heads; divides `heads`")
    head_dim: Count = default(32, "width of a head, even")
    mlp: Count = default(384, "feed-forward width")
    rope_theta: Positive = default(10_000.0, "base of the rotary wavelengths")
    context: Count = default(512, "positions")

    @pydantic.model_validator(mode="after")
    def _divides(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} must divide heads = {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} must be even: pairs are rotated")
        return self


class SftEvalConfig(Section):
    """The loss on held-out documents during training."""

    every: Natural = EVALUATED_EVERY


class SftConfig(Section):
    """One supervised fine-tuning stage."""

    policy: str = default("", "MODEL to start from; empty: random weights of the sizes in `model`")
    tokenizer: str = default("", "folder of the tokenizer, where the weights are random")
    data: str = Field(description="JSONL or parquet of messages, or of prompt and completion")
    heldout: str = default("", "held-out documents, as `data`; empty: no evaluation")
    out: str = OUT
    resume: Resume = RESUME
    watchdog_s: NotNegative = WATCHDOG_S
    epochs: NotNegative = default(0.0, "passes over `data`, in place of `steps`")
    steps: Natural = default(0, "optimizer steps, in place of `epochs`")
    documents_per_step: Count = default(
        128, "documents of one step; its loss is the mean over all their learnt tokens"
    )
    long_documents: Literal["error", "drop", "truncate"] = default(
        "error", "what becomes of a document longer than train.row_tokens or the model's context"
    )
    context: Natural = default(
        0, "positions of the trained model, written into its config.json; 0: the policy's"
    )
    seed: Seed = default(0, "of the weights and the document order")
    deterministic: bool = DETERMINISTIC
    export_dtype: Literal["float32", "bfloat16", "float16"] = default(
        "bfloat16", "of the weights in `out`/final and `out`/exports"
    )
    export_every: Natural = default(
        0, "steps between HF folders in `out`/exports, for probing, the last one's too; 0: none"
    )
    model: ModelSizes = ModelSizes()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    attention: AttentionConfig = AttentionConfig()
    eval: SftEvalConfig = SftEvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    profile: ProfileConfig = ProfileConfig()

    @pydantic.model_validator(mode="after")
    def _has_a_start(self):
        if not self.policy and not self.tokenizer:
            raise ValueError("policy = '' must name a MODEL, or tokenizer a folder")
        return self

    @pydantic.model_validator(mode="after")
    def _has_a_length(self):
        if bool(self.epochs) == bool(self.steps):
            raise ValueError(
                f"epochs = {self.epochs:g}, steps = {self.steps}: one of the two must be above 0"
            )
        return self
