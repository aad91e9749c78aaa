"""The trainer's own section of the configuration, `[trainer]`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from rollout.errors import ConfigError
from rollout.settings import Section, Settings


class ExternalSettings(Section):
    """`[trainer.external]`: the command of runs with backend = "external".

    command: what to run, with places for the run's files; see docs/training.md.
    seconds: how long it may take.
    memory_gb: memory of its own for each of its processes; 0 is no limit.
    log_mb: how much it may write to its log.
    """

    command: str = ""
    seconds: float = Field(86_400.0, gt=0)
    memory_gb: float = Field(0.0, ge=0)
    log_mb: float = Field(100.0, gt=0)


class PriceSettings(Section):
    """`[trainer.prices.ENGINE]`: what an engine's answers cost.

    prompt, completion: a million tokens of either kind.
    second: a second of an answer, as a share of a GPU has its price.
    unit: what the numbers are in.
    """

    prompt: float = Field(0.0, ge=0)
    completion: float = Field(0.0, ge=0)
    second: float = Field(0.0, ge=0)
    unit: str = "USD"


class TrainerSettings(Section):
    """
    models: where the base that an engine serves under a name lies on this machine; paths are
        relative to the configuration file. A base that is not named is looked for in
        `models/NAME` below the data directory.
    suites: the evaluation suite of a route, else `suites/ROUTE.jsonl` below the data directory,
        else the newest suite that was registered for it, else the held-out part of its dataset.
    prices: what answers cost, by the name of the engine that gives them.
    threads: cores that a run uses; 0 is all of them.
    gpus: how many share a run; more than one needs as many in this machine.
    nice: added to a run's niceness, so that what serves on the same machine comes first.
    metrics_port: where Prometheus finds the trainer's own metrics; 0 is nowhere.
    sinks: experiment trackers that are told how each run goes.
    load_seconds: how long the controller and the engines may take to load an adapter.
    tolerance: how far (in nats, on average over the probed tokens) the engine's log-probabilities
        may lie from the trainer's whatever the engine's base does; more is allowed where that shows
        the rounding of bfloat16.
    """

    models: Mapping[str, Path] = Field(default_factory=dict)
    suites: Mapping[str, Path] = Field(default_factory=dict)
    prices: Mapping[str, PriceSettings] = Field(default_factory=dict)
    gateway_url: str | None = None
    key: str | None = None
    external: ExternalSettings = Field(default_factory=ExternalSettings)
    threads: int = Field(0, ge=0)
    gpus: int = Field(1, ge=1, le=16)
    nice: int = Field(5, ge=0, le=19)
    poll_seconds: float = Field(1.0, gt=0)
    lease_seconds: float = Field(30.0, gt=1)
    checkpoint_seconds: float = Field(60.0, gt=0)
    load_seconds: float = Field(180.0, gt=0)
    concurrency: int = Field(8, ge=1)
    metrics_port: int = Field(0, ge=0, le=65535)
    metrics_host: str = "127.0.0.1"
    sinks: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    tolerance: float = Field(0.002, gt=0)


def model_path(settings: Settings, own: TrainerSettings, base: str) -> Path:
    named = own.models.get(base)
    return settings.data_path / "models" / base if named is None else settings.folder / named


def suite_path(settings: Settings, own: TrainerSettings, route: str) -> Path | None:
    """The suite configured for a route, or the one in the data directory, or None.

    Raises ConfigError where the configured one is not there.
    """
    if (named := own.suites.get(route)) is not None:
        path = settings.folder / named
        if not path.is_file():
            raise ConfigError(
                f"the suite {path} of {route} is not there: mend its path under [trainer.suites]",
                param=f"trainer.suites.{route}",
            )
        return path
    usual = settings.data_path / "suites" / f"{route}.jsonl"
    return usual if usual.is_file() else None


def gateway_address(settings: Settings, own: TrainerSettings) -> str:
    if own.gateway_url:
        return own.gateway_url.rstrip("/").removesuffix("/v1")
    host = str(settings.gateway.get("host", "127.0.0.1"))
    # Where it listens on every address, this machine's own is one of them.
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
    return f"http://{host}:{settings.gateway.get('port', 8000)}"


def gateway_key(
    settings: Settings, own: TrainerSettings, environ: Mapping[str, str] | None = None
) -> str:
    """The key to evaluate with. Raises ConfigError that says where to put one."""
    environ = os.environ if environ is None else environ
    file = settings.data_path / "bootstrap.key"
    key = own.key or environ.get("SLUICE_KEY") or environ.get("SLUICE_BOOTSTRAP_KEY")
    if not key and file.is_file():
        key = file.read_text(encoding="utf-8").strip()
    if not key:
        raise ConfigError(
            "the trainer has no key to evaluate with: set `key` under [trainer], or SLUICE_KEY "
            "(`sluice keys create` makes one with the scope `infer`)",
            param="trainer.key",
        )
    return key
