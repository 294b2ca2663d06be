"""Users' text stays out of the log and out of other callers' statuses: every RPC, on success and on failure."""

import asyncio
import logging
from typing import Any

import grpc
import pytest
from prefloop.v1 import account_pb2, chat_pb2, feedback_pb2, policy_pb2, review_pb2

from server.rpc.access import ROLES
from server.telemetry.safe_traceback import safe_traceback
from tests.server.conftest import Running
from tests.server.rpc.test_rpcs import BOB, chat, compare

# One for each field with user text; none of them has a meaning to the server.
WORDS = {
    name: f"quixotic-{name}"
    for name in ("message", "comment", "correction", "demonstration", "answer", "user", "reason")
}
ZOE = (("x-user-id", WORDS["user"]),)
SECONDS = 10.0


class Everything(logging.Handler):
    """All log lines, as in a file."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter("%(name)s %(message)s").format(record))


@pytest.fixture
def said() -> Any:
    everything, root = Everything(), logging.getLogger()
    before = root.level
    root.addHandler(everything)
    root.setLevel(logging.DEBUG)
    yield everything.lines
    root.setLevel(before)
    root.removeHandler(everything)


def leaked(lines: list[str]) -> list[str]:
    return [line for line in lines if "quixotic" in line]


def messages() -> list[feedback_pb2.Message]:
    asked = feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content=WORDS["demonstration"])
    return [asked, feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content=WORDS["demonstration"])]


def requests(response_id: str, comparison_id: str, conversation_id: str) -> dict[str, Any]:
    """A request of every RPC, with a text in each text field. `ForgetUser` comes last."""
    return {
        "Chat": chat_pb2.ChatRequest(message=WORDS["message"], conversation_id=conversation_id),
        "Compare": chat_pb2.CompareRequest(message=WORDS["message"], conversation_id=conversation_id),
        "FindResponse": chat_pb2.FindResponseRequest(messages=messages()),
        "ListVersions": chat_pb2.ListVersionsRequest(),
        "GetConversation": chat_pb2.GetConversationRequest(conversation_id=conversation_id),
        "ListConversations": chat_pb2.ListConversationsRequest(),
        "SubmitThumb": feedback_pb2.SubmitThumbRequest(
            response_id=response_id, thumb=feedback_pb2.THUMB_UP, comment=WORDS["comment"]
        ),
        "SubmitChoice": feedback_pb2.SubmitChoiceRequest(
            comparison_id=comparison_id, choice=feedback_pb2.CHOICE_A, comment=WORDS["comment"]
        ),
        "SubmitPairChoice": feedback_pb2.SubmitPairChoiceRequest(
            response_id_a=response_id, response_id_b=response_id, choice=feedback_pb2.CHOICE_A, comment=WORDS["comment"]
        ),
        "SubmitCorrection": feedback_pb2.SubmitCorrectionRequest(response_id=response_id, text=WORDS["correction"]),
        "SubmitDemonstration": feedback_pb2.SubmitDemonstrationRequest(messages=messages()),
        "RetractFeedback": feedback_pb2.RetractFeedbackRequest(feedback_id="fb_none"),
        "ListFeedback": feedback_pb2.ListFeedbackRequest(),
        "GetReview": review_pb2.GetReviewRequest(),
        "SkipReview": review_pb2.SkipReviewRequest(comparison_id=comparison_id),
        "DeleteConversation": chat_pb2.DeleteConversationRequest(conversation_id="conv_none"),
        "GetActivePolicy": policy_pb2.GetActivePolicyRequest(),
        "ListPolicies": policy_pb2.ListPoliciesRequest(),
        "ActivatePolicy": policy_pb2.ActivatePolicyRequest(version="v0009", reason=WORDS["reason"]),
        "RollbackPolicy": policy_pb2.RollbackPolicyRequest(reason=WORDS["reason"]),
        "ListRounds": policy_pb2.ListRoundsRequest(),
        "ListRoundSamples": policy_pb2.ListRoundSamplesRequest(round_id="round_none"),
        "CountVotes": policy_pb2.CountVotesRequest(),
        "GetLearner": policy_pb2.GetLearnerRequest(),
        "RequestRound": policy_pb2.RequestRoundRequest(),
        "GetCaller": account_pb2.GetCallerRequest(),
        "ExportUser": account_pb2.ExportUserRequest(),
        "ForgetUser": account_pb2.ForgetUserRequest(),
    }


async def call_all(running: Running, asked: dict[str, Any], user: Any) -> dict[str, str]:
    """The status of each RPC, including details; empty on success."""
    told = {}
    for name, request in asked.items():
        call = getattr(next(stub for stub in running.stubs if hasattr(stub, name)), name)(
            request, metadata=user, timeout=SECONDS
        )
        try:
            if hasattr(call, "read"):
                while await call.read() is not grpc.aio.EOF:
                    pass
            else:
                await call
            told[name] = ""
        except grpc.aio.AioRpcError as error:
            told[name] = f"{error.code().name} {error.details()} {error.trailing_metadata()}"
    return told


async def begun(running: Running, user: Any = ZOE) -> dict[str, Any]:
    running.engine.answer = f"{WORDS['answer']} indeed"
    started, *_ = await chat(running, WORDS["message"], user=user)
    compared, *_ = await compare(running, WORDS["message"], user=user)
    ours = started.started
    return requests(ours.response_id, compared.started.comparison_id, ours.conversation_id)


def fill_disk(running: Running) -> Any:
    """A disk that is full from now on; SQLite gets the error as from a real one."""
    return running.store(lambda store: store._db._db.conn.execute("PRAGMA max_page_count = 1"))


async def test_user_text_is_not_quoted(running: Running, said: list[str]) -> None:
    asked = await begun(running)
    assert set(asked) == {method.rpartition("/")[2] for method in ROLES if method.startswith("/prefloop.")}
    told = await call_all(running, asked, ZOE)
    assert {name for name, status in told.items() if status} == {
        "FindResponse",
        "SubmitPairChoice",
        "RetractFeedback",
        "DeleteConversation",
        "ActivatePolicy",
        "RollbackPolicy",
        "ListRoundSamples",
        "RequestRound",
    }
    assert leaked([*said, *told.values()]) == []


async def test_guessed_ids_reveal_nothing(running: Running, said: list[str]) -> None:
    asked = await begun(running)
    told = await call_all(running, {name: one for name, one in asked.items() if name != "ForgetUser"}, BOB)
    assert told["GetConversation"].startswith("NOT_FOUND")
    assert told["SubmitThumb"].startswith("NOT_FOUND")
    assert leaked([*said, *told.values()]) == []


async def test_invalid_fields_are_not_quoted(running: Running, said: list[str]) -> None:
    asked = await begun(running)
    long = " ".join(["quixotic-long"] * 100)
    asked["Chat"].message = asked["Compare"].message = asked["SubmitCorrection"].text = long
    asked["SubmitThumb"].comment = asked["SubmitChoice"].comment = long
    asked["SubmitDemonstration"].messages[0].content = long
    names = ("Chat", "Compare", "SubmitCorrection", "SubmitThumb", "SubmitChoice", "SubmitDemonstration")
    told = await call_all(running, {name: asked[name] for name in names}, ZOE)
    assert all(status.startswith("INVALID_ARGUMENT") for status in told.values())
    assert leaked([*said, *told.values()]) == []


async def test_nothing_is_quoted_when_the_disk_is_full(running: Running, said: list[str]) -> None:
    asked = await begun(running)
    part = feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content="-".join([WORDS["demonstration"]] * 20))
    asked["SubmitDemonstration"].messages.extend([part] * 2)
    await fill_disk(running)
    running.engine.max_model_len = 10_000
    # Until the existing pages have no free space.
    full = "UNAVAILABLE The server's disk is full"
    for _ in range(100):
        told = await call_all(running, {"SubmitDemonstration": asked["SubmitDemonstration"]}, ZOE)
        if told["SubmitDemonstration"].startswith(full):
            break
    told = await call_all(running, asked, ZOE)
    assert told["SubmitDemonstration"].startswith(full)
    assert any("database or disk is full" in line for line in said)
    assert leaked([*said, *told.values()]) == []


@pytest.mark.parametrize("dies", [True, False])
async def test_nothing_is_quoted_when_the_engine_fails(
    running: Running, said: list[str], monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    asked = await begun(running)
    running.engine.dies = dies
    if not dies:
        # As a tokenizer may, but not on the first call, whose errors are caught elsewhere.
        def refuse(messages: Any, began: float) -> Any:
            raise ValueError(f"cannot encode {messages}")

        monkeypatch.setattr(running.engine, "encode", refuse)
    told = await call_all(running, {name: asked[name] for name in ("Chat", "Compare")}, ZOE)
    assert set(told) == {"Chat", "Compare"}
    assert {status.partition(" ")[0] for status in told.values()} == {"UNAVAILABLE" if dies else "INTERNAL"}
    assert any(("EngineDeadError" if dies else "ValueError") in line for line in said)
    assert leaked([*said, *told.values()]) == []


async def test_an_answer_that_cannot_be_finished_is_not_logged(running: Running, said: list[str]) -> None:
    await begun(running)
    running.engine.hold_after = 1
    call = running.chat.Chat(chat_pb2.ChatRequest(message=WORDS["message"]), metadata=ZOE)
    await call.read()
    await running.engine.holding.wait()

    async def refuse() -> Any:
        raise ValueError(f"cannot end {WORDS['answer']}")

    running.engine.streams[-1].finish = refuse  # type: ignore[method-assign]
    running.engine.go_on.set()
    assert await failure_or_none(call) is None
    async with asyncio.timeout(SECONDS):
        while not any("could not be finished" in line for line in said):
            await asyncio.sleep(0)
    assert leaked(said) == []


async def failure_or_none(call: Any) -> grpc.StatusCode | None:
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


def test_errors_are_logged_by_place_and_only_safe_ones_with_their_message() -> None:
    def inner() -> None:
        raise ValueError("quixotic")

    def outer() -> None:
        try:
            inner()
        except ValueError as error:
            raise OSError(28, "No space left on device") from error

    with pytest.raises(OSError, match="No space") as caught:
        outer()
    lines = safe_traceback(caught.value).splitlines()
    assert lines[0] == "OSError: [Errno 28] No space left on device"
    assert lines[-2].endswith(" in outer")
    assert lines[-1].endswith(" in inner")
    assert "after ValueError" in lines
    assert "quixotic" not in safe_traceback(caught.value)
    group = ExceptionGroup("quixotic", [ValueError("quixotic"), KeyError("quixotic")])
    group.exceptions[0].__cause__ = group  # As after `raise group.exceptions[0] from group`.
    assert safe_traceback(group) == "ExceptionGroup\nafter ValueError\nafter KeyError"
