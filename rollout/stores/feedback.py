"""What callers said of answers, by route and trial; and the question who knows a request."""

from collections.abc import Sequence
from typing import Literal

from rollout.exchanges import Feedback
from rollout.stores import keys
from rollout.stores.captures import KEEP_TRIAL_SECONDS
from rollout.stores.codec import decode, encode
from rollout.stores.link import BLOCK_SECONDS, RedisLink

MAXIMUM_FEEDBACK = 100_000
_MAXIMUM_UNCLAIMED = 10_000
_PAGE = 1000


class FeedbackStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def put(self, feedback: Feedback) -> Literal["stored", "already", "full"]:
        """Keep it, if it is the first on its request; it must have a receipt."""
        if feedback.receipt is None:
            raise ValueError("feedback without a receipt belongs to no route")
        receipt = feedback.receipt
        stored = await self._link.script(
            "feedback",
            [keys.feedback(receipt.route, receipt.trial or "")],
            [
                f"{feedback.key}|{feedback.request_id}",
                encode(feedback),
                MAXIMUM_FEEDBACK,
                KEEP_TRIAL_SECONDS,
            ],
        )
        return "stored" if stored == 1 else "already" if stored == 0 else "full"

    async def list(self, route: str, trial: str | None) -> list[Feedback]:
        """The oldest first."""
        table = await self._link.run("HGETALL", keys.feedback(route, trial or ""))
        found = [decode(Feedback, text) for text in table.values()]
        return sorted(found, key=lambda feedback: feedback.given_at)

    async def about(self, route: str, trial: str | None, request_id: str) -> Sequence[Feedback]:
        """What was said of one request, whoever said it. It looks at all of the trial's."""
        literal = "".join(f"\\{sign}" if sign in "*?[]\\^-" else sign for sign in request_id)
        found, cursor = list[Feedback](), "0"
        while True:
            cursor, table = await self._link.run(
                *("HSCAN", keys.feedback(route, trial or ""), cursor),
                *("MATCH", f"*|{literal}", "COUNT", _PAGE),
            )
            found += [decode(Feedback, text) for text in table.values()]
            if str(cursor) == "0":
                return [each for each in found if each.request_id == request_id]

    async def ask_around(self, feedback: Feedback) -> None:
        """Show it to every gateway: one of them may know the request.

        Where it is sent twice, the receipt can be claimed but once.
        """
        command = ("XADD", keys.FEEDBACK_UNCLAIMED, "MAXLEN", "~", _MAXIMUM_UNCLAIMED, "*")
        await self._link.run(*command, "feedback", encode(feedback))

    async def newest(self) -> str:
        """The position behind everything that was asked so far."""
        rows = await self._link.run("XREVRANGE", keys.FEEDBACK_UNCLAIMED, "+", "-", "COUNT", 1)
        return str(rows[0][0]) if rows else "0-0"

    async def asked(self, after: str, wait_seconds: float) -> Sequence[tuple[str, Feedback]]:
        """What was asked behind a position; waits for the first one at most `wait_seconds`."""
        block = max(1, int(min(wait_seconds, BLOCK_SECONDS) * 1000))
        command = ("XREAD", "COUNT", 100, "BLOCK", block, "STREAMS", keys.FEEDBACK_UNCLAIMED)
        answer = await self._link.run(*command, after)
        rows = [row for _, entries in answer or () for row in entries]
        return [(entry, decode(Feedback, fields["feedback"])) for entry, fields in rows]
