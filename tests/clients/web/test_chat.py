"""Chatting and voting in a browser. The page shows the server's state each time; the tests check that state too."""

import asyncio
from typing import Any

import pytest
from playwright.async_api import Locator, Page, Route, expect
from prefloop.v1 import chat_pb2, feedback_pb2
from prefloop.v1.chat_pb2 import COMPARISON_STATE_CHOSEN, FINISH_REASON_CANCELLED, SLOT_A, SLOT_B, Turn
from prefloop.v1.feedback_pb2 import (
    CHOICE_A,
    CHOICE_B,
    CHOICE_BOTH_BAD,
    CHOICE_TIE,
    FEEDBACK_KIND_CORRECTION,
    THUMB_DOWN,
    THUMB_UP,
)

from tests.clients.web.conftest import Site, together

pytestmark = together


async def ask(page: Page, message: str, *, compare: bool = False) -> None:
    await page.get_by_label("Message", exact=True).fill(message)
    await page.get_by_role("button", name="Compare two answers" if compare else "Send").click()


async def turns(site: Site, page: Page, name: str = "ann") -> list[Turn]:
    """The turns of the conversation that a page shows, as the server has them."""
    request = chat_pb2.GetConversationRequest(conversation_id=page.url.rpartition("/c/")[2])
    response = await site.running.chat.GetConversation(request, metadata=[("x-user-id", name)], timeout=10)
    return list(response.conversation.turns)


async def events(site: Site) -> int:
    """How many votes have been cast, changed or retracted."""
    return int(await site.running.store(lambda store: store._db.row("SELECT count(*) AS n FROM feedback_events")["n"]))


def good(page: Page) -> Any:
    return page.get_by_role("button", name="Good: this answer")


async def test_an_answer_grows_while_it_is_written(site: Site) -> None:
    engine = site.running.engine
    engine.answer, engine.hold_after = "Owls live **in trees**.", 2
    page = await site.visit()
    await ask(page, "Where do owls live?")
    text = page.locator(".text")
    await expect(text).to_have_text("Owls live")
    await expect(page.get_by_role("button", name="Stop")).to_be_visible()
    await expect(page.get_by_role("status")).to_have_text("The answer is being written.")
    engine.go_on.set()
    await expect(text).to_have_text("Owls live in trees.")
    await expect(text.locator("strong")).to_have_text("in trees")
    await expect(page.get_by_text("v0000 · 4 tokens")).to_be_visible()
    await expect(page.get_by_role("status")).to_have_text("The answer has ended.")
    await expect(page.get_by_role("button", name="Stop")).to_have_count(0)
    # The conversation has a title, an entry in the list, and a URL.
    await expect(page.get_by_role("heading", level=1)).to_have_text("Where do owls live?")
    await expect(page.locator("#conversations [aria-current=page]")).to_have_text("Where do owls live?")
    assert page.url.startswith(f"{site.url}/c/conv_")
    await expect(page.get_by_label("Message", exact=True)).to_be_focused()
    await expect(page.get_by_label("Message", exact=True)).to_have_value("")


async def test_stop_keeps_what_was_written(site: Site) -> None:
    site.running.engine.hold_after = 2
    page = await site.visit()
    await ask(page, "Count.")
    await expect(page.locator(".text")).to_have_text("one two")
    await page.get_by_role("button", name="Stop").click()
    await expect(page.get_by_text("v0000 · 2 tokens · stopped")).to_be_visible()
    [turn] = await turns(site, page)
    assert (turn.response.text, turn.response.finish_reason) == ("one two ", FINISH_REASON_CANCELLED)


@pytest.mark.parametrize("by", ["mouse", "key"])
async def test_stop_is_pressed_at_leisure_while_the_answer_grows(site: Site, by: str) -> None:
    engine = site.running.engine
    engine.answer, engine.pause = "word " * 200, 0.03
    page = await site.visit()
    await ask(page, "Count.")
    await expect(page.locator(".text")).to_contain_text("word word")
    # The press lasts longer than the time between two updates.
    if by == "mouse":
        await page.get_by_role("button", name="Stop").click(delay=250)
    else:
        await page.get_by_role("button", name="Stop").press("Space", delay=250)
    await expect(page.get_by_text("tokens · stopped")).to_be_visible(timeout=3000)


