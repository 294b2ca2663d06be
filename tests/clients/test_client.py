import re
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RequestInfo, RetryInfo
from prefloop.v1.chat_pb2 import SLOT_A, SLOT_B, ChatDelta, ChatFinished, ChatStarted, CompareFinished, CompareStarted
from prefloop.v1.feedback_pb2 import THUMB_UP

from clients import (
    BusyError,
    Client,
    ConflictError,
    InvalidRequestError,
    NotAllowedError,
    NotFoundError,
    ServerError,
    TimedOutError,
    Tls,
    UnavailableError,
    UntrustedError,
)
from clients.channel import channel_options, on_loopback, open_channel
from tests.clients.conftest import WAIT_SECONDS, FakeService, serving, status
from tests.pem import Pem, make_pem


def test_a_chat_is_started_deltas_and_finished(client: Client) -> None:
    events = list(client.chat("Where do owls live?"))
    assert isinstance(events[0], ChatStarted)
    assert [event.text for event in events if isinstance(event, ChatDelta)] == ["Owls ", "live in ", "trees."]
    assert isinstance(events[-1], ChatFinished)
    assert events[-1].text == "Owls live in trees."
    # The event that the client does not know is left out.
    assert len(events) == 5


def test_zero_is_a_value_and_nothing_is_not(client: Client, service: FakeService) -> None:
    list(client.chat("hi", temperature=0.0, seed=0))
    (request,) = service.sent("Chat")
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("seed")
    assert not request.sampling.HasField("max_tokens")


def test_the_user_travels_in_the_metadata(client: Client, service: FakeService) -> None:
    client.thumb("resp", THUMB_UP)
    assert service.metadata[0]["x-user-id"] == "ana"


@pytest.mark.parametrize("user", ["", "zoë", "a\nb"])
def test_a_user_name_that_cannot_travel_is_refused_at_once(user: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        Client(user=user)


@pytest.mark.parametrize("key", ["key_1.clé", "key_1.secret\n"])
def test_a_key_that_cannot_travel_is_refused_at_once(key: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        Client("127.0.0.1:1", api_key=key)


def test_a_comparison_has_two_finished_answers(client: Client) -> None:
    events = list(client.compare("How do I catch a fish?"))
    assert isinstance(events[0], CompareStarted)
    finished = {event.slot: event.text for event in events if isinstance(event, CompareFinished)}
    assert finished == {SLOT_A: "You may try a net.", SLOT_B: "A net helps."}


def test_cancelling_ends_the_iteration_and_the_call(client: Client, service: FakeService) -> None:
    service.hold.clear()
    heard = []
    for event in (stream := client.chat("hi")):
        heard.append(event)
        if isinstance(event, ChatDelta):
            stream.cancel()
    assert len(heard) == 2
    assert service.cancelled.wait(WAIT_SECONDS)


def test_leaving_the_with_block_cancels_the_call(client: Client, service: FakeService) -> None:
    service.hold.clear()
    with client.chat("hi") as stream:
        next(stream)
    assert service.cancelled.wait(WAIT_SECONDS)


def test_a_vote_carries_a_fresh_request_id(client: Client, service: FakeService) -> None:
    client.thumb("resp", THUMB_UP, comment="nice")
    client.thumb("resp", THUMB_UP)
    first, second = service.sent("SubmitThumb")
    assert uuid.UUID(first.request_id) != uuid.UUID(second.request_id)
    assert (first.response_id, first.thumb, first.comment) == ("resp", THUMB_UP, "nice")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.PERMISSION_DENIED, NotAllowedError),
        (grpc.StatusCode.UNAUTHENTICATED, NotAllowedError),
        (grpc.StatusCode.FAILED_PRECONDITION, ConflictError),
        (grpc.StatusCode.ABORTED, ConflictError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, BusyError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, TimedOutError),
        (grpc.StatusCode.INTERNAL, ServerError),
    ],
)
def test_each_status_is_an_exception_with_the_servers_sentence(
    client: Client, service: FakeService, code: grpc.StatusCode, kind: type[Exception]
) -> None:
    service.fail["RetractFeedback"] = [status(code, "This is why.", reason="WHY", field="feedback_id")]
    with pytest.raises(kind, match=r"^This is why\.$") as caught:
        client.retract("fb")
    assert (caught.value.code, caught.value.reason, caught.value.field) == (code, "WHY", "feedback_id")  # type: ignore[attr-defined]


