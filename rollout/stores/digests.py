"""What is kept in a hash by its digest, found by a beginning of it that no other has."""

from typing import Final

from rollout.errors import NotFoundError
from rollout.stores.link import RedisLink

# Fewer digits are no name: the next thing that is stored may begin with them too.
_FEWEST_DIGITS: Final = 6


async def find(link: RedisLink, key: str, digest: str, noun: str, param: str) -> str:
    """The stored text. Raises NotFoundError, with the `noun` that people and commands know it by."""
    text: str | None = await link.run("HGET", key, digest)
    if text is not None:
        return text
    alike: list[str] = []
    if len(digest) >= _FEWEST_DIGITS:
        alike = [name for name in await link.run("HKEYS", key) if name.startswith(digest)]
    if len(alike) > 1:
        raise NotFoundError(
            f"{len(alike)} {noun}s begin with {digest!r}: give more of the digest", param=param
        )
    # What was there a moment ago may have been erased.
    found: str | None = await link.run("HGET", key, alike[0]) if alike else None
    if found is None:
        raise NotFoundError(
            f"there is no {noun} {digest!r}: `sluice {noun} list` shows them", param=param
        )
    return found
