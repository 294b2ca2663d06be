"""A choice between two answers that a user saw one after another."""

from typing import Any

import grpc
import pytest
from prefloop.v1 import account_pb2, chat_pb2, feedback_pb2
from prefloop.v1.feedback_pb2 import CHOICE_A, CHOICE_B, CHOICE_TIE

from server.store.store import Store
from tests.server.conftest import Running
from tests.server.rpc.test_histories import messages
from tests.server.rpc.test_rpcs import ANN, BOB, chat, compare, refusal


async def answer(running: Running, *texts: str, user: Any = ANN) -> str:
    started, *_ = await chat(running, "", user, messages=messages(*texts))
    return str(started.started.response_id)


def choose(running: Running, earlier: str, later: str, choice: Any = CHOICE_B, user: Any = ANN) -> Any:
    request = feedback_pb2.SubmitPairChoiceRequest(response_id_a=earlier, response_id_b=later, choice=choice)
    return running.feedback.SubmitPairChoice(request, metadata=user)


async def test_it_teaches_like_any_other_choice(running: Running) -> None:
    running.engine.answers = ["first", "second"]
    first, second = await answer(running, "hello"), await answer(running, "hello")
    vote = (await choose(running, first, second)).feedback
    assert vote.choice == CHOICE_B
    again = (await choose(running, first, second, CHOICE_TIE)).feedback
    assert (again.feedback_id, again.comparison_id) == (vote.feedback_id, vote.comparison_id)
    # As a comparison, it may be chosen from by its id, too.
    request = feedback_pb2.SubmitChoiceRequest(comparison_id=vote.comparison_id, choice=CHOICE_A)
    assert (await running.feedback.SubmitChoice(request, metadata=ANN)).feedback.feedback_id == vote.feedback_id

    def read(store: Store) -> list[tuple[str, str, str]]:
        return [(one.choice, one.a.text, one.b.text) for one in store.snapshots.take().choices]

    assert await running.store(read) == [("A", "first ", "second ")]
    # Both stay in the conversation, as they were, and the choice is exported.
    exported = [
        part
        async for part in running.account.ExportUser(account_pb2.ExportUserRequest(), metadata=ANN)
        if part.WhichOneof("event") in ("conversation", "pair")
    ]
    assert [turn.response.text for turn in exported[0].conversation.turns] == ["first ", "second "]
    [pair] = [part.pair for part in exported[1:]]
    assert (pair.comparison_id, pair.feedback.choice) == (vote.comparison_id, CHOICE_A)
    assert [pair.a.response_id, pair.b.response_id] == [first, second]
    # It goes with its conversation.
    conversation_id = exported[0].conversation.conversation_id
    request = chat_pb2.DeleteConversationRequest(conversation_id=conversation_id)
    await running.chat.DeleteConversation(request, metadata=ANN)
    assert await running.store(read) == []


async def test_it_decides_no_test_between_versions(running: Running) -> None:
    await choose(running, await answer(running, "hello"), await answer(running, "hello"))
    # The same choice, had it been blind.
    started, *_ = await compare(running)
    request = feedback_pb2.SubmitChoiceRequest(comparison_id=started.started.comparison_id, choice=CHOICE_B)
    await running.feedback.SubmitChoice(request, metadata=ANN)

    def read(store: Store) -> tuple[int, int, tuple[int, int]]:
        with store.transaction():
            # A new version answered as B, in both.
            store._db.execute(
                "UPDATE responses SET policy_version = 'v0001' WHERE id IN (SELECT response_b FROM comparisons)"
            )
        between = store.lineage.choices_between("v0001", "v0000", 0.0, 10)
        pairs = store._db.rows("SELECT count(*) AS n FROM comparisons WHERE blind = 0")[0]["n"]
        return len(between), pairs, store.lineage.slot_order()["hotter"]

    between, pairs, (_, hotter) = await running.store(read)
    assert (between, pairs, hotter) == (1, 1, 1)


@pytest.mark.parametrize("case", ["one", "messages", "history", "order", "user", "comparison"])
async def test_the_two_answer_the_same_messages(running: Running, case: str) -> None:
    first = await answer(running, "hello")
    second = await answer(running, "hello")
    other = grpc.StatusCode.FAILED_PRECONDITION, "The two answers are not to the same messages."
    if case == "one":
        assert (await refusal(choose(running, first, first)))[:2] == other
    elif case == "messages":
        assert (await refusal(choose(running, first, await answer(running, "goodbye"))))[:2] == other
    elif case == "history":
        # The same message after other answers.
        a = await answer(running, "hello", "one two three four", "more")
        b = await answer(running, "hello", "edited", "more")
        assert (await refusal(choose(running, a, b)))[:2] == other
    elif case == "order":
        code, message, details = await refusal(choose(running, second, first))
        assert (code, message) == (
            grpc.StatusCode.INVALID_ARGUMENT, "response_id_a must be the answer that came first.",
        )  # fmt: skip
        assert details == ["INVALID_FIELD", "response_id_a"]
    elif case == "user":
        theirs = await answer(running, "hello", user=BOB)
        assert (await refusal(choose(running, first, theirs)))[0] == grpc.StatusCode.NOT_FOUND
        assert (await refusal(choose(running, first, second, user=BOB)))[0] == grpc.StatusCode.NOT_FOUND
    else:
        # Answers of a comparison are chosen from by its own id.
        _, *events = await compare(running, "", messages=messages("hello"))
        compared = [event.finished.response_id for event in events if event.HasField("finished")]
        assert (await refusal(choose(running, first, compared[0])))[:2] == other
