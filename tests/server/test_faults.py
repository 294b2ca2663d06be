"""A disk that is full, broken or locked: a clear status, no acknowledgement without storage, and no restart needed."""

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pysqlite3.dbapi2 as sqlite3
import pytest
from prefloop.v1 import chat_pb2, feedback_pb2

from server.store.store import Store
from tests.server.conftest import Running, running_server
from tests.server.rpc.test_rpcs import ANN, chat, refusal

NOT_KEPT = "The data directory could not be written. Nothing from this call was stored."
FULL = "The server's disk is full; its operator must free some space. Nothing from this call was stored."
LONG = "x" * 500


async def pragma(running: Running, text: str) -> Any:
    """Apart from every group of calls: a call that fails with the disk would take it along."""
    [writer] = running.store._writers
    connection = writer.store._db._db.conn
    return await asyncio.get_running_loop().run_in_executor(
        writer._executor, lambda: connection.execute(f"PRAGMA {text}").fetchone()
    )


@asynccontextmanager
async def full_disk(running: Running) -> AsyncIterator[None]:
    """SQLite may not add a page: SQLITE_FULL, as on a full disk."""
    [pages] = await pragma(running, "page_count")
    await pragma(running, f"max_page_count = {pages}")
    yield
    await pragma(running, "max_page_count = 1000000")


