"""The JavaScript example, which uses nothing but the protos, against the real server."""

import asyncio
import json
import os
import re
import signal
import tomllib
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prefloop.v1 import chat_pb2, feedback_pb2

from server.store.store import Store
from tests.pem import make_pem
from tests.server.conftest import Running, running_server

WAIT_SECONDS = 30
ANA, OLGA = (("x-user-id", "ana"),), (("x-user-id", "olga"),)


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path) as running:
        yield running


@asynccontextmanager
async def talking(example: Path, port: int, *arguments: str, **environment: str) -> AsyncIterator[Process]:
    """Runs `node chat.js` with a proxy variable that leads nowhere."""
    usual = {"PATH": os.environ["PATH"], "http_proxy": "http://127.0.0.1:1", "PREFLOOP_PORT": str(port)}
    process = await asyncio.create_subprocess_exec(
        "node", "chat.js", *arguments, cwd=example, stdin=PIPE, stdout=PIPE, stderr=PIPE, env={**usual, **environment}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def talk(
    example: Path, port: int, *arguments: str, typed: str = "", **environment: str
) -> tuple[int | None, str, str]:
    """(exit code, standard output, standard error)"""
    async with talking(example, port, *arguments, **environment) as process:
        out, err = await asyncio.wait_for(process.communicate(typed.encode()), WAIT_SECONDS)
    return process.returncode, out.decode(), err.decode()


async def votes(running: Running, user: tuple[tuple[str, str], ...]) -> list[str]:
    listed = await running.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest(), metadata=user)
    return [
        feedback_pb2.Thumb.Name(vote.thumb) if vote.thumb else feedback_pb2.Choice.Name(vote.choice)
        for vote in listed.feedback
    ]


async def test_it_chats_compares_and_votes(node_example: Path, running: Running) -> None:
    running.engine.answers = ["Air scatters blue.", "One \x1b[2Jway.", "Another \u202eway."]
    code, out, err = await talk(node_example, running.app.port, "Why?", typed="y\nb\n")
    assert (code, err) == (0, "")
    first, second = re.findall(r"SLOT_[AB]: (.*)\n", out)
    # Slots are drawn at random; control characters are removed from both answers.
    assert {first, second} == {"One [2Jway. ", "Another way. "}
    assert out.replace(first, "1").replace(second, "2") == (
        "Air scatters blue. \nGood? y or n: \nSLOT_A: 1\n\nSLOT_B: 2\nBetter? a, b, tie or bad: "
    )
    assert await votes(running, ANA) == ["CHOICE_B", "THUMB_UP"]
    assert [message for sent in running.engine.encoded for message in sent] == [{"role": "user", "content": "Why?"}] * 2


async def test_who_answers_nothing_casts_no_vote(node_example: Path, running: Running) -> None:
    code, out, err = await talk(node_example, running.app.port, PREFLOOP_USER="olga")
    assert (code, err) == (0, "")
    assert out == (
        "one two three four \nGood? y or n: \n"
        "SLOT_A: one two three four \n\nSLOT_B: one two three four \nBetter? a, b, tie or bad: "
    )
    assert await votes(running, OLGA) == []
    listed = await running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=OLGA)
    assert [conversation.title for conversation in listed.conversations] == ["Why is the sky blue?"] * 2


async def test_an_error_is_a_sentence_with_its_reason(node_example: Path, running: Running) -> None:
    code, out, err = await talk(node_example, running.app.port, "")
    assert (code, out) == (1, "")
    assert err == "chat.js: message must not be empty. (INVALID_FIELD)\n"


