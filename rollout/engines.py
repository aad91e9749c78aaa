"""An engine: a pool of replicas that speak OpenAI's API and serve one base; and where on them a
version is resident."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from rollout.versions import Version

DNS_SCHEME: Final = "dns+http://"
_NOT_LOADED: Final = (
    "not loaded: a replica holds what a route's stable, candidate or last stable version needs"
)
_NO_ANSWER: Final = "it does not answer"


@dataclass(frozen=True, slots=True)
class Engine:
    """`urls` are the replicas' roots, without `/v1`, or names that `discovery` resolves; `base` is the served name of the base.

    Only `vllm` loads adapters; `openai` is any OpenAI-compatible server. `max_adapters` is the
    number of adapters that a replica may hold, `max_rank` the largest LoRA rank it accepts.
    `base_revision` is the revision of the base that it was started with, where that is known.
    """

    name: str
    urls: tuple[str, ...]
    base: str
    kind: Literal["vllm", "openai"] = "vllm"
    api_key: str | None = None
    max_adapters: int = 4
    max_rank: int = 16
    base_revision: str | None = None


@dataclass(frozen=True, slots=True)
class Residency:
    """What a replica was last proved to serve: names that passed a probe, or nothing.

    `ready` is whether the replica answers at all; where it does not, `down` says why. `missing`
    says of each served name that should be there and is not, why not. `root` is where the engine
    says that it has its base from: a directory, or a name on a hub.
    """

    engine: str
    url: str
    ready: bool
    served: frozenset[str] = frozenset()
    missing: Mapping[str, str] = field(default_factory=dict)
    down: str = ""
    root: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a version answers, and where it does not.

    `on` are the replicas that serve it now; `missing` are those that answer and do not serve it,
    `down` those that do not answer, each with the reason.
    """

    name: str
    engine: str
    on: tuple[str, ...]
    missing: Mapping[str, str]
    down: Mapping[str, str]

    @property
    def everywhere(self) -> bool:
        """Whether every replica that answers serves the version, and there is one.

        This is what more traffic waits for, whoever asks for it: fewer replicas would have to
        carry a share that was meant for all.
        """
        return bool(self.on) and not self.missing

    @property
    def reason(self) -> str:
        """What stands in the way of `everywhere`, for people; empty where nothing does."""
        if self.everywhere:
            return ""
        found = [f"replica {url}: {why}" for url, why in self.missing.items()]
        if not self.on and not found:
            found = [f"replica {url}: {why}" for url, why in self.down.items()]
        if not found:
            return f"no replica of engine {self.engine!r} is known: is it under [[engines]]?"
        return "; ".join(found)


def placement(version: Version, residencies: Iterable[Residency]) -> Placement:
    """Where the version answers. One without an adapter is the base, which every replica serves."""
    mine = sorted((r for r in residencies if r.engine == version.engine), key=lambda r: r.url)
    name = version.served_name
    serving = {r.url for r in mine if r.ready and (version.adapter is None or name in r.served)}
    return Placement(
        name=version.name,
        engine=version.engine,
        on=tuple(r.url for r in mine if r.url in serving),
        missing={
            r.url: r.missing.get(name, _NOT_LOADED)
            for r in mine
            if r.ready and r.url not in serving
        },
        down={r.url: r.down or _NO_ANSWER for r in mine if not r.ready},
    )
