"""The console without a browser: who gets in, and what no other site can make them do."""

import re
from datetime import UTC, datetime, timedelta

import httpx2
import pytest

from rollout.console import session
from rollout.credentials import ApiKey, digest_secret
from rollout.stores import Stores
from tests.api.house import ADMIN, AT, add_key, case, offer

pytestmark = pytest.mark.anyio


async def log_in(web: httpx2.AsyncClient, key: str = ADMIN) -> str:
    """The token that forms carry."""
    answer = await web.post("/login", data={"key": key, "next": "/"})
    assert answer.status_code == 303
    found = re.search(r'name="token" value="(\w+)"', (await web.get("/")).text)
    assert found is not None
    return found.group(1)


@pytest.mark.parametrize("path", ["/", "/label", "/runs", "/reports", "/routes/triage"])
async def test_strangers_are_sent_to_the_login(web: httpx2.AsyncClient, path: str) -> None:
    answer = await web.get(path)
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login?next=")


async def test_a_wrong_key_is_told_so(web: httpx2.AsyncClient) -> None:
    answer = await web.post("/login", data={"key": "wrong"})
    assert answer.status_code == 401
    assert "not known" in answer.text
    assert "set-cookie" not in answer.headers


async def test_the_cookie_holds_no_key_and_no_script_can_read_it(web: httpx2.AsyncClient) -> None:
    answer = await web.post("/login", data={"key": ADMIN})
    cookie = answer.headers["set-cookie"]
    assert ADMIN not in cookie
    assert digest_secret(ADMIN) not in cookie
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie


@pytest.mark.parametrize("there", ["https://evil.example/", "//evil.example", "/\\evil.example"])
async def test_the_login_leads_nowhere_else(web: httpx2.AsyncClient, there: str) -> None:
    answer = await web.post("/login", data={"key": ADMIN, "next": there})
    assert answer.headers["location"] == "/"


async def test_a_form_without_its_token_changes_nothing(
    web: httpx2.AsyncClient, stores: Stores
) -> None:
    await offer(stores, case("c1"))
    token = await log_in(web)
    for wrong in ({}, {"token": "wrong"}):
        answer = await web.post("/label/c1", data={"choice": "first", **wrong})
        assert answer.status_code == 403
    assert (await stores.cases.stats("triage"))[0].labelled == 0
    answer = await web.post("/label/c1", data={"choice": "first", "token": token})
    assert "Nothing is waiting" in answer.text
    assert (await stores.cases.stats("triage"))[0].labelled == 1


async def test_a_labeler_cannot_roll_back(web: httpx2.AsyncClient, stores: Stores) -> None:
    await add_key(stores, "ann", "label")
    token = await log_in(web, "sk-sluice-ann")
    answer = await web.post("/routes/triage/rollback", data={"token": token})
    assert answer.status_code == 403
    assert "lacks the scope operate" in answer.text
    assert "Roll back" not in (await web.get("/")).text


async def test_a_revoked_key_ends_its_session(web: httpx2.AsyncClient, stores: Stores) -> None:
    await add_key(stores, "ann", "label")
    await log_in(web, "sk-sluice-ann")
    admin = {"authorization": f"Bearer {ADMIN}"}
    assert (await web.delete("/api/v1/keys/ann", headers=admin)).status_code == 204
    assert (await web.get("/")).status_code == 303


async def test_an_error_is_a_page_that_says_what_to_do(web: httpx2.AsyncClient) -> None:
    token = await log_in(web)
    answer = await web.post("/routes/triage/hold", data={"token": token})
    assert answer.status_code == 409
    assert "nothing to hold" in answer.text
    assert (await web.get("/label/none")).status_code == 404
    assert (await web.get("/runs/none")).status_code == 404


async def test_pages_may_load_nothing_from_elsewhere(web: httpx2.AsyncClient) -> None:
    await log_in(web)
    answer = await web.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    assert (await web.get("/static/style.css")).status_code == 200


async def test_log_out(web: httpx2.AsyncClient) -> None:
    token = await log_in(web)
    assert (await web.post("/logout", data={"token": token})).status_code == 303
    assert (await web.get("/")).status_code == 303


KEY = ApiKey("key-1", "ann", digest_secret("secret"), frozenset({"label"}), AT)


class OneKey:
    async def named(self, key_id: str) -> ApiKey | None:
        return KEY if key_id == KEY.id else None


@pytest.mark.parametrize(
    "change",
    [
        lambda cookie: cookie[:-1] + ("0" if cookie[-1] != "0" else "1"),
        lambda cookie: cookie.replace("key-1", "key-2"),
        lambda cookie: cookie.replace(".1", ".2", 1),
        lambda _: "",
        lambda _: "key-1",
        lambda _: "key-1..",
        lambda _: "key-1.²." + "0" * 64,
        lambda _: f"key-1.{'9' * 5000}." + "0" * 64,
        lambda cookie: cookie + "é",
    ],
)
async def test_a_forged_cookie_is_nobody(change: object) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    cookie = session.issue(KEY, now)
    assert callable(change)
    assert await session.check(OneKey(), cookie, now) == KEY
    assert await session.check(OneKey(), change(cookie), now) is None
    assert await session.check(OneKey(), cookie, now + session.LIFETIME + timedelta(1)) is None
