"""`sluice up`: every role on one machine, with a store and an engine brought along."""

import argparse
import asyncio
import contextlib
import fcntl
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic

import httpx2

from rollout.errors import ConfigError, SluiceError
from rollout.processes import Service, Supervisor
from rollout.services import Plan, make_folder, make_plan, services
from rollout.settings import Settings, bootstrap_key, load_settings

_PATIENCE_SECONDS = 5.0
_READY_TIMEOUT_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sluice up", description=__doc__)
    parser.add_argument("--config", type=Path, help="the configuration file (sluice.toml)")
    options = parser.parse_args(arguments)
    try:
        return asyncio.run(_run(load_settings(options.config)))
    except SluiceError as exc:
        print(f"sluice up: {exc.message}", file=sys.stderr)
        return 1


async def _run(settings: Settings) -> int:
    data = settings.data_path
    make_folder(data)
    with _only_one(data):
        stop = asyncio.Event()
        hurry = asyncio.Event()
        _on_signals(stop, hurry)
        supervisor = Supervisor(data / "run", _say)
        supervisor.end_leftovers()
        plan = make_plan(settings)
        names: list[str] = []
        try:
            starting = asyncio.ensure_future(_start(plan, supervisor, names))
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                _greet(plan)
                await stopping
            else:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            _say("sluice", "stopping; press Ctrl-C again to cut what still runs")
        finally:
            # The gateway first, so that nothing is accepted which nobody could answer; the
            # store last, so that everyone can still write down what they know.
            for name in sorted(names, key=_stop_order):
                await _stop(supervisor, name, hurry)
        _say("sluice", f"stopped; everything is kept in {data}")
    return 0


async def _start(plan: Plan, supervisor: Supervisor, names: list[str]) -> None:
    """Start all services, the store first; `names` grows as they are started."""
    async with httpx2.AsyncClient(timeout=_READY_TIMEOUT_SECONDS) as client:
        planned = list(services(plan, client))
        for service in planned:
            names.append(service.name)
            await supervisor.start(service)
            if service.name == "store":
                await _wait(supervisor, service)
        if plan.store_port is None:
            _say("store", f"using {plan.store_url}")
        await asyncio.gather(
            *(_wait(supervisor, service) for service in planned if service.name != "store")
        )


async def _wait(supervisor: Supervisor, service: Service) -> None:
    began = monotonic()
    waiting = asyncio.ensure_future(supervisor.wait_ready(service.name))
    try:
        while not (await asyncio.wait({waiting}, timeout=_PATIENCE_SECONDS))[0]:
            _say(service.name, f"starting, {monotonic() - began:.0f} s so far")
        _say(service.name, f"ready after {waiting.result():.1f} s")
    finally:
        waiting.cancel()


async def _stop(supervisor: Supervisor, name: str, hurry: asyncio.Event) -> None:
    stopping = asyncio.ensure_future(supervisor.stop(name, now=hurry.is_set()))
    hurrying = asyncio.ensure_future(hurry.wait())
    await asyncio.wait({stopping, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done() and name != "store":
        supervisor.kill(name)
    await stopping
    hurrying.cancel()
    _say(name, "stopped")


def _stop_order(name: str) -> int:
    order = ("gateway", "shadow", "trainer", "controller")
    if name == "store":
        return len(order) + 1
    return order.index(name) if name in order else len(order)


def _greet(plan: Plan) -> None:
    route = plan.settings.routes[0].name if plan.settings.routes else "ROUTE"
    print(
        f"""
Sluice is up.

  endpoint   {plan.gateway_url}/v1      for applications, OpenAI-compatible
  console    {plan.control_url}         rollouts, cases to label, training runs
  API        {plan.control_url}/docs    the same for programs
  key        {plan.key}
             ({_kept(plan)})

Three things to try, in another terminal:

  1. Ask it something:
     curl {plan.gateway_url}/v1/chat/completions -H 'Authorization: Bearer {plan.key}' \\
       -H 'Content-Type: application/json' \\
       -d '{{"model": "{route}", "messages": [{{"role": "user", "content": "It broke on day one."}}]}}'
  2. See what is served:          .venv/bin/sluice rollout status {route}
  3. Watch the whole loop run:    .venv/bin/sluice demo

Ctrl-C stops everything; nothing is lost.
""",
        flush=True,
    )


def _kept(plan: Plan) -> str:
    if bootstrap_key() is not None:
        return "from SLUICE_BOOTSTRAP_KEY"
    return f"kept in {plan.settings.data_path / 'bootstrap.key'}"


def _say(name: str, message: str) -> None:
    print(f"{name:<11} {message}", flush=True)


def _on_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """The first signal stops in good order, the second one at once."""

    def received() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, received)


@contextlib.contextmanager
def _only_one(data: Path) -> Iterator[None]:
    """Hold the data directory; raises ConfigError where another `sluice up` does."""
    with (data / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise ConfigError(
                f"another `sluice up` already runs on {data}: stop it, or set another data_dir"
            ) from exc
        yield


if __name__ == "__main__":
    sys.exit(main())
