"""How far two answers to one request agree, and which step of the cascade settled it."""

from rollout.agreement.cascade import (
    MOST_FOR_DIFFERENT_TEXTS,
    Agreement,
    Clock,
    compare,
    compare_exchange,
    compare_twice,
)

__all__ = [
    "MOST_FOR_DIFFERENT_TEXTS",
    "Agreement",
    "Clock",
    "compare",
    "compare_exchange",
    "compare_twice",
]