def test_a_person_is_exported_and_forgotten(client: Client, service: FakeService) -> None:
    conversation, key = client.export_user()
    assert (conversation.conversation.conversation_id, key.key.key_id) == ("conv", "key_1")
    forgotten = client.forget_user("ben")
    assert (forgotten.votes, list(forgotten.policy_versions)) == (3, ["v0001"])
    assert [request.user for request in service.sent("ExportUser") + service.sent("ForgetUser")] == ["", "ben"]
    service.fail["ForgetUser"] = [status(grpc.StatusCode.PERMISSION_DENIED, "Only an operator may.")]
    with pytest.raises(NotAllowedError):
        client.forget_user("eve")


def test_a_busy_server_says_when_to_come_back(client: Client, service: FakeService) -> None:
    busy = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "Later.")
    for detail in (RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000)), RequestInfo(request_id="call_1")):
        busy.details.add().Pack(detail)
    service.fail["RetractFeedback"] = [busy]
    with pytest.raises(BusyError) as caught:
        client.retract("fb")
    assert (caught.value.retry_seconds, caught.value.call_id) == (2.5, "call_1")


def test_no_server_is_one_sentence_that_says_what_to_do() -> None:
    with Client("127.0.0.1:1", user="ana") as client, pytest.raises(UnavailableError) as caught:
        client.check()
    assert str(caught.value) == (
        "No server answers at 127.0.0.1:1: start one with `server serve`, or pass its --host and --port."
    )


def test_a_deadline_is_told_in_a_sentence(address: str, service: FakeService) -> None:
    service.hold.clear()
    with Client(address, stream_timeout=0.2) as client, pytest.raises(TimedOutError, match="did not finish in time"):
        list(client.chat("hi"))


def test_a_list_is_fetched_page_by_page_as_it_is_read(client: Client, service: FakeService) -> None:
    conversations = client.conversations()
    assert next(conversations).conversation_id == "newer"
    assert len(service.sent("ListConversations")) == 1
    assert [conversation.conversation_id for conversation in conversations] == ["older"]
    assert [request.page_token for request in service.sent("ListConversations")] == ["", "page 2"]


def test_activation_compares_only_where_it_is_told_to(client: Client, service: FakeService) -> None:
    assert client.activate("v0002").version == "v0002"
    client.activate("v0003", expected_active_version="v0002")
    plain, compared = service.sent("ActivatePolicy")
    assert not plain.HasField("expected_active_version")
    assert compared.expected_active_version == "v0002"


def test_a_healthy_server_is_waited_for_no_longer(client: Client) -> None:
    client.wait_until_serving(timeout=WAIT_SECONDS)


def test_the_channel_never_pings_more_often_than_servers_accept() -> None:
    options = dict(channel_options("example.org:443"))
    assert isinstance(options["grpc.keepalive_time_ms"], int)
    assert options["grpc.keepalive_time_ms"] > 300_000
    assert "grpc.keepalive_permit_without_calls" not in options
    assert "grpc.enable_http_proxy" not in options


def test_grpc_has_no_retry_policy_beside_the_clients_own() -> None:
    assert "grpc.service_config" not in dict(channel_options("localhost:1"))


def test_a_key_says_who_calls_and_not_the_user_name(address: str, service: FakeService) -> None:
    with Client(address, api_key="key_1.secret", user="ana") as client:
        client.conversation("conv")
    [metadata] = service.metadata
    assert metadata["authorization"] == "Bearer key_1.secret"
    assert "x-user-id" not in metadata


