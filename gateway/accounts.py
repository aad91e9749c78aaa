"""What is counted of an exchange, and what is kept of it for the shadow."""

import asyncio
from datetime import UTC, datetime
from time import perf_counter
from typing import Final

from gateway.attempts import Attempt
from gateway.call import Call, HeaderList
from gateway.capture import Captures, Seen
from gateway.errors import UpstreamError
from gateway.evidence import Cell, Evidence, TrialArm
from gateway.metrics import Bound, Metrics
from gateway.quota import Ticket
from gateway.receipts import Known, Receipts
from gateway.routing import Served, wants_capture
from gateway.shapes import Usage
from gateway.wire import EMBEDDINGS
from rollout.assignment import unit_of
from rollout.errors import SluiceError
from rollout.exchanges import Arm
from rollout.versions import Version

# The code under which a request is counted whose client went away; nginx's, for HTTP has none.
CLIENT_GONE: Final = 499


class Accounts:
    """Counts by assigned arm and served version. Nothing here waits for anything."""

    def __init__(
        self, metrics: Metrics, evidence: Evidence, captures: Captures, receipts: Receipts
    ) -> None:
        self._metrics = metrics
        self._evidence = evidence
        self._captures = captures
        self._receipts = receipts
        self._labelled: dict[tuple[str, int, Arm], _Label] = {}

    def open(self, call: Call) -> None:
        """Decide what is counted and kept of the exchange, once its arm is known."""
        trial, route = call.lane.trial, call.lane.route
        if trial is None:
            if route.capture_idle and not call.lane.pinned:
                call.capture = (
                    not call.no_capture
                    and call.path != EMBEDDINGS
                    and wants_capture(call.id, route.capture_idle)
                )
                if call.capture:
                    # No arm needs it, but who asks that their words be erased does.
                    call.unit = unit_of(call.key, call.session or call.request.sticky or call.id)
            return
        arm: TrialArm = "candidate" if call.choice.arm == "candidate" else "stable"
        call.cell = cell = self._evidence.cell(route.name, trial, arm)
        sticky = call.session or call.request.sticky
        call.comes_again = self._evidence.comes_again(sticky, call.id)
        call.first = cell.first(call.unit) if call.comes_again else cell.units
        call.trial = trial.id
        call.capture = (
            not call.no_capture
            and call.path != EMBEDDINGS
            and wants_capture(call.id, route.capture)
        )

    def refused(self, call: Call, code: int) -> None:
        """The request reached no version."""
        if not call.counted:
            self._metrics.refused(code)

    def headers(self, call: Call, served: Served) -> HeaderList:
        """What the client is told of who answered."""
        return self._label(call, served).headers

    def broke(self, call: Call, attempt: Attempt, error: UpstreamError) -> None:
        self._metrics.upstream_error(attempt.replica.engine.name, error.reason)
        attempt.end("failed")
        self.answered(call, attempt, error.status, usage_so_far(attempt))

    def answered(self, call: Call, attempt: Attempt, code: int, usage: Usage | None) -> None:
        """Count an exchange that got an answer. A stream that broke counts under 502, as it would
        have been answered had it broken earlier."""
        call.counted = True
        now = perf_counter()
        total = now - call.started
        first = call.first_byte_at - call.started
        route, choice = call.lane.route, call.choice
        label = self._label(call, attempt.served)
        bound = label.bound
        self._metrics.answered(bound, route.name, attempt.served.version, choice.arm, code)
        bound.duration.observe(total)
        if attempt.reader is not None:
            if attempt.reader.failed:
                self._metrics.upstream_error(attempt.replica.engine.name, "error_event")
            bound.first_token.observe(first)
            if call.pieces > 1:
                bound.inter_token.observe((now - call.first_byte_at) / (call.pieces - 1))
        self._metrics.overhead.observe(call.sent_at - call.started)
        if usage is not None:
            bound.prompt_tokens.add(usage.prompt)
            bound.completion_tokens.add(usage.completion)
        elif attempt.reader is not None:
            # Only the end of a stream says how many there were; a piece is a token or more.
            bound.completion_tokens.add(call.pieces)
        if call.ticket is not None:
            _settle(call, call.ticket, attempt, code, usage)
        self._receipts.note(call.key, call.id, label.known(call, attempt.served.version))
        if call.cell is not None:
            self._count(call, call.cell, total, first if attempt.reader else None, code >= 500)

    def unanswered(self, call: Call, error: BaseException) -> None:
        """Count an exchange that no engine answered."""
        if not isinstance(error, SluiceError | asyncio.CancelledError):
            return
        call.counted = True
        code = error.status if isinstance(error, SluiceError) else CLIENT_GONE
        if call.ticket is not None:
            # An engine may have read the prompt of a client that went away.
            call.ticket.settle(call.ticket.prompt if code == CLIENT_GONE else 0)
        served, route = call.choice.served, call.lane.route
        bound = self._label(call, served).bound
        self._metrics.answered(bound, route.name, served.version, call.choice.arm, code)
        if call.cell is not None:
            total = perf_counter() - call.started
            # The first token of a stream did not come in all this time.
            self._count(call, call.cell, total, total if call.request.stream else None, code >= 500)

    def _count(
        self, call: Call, cell: Cell, total: float, first: float | None, failed: bool
    ) -> None:
        slo = call.lane.route.slo
        failed = failed or call.fell_back
        slow_first = first is not None and slo.ttft_seconds is not None and first > slo.ttft_seconds
        slow_total = slo.total_seconds is not None and total > slo.total_seconds
        tally = cell.tally
        tally.requests += 1
        tally.seconds += total
        tally.errors += failed
        tally.fallbacks += call.fell_back
        tally.slow_first_token += slow_first
        tally.slow_total += slow_total
        if call.first is not None:
            call.first.end(failed=failed, slow_first_token=slow_first, slow_total=slow_total)
        cell.book.dirty = True

    def tee(self, call: Call, data: bytes) -> None:
        call.captured.append(data)
        call.captured_bytes += len(data)
        if call.captured_bytes > self._captures.largest:
            call.capture = False
            call.captured.clear()
            self._captures.too_large()

    def keep(self, call: Call, attempt: Attempt, status: int, body: bytes) -> None:
        stream = attempt.reader is not None
        self._captures.offer(
            Seen(
                request_id=call.id,
                route=call.lane.route.name,
                trial=call.trial,
                arm=call.choice.arm,
                unit=call.unit,
                path=call.path,
                request=call.request.body,
                version=attempt.served.version.number,
                status=status,
                body=body,
                stream=stream,
                ttft_seconds=call.first_byte_at - call.sent_at if stream else None,
                total_seconds=perf_counter() - call.sent_at,
                at=datetime.now(UTC),
            )
        )

    def _label(self, call: Call, served: Served) -> "_Label":
        """Of a version in an arm, made once."""
        version, arm = served.version, call.choice.arm
        key = (version.route, version.number, arm)
        found = self._labelled.get(key)
        if found is None:
            bound = self._metrics.bound(call.lane.route.name, version.name, arm)
            found = self._labelled[key] = _Label(call, version, bound)
        return found


