"""Ratings in Open WebUI's export become votes on the answers that they are about."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefloop.v1 import chat_pb2
from prefloop.v1.feedback_pb2 import ROLE_SYSTEM, ROLE_USER, Message

from clients.client import Client
from clients.import_feedback import import_ratings, read_export
from tests.clients.gateway.conftest import SECONDS, Gateway, serving_gateway
from tests.clients.gateway.test_sdk import python_with
from tests.server.conftest import Running, running_server

ANSWER = "one two three four "
START_SECONDS = 180


def chat(*texts: str, system: str = "") -> dict[str, Any]:
    """A chat as Open WebUI stores it, with messages m0, m1, ... and another answer beside the last one."""
    messages = {
        f"m{place}": {
            "id": f"m{place}",
            "parentId": f"m{place - 1}" if place else None,
            "role": "assistant" if place % 2 else "user",
            "content": text,
        }
        for place, text in enumerate(texts)
    }
    messages["other"] = {**messages[f"m{len(texts) - 1}"], "id": "other", "content": "another answer"}
    return {"chat": {"history": {"messages": messages, "currentId": "other"}, "params": {"system": system}}}


def rating(message: str, good: bool, said: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": f"fb-{message}", "user_id": "u1", "type": "rating", "updated_at": 5,
        "data": {"rating": 1 if good else -1, "model_id": "prefloop", "comment": "why"},
        "meta": {"message_id": message, "chat_id": "c1"}, "snapshot": {"chat": said}, **more,
    }  # fmt: skip


async def ask(running: Running, *said: Message, user: str = "ann") -> None:
    call = running.chat.Chat(chat_pb2.ChatRequest(messages=said), metadata=[("x-user-id", user)], timeout=SECONDS)
    _ = [event async for event in call]


async def votes(running: Running, user: str = "ann") -> list[tuple[str, str, str]]:
    def read(store: Any) -> list[tuple[str, str, str]]:
        return [
            (vote.value, vote.comment, store.responses.get(user, vote.response_id).text)
            for vote in store.feedback.page(user, 100)
        ]

    return await running.store(read)


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_server(tmp_path / "data") as running:
        yield running


def written(path: Path, entries: Any) -> Path:
    path.write_text(json.dumps(entries))
    return path


async def test_ratings_are_votes(running: Running, tmp_path: Path) -> None:
    hello = Message(role=ROLE_USER, content="hello")
    await ask(running, hello)
    await ask(running, Message(role=ROLE_SYSTEM, content="be kind"), hello)
    said, kind = chat("hello", ANSWER.strip()), chat("hello", ANSWER, system="be kind")
    entries = [
        rating("m1", True, said),
        rating("m1", False, kind, id="fb-2", data={"rating": "-1", "reason": "too long"}),
        # Nobody's answer here, one without a rating, and a choice in their arena.
        rating("other", True, said),
        rating("m1", True, said, id="fb-4", data={"rating": None}),
        rating("m1", True, None, id="fb-5"),
        # What cannot be read keeps no other from being imported.
        3,
        rating("missing", True, said, id="fb-6"),
    ]
    entries = entries[-2:] + entries[:-2]
    export = written(tmp_path / "export.json", entries)

    def run() -> str:
        with Client(f"127.0.0.1:{running.app.port}", user="ann") as client:
            return import_ratings(lambda _: client, read_export(export))

    for _ in range(2):
        # Once and again: it counts once.
        told = await asyncio.to_thread(run)
        assert told == (
            "2 ratings are votes now; 1 more are about answers that this server did not give; 2 cannot be read."
        )
        assert await votes(running) == [("DOWN", "too long", ANSWER), ("UP", "why", ANSWER)]
    # A rating that was changed replaces the earlier one.
    written(export, [rating("m1", False, said, updated_at=6)])
    assert await asyncio.to_thread(run) == "1 rating is a vote now."
    assert sorted(await votes(running)) == [("DOWN", "too long", ANSWER), ("DOWN", "why", ANSWER)]


def command(running: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    address = ["--host", "127.0.0.1", "--port", str(running.app.port), "--user", "shop"]
    return subprocess.run(
        [sys.executable, "-m", "clients.cli", *address, "import-feedback", *arguments],
        capture_output=True, text=True, timeout=SECONDS * 3, check=False,
    )  # fmt: skip


async def test_the_command_imports_for_end_users(running: Running, tmp_path: Path) -> None:
    await ask(running, Message(role=ROLE_USER, content="hello"), user="shop/u1")
    export = str(written(tmp_path / "export.json", [rating("m1", True, chat("hello", ANSWER))]))
    done = await asyncio.to_thread(command, running, export, "--end-users")
    assert (done.returncode, done.stdout) == (0, "1 rating is a vote now.\n"), done.stderr
    assert await votes(running, "shop/u1") == [("UP", "why", ANSWER)]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not JSON."),
        ("{}", "is not a list of feedback, as Open WebUI exports it."),
        ('[{"id": "1", "data": {"rating": 1}, "type": "rating", "snapshot": {"chat": {}}}]', None),
        (None, "No such file"),
    ],
)
async def test_another_file_is_refused_in_a_sentence(
    running: Running, tmp_path: Path, content: str | None, sentence: str | None
) -> None:
    path = tmp_path / "export.json"
    if content is not None:
        path.write_text(content)
    done = await asyncio.to_thread(command, running, str(path))
    if sentence is None:
        assert (done.returncode, done.stdout) == (0, "0 ratings are votes now.\n")
        return
    assert done.returncode == 1
    assert done.stderr.startswith("chat: ")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@asynccontextmanager
async def open_webui(directory: Path, gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    """Open WebUI, installed from its package, with the gateway as its only source of models."""
    [python] = await asyncio.to_thread(python_with, "open-webui", directory / "environment")
    settings = {
        "PATH": os.environ["PATH"], "HOME": str(directory), "DATA_DIR": str(directory / "webui"),
        "WEBUI_AUTH": "False", "OPENAI_API_BASE_URL": f"{gateway.url}/v1", "OPENAI_API_KEY": "any",
        "ENABLE_OLLAMA_API": "False", "OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1",
        "ENABLE_FORWARD_USER_INFO_HEADERS": "True", "RAG_EMBEDDING_ENGINE": "openai",
        "AUDIO_STT_ENGINE": "openai", "ANONYMIZED_TELEMETRY": "False",
    }  # fmt: skip
    (directory / "webui").mkdir()
    with (directory / "webui.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            str(Path(python).with_name("open-webui")), "serve", "--host", "127.0.0.1", "--port", "18098",
            env=settings, cwd=directory, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        async with httpx.AsyncClient(base_url="http://127.0.0.1:18098", timeout=60) as http:
            async with asyncio.timeout(START_SECONDS):
                while True:
                    try:
                        signed_in = await http.post("/api/v1/auths/signin", json={"email": "", "password": ""})
                        break
                    except httpx.TransportError:
                        assert process.returncode is None, (directory / "webui.log").read_text()[-2000:]
                        await asyncio.sleep(0.5)
            http.headers["authorization"] = f"Bearer {signed_in.json()['token']}"
            yield http
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.slow
async def test_open_webui_chats_and_its_ratings_are_votes(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "data", max_tokens=200, max_message_chars=16_000) as running,
        serving_gateway(running) as gateway,
        open_webui(tmp_path, gateway) as http,
    ):
        running.engine.max_model_len = 4_000
        models = (await http.get("/api/models")).json()["data"]
        assert {"prefloop", "prefloop@v0000"} <= {model["id"] for model in models}
        asked = [{"role": "user", "content": "Where do owls live?"}]
        body = {"model": "prefloop", "messages": asked, "stream": False}
        answer = (await http.post("/api/chat/completions", json=body)).json()["choices"][0]["message"]["content"]
        assert answer == ANSWER
        # Its page stores the chat, and sends this with a rating.
        stored = (await http.post("/api/v1/chats/new", json=chat("Where do owls live?", answer))).json()
        form = {
            "type": "rating",
            "data": {"rating": 1, "model_id": "prefloop", "comment": "nice"},
            "meta": {"message_id": "m1", "chat_id": stored["id"], "arena": False},
            "snapshot": {"chat": stored},
        }
        assert (await http.post("/api/v1/evaluations/feedback", json=form)).status_code == 200
        export = tmp_path / "export.json"
        export.write_text((await http.get("/api/v1/evaluations/feedbacks/all/export")).text)

        def run() -> str:
            with Client(f"127.0.0.1:{running.app.port}") as client:
                return import_ratings(lambda user: client.acting_as(user="ann", end_user=user), read_export(export))

        assert await asyncio.to_thread(run) == "1 rating is a vote now."
        # Who gave it is an end user of the gateway's own user.
        [entry] = json.loads(export.read_text())
        assert await votes(running, f"ann/{entry['user_id']}") == [("UP", "nice", ANSWER)]
