"""A version: pinned weights and, where it carries them, a prompt and sampling defaults."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from rollout.errors import InvalidInputError

ROUTE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
# Enough of a sha256 that two adapters of one base never share a served name.
_DIGEST_IN_NAME = 20


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages that a version brings along.

    `prepend` puts them before the client's messages; `replace_system` puts them in place of the
    client's system (or developer) messages.
    """

    messages: tuple[Mapping[str, Any], ...]
    mode: Literal["prepend", "replace_system"] = "prepend"


@dataclass(frozen=True, slots=True)
class Version:
    """Immutable: new weights never hide behind an old name.

    `base` is the name under which the engine serves its base model; `adapter` is the sha256 of
    the published bundle (64 hex digits) and `adapter_path` the directory that engines read it
    from, both None for the bare base. `dataset` and `run` lead back to what made it.
    """

    route: str
    number: int
    engine: str
    base: str
    created_at: datetime
    base_revision: str | None = None
    adapter: str | None = None
    adapter_path: str | None = None
    prompt: Prompt | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    parent: int | None = None
    dataset: str | None = None
    run: str | None = None
    created_by: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """The pinned name that a client may ask for: `support-triage@7`."""
        return f"{self.route}@{self.number}"

    @property
    def served_name(self) -> str:
        """What the engine calls it.

        It contains the digest: an engine that loads other bytes under a name it knows goes on
        using cached prefixes of the old ones (vllm#42125).
        """
        return (
            self.base if self.adapter is None else f"{self.base}-{self.adapter[:_DIGEST_IN_NAME]}"
        )

    @property
    def rewrites_body(self) -> bool:
        """Whether a request must be re-encoded for it, and not only have `model` spliced."""
        return self.prompt is not None or bool(self.sampling)


def parse_model(model: str) -> tuple[str, int | None]:
    """Split what a client put into `model`: a route, or a route and a pinned number.

    Raises InvalidInputError where the part behind `@` is not a whole number from 1.
    """
    route, at, number = model.partition("@")
    if not at:
        return route, None
    if not (number.isascii() and number.isdecimal() and 0 < len(number) < 10 and int(number) > 0):
        raise InvalidInputError(
            f"{model!r} does not name a version: write ROUTE@NUMBER, as in support-triage@7",
            param="model",
        )
    return route, int(number)


def check_route_name(name: str) -> str:
    """Return `name`, or raise InvalidInputError with what a route may be called."""
    if not ROUTE_NAME.fullmatch(name):
        raise InvalidInputError(
            f"{name!r} is no route name: use 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning and "
            "ending with a letter or digit",
            param="name",
        )
    return name
