"""`chat web`: the page's process, and with `--serve` a server and a learner beside it.

SIGTERM, Ctrl-C and the end of the terminal end it alike: first the page, then the learner, then the server. The exit
code is 0 then; where one of the processes ended by itself, all end, with its exit code.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from clients.channel import Tls
from clients.loopback import is_loopback
from clients.web.app import make_app
from clients.web.certificate import serving_context
from clients.web.connections import BoundedProtocol

LEARNER = ["learner.cli", "schedule", "--on-request"]
# Longer than a server's grace (PREFLOOP_GRACE_SECONDS, 30) and than a learner waits for its round (60).
STOP_SECONDS = 75
# Open pages follow their answers for ever.
GRACE_SECONDS = 3
HEADER_BYTES = 64 * 1024
LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
# Every address of a machine: to be listened on, not to be found at.
ANYWHERE = ("0.0.0.0", "[::]")


@dataclass(frozen=True)
class Page:
    """Where browsers find the page."""

    host: str
    port: int
    # Names beside the loopback's.
    names: tuple[str, ...] = ()
    cert: Path | None = None
    key: Path | None = None

    @property
    def strangers(self) -> bool:
        """Whether it can be reached from elsewhere."""
        return bool(self.names) or not is_loopback(self.host)


def run(page: Page, address: str, default_name: str, tls: Tls | None, *, serve: bool) -> None:
    """Serves the page until it is told to end. What cannot work ends with one sentence and exit code 1."""
    check(page, address)
    app = make_app(
        address,
        hosts=[*LOOPBACK, *page.names],
        default_name=None if page.strangers else default_name,
        secure=page.strangers,
        tls=tls,
    )
    config = server_config(app)
    config.load()
    if page.cert and page.key:
        try:
            config.ssl = serving_context(page.cert, page.key)
        except OSError as error:
            sys.exit(f"chat: {page.cert} and {page.key} are no certificate with its key ({error.strerror}).")
    server = uvicorn.Server(config)
    listening = listen(page)

    def leave(*_: object) -> None:
        server.should_exit = True

    # Before there is a process to leave behind. uvicorn has handlers of its own while it runs, and raises again
    # afterwards what they caught: with the default ones that would be the end of us, but not of the processes.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    with beside(server_and_learner(address) if serve else [], leave) as ended:
        print(f"chat on {url(page, listening.getsockname()[1])}", flush=True)
        server.run(sockets=[listening])
    sys.exit(next((status for status in ended if status), 0))


def server_config(app: Starlette) -> uvicorn.Config:
    """How the page is served."""
    return uvicorn.Config(
        app,
        # uvicorn's other parser keeps whatever is sent as headers, a GiB of it.
        http=BoundedProtocol,
        h11_max_incomplete_event_size=HEADER_BYTES,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


def check(page: Page, address: str) -> None:
    """Ends with a sentence where the page would be open to others without what that needs."""
    if page.strangers and not page.names:
        sys.exit(f"chat: --web-host {page.host} lets strangers in: say with --web-name what they call this page.")
    if (page.cert is None) != (page.key is None):
        sys.exit("chat: --web-cert and --web-key go together.")
    if not is_loopback(page.host) and not page.cert:
        sys.exit(f"chat: --web-host {page.host} lets strangers in, which needs --web-cert and --web-key.")
    if address.rpartition(":")[0] in ANYWHERE:
        sys.exit(f"chat: {address} is where a server listens: say with --web-server what its certificate calls it.")


def listen(page: Page) -> socket.socket:
    """The page's socket: what comes from now on waits until it is served."""
    family = socket.AF_INET6 if ":" in page.host else socket.AF_INET
    try:
        # "::" is every address of this machine, as it is to the server.
        return socket.create_server((page.host, page.port), family=family, dualstack_ipv6=page.host == "::")
    except OSError as error:
        # What follows the reason there repeats the address.
        reason = str(error.strerror).partition(" (while")[0]
        sys.exit(f"chat: {page.host}:{page.port} cannot be listened on ({reason}); choose another --web-port.")


def url(page: Page, port: int) -> str:
    """Where the page is, as a browser takes it."""
    host = f"[{page.host}]" if ":" in page.host else page.host
    return f"{'https' if page.cert else 'http'}://{host}:{port}"


def server_and_learner(address: str) -> list[list[str]]:
    """The two commands that `--serve` adds."""
    host, _, port = address.rpartition(":")
    return [["server.cli", "serve", "--host", host.strip("[]"), "--port", port], LEARNER]


@contextmanager
def beside(commands: list[list[str]], on_end: Callable[[], None]) -> Iterator[list[int]]:
    """Runs our own commands as processes while the block runs; the first that ends by itself calls `on_end`. The list
    has the exit status of each that did, as a shell counts it."""
    ended: list[int] = []
    stopping = threading.Event()

    def watch(process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not stopping.is_set():
            ended.append(status if status >= 0 else 128 - status)
            on_end()

    running: list[tuple[subprocess.Popen[bytes], threading.Thread]] = []
    try:
        for command in commands:
            # In sessions of their own: Ctrl-C reaches them through us, once and in order.
            process = subprocess.Popen(
                [sys.executable, "-m", *command], stdin=subprocess.DEVNULL, start_new_session=True
            )
            running.append((process, threading.Thread(target=watch, args=(process,), daemon=True)))
            running[-1][1].start()
        yield ended
    finally:
        stopping.set()
        # The learner before the server, which it writes to; each after its own grace.
        for process, watcher in reversed(running):
            process.terminate()
            watcher.join(STOP_SECONDS)
            if watcher.is_alive():
                # With its engine, or its round.
                os.killpg(process.pid, signal.SIGKILL)
                watcher.join()
