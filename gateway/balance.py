"""Which of the replicas that serve a version gets the next request."""

import hashlib
import math
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

# Where a prompt stands in a body, by the endpoint's own word for it.
_PROMPTS: Final = (b'"messages"', b'"input"', b'"prompt"')
# A replica that has just come back gets a little, or it would never be found to be slow or broken.
_LEAST: Final = 0.1


class Loaded(Protocol):
    """Anything with requests under way."""

    @property
    def inflight(self) -> int: ...


class Placed(Loaded, Protocol):
    """One that is known by its address too."""

    @property
    def url(self) -> str: ...


R = TypeVar("R", bound=Loaded)
P = TypeVar("P", bound=Placed)
T = TypeVar("T")


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


def weight(back_since: float | None, now: float, seconds: float) -> float:
    """The share of its part that a replica takes, which rises to 1 within `seconds` of its coming
    back: its caches are cold, and its kernels may have to be compiled yet."""
    if back_since is None or now - back_since >= seconds:
        return 1.0
    return max((now - back_since) / seconds, _LEAST)


def taking_part(replicas: Sequence[T], weights: Sequence[float], chance: float) -> list[T]:
    """The replicas that may get this request: each one in as many of all cases as its weight says,
    and always the heaviest. `chance` is evenly distributed over [0, 1).

    Leaving a replica out of some choices bounds its share by its weight at any load. Comparing
    loads divided by weights would not: an idle replica compares as the less busy at any weight.
    """
    bar = chance * max(weights)
    return [
        replica for replica, weight in zip(replicas, weights, strict=True) if weight > bar
    ] or list(replicas)


def prompt_prefix(body: bytes, characters: int) -> bytes:
    """How the prompt begins, as it is written in the body; b"" where there is none.

    It is looked for and not parsed. A body that says `"messages"` somewhere else first is placed by
    what follows there, which costs it nothing but a cache.
    """
    for name in _PROMPTS:
        if (found := body.find(name)) >= 0:
            # At most four bytes are one character; one that is cut in two counts for nothing.
            part = body[found : found + 4 * characters + len(name)]
            return part.decode(errors="ignore")[: characters + len(name)].encode()
    return b""


def nearest(replicas: Sequence[P], key: bytes, load: float) -> P:
    """The first in the key's own order of replicas that has not more under way than `load` times
    the mean (from 1), rounded up.

    The order is by rendezvous hashing (Thaler and Ravishankar, 1998): it is the same in every
    gateway, and a replica that comes or goes moves only the keys that it has. The bound on loads is
    that of Mirrokni, Thorup and Zadimoghaddam (2018): a prompt that everybody uses spreads.
    """
    most = math.ceil(load * sum(replica.inflight for replica in replicas) / len(replicas))
    roomy = [replica for replica in replicas if replica.inflight <= most]
    return max(roomy, key=lambda replica: _closeness(replica.url, key))


def _closeness(url: str, key: bytes) -> bytes:
    return hashlib.blake2b(url.encode() + b"\0" + key, digest_size=8).digest()
