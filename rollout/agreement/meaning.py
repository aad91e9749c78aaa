"""Nearness in meaning: the angle between two embeddings, and what it says of a pair."""

import math
from collections.abc import Sequence

from rollout.agreement.cascade import MOST_FOR_DIFFERENT_TEXTS


def similarity(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine of the angle between them, in [-1, 1]; 0 where either has no direction."""
    lengths = math.hypot(*one) * math.hypot(*other)
    if len(one) != len(other) or not math.isfinite(lengths) or lengths == 0:
        return 0.0
    return max(-1.0, min(1.0, math.fsum(a * b for a, b in zip(one, other, strict=True)) / lengths))


def semantic_score(near: float, agrees_from: float | None) -> float:
    """The agreement of two texts so near; only a route that says from where can make it 1."""
    if agrees_from is not None and near >= agrees_from:
        return 1.0
    return min(MOST_FOR_DIFFERENT_TEXTS, max(0.0, near))
