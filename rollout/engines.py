"""An engine: a pool of replicas that speak OpenAI's API and serve one base."""

from dataclasses import dataclass
from typing import Final, Literal

DNS_SCHEME: Final = "dns+http://"


@dataclass(frozen=True, slots=True)
class Engine:
    """`urls` are the replicas' roots, without `/v1`, or names that `discovery` resolves; `base` is the served name of the base.

    Only `vllm` loads adapters; `openai` is any OpenAI-compatible server. `max_adapters` is the
    number of adapters that a replica may hold, `max_rank` the largest LoRA rank it accepts.
    """

    name: str
    urls: tuple[str, ...]
    base: str
    kind: Literal["vllm", "openai"] = "vllm"
    api_key: str | None = None
    max_adapters: int = 4
    max_rank: int = 16


@dataclass(frozen=True, slots=True)
class Residency:
    """What a replica was last proved to serve: names that passed a probe, or nothing.

    `ready` is whether the replica answers at all.
    """

    engine: str
    url: str
    ready: bool
    served: frozenset[str] = frozenset()
