"""The configuration file: engines, stores, ports, and the routes to create where they don't exist.

`sluice.toml` is found by `--config` or `SLUICE_CONFIG`; any value can also be given as
`SLUICE_SECTION__KEY`, which wins over the file. Each role reads the section of its own name with
its own class, so that a gateway knows nothing of training options.
"""

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rollout.engines import DNS_SCHEME, Engine
from rollout.errors import ConfigError, InvalidInputError
from rollout.evaluation import EvaluationRules
from rollout.lines import line_of
from rollout.plans import clearest, plain_path
from rollout.policy import Policy, Slo, policy_problems, servable_gates
from rollout.retraining import Retrain
from rollout.routes import (
    Comparator,
    JsonRules,
    Judge,
    Route,
    Semantic,
    named_engines,
    route_problems,
)
from rollout.versions import check_route_name

S = TypeVar("S", bound="Section")
M = TypeVar("M", bound=BaseModel)

_PREFIX = "SLUICE_"
_DNS_URL = re.compile(re.escape(DNS_SCHEME) + r"[A-Za-z0-9._-]+:[0-9]{1,5}(/v1)?/?")
# Variables of their own; they are no sections of the file.
_OWN_VARIABLES = frozenset({"SLUICE_CONFIG", "SLUICE_BOOTSTRAP_KEY", "SLUICE_KEY", "SLUICE_URL"})


class Section(BaseModel):
    """A table of the file. A key that nobody reads is an error, for it is a typo."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StoreSection(Section):
    """Without a `url` the embedded Valkey is started in the data directory."""

    url: str | None = None
    captures: int = Field(10_000, ge=1)
    captures_hours: float = Field(168.0, gt=0)


class ArtifactsSection(Section):
    """The limits are for adapters that are fetched from a URL."""

    url: str | None = None
    maximum_adapter_bytes: int = Field(2 << 30, ge=1)
    fetch_seconds: float = Field(300.0, gt=0)


class ControllerSection(Section):
    host: str = "127.0.0.1"
    port: int = Field(8001, ge=0, le=65535)
    tick_seconds: float = Field(1.0, gt=0)
    lease_seconds: float = Field(10.0, gt=0)
    retraining: bool = True


class VllmSection(Section):
    """The engine that `sluice up` starts by itself where no `[[engines]]` are configured."""

    python: Path = Path(".venv-vllm/bin/python")
    model: Path | None = None
    served_name: str = "smollm2-135m"
    host: str = "127.0.0.1"
    port: int = Field(8100, ge=0, le=65535)
    replicas: int = Field(1, ge=1)
    max_model_len: int = 1024
    max_adapters: int = 4
    max_rank: int = 16
    start_seconds: float = 600.0
    arguments: tuple[str, ...] = ()


class EngineSection(Section):
    name: str
    urls: tuple[str, ...] = Field(min_length=1)
    base: str
    kind: Literal["vllm", "openai"] = "vllm"
    api_key: str | None = None
    max_adapters: int = 4
    max_rank: int = 16
    base_revision: str | None = None

    @field_validator("urls")
    @classmethod
    def _urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if url.startswith("dns") and not _DNS_URL.fullmatch(url):
                raise ValueError(f"{url!r}: write a name in DNS as dns+http://NAME:PORT")
        return urls

    def engine(self) -> Engine:
        return Engine(
            name=self.name,
            urls=tuple(url.rstrip("/").removesuffix("/v1") for url in self.urls),
            base=self.base,
            kind=self.kind,
            api_key=self.api_key,
            max_adapters=self.max_adapters,
            max_rank=self.max_rank,
            base_revision=self.base_revision,
        )


class RouteFields(Section):
    """What is said of a route, in the file as over the API."""

    engine: str
    comparator: Comparator = "text"
    slo: Slo = Slo()
    capture: float = Field(0.1, ge=0, le=1)
    capture_idle: float = Field(0.0, ge=0, le=1)
    policy: Policy = Policy()
    json_rules: JsonRules = JsonRules()
    semantic: Semantic | None = None
    judge: Judge | None = None
    evaluation: EvaluationRules = EvaluationRules()
    retrain: Retrain | None = None

    def made(self, name: str, schema: str | None) -> Route:
        """The route under this name, with the text of its schema."""
        return Route(
            name=name,
            engine=self.engine,
            comparator=self.comparator,
            schema=schema,
            slo=self.slo,
            capture=self.capture,
            policy=self.policy,
            capture_idle=self.capture_idle,
            json_rules=self.json_rules,
            semantic=self.semantic,
            judge=self.judge,
            evaluation=self.evaluation,
            retrain=self.retrain,
        )


class RouteSection(RouteFields):
    """`schema` is a path, relative to the configuration file."""

    name: str
    schema_path: str | None = Field(None, alias="schema")

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        try:
            return check_route_name(name)
        except InvalidInputError as exc:
            raise ValueError(exc.message) from exc

    @model_validator(mode="after")
    def _judging(self) -> "RouteSection":
        servable = servable_gates(self.slo, self.schema_path)
        for field, problem in policy_problems(self.policy, servable):
            raise _problem(f"policy.{field}", problem)
        for field, problem in route_problems(self.made(self.name, None)):
            raise _problem(field, problem)
        return self

    def route(self, folder: Path) -> Route:
        path = self.schema_path
        return self.made(self.name, None if path is None else _read_schema(folder / path))

    def named_engines(self) -> Iterator[tuple[str, str]]:
        """The engines that it needs, each with the key that names it."""
        return named_engines(self.made(self.name, None))


class Settings(BaseModel):
    """The whole file, checked. `gateway`, `shadow` and `trainer` are checked by their roles."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Path | None = None
    data_dir: Path = Path("./data")
    store: StoreSection = StoreSection()
    artifacts: ArtifactsSection = ArtifactsSection()
    controller: ControllerSection = ControllerSection()
    vllm: VllmSection = VllmSection()
    gateway: Mapping[str, Any] = Field(default_factory=dict)
    shadow: Mapping[str, Any] = Field(default_factory=dict)
    trainer: Mapping[str, Any] = Field(default_factory=dict)
    engines: tuple[EngineSection, ...] = ()
    routes: tuple[RouteSection, ...] = ()

    @property
    def folder(self) -> Path:
        """What relative paths in the file are relative to."""
        return self.source.parent if self.source else Path.cwd()

    @property
    def data_path(self) -> Path:
        return (self.folder / self.data_dir).resolve()

    @property
    def artifacts_url(self) -> str:
        return self.artifacts.url or (self.data_path / "artifacts").as_uri()

    @property
    def store_url(self) -> str:
        """The store's address; raises ConfigError where there is only the embedded one.

        `sluice up` fills it in for the roles that it starts.
        """
        if self.store.url is None:
            raise ConfigError(
                "no store is configured: set `url` under [store], or SLUICE_STORE__URL, or start "
                "everything with `sluice up`, which brings a store along",
                param="store.url",
            )
        return self.store.url

    def engine_list(self) -> tuple[Engine, ...]:
        return tuple(section.engine() for section in self.engines)

    def route_list(self) -> tuple[Route, ...]:
        return tuple(section.route(self.folder) for section in self.routes)


