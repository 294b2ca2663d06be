"""Clients of others against the gateway: OpenAI's for Python, as it is installed here; slowly, each of several, from
its registry in an environment of its own."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from server.store.store import Store
from tests.clients.gateway.conftest import SAID, SECONDS, Gateway, serving_gateway
from tests.node import UNREACHABLE
from tests.server.conftest import running_server
from tests.tiers import slow

PROGRAMS = Path(__file__).parent / "programs"
INSTALL_SECONDS, RUN_SECONDS = 300, 120
ANSWER = " ".join(f"word{number}" for number in range(15))


@pytest.fixture
def client(gateway: Gateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="any", timeout=SECONDS, max_retries=0)


async def test_it_answers_streams_and_lists(client: openai.AsyncOpenAI) -> None:
    found = await client.chat.completions.create(model="prefloop", messages=SAID)  # type: ignore[arg-type]
    assert found.choices[0].message.content == "one two three four "
    assert found.usage is not None
    assert found.usage.total_tokens == 6
    stream = await client.chat.completions.create(
        model="prefloop",
        messages=SAID,  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three four "
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [4]
    assert [model.id async for model in client.models.list()] == ["prefloop", "prefloop@v0000"]


async def test_it_reads_refusals(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(
            model="prefloop",
            messages=[{"role": "user", "content": "a " * 21}],
        )
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.NotFoundError):
        await client.embeddings.create(model="prefloop", input="hello")
    engine = gateway.running.engine
    engine.dies = True
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="prefloop", messages=SAID)  # type: ignore[arg-type]


async def test_it_raises_what_ends_a_stream(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    engine = gateway.running.engine
    engine.hold_after = 2
    stream = await client.chat.completions.create(model="prefloop", messages=SAID, stream=True)  # type: ignore[arg-type]
    await engine.holding.wait()
    engine.dies = True
    engine.go_on.set()
    with pytest.raises(openai.APIError, match=r"The engine stopped\."):
        async for _ in stream:
            pass


async def test_feedback_goes_through_the_same_client(client: openai.AsyncOpenAI) -> None:
    found = await client.chat.completions.create(model="prefloop", messages=SAID, n=2)  # type: ignore[arg-type]
    response = await client.post("/feedback", body={"id": found.id, "value": "b"}, cast_to=object)
    assert response["data"][0]["value"] == "b"  # type: ignore[index]


def python_with(package: str, directory: Path) -> list[str]:
    """The command of a Python that has the package and nothing of ours."""
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, directory], check=True, timeout=INSTALL_SECONDS)
    python = directory / "bin" / "python"
    done = subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, package],
        capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode and "Failed to fetch" in done.stderr:
        pytest.skip("no registry of Python packages here")
    assert done.returncode == 0, done.stderr
    return [str(python)]


def node_with(package: str, directory: Path) -> list[str]:
    """The command of node in a folder that has the package."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    directory.mkdir()
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=1", package],
        cwd=directory, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode and any(f"code {sign}" in done.stderr for sign in UNREACHABLE):
        pytest.skip("npm cannot fetch packages here")
    assert done.returncode == 0, done.stderr
    return ["node"]


async def results(command: list[str], gateway: Gateway, directory: Path, key: str) -> dict[str, Any]:
    """What the program got."""
    # A proxy that leads nowhere: a client that asked anybody else would fail.
    away = {"HTTP_PROXY": "http://127.0.0.1:1", "HTTPS_PROXY": "http://127.0.0.1:1", "NO_PROXY": "127.0.0.1"}
    process = await asyncio.create_subprocess_exec(
        *command, f"{gateway.url}/v1", key, "key_none.none", cwd=directory,
        env={"PATH": os.environ["PATH"], "HOME": str(directory), **away},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), RUN_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()[-3000:]
    found: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("package", "name"),
    [
        slow("openai", "with_openai.py"),
        slow("litellm", "with_litellm.py"),
        slow("langchain-openai", "with_langchain.py"),
        slow("openai", "with_openai.mjs"),
    ],
)
async def test_a_program_of_others(tmp_path: Path, package: str, name: str) -> None:
    directory = tmp_path / "environment"
    install = node_with if name.endswith(".mjs") else python_with
    command = await asyncio.to_thread(install, package, directory)
    shutil.copy(PROGRAMS / name, directory)
    async with running_server(tmp_path / "data") as running, serving_gateway(running) as gateway:
        key = await running.store(lambda store: store.keys.create("zoe", "user"))
        async with asyncio.timeout(SECONDS):
            while (await gateway.complete(key)).status_code != 200:
                pass
        running.engine.answer, running.engine.pause = ANSWER, 0.02
        found = await results([*command, name], gateway, directory, key)

        def read(store: Store) -> tuple[list[str], list[tuple[str, str]]]:
            rows = store._db.rows("SELECT finish_reason FROM responses WHERE user = 'zoe' AND status != 'finished'")
            votes = [(vote.kind, vote.value) for vote in store.feedback.page("zoe", 10)]
            return [row["finish_reason"] for row in rows], votes

        assert found.pop("voted").startswith("resp_")
        unfinished, votes = await running.store(read)
        # It left in the middle of one answer.
        assert unfinished == ["cancelled"]
        assert ("thumb", "UP") in votes
    assert found.pop("models", ["prefloop", "prefloop@v0000"]) == ["prefloop", "prefloop@v0000"]
    assert found == {
        "stream": ANSWER + " ",
        "tokens": 15,
        "two": [ANSWER + " "] * 2,
        "pinned": "prefloop@v0000",
        "wrong key": "invalid_api_key",
        "too long": "context_length_exceeded",
    }
