"""Takes README's two pictures of the page: `python docs/photograph.py URL`, of a page with a real engine behind it."""

import asyncio
import shutil
import sys
from pathlib import Path

from playwright.async_api import Page, async_playwright

FOLDER = Path(__file__).parent
ANSWER_MS = 120_000


async def photograph(url: str) -> None:
    """Chats and votes as a person would, and takes a picture of that and of the board."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = await browser.new_page(viewport={"width": 1120, "height": 900})
        page.set_default_timeout(ANSWER_MS)
        await page.goto(url)
        await ask(page, "In one sentence: why do cats purr?", "Send")
        await page.get_by_role("button", name="Good: this answer").click()
        await ask(page, "And why do dogs wag their tails? Two sentences.", "Compare two answers")
        await page.get_by_role("button", name="B is better").click()
        await page.get_by_role("button", name="B is better", pressed=True).wait_for()
        await page.screenshot(path=FOLDER / "page.png")
        await page.get_by_role("link", name="Board").click()
        await page.locator("#rounds tbody tr").first.wait_for()
        await page.screenshot(path=FOLDER / "board.png", full_page=True)
        await browser.close()


async def ask(page: Page, message: str, button: str) -> None:
    await page.get_by_label("Message", exact=True).fill(message)
    await page.get_by_role("button", name=button).click()


if __name__ == "__main__":
    asyncio.run(photograph(sys.argv[1]))
