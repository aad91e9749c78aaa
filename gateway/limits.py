"""What a gateway allows itself: how many requests at once, and how many of them it tries again."""

from typing import Final

# Retries that a gateway may make before it has seen enough requests to earn them.
_RESERVE: Final = 10.0


class RetryBudget:
    """Lets retries be at most a share of the requests, so that they can't double an overload."""

    __slots__ = ("_tokens", "ratio")

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio
        self._tokens = _RESERVE

    def earn(self) -> None:
        """A request came in."""
        self._tokens = min(self._tokens + self.ratio, _RESERVE)

    def spend(self) -> bool:
        """Whether one more retry is allowed; if so, it is spent."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Admission:
    """Counts the requests under way, and refuses those over the limit before memory grows."""

    __slots__ = ("inflight", "maximum")

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.inflight = 0

    @property
    def full(self) -> bool:
        """Whether the request that asks, and is counted already, is one too many."""
        return self.inflight > self.maximum
