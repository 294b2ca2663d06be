"""Layout of the pages: nothing overlaps, nothing is cut off, and every control has an accessible name.

If PREFLOOP_SCREENSHOTS is set, screenshots are saved in that folder.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.clients.web.conftest import Site, together
from tests.clients.web.test_board import run_a_round
from tests.clients.web.test_chat import ask, good
from tests.tiers import slow

pytestmark = together

WIDTHS = (320, 768, 1280)
LONG = "Wordwithoutanyspace" * 12
# Text and controls that overlap, unless one contains the other. The composer is sticky, so it is checked in its final
# position at the end of the page.
OVERLAPS = """() => {
  const which = "button, a, summary, input:not([type=hidden]), textarea, .text, .message, h1, h2, td, th, svg";
  const shown = [...document.querySelectorAll(which)]
    .filter(element => element.checkVisibility() && element.getBoundingClientRect().width > 1);
  const found = [];
  for (const [index, one] of shown.entries()) for (const other of shown.slice(index + 1)) {
    if (one.contains(other) || other.contains(one)) continue;
    const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && high > 1) found.push(`${one.outerHTML.slice(0, 80)} and ${other.outerHTML.slice(0, 80)}`);
  }
  return found;
}"""
# Elements wider than the window. Only those that scroll by themselves may be.
CUT = """() => [...document.querySelectorAll("body *")]
  .filter(element => element.checkVisibility() && !element.closest(".scroll, pre, table, .unseen, svg"))
  .filter(element => element.getBoundingClientRect().right > innerWidth + 1)
  .map(element => element.outerHTML.slice(0, 80))"""

# Text of a chart that extends beyond it.
CLIPPED = """() => [...document.querySelectorAll("svg text")]
  .filter(text => {
    const words = text.getBoundingClientRect(), all = text.ownerSVGElement.getBoundingClientRect();
    const wide = words.left < all.left - 1 || words.right > all.right + 1;
    return wide || words.top < all.top - 1 || words.bottom > all.bottom + 1;
  })
  .map(text => text.textContent)"""

# Text of a chart that overlaps other text. The boxes are inset to allow for the line height around the glyphs.
COLLIDING = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
  const words = [...svg.querySelectorAll("text")].filter(text => text.textContent.trim());
  const boxes = words.map(text => text.getBoundingClientRect());
  const inset = 2;
  return words.flatMap((one, index) => words.slice(index + 1)
    .filter((_, next) => {
      const a = boxes[index], b = boxes[index + 1 + next];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      return wide > inset && high > inset;
    })
    .map(other => `${one.textContent} and ${other.textContent}`));
})"""