async def test_one_reads_further_up_while_the_answer_grows(site: Site) -> None:
    page = await site.visit()
    gap = "document.body.scrollHeight - innerHeight - scrollY"
    await ask(page, "A line.\n" * 60)
    await expect(good(page)).to_be_visible()
    engine = site.running.engine
    engine.answer, engine.pause = "word " * 200, 0.02
    await ask(page, "Count.")
    await expect(page.locator(".text").last).to_contain_text("word word")
    assert await page.evaluate(gap) < 1
    # The end stays in sight, until one turns the wheel.
    await page.mouse.move(600, 300)
    await page.mouse.wheel(0, -100)
    await asyncio.sleep(0.5)
    assert await page.evaluate(gap) > 50
    await page.get_by_role("button", name="Stop").press("Enter")
    await expect(page.get_by_text("tokens · stopped")).to_be_visible()


async def test_enter_that_ends_a_composition_sends_nothing(site: Site) -> None:
    page = await site.visit()
    await page.get_by_label("Message", exact=True).fill("にほん")
    # As Safari tells it: after the composition, with the key code of an input method.
    key = "{key: 'Enter', keyCode: 229, bubbles: true, cancelable: true}"
    await page.evaluate(f"document.getElementById('message').dispatchEvent(new KeyboardEvent('keydown', {key}))")
    await asyncio.sleep(0.3)
    await expect(page.get_by_label("Message", exact=True)).to_have_value("にほん")
    assert page.url == f"{site.url}/"


async def test_a_second_message_goes_on_in_the_conversation(site: Site) -> None:
    page = await site.visit()
    await ask(page, "First.")
    await expect(good(page)).to_have_count(1)
    await ask(page, "Second.")
    await expect(good(page)).to_have_count(2)
    assert [turn.message for turn in await turns(site, page)] == ["First.", "Second."]
    await expect(page.locator(".message")).to_have_text(["First.", "Second."])


