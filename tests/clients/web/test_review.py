"""The page that compares answers: one pair after another, with the mouse, the keyboard, and without scripts."""

from playwright.async_api import expect

from server.store.store import Store
from tests.clients.web.conftest import Site, together
from tests.server.store.test_reviews import asked, offer

pytestmark = together


def choices(store: Store) -> list[tuple[str, str]]:
    """What was chosen, and the version of that answer, oldest first."""
    return [
        (vote.choice, {"A": vote.a, "B": vote.b}[vote.choice].policy_version if vote.choice in "AB" else "")
        for vote in store.snapshots.take().choices
    ]


async def test_pairs_are_compared_one_after_another(site: Site) -> None:
    await site.running.store(lambda store: offer(store, asked("one"), asked("two"), asked("three")))
    page = await site.visit("/")
    await page.get_by_role("link", name="Compare", exact=True).click()
    await expect(page.locator("#review")).to_contain_text("3 wait for you")
    await expect(page.locator(".message")).to_have_text("one")
    better = "A" if "new" in await page.get_by_label("Answer A").inner_text() else "B"
    await page.get_by_role("button", name=f"{better} is better").click()
    await expect(page.locator(".message")).to_have_text("two")
    assert await site.running.store(choices) == [(better, "v0001")]
    await page.get_by_role("button", name="Skip").click()
    await expect(page.locator(".message")).to_have_text("three")
    await page.keyboard.press("t")
    await expect(page.locator("#review")).to_contain_text("That was the last one. Thank you.")
    assert await site.running.store(choices) == [(better, "v0001"), ("TIE", "")]
    # None of them is among the chats.
    await page.goto(site.url)
    await expect(page.locator("#conversations a")).to_have_count(1)


async def test_keys_choose_at_once(site: Site) -> None:
    await site.running.store(lambda store: offer(store, asked("one"), asked("two")))
    page = await site.visit("/review")
    # The browser moves the focus to the pair only when it draws the page, which can be later than the first key.
    await page.evaluate("document.activeElement.blur()")
    await page.keyboard.press("b")
    await expect(page.locator(".message")).to_have_text("two")
    await page.keyboard.press("x")
    await expect(page.locator("#review")).to_contain_text("That was the last one.")
    assert [choice for choice, _ in await site.running.store(lambda store: choices(store))] == ["B", "BOTH_BAD"]


async def test_nothing_to_compare_is_said(site: Site) -> None:
    page = await site.visit("/review")
    await expect(page.locator("#review")).to_contain_text("There is nothing to compare right now.")


async def test_reviews_work_without_scripts_on_a_phone(site: Site) -> None:
    await site.running.store(lambda store: offer(store, asked("one"), asked("two")))
    page = await site.visit("/review", script=False, width=360)
    await page.get_by_role("button", name="Equally good").click()
    await expect(page.locator(".message")).to_have_text("two")
    width = await page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360