def load_settings(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read the file (or the defaults), with the environment on top.

    Raises ConfigError with the file, the key and what is wrong with it.
    """
    environ = os.environ if environ is None else environ
    if path is None and (named := environ.get("SLUICE_CONFIG")):
        path = Path(named)
    if path is None and Path("sluice.toml").is_file():
        path = Path("sluice.toml")
    text, table = _read_toml(path) if path else ("", {})
    _overlay(table, environ)
    if path:
        table["source"] = path.resolve()
    settings = _check(Settings, table, str(path or "the environment"), text)
    known = {engine.name for engine in settings.engines}
    for route in settings.routes:
        for field, engine in route.named_engines():
            if known and engine not in known:
                raise ConfigError(
                    f"{path}: route {route.name!r} names engine {engine!r}, but [[engines]] has "
                    f"only {', '.join(sorted(known))}",
                    param=f"routes.{field}",
                )
    return settings


def check_section(kind: type[S], table: Mapping[str, Any], name: str) -> S:
    """Check a role's own section, `[name]`."""
    return _check(kind, dict(table), f"[{name}]")


def bootstrap_key(environ: Mapping[str, str] | None = None) -> str | None:
    """The admin key that automation brings along, if any."""
    return (os.environ if environ is None else environ).get("SLUICE_BOOTSTRAP_KEY") or None


def _problem(path: str, problem: str) -> PydanticCustomError:
    """A problem that a look at several keys found; `path` is that of the one to mend."""
    return PydanticCustomError("problem", "{problem}", {"path": path, "problem": problem})


def _check(kind: type[M], table: Mapping[str, Any], where: str, text: str = "") -> M:
    """Check the table; `text` is the file that it came from, for the number of the line."""
    try:
        return kind.model_validate(table)
    except ValidationError as exc:
        first = clearest(exc.errors())
        below = str(first.get("ctx", {}).get("path", "")).split(".")
        path = [*plain_path(first["loc"]), *(int(p) if p.isdecimal() else p for p in below if p)]
        key = ".".join(str(part) for part in path)
        problem = (
            "nothing reads this key; docs/configuration.md lists those that exist"
            if first["type"] in ("extra_forbidden", "unexpected_keyword_argument")
            else first["msg"]
        )
        line = line_of(text, path)
        at = where if line is None else f"{where}, line {line}"
        raise ConfigError(f"{at}: {key}: {problem}", param=key) from exc


def _read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """The text, and what it says."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except OSError as exc:
        raise ConfigError(
            f"cannot read the configuration {path}: {exc.strerror or exc}; name another with --config"
        ) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is no valid TOML: {exc}") from exc


def _read_schema(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except OSError as exc:
        raise ConfigError(f"cannot read the schema {path}: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise ConfigError(f"the schema {path} is no valid JSON: {exc}") from exc
    return text


def _overlay(table: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Put `SLUICE_SECTION__KEY=value` into the table; a value that is JSON is taken as JSON."""
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX) or variable in _OWN_VARIABLES:
            continue
        *sections, key = variable.removeprefix(_PREFIX).lower().split("__")
        target = table
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{variable}: {section} is a value and has nothing below it")
        try:
            target[key] = json.loads(text)
        except ValueError:
            target[key] = text
