"""The gateway over a real server; only its engine is a fake."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from clients.gateway.app import make_gateway
from clients.http.command import server_config
from tests.server.conftest import Running, running_server

SECONDS = 20.0
SAID = [{"role": "user", "content": "hello there"}]


@dataclass
class Gateway:
    """The gateway's URL, an HTTP client, and the server behind it."""

    url: str
    http: httpx.AsyncClient
    running: Running

    async def complete(self, key: str = "any", **fields: Any) -> httpx.Response:
        body = {"model": "prefloop", "messages": SAID, **fields}
        return await self.post("/v1/chat/completions", body, key)

    async def post(self, path: str, body: Any, key: str = "any", **headers: str) -> httpx.Response:
        return await self.http.post(path, json=body, headers={"authorization": f"Bearer {key}", **headers})

    async def chunks(self, **fields: Any) -> list[Any]:
        """The events of a stream, the last one as text."""
        response = await self.complete(stream=True, **fields)
        assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
        assert response.text.endswith("\n\n")
        lines = [event.removeprefix("data: ") for event in response.text.split("\n\n")[:-1]]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@asynccontextmanager
async def serving_gateway(running: Running, **options: Any) -> AsyncIterator[Gateway]:
    """Runs the gateway's own server during the block."""
    listening = socket.create_server(("127.0.0.1", 0))
    app = make_gateway(f"127.0.0.1:{running.app.port}", **{"hosts": ["127.0.0.1"], "default_name": "ann", **options})
    config = server_config(app)
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as http:
            yield Gateway(url, http, running)
    finally:
        server.should_exit = True
        await task
        listening.close()


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_server(tmp_path) as running, serving_gateway(running) as gateway:
        yield gateway


def error(response: httpx.Response) -> tuple[int, str, str | None, str | None]:
    """Status, message, param and code of a refusal."""
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return response.status_code, found["message"], found["param"], found["code"]
