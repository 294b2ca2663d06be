"""A hostile page in the user's own browser can neither read nor change anything."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.clients.web.conftest import WAIT_MS, Site, together
from tests.clients.web.test_chat import ask

pytestmark = together

# Each attempt reports the content that it read, or that it was kept out.
ATTEMPTS = """
async ([url, conversation]) => {
    const limit = (promise) => Promise.race([promise, new Promise((done) => setTimeout(done, 3000, "silence"))]);
    const loads = (tag, attribute, address) => limit(new Promise((done) => {
        const element = document.createElement(tag);
        element.onload = () => done("loaded");
        element.onerror = () => done("kept out");
        element[attribute] = address;
        document.body.append(element);
    }));
    const opens = (source) => limit(new Promise((done) => {
        source.onopen = source.onmessage = () => done("opened");
        source.onerror = () => done("kept out");
    }));
    const reads = (options) => fetch(url + conversation, options).then((answer) => answer.text(), () => "kept out");
    const form = () => new URLSearchParams({ message: "as you", mode: "chat", request_id: crypto.randomUUID() });
    const found = {};
    found.read = await reads({ credentials: "include" });
    found.read_quietly = await reads({ credentials: "include", mode: "no-cors" });
    found.script = await loads("script", "src", url + conversation);
    found.our_script = await loads("script", "src", url + "/static/page.js");
    found.picture = await loads("img", "src", url + conversation);
    found.style = await loads("script", "src", url + "/static/page.css");
    found.events = await opens(new EventSource(url + conversation + "/answer", { withCredentials: true }));
    found.socket = await opens(new WebSocket(url.replace("http", "ws") + conversation));
    for (const path of ["/messages", conversation + "/delete", "/sign-out", "/board/rollback"]) {
        const post = { method: "POST", mode: "no-cors", credentials: "include" };
        await fetch(url + path, { ...post, body: form() }).catch(() => {});
        navigator.sendBeacon(url + path, form());
        await limit(new Promise((done) => {
            const target = document.createElement("iframe");
            target.name = path;
            document.body.append(target);
            const sent = Object.assign(document.createElement("form"), { action: url + path, method: "post" });
            sent.target = path;
            for (const [name, value] of form()) {
                sent.append(Object.assign(document.createElement("input"), { name, value }));
            }
            document.body.append(sent);
            target.onload = done;
            sent.submit();
        }));
    }
    const frame = document.createElement("iframe");
    frame.src = url + conversation;
    document.body.append(frame);
    await limit(new Promise((done) => { frame.onload = done; }));
    try {
        found.frame = frame.contentDocument ? frame.contentDocument.body.textContent : "kept out";
        found.frame = found.frame || "kept out";
    } catch { found.frame = "kept out"; }
    const opened = window.open(url + conversation);
    await limit(new Promise((done) => setTimeout(done, 1000)));
    try { found.window = opened && !opened.closed ? opened.document.body.textContent : "kept out"; }
    catch { found.window = "kept out"; }
    return found;
}
"""


@asynccontextmanager
async def elsewhere() -> AsyncIterator[int]:
    """Serves an empty page on another port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b"<!doctype html><title>hostile</title><body></body>"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


# Another name for the loopback is another site. Another port is only another origin, so it gets our cookies.
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"], ids=["another site", "another port"])
async def test_a_hostile_page_is_kept_out(site: Site, host: str) -> None:
    page = await site.visit()
    await ask(page, "What is private?")
    await page.wait_for_url("**/c/*")
    conversation = page.url.removeprefix(site.url)
    before = await kept(site)
    async with elsewhere() as port:
        hostile = await page.context.new_page()
        hostile.set_default_timeout(4 * WAIT_MS)
        await hostile.goto(f"http://{host}:{port}/")
        found = await hostile.evaluate(ATTEMPTS, [site.url, conversation])
        await hostile.close()
    assert found == dict.fromkeys(found, "kept out")
    assert len(found) == 10
    assert await kept(site) == before
    # The user is still signed in to the same account.
    await page.reload()
    assert "What is private?" in await page.locator("main").inner_text()


async def kept(site: Site) -> Any:
    def read(store: Any) -> Any:
        conversations = store.conversations.page("ann", 100)
        return [conversations, [len(store.conversations.turns("ann", one.id)) for one in conversations]]

    return await site.running.store.read(read)
