"""Who answers: a replica of the version, another one, or stable for the candidate."""

import asyncio
from collections.abc import Sequence
from random import getrandbits
from time import perf_counter

from gateway import wire
from gateway.balance import nearest, pick, prompt_prefix, taking_part, weight
from gateway.call import Call
from gateway.errors import NotResidentError, OverloadedError, PromptPlaceError, UpstreamError
from gateway.health import Fleet, Outcome, Replica
from gateway.limits import RetryBudget
from gateway.metrics import Metrics
from gateway.routing import Choice, Served
from gateway.settings import GatewaySettings
from gateway.sse import StreamReader
from gateway.upstream import Response, UpstreamPool
from rollout.errors import EngineUnavailableError, SluiceError, UnavailableError


class Attempt:
    """One request to one replica; `end` gives everything back, once."""

    __slots__ = ("_ended", "first", "reader", "replica", "response", "served", "whole")

    def __init__(self, served: Served, replica: Replica, response: Response) -> None:
        self.served = served
        self.replica = replica
        self.response = response
        self.reader: StreamReader | None = None
        self.first = b""
        self.whole = False
        self._ended = False
        replica.begin()

    def read_stream(self, call: Call) -> StreamReader:
        """From now on the answer is one of events."""
        self.reader = StreamReader(strip_usage=not call.request.wants_usage)
        return self.reader

    def end(self, outcome: Outcome) -> None:
        if not self._ended:
            self._ended = True
            self.response.close()
            self.replica.end(outcome, perf_counter())


