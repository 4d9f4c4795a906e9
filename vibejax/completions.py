"""What an engine is asked, what it gives, and what it must not be asked.

Shape suffixes: C tokens of a completion.
"""

import dataclasses
from typing import Literal

import numpy as np

from vibejax.attention import Implementation
from vibejax.config_file import InputError
from vibejax.decode import Sampling
from vibejax.kernels import tiles
from vibejax.qwen2 import ModelConfig

Stop = Literal["stop", "length", "loop", "not_finite"]


class EngineError(InputError):
    """A request or a setting that cannot be used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        model: what decodes.
        slots: sequences that decode at one time, over all devices.
        context: tokens of the longest sequence, prompt and completion; 0: the model's.
        window: decode steps of one call.
        page_tokens: tokens of a page.
        pool_tokens: that the pages of all devices hold; 0: `context` for every slot, or what the
            memory has room for.
        chunk_tokens: of a sequence that are computed between two windows.
        kv_dtype: of keys and values in pages; "compute" is that of the parameters.
        tensor: devices that share heads and feed-forward width.
        attention: over pages, see `vibejax.attention`; `auto` decodes from copies of them
            (`kernels.row_copies`) where there is no kernel.
        memory_bytes: of one device, for all that the engine holds; 0: what it has.
    """

    model: ModelConfig
    slots: int = 32
    context: int = 0
    window: int = 16
    page_tokens: int = 64
    pool_tokens: int = 0
    chunk_tokens: int = 128
    kv_dtype: Literal["compute", "int8"] = "compute"
    tensor: int = 1
    attention: Implementation = "auto"
    memory_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be completed.

    Attributes:
        prompt: its identity among all prompts, for the random draws.
        tokens: of the prompt, at least one.
        max_tokens: longest completion, stop token included.
        samples: how many completions.
        numbers: which of the prompt's completions these are, which decides their draws; empty:
            0 to samples - 1.
    """

    prompt: int
    tokens: tuple[int, ...]
    max_tokens: int
    samples: int = 1
    numbers: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        request: index of its request among those given.
        sample: which of the prompt's completions.
        tokens: [C] int32, the stop token included.
        logprobs: [C] float32, nats, of the distribution sampled from.
        stop: "stop" at a stop token, "length" at the limit, "loop" where it repeats itself,
            "not_finite" where the logits of the next token are not numbers.
        here: whether this process has its tokens and log-probs; zeros stand for those that
            another has.
    """

    request: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    stop: Stop
    here: bool = True

    @property
    def text_ids(self) -> list[int]:
        """The tokens that are text: all but the stop token."""
        return self.tokens[: -1 if self.stop == "stop" else None].tolist()


@dataclasses.dataclass
class Counts:
    """What an engine has done for the latest requests.

    Attributes:
        tokens: drawn and kept.
        slot_steps: rows that decode programs ran with, times their steps.
        windows: how many of these there were.
        filled_tokens: computed before decoding.
        put_back: sequences that lost their pages for a while.
        host_s: seconds of planning windows and of accounting for them.
    """

    tokens: int = 0
    slot_steps: int = 0
    windows: int = 0
    filled_tokens: int = 0
    put_back: int = 0
    host_s: float = 0.0

    def __add__(self, other: "Counts") -> "Counts":
        """Both, one after the other."""
        sums = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*map(sum, sums))


def check_config(config: EngineConfig, parts: int) -> None:
    """Whether an engine of `parts` devices, each with slots of its own, can be made.

    Raises:
        EngineError: a size cannot be used, or the file of VIBEJAX_TILES.
    """
    try:
        tiles.overrides()
    except ValueError as error:
        raise EngineError(str(error)) from None
    for name in ("slots", "window", "page_tokens", "chunk_tokens", "tensor"):
        if getattr(config, name) < 1:
            raise EngineError(f"{name} {getattr(config, name)}: must be at least 1")
    if config.slots % parts:
        raise EngineError(f"slots {config.slots}: must be a multiple of the {parts} devices")
    s = config.page_tokens
    if config.kv_dtype == "int8" and not (s in (1, 2, 4, 8, 16, 32, 64) or s % 128 == 0):
        raise EngineError(
            f"page_tokens {s}: int8 pages must have a power of two at most 64, or a multiple of 128"
        )


def check_sampling(how: Sampling, model: ModelConfig, seed: int, step: int) -> None:
    """Whether tokens can be drawn so.

    Raises:
        EngineError: a value is out of range.
    """
    eos_fit = isinstance(how.eos_ids, tuple) and all(0 <= i < model.vocab for i in how.eos_ids)
    for name, value, holds, rule in (
        # Beyond these a logit becomes infinite, or that of a token which must not be drawn does not
        # lie below all others.
        ("temperature", how.temperature, how.temperature == 0 or 1e-4 <= how.temperature <= 1e4,
         "0 or in [1e-4, 1e4]"),
        ("top_p", how.top_p, 0 < how.top_p <= 1, "in (0, 1]"),
        ("top_k", how.top_k, 0 <= how.top_k < 2**31, "at least 0 and below 2**31"),
        ("min_tokens", how.min_tokens, 0 <= how.min_tokens < 2**31, "at least 0 and below 2**31"),
        ("loop_tokens", how.loop_tokens, how.loop_tokens >= 0, "at least 0"),
        ("eos_ids", how.eos_ids, eos_fit, f"a tuple of ids in [0, {model.vocab})"),
        ("seed", seed, 0 <= seed < 2**32, "at least 0 and below 2**32"),
        ("step", step, 0 <= step < 2**32, "at least 0 and below 2**32"),
    ):  # fmt: skip
        if not holds:
            raise EngineError(f"{name} {value}: must be {rule}")


def check_request(request: Request, context: int, model: ModelConfig) -> None:
    """Whether a prompt can be completed within `context` tokens.

    Raises:
        EngineError: it cannot; the message names the prompt.
    """
    name, length = f"prompt {request.prompt}", len(request.tokens)
    if not length:
        raise EngineError(f"{name}: has no tokens")
    if any(not 0 <= number < 2**32 for number in (request.prompt, *request.numbers)):
        raise EngineError(f"{name}: prompt and numbers must be at least 0 and below 2**32")
    if request.max_tokens < 1 or request.samples < 1:
        raise EngineError(
            f"{name}: max_tokens {request.max_tokens} and samples {request.samples} must be at "
            "least 1"
        )
    if request.numbers and len(request.numbers) != request.samples:
        raise EngineError(
            f"{name}: numbers {request.numbers} must be as many as samples {request.samples}"
        )
    if length + request.max_tokens > context:
        raise EngineError(
            f"{name}: {length} tokens and {request.max_tokens} more are above the context of "
            f"{context}"
        )
    if min(request.tokens) < 0 or max(request.tokens) >= model.vocab:
        raise EngineError(f"{name}: has tokens outside of the vocabulary of {model.vocab}")
