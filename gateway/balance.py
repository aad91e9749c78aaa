"""Which of the replicas that serve a version gets the next request."""

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Loaded(Protocol):
    """Anything with requests under way."""

    @property
    def inflight(self) -> int: ...


R = TypeVar("R", bound=Loaded)


def pick(replicas: Sequence[R], chance: int) -> R:
    """The less busy of two replicas that `chance` names.

    Two choices get nearly all of the gain of looking at every one, and no herd: gateways that know
    only their own load don't all run to the same replica. `chance` is any whole number from 0,
    evenly distributed over a range much larger than the number of replicas squared.
    """
    count = len(replicas)
    if count == 1:
        return replicas[0]
    first = chance % count
    second = (first + 1 + chance // count % (count - 1)) % count
    one, other = replicas[first], replicas[second]
    return other if other.inflight < one.inflight else one
