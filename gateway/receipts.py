"""The newest requests that this worker answered: what feedback and explanations begin with."""

from collections.abc import Sequence

from gateway.evidence import Cell
from rollout.assignment import unit_of
from rollout.exchanges import Arm, Receipt
from rollout.versions import Version

# The version that answered, the assigned arm, its trial, where it counts, and the unit if it may
# come again.
_Known = tuple[Version, Arm, str, Cell | None, str]


class Receipts:
    """The newest requests of this worker, by key and request id; at most `maximum` of them."""

    __slots__ = ("_half", "_new", "_old", "_rated")

    def __init__(self, maximum: int) -> None:
        # Two halves, of which the older one is let go as a whole: that costs a request nothing.
        self._half = maximum // 2
        self._new: dict[tuple[str, str], _Known] = {}
        self._old: dict[tuple[str, str], _Known] = {}
        self._rated: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def note(
        self,
        key: str,
        request_id: str,
        version: Version,
        arm: Arm,
        trial: str,
        cell: Cell | None,
        unit: str,
    ) -> None:
        """A request was answered. One that bears the same id takes the place of the older one."""
        new, place = self._new, (key, request_id)
        new[place] = (version, arm, trial, cell, unit)
        if self._rated:
            self._rated.discard(place)
        if len(new) >= self._half:
            self._old, self._new = new, {}
            self._rated = {each for each in self._rated if each in new}

    def find(self, key: str, request_id: str) -> _Known | None:
        place = (key, request_id)
        return self._new.get(place) or self._old.get(place)

    def of_request(self, request_id: str) -> Sequence[Receipt]:
        """What is known of requests with this id, whoever asked them. It looks at all of them."""
        found = {
            place: known
            for part in (self._old, self._new)
            for place, known in part.items()
            if place[1] == request_id
        }
        return [
            Receipt(version.route, version.number, arm, trial or None, unit or unit_of(*place))
            for place, (version, arm, trial, _, unit) in found.items()
        ]

    def rate(self, key: str, request_id: str) -> bool:
        """Whether this is the first word on the request."""
        if (key, request_id) in self._rated:
            return False
        self._rated.add((key, request_id))
        return True
