"""A/B tests of two versions: the evidence, which versions are shown, and the rollback of a loser."""

import asyncio
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prefloop.v1 import chat_pb2, feedback_pb2, policy_pb2

from server.store.e_value import AbTestResult, e_value
from server.store.store import Store
from tests.server.conftest import Running, publish_version, register, running_server
from tests.server.rpc.test_rpcs import compare


@pytest.mark.parametrize(
    ("wins", "losses", "e"),
    # 2 * integral over (0, 1/2) of p^w (1-p)^l, times 2^(w+l); the last by numerical integration.
    [(0, 0, 1.0), (0, 1, 1.5), (1, 0, 0.5), (1, 1, 2 / 3), (0, 5, 10.5), (10, 30, 63.227924)],
)
def test_the_e_value_equals_its_integral(wins: int, losses: int, e: float) -> None:
    assert e_value(wins, losses) == pytest.approx(e, rel=1e-7)


def test_checking_after_every_vote_finds_no_loser_among_equals() -> None:
    chance = random.Random(1)
    kept = cache(e_value)
    found = 0
    for _ in range(2000):
        wins = losses = 0
        for _ in range(200):
            wins, losses = (wins + 1, losses) if chance.random() < 0.5 else (wins, losses + 1)
            if kept(wins, losses) >= 20:
                found += 1
                break
    # At most a twentieth, 100, by Ville's inequality.
    assert found == 63


def test_evidence_for_better_and_worse_is_symmetric() -> None:
    duel = AbTestResult("v0002", "v0001", wins=30, losses=10, draws=4)
    assert (duel.won, duel.lost) == (pytest.approx(63.227924), pytest.approx(0.045889, rel=1e-4))
    assert str(duel) == "30 wins, 10 losses and 4 draws against v0001"


async def activate(running: Running, version: str) -> None:
    request = policy_pb2.ActivatePolicyRequest(version=version)
    await running.policies.ActivatePolicy(request, metadata=(("x-user-id", "operator"),))


async def choose(running: Running, user: str, loser: str) -> None:
    """Request a comparison and choose the answer that is not `loser`'s."""
    who = (("x-user-id", user),)
    before = len(running.engine.pinned)
    started = (await compare(running, user=who))[0].started
    first, second = running.engine.pinned[before:]
    assert {first, second} == {"v0000", "v0001"}
    assert [sampling.temperature for sampling in running.engine.samplings[before:]] == [0.85, 0.85]

    def slots(store: Store) -> tuple[str, str]:
        comparison = store.responses.comparison(user, started.comparison_id)
        return comparison.a.policy_version, comparison.b.policy_version

    a, _ = await running.store(slots)
    choice = feedback_pb2.CHOICE_B if a == loser else feedback_pb2.CHOICE_A
    vote = feedback_pb2.SubmitChoiceRequest(comparison_id=started.comparison_id, choice=choice)
    await running.feedback.SubmitChoice(vote, metadata=who)


async def until_active(running: Running, version: str) -> None:
    async with asyncio.timeout(10):
        while running.engine.version != version:
            await asyncio.sleep(0)


