"""The operator's board in a browser, with rounds and versions in a real store."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page, expect
from prefloop.v1 import policy_pb2

from server.store.learning.round_metrics import (
    CheckMetrics,
    FailedCheck,
    Improvement,
    RewardModelMetrics,
    RoundMetrics,
    SignalTest,
    StepMetrics,
    VoteCounts,
)
from server.store.store import Store
from tests.clients.web.conftest import Site, serving_page, together
from tests.clients.web.test_chat import ask, good
from tests.round_metrics import candidate_metrics, filled, gate_metrics
from tests.server.conftest import Running, publish_version, register, running_server
from tests.server.versions.test_ab_test import choose, open_duel

pytestmark = together

METRICS = RoundMetrics(
    votes=filled(VoteCounts, choices=140, thumbs=8, corrections=2, train=100, judge=50),
    signal=filled(SignalTest, accuracy=0.68, p_value=0.005, level=0.01, spent=[]),
    reward_model=filled(RewardModelMetrics, accuracy=0.69, votes=48, longer_wins=0.47),
    improvement=Improvement(
        steps=[
            filled(
                StepMetrics,
                step=n,
                score=0.3 * n - 0.2,
                uncertainty=0.1,
                kl=0.1 * n * n,
                length=62 - n,
                entropy=2.0,
                clipfrac=0.0002 * n,
                value_loss=0.06,
                mismatch_rms=0.07,
                kl_coef=0.1 - 0.01 * n,
            )
            for n in range(8)
        ],
        candidates=[3, 5],
        ended_by="steps",
        kl_target=3.5,
        kl_budget=6.0,
    ),
    gate=gate_metrics(candidate_metrics(5, kl=2.18, rate=0.73, length=56.4), candidate_metrics(3, kl=0.73, rate=0.62)),
    seconds={"start": 9.0, "reward_model": 14.0, "improve": 145.0, "gate": 81.0, "activate": 21.0},
)


async def run_a_round(running: Running, metrics: RoundMetrics = METRICS) -> str:
    """Writes a promoted round and its version v0001 as a learner would; returns the round's id."""
    publish_version(running.data_dir, "v0001")

    def write(store: Store) -> str:
        fence = store.leases.acquire("learner", "here", 60)
        assert fence
        round_ = store.rounds.create(0, {}, reference_version="v0000", fence=fence)
        store.rounds.update(round_.id, stage="activate", metrics=metrics, policy_version="v0001", fence=fence)
        store.policies.register(
            "v0001",
            kind="full",
            state="candidate",
            parent_version="v0000",
            reference_version="v0000",
            round_id=round_.id,
            reward_model_version=None,
            metrics={},
        )
        store.rounds.finish(round_.id, "promoted", reason="v0001 won 0.73 of 64 prompts.", fence=fence)
        store.leases.release(fence)
        return round_.id

    round_id = await running.store(write)
    answers = {"incumbent": {"text": "**Before**, long."}, "step 5": {"text": "After."}}
    line = {"conversation_id": "", "prompt": "Why is the sky <b>blue</b>?", "prompt_token_ids": [1], **answers}
    folder = running.data_dir / "rounds" / round_id
    folder.mkdir(parents=True)
    (folder / "answers.jsonl").write_text(json.dumps(line) + "\n")
    return round_id


async def active(site: Site) -> Any:
    request = policy_pb2.GetActivePolicyRequest()
    return await site.running.policies.GetActivePolicy(request, metadata=[("x-user-id", "ann")], timeout=10)


async def board(site: Site) -> Page:
    page = await site.visit("/board")
    await expect(page.get_by_role("heading", level=1)).to_have_text("Board")
    return page


