"""Kinds of values, and the fields that several stages have word for word."""

from typing import Annotated, Any, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # draws take 32 bits
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Dtype = Literal["float32", "bfloat16"]
Name = Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$", max_length=64)]  # part of a file name
# auto: the same command starts a run and goes on with it, as a pod's does that is started again.
Resume = Literal[False, True, "auto"]


def default(value: Any, meaning: str) -> Any:
    """What a field is where nobody sets it, and what it means."""
    return Field(default=value, description=meaning)


OUT = default("", "run folder; empty: a fresh numbered one under runs/")
RESUME = default(
    False, "go on from the last checkpoint in `out`; auto: if there is a run, else begin it"
)
WATCHDOG_S = default(
    1_800.0,
    "seconds without a window, micro-batch, verdict or compiled program after which the "
    "process ends with an error, as hung; 0: never",
)
DETERMINISTIC = default(
    False, "the same bits each time on GPUs too, more slowly; other devices give them anyway"
)
EVALUATED_EVERY = default(
    0, "steps between evaluations; 0 evaluates only before the first and after the last"
)
DTYPE = default("float32", "of the computation")
