"""The page when something is wrong: restarting servers, rejected requests, and hostile text."""

import asyncio
from pathlib import Path

import pytest
from playwright.async_api import Browser, Route, expect
from prefloop.v1 import chat_pb2

from server.app import App
from tests.clients.web.conftest import Site, serving_page, together
from tests.clients.web.test_access import give_key
from tests.clients.web.test_chat import ask, good, turns
from tests.server.conftest import running_server
from tests.server.fakes import FakeEngine

pytestmark = together

# Each of these would run, fetch, navigate or cover the page if it were not sanitised.
HOSTILE = """
<script>window.pwned = "script"</script>
<img src=x onerror='window.pwned = "img"'> <svg onload='window.pwned = "svg"'></svg>
<iframe src="javascript:parent.pwned = 'frame'"></iframe> <base href="http://127.0.0.1:1/">
<form action="http://127.0.0.1:1/"><button>Give your key</button></form>
<meta http-equiv="refresh" content="0; url=http://127.0.0.1:1/"> <style>* { display: none }</style>
<a href="javascript:window.pwned = 'a'" onclick="window.pwned = 'click'">raw link</a>
[markdown link](javascript:window.pwned='md') [data link](data:text/html,<script>1</script>)
![picture](http://127.0.0.1:1/picture.png) <b id="turns" style="position: fixed; inset: 0">cover</b>
</div></section></article></main><h1>Out</h1> [honest](https://example.org/) `<b>code</b>`
"""


async def restart(site: Site, policy: FakeEngine) -> None:
    """Starts another server on the port and data of the stopped one."""
    running = site.running
    settings = running.app._settings.model_copy(update={"port": running.app.port})
    running.app = App(settings, running.store)
    running.engine = policy
    await running.app.start(policy)


async def test_a_restart_in_the_middle_of_an_answer_is_explained_and_healed(site: Site) -> None:
    old = site.running.engine
    old.answer, old.hold_after = "Owls live in trees.", 2
    page = await site.visit()
    async with page.expect_response("**/answer"):
        await ask(page, "Where do owls live?")
    await expect(page.locator(".text")).to_have_text("Owls live")
    await site.running.app.stop(0)
    await expect(page.get_by_text("The server went away in the middle of this answer.")).to_be_visible()
    await expect(page.locator(".text")).to_have_text("Owls live")
    await restart(site, FakeEngine())
    await expect(page.get_by_text("This is the part that it stored.")).to_be_visible()
    await expect(page.locator(".text")).to_have_text("Owls live")
    # The conversation continues without leaving the page.
    await ask(page, "Again, please.")
    await expect(page.locator(".text").last).to_have_text("one two three four")
    assert [turn.message for turn in await turns(site, page)] == ["Where do owls live?", "Again, please."]


async def test_an_answer_that_broke_off_can_be_asked_for_again(site: Site) -> None:
    engine = site.running.engine
    engine.hold_after = 2
    page = await site.visit()
    await ask(page, "Count.")
    await expect(page.locator(".text")).to_have_text("one two")
    engine.dies = True
    engine.go_on.set()
    await expect(page.get_by_text("cut off by an error")).to_be_visible()
    engine.may_revive.set()
    while engine.dies:
        await asyncio.sleep(0.01)
    await page.get_by_role("button", name="Ask again").click()
    await expect(page.locator(".text").last).to_have_text("one two three four")
    assert [turn.message for turn in await turns(site, page)] == ["Count.", "Count."]


