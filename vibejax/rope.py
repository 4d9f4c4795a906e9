"""Rotary frequencies, plain and scaled: linear, dynamic NTK and YaRN.

Source: RoFormer, arXiv:2104.09864; YaRN, arXiv:2309.00071; the exact forms are those of
transformers' modeling_rope_utils.py, which the parity test pins.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions turn into angles.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: `default`, `linear` (all wavelengths times `factor`), `dynamic` (a larger base once
            a sequence is longer than the checkpoint's context) or `yarn`.
        factor: how many times the context is stretched.
        original_context: yarn: positions that the unscaled model was trained on.
        attention_factor: yarn: multiplies cosines and sines; None takes 0.1 ln(factor) + 1.
        beta_fast: yarn: rotations above which a frequency is kept as it is.
        beta_slow: yarn: rotations below which a frequency is divided by `factor`.
        truncate: yarn: whether the bounds between the two are rounded to whole dimensions.
    """

    theta: float
    kind: Literal["default", "linear", "dynamic", "yarn"] = "default"
    factor: float = 1.0
    original_context: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def inverse_frequencies(
    rope: Rope, head_dim: int, context: int, longest: jax.Array
) -> tuple[jax.Array, float]:
    """Radians per position of each rotated pair, and the factor on cosines and sines.

    Args:
        rope: which scaling.
        head_dim: D.
        context: positions that the checkpoint was made for.
        longest: scalar int32, tokens of the longest sequence at hand; read by `dynamic` alone.
            A key in a cache keeps the angle of the moment it was written, so past `context`
            decoding with `dynamic` differs from a forward pass, as it does in transformers.

    Returns:
        [D/2] float32, and a float.
    """
    exponent_D = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    if rope.kind == "dynamic":
        stretch = jnp.maximum(longest, context).astype(jnp.float32) * (rope.factor / context)
        base = rope.theta * (stretch - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
        return 1.0 / base**exponent_D, 1.0
    plain_D = (1.0 / np.float32(rope.theta) ** exponent_D).astype(np.float32)
    if rope.kind == "linear":
        return jnp.asarray(plain_D / np.float32(rope.factor)), 1.0
    if rope.kind == "default":
        return jnp.asarray(plain_D), 1.0
    low, high = _yarn_bounds(rope, head_dim, context)
    ramp_D = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequency_D = plain_D / np.float32(rope.factor) * ramp_D + plain_D * (1 - ramp_D)
    scale = rope.attention_factor
    if scale is None:
        scale = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return jnp.asarray(frequency_D.astype(np.float32)), scale


def _yarn_bounds(rope: Rope, head_dim: int, context: int) -> tuple[float, float]:
    """The pairs between which YaRN goes over from kept to divided frequencies."""
    original = rope.original_context or context

    def pair(rotations: float) -> float:
        wavelengths = original / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else high + 0.001
