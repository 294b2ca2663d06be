"""A server without an engine takes votes beside one that answers."""

import asyncio
import queue
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prefloop.v1 import account_pb2, chat_pb2, feedback_pb2, policy_pb2, review_pb2

from clients.client import Client
from clients.demo.processes import READY, Process
from clients.errors import InvalidRequestError
from server.grpc_server import SERVICES
from server.reference.reference import prepare_reference
from server.rpc.access import NEED_ENGINE, ROLES
from server.settings import ServerSettings
from server.shared.errors import ServiceError
from server.store.store import Store
from server.store.store_thread import StoreThread
from server.votes_app import VotesApp
from tests.learner.conftest import save_tiny_model
from tests.server.conftest import Running, running_server
from tests.server.fakes import FakeEngine
from tests.server.rpc.test_rpcs import ANN, chat, refusal
from tests.server.store.test_store import answer
from tests.server.test_cli import sentence, serve

SECONDS = 30
NO_ENGINE = (
    grpc.StatusCode.UNIMPLEMENTED,
    "This server takes votes and has no engine; ask one that samples answers.",
    ["NO_ENGINE"],
)


@asynccontextmanager
async def votes_server(data_dir: Path, port: int = 0, **flags: Any) -> AsyncIterator[Running]:
    settings = ServerSettings.load(
        **{"data_dir": data_dir, "port": port, "engine": False, "poll_seconds": 0.01, "max_message_chars": 500, **flags}
    )
    store = StoreThread(data_dir)
    app, text = VotesApp(settings, store), FakeEngine()
    await app.start(text)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        running = Running(text, store, app, data_dir, channel)
        try:
            yield running
        finally:
            await app.stop(0)
            await store.close()


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[tuple[Running, Running]]:
    """One that answers, and one that takes votes."""
    async with running_server(tmp_path) as answers, votes_server(tmp_path) as votes:
        yield answers, votes


def thumb(response_id: str) -> feedback_pb2.SubmitThumbRequest:
    return feedback_pb2.SubmitThumbRequest(response_id=response_id, thumb=feedback_pb2.THUMB_UP, request_id="t")


async def test_it_takes_votes_on_answers_of_another_and_shows_them(two: tuple[Running, Running]) -> None:
    answers, votes = two
    started, *_ = await chat(answers, "hello there")
    response_id = started.started.response_id
    first = await votes.feedback.SubmitThumb(thumb(response_id), metadata=ANN)
    # The other knows that this request was answered.
    assert await answers.feedback.SubmitThumb(thumb(response_id), metadata=ANN) == first
    correction = feedback_pb2.SubmitCorrectionRequest(response_id=response_id, text="a better answer")
    await votes.feedback.SubmitCorrection(correction, metadata=ANN)
    listed = await votes.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest(), metadata=ANN)
    assert [vote.WhichOneof("value") for vote in listed.feedback] == ["correction", "thumb"]
    request = chat_pb2.GetConversationRequest(conversation_id=started.started.conversation_id)
    shown = await votes.chat.GetConversation(request, metadata=ANN)
    assert [turn.message for turn in shown.conversation.turns] == ["hello there"]
    said = [
        feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content="hi"),
        feedback_pb2.Message(role=feedback_pb2.ROLE_ASSISTANT, content="one two three four "),
    ]
    own = await chat(answers, "", messages=said[:1])
    find = chat_pb2.FindResponseRequest(messages=said)
    found = await votes.chat.FindResponse(find, metadata=ANN)
    assert found.response_id == own[0].started.response_id


async def test_a_correction_is_counted_in_the_models_tokens(two: tuple[Running, Running]) -> None:
    answers, votes = two
    started, *_ = await chat(answers, "hi")
    votes.engine.max_model_len = 3
    correction = feedback_pb2.SubmitCorrectionRequest(response_id=started.started.response_id, text="1 2 3 4 5")
    code, _, fields = await refusal(votes.feedback.SubmitCorrection(correction, metadata=ANN))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["INVALID_FIELD", "text"])


async def test_whatever_needs_an_engine_is_refused_and_nothing_else(two: tuple[Running, Running]) -> None:
    _, votes = two
    modules = {
        "ChatService": chat_pb2, "FeedbackService": feedback_pb2, "ReviewService": review_pb2,
        "PolicyService": policy_pb2, "AccountService": account_pb2,
    }  # fmt: skip
    refused = set()
    for method in ROLES:
        package, _, service = method.split("/")[1].rpartition(".")
        name = method.split("/")[2]
        if package != "prefloop.v1":
            continue
        empty = getattr(modules[service], f"{name}Request")()
        call: Any = votes.channel.unary_stream(method)(empty.SerializeToString(), metadata=ANN)
        try:
            await call.read()
            code = grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            code = error.code()
        if code == grpc.StatusCode.UNIMPLEMENTED:
            refused.add(method)
    assert refused == NEED_ENGINE
    assert len(refused) == 12
    assert await refusal(votes.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=ANN)) == NO_ENGINE
    assert await refusal(votes.policies.ListRounds(policy_pb2.ListRoundsRequest(), metadata=ANN)) == NO_ENGINE


async def test_strangers_learn_nothing_about_it(tmp_path: Path) -> None:
    with_key = Store.open(tmp_path)
    with_key.policies.register_reference()
    with_key.keys.create("olga", "operator")
    with_key.close()
    async with votes_server(tmp_path) as votes:
        code, _, reasons = await refusal(votes.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=ANN))
        assert (code, reasons) == (grpc.StatusCode.UNAUTHENTICATED, ["UNAUTHENTICATED"])


