"""Servers as processes, with a fake whose start can be delayed."""

import os
import select
import subprocess
import sys
from pathlib import Path
from queue import Queue

import pytest

from clients.demo import processes
from clients.demo.processes import DemoError, Process, Server
from clients.demo.time_limit import Limit
from tests.clients.conftest import WAIT_SECONDS
from tests.clients.demo.conftest import make_fakes


@pytest.fixture
def fakes(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The working directory comes first on Python's path.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(make_fakes(tmp_path)), str(root), str(root / "proto")]))


@pytest.mark.usefixtures("fakes")
def test_each_line_of_a_start_puts_its_end_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Told(Limit):
        def progress(self) -> None:
            told.append("progress")

    monkeypatch.setattr(processes, "Limit", Told)
    server = Server(tmp_path, None, told.append)
    server.start()
    with server:
        # Library output is only in the log.
        assert told == ["progress", "progress", "starting the engine"]
    log = (tmp_path / "server.log").read_text()
    assert log.startswith("Loading shards: 100%\nstarting the engine\nserving v0000 on 127.0.0.1:")


@pytest.mark.usefixtures("fakes")
def test_a_start_that_gets_nowhere_ends_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_SILENT", "yes")
    monkeypatch.setattr(processes, "SILENT_SECONDS", 0.0)
    said = r"^The server's start made no progress for 0 s\. Its last output: starting the engine$"
    with pytest.raises(DemoError, match=said):
        Server(tmp_path, None, lambda line: None).start()


@pytest.mark.usefixtures("fakes")
def test_a_server_that_ends_while_it_starts_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_REFUSAL", "server: the port is taken.")
    with pytest.raises(DemoError, match=r"^The server did not start: server: the port is taken\.$"):
        Server(tmp_path, None, lambda line: None).start()


def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> list[str]:
    """The command for a module with this code."""
    (tmp_path / "child_under_test.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return ["child_under_test"]


def test_a_process_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.1)
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\nsignal.pause()"
    heard: Queue[str] = Queue()
    process = Process(module(tmp_path, monkeypatch, code), tmp_path / "log", heard.put)
    assert heard.get(timeout=WAIT_SECONDS) == "up"
    assert not process.ended()
    assert process.stop() == -9
    assert process.ended()


def test_what_is_no_utf_8_is_heard_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = r"import os; os.write(1, b'caf\xe9\nlast\n')"
    heard: list[str] = []
    process = Process(module(tmp_path, monkeypatch, code), tmp_path / "log", heard.append)
    assert process.ended(WAIT_SECONDS)
    assert (process.stop(), heard, process.last_words()) == (0, ["caf\ufffd", "last"], "last")


def test_a_process_ends_with_whoever_started_it(tmp_path: Path, root: Path) -> None:
    (tmp_path / "child_under_test.py").write_text("import os, signal\nprint(os.getpid(), flush=True)\nsignal.pause()")
    parent = (
        "import sys\nfrom pathlib import Path\nfrom clients.demo.processes import Process\n"
        f"Process(['child_under_test'], Path({str(tmp_path / 'log')!r}), lambda line: print(line, flush=True))\n"
        "sys.stdin.read()"
    )
    path = os.pathsep.join([str(tmp_path), str(root), str(root / "proto")])
    started = subprocess.Popen(
        [sys.executable, "-c", parent],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout
    child = os.pidfd_open(int(started.stdout.readline()))
    started.kill()
    # Readable once the process has ended.
    assert select.select([child], [], [], WAIT_SECONDS)[0]
    os.close(child)
    started.communicate()