class _Label:
    """What all requests that a version answered in an arm have in common."""

    __slots__ = ("_known", "bound", "headers")

    def __init__(self, call: Call, version: Version, bound: Bound) -> None:
        self.bound = bound
        self.headers: HeaderList = [
            (b"x-sluice-route", call.lane.route.name.encode()),
            (b"x-sluice-version", version.name.encode()),
            (b"x-sluice-arm", call.choice.arm.encode()),
        ]
        self._known: Known = (version, call.choice.arm, call.trial, call.cell, "")

    def known(self, call: Call, version: Version) -> Known:
        """What a receipt says, one object for all that say the same."""
        arm = call.choice.arm
        if call.comes_again:
            return (version, arm, call.trial, call.cell, call.unit)
        known = self._known
        if known[0] is not version or known[3] is not call.cell or known[2] != call.trial:
            known = self._known = (version, arm, call.trial, call.cell, "")
        return known


def _settle(call: Call, ticket: Ticket, attempt: Attempt, code: int, usage: Usage | None) -> None:
    if usage is not None:
        ticket.settle(usage.prompt + usage.completion, usage.completion)
    elif attempt.reader is not None:
        # A piece is a token or more.
        ticket.settle(ticket.prompt + call.pieces)
    else:
        ticket.settle(None if code in (200, CLIENT_GONE) else 0)


def usage_so_far(attempt: Attempt) -> Usage | None:
    return attempt.reader.usage if attempt.reader is not None else None
