"""The newest requests that this worker answered: what feedback and explanations begin with."""

from collections.abc import Sequence
from typing import Final

from gateway.evidence import Cell
from rollout.assignment import unit_of
from rollout.exchanges import Arm, Receipt
from rollout.versions import Version

# The version that answered, the assigned arm, its trial, where it counts, and the unit if it may
# come again.
Known = tuple[Version, Arm, str, Cell | None, str]
# Between a key's id and a request's; neither has it.
_AND: Final = "\x1f"


class Receipts:
    """The newest requests of this worker, by key and request id; at most `maximum` of them.

    A receipt is a string and what all of its kind share, so that the garbage collector has nothing
    to follow.
    """

    __slots__ = ("_half", "_new", "_old", "_rated")

    def __init__(self, maximum: int) -> None:
        # Two halves, of which the older one is let go as a whole: that costs a request nothing.
        self._half = maximum // 2
        self._new: dict[str, Known] = {}
        self._old: dict[str, Known] = {}
        self._rated: set[str] = set()

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def note(self, key: str, request_id: str, known: Known) -> None:
        """A request was answered. One that bears the same id takes the place of the older one."""
        new, place = self._new, key + _AND + request_id
        new[place] = known
        if self._rated:
            self._rated.discard(place)
        if len(new) >= self._half:
            self._old, self._new = new, {}
            self._rated = {each for each in self._rated if each in new}

    def find(self, key: str, request_id: str) -> Known | None:
        place = key + _AND + request_id
        return self._new.get(place) or self._old.get(place)

    def of_request(self, request_id: str) -> Sequence[Receipt]:
        """What is known of requests with this id, whoever asked them. It looks at all of them."""
        found = {
            place: known
            for part in (self._old, self._new)
            for place, known in part.items()
            if place.endswith(_AND + request_id)
        }
        return [
            Receipt(
                version.route,
                version.number,
                arm,
                trial or None,
                unit or unit_of(place.partition(_AND)[0], request_id),
            )
            for place, (version, arm, trial, _, unit) in found.items()
        ]

    def rate(self, key: str, request_id: str) -> bool:
        """Whether this is the first word on the request."""
        place = key + _AND + request_id
        if place in self._rated:
            return False
        self._rated.add(place)
        return True
