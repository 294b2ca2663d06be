"""The documentation for other languages: each line is run, and each name is checked against the descriptors."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from prefloop.v1 import chat_pb2, feedback_pb2, policy_pb2

from server.store.store import Store
from tests.server.conftest import Running, publish_version, register, running_server
from tests.server.rpc.test_round_samples import judged

ANA = (("x-user-id", "ana"),)
WAIT_SECONDS = 30
# A substitute if grpcurl is missing: runs the same lines through buf, which also uses the server's reflection.
STAND_IN = """#!/bin/sh -e
while :; do case $1 in
  -plaintext) shift;; -H) header=$2; shift 2;; -d) data=$2; shift 2;; *) break;;
esac; done
if [ "$2" = list ]; then exec buf curl --protocol grpc --list-services "http://$1"; fi
exec buf curl --protocol grpc --reflect-header '*' -H "$header" -d "$data" "http://$1/$2"
"""


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    """A server on which v0001 is active, v0000 was active before, and a learner is listening."""
    async with running_server(tmp_path / "data") as running:
        publish_version(running.data_dir, "v0001")
        await running.store(lambda store: register(store, "v0001"))
        await running.policies.ActivatePolicy(policy_pb2.ActivatePolicyRequest(version="v0001"), metadata=ANA)
        await running.store(lambda store: store.round_requests.listen("here", None))
        yield running


async def with_ids(running: Running, text: str) -> str:
    """`text` with its example ids replaced by existing ones."""
    chat = [event async for event in running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=ANA)]
    compare = [event async for event in running.chat.Compare(chat_pb2.CompareRequest(message="hi"), metadata=ANA)]
    started = chat[0].started
    thumb = feedback_pb2.SubmitThumbRequest(response_id=started.response_id, thumb=feedback_pb2.THUMB_DOWN)
    # The answer that the examples have.
    running.engine.answers = ["Air scatters blue light most."]
    said = [feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content="Why is the sky blue?")]
    _ = [event async for event in running.chat.Chat(chat_pb2.ChatRequest(messages=said), metadata=ANA)]
    ids = {
        "conv_...": started.conversation_id,
        **dict(zip(("resp_1...", "resp_2..."), await twice(running), strict=True)),
        "resp_...": started.response_id,
        "cmp_...": compare[0].started.comparison_id,
        "fb_...": (await running.feedback.SubmitThumb(thumb, metadata=ANA)).feedback.feedback_id,
    }
    if "round_..." in text:
        ids["round_..."] = await running.store(lambda store: judged(store).id)
    for example, real in ids.items():
        text = text.replace(example, real)
    return text


async def twice(running: Running) -> list[str]:
    """The ids of two answers to the same messages."""
    said = [feedback_pb2.Message(role=feedback_pb2.ROLE_USER, content="hi")]
    calls = [running.chat.Chat(chat_pb2.ChatRequest(messages=said), metadata=ANA) for _ in range(2)]
    streams = [[event async for event in call] for call in calls]
    return [stream[0].started.response_id for stream in streams]


def requests(root: Path) -> dict[str, str]:
    """The example request of each RPC in the reference."""
    rows = re.findall(
        r"^\| `(prefloop\.\S+)` \| \w+ \| `(.*)` \|$", (root / "docs/reference.md").read_text(), re.MULTILINE
    )
    return dict(rows)


def lines(root: Path) -> list[str]:
    """The page's commands."""
    section = (root / "docs" / "languages.md").read_text()
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


