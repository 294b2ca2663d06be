"""The server process's preparation before it serves."""

import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from server import process
from server.doctor.model import read_model
from server.reference.reference import prepare_reference
from server.settings import ServerSettings
from server.shared.errors import ServiceError
from server.store.store import Store
from tests.learner.conftest import save_other_model, save_tiny_model

SECONDS = 30
# More connections than the limit on open files; earlier clients continue.
CROWD = """
import asyncio, resource, sys
from pathlib import Path
from prefloop.v1 import chat_pb2, feedback_pb2
from server.process import connections_that_fit
from tests.server.conftest import running_server

async def main():
    connections = connections_that_fit(2_000)
    async with running_server(Path(sys.argv[1]), max_connections=connections) as running:
        async def vote():
            request = chat_pb2.ChatRequest(message="hi")
            started, *_ = [event async for event in running.chat.Chat(request)]
            thumb = feedback_pb2.SubmitThumbRequest(response_id=started.started.response_id, thumb=1)
            await running.feedback.SubmitThumb(thumb)
        await vote()
        print(connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
        print(running.app.port, flush=True)
        # Until those who crowd crowds has come.
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        await vote()
        print("voted", flush=True)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files")
def test_a_crowd_of_connections_leaves_files_for_the_server(tmp_path: Path) -> None:
    server = subprocess.Popen(
        ["bash", "-c", 'ulimit -Sn 150; ulimit -Hn 300; exec "$@"', "bash", sys.executable, "-c", CROWD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin
    assert server.stdout
    with ExitStack() as crowd:
        crowd.callback(server.kill)
        assert server.stdout.readline() == "100 300\n"
        port = int(server.stdout.readline())
        for _ in range(400):
            connection = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
            crowd.enter_context(connection)
        server.stdin.write("they came\n")
        server.stdin.flush()
        assert server.stdout.readline() == "voted\n"
        assert server.wait(SECONDS) == 0


def test_a_limit_on_open_files_that_allows_no_connection_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "allow_open_files", lambda most: 200)
    with pytest.raises(ServiceError, match=r"may open 200 files \(`ulimit -Hn`\), but needs more than 200"):
        process.connections_that_fit(2_000)


def test_an_engine_that_cannot_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(settings: ServerSettings, dtype: str, directory: Path) -> None:
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setattr(process, "start_engine", start)
    with pytest.raises(ServiceError) as error:
        process.make_engine(ServerSettings(kv_cache_gib=64), "float32", tmp_path)
    assert str(error.value) == (
        "The engine could not start (Engine core initialization failed. See root cause above.); vLLM's messages "
        "are above. If memory ran out: PREFLOOP_KV_CACHE_GIB is 64; `server doctor` shows what this machine has."
    )


async def test_the_engine_is_started_with_the_active_versions_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other, data_dir = tmp_path / "model", tmp_path / "other", tmp_path / "data"
    save_tiny_model(model)
    save_other_model(other)
    started: list[str] = []

    def make_engine(settings: ServerSettings, dtype: str, directory: Path) -> None:
        started.append(directory.name)
        raise ServiceError("no engine here")

    async def serve(path: Path) -> str:
        settings = ServerSettings(data_dir=data_dir, model=str(path), port=0)
        with pytest.raises(ServiceError) as error:
            await process.serve(settings, lambda line: None)
        return str(error.value)

    monkeypatch.setattr(process, "set_environment", lambda settings: None)
    monkeypatch.setattr(process, "make_engine", make_engine)
    assert await serve(model) == "no engine here"
    prepare_reference(data_dir, str(other), lambda line: None, version="v0001")
    store = Store.open(data_dir)
    for version in ("v0001", "v0002"):
        store.policies.register(
            version, kind="full", state="candidate", parent_version=None, reference_version="v0001", round_id=None,
            reward_model_version=None, metrics={},
        )  # fmt: skip
        store.policies.activate(version, actor="operator")
        assert await serve(other) == "no engine here"
    assert started == ["v0000", "v0001", "v0001"]
    # The doctor looks at the same one.
    assert read_model(data_dir, str(other)).problem == ""
    wrong = (
        f"'{data_dir}/policies/v0001' was made from '{other}', not '{model}': start with --model "
        f"{other}, or change the model with `learner rebase --model {model}`, which keeps all votes."
    )
    assert await serve(model) == read_model(data_dir, str(model)).problem == wrong
    # A reference that is gone is not made from whatever model the server is started with.
    shutil.rmtree(data_dir / "policies" / "v0001")
    assert await serve(model) == (
        "The reference cannot be used: v0001 has no directory. Restore it from a backup, or start with another "
        "--data-dir."
    )
    store.close()