async def test_health_names_the_services_that_are_whole(two: tuple[Running, Running]) -> None:
    _, votes = two
    health: Any = health_pb2_grpc.HealthStub(votes.channel)
    serving = set()
    for service in ["", *SERVICES]:
        try:
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            serving.add(service.rpartition(".")[2])
        except grpc.aio.AioRpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND  # noqa: PT017
    assert serving == {"", "FeedbackService", "ReviewService", "AccountService"}


async def test_a_deletion_waits_for_the_answer_that_another_is_writing(two: tuple[Running, Running]) -> None:
    answers, votes = two
    answers.engine.hold_after = 2
    events = aiter(answers.chat.Chat(chat_pb2.ChatRequest(message="hello"), metadata=ANN))
    started = (await anext(events)).started
    await answers.engine.holding.wait()
    request = chat_pb2.DeleteConversationRequest(conversation_id=started.conversation_id)
    deleting = asyncio.ensure_future(votes.chat.DeleteConversation(request, metadata=ANN))
    # It has looked once when a call that came later has been answered.
    later = chat_pb2.DeleteConversationRequest(conversation_id="conv_another")
    assert (await refusal(votes.chat.DeleteConversation(later, metadata=ANN)))[0] == grpc.StatusCode.NOT_FOUND
    assert not deleting.done()
    answers.engine.go_on.set()
    assert [event.WhichOneof("event") async for event in events][-1] == "finished"
    async with asyncio.timeout(SECONDS):
        await deleting
    get = chat_pb2.GetConversationRequest(conversation_id=started.conversation_id)
    assert (await refusal(answers.chat.GetConversation(get, metadata=ANN)))[0] == grpc.StatusCode.NOT_FOUND


async def test_a_user_is_forgotten_there(two: tuple[Running, Running]) -> None:
    answers, votes = two
    await chat(answers, "hello")
    forgotten = await votes.account.ForgetUser(account_pb2.ForgetUserRequest(), metadata=ANN)
    assert forgotten.conversations == 1
    listed = await answers.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=ANN)
    assert list(listed.conversations) == []


async def test_several_share_a_port(tmp_path: Path) -> None:
    async with running_server(tmp_path) as answers:
        started, *_ = await chat(answers, "hello")
        async with (
            votes_server(tmp_path, share_port=True, max_message_chars=20) as one,
            votes_server(tmp_path, port=one.app.port, share_port=True) as other,
        ):
            assert one.app.port == other.app.port
            request = thumb(started.started.response_id)
            # The first refuses it.
            request.comment = "more than twenty characters"
            codes = set()
            # The system chooses by the connection, so a few dozen reach both.
            for _ in range(200):
                options = [("grpc.use_local_subchannel_pool", 1)]
                async with grpc.aio.insecure_channel(f"127.0.0.1:{one.app.port}", options) as channel:
                    method: Any = channel.unary_unary("/prefloop.v1.FeedbackService/SubmitThumb")
                    call = method(request.SerializeToString(), metadata=ANN)
                    codes.add(await call.code())
                if len(codes) == 2:
                    break
            assert codes == {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK}


def test_the_process_takes_votes_with_the_tokenizer_alone(tmp_path: Path) -> None:
    model, data_dir = tmp_path / "model", tmp_path / "data"
    save_tiny_model(model)
    prepare_reference(data_dir, str(model), lambda line: None)
    with closing(Store.open(data_dir)) as store:
        store.policies.register_reference()
        response_id = answer(store, store.conversations.create("ann", "hello"))
    # Nobody reads them here.
    (data_dir / "policies" / "v0000" / "model.safetensors").unlink()
    heard: queue.SimpleQueue[str] = queue.SimpleQueue()
    command = ["server.cli", "serve", "--no-engine", "--data-dir", str(data_dir), "--model", str(model), "--port", "0"]
    server = Process(command, tmp_path / "log", heard.put, {"PREFLOOP_METRICS_PORT": "0"})
    try:
        while not (ready := READY.match(heard.get(timeout=SECONDS))):
            pass
        with Client(ready[1], user="ann") as client:
            client.thumb(response_id, feedback_pb2.THUMB_UP)
            with pytest.raises(InvalidRequestError, match="text must have at most 125 tokens here, not 201"):
                client.correct(response_id, "word " * 200)
            client.correct(response_id, "word")
            assert [vote.WhichOneof("value") for vote in client.feedback()] == ["correction", "thumb"]
    finally:
        assert server.stop() == 0


def test_without_a_model_it_does_not_start(tmp_path: Path) -> None:
    said = sentence(serve("--no-engine", "--data-dir", str(tmp_path), "--port", "0"))
    assert said == "server: There is no model here yet: start a server with an engine first, which prepares it."


def test_another_model_than_the_stores_is_refused(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    data_dir = tmp_path / "data"
    prepare_reference(data_dir, str(tmp_path / "model"), lambda line: None)
    with closing(Store.open(data_dir)) as store:
        store.policies.register_reference()
    said = sentence(serve("--no-engine", "--data-dir", str(data_dir), "--port", "0"))
    assert "was made from" in said
    assert "start with --model" in said


async def test_a_port_is_not_shared_by_others(tmp_path: Path) -> None:
    async with running_server(tmp_path) as answers:
        with pytest.raises(ServiceError, match="another server may be using it"):
            async with votes_server(tmp_path, port=answers.app.port, share_port=True):
                pass


def test_only_servers_without_an_engine_may_share_a_port() -> None:
    with pytest.raises(ValueError, match="share_port requires engine = false"):
        ServerSettings.load(share_port=True)
    assert ServerSettings.load(share_port=True, engine=False).share_port
