"""How completions are verified."""

from typing import Any

from vibejax.config.fields import Count, Positive, Share, default
from vibejax.config_file import Section


class CodeVerifierConfig(Section):
    """How generated code is run."""

    allow_unsandboxed: bool = default(
        False, "run code with limits alone where neither bubblewrap nor namespaces work"
    )


class VerifiersConfig(Section):
    """The worker processes that verify completions."""

    workers: Count = default(2, "processes")
    limit_s: Positive = default(10.0, "wall clock of one verification, in seconds")
    memory_mb: Count = default(2_048, "address space of one process, in MiB")
    max_failure_rate: Share = default(0.1, "share of verifications that may fail before a stop")
    code: CodeVerifierConfig = CodeVerifierConfig()

    def pool_arguments(self) -> dict[str, Any]:
        """What `verifiers.pool.Pool` takes."""
        return self.model_dump(exclude={"code"}) | {"settings": {"code": self.code.model_dump()}}
