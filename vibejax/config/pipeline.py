"""What `python -m vibejax.pipeline` reads."""

from typing import Annotated, Any

from pydantic import Field

from vibejax.config.fields import default
from vibejax.config_file import Section


class StageConfig(Section):
    """One stage of a pipeline."""

    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")] = Field(
        description="of its folder in the pipeline's; later stages write {name} for that folder"
    )
    run: str = Field(description="the command, as in python -m vibejax.COMMAND")
    config: str = default("", "its configuration, beside the pipeline's; empty: `set` says all")
    set: dict[str, Any] = Field(
        default={}, description="fields that differ from `config` and the pipeline's `defaults`"
    )
    arguments: list[str] = Field(
        default=[], description="of a command that has no configuration; {out} is its own folder"
    )
    evaluate: bool = default(False, "evaluate the model that comes out")


class PipelineConfig(Section):
    """Stages in their order."""

    out: str = Field(description="folder of all stages")
    stages: list[StageConfig] = Field(min_length=1, description="array of tables, see below")
    defaults: dict[str, dict[str, Any]] = Field(
        default={}, description="command -> fields of all its stages; `evaluate` names the sets"
    )
