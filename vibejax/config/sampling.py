"""How completions are sampled."""

from typing import Literal

import pydantic

from vibejax.config.fields import Count, Natural, NotNegative, Positive, Share, default
from vibejax.config_file import Section


class SamplerConfig(Section):
    """How completions are sampled, and by an engine of which sizes."""

    max_prompt_tokens: Count = default(2_048, "a longer prompt is an error that names it")
    max_completion_tokens: Count = default(63_488, "longest completion, stop token included")
    temperature: Positive = default(1.0, "divides the logits; 1 samples the policy itself")
    top_p: Share = default(1.0, "probability mass kept by nucleus sampling")
    top_k: Natural = default(0, "likeliest tokens kept; 0 keeps all")
    min_tokens: Natural = default(0, "before so many tokens no completion stops")
    loop_tokens: Natural = default(
        0, "a completion ends that repeats itself for so many tokens, at most 64 apart; 0: none"
    )
    slots: Count = default(64, "completions decoded at one time, over a host's devices")
    window: Count = default(16, "decode steps between two looks at what has ended")
    page_tokens: Count = default(64, "tokens of a page of keys and values")
    pool_tokens: Natural = default(
        0, "tokens that a host's pages hold; 0: as many as its slots can use or its memory has"
    )
    chunk_tokens: Count = default(
        128,
        "tokens of a prompt computed between two windows; more than a kernel can hold is refused",
    )
    kv_dtype: Literal["compute", "int8"] = default(
        "compute", "of cached keys and values; compute: that of train.dtype"
    )
    tensor: Count = default(1, "devices that share heads and feed-forward width while decoding")
    attention: Literal["auto", "reference", "xla", "tpu", "gpu"] = default(
        "auto", "over pages; see vibejax.attention"
    )

    @pydantic.model_validator(mode="after")
    def _can_stop(self):
        if self.min_tokens > self.max_completion_tokens:
            raise ValueError(
                f"min_tokens = {self.min_tokens} is above max_completion_tokens = "
                f"{self.max_completion_tokens}"
            )
        return self

    @property
    def sequence_tokens(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return self.max_prompt_tokens + self.max_completion_tokens


class EvaluationRolloutConfig(SamplerConfig):
    """How completions are sampled where a policy is judged by them."""

    temperature: NotNegative = default(1.0, "divides the logits; 0 decodes greedily")
    top_p: Share = default(0.95, "probability mass kept by nucleus sampling; the report's: 0.95")
