"""Every RPC without credentials, with a wrong role, and on data of other users; with and without TLS."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prefloop.v1 import account_pb2, chat_pb2, feedback_pb2, policy_pb2, review_pb2

from server.grpc_server import SERVICES
from server.rpc.access import ROLES
from server.rpc.tls import Certificates
from server.shared.errors import InvalidArgumentError, NotFoundError, ServiceError
from server.store.keys import Caller, Credentials, Role
from server.store.store import Store
from tests.pem import Pem, make_pem
from tests.server.conftest import Running, running_server
from tests.server.rpc.test_rpcs import chat, compare, failure, refusal

UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
OURS = [method for method in ROLES if method.startswith("/prefloop.")]
SECONDS = 10.0


@dataclass
class Locked:
    """A server that requires keys, and a key of each kind as metadata."""

    running: Running
    ann: Any
    bob: Any
    shop: Any
    operator: Any


def bearer(key: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {key}"),)


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[Locked]:
    async with running_server(tmp_path) as running:
        people: list[tuple[str, Role]] = [
            ("ann", "user"), ("bob", "user"), ("shop", "application"), ("olga", "operator"),
        ]  # fmt: skip
        keys = [await running.store(lambda store, p=person: store.keys.create(*p)) for person in people]
        locked = Locked(running, *map(bearer, keys))
        await until(lambda: listing(running, ()), UNAUTHENTICATED)
        # Created last: once it is known, all are.
        await until(lambda: listing(running, locked.operator), grpc.StatusCode.OK)
        yield locked


async def until(ask: Any, answer: Any) -> None:
    async with asyncio.timeout(SECONDS):
        while await ask() != answer:
            pass


async def answered(reply: Any) -> grpc.StatusCode:
    """The status of a call; for a stream, up to its first message."""
    try:
        await (reply.read() if hasattr(reply, "read") else reply)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def listing(running: Running, metadata: Any) -> grpc.StatusCode:
    return await answered(running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=metadata))


def call(running: Running, method: str, metadata: Any) -> Any:
    """Call the RPC with an empty message, which validation would refuse: access is checked before that."""
    _, _, name = method.rpartition("/")
    service = next(
        stub for stub in running.stubs if hasattr(stub, name)
    )  # fmt: skip
    descriptor = descriptor_pool.Default().FindMethodByName(method[1:].replace("/", "."))
    modules = {
        "Chat": chat_pb2, "Feedback": feedback_pb2, "Review": review_pb2, "Policy": policy_pb2, "Account": account_pb2
    }  # fmt: skip
    request = getattr(modules[descriptor.containing_service.name.removesuffix("Service")], descriptor.input_type.name)()
    return getattr(service, name)(request, metadata=metadata, timeout=SECONDS)


def test_every_rpc_has_a_role() -> None:
    pool = descriptor_pool.Default()
    served = [*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]
    methods = {f"/{name}/{method.name}" for name in served for method in pool.FindServiceByName(name).methods}
    assert set(ROLES) == methods


@pytest.mark.parametrize("metadata", [(), bearer("key_000000000000000000000000.none"), (("authorization", "Basic x"),)])
async def test_no_rpc_answers_without_a_key(locked: Locked, metadata: Any) -> None:
    for method in OURS:
        assert await failure(call(locked.running, method, metadata)) == UNAUTHENTICATED, method


@pytest.mark.parametrize("method", OURS)
async def test_a_user_may_only_call_what_users_may(locked: Locked, method: str) -> None:
    code = await answered(call(locked.running, method, locked.ann))
    if method.startswith("/prefloop.v1.PolicyService/"):
        assert code == DENIED
    else:
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize("end_user", [(), (("x-end-user", "ann"),)])
@pytest.mark.parametrize("method", OURS)
async def test_an_application_may_only_call_what_users_may(locked: Locked, method: str, end_user: Any) -> None:
    code = await answered(call(locked.running, method, (*locked.shop, *end_user)))
    assert (code == DENIED) == method.startswith("/prefloop.v1.PolicyService/")


@pytest.mark.parametrize("method", OURS)
async def test_an_operator_may_call_everything(locked: Locked, method: str) -> None:
    assert await answered(call(locked.running, method, locked.operator)) not in (UNAUTHENTICATED, DENIED)


async def test_a_caller_without_a_key_is_refused_before_the_message_arrives(locked: Locked) -> None:
    method = locked.running.channel.stream_unary("/prefloop.v1.ChatService/Chat")

    async def never() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    assert await failure(method(never(), timeout=SECONDS)) == UNAUTHENTICATED


async def test_other_users_data_is_not_found(locked: Locked) -> None:
    running, ann, bob = locked.running, locked.ann, locked.bob
    started, *_ = await chat(running, user=ann)
    compared, *_ = await compare(running, user=ann)
    thumb = feedback_pb2.SubmitThumbRequest(response_id=started.started.response_id, thumb=feedback_pb2.THUMB_UP)
    kept = (await running.feedback.SubmitThumb(thumb, metadata=ann)).feedback.feedback_id
    conversation, comparison = started.started.conversation_id, compared.started.comparison_id
    hers: list[tuple[Any, Any, str]] = [
        (running.chat.GetConversation, chat_pb2.GetConversationRequest(), "conversation_id"),
        (running.chat.DeleteConversation, chat_pb2.DeleteConversationRequest(), "conversation_id"),
        (running.chat.Chat, chat_pb2.ChatRequest(message="hi"), "conversation_id"),
        (running.chat.Compare, chat_pb2.CompareRequest(message="hi"), "conversation_id"),
        (running.feedback.SubmitThumb, thumb, "response_id"),
        (running.feedback.SubmitCorrection, feedback_pb2.SubmitCorrectionRequest(text="x"), "response_id"),
        (running.feedback.SubmitChoice, feedback_pb2.SubmitChoiceRequest(choice=1), "comparison_id"),
        (running.feedback.RetractFeedback, feedback_pb2.RetractFeedbackRequest(), "feedback_id"),
    ]
    ids = {"conversation_id": conversation, "response_id": started.started.response_id}
    ids |= {"comparison_id": comparison, "feedback_id": kept}
    for rpc, request, field in hers:
        told = []
        for name in (ids[field], "none"):
            setattr(request, field, name)
            code, message, details = await refusal(rpc(request, metadata=bob))
            told.append((code, message.replace(name, "ID"), details))
        # The same error as for data that does not exist.
        assert told[0] == told[1]
        assert told[0][0] == grpc.StatusCode.NOT_FOUND
    listed = await running.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest(), metadata=bob)
    assert list(listed.feedback) == []


def speaking_for(metadata: Any, end_user: str) -> Any:
    return (*metadata, ("x-end-user", end_user))


async def test_an_application_speaks_for_users_of_its_own(locked: Locked) -> None:
    running, shop = locked.running, locked.shop
    people = {name: speaking_for(shop, name) for name in ("ann", "zoe@example.org")} | {"": shop}
    told = {}
    for name, metadata in people.items():
        started, *_ = await chat(running, user=metadata)
        thumb = feedback_pb2.SubmitThumbRequest(response_id=started.started.response_id, thumb=feedback_pb2.THUMB_UP)
        await running.feedback.SubmitThumb(thumb, metadata=metadata)
        caller = await running.account.GetCaller(account_pb2.GetCallerRequest(), metadata=metadata)
        told[name] = (caller.user, caller.role, caller.has_key)
        # What one of them was shown, none of the others can vote on: they are different people.
        others = [other for other in (*people.values(), locked.ann) if other != metadata]
        for other in others:
            assert await failure(running.feedback.SubmitThumb(thumb, metadata=other)) == grpc.StatusCode.NOT_FOUND
    assert told == {
        "ann": ("shop/ann", "application", True),
        "zoe@example.org": ("shop/zoe@example.org", "application", True),
        "": ("shop", "application", True),
    }
    # Deleting one of them deletes nothing of the others, and the key stays valid.
    await running.account.ForgetUser(account_pb2.ForgetUserRequest(), metadata=people["ann"])
    counts = {
        name: len(
            (await running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=metadata)).conversations
        )
        for name, metadata in people.items()
    }
    assert counts == {"ann": 0, "zoe@example.org": 1, "": 1}


async def test_only_an_application_names_end_users(locked: Locked) -> None:
    for metadata in (locked.ann, locked.operator):
        code, message, _ = await refusal(call(locked.running, OURS[0], speaking_for(metadata, "bob")))
        assert (code, message) == (DENIED, "Only a key with the role application may name an end user.")
    for name in ("", "two words", "a" * 65):
        code, message, details = await refusal(call(locked.running, OURS[0], speaking_for(locked.shop, name)))
        assert (code, message) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "An end user's name is 1 to 64 printable ASCII characters without spaces.",
        )
        assert details[1:] == ["x-end-user"]
    # An application may not act on its end users' data in its own name.
    request = account_pb2.ForgetUserRequest(user="shop/ann")
    assert await failure(locked.running.account.ForgetUser(request, metadata=locked.shop)) == DENIED


async def test_without_keys_anybody_names_end_users(running: Running) -> None:
    metadata = (("x-user-id", "shop"), ("x-end-user", "ann"))
    caller = await running.account.GetCaller(account_pb2.GetCallerRequest(), metadata=metadata)
    assert (caller.user, caller.role, caller.has_key) == ("shop/ann", "operator", False)


async def test_limits_are_those_of_each_end_user(tmp_path: Path) -> None:
    async with running_server(tmp_path, user_conversations=1) as running:
        for name in ("ann", "bob"):
            metadata = (("x-user-id", "shop"), ("x-end-user", name))
            await chat(running, user=metadata)
            code, _, details = await refusal(running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=metadata))
            assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, ["USER_CONVERSATIONS"])


def test_no_key_has_the_name_of_an_applications_end_user(store: Store) -> None:
    store.keys.create("shop", "application")
    store.keys.create("shop", "application")
    store.keys.create("cafe/ann", "user")
    for user, role, sentence in [
        ("shop/ann", "user", "shop/ann is the name of an end user of the application shop."),
        ("cafe", "application", "An end user of cafe would have the name of the user cafe/ann."),
        ("a/b", "application", "An application's name has at most 63 characters and no '/'."),
        ("a" * 64, "application", "An application's name has at most 63 characters and no '/'."),
    ]:
        with pytest.raises(InvalidArgumentError) as error:
            store.keys.create(user, role)  # type: ignore[arg-type]
        assert str(error.value) == sentence
    # Revoked, the names are still taken: the data are still there.
    for key in store.keys.all():
        store.keys.revoke(key.id)
    with pytest.raises(InvalidArgumentError):
        store.keys.create("shop/ann", "user")
    store.keys.create("shopper/ann", "user")


async def test_an_application_is_not_forgotten_before_its_end_users(locked: Locked) -> None:
    await chat(locked.running, user=speaking_for(locked.shop, "ann"))
    forget = locked.running.account.ForgetUser
    request = account_pb2.ForgetUserRequest(user="shop")
    code, message, details = await refusal(forget(request, metadata=locked.operator))
    assert (code, details) == (grpc.StatusCode.FAILED_PRECONDITION, ["END_USERS"])
    assert message == "1 end users of shop have data, shop/ann for one; delete theirs first."
    await forget(account_pb2.ForgetUserRequest(user="shop/ann"), metadata=locked.operator)
    await forget(request, metadata=locked.operator)


async def test_an_application_does_not_inherit_data(running: Running) -> None:
    await chat(running, user=(("x-user-id", "shop/ann"),))
    with pytest.raises(InvalidArgumentError, match="would have the data of the user shop/ann"):
        await running.store(lambda store: store.keys.create("shop", "application"))


async def test_other_users_cannot_tell_that_a_conversation_is_being_answered(locked: Locked) -> None:
    locked.running.engine.hold_after = 1
    call = locked.running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=locked.ann)
    hers = (await call.read()).started.conversation_id
    await locked.running.engine.holding.wait()
    for request, rpc in (
        (chat_pb2.ChatRequest(message="hi", conversation_id=hers), locked.running.chat.Chat),
        (chat_pb2.DeleteConversationRequest(conversation_id=hers), locked.running.chat.DeleteConversation),
    ):
        # Immediately, not only when her answer has ended.
        assert await failure(rpc(request, metadata=locked.bob, timeout=SECONDS)) == grpc.StatusCode.NOT_FOUND
    locked.running.engine.go_on.set()
    while (event := await call.read()).WhichOneof("event") != "finished":
        pass
    assert event.finished.text == "one two three four "


async def test_an_x_user_id_is_ignored_with_a_key(locked: Locked) -> None:
    await chat(locked.running, user=(*locked.ann, ("x-user-id", "bob")))
    listed = await locked.running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=locked.bob)
    assert list(listed.conversations) == []
    assert await failure(call(locked.running, OURS[0], (("x-user-id", "ann"),))) == UNAUTHENTICATED


async def test_a_revoked_key_is_refused_and_keys_stay_required(locked: Locked) -> None:
    running = locked.running
    for key in await running.store(lambda store: store.keys.all()):
        await running.store(lambda store, key=key: store.keys.revoke(key.id))
    await until(lambda: listing(running, locked.ann), UNAUTHENTICATED)
    assert await listing(running, (("x-user-id", "ann"),)) == UNAUTHENTICATED


async def test_health_checks_need_no_key_but_reflection_does(locked: Locked) -> None:
    channel = locked.running.channel
    health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    # A balancing client's channel watches with no credentials.
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
    assert await failure(reflection.ServerReflectionInfo(iter(asked), timeout=SECONDS)) == UNAUTHENTICATED
    spoilt = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    assert await failure(spoilt(iter([b"\xff"]), metadata=locked.ann)) == grpc.StatusCode.INVALID_ARGUMENT
    answers = reflection.ServerReflectionInfo(iter(asked), metadata=locked.ann, timeout=SECONDS)
    names = {service.name async for answer in answers for service in answer.list_services_response.service}
    assert set(SERVICES) <= names


def test_only_a_hash_of_a_key_is_stored(store: Store, tmp_path: Path) -> None:
    none = store.keys.credentials()
    assert none == Credentials({}, closed=False)
    assert store.keys.credentials(none) is none
    key = store.keys.create("ann", "user")
    credentials = store.keys.credentials(none)
    assert store.keys.credentials(credentials) is credentials
    assert credentials.caller(key) == Caller("ann", "user")
    assert [credentials.caller(wrong) for wrong in ("", key[:-1], key + "A", key.partition(".")[0], "." + key)] == [
        None
    ] * 5
    assert key.partition(".")[2].encode() not in b"".join(path.read_bytes() for path in tmp_path.glob("prefloop.db*"))
    [kept] = store.keys.all()
    store.keys.revoke(kept.id)
    revoked = store.keys.all()[0].revoke_time
    store.keys.revoke(kept.id)
    assert store.keys.all()[0].revoke_time == revoked
    assert store.keys.credentials(credentials) == Credentials({}, closed=True, mark=(1, 1))
    with pytest.raises(NotFoundError):
        store.keys.revoke("key_none")
    for name in ("", "a b", "ä", "a" * 129):
        with pytest.raises(InvalidArgumentError):
            store.keys.create(name, "user")


# TLS


@asynccontextmanager
async def tls_channel(port: int, authority: Pem, own: Pem | None = None) -> AsyncIterator[grpc.aio.Channel]:
    credentials = grpc.ssl_channel_credentials(
        authority.certificate.read_bytes(),
        own and own.key.read_bytes(),
        own and own.certificate.read_bytes(),
    )
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
        yield channel


async def healthy(channel: grpc.aio.Channel) -> bool:
    check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    code = await answered(check)
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    return code == grpc.StatusCode.OK


async def test_a_renewed_certificate_is_served_without_a_restart(tmp_path: Path) -> None:
    old, new, used = (
        make_pem(tmp_path, "old"),
        make_pem(tmp_path, "new"),
        Pem(tmp_path / "used.crt", tmp_path / "used.key"),
    )
    shutil.copy(old.certificate, used.certificate)
    shutil.copy(old.key, used.key)
    async with running_server(tmp_path / "data", tls_cert=used.certificate, tls_key=used.key) as running:
        async with tls_channel(running.app.port, old) as channel:
            assert await healthy(channel)
            # The new certificate with the old key, as in the middle of a renewal: the old pair stays in use.
            os.replace(new.certificate, used.certificate)
            async with tls_channel(running.app.port, old) as another:
                assert await healthy(another)
            os.replace(new.key, used.key)
            async with tls_channel(running.app.port, used) as renewed, tls_channel(running.app.port, old) as stale:
                assert await healthy(renewed)
                assert not await healthy(stale)
            # Existing connections stay open.
            assert await healthy(channel)
        async with grpc.aio.insecure_channel(f"localhost:{running.app.port}") as plain:
            assert not await healthy(plain)


async def test_mutual_tls_requires_a_client_certificate(tmp_path: Path) -> None:
    server, client, stranger = (
        make_pem(tmp_path, "server"),
        make_pem(tmp_path, "client"),
        make_pem(tmp_path, "stranger"),
    )
    tls = {"tls_cert": server.certificate, "tls_key": server.key, "tls_client_ca": client.certificate}
    async with running_server(tmp_path / "data", **tls) as running:
        for own, welcome in ((client, True), (stranger, False), (None, False)):
            async with tls_channel(running.app.port, server, own) as channel:
                assert await healthy(channel) is welcome


async def test_an_expired_client_certificate_is_refused(tmp_path: Path) -> None:
    server, expired = make_pem(tmp_path, "server"), make_pem(tmp_path, "expired", days=(-10, -1))
    tls = {"tls_cert": server.certificate, "tls_key": server.key, "tls_client_ca": expired.certificate}
    async with (
        running_server(tmp_path / "data", **tls) as running,
        tls_channel(running.app.port, server, expired) as channel,
    ):
        assert not await healthy(channel)


@pytest.mark.parametrize(
    ("days", "reason"), [((-10, -1), "it expired on 20"), ((2, 10), "it is not valid before 20")], ids=["over", "early"]
)
async def test_a_certificate_outside_its_validity_is_not_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, days: tuple[float, float], reason: str
) -> None:
    good, bad = make_pem(tmp_path, "good"), make_pem(tmp_path, "bad", days=days)
    with pytest.raises(ServiceError, match=f"certificate and its key cannot be used: {reason}"):
        Certificates(bad.certificate, bad.key, None).server_credentials()
    used = Pem(tmp_path / "used.crt", tmp_path / "used.key")
    shutil.copy(good.certificate, used.certificate)
    shutil.copy(good.key, used.key)
    async with running_server(tmp_path / "data", tls_cert=used.certificate, tls_key=used.key) as running:
        # Renewed with one that no client accepts: the previous one stays in use, and the log says so.
        os.replace(bad.key, used.key)
        os.replace(bad.certificate, used.certificate)
        async with tls_channel(running.app.port, good) as channel:
            assert await healthy(channel)
    assert f"keeping the previous one: {reason}" in caplog.text


def test_a_certificate_that_expires_soon_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days, said in ((30, False), (3, True)):
        soon = make_pem(tmp_path, "soon", days=(-1, days))
        served = Certificates(soon.certificate, soon.key, None)
        served.server_credentials()
        assert ("the TLS certificate expires on" in caplog.text) == said
    # A server that has run since it was new also says so, once, at handshakes on a later day.
    caplog.clear()
    monkeypatch.setattr(served, "_said", None)
    for _ in range(3):
        assert served._renewed() is None
    assert caplog.text.count("the TLS certificate expires on") == 1


def test_invalid_certificate_files_are_refused_at_start(tmp_path: Path) -> None:
    good, other = make_pem(tmp_path, "good"), make_pem(tmp_path, "other")
    with pytest.raises(ServiceError, match="certificate and its key cannot be used"):
        Certificates(good.certificate, other.key, None).server_credentials()
    with pytest.raises(ServiceError, match="No such file"):
        Certificates(tmp_path / "none", good.key, None).server_credentials()
