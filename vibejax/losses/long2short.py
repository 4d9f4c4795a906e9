"""Long2Short: moves reward from long to short correct completions of a group.

Shape suffixes: N prompts, G completions of a prompt. Host arrays, like all that is decided once
for a whole batch.

Source: VibeThinker-3B technical report, section 2.2.2, "Long2Short Math RL".
"""

import numpy as np


def redistribute(
    reward_NG: np.ndarray, correct_NG: np.ndarray, length_NG: np.ndarray, *, strength: float
) -> np.ndarray:
    """Rewards r' = r + strength * (s - mean s) / max |s - mean s|, with s = 1 / length.

    The mean and the maximum run over the correct completions of a group, so each group's
    rewards keep their sum. Incorrect completions, and groups whose correct completions are
    equally long or fewer than two, are left unchanged.

    Args:
        reward_NG: [N, G] float32.
        correct_NG: [N, G] bool.
        length_NG: [N, G] int, completion tokens, at least 1.
        strength: largest shift lambda, in reward units; the report uses 0.2.

    Returns:
        [N, G] float32.
    """
    brevity_NG = 1.0 / length_NG.astype(np.float64)
    count_N1 = np.maximum(correct_NG.sum(axis=1, keepdims=True), 1)
    mean_N1 = (brevity_NG * correct_NG).sum(axis=1, keepdims=True) / count_N1
    shift_NG = (brevity_NG - mean_N1) * correct_NG
    scale_N1 = np.abs(shift_NG).max(axis=1, keepdims=True)
    varies_N1 = scale_N1 > 1e-9 * mean_N1  # below that the spread is rounding
    shift_NG = np.where(varies_N1, strength * shift_NG / np.where(varies_N1, scale_N1, 1.0), 0.0)
    return (reward_NG + shift_NG).astype(np.float32)