async def test_a_restart_while_the_page_looks_at_another_programs_answer(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    engine = site.running.engine
    engine.hold_after = 2
    call = site.running.chat.Chat(chat_pb2.ChatRequest(message="From afar."), metadata=[("x-user-id", "ann")])
    started = (await call.read()).started
    await engine.holding.wait()
    page = await site.visit(f"/c/{started.conversation_id}")
    await expect(page.get_by_role("status")).to_have_text("The answer is being written.")
    await site.running.app.stop(0)
    await expect(page.get_by_role("alert")).to_contain_text("The server is away")
    await restart(site, FakeEngine())
    await expect(page.get_by_text("2 tokens · stopped")).to_be_visible()
    # This is not an error of the page, so nothing is logged.
    assert "Traceback" not in caplog.text


async def test_a_message_that_cannot_be_sent_stays_in_its_box(site: Site) -> None:
    page = await site.visit()
    await site.running.app.stop(0)
    await ask(page, "Do not lose me.")
    await expect(page.get_by_role("alert")).to_contain_text("The server is away, or just starting.")
    await expect(page.get_by_label("Message", exact=True)).to_have_value("Do not lose me.")
    await restart(site, FakeEngine())
    while (await page.request.get(site.url)).status != 200:
        await asyncio.sleep(0.05)
    await page.get_by_role("button", name="Send").click()
    await expect(good(page)).to_be_visible()
    await expect(page.get_by_role("alert")).to_be_hidden()


async def lose(route: Route) -> None:
    """Lets the request through but drops the response."""
    await route.fetch()
    await route.abort()


async def test_a_message_whose_answer_got_lost_is_sent_once(site: Site) -> None:
    page = await site.visit()

    await page.route("**/messages", lose, times=1)
    await ask(page, "Once.")
    # The page is fetched again and shows the conversation.
    await expect(page.locator("#conversations a", has_text="Once.")).to_be_visible()
    await page.get_by_role("button", name="Send").click()
    await expect(good(page)).to_be_visible()
    assert [turn.message for turn in await turns(site, page)] == ["Once."]
    await expect(page.locator("#conversations .conversations li")).to_have_count(1)


async def test_a_message_whose_answer_got_lost_can_be_written_anew(site: Site) -> None:
    page = await site.visit()

    await page.route("**/messages", lose, times=1)
    await ask(page, "Once.")
    await expect(page.locator("#conversations a", has_text="Once.")).to_be_visible()
    form_id = page.locator("#ids [name=request_id]")
    used = await form_id.input_value()
    await ask(page, "Once more.")
    await expect(page.get_by_role("alert")).to_contain_text("was used with another body")
    # The edited message gets another request id.
    await expect(form_id).not_to_have_value(used)
    await page.get_by_role("button", name="Send").click()
    await expect(good(page)).to_be_visible()
    assert [turn.message for turn in await turns(site, page)] == ["Once more."]


async def test_a_message_that_is_refused_says_why(site: Site) -> None:
    page = await site.visit()
    await ask(page, "x" * 2001)
    await expect(page.get_by_role("alert")).to_contain_text("2000 characters")
    await expect(page.get_by_label("Message", exact=True)).to_have_value("x" * 2001)


async def test_a_page_that_the_server_is_away_for_comes_by_itself(site: Site) -> None:
    await site.running.app.stop(0)
    page = await site.visit()
    await expect(page.get_by_text("This page retries every three seconds.")).to_be_visible()
    await restart(site, FakeEngine())
    await expect(page.get_by_label("Message", exact=True)).to_be_visible()


LOOK_AGAIN = "document.dispatchEvent(new Event('visibilitychange'))"


async def test_a_page_of_somebody_who_signed_out_elsewhere_is_left(site: Site) -> None:
    key = await give_key(site.running, "ann")
    page = await site.visit(key=key)
    await ask(page, "Hello.")
    await expect(good(page)).to_be_visible()
    other = await page.context.new_page()
    await other.goto(site.url)
    await other.get_by_role("button", name="Sign out").click()
    await other.wait_for_url("**/sign-in")
    await page.evaluate(LOOK_AGAIN)
    await page.wait_for_url("**/sign-in")
    await expect(page.get_by_label("API key")).to_be_visible()


async def test_what_is_gone_is_not_asked_for_again_and_again(site: Site) -> None:
    site.running.engine.hold_after = 2
    page = await site.visit()
    await ask(page, "Forget this.")
    await expect(page.locator(".text")).to_have_text("one two")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.request.post(f"{page.url}/delete")
    await expect(page.get_by_role("alert")).to_contain_text("There is no conversation")
    asked.clear()
    await asyncio.sleep(2.5)
    assert asked == []


async def test_what_was_refused_is_said_until_the_next_action(site: Site) -> None:
    page = await site.visit()
    await ask(page, "x" * 2001)
    await expect(page.get_by_role("alert")).to_contain_text("2000 characters")
    async with page.expect_response(site.url + "/"):
        await page.evaluate(LOOK_AGAIN)
    await asyncio.sleep(0.2)
    await expect(page.get_by_role("alert")).to_contain_text("2000 characters")
    await ask(page, "Shorter.")
    await expect(page.get_by_role("alert")).to_be_hidden()


async def test_a_page_out_of_reach_is_tried_again_whatever_one_does_meanwhile(site: Site) -> None:
    page = await site.visit()
    await site.running.app.stop(0)
    await page.evaluate(LOOK_AGAIN)
    await expect(page.get_by_role("alert")).to_contain_text("The server is away")
    await page.evaluate(LOOK_AGAIN)
    await restart(site, FakeEngine())
    await expect(page.get_by_role("alert")).to_be_hidden(timeout=8000)


async def test_the_pages_own_restart_in_the_middle_of_an_answer(tmp_path: Path, browser: Browser) -> None:
    async with running_server(tmp_path) as running:
        running.engine.hold_after = 2
        address = f"127.0.0.1:{running.app.port}"
        async with serving_page(address) as port:
            site = Site(f"http://127.0.0.1:{port}", running, browser)
            page = await site.visit()
            async with page.expect_response("**/answer"):
                await ask(page, "Count.")
            await expect(page.locator(".text")).to_have_text("one two")
        await expect(page.get_by_role("alert")).to_contain_text("This page's own server does not answer.")
        async with serving_page(address, port):
            await expect(page.get_by_text("2 tokens · stopped")).to_be_visible()
            await expect(page.get_by_role("alert")).to_be_hidden()
            await expect(page.locator(".text")).to_have_text("one two")


async def test_hostile_text_stays_text(site: Site) -> None:
    engine = site.running.engine
    engine.answers = [HOSTILE.replace("\n", " "), *[HOSTILE.replace("\n", " ")] * 2]
    page = await site.visit(name="<i>ann</i>")
    await ask(page, HOSTILE)
    await expect(good(page)).to_be_visible()
    await ask(page, "And twice", compare=True)
    await page.get_by_role("button", name="A is better").click()
    await expect(page.get_by_role("button", name="A is better", pressed=True)).to_be_visible()
    await page.get_by_text("Correct", exact=True).first.click()
    await page.get_by_label("What this answer should have been").fill(HOSTILE)
    await page.get_by_role("button", name="Save correction").first.click()
    await expect(page.locator(".said")).to_be_visible()
    await page.reload()
    await expect(page.locator(".text")).to_have_count(3)
    for part in (".text", ".message", ".said", ".title", "#conversations", ".who"):
        forbidden = "script, img, svg, iframe, base, meta, style, b, i, [style], [onclick], [onerror], [onload]"
        assert await page.locator(part).locator(forbidden).count() == 0, part
    assert await page.locator(".text form, .text button, .text [id]").count() == 0
    links = await page.locator(".text a").evaluate_all("all => all.map(a => [a.getAttribute('href'), a.rel])")
    # A picture becomes a link at most.
    rel = "noopener noreferrer nofollow"
    assert links == [["http://127.0.0.1:1/picture.png", rel], ["https://example.org/", rel]] * 3
    assert await page.evaluate("window.pwned") is None
    assert await page.evaluate("getComputedStyle(document.querySelector('.text')).display") == "block"


async def test_the_policy_would_stop_what_got_through(site: Site) -> None:
    """Tests the second line of defence alone, with unsanitised markup in the page."""
    page = await site.visit()
    await page.evaluate(
        """() => {
          const part = document.createElement("div");
          part.append(document.createElement("img"), document.createElement("script"));
          part.firstChild.src = "http://127.0.0.1:1/picture.png";
          part.lastChild.append("window.pwned = true");
          document.body.append(part);
        }"""
    )
    assert await page.evaluate("window.pwned") is None
    with pytest.raises(Exception, match="TrustedHTML"):
        await page.evaluate("document.body.innerHTML = '<b>x</b>'")
    assert any("picture.png' violates" in complaint for complaint in site.complaints)
    assert any("requires 'TrustedScript' assignment" in complaint for complaint in site.complaints)
    site.complaints.clear()