async def look(page: Page, name: str) -> None:
    """Takes a screenshot and checks the layout."""
    width = page.viewport_size["width"] if page.viewport_size else 0
    # As high as the page, so that nothing scrolls.
    await page.set_viewport_size({"width": width, "height": 300})
    height = await page.evaluate("document.documentElement.scrollHeight")
    await page.set_viewport_size({"width": width, "height": max(height, 700)})
    if folder := os.environ.get("PREFLOOP_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        await page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
    assert await page.evaluate("document.documentElement.scrollWidth") <= width, name
    assert await page.evaluate(CUT) == [], name
    assert await page.evaluate(OVERLAPS) == [], name
    assert await page.evaluate(CLIPPED) == [], name
    assert await page.evaluate(COLLIDING) == [], name
    assert await nameless(page) == [], name


async def nameless(page: Page) -> list[str]:
    session = await page.context.new_cdp_session(page)
    tree: Any = await session.send("Accessibility.getFullAXTree")
    controls = {"button", "link", "textbox", "checkbox", "combobox", "searchbox", "DisclosureTriangle"}
    return [
        node["nodeId"]
        for node in tree["nodes"]
        if node.get("role", {}).get("value") in controls
        and not node.get("ignored")
        and not node.get("name", {}).get("value", "").strip()
    ]


async def long_conversation(site: Site) -> str:
    """Creates a conversation with every kind of content; returns its path."""
    engine = site.running.engine
    engine.answers = [f"# Heading {LONG} | a | b |", f"`{LONG}` and some more words to fill a line or two", "B", "last"]
    page = await site.visit()
    await ask(page, f"Long: {LONG}")
    await good(page).click()
    await page.get_by_text("Say why").click()
    await page.get_by_text("Correct", exact=True).click()
    await page.get_by_label("What this answer should have been").fill(LONG)
    await page.get_by_role("button", name="Save correction").click()
    await expect(page.locator(".said")).to_be_visible()
    await ask(page, "Which?", compare=True)
    await page.get_by_role("button", name="A is better").click()
    await expect(page.get_by_role("button", name="A is better", pressed=True)).to_be_visible()
    await ask(page, "Another?", compare=True)
    await expect(page.get_by_role("button", name="Both bad")).to_have_count(2)
    return page.url.removeprefix(site.url)


# The narrowest in light and the widest in dark, then the rest.
@pytest.mark.parametrize(
    "looks",
    [[(320, False), (1280, True)], slow([(320, True), (768, False), (768, True), (1280, False)])],
    ids=["some", "the rest"],
)
async def test_the_pages_at_every_width_in_light_and_dark(site: Site, looks: list[tuple[int, bool]]) -> None:
    conversation = await long_conversation(site)
    round_id = await run_a_round(site.running)
    places = {
        "new": "/",
        "conversation": conversation,
        "conversations": "/conversations",
        "board": "/board",
        "round": f"/board/rounds/{round_id}",
        "sign-in": "/sign-in",
        "missing": "/nowhere",
    }
    for width, dark in looks:
        page = await site.visit(width=width, dark=dark)
        for name, path in places.items():
            await page.set_viewport_size({"width": width, "height": 800})
            await page.goto(site.url + path)
            for summary in await page.locator("summary").all():
                await summary.click()
            await look(page, f"{name}-{width}-{'dark' if dark else 'light'}")
        await page.close()


async def test_two_answers_that_are_being_written(site: Site) -> None:
    site.running.engine.hold_after = 1
    for width in WIDTHS:
        page = await site.visit(width=width)
        await ask(page, "Which?", compare=True)
        await expect(page.locator(".text").last).to_have_text("one")
        await look(page, f"writing-{width}")
    site.running.engine.go_on.set()


# The contrast ratio of a colour and its background, as defined by WCAG 2.
CONTRAST = """([selector, pseudo, property]) => {
  const luminance = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
      .map(value => value / 255).map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let behind = property === "color" ? element : element.parentElement;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const colours = [getComputedStyle(element, pseudo)[property], getComputedStyle(behind).backgroundColor];
  const [dark, light] = colours.map(luminance).sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
}"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_contrasts(site: Site, dark: bool) -> None:
    page = await site.visit(dark=dark)
    await ask(page, "Hello.")
    await good(page).click()
    await expect(good(page)).to_have_attribute("aria-pressed", "true")
    for selector in (
        ".text",
        ".message",
        ".answer .quiet",
        "#send",
        "#compare",
        "#keys",
        "a",
        ".who .name",
        ".votes .link",
    ):
        assert await page.evaluate(CONTRAST, [selector, "", "color"]) >= 4.5, selector
    assert await page.evaluate(CONTRAST, ["[aria-pressed=true]", "", "color"]) >= 4.5
    assert await page.evaluate(CONTRAST, ["#message", "::placeholder", "color"]) >= 4.5
    # The border of the text field.
    assert await page.evaluate(CONTRAST, ["#message", "", "borderTopColor"]) >= 3


async def test_little_height_is_for_reading(site: Site) -> None:
    page = await site.visit(width=320)
    await page.set_viewport_size({"width": 320, "height": 256})
    await ask(page, "A line.\n" * 30)
    await expect(good(page)).to_be_visible()
    await page.evaluate("scrollTo(0, 0)")
    assert await page.locator("#composer").evaluate("element => element.getBoundingClientRect().top") > 256


async def test_keys_are_not_promised_without_scripts(site: Site) -> None:
    page = await site.visit(script=False)
    await expect(page.locator("#keys")).to_be_hidden()
    page = await site.visit()
    await expect(page.locator("#keys")).to_be_visible()
