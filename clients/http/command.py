"""`chat web` and `chat gateway`: the process that serves the page, the gateway or both and, with `--serve`, a server
and a learner.

SIGTERM, Ctrl-C and the end of the terminal all stop first the page, then the learner, then the server, with exit code
0. If one of the processes ends by itself, all are stopped, and its exit code is used.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from clients.channel import Tls
from clients.gateway.app import PREFIX, make_gateway
from clients.http.certificate import serving_context
from clients.http.connections import BoundedProtocol
from clients.loopback import is_loopback

LEARNER = ["learner.cli", "schedule", "--on-request"]
# Longer than a server's grace period (PREFLOOP_GRACE_SECONDS, 30) and a learner's wait for its round (60).
STOP_SECONDS = 75
# Needed because open pages follow their answers indefinitely.
GRACE_SECONDS = 3
LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]
# Wildcard addresses: for listening, not for connecting.
ANYWHERE = ("0.0.0.0", "[::]")


@dataclass(frozen=True)
class Page:
    """The address, names and certificate of the page and the gateway, and the other sites that may call the gateway."""

    host: str
    port: int
    # Names in addition to those of the loopback.
    names: tuple[str, ...] = ()
    cert: Path | None = None
    key: Path | None = None
    origins: tuple[str, ...] = ()

    @property
    def strangers(self) -> bool:
        """Whether they can be reached from other machines."""
        return bool(self.names) or not is_loopback(self.host)


def run(
    page: Page, address: str, default_name: str, tls: Tls | None, *, serve: bool = False, gateway_alone: bool = False
) -> None:
    """Serves the page and the gateway until it is stopped. An invalid setup ends with one sentence and exit code 1."""
    check(page, address)
    app = make(page, address, default_name, tls, gateway_alone=gateway_alone)
    config = server_config(app)
    config.load()
    if page.cert and page.key:
        try:
            config.ssl = serving_context(page.cert, page.key)
        except OSError as error:
            sys.exit(f"chat: {page.cert} and {page.key} are not a certificate and its key ({error.strerror}).")
    server = uvicorn.Server(config)
    listening = listen(page)

    def leave(*_: object) -> None:
        server.should_exit = True

    # Set before any process is started. uvicorn installs its own handlers while it runs and raises the caught signals
    # again afterwards; the default handlers would then kill this process, but not the ones it started.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    with beside(server_and_learner(address) if serve else [], leave) as ended:
        what = "gateway on" if gateway_alone else "chat on"
        print(f"{what} {url(page, listening.getsockname()[1])}{PREFIX if gateway_alone else ''}", flush=True)
        server.run(sockets=[listening])
    sys.exit(next((status for status in ended if status), 0))


def make(page: Page, address: str, default_name: str, tls: Tls | None, *, gateway_alone: bool) -> ASGIApp:
    """The gateway, and the page beside it unless it is to be alone."""
    hosts, name = [*LOOPBACK, *page.names], None if page.strangers else default_name
    gateway = make_gateway(address, hosts=hosts, default_name=name, origins=page.origins, tls=tls)
    if gateway_alone:
        return gateway
    from clients.web.app import make_app

    return beside_page(make_app(address, hosts=hosts, default_name=name, secure=page.strangers, tls=tls), gateway)


def beside_page(page: Starlette, gateway: Starlette) -> ASGIApp:
    """An application that serves both; each has its own middleware and lifespan."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with page.router.lifespan_context(page), gateway.router.lifespan_context(gateway):
            yield

    both = Starlette(lifespan=lifespan)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await both(scope, receive, send)
        elif scope["path"].startswith(PREFIX):
            await gateway(scope, receive, send)
        else:
            await page(scope, receive, send)

    return serve


def server_config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


def check(page: Page, address: str) -> None:
    """Exits with a sentence if the page would be open to others without a name or a certificate."""
    if page.strangers and not page.names:
        sys.exit(f"chat: --web-host {page.host} admits strangers: pass the host name they use with --web-name.")
    if (page.cert is None) != (page.key is None):
        sys.exit("chat: --web-cert and --web-key must be given together.")
    if not is_loopback(page.host) and not page.cert:
        sys.exit(f"chat: --web-host {page.host} admits strangers, which requires --web-cert and --web-key.")
    if address.rpartition(":")[0] in ANYWHERE:
        sys.exit(f"chat: {address} is only for listening: pass the name in the server's certificate with --web-server.")


def listen(page: Page) -> socket.socket:
    """The page's listening socket. Connections wait in it until they are served."""
    family = socket.AF_INET6 if ":" in page.host else socket.AF_INET
    try:
        # "::" means all IPv4 and IPv6 addresses, as for the server.
        return socket.create_server((page.host, page.port), family=family, dualstack_ipv6=page.host == "::")
    except OSError as error:
        # Python appends the address after the reason.
        reason = str(error.strerror).partition(" (while")[0]
        sys.exit(f"chat: {page.host}:{page.port} cannot be used ({reason}); choose another --web-port.")


def url(page: Page, port: int) -> str:
    host = f"[{page.host}]" if ":" in page.host else page.host
    return f"{'https' if page.cert else 'http'}://{host}:{port}"


def server_and_learner(address: str) -> list[list[str]]:
    """The commands that `--serve` runs."""
    host, _, port = address.rpartition(":")
    return [["server.cli", "serve", "--host", host.strip("[]"), "--port", port], LEARNER]


@contextmanager
def beside(commands: list[list[str]], on_end: Callable[[], None]) -> Iterator[list[int]]:
    """Runs prefloop commands as processes during the block, and calls `on_end` when one ends by itself. The yielded
    list collects the exit statuses of those that did, numbered as in a shell."""
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
            # In separate sessions, so that Ctrl-C reaches them only through us, once and in order.
            process = subprocess.Popen(
                [sys.executable, "-m", *command], stdin=subprocess.DEVNULL, start_new_session=True
            )
            running.append((process, threading.Thread(target=watch, args=(process,), daemon=True)))
            running[-1][1].start()
        yield ended
    finally:
        stopping.set()
        # The learner is stopped before the server that it writes to; each gets its grace period.
        for process, watcher in reversed(running):
            process.terminate()
            watcher.join(STOP_SECONDS)
            if watcher.is_alive():
                # Kills its engine or its round too.
                os.killpg(process.pid, signal.SIGKILL)
                watcher.join()
