"""When rows leave, and what it costs: rules on what all heads said, and the measures of a rule.

Shapes: N rows, L blocks, C classes. What is said is (N, L, C): by the M = L - 1 heads and, last, by the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

__all__ = ["RULES", "Left", "curve", "hindsight_improvability", "score_at"]


@dataclass(frozen=True)
class Left:
    """Blocks that ran for each row, 1 to L, and its answer, a class id."""

    blocks: np.ndarray
    answers: np.ndarray


def confident(said: np.ndarray, threshold: float) -> Left:
    """Leave where the largest probability is above the threshold; of log-probabilities (N, L, C)."""
    return _first(np.exp(said).max(-1) > threshold, said)


def certain(said: np.ndarray, threshold: float) -> Left:
    """Leave where the entropy, as a share of its maximum log C, is at most 1 - threshold."""
    entropy = -(np.exp(said) * said).sum(-1) / np.log(said.shape[-1])
    return _first(np.minimum(entropy, 1) <= 1 - threshold, said)


def patient(said: np.ndarray, threshold: float) -> Left:
    """Leave where as many heads in a row as the threshold agree with the one before (PABEE)."""
    answers = said.argmax(-1)
    same = np.concatenate([np.zeros((len(said), 1), bool), answers[:, 1:] == answers[:, :-1]], axis=1)
    agreed = np.zeros(len(said), int)
    sure = np.zeros_like(same)
    for m in range(said.shape[1]):
        agreed = np.where(same[:, m], agreed + 1, 0)
        sure[:, m] = agreed >= threshold
    return _first(sure, said)


SHARES = np.concatenate([1 - np.logspace(0, -6, 150), [1.0]])  # sharp ensembles differ in the last digits
# by name, each with the thresholds that trace its curve
RULES: dict[str, tuple[Callable[[np.ndarray, float], Left], np.ndarray]] = {
    "confidence": (confident, SHARES),
    "entropy": (certain, SHARES),
    "patience": (patient, np.arange(0.0, 25.0)),
}


def _first(sure: np.ndarray, said: np.ndarray) -> Left:
    sure = sure.copy()
    sure[:, -1] = True  # the model itself answers whoever is left
    at = sure.argmax(1)
    return Left(at + 1, said[np.arange(len(said)), at].argmax(-1))


def curve(
    said: np.ndarray, labels: np.ndarray, rule: str, score: Callable[[np.ndarray, np.ndarray], float]
) -> list[dict[str, float]]:
    """Score against the mean number of blocks, for all thresholds of a rule.

    Parameters
    ----------
    said : ndarray
        Log-probabilities, shape (N, L, C).
    labels : ndarray
        Class ids, shape (N,).
    rule : str
        A key of `RULES`.
    score : callable
        Of labels and answers.

    Returns
    -------
    list of dict
        "threshold", "blocks", "score"; by rising threshold.
    """
    leave, thresholds = RULES[rule]
    points = [(threshold, leave(said, threshold)) for threshold in thresholds.tolist()]
    return [
        {"threshold": threshold, "blocks": float(left.blocks.mean()), "score": score(labels, left.answers)}
        for threshold, left in points
    ]


def score_at(points: Iterable[dict[str, float]], blocks: float) -> float:
    """The score at a mean number of blocks, between the two nearest points of a curve; NaN outside of it."""
    ordered = sorted((point["blocks"], point["score"]) for point in points)
    known, scores = zip(*ordered, strict=True)
    return float(np.interp(blocks, known, scores, left=np.nan, right=np.nan))


def hindsight_improvability(said: np.ndarray, labels: np.ndarray) -> float:
    """Share of the model's mistakes of which a head before it knew better, 0 to 1; 0 where it makes none.

    Zero Time Waste, arXiv 2106.05409.
    """
    right = said.argmax(-1) == labels[:, None]
    mistakes = ~right[:, -1]
    return float(right[mistakes, :-1].any(1).mean()) if mistakes.any() else 0.0