async def test_a_fresh_server_says_what_there_is_not(site: Site) -> None:
    page = await board(site)
    await expect(page.locator("#served")).to_contain_text("v0000 since")
    await expect(page.locator("#served")).to_contain_text(
        "Nothing was active before, so there is nothing to roll back to."
    )
    await expect(page.locator("#learner")).to_contain_text("No learner is listening.")
    await expect(page.locator("#rounds")).to_contain_text("None yet.")
    await expect(page.locator("#rates")).to_contain_text("No round has been judged yet.")


async def test_votes_are_counted_by_day_and_kind(site: Site) -> None:
    page = await site.visit()
    await ask(page, "Hello.")
    await good(page).click()
    await ask(page, "Which?", compare=True)
    await page.get_by_role("button", name="Both bad").click()
    await expect(page.get_by_role("button", name="Both bad", pressed=True)).to_be_visible()
    page = await board(site)
    await page.get_by_text("As a table").click()
    await expect(page.locator("#votes tbody td")).to_have_text(["1", "1", "0", "0"])
    titles = await page.locator("#votes svg rect title").all_text_contents()
    assert [title.split(": ")[1] for title in titles] == ["1 choices", "1 thumbs"]
    await expect(page.locator("#learner")).to_contain_text("2 votes wait to be learned from.")


async def test_a_round_is_a_row_that_opens(site: Site) -> None:
    round_id = await run_a_round(site.running)
    page = await board(site)
    row = page.locator("#rounds tbody tr")
    await expect(row.locator("td").nth(1)).to_have_text("150")
    await expect(row.locator("td").nth(2)).to_have_text("0.69")
    await expect(row.locator("td").nth(3)).to_have_text("2.2")
    await expect(row.locator("td").nth(4)).to_have_text("0.73 [0.63, 0.83]")
    await expect(row.locator("td").nth(5)).to_have_text("promoted v0001")
    await expect(row.locator("td").nth(6)).to_have_text("4.5")
    short = round_id.removeprefix("round_")[:6]
    assert await page.locator("#rates svg g title").all_text_contents() == [f"{short}: 0.73 [0.63, 0.83]"]
    await row.get_by_role("link").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text(f"Round {short}: promoted")
    await expect(page.get_by_text("v0001 won 0.73 of 64 prompts.")).to_be_visible()
    await expect(page.locator(".charts figure")).to_have_count(8)
    await expect(page.locator(".charts polygon")).to_have_count(1)
    await expect(page.get_by_text("5 (chosen)")).to_be_visible()
    sample = page.locator(".sample")
    await expect(sample.locator(".message")).to_have_text("Why is the sky <b>blue</b>?")
    await expect(sample.locator(".text")).to_have_text(["Before, long.", "After."])
    response = await page.goto(f"{site.url}/board/rounds/round_of_nobody")
    assert response
    assert response.status == 404


async def test_checks_are_a_column_and_what_failed_is_shown(site: Site) -> None:
    failed = FailedCheck("no advice", "has 'should'", "You **should** <b>rest</b>.", incumbent_failed=True)
    assert METRICS.gate
    gate = replace(METRICS.gate, checks=CheckMetrics(20, [failed], 1, score=0.81, incumbent_score=0.8))
    await run_a_round(site.running, replace(METRICS, gate=gate))
    page = await board(site)
    await expect(page.locator("#rounds thead")).to_contain_text("checks passed")
    row = page.locator("#rounds tbody tr")
    await expect(row.locator("td").nth(5)).to_have_text("19 of 20, score 0.81")
    await row.get_by_role("link").click()
    await expect(page.get_by_role("heading", name="Checks: 19 of 20, score 0.81 passed")).to_be_visible()
    shown = page.get_by_label("Failed check")
    await expect(shown.locator("p").first).to_have_text("no advice: has 'should'; so did the version before")
    await expect(shown.locator(".text")).to_have_text("You should <b>rest</b>.")


