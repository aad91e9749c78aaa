"""The queue of training runs, their leases and their progress, and the reports they end in."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from time import monotonic

from rollout.errors import LeaseLostError, NotFoundError
from rollout.evidence import Report
from rollout.runs import ENDED, RunEvent, RunKind, RunState, TrainingRun
from rollout.stores import keys
from rollout.stores.codec import decode, encode, milliseconds
from rollout.stores.digests import find
from rollout.stores.link import BLOCK_SECONDS, RedisLink

_MAXIMUM_EVENTS = 5_000
# What becomes of the lease of a run in these states; it is kept in all others.
_LEASES: Mapping[RunState, str] = {"queued": "queue", "paused": "pause"}


class RunStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def enqueue(self, run: TrainingRun) -> None:
        await self._link.run_all(
            [
                ("HSET", keys.RUNS, run.id, encode(run)),
                ("ZADD", keys.runs_queued(run.kind), milliseconds(run.created_at), run.id),
            ]
        )

    async def enqueue_alone(self, run: TrainingRun) -> bool:
        """Enqueue it unless another run of its kind and route is queued, under way or paused."""
        return bool(
            await self._link.script(
                "enqueue_run",
                [
                    keys.RUNS,
                    keys.runs_queued(run.kind),
                    keys.runs_leased(run.kind),
                    keys.RUNS_PAUSED,
                ],
                [run.id, encode(run), milliseconds(run.created_at), run.route],
            )
        )

    async def take(
        self, worker: str, lease_seconds: float, kind: RunKind = "train"
    ) -> TrainingRun | None:
        """Lease the oldest run of the kind that waits, or one whose trainer went silent."""
        taken = await self._link.script(
            "take_run",
            [
                keys.RUNS,
                keys.runs_queued(kind),
                keys.runs_leased(kind),
                keys.RUN_FENCES,
                keys.RUN_FENCE,
                keys.RUN_WORKERS,
            ],
            [int(lease_seconds * 1000), worker],
        )
        if not taken:
            return None
        text, fence = taken
        run = replace(decode(TrainingRun, text), fence=int(fence))
        return await self.renew(run, lease_seconds)

    async def renew(self, run: TrainingRun, lease_seconds: float) -> TrainingRun:
        """The run as it is stored now, with whether somebody asked it to stop.

        Raises LeaseLostError where another trainer has taken it.
        """
        answer = await self._link.script(
            "renew_run",
            [
                keys.RUNS,
                keys.runs_leased(run.kind),
                keys.RUN_FENCES,
                keys.RUNS_CANCELLED,
                keys.RUNS_PAUSED,
            ],
            [run.id, run.fence, int(lease_seconds * 1000)],
        )
        if not answer:
            raise _lost(run)
        text, cancelled, paused = answer
        return replace(
            decode(TrainingRun, text),
            fence=run.fence,
            cancel_requested=bool(cancelled),
            pause_requested=bool(paused),
        )

    async def update(self, run: TrainingRun) -> None:
        """Store the run; one that ended or is paused gives its lease back, a queued one waits anew.

        Raises LeaseLostError where another trainer has taken it.
        """
        lease = "end" if run.state in ENDED else _LEASES.get(run.state, "keep")
        after = replace(run, updated_at=datetime.now(UTC))
        stored = await self._link.script(
            "update_run",
            [
                keys.RUNS,
                keys.runs_queued(run.kind),
                keys.runs_leased(run.kind),
                keys.RUN_FENCES,
                keys.RUNS_PAUSED,
            ],
            [
                run.id,
                run.fence,
                encode(after),
                lease,
                milliseconds(run.created_at),
                encode(replace(after, state="queued")),
            ],
        )
        if not stored:
            raise _lost(run)

    async def note(self, run_id: str, event: RunEvent) -> None:
        """Append a line of progress; of very long runs the oldest lines are dropped."""
        command = ("XADD", keys.run_events(run_id), "MAXLEN", "~", _MAXIMUM_EVENTS, "*")
        await self._link.run(*command, "event", encode(event))

    async def events(
        self, run_id: str, after: str = "0", wait_seconds: float = 0.0
    ) -> list[tuple[str, RunEvent]]:
        """The lines behind position `after`; waits for the first one at most `wait_seconds`."""
        key = keys.run_events(run_id)
        until = monotonic() + wait_seconds
        while True:
            rows = await self._link.run("XRANGE", key, f"({after}", "+", "COUNT", 500)
            left = until - monotonic()
            if rows or left <= 0:
                return [(entry, decode(RunEvent, fields["event"])) for entry, fields in rows]
            block = max(1, int(min(left, BLOCK_SECONDS) * 1000))
            await self._link.run("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", key, after)

    async def get(self, run_id: str) -> TrainingRun:
        text, cancelled, paused = await self._link.run_all(
            [
                ("HGET", keys.RUNS, run_id),
                ("SISMEMBER", keys.RUNS_CANCELLED, run_id),
                ("SISMEMBER", keys.RUNS_PAUSED, run_id),
            ]
        )
        if text is None:
            raise _no_run(run_id)
        return replace(
            decode(TrainingRun, text),
            cancel_requested=bool(cancelled),
            pause_requested=bool(paused),
        )

    async def list(self, route: str | None = None, limit: int = 50) -> list[TrainingRun]:
        """The newest first."""
        table = await self._link.run("HGETALL", keys.RUNS)
        runs = [decode(TrainingRun, text) for text in table.values()]
        runs = [run for run in runs if route in (None, run.route)]
        return sorted(runs, key=lambda run: run.created_at, reverse=True)[:limit]

    async def request_cancel(self, run_id: str) -> None:
        """Ask a run to stop. One that waits or is paused ends here; a trainer stops its own soon."""
        run = await self.get(run_id)
        cancelled = replace(
            run,
            state="cancelled",
            reason="cancelled while it was paused"
            if run.state == "paused"
            else "cancelled before it began",
            updated_at=datetime.now(UTC),
        )
        await self._link.script(
            "cancel_run",
            [
                keys.RUNS,
                keys.runs_queued(run.kind),
                keys.RUNS_CANCELLED,
                keys.RUNS_PAUSED,
                keys.runs_leased(run.kind),
            ],
            [run_id, encode(cancelled)],
        )

    async def request_pause(self, run_id: str) -> bool:
        """Ask a run to pause. One that waits is paused here; a trainer gives its own back soon.

        False where it has ended.
        """
        return await self._pause_or_resume("pause_run", await self.get(run_id), "paused")

    async def resume(self, run_id: str) -> bool:
        """Let a paused run wait for a trainer; False where it is not paused."""
        return await self._pause_or_resume("resume_run", await self.get(run_id), "queued")

    async def _pause_or_resume(self, script: str, run: TrainingRun, state: RunState) -> bool:
        after = replace(run, state=state, pause_requested=False, updated_at=datetime.now(UTC))
        return bool(
            await self._link.script(
                script,
                [
                    keys.RUNS,
                    keys.runs_queued(run.kind),
                    keys.RUNS_PAUSED,
                    keys.runs_leased(run.kind),
                ],
                [run.id, encode(after), milliseconds(run.created_at)],
            )
        )


class ReportStore:
    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def put(self, report: Report) -> None:
        """Immutable: what stands under its id is never replaced."""
        await self._link.run_all(
            [
                ("HSETNX", keys.REPORTS, report.id, encode(report)),
                ("HSET", keys.LATEST_REPORTS, report.version, report.id),
            ]
        )

    async def of(self, version_name: str) -> Report | None:
        """The newest report on a version, or None where it was never evaluated."""
        return (await self.of_many([version_name])).get(version_name)

    async def of_many(self, version_names: Sequence[str]) -> dict[str, Report]:
        """The newest report on each of the versions that were evaluated."""
        if not version_names:
            return {}
        latest = await self._link.run("HMGET", keys.LATEST_REPORTS, *version_names)
        ids = {
            name: report_id
            for name, report_id in zip(version_names, latest, strict=True)
            if report_id
        }
        if not ids:
            return {}
        texts = await self._link.run("HMGET", keys.REPORTS, *ids.values())
        return {name: decode(Report, text) for name, text in zip(ids, texts, strict=True) if text}

    async def get(self, report_id: str) -> Report:
        """By its id, or a beginning of it that no other has."""
        text = await find(self._link, keys.REPORTS, report_id, "report", param="report")
        return decode(Report, text)

    async def list(
        self, route: str | None = None, limit: int = 50, version: str | None = None
    ) -> list[Report]:
        """The newest first."""
        table = await self._link.run("HGETALL", keys.REPORTS)
        reports = [decode(Report, text) for text in table.values()]
        reports = [
            report
            for report in reports
            if route in (None, report.route) and version in (None, report.version)
        ]
        return sorted(reports, key=lambda report: report.created_at, reverse=True)[:limit]


def _lost(run: TrainingRun) -> LeaseLostError:
    return LeaseLostError(f"another trainer has taken run {run.id}: this one stops")


def _no_run(run_id: str) -> NotFoundError:
    return NotFoundError(f"there is no run {run_id!r}; `sluice runs list` shows them", param="run")
