"""Every RPC with random, extreme and broken messages from its descriptor: no crash, no hang, and no internal error.

More than 10,000 requests, the same in every run, of which `make test` sends a third: numbers at the limits of their
types, text from every plane of Unicode and invalid text, empty and very long lists, ids that exist, ids of others and
unknown ids, and bytes that are not a message.
"""

import asyncio
import random
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from prefloop.v1 import chat_pb2, feedback_pb2

from server.rpc.access import ROLES
from server.rpc.to_proto import page_token
from tests.server.conftest import Running, running_server
from tests.server.rpc.test_pairs import answer
from tests.server.rpc.test_round_samples import judged, keep_line
from tests.server.rpc.test_rpcs import ANN, BOB, chat, compare
from tests.tiers import slow

EACH, SAMPLE = 700, 250
# Few of these requests are valid: they need an existing version, and the active one, a token that a page had, or two
# answers to the same messages.
SELDOM_RIGHT = {
    *(f"/prefloop.v1.PolicyService/{name}" for name in ("ActivatePolicy", "RollbackPolicy", "ListRoundSamples")),
    "/prefloop.v1.ChatService/GetConversation",
    "/prefloop.v1.FeedbackService/SubmitPairChoice",
}
AT_ONCE = 16
SECONDS = 30
# Statuses that a caller's own request may cause. INTERNAL and UNKNOWN are bugs; a deadline would be a hang.
THEIRS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
# Whose valid requests ask for an exact text, which chance does not find.
NEVER_RIGHT = {"/prefloop.v1.ChatService/FindResponse"}
# Page tokens in our format, with values that we do not put there.
TOKENS = [page_token(key) for key in ([2**70], [-1], ["\ud800"], [1.0, "\ud800"], [float("nan"), "x"], [1e308, "x"])]
TEXTS = [
    *TOKENS,
    "",
    " ",
    "a",
    "a" * 500,
    "a" * 501,
    "\x00",
    "\u202e",
    "🦉" * 128,
    "ä" * 129,
    "' OR 1=1 --",
    "{}",
    "v0000",
    "\n",
]
NUMBERS = {
    FieldDescriptor.TYPE_UINT32: [0, 1, 20, 21, 200, 201, 2**31, 2**32 - 1],
    FieldDescriptor.TYPE_UINT64: [0, 1, 2**63 - 1, 2**63, 2**64 - 1],
    FieldDescriptor.TYPE_FLOAT: [0.0, -0.0, 2.0, 2.0001, -1.0, float("inf"), float("-inf"), float("nan"), 1e-38],
    FieldDescriptor.TYPE_ENUM: [0, 1, 2, 3, 4, 5, -1, 2**31 - 1],
    FieldDescriptor.TYPE_BOOL: [False, True],
}
OURS = [method for method in ROLES if method.startswith("/prefloop.")]


class Maker:
    """Messages for a descriptor, drawn from `seed`; `ids` are some that exist."""

    def __init__(self, seed: int, ids: list[str]) -> None:
        self._draw = random.Random(seed)
        self._ids = ids
        self._sound = False

    def request(self, method: MethodDescriptor) -> bytes:
        message = message_factory.GetMessageClass(method.input_type)()
        # A third are valid in each field, and odd only in combination.
        self._sound = self._draw.random() < 0.3
        self._fill(message)
        if "messages" in method.input_type.fields_by_name and "message" in method.input_type.fields_by_name:
            self._choose_history(message)
        elif method.name == "FindResponse" and self._sound:
            in_turn(message.messages, feedback_pb2.ROLE_ASSISTANT, feedback_pb2.ROLE_USER)
        data = message.SerializeToString()
        if self._draw.random() < 0.3:
            data = self._broken(data)
        return data

    def _fill(self, message: Any) -> None:
        for field in message.DESCRIPTOR.fields:
            # Left out, as older clients leave out newer fields.
            if not self._sound and self._draw.random() < 0.3:
                continue
            if field.is_repeated:
                self._repeat(field, getattr(message, field.name))
            elif field.type == FieldDescriptor.TYPE_MESSAGE:
                getattr(message, field.name).SetInParent()
                self._fill(getattr(message, field.name))
            else:
                setattr(message, field.name, self._draw.choice(self._values(field)))

    def _repeat(self, field: FieldDescriptor, values: Any) -> None:
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for _ in range(self._draw.choice([1, 2, 64, 65])):
                self._fill(values.add())
        else:
            values.extend(self._draw.choices(self._values(field), k=self._draw.choice([0, 1, 4, 5])))

    def _choose_history(self, message: Any) -> None:
        """Mostly, only one of the two ways to say what came before; a caller's own often has its roles in turn."""
        way = self._draw.choice(["stored", "own", "own in turn", "both"])
        if way == "stored":
            message.ClearField("messages")
        elif way.startswith("own"):
            for name in ("message", "conversation_id", "system"):
                message.ClearField(name)
        if way == "own in turn":
            in_turn(message.messages, feedback_pb2.ROLE_USER, feedback_pb2.ROLE_ASSISTANT)

    def _values(self, field: FieldDescriptor) -> list[Any]:
        numbers = NUMBERS.get(field.type)
        if self._sound:
            return numbers[1:4] if numbers else [*self._ids, "a"]
        return numbers or TEXTS + self._ids

    def _broken(self, data: bytes) -> bytes:
        spoilt = bytearray(data or b"\x0a")
        for _ in range(self._draw.randint(1, 4)):
            spoilt[self._draw.randrange(len(spoilt))] = self._draw.randrange(256)
        return bytes(spoilt[: self._draw.randint(0, len(spoilt))]) + self._draw.randbytes(self._draw.randint(0, 8))


