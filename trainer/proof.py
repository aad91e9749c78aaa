"""Proves that an engine serves exactly the adapter that was trained.

An engine answers 200 to an adapter of which it uses nothing, and goes on serving what it cached
under a name it knows. So the log-probabilities that it gives to stored probes are held against those
that the trainer's own model gave them, with the adapter and without.

Two right implementations differ by rounding, and by how much depends on the model, its depth and
both their types: in float32 by 1e-5 nats on average, in bfloat16 by 0.06 to 0.09 (at most 0.6 for a
single token) on a random Llama of 4 layers and on SmolLM2-135M. So what is tolerated is measured: how
far the engine's *base* is from the trainer's on the same probes is the noise, and a right adapter
adds hardly any of its own (0.6 to 1.3 times it, measured on both). Means are compared, for the
largest difference of hundreds of tokens is the least likely token's.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import httpx2

from rollout.engines import Engine
from rollout.errors import EngineUnavailableError, UnservableError
from rollout.versions import Version
from trainer.bundle import Probe
from trainer.parity import tokens_request

_TIMEOUT_SECONDS = 120.0
# Of tokens this unlikely nobody can say more than that.
_FLOOR = -20.0
# A right adapter is at most this many times as far from the trainer's as the base is.
_NOISE = 2.0
# The engine's kernels round in another order than the trainer's own bfloat16 did.
_ROUNDING = 3.0
# How far the size of the adapter's effect may be from the trainer's; where rounding is in
# bfloat16, small updates vanish in part (0.85 was measured).
_SCALE, _SCALE_IN_HALF = 0.05, 0.3


@dataclass(frozen=True, slots=True)
class Proof:
    """Mean differences over all probed tokens, in nats.

    `adapter`: the engine's adapter from the trainer's; `base`: the engine's base from the
    trainer's; `effect`: the engine's adapter from the engine's base, `trained` the trainer's from
    the trainer's. `scale`: how large the engine's effect is, as a multiple of the trainer's.
    """

    url: str
    tokens: int
    adapter: float
    base: float
    effect: float
    trained: float
    scale: float

    def __str__(self) -> str:
        return (
            f"{self.url}: over {self.tokens} probed tokens the adapter is {self.adapter:.2g} nats from "
            f"the trainer's on average, the base {self.base:.2g}, and the adapter {self.effect:.2g} "
            f"from the base, {self.scale:.2f} times the trainer's {self.trained:.2g}"
        )


async def prove(
    engine: Engine,
    url: str,
    version: Version,
    probes: Sequence[Probe],
    tolerance: float,
    rounding: float = 0.0,
) -> Proof:
    """Ask one replica directly. `rounding` is how far the trainer's base moves in bfloat16.

    Raises UnservableError with the numbers where they don't agree, EngineUnavailableError where it
    does not answer.
    """
    if not probes:
        raise UnservableError(
            f"the bundle of {version.name} holds no probes, so nothing can be proved: every held-out "
            "row is longer than max_length; raise it"
        )
    headers = {} if engine.api_key is None else {"authorization": f"Bearer {engine.api_key}"}
    async with httpx2.AsyncClient(
        base_url=url, headers=headers, timeout=_TIMEOUT_SECONDS
    ) as client:
        adapted = [await _log_probabilities(client, version.served_name, each) for each in probes]
        plain = [await _log_probabilities(client, version.base, each) for each in probes]
        for probe in probes:
            await _check_prompt(client, version, probe)
    return judge(measure(url, probes, adapted, plain), version.served_name, tolerance, rounding)


def measure(
    url: str,
    probes: Sequence[Probe],
    adapted: Sequence[Sequence[float]],
    plain: Sequence[Sequence[float]],
) -> Proof:
    """Hold what the engine gave against what the trainer stored."""
    adapter, base = list(_flat(adapted)), list(_flat(plain))
    stored = list(_flat([probe.adapter for probe in probes]))
    stored_base = list(_flat([probe.base for probe in probes]))
    effect = [one - other for one, other in zip(adapter, base, strict=True)]
    trained = [one - other for one, other in zip(stored, stored_base, strict=True)]
    square = sum(each * each for each in trained)
    return Proof(
        url=url,
        tokens=len(adapter),
        adapter=_mean_difference(adapter, stored),
        base=_mean_difference(base, stored_base),
        effect=fmean(map(abs, effect)),
        trained=fmean(map(abs, trained)),
        # Least squares: the multiple of the trained effect that is nearest to the engine's.
        scale=sum(a * b for a, b in zip(effect, trained, strict=True)) / square if square else 1.0,
    )


def judge(proof: Proof, served_name: str, tolerance: float, rounding: float = 0.0) -> Proof:
    """The proof itself where it holds. Raises UnservableError that says what is wrong.

    `tolerance` is what no engine needs an excuse for. A base farther from the trainer's must be
    explained by bfloat16, which moves the trainer's own by `rounding`; then twice that noise is
    what an adapter may differ by.
    """
    for_base = max(tolerance, _ROUNDING * rounding)
    allowed = max(tolerance, _NOISE * proof.base)
    if proof.base > for_base:
        raise UnservableError(
            f"the engine's base is not the one that {served_name} was trained on ({proof}; rounding "
            f"explains {for_base:.2g} for the base)"
        )
    numbers = f"({proof}; rounding explains {allowed:.2g})"
    if proof.trained <= allowed:
        raise UnservableError(
            f"{served_name} changes so little that nobody could tell from rounding whether the "
            f"engine serves it {numbers}"
        )
    if proof.effect <= allowed:
        raise UnservableError(
            f"{served_name} changes nothing on the engine: what it serves under that name is the "
            f"base {numbers}"
        )
    off = _SCALE if proof.base <= tolerance else _SCALE_IN_HALF
    if proof.adapter > allowed or abs(proof.scale - 1.0) > off:
        raise UnservableError(
            f"what the engine serves as {served_name} is not the adapter that was trained {numbers}"
        )
    return proof


def _flat(rows: Sequence[Sequence[float]]) -> Iterator[float]:
    return (max(each, _FLOOR) for each in itertools.chain.from_iterable(rows))


def _mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return fmean(abs(one - other) for one, other in zip(ours, theirs, strict=True))


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
    request = tokens_request(version.served_name, probe.messages, probe.tools)
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
