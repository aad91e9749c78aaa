"""Whether the engine renders prompts to the very tokens that are trained on, asked before training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from rollout.errors import UnservableError

_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt as the gateway sends it on, and the tokens that training makes of it."""

    case: str
    messages: Sequence[Mapping[str, Any]]
    ids: Sequence[int]
    tools: Sequence[Mapping[str, Any]] = ()


def check_serving(url: str, key: str | None, model: str, prompts: Sequence[Asked]) -> str | None:
    """Ask one replica for its tokens of the prompts.

    Raises UnservableError where they are others. An engine that can't be asked is no reason not to
    train, for the proof asks again: then the answer says why, and is None where all is well.
    """
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        with httpx2.Client(base_url=url, headers=headers, timeout=_TIMEOUT_SECONDS) as client:
            for asked in prompts:
                request = tokens_request(model, asked.messages, asked.tools)
                answer = client.post("/tokenize", json=request)
                if answer.status_code != 200:
                    return f"{url}/tokenize answers {answer.status_code}"
                _compare(url, asked, answer.json().get("tokens"))
    except (httpx2.HTTPError, ValueError) as exc:
        return f"{url} does not answer: {exc}"
    return None


def tokens_request(
    model: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What `/tokenize` is sent to render a prompt as for an answer."""
    request: dict[str, Any] = {
        "model": model,
        "messages": [dict(each) for each in messages],
        "add_generation_prompt": True,
    }
    return {**request, "tools": [dict(each) for each in tools]} if tools else request


def _compare(url: str, asked: Asked, tokens: Any) -> None:
    ours = list(asked.ids)
    if tokens == ours:
        return
    theirs = tokens if isinstance(tokens, list) else []
    place = next(
        (at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
        min(len(ours), len(theirs)),
    )
    raise UnservableError(
        f"case {asked.case}: {url} renders the prompt to {len(theirs)} tokens and training to "
        f"{len(ours)}, which differ from token {place + 1} on: the engine has another chat template or "
        "tokenizer; give it the files of the base that is trained on",
        param="chat_template",
    )