async def test_a_key_says_who_calls(node_example: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    key = store.keys.create("olga", "user")
    store.close()
    async with running_server(tmp_path) as running:
        refused = "chat.js: Send an API key in the metadata: `authorization: Bearer KEY`. (UNAUTHENTICATED)\n"
        assert await talk(node_example, running.app.port) == (1, "", refused)
        code, _, err = await talk(node_example, running.app.port, typed="n\ntie\n", PREFLOOP_API_KEY=key)
        assert (code, err) == (0, "")
        assert await votes(running, (("authorization", f"Bearer {key}"),)) == ["CHOICE_TIE", "THUMB_DOWN"]


async def test_a_certificate_is_checked(node_example: Path, tmp_path: Path) -> None:
    own, other = make_pem(tmp_path, "own"), make_pem(tmp_path, "other")
    async with running_server(tmp_path / "data", tls_cert=own.certificate, tls_key=own.key) as running:
        secure = {"PREFLOOP_HOST": "localhost"}
        code, out, err = await talk(node_example, running.app.port, **secure, PREFLOOP_CA=str(own.certificate))
        assert (code, out[:19], err) == (0, "one two three four ", "")
        code, out, err = await talk(node_example, running.app.port, **secure, PREFLOOP_CA=str(other.certificate))
        assert (code, out) == (1, "")
        assert "self-signed certificate" in err


async def test_beyond_loopback_nothing_is_sent_in_the_clear(node_example: Path) -> None:
    begun: asyncio.Queue[bytes] = asyncio.Queue()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        begun.put_nowait(await reader.read(3))
        writer.close()

    # Linux has all of 127.0.0.0/8 on loopback; the example treats only three names as loopback.
    async with await asyncio.start_server(listen, "127.0.0.2", 0) as stranger:
        port = stranger.sockets[0].getsockname()[1]
        environment = {"PREFLOOP_HOST": "127.0.0.2", "PREFLOOP_API_KEY": "key_1.secret", "http_proxy": ""}
        code, out, _ = await talk(node_example, port, **environment)
    assert (code, out) == (1, "")
    # A TLS handshake record, version 3.
    assert (await begun.get())[:2] == b"\x16\x03"


async def test_the_deadline_ends_an_answer_that_hangs(node_example: Path, running: Running) -> None:
    running.engine.hold_after = 1
    code, out, err = await talk(node_example, running.app.port, PREFLOOP_SECONDS="1")
    assert (code, out) == (1, "one ")
    assert re.fullmatch(r"chat\.js: .*[Dd]eadline.*\n", err)


async def test_ctrl_c_stops_the_answer_on_the_server_too(node_example: Path, running: Running) -> None:
    running.engine.hold_after = 2
    async with talking(node_example, running.app.port, "Why?") as process:
        assert process.stdout
        assert process.stderr
        assert await asyncio.wait_for(process.stdout.readexactly(8), WAIT_SECONDS) == b"one two "
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), WAIT_SECONDS) == 1
        assert await process.stderr.read() == b"chat.js: Cancelled on client\n"
    listed = await running.chat.ListConversations(chat_pb2.ListConversationsRequest(), metadata=ANA)
    [conversation] = listed.conversations
    request = chat_pb2.GetConversationRequest(conversation_id=conversation.conversation_id)
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            [turn] = (await running.chat.GetConversation(request, metadata=ANA)).conversation.turns
            if turn.response.finish_reason:
                break
    assert turn.response.finish_reason == chat_pb2.FINISH_REASON_CANCELLED
    assert turn.response.text == "one two "


async def test_ctrl_c_at_a_question_just_ends(node_example: Path, running: Running) -> None:
    async with talking(node_example, running.app.port) as process:
        assert process.stdout
        assert process.stderr
        await asyncio.wait_for(process.stdout.readuntil(b"Good? y or n: "), WAIT_SECONDS)
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), WAIT_SECONDS) == 130
        assert await process.stderr.read() == b""


async def test_no_server_is_an_error(node_example: Path) -> None:
    code, out, err = await talk(node_example, 1)
    assert (code, out) == (1, "")
    assert err.startswith("chat.js: ")
    assert "ECONNREFUSED 127.0.0.1:1" in err


def test_versions_are_exact_and_no_registry_is_named(root: Path) -> None:
    folder = root / "clients" / "node"
    package, lock = (json.loads((folder / name).read_text()) for name in ("package.json", "package-lock.json"))
    assert package["dependencies"] == {"@grpc/grpc-js": "1.14.7", "@grpc/proto-loader": "0.8.1"}
    locked = {name: entry for name, entry in lock["packages"].items() if name}
    assert locked["node_modules/@grpc/grpc-js"]["version"] == "1.14.7"
    assert all(entry["integrity"].startswith("sha512-") and "resolved" not in entry for entry in locked.values())


def test_no_package_or_image_carries_the_example(root: Path) -> None:
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["exclude"] == ["clients/go", "clients/node"]
    assert {"clients/go", "clients/node"} <= set((root / ".dockerignore").read_text().splitlines())
    assert "node_modules/" in (root / ".gitignore").read_text().splitlines()
