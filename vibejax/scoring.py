"""Verdicts to numbers: avg@n, pass@k, maj@n, and how sure they are.

Shape suffixes: N prompts, G completions of a prompt, K numbers of draws from them, 1 to G.
"""

from collections.abc import Sequence

import numpy as np


def pass_curves(correct_N: np.ndarray, samples: int) -> np.ndarray:
    """The chance that one of k completions of a prompt is correct, for every k.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) for c correct of n; k = 1 is avg@n.

    Args:
        correct_N: [N] int, correct completions of each prompt.
        samples: n, completions of each prompt.

    Returns:
        [N, K] float64; column k - 1 is pass@k, K = n.
    """
    # C(n - c, k) / C(n, k) as a product, so that no factorial overflows.
    drawn_K = np.arange(samples)
    wrong_NK = np.maximum((samples - np.asarray(correct_N))[:, None] - drawn_K, 0)
    return 1.0 - np.cumprod(wrong_NK / (samples - drawn_K), axis=1)


def pass_at_k(correct_NG: np.ndarray, k: int) -> float:
    """pass@k as of `pass_curves`, averaged over prompts.

    Args:
        correct_NG: [N, G] bool.
        k: between 1 and G.

    Raises:
        ValueError: k is larger than G.
    """
    n = correct_NG.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}: must be between 1 and the {n} completions of a prompt")
    return float(pass_curves(correct_NG.sum(axis=1), n)[:, k - 1].mean())


def majority_score(clusters: Sequence[Sequence[int]], correct_G: np.ndarray) -> float:
    """The chance that the answer of most completions of a prompt is correct.

    One of the largest clusters is drawn by lot, and one of its completions; those of a cluster
    nearly always have the same verdict.

    Args:
        clusters: completions with the same answer, as `votes.clusters` finds them.
        correct_G: [G] bool.

    Returns:
        0 to 1; 0 where no completion answers.
    """
    most = max(map(len, clusters), default=0)
    shares = [correct_G[list(c)].mean() for c in clusters if len(c) == most]
    return float(np.mean(shares)) if shares else 0.0


def bootstrap_interval(
    value_N: np.ndarray, *, seed: int = 0, draws: int = 2_000
) -> tuple[float, float]:
    """95% interval of the mean over prompts, by resampling prompts.

    Args:
        value_N: [N] float, one value a prompt: its accuracy, or the gain of its accuracy.
        seed: of the resampling.
        draws: resamples.

    Returns:
        The 2.5th and the 97.5th percentile of the resampled means.
    """
    index = np.random.default_rng(seed).integers(0, len(value_N), (draws, len(value_N)))
    low, high = np.percentile(value_N[index].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def heldout_metrics(
    correct_NG: np.ndarray,
    scored_NG: np.ndarray,
    length_NG: np.ndarray,
    truncated_NG: np.ndarray,
) -> dict[str, float]:
    """What a held-out evaluation says, as metrics.

    Args:
        correct_NG: [N, G] bool.
        scored_NG: [N, G] bool, False where the verifier could not say; not correct then.
        length_NG: [N, G] int, completion tokens.
        truncated_NG: [N, G] bool, ended by the limit.
    """
    low, high = bootstrap_interval(correct_NG.mean(axis=1))
    return {
        "heldout/pass@1": pass_at_k(correct_NG, 1),
        "heldout/pass@1_low": low,
        "heldout/pass@1_high": high,
        "heldout/length": float(length_NG.mean()),
        "heldout/truncated": float(truncated_NG.mean()),
        "heldout/unscored": float(1.0 - scored_NG.mean()),
    }
