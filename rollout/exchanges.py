"""An exchange is one request with its answer; a comparison is two answers to one request.

Feedback is what the caller said of an answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

Arm = Literal["stable", "candidate", "pinned"]
Outcome = Literal["win", "loss", "tie"]
Rating = Literal["good", "bad"]
# The step of the cascade that settled a pair.
Kind = Literal[
    "failure", "exact", "tools", "schema", "normalised", "json", "text", "semantic", "judge"
]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one version answered. `status` 0 is no HTTP answer at all; `error` then says why.

    Times are in seconds from sending the request to the engine. `confidence` is the geometric mean
    of the probabilities of its tokens, in [0, 1], where the engine was asked for them.
    """

    version: int
    status: int
    text: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    finish_reason: str | None = None
    ttft_seconds: float | None = None
    total_seconds: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    confidence: float | None = None

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300 and self.error is None


@dataclass(frozen=True, slots=True)
class Exchange:
    """A captured request with the answer that the client got.

    `trial` names the trial that it was captured for (None: no trial was on). `arm` is the
    *assigned* arm, `answer.version` the one that was served. `request` is the client's body as
    text, `path` the endpoint (`/v1/chat/completions`), `unit` the hashed sticky key.
    """

    request_id: str
    route: str
    trial: str | None
    arm: Arm
    unit: str
    path: str
    request: str
    answer: Answer
    captured_at: datetime


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of the cascade said of a pair, and what it cost.

    `agreement` None: it had nothing to say, or failed; then `error` says why. `tokens` are those
    that an engine counted.
    """

    name: Kind
    agreement: float | None
    seconds: float = 0.0
    tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge model said of a pair that it was asked about in both orders.

    `outcome` is the candidate's. Where the two orders contradict each other (`consistent` False)
    it is a tie: the judge went by the place of an answer.
    """

    judge: str
    outcome: Outcome
    consistent: bool = True


@dataclass(frozen=True, slots=True)
class Comparison:
    """`agreement` lies in [0, 1]; `kind` is the step of the cascade that settled it.

    `outcome` is the candidate's, where the pair can be decided without a person (one side failed
    or broke the schema, or the route lets its judge decide); None means that only a label can tell.
    """

    request_id: str
    route: str
    trial: str
    stable: Answer
    candidate: Answer
    agreement: float
    kind: Kind
    outcome: Outcome | None = None
    steps: tuple[Step, ...] = ()
    judgement: Judgement | None = None

    @property
    def agrees(self) -> bool:
        return self.agreement >= 1.0


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a request was answered by: the *assigned* arm of its trial, and the served version.

    `trial` None: no trial was on. `unit` is the client's, empty where it can't come again: then
    the request's id names all that there is of it.
    """

    route: str
    version: int
    arm: Arm
    trial: str | None
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Feedback:
    """`key` is the id of the caller's API key; `receipt` None until a gateway knows the request.

    `correction` is the answer that would have been right, where the caller gave one.
    """

    request_id: str
    key: str
    rating: Rating
    given_at: datetime
    correction: str | None = None
    comment: str = ""
    receipt: Receipt | None = None
