"""Sign-in, acceptance of forms, limits, and the security headers of every response."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from playwright.async_api import expect
from prefloop.v1 import account_pb2

from clients.http import connections
from clients.web.sign_in import KEY
from tests.clients.web.conftest import Site, serving_page, together
from tests.clients.web.test_chat import ask, good
from tests.server.conftest import Running, running_server

pytestmark = together

PAGES = ["/", "/conversations", "/board", "/sign-in", "/c/none", "/nowhere", "/static/page.js", "/static/page.css"]
ACTIONS = [
    *("/messages", "/thumbs", "/choices", "/corrections", "/retractions", "/c/x/stop", "/c/x/delete"),
    *("/sign-in", "/sign-out", "/board/round", "/board/promote", "/board/rollback"),
]


@pytest_asyncio.fixture(loop_scope="session")
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def http(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    """The page without a browser, on a server without keys."""
    async with serving_page(f"127.0.0.1:{running.app.port}") as port, asking(port) as http:
        yield http


def asking(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10)


async def give_key(running: Running, user: str, role: Any = "user") -> str:
    """Creates a key and waits until the running server accepts it."""
    key: str = await running.store(lambda store: store.keys.create(user, role))
    request, metadata = account_pb2.GetCallerRequest(), [("authorization", f"Bearer {key}")]
    while not (await running.account.GetCaller(request, metadata=metadata, timeout=10)).has_key:
        await asyncio.sleep(0.01)
    return key


@pytest.mark.parametrize("path", PAGES)
async def test_every_response_forbids_what_is_not_ours(http: httpx.AsyncClient, path: str) -> None:
    response = await http.get(path)
    assert response.headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types prefloop"
    )
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    assert response.headers["cache-control"] == ("no-cache" if path.startswith("/static/") else "no-store")


@pytest.mark.parametrize("path", ACTIONS)
@pytest.mark.parametrize(
    "headers",
    [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "http://evil.example"}],
    ids=["cross-site", "same-site", "older browser"],
)
async def test_another_sites_form_is_refused(http: httpx.AsyncClient, path: str, headers: dict[str, str]) -> None:
    response = await http.post(path, data={"message": "as you"}, headers=headers)
    assert (response.status_code, response.text) == (403, "This form was sent by another site.")


async def test_our_own_forms_are_taken(http: httpx.AsyncClient) -> None:
    for headers in ({"sec-fetch-site": "same-origin"}, {"origin": str(http.base_url).rstrip("/")}, {}):
        response = await http.post("/messages", data={"message": "hello"}, headers=headers)
        assert response.status_code == 303, headers


async def nothing_more(reader: asyncio.StreamReader) -> bool:
    """Whether the other end has hung up."""
    try:
        return await asyncio.wait_for(reader.read(), 20) == b""
    except ConnectionError:
        return True


async def test_a_connection_too_many_is_closed_and_the_others_go_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECTIONS", 3)
    async with serving_page(f"127.0.0.1:{running.app.port}") as port:
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
        assert [await nothing_more(reader) for reader, _ in opened[3:]] == [True, True]
        reader, writer = opened[0]
        writer.write(b"GET /static/page.css HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        for _, writer in opened:
            writer.close()


async def test_headers_that_do_not_come_in_time_end_a_connection(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADERS_SECONDS", 0.2)
    async with serving_page(f"127.0.0.1:{running.app.port}") as port:
        for begun in (b"", b"GET / HTTP/1.1\r\nHost: 127"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(begun)
            assert await nothing_more(reader)
            writer.close()


@pytest.mark.parametrize(
    ("size", "end", "status"), [(40_000, b"\r\n\r\n", b"200 OK"), (100_000, b"", b"400 Bad Request")]
)
async def test_headers_have_a_size(running: Running, size: int, end: bytes, status: bytes) -> None:
    async with serving_page(f"127.0.0.1:{running.app.port}") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /static/page.css HTTP/1.1\r\nHost: 127.0.0.1\r\nx: " + b"x" * size + end)
        assert await reader.readline() == b"HTTP/1.1 " + status + b"\r\n"
        writer.close()


async def test_a_request_has_a_size_whatever_it_is_made_of(running: Running) -> None:
    """Trailers, which follow a body, are headers, too, and nothing reads them."""
    async with serving_page(f"127.0.0.1:{running.app.port}") as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /messages HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ")
        # Well before the time that headers may take.
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                for _ in range(200):
                    writer.write(b"a" * 65_536)
                    await writer.drain()
            with contextlib.suppress(ConnectionError):
                await reader.read()
        assert writer.transport.is_closing() or reader.at_eof()
        writer.close()


@pytest.mark.parametrize("kind", ["data", "files"])
async def test_nobody_fills_the_memory_with_a_form(http: httpx.AsyncClient, kind: str) -> None:
    for path in ("/sign-in", "/messages"):
        response = await http.post(path, **{kind: {"message": "x" * 2**20}})  # type: ignore[arg-type]
        assert (response.status_code, "The request is too large." in response.text) == (413, True), path
    response = await http.post("/messages", data={"message": "😀" * 500})
    assert response.status_code == 303


async def test_a_name_that_somebody_else_points_here_is_refused(http: httpx.AsyncClient) -> None:
    response = await http.get("/", headers={"host": "evil.example"})
    assert response.status_code == 400
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("charset", ["klingon", "utf-16", "ascii", "idna", "undefined"])
async def test_a_form_in_an_odd_encoding_is_refused_or_read(http: httpx.AsyncClient, charset: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="message"\r\n\r\n\xc3\xa9\xff odd\r\n--x--\r\n'
    kind = f"multipart/form-data; boundary=x; charset={charset}"
    response = await http.post("/messages", content=body, headers={"content-type": kind})
    assert response.status_code in (303, 400, 415)
    response = await http.post(
        "/messages",
        content=b"message=%ff",
        headers={"content-type": f"application/x-www-form-urlencoded; charset={charset}"},
    )
    assert response.status_code in (303, 400, 415)


async def test_every_action_refuses_what_is_no_form_of_ours(http: httpx.AsyncClient) -> None:
    """Empty fields and values that no button sends get a sentence each, never an internal error."""
    found = {path: (await http.post(path, data={"choice": "c", "thumb": "?"})).status_code for path in ACTIONS}
    assert found == {
        "/messages": 400,
        "/thumbs": 400,
        "/choices": 400,
        "/corrections": 400,
        "/retractions": 400,
        "/c/x/stop": 303,
        "/c/x/delete": 404,
        "/sign-in": 403,
        "/sign-out": 303,
        "/board/round": 409,
        "/board/promote": 400,
        "/board/rollback": 400,
    }


async def test_a_name_signs_in_on_a_server_without_keys(site: Site) -> None:
    page = await site.visit("/sign-in", name="nobody")
    await page.get_by_label("Name").fill("Zoë")
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_role("alert").filter(has_text="printable ASCII")).to_be_visible()
    await page.get_by_label("Name").fill("zoe")
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.locator(".who .name")).to_have_text("zoe")
    [cookie] = await page.context.cookies()
    assert (cookie["name"], cookie["value"]) == ("prefloop_name", "zoe")
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Lax")


async def test_what_can_be_no_key_and_no_name_is_refused_like_a_wrong_one(http: httpx.AsyncClient) -> None:
    for key in ("clé", "two\nlines", "nul\0"):
        response = await http.post("/sign-in", data={"key": key})
        assert (response.status_code, "printable ASCII" in response.text) == (403, True), key
    for cookie in (rb'prefloop_key="cl\303\251"', "prefloop_name=Zoë".encode("latin-1")):
        response = await http.get("/", headers={"cookie": cookie})
        assert (response.status_code, response.headers.get("location")) == (303, "/sign-in"), cookie


async def test_a_key_signs_in_and_out_and_a_revoked_one_is_asked_for_again(site: Site) -> None:
    key = await give_key(site.running, "ann")
    page = await site.visit()
    await page.wait_for_url("**/sign-in")
    await page.get_by_label("API key").fill("key_wrong.guess")
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.get_by_text("This API key is unknown or was revoked.")).to_be_visible()
    await page.get_by_label("API key").fill(key)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.locator(".who .name")).to_have_text("ann")
    assert [cookie["name"] for cookie in await page.context.cookies()] == ["prefloop_key"]
    assert await page.evaluate("document.cookie") == ""
    # Users cannot open the board, even by its URL.
    await expect(page.get_by_role("link", name="Board")).to_have_count(0)
    response = await page.goto(f"{site.url}/board")
    assert response
    assert response.status == 403
    await expect(page.get_by_role("alert")).to_have_text("The board is for operators.")
    await page.goto(site.url)
    await ask(page, "Hello.")
    await expect(good(page)).to_be_visible()
    await site.running.store(lambda store: store.keys.revoke(key.partition(".")[0]))
    while (await page.request.get(site.url)).url != f"{site.url}/sign-in":
        await asyncio.sleep(0.05)
    await good(page).click()
    await page.wait_for_url("**/sign-in")


async def test_signing_out_forgets_the_key(site: Site) -> None:
    key = await give_key(site.running, "olga", "operator")
    page = await site.visit(key=key)
    await expect(page.get_by_role("link", name="Board")).to_be_visible()
    await page.get_by_role("button", name="Sign out").click()
    await page.wait_for_url("**/sign-in")
    assert await page.context.cookies() == []


async def test_where_strangers_can_come_nobody_enters_without_a_key(running: Running) -> None:
    """Without keys, the server trusts every caller on its own machine, and so would trust the page."""
    address = f"127.0.0.1:{running.app.port}"
    async with serving_page(address, default_name=None, secure=True) as port, asking(port) as http:
        for cookies in ({}, {"prefloop_name": "ann"}, {f"__Host-{KEY}": "key_any.thing"}, {KEY: "key_any.thing"}):
            http.cookies.clear()
            http.cookies.update(cookies)
            answers = [(await http.get("/")), (await http.post("/messages", data={"message": "hello"}))]
            assert [answer.status_code for answer in answers] == [403, 403], cookies
            assert "the server has no keys to identify them" in answers[0].text
        http.cookies.clear()
        key = await give_key(running, "ann")
        response = await http.post("/sign-in", data={"key": key})
        assert response.status_code == 303
        assert "; Secure" in response.headers["set-cookie"]
