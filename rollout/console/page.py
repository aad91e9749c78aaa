"""What all pages share: the visitor, the templates, and errors that people can read."""

import hmac
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import quote

from fastapi import Depends, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute
from fastapi.templating import Jinja2Templates

from rollout.console import session
from rollout.control.access import require_route, require_scope
from rollout.control.context import Control
from rollout.credentials import ApiKey, Scope
from rollout.errors import InvalidInputError, PermissionDeniedError, SluiceError
from rollout.gates import in_short

FOLDER = Path(__file__).parent

templates = Jinja2Templates(directory=FOLDER / "templates")
templates.env.trim_blocks = True
templates.env.lstrip_blocks = True


class _LoginNeededError(Exception):
    """The visitor has no valid session."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who is logged in, and the control plane as they reach it."""

    request: Request
    control: Control
    key: ApiKey
    token: str

    def may(self, scope: Scope) -> bool:
        return self.key.allows(scope)

    def need(self, scope: Scope) -> None:
        require_scope(self.key, scope)

    def need_route(self, route: str) -> None:
        require_route(self.key, route)

    def show(self, template: str, **values: object) -> Response:
        return templates.TemplateResponse(
            self.request,
            template,
            {"visitor": self, "now": self.control.now(), **values},
        )


async def _visitor(request: Request) -> Visitor:
    control = cast(Control, request.app.state.control)
    cookie = request.cookies.get(session.COOKIE, "")
    key = await session.check(control.keyring, cookie, control.now()) if cookie else None
    if key is None:
        raise _LoginNeededError
    return Visitor(request, control, key, session.form_token(key, cookie))


Here = Annotated[Visitor, Depends(_visitor)]


async def _sender(visitor: Here, token: Annotated[str, Form()] = "") -> Visitor:
    if not hmac.compare_digest(token.encode(), visitor.token.encode()):
        raise PermissionDeniedError(
            "this form is from an old session: go back, reload, send it again"
        )
    return visitor


# Every form that changes something is taken from this one.
Sender = Annotated[Visitor, Depends(_sender)]


class PageRoute(APIRoute):
    """Turns errors into pages, and strangers to the login."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def page(request: Request) -> Response:
            try:
                return await handler(request)
            except _LoginNeededError:
                back = request.url.path if request.method == "GET" else "/"
                return RedirectResponse(f"/login?next={quote(back)}", status_code=303)
            except RequestValidationError as exc:
                first = exc.errors()[0]
                error: SluiceError = InvalidInputError(f"{first['loc'][-1]}: {first['msg']}")
            except SluiceError as exc:
                error = exc
            return templates.TemplateResponse(
                request, "error.html", {"error": error}, status_code=error.status
            )

        return page


def _ago(then: datetime, now: datetime) -> str:
    seconds = max(0, int((now - then).total_seconds()))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


def _number(value: float) -> str:
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _duration(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:g} s"


templates.env.filters.update(
    duration=_duration, ago=_ago, number=_number, pretty=_pretty, short=in_short
)