async def open_duel(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    await running.store(lambda store: register(store, "v0001"))
    await activate(running, "v0001")
    async with asyncio.timeout(10):
        while "v0000" not in running.engine.live:
            await asyncio.sleep(0)


async def test_a_version_is_not_shown_before_it_is_loaded(tmp_path: Path) -> None:
    async with running_server(tmp_path, serve_adapters=True) as running:
        await open_duel(running)
        publish_version(running.data_dir, "v0002")
        await running.store(lambda store: register(store, "v0002"))
        running.engine.may_swap.clear()
        activation = asyncio.create_task(activate(running, "v0002"))
        async with asyncio.timeout(10):
            while "v0001" not in running.engine.live:
                await asyncio.sleep(0)
        before = len(running.engine.pinned)
        await compare(running)
        assert running.engine.pinned[before:] == [None, None]
        running.engine.may_swap.set()
        await activation


async def test_the_loser_is_rolled_back_by_the_server(tmp_path: Path) -> None:
    async with running_server(tmp_path, serve_adapters=True) as running:
        await vote_before(running, 10)
        await open_duel(running)
        for number in range(7):
            assert running.engine.version == "v0001"
            await choose(running, f"user{number}", loser="v0001")
        await until_active(running, "v0000")
        move = await running.store(lambda store: store.lineage.moves(1)[0])
        assert (move.action, move.actor, move.version) == ("rollback", "server", "v0000")
        assert move.reason == "lost: 0 wins, 7 losses and 0 draws against v0000"
        # No version is compared with one that was just rolled back.
        before = len(running.engine.pinned)
        await compare(running)
        assert running.engine.pinned[before:] == [None, None]


async def vote_before(running: Running, users: int) -> None:
    """A vote of each of these users from before the test."""
    for number in range(users):
        who = (("x-user-id", f"early{number}"),)
        started = (await compare(running, user=who))[0].started
        vote = feedback_pb2.SubmitChoiceRequest(comparison_id=started.comparison_id, choice=feedback_pb2.CHOICE_A)
        await running.feedback.SubmitChoice(vote, metadata=who)


async def test_one_of_many_users_cannot_decide_a_test(tmp_path: Path) -> None:
    async with running_server(tmp_path, serve_adapters=True) as running:
        await vote_before(running, 9)
        await open_duel(running)
        for _ in range(8):
            await choose(running, "ann", loser="v0001")
        duel: Any = await running.store(lambda store: store.lineage.duel(10, 10))
        assert (duel.wins, duel.losses, duel.few_voters) == (0, 1, 0)
        assert running.engine.version == "v0001"


async def test_where_few_people_vote_several_votes_of_each_count(tmp_path: Path) -> None:
    async with running_server(tmp_path, serve_adapters=True, ab_test_user_votes=3) as running:
        await vote_before(running, 8)
        await open_duel(running)
        for _ in range(8):
            await choose(running, "ann", loser="v0001")
        duel: Any = await running.store(lambda store: store.lineage.duel(10, 3))
        assert (duel.wins, duel.losses, duel.few_voters) == (0, 3, 9)
        assert str(duel) == ("0 wins, 3 losses and 0 draws against v0000, several votes of each of the 9 who vote here")


async def test_a_single_user_decides_alone(tmp_path: Path) -> None:
    async with running_server(tmp_path, serve_adapters=True, ab_test_user_votes=3) as running:
        await open_duel(running)
        for _ in range(7):
            await choose(running, "ann", loser="v0001")
        await until_active(running, "v0000")
        move = await running.store(lambda store: store.lineage.moves(1)[0])
        assert move.reason == "lost: 0 wins, 7 losses and 0 draws against v0000, all by the one who votes here"


async def test_a_choice_changed_after_the_versions_were_shown_counts_as_it_was_first(tmp_path: Path) -> None:
    async with running_server(tmp_path, serve_adapters=True) as running:
        await open_duel(running)
        await choose(running, "ann", loser="v0001")
        who = (("x-user-id", "ann"),)
        [vote] = (await running.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest(), metadata=who)).feedback
        other = feedback_pb2.CHOICE_A if vote.choice == feedback_pb2.CHOICE_B else feedback_pb2.CHOICE_B
        for _ in range(2):
            changed = feedback_pb2.SubmitChoiceRequest(comparison_id=vote.comparison_id, choice=other)
            await running.feedback.SubmitChoice(changed, metadata=who)
            duel: Any = await running.store(lambda store: store.lineage.duel(10, 10))
            assert (duel.wins, duel.losses) == (0, 1)
            # Nor does it help to take it back and vote again.
            [vote] = (await running.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest(), metadata=who)).feedback
            retract = feedback_pb2.RetractFeedbackRequest(feedback_id=vote.feedback_id)
            await running.feedback.RetractFeedback(retract, metadata=who)
            duel = await running.store(lambda store: store.lineage.duel(10, 10))
            assert (duel.wins, duel.losses) == (0, 1)


