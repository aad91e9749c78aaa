"""Proves that an engine serves exactly the adapter that was trained.

An engine answers 200 to an adapter of which it uses nothing, and goes on serving what it cached
under a name it knows. So the log-probabilities that it gives to stored probes are held against those
that the trainer's own model gave them, with the adapter and without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from rollout.engines import Engine
from rollout.errors import EngineUnavailableError, UnservableError
from rollout.versions import Version
from trainer.job import Probe

_TIMEOUT_SECONDS = 120.0
# Of tokens this unlikely nobody can say more than that.
_FLOOR = -20.0


@dataclass(frozen=True, slots=True)
class Proof:
    """The largest differences over all probed tokens, in nats.

    `adapter`: the engine's adapter from the trainer's; `base`: the engine's base from the
    trainer's; `effect`: the engine's adapter from the engine's base.
    """

    url: str
    tokens: int
    adapter: float
    base: float
    effect: float

    def __str__(self) -> str:
        return (
            f"{self.url}: over {self.tokens} probed tokens the adapter is {self.adapter:.2g} from the "
            f"trainer's, the base {self.base:.2g}, and the adapter {self.effect:.2g} from the base"
        )


async def prove(
    engine: Engine, url: str, version: Version, probes: Sequence[Probe], tolerance: float
) -> Proof:
    """Ask one replica directly. Raises UnservableError with the numbers where they don't agree,
    EngineUnavailableError where it does not answer."""
    headers = {} if engine.api_key is None else {"authorization": f"Bearer {engine.api_key}"}
    async with httpx2.AsyncClient(
        base_url=url, headers=headers, timeout=_TIMEOUT_SECONDS
    ) as client:
        adapted = [await _log_probabilities(client, version.served_name, each) for each in probes]
        plain = [await _log_probabilities(client, version.base, each) for each in probes]
        for probe in probes:
            await _check_prompt(client, version, probe)
    proof = Proof(
        url=url,
        tokens=sum(len(each) for each in adapted),
        adapter=_largest_difference(adapted, [each.adapter for each in probes]),
        base=_largest_difference(plain, [each.base for each in probes]),
        effect=_largest_difference(adapted, plain),
    )
    return judge(proof, version.served_name, tolerance)


def judge(proof: Proof, served_name: str, tolerance: float) -> Proof:
    """The proof itself where it holds. Raises UnservableError that says what is wrong."""
    numbers = f"({proof}; at most {tolerance:g} is the tolerance)"
    if proof.base > tolerance:
        raise UnservableError(
            f"the engine's base is not the one that {served_name} was trained on {numbers}"
        )
    if proof.effect <= tolerance:
        raise UnservableError(
            f"{served_name} changes nothing on the engine: what it serves under that name is the "
            f"base {numbers}"
        )
    if proof.adapter > tolerance:
        raise UnservableError(
            f"what the engine serves as {served_name} is not the adapter that was trained {numbers}"
        )
    return proof


def _largest_difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> float:
    return max(
        abs(max(one, _FLOOR) - max(other, _FLOOR))
        for mine, yours in zip(ours, theirs, strict=True)
        for one, other in zip(mine, yours, strict=True)
    )


async def _log_probabilities(client: httpx2.AsyncClient, model: str, probe: Probe) -> list[float]:
    """Of the probe's last tokens, as many as the trainer stored."""
    request = {
        "model": model,
        "prompt": list(probe.ids),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    answer = await _post(client, "/v1/completions", request)
    count = len(probe.adapter)
    try:
        given = answer.json()["choices"][0]["prompt_logprobs"][-count:]
        return [
            float(entry[str(token)]["logprob"])
            for entry, token in zip(given, probe.ids[-count:], strict=True)
        ]
    except (ValueError, KeyError, TypeError, IndexError) as exc:
        raise UnservableError(
            f"{client.base_url} gives no log-probabilities of a prompt, so nothing can be proved"
        ) from exc


async def _check_prompt(client: httpx2.AsyncClient, version: Version, probe: Probe) -> None:
    """The engine must render the prompt to the very tokens that were trained on."""
    request: dict[str, Any] = {
        "model": version.served_name,
        "messages": list(probe.messages),
        "add_generation_prompt": True,
    }
    answer = await _post(client, "/tokenize", request)
    trained = list(probe.ids[: probe.prompt_tokens])
    if answer.json().get("tokens") != trained:
        raise UnservableError(
            f"{client.base_url} renders a prompt to other tokens than training did: it has another "
            "chat template or tokenizer; give it the files of the base that was trained on"
        )


async def _post(client: httpx2.AsyncClient, path: str, request: dict[str, Any]) -> httpx2.Response:
    try:
        answer = await client.post(path, json=request)
    except httpx2.HTTPError as exc:
        raise EngineUnavailableError(f"{client.base_url} does not answer: {exc}") from exc
    if answer.status_code >= 500:
        raise EngineUnavailableError(
            f"{client.base_url}{path.lstrip('/')} answers {answer.status_code}: {answer.text[:300]}"
        )
    if answer.status_code != 200:
        raise UnservableError(
            f"{client.base_url}{path.lstrip('/')} answers {answer.status_code} to a probe of "
            f"{request['model']}: {answer.text[:300]}"
        )
    return answer