def in_turn(messages: Any, last: Any, other: Any) -> None:
    for place, said in enumerate(reversed(messages)):
        said.role = other if place % 2 else last


@pytest.fixture
async def wide(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path, user_rate=10_000_000, user_calls=1000) as running:
        yield running


@pytest.mark.parametrize(
    ("name", "each"),
    [(name, EACH if name in SELDOM_RIGHT else SAMPLE) for name in OURS] + [slow(n, EACH) for n in OURS],
)
async def test_no_request_is_the_servers_fault(wide: Running, name: str, each: int) -> None:
    started, *_ = await chat(wide)
    compared, *_ = await compare(wide)
    thumb = feedback_pb2.SubmitThumbRequest(response_id=started.started.response_id, thumb=feedback_pb2.THUMB_UP)
    kept = await wide.feedback.SubmitThumb(thumb, metadata=ANN)
    theirs, *_ = await chat(wide, user=BOB)
    round_ = await wide.store(judged)
    keep_line(wide.data_dir, round_, "")
    # A learner that listens for requests and does nothing.
    await wide.store(lambda store: store.round_requests.listen("here", None))
    ids = [
        round_.id,
        started.started.conversation_id,
        started.started.response_id,
        compared.started.comparison_id,
        kept.feedback.feedback_id,
        theirs.started.conversation_id,
        theirs.started.response_id,
        *[await answer(wide, "hello") for _ in range(3)],
    ]
    method = descriptor_pool.Default().FindMethodByName(name[1:].replace("/", "."))
    # By its name: a new RPC changes the requests of no other.
    maker = Maker(zlib.crc32(name.encode()), ids)
    requests = iter([maker.request(method) for _ in range(each)])
    codes: dict[grpc.StatusCode, int] = {}

    async def send() -> None:
        call = wide.channel.unary_stream(name) if method.server_streaming else wide.channel.unary_unary(name)
        for request in requests:
            code = await status(call(request, metadata=ANN, timeout=SECONDS))
            assert code in THEIRS, (code, request)
            codes[code] = codes.get(code, 0) + 1

    await asyncio.gather(*(send() for _ in range(AT_ONCE)))
    assert sum(codes.values()) == each
    # Both valid and invalid requests were sent, and the server still works.
    assert codes.get(grpc.StatusCode.NOT_FOUND if name in NEVER_RIGHT else grpc.StatusCode.OK), codes
    if method.input_type.fields:
        assert codes.get(grpc.StatusCode.INVALID_ARGUMENT), codes
    assert (await chat(wide, user=BOB))[-1].finished.text == "one two three four "
    [row] = await wide.store(lambda store: store._db.rows("PRAGMA integrity_check"))
    assert row == {"integrity_check": "ok"}
    assert await wide.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=ANN)


async def status(call: Any) -> grpc.StatusCode:
    try:
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_there_are_ten_thousand_requests() -> None:
    assert EACH * len(OURS) >= 10_000
