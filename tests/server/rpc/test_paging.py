"""Pages: every entry once and in order, no page larger than a client accepts, and votes do not wait for readers."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from prefloop.v1 import chat_pb2, feedback_pb2, policy_pb2

from server.rpc.paging import PAGE_BYTES, fill, in_chunks
from server.store.chats.records import Generation, Span
from server.store.learning.round_metrics import RoundMetrics
from server.store.store import Store
from tests.server.conftest import Running, running_server

ANN = (("x-user-id", "ann"),)


def entry(number: int, size: int) -> tuple[list[Any], chat_pb2.Turn]:
    return [number], chat_pb2.Turn(message="x" * size)


@pytest.mark.parametrize(
    ("sizes", "size", "expected"),
    [
        ([], 3, 0),
        ([10, 10, 10], 3, 3),
        ([10, 10, 10, 10], 3, 3),
        ([PAGE_BYTES // 2 - 10, PAGE_BYTES // 2 - 10, 100], 3, 2),
        # An entry larger than a page is a page by itself.
        ([PAGE_BYTES + 1, 10], 3, 1),
        ([10, PAGE_BYTES + 1], 3, 1),
    ],
)
def test_a_page_ends_where_it_is_full(sizes: list[int], size: int, expected: int) -> None:
    page, token = fill((entry(number, each) for number, each in enumerate(sizes)), size)
    assert len(page) == expected
    assert bool(token) == (expected < len(sizes))


def test_chunks_are_read_to_the_end() -> None:
    asked: list[int | None] = []

    def read(last: int | None) -> list[int]:
        asked.append(last)
        first = 0 if last is None else last + 1
        return list(range(first, min(first + 3, 7)))

    assert list(in_chunks(read)) == [0, 1, 2, 3, 4, 5, 6]
    assert asked == [None, 2, 5, 6]


def long_conversation(store: Store, turns: int, chars: int) -> str:
    conversation = store.conversations.create("ann", "hello")
    for number in range(turns):
        response = store.responses.begin(
            "ann", conversation, message=f"{number} " + "m" * chars, replica_id="here", policy_version="v0000",
            prompt_token_ids=[1] * 100, temperature=0.85, max_tokens=8, seed=None,
        )  # fmt: skip
        generation = Generation([5], [-0.5], "a" * chars, "stop", [Span(0, 1, "v0000")])
        store.responses.finish(response, generation)
        store.feedback.submit_thumb("ann", response, up=True, comment=f"vote {number}")
    return conversation


async def pages(running: Running, conversation_id: str, size: int = 0) -> list[chat_pb2.GetConversationResponse]:
    found, token = [], ""
    while True:
        request = chat_pb2.GetConversationRequest(conversation_id=conversation_id, page_size=size, page_token=token)
        found.append(await running.chat.GetConversation(request, metadata=ANN))
        token = found[-1].next_page_token
        if not token:
            return found


@pytest.mark.parametrize(("size", "lengths"), [(0, [50]), (20, [20, 20, 10]), (25, [25, 25]), (7, [7] * 7 + [1])])
async def test_a_conversation_comes_page_by_page(tmp_path: Path, size: int, lengths: list[int]) -> None:
    async with running_server(tmp_path) as running:
        conversation = await running.store(lambda store: long_conversation(store, 50, 10))
        found = await pages(running, conversation, size)
        assert [len(page.conversation.turns) for page in found] == lengths
        turns = [turn for page in found for turn in page.conversation.turns]
        assert [turn.message.split()[0] for turn in turns] == [str(number) for number in range(50)]
        assert [turn.response.feedback[0].comment for turn in turns] == [f"vote {number}" for number in range(50)]
        assert {page.conversation.title for page in found} == {"hello"}


async def test_no_page_is_larger_than_a_client_accepts(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running:
        conversation = await running.store(lambda store: long_conversation(store, 60, 50_000))
        found = await pages(running, conversation)
        assert [len(page.conversation.turns) for page in found] == [20, 20, 20]
        assert max(page.ByteSize() for page in found) < PAGE_BYTES + 1000


async def test_feedback_comes_in_pages_that_any_client_accepts(tmp_path: Path) -> None:
    async with running_server(tmp_path, max_message_chars=100_000) as running:
        running.engine.max_model_len = 100_000
        for number in range(30):
            content = f"{number} " + "d" * 99_000
            messages = [
                {"role": role, "content": content} for role in (feedback_pb2.ROLE_USER, feedback_pb2.ROLE_ASSISTANT)
            ]
            request = feedback_pb2.SubmitDemonstrationRequest(messages=messages)
            await running.feedback.SubmitDemonstration(request, metadata=ANN)
        found, token = [], ""
        while True:
            request = feedback_pb2.ListFeedbackRequest(page_size=200, page_token=token)
            page = await running.feedback.ListFeedback(request, metadata=ANN)
            assert page.ByteSize() < PAGE_BYTES + 1000
            found += [vote.demonstration.messages[0].content.split()[0] for vote in page.feedback]
            token = page.next_page_token
            if not token:
                break
        assert found == [str(number) for number in reversed(range(30))]


async def test_versions_and_rounds_come_in_pages_that_any_client_accepts(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running:

        def fill(store: Store) -> None:
            lease = store.leases.acquire("learner", "here", 60)
            assert lease
            for number in range(1, 31):
                metrics = {"curve": "m" * 100_000}
                store.policies.register(
                    f"v{number:04d}", kind="full", state="retired", parent_version="v0000", reference_version="v0000",
                    round_id=None, reward_model_version=None, metrics=metrics,
                )  # fmt: skip
                round_ = store.rounds.create(0, {}, reference_version="v0000", fence=lease)
                store.rounds.update(
                    round_.id, metrics=RoundMetrics(versions=metrics), policy_version=f"v{number:04d}", fence=lease
                )
                store.rounds.finish(round_.id, "rejected", fence=lease)

        await running.store(fill)
        for field, ask, request in (
            ("policies", running.policies.ListPolicies, policy_pb2.ListPoliciesRequest(page_size=200)),
            ("rounds", running.policies.ListRounds, policy_pb2.ListRoundsRequest(page_size=200)),
        ):
            found, sizes = [], []
            while not sizes or request.page_token:
                page = await ask(request, metadata=ANN)
                records = getattr(page, field)
                assert page.ByteSize() < PAGE_BYTES + 1000
                found += [record.version if field == "policies" else record.policy_version for record in records]
                sizes.append(len(records))
                request.page_token = page.next_page_token
            assert found == [f"v{number:04d}" for number in range(30, 0 if field == "rounds" else -1, -1)]
            assert len(sizes) == 2


async def test_a_vote_is_read_as_soon_as_it_is_acknowledged(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running:
        conversation = await running.store(lambda store: long_conversation(store, 1, 10))
        [page] = await pages(running, conversation)
        response = page.conversation.turns[0].response.response_id
        for number in range(100):
            thumb = feedback_pb2.SubmitThumbRequest(
                response_id=response, thumb=feedback_pb2.THUMB_DOWN, comment=str(number)
            )
            await running.feedback.SubmitThumb(thumb, metadata=ANN)
            listed = await running.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest(page_size=1), metadata=ANN)
            assert listed.feedback[0].comment == str(number)


async def test_votes_do_not_wait_for_a_reader(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running:
        reading = asyncio.Event()
        loop, go_on = asyncio.get_running_loop(), asyncio.Event()

        def read(store: Store) -> list[int]:
            before = len(store.conversations.page("ann", 10))
            loop.call_soon_threadsafe(reading.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(10)
            return [before, len(store.conversations.page("ann", 10))]

        slow = asyncio.create_task(running.store.read(read))
        await reading.wait()
        started = time.monotonic()
        await running.store(lambda store: store.conversations.create("ann", "hello"))
        assert time.monotonic() - started < 5
        go_on.set()
        # The read is from one moment.
        assert await slow == [0, 0]


async def test_a_prompt_has_as_much_of_the_conversation_as_fits(tmp_path: Path) -> None:
    async with running_server(tmp_path) as running:
        running.engine.max_model_len = 40
        conversation = await running.store(lambda store: long_conversation(store, 300, 3))
        call = running.chat.Chat(chat_pb2.ChatRequest(conversation_id=conversation, message="Go on."), metadata=ANN)
        assert [event async for event in call][-1].finished.text
        # 640 characters in turns of about 9: only a few chunks of twenty were read.
        longest = max(len(messages) for messages in running.engine.encoded)
        assert 1 < longest <= 2 * 100 + 1
        assert running.engine.encoded[-1][-1] == {"role": "user", "content": "Go on."}