async def test_promote_and_roll_back_say_what_they_will_do_and_do_it(site: Site) -> None:
    await run_a_round(site.running)
    page = await board(site)
    await page.locator("#promote-v0001").click()
    await expect(page.get_by_text("v0001 replaces v0000 within seconds.")).to_be_visible()
    await page.get_by_label("Reason").fill("read it myself")
    await page.get_by_role("button", name="Promote v0001").click()
    await expect(page.locator("#served .big")).to_have_text("v0001")
    assert site.running.engine.version == "v0001"
    await page.locator("#rollback").click()
    await expect(page.locator("#served").get_by_text("v0000 replaces v0001 within seconds.")).to_be_visible()
    await page.get_by_label("Reason").first.fill("too terse")
    await page.get_by_role("button", name="Roll back").click()
    await expect(page.locator("#served .big")).to_have_text("v0000")
    assert (await active(site)).policy.version == "v0000"
    moves = await site.running.store(lambda store: store.lineage.moves(2))
    assert [(move.action, move.version, move.actor, move.reason) for move in moves] == [
        ("rollback", "v0000", "ann", "too terse"),
        ("activate", "v0001", "ann", "read it myself"),
    ]


async def test_a_lever_that_was_shown_for_another_version_does_nothing(site: Site) -> None:
    await run_a_round(site.running)
    page = await board(site)
    await page.locator("#promote-v0001").click()
    publish_version(site.running.data_dir, "v0002")

    def move(store: Store) -> None:
        register(store, "v0002")
        store.policies.activate("v0002", actor="olga", action="activate", reason="first")

    await site.running.store(move)
    await page.get_by_role("button", name="Promote v0001").click()
    await expect(page.get_by_role("alert")).to_contain_text("v0002")
    assert (await active(site)).policy.version == "v0002"


async def test_a_round_is_asked_for_and_followed(site: Site) -> None:
    running = site.running
    await running.store(lambda store: store.round_requests.listen("here", None))
    page = await board(site)
    await page.locator("#run-round").click()
    await expect(page.get_by_text("A better version is activated automatically")).to_be_visible()
    await page.get_by_role("button", name="Run the round").click()
    await expect(page.locator("#learner")).to_contain_text("is about to start")
    taken = await running.store(lambda store: store.round_requests.take("here"))
    assert taken is not None
    await running.store(lambda store: store.round_requests.end(taken, "here", "Nothing to learn: there are no votes."))
    # The same refresh happens automatically every ten seconds.
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page.locator("#learner")).to_contain_text("Nothing to learn: there are no votes.")


async def test_versions_side_by_side_show_how_they_stand(tmp_path: Path, browser: Browser) -> None:
    async with running_server(tmp_path, serve_adapters=True) as running:
        await open_duel(running)
        for number, loser in enumerate(["v0000", "v0000", "v0001"]):
            await choose(running, f"user{number}", loser=loser)
        async with serving_page(f"127.0.0.1:{running.app.port}") as port:
            page = await Site(f"http://127.0.0.1:{port}", running, browser).visit("/board")
            duel = page.locator("#duel")
            await expect(duel.get_by_role("heading")).to_have_text("v0001 against v0000")
            await expect(duel).to_contain_text("v0001 won 0.67 [0.21, 0.94] of the choices between them")
            await expect(duel).to_contain_text("2 won, 1 lost, 0 drawn")
            # The comparison ends when one of the two is rolled back.
            await page.locator("#rollback").click()
            await page.get_by_role("button", name="Roll back").click()
            await expect(page.locator("#served .big")).to_have_text("v0000")
            await expect(duel).to_be_hidden()
            await page.context.close()


async def test_what_is_being_written_survives_the_boards_own_refresh(site: Site) -> None:
    await run_a_round(site.running)
    page = await board(site)
    await page.locator("#promote-v0001").click()
    await page.get_by_label("Reason").fill("half a rea")
    await site.running.store(lambda store: store.round_requests.listen("here", None))
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page.locator("#learner")).to_contain_text("Idle.")
    await expect(page.get_by_label("Reason")).to_have_value("half a rea")