def test_a_server_with_tls_is_known_by_its_certificate(tmp_path: Path, service: FakeService) -> None:
    own, other, mine = make_pem(tmp_path, "own"), make_pem(tmp_path, "other"), make_pem(tmp_path, "mine")
    pair = (own.key.read_bytes(), own.certificate.read_bytes())
    wanted = grpc.ssl_server_credentials([pair], mine.certificate.read_bytes(), require_client_auth=True)
    certificate, key = mine.certificate.read_bytes(), mine.key.read_bytes()
    with serving(service, wanted) as port:
        address = f"localhost:{port}"
        with Client(address, tls=Tls(pair[1], certificate, key)) as client:
            client.check()
        # Without a client certificate or without TLS the server hangs up, as a server that is shutting down may.
        hung_up = (
            f"The server at {address} closes the connection at once: it may be shutting down, or require TLS (--ca) or "
            "a client certificate (--cert)."
        )
        for tls in (Tls(pair[1]), Tls(pair[1], other.certificate.read_bytes(), other.key.read_bytes()), None):
            with Client(address, tls=tls, timeout=WAIT_SECONDS) as client, pytest.raises(UnavailableError) as error:
                client.check()
            assert str(error.value) == hung_up


@pytest.mark.parametrize(
    ("name", "made", "trusted", "said"),
    [
        ("expired", {"days": (-9, -1)}, "expired", "has expired; its operator has to renew it."),
        ("early", {"days": (1, 9)}, "early", "is not valid yet; check this machine's clock."),
        (
            "elsewhere",
            {"host": "elsewhere.example"},
            "elsewhere",
            "is for another name; connect with the name in the certificate.",
        ),
        (
            "own",
            {},
            "other",
            "has an unknown issuer; pass the issuer's certificate with --ca.",
        ),
    ],
)
def test_certificates_that_do_not_fit_are_a_sentence_at_once(
    tmp_path: Path, service: FakeService, name: str, made: Any, trusted: str, said: str
) -> None:
    pem = make_pem(tmp_path, name, **made)
    authority = pem if name == trusted else make_pem(tmp_path, trusted)
    credentials = grpc.ssl_server_credentials([(pem.key.read_bytes(), pem.certificate.read_bytes())])
    with serving(service, credentials) as port:
        assert untrusted(port, authority) == f"The certificate of the server at localhost:{port} {said}"


def test_a_server_without_tls_is_a_sentence(tmp_path: Path, service: FakeService) -> None:
    tls = Tls(make_pem(tmp_path, "other").certificate.read_bytes())
    with (
        serving(service) as port,
        Client(f"localhost:{port}", tls=tls, user="ana", patience=0) as client,
        pytest.raises(UnavailableError) as error,
    ):
        client.caller()
    assert str(error.value) == f"The server at localhost:{port} does not use TLS, but this client requires it."


def untrusted(port: int, authority: Pem) -> str:
    """The error message of a call, which would wait minutes for an unavailable server."""
    waits: list[Any] = []
    tls = Tls(authority.certificate.read_bytes())
    with Client(f"localhost:{port}", tls=tls, user="ana", on_wait=lambda *wait: waits.append(wait)) as client:
        with pytest.raises(UntrustedError) as error:
            client.caller()
        with pytest.raises(UntrustedError):
            client.wait_until_serving(timeout=600)
    assert waits == []
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"ca": b"rubbish"}, "ca does not contain a PEM certificate."),
        ({"ca": b"-----BEGIN PRIVATE KEY-----"}, "ca does not contain a PEM certificate."),
        ({"certificate": b"", "key": b""}, "certificate does not contain a PEM certificate."),
        ({"key": b"-----BEGIN CERTIFICATE-----"}, "key does not contain a PEM private key."),
    ],
)
def test_what_is_no_pem_is_refused(given: dict[str, bytes], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Tls(**given)


def test_nothing_is_sent_in_the_clear_beyond_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(grpc, "insecure_channel", lambda address, options: opened.append(address))
    monkeypatch.setattr(grpc, "secure_channel", lambda address, credentials, options: opened.append("tls " + address))
    for address in ("127.0.0.1:1", "chat.example:1"):
        open_channel(address)
    open_channel("localhost:1", Tls())
    assert opened == ["127.0.0.1:1", "tls chat.example:1", "tls localhost:1"]


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1:1", True), ("[::1]:1", True), ("localhost:1", True), ("10.0.0.1:1", False), ("example.org:1", False)],
)
def test_loopback_is_known_by_its_address(address: str, loopback: bool) -> None:
    assert on_loopback(address) is loopback
