"""How documents become rows, rows gradients, and gradients updates; what is kept."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from vibejax.config.fields import Count, Dtype, Natural, NotNegative, Positive, default
from vibejax.config.sampling import SamplerConfig
from vibejax.config_file import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW with warm-up, gradient clipping and a schedule."""

    learning_rate: Positive = default(1e-6, "peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = default(
        "constant", "course of the learning rate after warm-up, down to `final_learning_rate`"
    )
    final_learning_rate: NotNegative = default(
        0.0, "where the schedule ends, a step after the last"
    )
    warmup: Annotated[float, Field(ge=0, le=1)] = default(
        0.0, "share of all steps over which the rate rises from 0"
    )
    beta1: Decay = default(0.9, "decay of the mean gradient")
    beta2: Decay = default(0.999, "decay of the mean square")
    epsilon: Positive = default(1e-8, "added to the root of the mean square")
    weight_decay: NotNegative = default(0.0, "decoupled decay of matrices; biases and norms: none")
    clip_norm: Positive = default(1.0, "largest global norm of the gradient")


class TrainConfig(Section):
    """How documents become rows and rows become gradients; `dtype` alone changes the result."""

    row_tokens: Count = default(
        65_536, "tokens of a packed row; mesh.context cuts it in multiples of 512, or in less"
    )
    microbatch_rows: Count = default(
        1, "rows of one backward pass, a multiple of mesh.data x mesh.fsdp"
    )
    remat: Literal["none", "full", "attention", "offload"] = default(
        "none", "what is recomputed in the backward pass; see qwen2.hidden_states"
    )
    dtype: Dtype = default("float32", "of the computation; masters and sums are float32 anyway")


class AttentionConfig(Section):
    """How attention is computed; no choice here changes the result."""

    implementation: Literal[
        "auto", "reference", "xla", "tpu", "gpu", "tpu_interpreted", "gpu_interpreted"
    ] = default("auto", "over packed rows; see vibejax.attention")


class CheckpointConfig(Section):
    """What is kept to go on from."""

    every: Count = default(20, "steps between checkpoints; the last step is always saved")
    keep: Count = default(2, "newest checkpoints kept")
    keep_every: Natural = default(
        0, "steps between checkpoints that are kept for good, a multiple of `every`; 0: none are"
    )

    @pydantic.model_validator(mode="after")
    def _divides(self):
        if self.keep_every % self.every:
            raise ValueError(
                f"keep_every = {self.keep_every} must be a multiple of every = {self.every}"
            )
        return self


class ProfileConfig(Section):
    """What the profiler records."""

    steps: list[Count] = default([], "steps whose traces go to `profile` in the run folder")


def check_rows(train: TrainConfig, rollout: SamplerConfig) -> None:
    """Checks that each sampled sequence fits a row.

    Raises:
        ValueError: the longest does not.
    """
    if train.row_tokens < rollout.sequence_tokens:
        raise ValueError(
            f"train.row_tokens = {train.row_tokens} must be at least "
            f"rollout.max_prompt_tokens + rollout.max_completion_tokens = {rollout.sequence_tokens}"
        )