async def test_a_comparison_of_versions_is_blind_until_the_choice(tmp_path: Path) -> None:
    async with running_server(tmp_path, serve_adapters=True) as running:
        await open_duel(running)
        who = (("x-user-id", "ann"),)
        started = (await compare(running, user=who))[0].started
        request = chat_pb2.GetConversationRequest(conversation_id=started.conversation_id)

        async def versions() -> list[list[str]]:
            shown = await running.chat.GetConversation(request, metadata=who)
            comparison = shown.conversation.turns[0].comparison
            return [[span.policy_version for span in answer.spans] for answer in (comparison.a, comparison.b)]

        assert await versions() == [[], []]
        vote = feedback_pb2.SubmitChoiceRequest(comparison_id=started.comparison_id, choice=feedback_pb2.CHOICE_TIE)
        await running.feedback.SubmitChoice(vote, metadata=who)
        assert sorted(await versions()) == [["v0000"], ["v0001"]]


async def test_merged_weights_are_compared_with_themselves(running: Running) -> None:
    publish_version(running.data_dir, "v0001")
    await running.store(lambda store: register(store, "v0001"))
    await activate(running, "v0001")
    await compare(running)
    assert running.engine.pinned == [None, None]
    assert sorted(sampling.temperature for sampling in running.engine.samplings) == [0.7, 1.0]


async def shown_duel(running: Running) -> Any:
    return await running.policies.GetActivePolicy(policy_pb2.GetActivePolicyRequest(), metadata=(("x-user-id", "op"),))


async def test_operators_see_the_result_of_a_running_test(tmp_path: Path) -> None:
    async with running_server(tmp_path, serve_adapters=True, ab_test_user_votes=2) as running:
        assert not (await shown_duel(running)).HasField("duel")
        await open_duel(running)
        for user, loser in (("ann", "v0000"), ("ann", "v0001"), ("ann", "v0001"), ("bob", "v0001"), ("cem", "v0001")):
            await choose(running, user, loser)
        started = (await compare(running, user=(("x-user-id", "dee"),)))[0].started
        tie = feedback_pb2.SubmitChoiceRequest(comparison_id=started.comparison_id, choice=feedback_pb2.CHOICE_TIE)
        await running.feedback.SubmitChoice(tie, metadata=(("x-user-id", "dee"),))
        duel = (await shown_duel(running)).duel
        # Of ann's three votes the first two count.
        assert (duel.version, duel.opponent_version) == ("v0001", "v0000")
        assert (duel.wins, duel.losses, duel.draws) == (1, 3, 1)
        # 2 * 2^4 * integral over (0, 1/2) of p (1-p)^3 = 32 * 13/320, and of p^3 (1-p) = 32 * 3/320.
        assert duel.evidence_worse == pytest.approx(1.3)
        assert duel.evidence_better == pytest.approx(0.3)
        await running.policies.RollbackPolicy(policy_pb2.RollbackPolicyRequest(), metadata=(("x-user-id", "op"),))
        assert not (await shown_duel(running)).HasField("duel")


async def test_without_side_by_side_versions_there_is_no_ab_test(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running:
        publish_version(running.data_dir, "v0001")
        await running.store(lambda store: register(store, "v0001"))
        await activate(running, "v0001")
        assert (await running.store(lambda store: store.lineage.duel(10, 10))) is not None
        assert not (await shown_duel(running)).HasField("duel")


async def test_the_result_is_of_the_two_versions_that_are_shown(tmp_path: Path) -> None:
    # Only this test calls `look`.
    async with running_server(tmp_path, serve_adapters=True, poll_seconds=1000) as running:
        for version in ("v0001", "v0002"):
            publish_version(running.data_dir, version)
            await running.store(lambda store, v=version: register(store, v))
        ab_test = running.app._ab_test
        assert ab_test
        await activate(running, "v0001")
        assert not (await shown_duel(running)).HasField("duel")
        await ab_test.look()
        assert (await shown_duel(running)).duel.version == "v0001"
        # Until the next `look`, Compare does not show these two, and no others.
        await activate(running, "v0002")
        assert not (await shown_duel(running)).HasField("duel")
        await ab_test.look()
        assert (await shown_duel(running)).duel.opponent_version == "v0001"
