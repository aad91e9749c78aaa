"""The trainer: takes runs from the queue, and brings each to its end or back.

python -m trainer.worker --config sluice.toml
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server

from rollout.artifacts import ArtifactStore
from rollout.errors import (
    ConfigError,
    InvalidInputError,
    LeaseLostError,
    RefusedError,
    SluiceError,
    StoreUnavailableError,
    UnservableError,
)
from rollout.runs import RunKind, RunState, TrainingRun
from rollout.settings import Settings, check_section, load_settings
from rollout.stores import Stores, open_stores
from trainer.folders import RunFolders
from trainer.holding import RunInHand
from trainer.settings import TrainerSettings
from trainer.sinks import TrainerMetrics, Watcher, open_sinks
from trainer.stages import Stages

log = logging.getLogger(__name__)


class Worker:
    """One trainer. `serve` until `stopping` is set; what it had in hand then waits anew."""

    def __init__(
        self,
        stores: Stores,
        settings: Settings,
        own: TrainerSettings,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self._stores = stores
        self._own = own
        self._watchers = watchers
        artifacts = ArtifactStore(settings.artifacts_url, cache=settings.data_path / "adapters")
        self._folders = RunFolders(settings.data_path / "runs", artifacts)
        self._stages = Stages(stores, settings, own, artifacts, self._folders)
        self._name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    async def serve(self, stopping: asyncio.Event) -> None:
        """Take one run after the other; a dataset does not wait for a training to end."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve("train", stopping))
            group.create_task(self._serve("dataset", stopping))
            group.create_task(self._serve("evaluation", stopping))

    async def _serve(self, kind: RunKind, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                run = await self._stores.runs.take(self._name, self._own.lease_seconds, kind)
                if run is not None:
                    await self.carry_out(run, stopping)
                    continue
            except LeaseLostError as exc:
                log.warning("%s", exc.message)
            except StoreUnavailableError as exc:
                log.warning("%s; trying again", exc.message)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), self._own.poll_seconds)

    async def carry_out(self, run: TrainingRun, stopping: asyncio.Event) -> None:
        """Bring a run that was just taken to its end, or back to the queue when stopping.

        Raises LeaseLostError where another trainer has taken it over.
        """
        hand = RunInHand(self._stores, run, self._watchers)
        work = asyncio.create_task(self._stages.carry_out(hand))
        lease = asyncio.create_task(hand.keep_lease(self._own.lease_seconds))
        stop = asyncio.create_task(stopping.wait())
        tasks: set[asyncio.Task[Any]] = {work, lease, stop}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # A job that is cancelled saves its state first.
            work.cancel()
            await asyncio.wait({work})
            lease.cancel()
            stop.cancel()
            await asyncio.wait(tasks)
        try:
            await self._conclude(hand, work, lease)
        except LeaseLostError:
            hand.lost()
            raise

    async def _conclude(
        self, hand: RunInHand, work: asyncio.Task[None], lease: asyncio.Task[RunState]
    ) -> None:
        """Say what became of a run whose work was stopped, or failed."""
        failure = None if work.cancelled() else work.exception()
        if not work.cancelled() and failure is None:
            return
        if not lease.cancelled() and (lost := lease.exception()) is not None:
            if not isinstance(lost, StoreUnavailableError):
                raise lost
            failure = failure or lost
        if failure is None:
            await self._stop(hand, None if lease.cancelled() else lease.result())
        else:
            await _fail(hand, failure)
        if hand.run.state == "queued":
            return
        await hand.let_go()
        if hand.run.state != "paused":
            await asyncio.to_thread(self._folders.clear, hand.run)

    async def _stop(self, hand: RunInHand, asked: RunState | None) -> None:
        """`asked` is what somebody wants the run to be; where nobody does, this trainer stops."""
        if asked == "cancelled":
            await hand.advance("cancelled", "cancelled", reason="cancelled on request")
            return
        changes = await self._folders.share(hand.run)
        if asked == "paused":
            await hand.advance("paused", "paused; `sluice runs resume` lets it go on", **changes)
        else:
            said = "the trainer stops; the run waits for the next one"
            await hand.advance("queued", said, **changes)


async def _fail(hand: RunInHand, failure: BaseException) -> None:
    """Raises LeaseLostError, for then another trainer says what becomes of the run."""
    match failure:
        case LeaseLostError():
            raise failure
        case StoreUnavailableError():
            await hand.advance("queued", f"{failure.message}; the run waits for it")
            return
        case UnservableError() | InvalidInputError() | RefusedError():
            await hand.advance("refused", failure.message, reason=failure.message)
            return
        case SluiceError():
            reason = failure.message
        case OSError():
            reason = f"{failure}: make room or mend the permissions, then start the run again"
        case _:
            log.error("run %s failed", hand.run.id, exc_info=failure)
            reason = f"{type(failure).__name__}: {failure}; the trainer's log has more"
    await hand.advance("failed", reason, reason=reason)


async def serve(settings: Settings) -> None:
    """Run a trainer until SIGTERM or SIGINT."""
    own = check_section(TrainerSettings, settings.trainer, "trainer")
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    registry = CollectorRegistry()
    metrics = TrainerMetrics(registry)
    sinks = open_sinks(own.sinks, settings.data_path / "tracking", metrics)
    with metrics_at(own, registry):
        async with open_stores(settings.store_url) as stores:
            log.info("waiting for runs")
            await Worker(stores, settings, own, [metrics, *sinks]).serve(stopping)
        for sink in sinks:
            await asyncio.to_thread(sink.close)


@contextlib.contextmanager
def metrics_at(own: TrainerSettings, registry: CollectorRegistry) -> Iterator[None]:
    """Serve `/metrics` at the port of the configuration, if it has one."""
    if not own.metrics_port:
        yield
        return
    try:
        server, thread = start_http_server(own.metrics_port, own.metrics_host, registry)
    except OSError as exc:
        raise ConfigError(
            f"cannot listen on {own.metrics_host}:{own.metrics_port} ({exc.strerror or exc}): set "
            "another metrics_port under [trainer]",
            param="trainer.metrics_port",
        ) from exc
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.worker")
    parser.add_argument("--config", type=Path)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(load_settings(arguments.config)))
    except SluiceError as exc:
        sys.stderr.write(f"trainer: {exc.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
