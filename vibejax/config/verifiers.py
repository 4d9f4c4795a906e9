"""How completions are verified."""

from typing import Annotated, Any

from pydantic import Field

from vibejax.config.fields import Count, Share, default
from vibejax.config_file import Section

_RETRIES_S = 120.0  # what the pool's clock leaves a judgement beyond its own limit


class CodeVerifierConfig(Section):
    """How generated code is run."""

    allow_unsandboxed: bool = default(
        False, "run code with limits alone where neither bubblewrap nor namespaces work"
    )


class JudgeVerifierConfig(Section):
    """What one judgement of rubric and math_judge may take of the endpoint VIBEJAX_JUDGE_URL."""

    timeout_s: Annotated[float, Field(gt=0, le=3_000)] = default(
        60.0, "seconds of a judgement: its wait for a free request, all its attempts"
    )
    concurrency: Annotated[int, Field(ge=1, le=1_024)] = default(
        8, "requests in flight from all processes of a host"
    )
    max_tokens: Annotated[int, Field(ge=1, le=10**6)] = default(
        2_048, "of the judge's answer, thinking included"
    )


class VerifiersConfig(Section):
    """The worker processes that verify completions."""

    workers: Count = default(2, "processes")
    limit_s: Annotated[float, Field(gt=0, le=3_600)] = default(
        10.0,
        "seconds of a verification by math, choice or instruct; others have their own",
    )
    memory_mb: Annotated[int, Field(ge=256)] = default(
        2_048, "address space of one process, in MiB"
    )
    max_failure_rate: Share = default(0.1, "share of verifications that may fail before a stop")
    code: CodeVerifierConfig = CodeVerifierConfig()
    judge: JudgeVerifierConfig = JudgeVerifierConfig()

    def pool_arguments(self) -> dict[str, Any]:
        """What `verifiers.pool.Pool` takes."""
        judge = self.judge.model_dump()
        limit_s = self.judge.timeout_s + _RETRIES_S
        return self.model_dump(exclude={"code", "judge"}) | {
            "limits_s": {"rubric": limit_s, "math_judge": limit_s},
            "settings": {"code": self.code.model_dump(), "rubric": judge, "math_judge": judge},
        }