async def test_a_thumb_its_comment_and_its_undo(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Hello.")
    await good(page).click()
    await expect(good(page)).to_have_attribute("aria-pressed", "true")
    await expect(good(page)).to_be_focused()
    await page.get_by_text("Say why").click()
    await page.get_by_label("Comment on this answer").fill("short & <b>clear</b>")
    await page.get_by_role("button", name="Save", exact=True).click()
    await expect(page.get_by_text("Your comment")).to_be_visible()
    [thumb] = (await turns(site, page))[0].response.feedback
    assert (thumb.thumb, thumb.comment) == (THUMB_UP, "short & <b>clear</b>")
    # The other thumb replaces it and keeps the comment.
    await page.get_by_role("button", name="Bad: this answer").click()
    await expect(good(page)).to_have_attribute("aria-pressed", "false")
    [thumb] = (await turns(site, page))[0].response.feedback
    assert (thumb.thumb, thumb.comment) == (THUMB_DOWN, "short & <b>clear</b>")
    await page.get_by_role("button", name="Undo").click()
    await expect(page.get_by_role("button", name="Undo")).to_have_count(0)
    assert list((await turns(site, page))[0].response.feedback) == []


async def test_a_double_click_is_one_vote(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Hello.")
    await good(page).dblclick()
    await expect(good(page)).to_have_attribute("aria-pressed", "true")
    # The second click of a double click, after the first one was answered.
    await good(page).hover()
    await page.mouse.down(click_count=2)
    await page.mouse.up(click_count=2)
    await page.reload()
    await expect(good(page)).to_have_attribute("aria-pressed", "true")
    assert await events(site) == 1


async def test_a_double_click_sends_one_message(site: Site) -> None:
    page = await site.visit()
    await page.get_by_label("Message", exact=True).fill("Once.")
    await page.get_by_role("button", name="Send").dblclick()
    await expect(good(page)).to_have_count(1)
    assert [turn.message for turn in await turns(site, page)] == ["Once."]
    # The same form again, as a browser without scripts sends it when one clicks twice.
    await page.goto(site.url)
    form = {"message": "Twice?", "conversation_id": "", "request_id": "form-1", "mode": "chat"}
    first, second = [await page.request.post(f"{site.url}/messages", form=form) for _ in range(2)]
    assert first.url == second.url


async def test_an_answer_is_edited_into_a_correction(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Where do owls live?")
    await page.get_by_text("Correct", exact=True).click()
    box = page.get_by_label("What this answer should have been")
    await expect(box).to_have_value("one two three four ")
    await box.fill("In trees.\n\nAnd in <i>barns</i>.")
    await page.get_by_role("button", name="Save correction").click()
    await expect(page.locator(".said")).to_have_text("In trees.\n\nAnd in <i>barns</i>.")
    [correction] = (await turns(site, page))[0].response.feedback
    assert correction.kind == FEEDBACK_KIND_CORRECTION
    assert correction.correction == "In trees.\n\nAnd in <i>barns</i>."
    await page.get_by_role("button", name="Undo").click()
    await expect(page.locator(".said")).to_have_count(0)
    assert list((await turns(site, page))[0].response.feedback) == []


@pytest.mark.parametrize(
    ("button", "key", "choice", "outcome"),
    [
        ("A is better", "a", CHOICE_A, "The conversation goes on with A."),
        ("B is better", "b", CHOICE_B, "The conversation goes on with B."),
        ("Equally good", "t", CHOICE_TIE, "The conversation goes on with "),
        ("Both bad", "x", CHOICE_BOTH_BAD, "The model does not see this turn again."),
    ],
)
async def test_a_choice_by_mouse_and_by_key(site: Site, button: str, key: str, choice: int, outcome: str) -> None:
    site.running.engine.answers = ["from A", "from B"] * 2
    page = await site.visit()
    await ask(page, "Which?", compare=True)
    await page.get_by_role("button", name=button).click()
    pressed = page.get_by_role("button", name=button, pressed=True)
    await expect(pressed).to_be_focused()
    await expect(page.locator(".outcome")).to_contain_text(outcome)
    [turn] = await turns(site, page)
    assert (turn.comparison.state, turn.comparison.feedback.choice) == (COMPARISON_STATE_CHOSEN, choice)
    # By key, from anywhere within the two answers.
    await page.goto(site.url)
    await ask(page, "Which?", compare=True)
    await expect(page.get_by_role("button", name=button)).to_be_visible()
    await page.keyboard.press("Shift+Tab")
    await page.keyboard.press(key)
    await expect(pressed).to_be_visible()
    [turn] = await turns(site, page)
    assert turn.comparison.feedback.choice == choice


async def test_a_choice_shows_the_versions_and_can_be_changed_and_taken_back(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Which?", compare=True)
    better = page.get_by_role("button", name="B is better")
    await expect(better).to_be_visible()
    # Versions are not shown before the choice.
    await expect(page.locator(".answer .quiet")).to_have_text(["4 tokens", "4 tokens"])
    await expect(page.get_by_role("button", name="Good: answer A")).to_have_count(0)
    await better.click()
    await expect(page.locator(".answer .quiet")).to_have_text(["v0000 · 4 tokens", "v0000 · 4 tokens"])
    await expect(page.locator(".answer.chosen h2")).to_have_text("B")
    await page.get_by_role("button", name="A is better").click()
    await expect(page.get_by_role("button", name="A is better", pressed=True)).to_be_visible()
    # The vote changes, but not the history.
    await expect(page.locator(".answer.chosen h2")).to_have_text("B")
    await page.get_by_role("button", name="Good: answer A").click()
    await expect(page.get_by_role("button", name="Good: answer A", pressed=True)).to_be_visible()
    await page.locator(".choice").get_by_role("button", name="Undo").click()
    await expect(page.get_by_role("button", name="A is better", pressed=True)).to_have_count(0)
    [turn] = await turns(site, page)
    assert not turn.comparison.HasField("feedback")
    assert turn.comparison.continued_with == SLOT_B
    assert [vote.thumb for vote in turn.comparison.a.feedback] == [THUMB_UP]


async def test_a_comparison_without_a_choice_goes_on_with_a(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Which?", compare=True)
    await expect(page.get_by_role("button", name="A is better")).to_be_visible()
    await ask(page, "And now?")
    await expect(page.get_by_text("No choice was made; the conversation went on with A.")).to_be_visible()
    assert (await turns(site, page))[0].comparison.continued_with == SLOT_A


async def test_everything_by_keyboard_alone(site: Site) -> None:
    page = await site.visit()
    keys = page.keyboard

    async def tab_to(name: str, back: bool = False) -> None:
        for _ in range(60):
            await keys.press("Shift+Tab" if back else "Tab")
            words = "document.activeElement.ariaLabel || document.activeElement.textContent.trim()"
            if (await page.evaluate(words)).startswith(name):
                return
        raise AssertionError(f"Tab never reaches {name!r}")

    await keys.type("Hello.")
    await keys.press("Enter")
    await expect(good(page)).to_be_visible()
    await tab_to("Good", back=True)
    await keys.press("Space")
    await expect(good(page)).to_have_attribute("aria-pressed", "true")
    await tab_to("Correct")
    await keys.press("Enter")
    await keys.press("Tab")
    await keys.press("Control+A")
    await keys.type("Hi.")
    await keys.press("Tab")
    await keys.press("Enter")
    await expect(page.locator(".said")).to_have_text("Hi.")
    await page.get_by_label("Message", exact=True).focus()
    await keys.type("Two")
    await keys.press("Shift+Enter")
    await keys.type("lines")
    await tab_to("Compare two answers")
    await keys.press("Enter")
    await expect(page.get_by_role("button", name="Both bad")).to_be_visible()
    await tab_to("Both bad", back=True)
    await keys.press("Enter")
    await expect(page.get_by_role("button", name="Both bad", pressed=True)).to_be_visible()
    await tab_to("Delete", back=True)
    await keys.press("Enter")
    await tab_to("Delete permanently")
    deleted = page.url
    first, second = await turns(site, page)
    assert (len(first.response.feedback), second.message, second.dropped) == (2, "Two\nlines", True)
    await keys.press("Enter")
    await page.wait_for_url(f"{site.url}/")
    assert (await page.request.get(deleted)).status == 404


async def test_a_reload_shows_the_same(site: Site) -> None:
    engine = site.running.engine
    page = await site.visit()
    await ask(page, "Hello.")
    await good(page).click()
    await expect(page.get_by_role("button", name="Undo")).to_be_visible()
    await ask(page, "Which?", compare=True)
    await page.get_by_role("button", name="Equally good").click()
    await expect(page.get_by_role("button", name="Equally good", pressed=True)).to_be_visible()
    everything = "elements => elements.map(element => element.outerHTML)"
    shown = await page.locator("article").evaluate_all(everything)
    await page.reload()
    assert await page.locator("article").evaluate_all(everything) == shown
    # A reload in the middle of an answer continues with it.
    engine.hold_after = 2
    await ask(page, "More.")
    await expect(page.locator(".text").last).to_have_text("one two")
    await page.reload()
    await expect(page.locator(".text").last).to_have_text("one two")
    engine.go_on.set()
    await expect(page.locator(".text").last).to_have_text("one two three four")
    await expect(page.get_by_role("button", name="Stop")).to_have_count(0)


async def test_an_answer_that_another_program_asked_for_is_followed_too(site: Site) -> None:
    engine = site.running.engine
    engine.hold_after = 2
    call = site.running.chat.Chat(chat_pb2.ChatRequest(message="From afar."), metadata=[("x-user-id", "ann")])
    started = (await call.read()).started
    await engine.holding.wait()
    page = await site.visit(f"/c/{started.conversation_id}")
    async with page.expect_response("**/answer") as following:
        await page.reload()
    assert (await following.value).status == 200
    await expect(page.get_by_text("writing")).to_be_visible()
    await expect(page.get_by_role("button", name="Stop")).to_have_count(0)
    engine.go_on.set()
    await expect(page.locator(".text")).to_have_text("one two three four")
    await expect(good(page)).to_be_visible()


@pytest.mark.parametrize("compare", [False, True])
async def test_what_was_stopped_can_be_asked_for_again(site: Site, compare: bool) -> None:
    engine = site.running.engine
    engine.hold_after = 2
    page = await site.visit()
    await ask(page, "Count.", compare=compare)
    await expect(page.locator(".text").last).to_have_text("one two")
    await page.get_by_role("button", name="Stop").click()
    again = page.get_by_role("button", name="Ask again")
    await expect(again).to_be_visible()
    engine.go_on.set()
    await again.click()
    await expect(page.locator(".text").last).to_have_text("one two three four")
    first, second = await turns(site, page)
    assert (first.message, second.message) == ("Count.", "Count.")
    assert second.HasField("comparison") == compare


async def test_two_people_at_once_see_their_own(site: Site) -> None:
    engine = site.running.engine
    engine.answers, engine.hold_after = ["for ann alone", "for bob alone"], 2
    ann, bob = await site.visit(), await site.visit(name="bob")
    await ask(ann, "I am ann.")
    await expect(ann.locator(".text")).to_have_text("for ann")
    await ask(bob, "I am bob.")
    await expect(bob.locator(".text")).to_have_text("for bob")
    engine.go_on.set()
    await expect(ann.locator(".text")).to_have_text("for ann alone")
    await expect(bob.locator(".text")).to_have_text("for bob alone")
    await good(bob).click()
    await expect(bob.get_by_role("button", name="Undo")).to_be_visible()
    assert [len(turn.response.feedback) for turn in await turns(site, ann)] == [0]
    assert [len(turn.response.feedback) for turn in await turns(site, bob, "bob")] == [1]
    theirs = ann.url.removeprefix(site.url)
    response = await bob.goto(site.url + theirs)
    assert response
    assert response.status == 404
    await expect(bob.get_by_text("I am ann.")).to_have_count(0)


async def test_a_vote_in_one_tab_is_seen_in_the_other(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Hello.")
    await expect(good(page)).to_be_visible()
    other = await page.context.new_page()
    await other.goto(page.url)
    await good(other).click()
    await expect(good(other)).to_have_attribute("aria-pressed", "true")
    # The event that the browser sends to a page that becomes visible.
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(good(page)).to_have_attribute("aria-pressed", "true")


async def test_what_one_has_opened_and_begun_to_write_stays_when_the_page_is_refreshed(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Hello.")
    await page.get_by_text("Correct", exact=True).click()
    await page.get_by_label("What this answer should have been").fill("half a correct")
    await ask(page, "Another.")
    await expect(good(page)).to_have_count(2)
    await expect(page.get_by_label("What this answer should have been").first).to_have_value("half a correct")


async def test_what_one_has_begun_to_write_stays_when_its_own_turn_changes(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Hello.")
    await page.get_by_text("Correct", exact=True).click()
    box = page.get_by_label("What this answer should have been")
    await box.fill("half a correct")
    await good(page).click()
    await expect(good(page)).to_have_attribute("aria-pressed", "true")
    await expect(box).to_be_visible()
    await expect(box).to_have_value("half a correct")
    # The box is closed once the text is sent.
    await page.get_by_role("button", name="Save correction").click()
    await expect(page.locator(".said")).to_have_text("half a correct")
    await expect(box).to_be_hidden()


async def test_what_one_writes_while_a_message_is_on_its_way_stays(site: Site) -> None:
    page = await site.visit()
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def hold(route: Route) -> None:
        arrived.set()
        await go_on.wait()
        await route.continue_()

    await page.route("**/messages", hold)
    await ask(page, "First.")
    await arrived.wait()
    box = page.get_by_label("Message", exact=True)
    await box.fill("The next one")
    go_on.set()
    await expect(good(page)).to_be_visible()
    await expect(box).to_have_value("The next one")


async def test_a_conversation_is_deleted_after_a_question(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Forget this.")
    await expect(good(page)).to_be_visible()
    await page.get_by_text("Delete", exact=True).click()
    await expect(page.get_by_text("This permanently deletes the conversation")).to_be_visible()
    await page.get_by_role("button", name="Delete permanently").click()
    await page.wait_for_url(f"{site.url}/")
    await expect(page.locator("#conversations")).to_contain_text("None yet.")
    listed = await site.running.chat.ListConversations(
        chat_pb2.ListConversationsRequest(), metadata=[("x-user-id", "ann")]
    )
    assert list(listed.conversations) == []


async def test_a_conversation_is_deleted_in_the_middle_of_an_answer(site: Site) -> None:
    site.running.engine.hold_after = 2
    page = await site.visit()
    await ask(page, "Forget this.")
    await expect(page.locator(".text")).to_have_text("one two")
    await page.get_by_text("Delete", exact=True).click()
    await page.get_by_role("button", name="Delete permanently").click()
    await page.wait_for_url(f"{site.url}/")
    await expect(page.locator("#conversations")).to_contain_text("None yet.")


async def reload_until(page: Page, shown: Locator) -> None:
    """Reloads until `shown` is there, as a user without scripts would."""
    async with asyncio.timeout(10):
        while not await shown.count():
            await page.reload()


async def test_without_scripts_the_page_does_the_same(site: Site) -> None:
    page = await site.visit(script=False)
    async with page.expect_navigation(url="**/c/conv_*"):
        await ask(page, "Hello,\nyou.")
    # Browsers send CRLF in forms; the stored message has LF.
    assert [turn.message for turn in await turns(site, page)] == ["Hello,\nyou."]
    await reload_until(page, good(page))
    await good(page).click()
    await expect(good(page)).to_have_attribute("aria-pressed", "true")
    await page.get_by_role("button", name="Undo").click()
    await expect(good(page)).to_have_attribute("aria-pressed", "false")
    async with page.expect_navigation():
        await ask(page, "Which?", compare=True)
    both_bad = page.get_by_role("button", name="Both bad")
    await reload_until(page, both_bad)
    await both_bad.click()
    await expect(page.get_by_text("The model does not see this turn again.")).to_be_visible()
    # A page loaded in the middle of an answer shows the part so far.
    engine = site.running.engine
    engine.hold_after = 2
    async with page.expect_navigation():
        await ask(page, "Count.")
    await engine.holding.wait()
    await reload_until(page, page.get_by_text("one two", exact=True))
    async with page.expect_navigation():
        await page.get_by_role("button", name="Stop").click()
    await reload_until(page, page.get_by_text("2 tokens · stopped"))
    engine.go_on.set()


async def test_a_vote_that_came_from_elsewhere_is_shown(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Hello.")
    await expect(good(page)).to_be_visible()
    [turn] = await turns(site, page)
    request = feedback_pb2.SubmitThumbRequest(response_id=turn.response.response_id, thumb=THUMB_DOWN)
    await site.running.feedback.SubmitThumb(request, metadata=[("x-user-id", "ann")], timeout=10)
    await page.reload()
    await expect(page.get_by_role("button", name="Bad: this answer")).to_have_attribute("aria-pressed", "true")


async def test_turns_of_a_callers_own_history_are_shown(site: Site) -> None:
    said = [
        feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content="Welcome!"),
        feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content="Where do owls live?"),
    ]
    call = site.running.chat.Chat(chat_pb2.ChatRequest(messages=said), metadata=[("x-user-id", "ann")], timeout=10)
    started, *_ = [event async for event in call]
    page = await site.visit(f"/c/{started.started.conversation_id}")
    await expect(page.locator(".text")).to_have_text(["Welcome!", "one two three four"])
    await expect(page.locator(".message")).to_have_text(["Where do owls live?"])
    # Only what the model sampled can be voted on.
    await expect(good(page)).to_have_count(1)