def test_the_page_is_the_generators(root: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.md"
    subprocess.run([sys.executable, "docs/languages.py", str(made)], cwd=root, check=True, timeout=60)
    assert made.read_text() == (root / "docs" / "languages.md").read_text(), "run `make docs`"


def test_each_rpc_has_a_request(root: Path) -> None:
    made = requests(root)
    assert len(made) == 28
    assert made["prefloop.v1.FeedbackService/SubmitThumb"] == '{"response_id": "resp_...", "thumb": "THUMB_UP"}'
    assert made["prefloop.v1.PolicyService/ActivatePolicy"] == '{"version": "v0001"}'
    assert made["prefloop.v1.ChatService/Chat"] == '{"message": "Why is the sky blue?"}'


async def test_every_request_of_the_reference_is_accepted(root: Path, running: Running) -> None:
    for name, body in requests(root).items():
        service, _, method = name.partition("/")
        rpc = descriptor_pool.Default().FindServiceByName(service).methods_by_name[method]
        request = message_factory.GetMessageClass(rpc.input_type)()
        json_format.Parse(await with_ids(running, body), request)
        answer = message_factory.GetMessageClass(rpc.output_type).FromString
        kind: Any = running.channel.unary_stream if rpc.server_streaming else running.channel.unary_unary
        call = kind(f"/{name}", type(request).SerializeToString, answer)(request, metadata=ANA, timeout=WAIT_SECONDS)
        # Raises if the server rejects the request.
        _ = [event async for event in call] if rpc.server_streaming else await call


async def shell(running: Running, tmp_path: Path, script: str) -> str:
    stand_in = tmp_path / "grpcurl"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    # An installed grpcurl comes first.
    path = os.pathsep.join([os.environ["PATH"], str(tmp_path), str(Path(sys.executable).parent)])
    process = await asyncio.create_subprocess_exec(
        "bash", "-euc", script.replace("localhost:50051", f"127.0.0.1:{running.app.port}"),
        stdout=asyncio.subprocess.PIPE, env={**os.environ, "PATH": path},
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), WAIT_SECONDS)
    assert process.returncode == 0, script
    return out.decode()


async def test_the_readmes_commands_work(root: Path, tmp_path: Path, running: Running) -> None:
    listing, function, *calls = lines(root)
    listed = (await shell(running, tmp_path, listing)).split()
    assert {"prefloop.v1.ChatService", "prefloop.v1.PolicyService", "grpc.health.v1.Health"} <= set(listed)
    assert len(calls) == 10
    told = {
        call.split()[1]: await shell(running, tmp_path, f"{function}\n{await with_ids(running, call)}")
        for call in calls
    }
    *_, last = documents(told["ChatService/Chat"])
    assert last["finished"]["text"] == "one two three four "
    assert last["finished"]["finishReason"] == "FINISH_REASON_STOP"
    assert {event["finished"]["slot"] for event in documents(told["ChatService/Compare"]) if "finished" in event} == {
        "SLOT_A",
        "SLOT_B",
    }
    votes = [
        documents(told[f"FeedbackService/Submit{kind}"])[0]["feedback"] for kind in ("Thumb", "Choice", "Correction")
    ]
    assert [vote["kind"] for vote in votes] == [f"FEEDBACK_KIND_{kind}" for kind in ("THUMB", "CHOICE", "CORRECTION")]
    assert (votes[0]["thumb"], votes[1]["choice"]) == ("THUMB_UP", "CHOICE_A")
    assert votes[2]["correction"] == "Air scatters blue light most."
    assert documents(told["ChatService/GetConversation"])[0]["conversation"]["title"] == "hi"
    assert documents(told["PolicyService/GetActivePolicy"])[0]["policy"]["version"] == "v0001"
    assert documents(told["PolicyService/RollbackPolicy"])[0]["policy"]["version"] == "v0000"
    assert documents(told["PolicyService/ListRounds"]) == [{}]


async def test_a_key_goes_where_the_section_says(root: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    key = store.keys.create("olga", "operator")
    store.close()
    _, function, *_ = lines(root)
    replacement = '"authorization: Bearer $PREFLOOP_API_KEY"'
    assert f"-H {replacement}" in (root / "docs" / "languages.md").read_text()
    script = f"PREFLOOP_API_KEY={key}\n{function.replace(repr('x-user-id: ana'), replacement)}\n"
    async with running_server(tmp_path) as running:
        told = await shell(running, tmp_path, script + "call PolicyService/GetActivePolicy '{}'")
        assert documents(told)[0]["policy"]["version"] == "v0000"


def documents(text: str) -> list[Any]:
    """Parses a sequence of JSON values."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found
