"""Puts the console's pages and files onto an application."""

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout.console import docs, labeling, pages
from rollout.console.page import FOLDER

# Nothing from elsewhere, nothing inline, and no other site may frame a page with buttons.
_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def add_console(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")
    for part in (docs, labeling, pages):
        app.include_router(part.router)
    app.add_middleware(_PageHeaders)


class _PageHeaders:
    """Keeps pages private to the browser that asked for them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-content-type-options"] = "nosniff"
                if headers.get("content-type", "").startswith("text/html"):
                    headers["content-security-policy"] = _POLICY
                    headers["referrer-policy"] = "same-origin"
                    headers["cache-control"] = "no-store"
            await send(message)

        await self._app(scope, receive, send_with_headers)
