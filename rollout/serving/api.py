"""One replica's HTTP API, as vLLM speaks it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

from rollout.engines import Engine
from rollout.errors import EngineUnavailableError, UnservableError


@dataclass(frozen=True, slots=True)
class Waits:
    """How long things may take, in seconds.

    answer: a replica, to say what it serves. load, probe: an adapter, to be loaded, and to answer.
    drain: an adapter that nothing needs any more, before gateways are told to leave it alone.
    notice: from there until it is unloaded. retry, longest_retry: after a load or probe that
    failed, doubling from the one to the other. `patience` is the number of looks in a row that may
    run out of time before a replica counts as down: a busy one is slow, and not gone.
    """

    answer: float = 5.0
    load: float = 120.0
    probe: float = 60.0
    drain: float = 30.0
    notice: float = 5.0
    retry: float = 2.0
    longest_retry: float = 120.0
    patience: int = 3


class SlowError(EngineUnavailableError):
    """It may be busy and not gone: ask again before you give it up."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The names of the adapters that a replica holds, and where it has its base from."""

    adapters: frozenset[str]
    root: str = ""


class ReplicaApi:
    """Every request has a time limit, and loading or unloading twice is fine."""

    def __init__(self, client: httpx2.AsyncClient, engine: Engine, url: str, waits: Waits) -> None:
        self._client = client
        self._engine = engine
        self._url = url
        self._waits = waits

    async def check_health(self) -> None:
        """Raises EngineUnavailableError unless `/health` answers 200."""
        answer = await self._send("GET", "/health", self._waits.answer)
        if answer.status_code != 200:
            raise EngineUnavailableError(f"{self._url}/health answers {answer.status_code}")

    async def list_served(self) -> Listing:
        """What it says that it holds. Raises EngineUnavailableError where it does not say."""
        answer = await self._send("GET", "/v1/models", self._waits.answer)
        if answer.status_code in (401, 403):
            raise EngineUnavailableError(
                f"{self._url} refuses the key: set `api_key` of engine {self._engine.name!r}"
            )
        if answer.status_code != 200:
            raise EngineUnavailableError(f"{self._url}/v1/models answers {answer.status_code}")
        try:
            cards = answer.json()["data"]
            adapters = frozenset(str(card["id"]) for card in cards if card.get("parent"))
            base = (card for card in cards if card["id"] == self._engine.base)
            root = next((card.get("root") for card in base), None)
            return Listing(adapters, str(root or ""))
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise EngineUnavailableError(
                f"{self._url}/v1/models is no list of models: is that an OpenAI-compatible server?"
            ) from exc

    async def load(self, served_name: str, path: str) -> None:
        """Load an adapter; one that is there already is fine.

        Raises UnservableError where the engine refuses it, EngineUnavailableError where it does
        not answer.
        """
        body = {"lora_name": served_name, "lora_path": path}
        answer = await self._send("POST", "/v1/load_lora_adapter", self._waits.load, body)
        if answer.status_code == 200 or _already_loaded(answer):
            return
        if answer.status_code == 404 and _no_such_endpoint(answer):
            raise UnservableError(
                f"{self._url} loads no adapters at run time: start vLLM with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        if answer.status_code == 404:
            raise UnservableError(
                f"{self._url} finds no adapter at {path}: the engine must be able to read the "
                f"artifact store under that very path ({_reason(answer)})"
            )
        if answer.status_code in (502, 503, 504):
            raise EngineUnavailableError(f"{self._url} answers {answer.status_code} to a load")
        raise UnservableError(
            f"{self._url} cannot serve {served_name} ({answer.status_code}): {_reason(answer)}"
        )

    async def unload(self, served_name: str) -> None:
        """Unload an adapter; one that is gone already is fine."""
        body = {"lora_name": served_name}
        answer = await self._send("POST", "/v1/unload_lora_adapter", self._waits.load, body)
        if answer.status_code not in (200, 404):
            raise EngineUnavailableError(
                f"{self._url} did not unload {served_name} ({answer.status_code}): {_reason(answer)}"
            )

    async def probe(self, served_name: str) -> None:
        """Have it answer one token under that name.

        Raises UnservableError where it refuses, EngineUnavailableError where it does not answer.
        """
        body = {"model": served_name, "prompt": "Hi", "max_tokens": 1, "temperature": 0}
        answer = await self._send("POST", "/v1/completions", self._waits.probe, body)
        if answer.status_code != 200:
            raise UnservableError(
                f"{self._url} lists {served_name} and answers {answer.status_code} to it: "
                f"{_reason(answer)}"
            )

    async def _send(
        self, method: str, path: str, seconds: float, body: Mapping[str, Any] | None = None
    ) -> httpx2.Response:
        key = self._engine.api_key
        try:
            return await self._client.request(
                method,
                f"{self._url}{path}",
                json=body,
                headers={"authorization": f"Bearer {key}"} if key else None,
                timeout=seconds,
            )
        except httpx2.TimeoutException as exc:
            raise SlowError(f"{self._url}{path} took more than {seconds:g} s") from exc
        except httpx2.RequestError as exc:
            raise EngineUnavailableError(f"{self._url} does not answer: {exc}") from exc


def _already_loaded(answer: httpx2.Response) -> bool:
    return answer.status_code == 400 and "already been loaded" in answer.text


def _no_such_endpoint(answer: httpx2.Response) -> bool:
    """FastAPI's own 404, in place of one in OpenAI's shape."""
    return bool(_json(answer) == {"detail": "Not Found"})


def _reason(answer: httpx2.Response) -> str:
    """The engine's own words, at most a few lines of them."""
    match _json(answer):
        case {"error": {"message": str(message)}} | {"message": str(message)}:
            return message[:500]
        case _:
            return answer.text[:500].strip() or "no reason given"


def _json(answer: httpx2.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None
