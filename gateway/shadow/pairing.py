"""What the shadow decides: whom to ask, with which request, and whether a person should judge."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from gateway.wire import CHAT, COMPLETIONS, RESPONSES, read_request, render
from rollout.assignment import bucket
from rollout.cases import Case, interest, unsure_of
from rollout.exchanges import Answer, Comparison, Exchange
from rollout.policy import Policy
from rollout.state import Rollout
from rollout.versions import Version

Reason = Literal[
    "no_trial",  # captured while no version was on trial, and kept for replays
    "stale",  # its trial has ended
    "pinned",  # the client asked for a version that is no part of the trial
    "endpoint",  # embeddings and the like have no text to compare
    "unaskable",  # the other version cannot be asked this, as a prompt at /v1/completions
    "client_error",  # the client was told that the request is at fault
    "engine_error",  # the client, or the shadow, got no answer for a fault of the engine's
    "not_resident",  # no replica had the other version in time
    "busy",  # live traffic left no room in time
    "deadline",  # the other version did not finish in time
    "error",  # the shadow's own fault; the log tells
]

# What has text or tool calls to compare.
COMPARABLE: Final = frozenset({CHAT, COMPLETIONS, RESPONSES})

# A case half as interesting that is a day newer comes to the same place in the queue.
_SECONDS_PER_HALVING: Final = 86400.0
# The fields of a request that say how the answer travels, or that a second answer should be kept.
_DELIVERY: Final = ("stream", "stream_options", "background", "store", "priority")


def other_version(exchange: Exchange, rollout: Rollout | None) -> int | Reason:
    """The version to ask: whichever side of the trial did not answer the client."""
    trial = rollout.trial if rollout else None
    if not exchange.trial:
        return "no_trial"
    if rollout is None or trial is None or trial.id != exchange.trial:
        return "stale"
    if reason := unpairable(exchange):
        return reason
    if exchange.answer.version == rollout.stable:
        return trial.candidate
    return rollout.stable if exchange.answer.version == trial.candidate else "pinned"


def unpairable(exchange: Exchange) -> Reason | None:
    """Why no other answer says anything about this one; None where it does."""
    if exchange.path not in COMPARABLE:
        return "endpoint"
    if exchange.answer.ok:
        return None
    # Whoever answers it later, when the engine is well again, would win by that alone. How often
    # each arm fails is counted where it fails.
    return "client_error" if 400 <= exchange.answer.status < 500 else "engine_error"


def is_engines(answer: Answer) -> bool:
    """Whether a failed answer is surely the engine's fault, or ours, and not the version's.

    It was not reached, is overloaded, or doesn't know us or the version: it was restarted, and
    will know it again.
    """
    return answer.status in (0, 401, 403, 404, 408, 429, 502, 503, 504)


def roomiest(
    urls: Sequence[str],
    waiting: Mapping[str, float],
    asking: Mapping[str, int],
    maximum_waiting: int,
) -> str | None:
    """The replica with the most room beside its live traffic; None where none has any.

    `waiting` is the length of each replica's own queue (one that doesn't tell counts as empty),
    `asking` what this shadow has under way there.
    """
    roomy = [url for url in urls if waiting.get(url, 0.0) <= maximum_waiting]
    return min(roomy, key=lambda url: (waiting.get(url, 0.0), asking.get(url, 0)), default=None)


def shadow_request(
    exchange: Exchange, version: Version, priority: int | None, *, logprobs: bool = False
) -> bytes:
    """The client's request as this version is asked it: for one whole answer, as late as may be.

    With `logprobs` a chat is answered with the probability of each token: how sure it is.
    Raises InvalidInputError where the version can't be asked this.
    """
    request = read_request(exchange.request.encode())
    body = msgspec.json.decode(render(request, version, exchange.path))
    for name in _DELIVERY:
        body.pop(name, None)
    if body.get("n") is not None:
        body["n"] = 1
    if priority is not None:
        body["priority"] = priority
    if logprobs and exchange.path == CHAT:
        body.setdefault("logprobs", True)
    return msgspec.json.encode(body)


def case_for(
    comparison: Comparison, exchange: Exchange, policy: Policy, floor: Comparison | None = None
) -> Case | None:
    """The case that a person should judge, or None. `floor` is stable beside itself, if asked.

    Chance is the hash of the request's id, so each shadow that gets the exchange decides alike.
    Where one side failed there are no two answers to judge.
    """
    if comparison.kind == "failure":
        return None
    inclusion = policy.agreement_sample if comparison.agrees else policy.disagreement_sample
    if chance("sample", comparison) >= inclusion:
        return None
    unsure = unsure_of(comparison, floor)
    return Case(
        id=_case_id(comparison),
        route=comparison.route,
        trial=comparison.trial,
        request_id=comparison.request_id,
        messages=messages_of(exchange.request),
        stable=comparison.stable,
        candidate=comparison.candidate,
        agreement=comparison.agreement,
        kind=comparison.kind,
        inclusion=inclusion,
        priority=priority_of(comparison, exchange.captured_at.timestamp(), unsure),
        created_at=exchange.captured_at,
        unit=exchange.unit,
        labels_needed=policy.labels_per_case,
        unsure=unsure,
        judgement=comparison.judgement,
    )


def priority_of(comparison: Comparison, captured_at: float, unsure: float) -> float:
    """How far apart times how unsure times how new, as a logarithm to base 2.

    It orders cases without ever being renewed, for all of them age alike. An agreement gets its
    distance by chance. At 0 it would always come last, and labels of disagreements alone say
    nothing about how often a version is right.
    """
    distance = chance("place", comparison) if comparison.agrees else 1.0 - comparison.agreement
    return interest(distance, unsure) + captured_at / _SECONDS_PER_HALVING


def messages_of(request: str) -> tuple[Mapping[str, Any], ...]:
    """What the client said, as chat messages, whichever endpoint it was said to."""
    body = msgspec.json.decode(request)
    messages = body.get("messages", body.get("input", body.get("prompt")))
    if isinstance(messages, list) and all(isinstance(item, Mapping) for item in messages):
        said = tuple(messages)
    else:
        said = ({"role": "user", "content": messages if isinstance(messages, str) else ""},)
    if isinstance(instructions := body.get("instructions"), str):
        return ({"role": "system", "content": instructions}, *said)
    return said


def _case_id(comparison: Comparison) -> str:
    identity = f"{comparison.trial}\0{comparison.request_id}"
    return hashlib.sha256(identity.encode()).hexdigest()[:24]


def chance(purpose: str, comparison: Comparison) -> float:
    """A number in [0, 1) that is the same whenever it is asked for."""
    return bucket(f"{purpose}:{comparison.trial}", comparison.request_id)
