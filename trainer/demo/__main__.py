"""Run the demo: on the system that runs, or on one that it starts and stops itself."""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from time import monotonic, sleep

import httpx2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rollout.client import ControlClient
from rollout.errors import SluiceError, UnavailableError
from rollout.settings import Settings, check_section, load_settings
from trainer.demo.application import Application
from trainer.demo.results import Results
from trainer.demo.sentences import read_sentences
from trainer.demo.story import Scale, Story
from trainer.evaluate import Gateway
from trainer.settings import TrainerSettings, gateway_address, gateway_key

_START_SECONDS = 900.0
_STOP_SECONDS = 60.0
_FILE_COLUMNS = 120


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sluice demo", description=__doc__)
    parser.add_argument("--config", type=Path, help="the configuration file (sluice.toml)")
    parser.add_argument("--route", default="review-triage", help="the route to drive")
    for field in fields(Scale):
        name = f"--{field.name}"
        parser.add_argument(name, type=int, default=field.default, help="(default %(default)s)")
    options = parser.parse_args(arguments)
    scale = Scale(**{field.name: getattr(options, field.name) for field in fields(Scale)})
    console = _console()
    try:
        settings = load_settings(options.config)
        with _running(settings, options.config, console):
            _wait_for_answer(settings, options.route)
            results, promoted = _tell(settings, options.route, scale, console)
    except SluiceError as exc:
        print(f"sluice demo: {exc.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sluice demo: stopped; what was labelled and trained so far is kept", file=sys.stderr)
        return 1
    console.print()
    console.print(results.render())
    return 0 if promoted else 1


def _console() -> Console:
    """The terminal, or a file that is wide enough for the table."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_COLUMNS)


def _tell(settings: Settings, route: str, scale: Scale, console: Console) -> tuple[Results, bool]:
    sentences = read_sentences(settings.data_path / "samples" / "reviews.jsonl")
    own = check_section(TrainerSettings, settings.trainer, "trainer")
    url, key = gateway_address(settings, own), gateway_key(settings, own)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with (
        asyncio.Runner() as runner,
        ControlClient(control_url(settings), key) as control,
        progress,
    ):
        people_key = control.create_key("readers", ["label"], [route])
        application_key = control.create_key("application", ["infer"], [route])
        application = Application(url, application_key.secret, route)
        with ControlClient(control_url(settings), people_key.secret) as labelers:
            story = Story(
                route=route,
                control=control,
                labelers=labelers,
                gateway=Gateway(url, key),
                application=application,
                runner=runner,
                sentences=sentences,
                data=settings.data_path,
                scale=scale,
                progress=progress,
            )
            try:
                promoted = _in_order(story)
            finally:
                runner.run(application.close())
                for made in (people_key, application_key):
                    control.revoke_key(made.key.id)
        return story.results, promoted


def _in_order(story: Story) -> bool:
    story.begin()
    story.try_prompt()
    adapter = story.train()
    if adapter is None or not story.roll_out(adapter):
        return False
    story.spoil(adapter)
    return True


@contextmanager
def _running(settings: Settings, config: Path | None, console: Console) -> Iterator[None]:
    """The system that runs already, or one that is started for the demo and stopped after it."""
    if _ready(settings):
        yield
        return
    console.print("Nothing runs yet, so the demo starts Sluice itself.")
    command = [sys.executable, "-m", "rollout.up"]
    if config is not None:
        command += ["--config", str(config)]
    process = subprocess.Popen(command, start_new_session=True, env=dict(os.environ))
    try:
        until = monotonic() + _START_SECONDS
        while not _ready(settings):
            if process.poll() is not None:
                raise UnavailableError("Sluice did not start; its own message stands above")
            if monotonic() > until:
                raise UnavailableError(f"Sluice was not ready after {_START_SECONDS:.0f} s")
            sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(_STOP_SECONDS)


def _wait_for_answer(settings: Settings, route: str) -> None:
    """Wait until the route answers: the engine may still be loading its model, and of a route that
    the controller has just created the gateway may not have heard.

    Raises UnavailableError with what the gateway says where it does not in time.
    """
    own = check_section(TrainerSettings, settings.trainer, "trainer")
    question = {
        "model": route,
        "messages": [{"role": "user", "content": "Are you there?"}],
        "max_tokens": 1,
    }
    headers = {
        "authorization": f"Bearer {gateway_key(settings, own)}",
        "x-sluice-no-capture": "1",
    }
    url = f"{gateway_address(settings, own)}/v1/chat/completions"
    until = monotonic() + _START_SECONDS
    while True:
        answer = httpx2.post(url, json=question, headers=headers, timeout=120)
        if answer.status_code == 200:
            return
        if answer.status_code not in (404, 503) or monotonic() > until:
            raise UnavailableError(f"{route} does not answer: {answer.text}")
        sleep(0.5)


def _ready(settings: Settings) -> bool:
    own = check_section(TrainerSettings, settings.trainer, "trainer")
    try:
        return all(
            httpx2.get(f"{url}/readyz", timeout=2).status_code == 200
            for url in (gateway_address(settings, own), control_url(settings))
        )
    except httpx2.HTTPError:
        return False


def control_url(settings: Settings) -> str:
    host = settings.controller.host
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 (compared, not bound)
    return f"http://{host}:{settings.controller.port}"


if __name__ == "__main__":
    sys.exit(main())
