"""`make serve` as a newcomer runs it: one command, with a real browser, engine and learner."""

import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.async_api import expect

from tests.clients.web.conftest import browsing
from tests.clients.web.test_chat import ask
from tests.e2e.conftest import START_SECONDS, STOP_SECONDS, children
from tests.ports import free_port

pytestmark = pytest.mark.e2e

ANSWER_MS = 60_000


async def test_one_command_chats_votes_and_asks_for_a_round(model: str, tmp_path: Path) -> None:
    serve = [sys.executable, "-m", "clients.cli", "web", "--serve", "--web-port", "0"]
    environment = {
        "PREFLOOP_MODEL": model,
        "PREFLOOP_DATA_DIR": str(tmp_path / "data"),
        "PREFLOOP_PORT": str(free_port()),
        "PREFLOOP_METRICS_PORT": "0",
        "PREFLOOP_COMPILE": "false",
        "PREFLOOP_MAX_TOKENS": "24",
    }
    process = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    below: list[int] = []
    try:
        assert process.stdout
        url = next(found[1] for line in process.stdout if (found := re.match(r"chat on (\S+)", line)))
        async with browsing() as browser:
            page = await browser.new_page()
            # The page is there at once and waits for the server.
            await page.goto(url)
            await expect(page.get_by_label("Message", exact=True)).to_be_visible(timeout=START_SECONDS * 1000)
            below = [os.pidfd_open(pid) for pid in children(process.pid)]
            await ask(page, "Say hello.")
            good = page.get_by_role("button", name="Good: this answer")
            await expect(good).to_be_visible(timeout=ANSWER_MS)
            await good.click()
            await expect(good).to_have_attribute("aria-pressed", "true")
            await ask(page, "Say it again.", compare=True)
            choice = page.get_by_role("button", name="B is better")
            await expect(choice).to_be_visible(timeout=ANSWER_MS)
            await choice.click()
            await expect(page.get_by_text("The conversation goes on with B.")).to_be_visible()
            await page.get_by_role("link", name="Board").click()
            await expect(page.locator("#served .big")).to_have_text("v0000")
            await expect(page.locator("#learner")).to_contain_text("2 votes wait to be learned from.")
            await page.locator("#run-round").click()
            await page.get_by_role("button", name="Run the round").click()
            await expect(page.locator("#learner")).to_contain_text("Last requested round", timeout=ANSWER_MS)
            await expect(page.locator("#learner")).to_contain_text("few")
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(2 * STOP_SECONDS)
    assert status == 0
    assert all(select.select([one], [], [], 20)[0] for one in below)