class EngineRefusedError(UpstreamError):
    """The engine answered 5xx; that answer is passed on where nothing better is to be had."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__("status", f"the engine answered {attempt.response.status}")
        self.attempt = attempt


class Attempts:
    """Asks for answers, up to the first byte that could go to the client."""

    def __init__(
        self, settings: GatewaySettings, fleet: Fleet, pool: UpstreamPool, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._pool = pool
        self._metrics = metrics
        self._budget = RetryBudget(settings.retry_ratio)

    @property
    def largest(self) -> int:
        """Of an answer that is held until it is whole, in bytes."""
        return self._settings.maximum_answer_bytes

    def configure(self, settings: GatewaySettings) -> None:
        """Go by these from the next request on."""
        self._settings = settings
        self._budget.ratio = settings.retry_ratio
        self._fleet.configure(settings.health, settings.admission.maximum_waiting)
        self._pool.limits = settings.upstream

    def check_room(self, choice: Choice) -> None:
        """Raises OverloadedError where every replica that could answer has too long a queue."""
        if self._has_room(choice.served):
            return
        if choice.fallback is not None and self._has_room(choice.fallback):
            return
        if not self._fleet.available(choice.served.urls, (), perf_counter()):
            # What is down has no queue; the request itself finds out.
            return
        self._metrics.admission_refused(choice.served.version.engine)
        raise OverloadedError("the engines have as much to do as they can: try again in a moment")

    def begin(self, call: Call) -> Attempt | None:
        """The first attempt of a call: its request is sent where a connection is idle. None where
        nobody can be asked, or more than one; `ask` then does what is to be done."""
        self._budget.earn()
        if self._hedges(call):
            return None
        served = call.choice.served
        try:
            attempt = self._begin(call, served, self._replica(call, served, ()))
        except SluiceError:
            return None
        attempt.response.start()
        return attempt

    async def ask(self, call: Call, begun: Attempt | None) -> Attempt:
        """The first answer that can be passed on. Nothing was sent to the client before it."""
        choice = call.choice
        try:
            return await self._ask_version(call, choice.served, begun)
        except (UnavailableError, PromptPlaceError):
            # Any other fault in the body is the client's, and says nothing of the candidate.
            if choice.fallback is None:
                raise
        call.fell_back = True
        self._metrics.fell_back(call.lane.route.name)
        return await self._ask_version(call, choice.fallback, None)

    async def _ask_version(self, call: Call, served: Served, begun: Attempt | None) -> Attempt:
        tried: list[Replica] = []
        while True:
            replica = begun.replica if begun else self._replica(call, served, tried)
            try:
                if begun is None and not tried and self._hedges(call):
                    return await self._hedged(call, served, replica, tried)
                attempt = begun or self._begin(call, served, replica)
                return await self._until_answered(call, attempt)
            except NotResidentError:
                tried.append(replica)
                if not self._may_retry(served, tried):
                    raise
            except UpstreamError as error:
                self._metrics.upstream_error(replica.engine.name, error.reason)
                tried.append(replica)
                if not self._may_retry(served, tried):
                    if isinstance(error, EngineRefusedError) and self._is_last(call, served):
                        return error.attempt
                    raise
            begun = None

    def _hedges(self, call: Call) -> bool:
        return self._settings.hedge.after_seconds is not None and call.request.stream

    async def _attempt(self, call: Call, served: Served, replica: Replica) -> Attempt:
        return await self._until_answered(call, self._begin(call, served, replica))

    async def _hedged(
        self, call: Call, served: Served, replica: Replica, tried: list[Replica]
    ) -> Attempt:
        """The first answer of one replica, or where it keeps us waiting, of another one too.

        The other one joins `tried` at once. It spends what a retry would spend, so that engines
        that are all slow are not asked twice as much.
        """
        asked = [asyncio.create_task(self._attempt(call, served, replica))]
        won: asyncio.Task[Attempt] | None = None
        try:
            await asyncio.wait(asked, timeout=self._settings.hedge.after_seconds)
            if not asked[0].done() and self._may_retry(served, [replica]):
                other = self._replica(call, served, [replica])
                tried.append(other)
                asked.append(asyncio.create_task(self._attempt(call, served, other)))
            sent_at = call.sent_at
            won = await _first_good(asked)
            answer = await won
            # The caller waited from the first question on.
            call.sent_at = sent_at
            if len(asked) > 1:
                self._metrics.hedged(replica.engine.name, won=won is asked[1])
            return answer
        finally:
            await self._call_off(replica.engine.name, [task for task in asked if task is not won])

    async def _call_off(self, engine: str, losers: Sequence[asyncio.Task[Attempt]]) -> None:
        """Stop them on their engines: who was slower than another says nothing of itself."""
        for task in losers:
            task.cancel()
        for outcome in await asyncio.gather(*losers, return_exceptions=True):
            if isinstance(outcome, Attempt):
                outcome.end("unknown")
            elif isinstance(outcome, UpstreamError):
                self._metrics.upstream_error(engine, outcome.reason)

    def _replica(self, call: Call, served: Served, tried: Sequence[Replica]) -> Replica:
        found = self._fleet.available(served.urls, tried, perf_counter())
        if found:
            return self._choose(call, served, found)
        name = served.version.name
        if not served.urls:
            raise NotResidentError(f"no engine serves {name} yet: try again in a moment")
        raise EngineUnavailableError(f"no replica that serves {name} answers: try again")

    def _choose(self, call: Call, served: Served, found: Sequence[Replica]) -> Replica:
        if len(found) == 1:
            return found[0]
        balance = self._settings.balance
        if any(replica.back_since is not None for replica in found):
            now, seconds = perf_counter(), balance.slow_start_seconds
            weights = [weight(replica.back_since, now, seconds) for replica in found]
            found = taking_part(found, weights, getrandbits(32) / 2**32)
        if balance.affinity:
            prefix = prompt_prefix(call.request.body, balance.affinity_characters)
            # Each adapter has a cache of its own, even for the same words.
            return nearest(found, served.name + prefix, balance.affinity_load)
        return pick(found, getrandbits(32))

    def _has_room(self, served: Served) -> bool:
        return self._fleet.has_room(served.urls, perf_counter())

    def _may_retry(self, served: Served, tried: Sequence[Replica]) -> bool:
        return (
            len(tried) == 1
            and bool(self._fleet.available(served.urls, tried, perf_counter()))
            and self._budget.spend()
        )

    def _is_last(self, call: Call, served: Served) -> bool:
        return call.choice.fallback is None or served is call.choice.fallback

    def _begin(self, call: Call, served: Served, replica: Replica) -> Attempt:
        attempt = Attempt(served, replica, self._request(call, served, replica))
        call.sent_at = perf_counter()
        return attempt

    async def _until_answered(self, call: Call, attempt: Attempt) -> Attempt:
        """Ask one replica, up to the first byte that could go to the client.

        A 5xx answer is an UpstreamError; any other status is an answer.
        """
        response, served = attempt.response, attempt.served
        try:
            await response.open()
            if response.status == 200 and is_stream(response):
                await self._first_events(call, attempt)
            else:
                await self._whole_body(attempt)
            call.first_byte_at = perf_counter()
        except UpstreamError:
            attempt.end("failed")
            raise
        except BaseException:
            attempt.end("unknown")
            raise
        if response.status >= 500:
            attempt.end("failed")
            raise EngineRefusedError(attempt)
        adapted = served.version.adapter is not None
        if adapted and response.status == 404 and served.name.strip(b'"') in attempt.first:
            # The name is ours, not the client's: the engine was restarted and forgot the adapter.
            attempt.end("unknown")
            raise NotResidentError(f"the engine does not serve {served.version.name} any more")
        return attempt

    def _request(self, call: Call, served: Served, replica: Replica) -> Response:
        request, path = call.request, call.path
        if served.rewrites:
            body = wire.render(request, served.version, path, ask_usage=True)
        else:
            ask = request.stream and not request.wants_usage and path in wire.USAGE_ON_REQUEST
            body = wire.splice(request, served.name, ask_usage=ask)
        headers = call.engine_headers
        if replica.authorization is not None:
            headers = [*headers, replica.authorization]
        target = wire.engine_path(path).encode()
        if call.query:
            target += b"?" + call.query
        return self._pool.request(replica.url, b"POST", target, headers, body)

    async def _first_events(self, call: Call, attempt: Attempt) -> None:
        reader = attempt.reader or attempt.read_stream(call)
        while not (attempt.first or reader.failed):
            data = await attempt.response.read()
            if not data:
                break
            attempt.first = reader.feed(data)
        if reader.failed:
            raise UpstreamError("error_event", "the engine began its stream with an error")

    async def _whole_body(self, attempt: Attempt) -> None:
        """Hold the answer until it is whole, or until it is too large to be held."""
        parts: list[bytes] = []
        size = 0
        while data := await attempt.response.read():
            parts.append(data)
            size += len(data)
            if size > self.largest:
                break
        else:
            attempt.whole = True
        attempt.first = parts[0] if len(parts) == 1 else b"".join(parts)


async def _first_good(asked: Sequence[asyncio.Task[Attempt]]) -> asyncio.Task[Attempt]:
    """The first of them that has an answer; where none has one, the one that was asked last."""
    pending = set(asked)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in asked:
            if task in done and task.exception() is None:
                return task
    return asked[-1]


def is_stream(response: Response) -> bool:
    content_type = response.header(b"content-type")
    return content_type is not None and content_type.startswith(b"text/event-stream")