@asynccontextmanager
async def failing_writes(running: Running) -> AsyncIterator[None]:
    """The system refuses writes beyond the current size: SQLITE_IOERR."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = (running.data_dir / "prefloop.db-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@asynccontextmanager
async def read_only(running: Running) -> AsyncIterator[None]:
    await pragma(running, "query_only = ON")
    yield
    await pragma(running, "query_only = OFF")


@asynccontextmanager
async def taken(running: Running) -> AsyncIterator[None]:
    """Another process holds the write lock for longer than we wait."""
    await pragma(running, "busy_timeout = 10")
    with closing(sqlite3.connect(running.data_dir / "prefloop.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


Fault = Callable[[Running], AbstractAsyncContextManager[None]]


@pytest.mark.parametrize(
    ("fault", "said"), [(full_disk, FULL), (failing_writes, NOT_KEPT), (read_only, NOT_KEPT), (taken, NOT_KEPT)]
)
async def test_nothing_is_acknowledged_without_being_stored_and_the_server_recovers(
    tmp_path: Path, fault: Fault, said: str
) -> None:
    async with running_server(tmp_path, poll_seconds=60) as running:
        started, *_ = await chat(running)
        response_id = started.started.response_id
        await vote(running, response_id, "before")
        async with fault(running):
            kept = await until_refused(lambda: vote(running, response_id, LONG), said)
            chats = await until_refused(lambda: chat(running, LONG), said)
            # Existing data can be read all the time.
            listed = await running.feedback.ListFeedback(feedback_pb2.ListFeedbackRequest(), metadata=ANN)
            assert [one.comment for one in listed.feedback] == [LONG if kept else "before"]
        await vote(running, response_id, "after")
        assert (await chat(running))[-1].finished.text == "one two three four "
    with closing(Store.open(tmp_path)) as store:
        assert store.snapshots.watermark() == kept + 2
        assert len(store.conversations.page("ann", 1000)) == chats + 2


async def until_refused(call: Callable[[], Awaitable[Any]], said: str) -> int:
    """How often it succeeded: a full disk still has space in existing pages."""
    for count in range(1000):
        try:
            await call()
        except grpc.aio.AioRpcError as error:
            assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, said)  # noqa: PT017
            return count
    raise AssertionError("never refused")


async def vote(running: Running, response_id: str, comment: str) -> None:
    thumb = feedback_pb2.SubmitThumbRequest(response_id=response_id, thumb=feedback_pb2.THUMB_UP, comment=comment)
    await running.feedback.SubmitThumb(thumb, metadata=ANN)


async def test_a_disk_failure_during_sampling_fails_the_answer_with_a_clear_status(tmp_path: Path) -> None:
    async with running_server(tmp_path, poll_seconds=60) as running:
        running.engine.hold_after = 1
        call = running.chat.Chat(chat_pb2.ChatRequest(message="hi"), metadata=ANN)
        await call.read()
        await running.engine.holding.wait()
        async with read_only(running):
            running.engine.go_on.set()
            # `finished` says that the answer is on disk, so it must not be sent.
            assert await refusal(call) == (grpc.StatusCode.UNAVAILABLE, NOT_KEPT, ["STORE_UNAVAILABLE"])
        assert (await chat(running))[-1].finished.text == "one two three four "


async def test_a_damaged_page_is_reported_and_other_calls_work(tmp_path: Path) -> None:
    async with running_server(tmp_path, poll_seconds=60) as running:
        started, *_ = await chat(running)
        await vote(running, started.started.response_id, "before")
        await pragma(running, "wal_checkpoint(TRUNCATE)")
        with broken(running.data_dir, await pages_of(running, "feedback_events")):
            # Read again, not from the cache.
            await pragma(running, "shrink_memory")
            thumb = feedback_pb2.SubmitThumbRequest(
                response_id=started.started.response_id, thumb=feedback_pb2.THUMB_DOWN
            )
            code, message, details = await refusal(running.feedback.SubmitThumb(thumb, metadata=ANN))
            assert (code, details) == (grpc.StatusCode.DATA_LOSS, ["STORE_DAMAGED"])
            assert message.startswith("The database is damaged")
            assert (await chat(running))[-1].finished.text == "one two three four "


async def pages_of(running: Running, table: str) -> int:
    return await running.store(
        lambda store: int(store._db.rows("SELECT rootpage FROM sqlite_master WHERE name = ?", [table])[0]["rootpage"])
    )


@contextmanager
def broken(data_dir: Path, page: int) -> Iterator[None]:
    with (data_dir / "prefloop.db").open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    yield


# Replaces the C library's function: fails while a file exists.
FAILING_FSYNC = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
static int sync_or_fail(long call, int fd) {
    if (access(getenv("FAILING"), F_OK) == 0) { errno = EIO; return -1; }
    return syscall(call, fd);
}
int fsync(int fd) { return sync_or_fail(SYS_fsync, fd); }
int fdatasync(int fd) { return sync_or_fail(SYS_fdatasync, fd); }
"""
UNSYNCED = """
import asyncio, os, sys
from pathlib import Path
import grpc
from tests.server.conftest import publish_version, running_server
from tests.server.test_faults import NOT_KEPT, vote
from tests.server.rpc.test_rpcs import chat
from server.admin.backup import back_up
from server.shared.errors import DataDirectoryError

async def refused(call):
    try:
        await call
    except grpc.aio.AioRpcError as error:
        assert error.details() == NOT_KEPT, error
    else:
        raise AssertionError("acknowledged")

async def main():
    failing, data_dir = Path(os.environ["FAILING"]), Path(sys.argv[1])
    async with running_server(data_dir, poll_seconds=60) as running:
        started, *_ = await chat(running)
        response_id = started.started.response_id
        await vote(running, response_id, "before")
        for again in range(3):
            failing.touch()
            await refused(vote(running, response_id, "not kept"))
            await refused(chat(running))
            try:
                publish_version(data_dir, "v0001")
            except OSError as error:
                assert "Input/output error" in str(error)
            else:
                raise AssertionError("published")
            try:
                back_up(data_dir, data_dir / "copy")
            except DataDirectoryError as error:
                assert "Input/output error" in str(error)
            else:
                raise AssertionError("backed up")
            failing.unlink()
            await vote(running, response_id, f"after {again}")
        print("went on", flush=True)
        # Nothing is put away: what is not on disk by now is lost.
        os._exit(0)

asyncio.run(main())
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_a_failed_sync_is_not_acknowledged(tmp_path: Path) -> None:
    (tmp_path / "fsync.c").write_text(FAILING_FSYNC, encoding="utf-8")
    library = tmp_path / "fsync.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "fsync.c"], check=True, timeout=60)
    data_dir = tmp_path / "data"
    result = subprocess.run(
        [sys.executable, "-c", UNSYNCED, data_dir],
        env={**os.environ, "LD_PRELOAD": str(library), "FAILING": str(tmp_path / "failing")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "went on\n"), result.stderr
    with closing(Store.open(data_dir)) as store:
        assert [vote.comment for vote in store.feedback.page("ann", 10)] == ["after 2"]
        assert store.snapshots.watermark() == 4
        assert len(store.conversations.page("ann", 10)) == 1
    assert [path.name for path in (data_dir / "policies").iterdir() if not path.name.startswith(".")] == ["v0000"]
    assert not (data_dir / "copy").exists()
