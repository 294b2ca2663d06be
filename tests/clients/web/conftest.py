"""The page over a real server (only its policy is a fake), in a real browser.

Every test also checks that the browser reports no script error, no violation of the content security policy, and no
request to another host.
"""

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uvicorn
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, Request, async_playwright, expect

from clients.http.command import server_config
from clients.web.app import make_app
from clients.web.sign_in import KEY, NAME
from tests.server.conftest import Running, running_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT_MS = 20_000
expect.set_options(timeout=WAIT_MS)
# The browser logs this for a rejected form, which is not an error.
REFUSED = "Failed to load resource"


@dataclass
class Site:
    """The page's URL, the server behind it, and the browsers that visit it."""

    url: str
    running: Running
    browser: Browser
    contexts: list[BrowserContext] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    async def visit(
        self,
        path: str = "/",
        *,
        name: str = "ann",
        key: str = "",
        width: int = 1280,
        dark: bool = False,
        script: bool = True,
    ) -> Page:
        """Opens a page in a new browser context of a user."""
        context = await self.browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme="dark" if dark else "light",
            java_script_enabled=script,
            timezone_id="UTC",
        )
        context.set_default_timeout(WAIT_MS)
        await context.add_cookies([{"name": KEY if key else NAME, "value": key or name, "url": self.url}])
        self.contexts.append(context)
        page = await context.new_page()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", self._asked)
        await page.goto(self.url + path)
        return page

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and REFUSED not in message.text:
            self.complaints.append(message.text)

    def _asked(self, request: Request) -> None:
        if not request.url.startswith(self.url):
            self.complaints.append(f"a request to {request.url}")


@asynccontextmanager
async def serving_page(address: str, port: int = 0, **options: Any) -> AsyncIterator[int]:
    """Runs the page's own server during the block."""
    listening = socket.create_server(("127.0.0.1", port))
    app = make_app(address, **{"hosts": ["127.0.0.1"], "default_name": "ann", **options})
    config = server_config(app)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield int(listening.getsockname()[1])
    finally:
        server.should_exit = True
        await task
        listening.close()


@asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: `apt-get install chromium`")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        await browser.close()


# All tests share one Chromium, and therefore one event loop.
together = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with browsing() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def site(tmp_path: Path, browser: Browser) -> AsyncIterator[Site]:
    async with running_server(tmp_path, max_tokens=200, max_message_chars=2000) as running:
        running.engine.max_model_len = 1000
        async with serving_page(f"127.0.0.1:{running.app.port}") as port:
            site = Site(f"http://127.0.0.1:{port}", running, browser)
            yield site
            for context in site.contexts:
                await context.close()
            assert site.complaints == []
