"""The server process: preparation before serving, and cleanup after the last answer."""

import asyncio
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from server.app import App
from server.engine.adapter_engine import AdapterEngine
from server.engine.text_only import TextOnly
from server.engine.vllm_engine import VllmEngine
from server.engine.vllm_start import set_environment, start_engine
from server.grpc_server import GrpcServer
from server.reference.reference import check_reference, check_same_model, check_trust, prepare_reference
from server.settings import ServerSettings
from server.shared.errors import DataDirectoryError, ServiceError
from server.shared.loopback import is_loopback
from server.shared.model.dtype import DtypeName, resolve_dtype
from server.shared.open_files import allow_open_files
from server.store.files.manifest import read_manifest
from server.store.files.sharing import fetch, locally, share, share_all
from server.store.store_thread import StoreThread
from server.telemetry.metrics_http import MetricsServer
from server.votes_app import VotesApp

# Python's default is 5 ms; a statement of the store may wait that long while calls are parsed.
SWITCH_SECONDS = 0.0005
# Open files besides connections: there are 45 without connections, and sampling answers adds none.
OWN_FILES = 200


async def serve(settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Run until SIGTERM or SIGINT. Raises ServiceError with advice if it cannot start."""
    sys.setswitchinterval(SWITCH_SECONDS)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    store = StoreThread(settings.data_dir)
    try:
        if not is_loopback(settings.host):
            credentials = await store(lambda store: store.keys.credentials())
            check_exposure(settings, has_key=bool(credentials.callers))
        connections = connections_that_fit(settings.max_connections)
        if connections < settings.max_connections:
            say(f"accepting at most {connections} connections because of the limit on open files (`ulimit -Hn`)")
            settings = settings.model_copy(update={"max_connections": connections})
        run = _serve_answers if settings.engine else _serve_votes
        await run(settings, store, stopping, say)
    finally:
        await store.close()


def check_exposure(settings: ServerSettings, *, has_key: bool) -> None:
    """Raise ServiceError if other machines could reach this server without TLS or without a key."""
    missing = [] if settings.tls_cert else ["a certificate with PREFLOOP_TLS_CERT and PREFLOOP_TLS_KEY"]
    missing += [] if has_key else ["a key, created with `server keys create --user NAME --role operator`"]
    if missing:
        raise ServiceError(
            f"--host {settings.host} accepts connections from other machines, which requires TLS and keys. "
            f"Missing: {' and '.join(missing)}. Or listen on 127.0.0.1."
        )


def connections_that_fit(wanted: int) -> int:
    """How many connections may be open at once, at most `wanted`. Raises ServiceError if there can be none."""
    files = allow_open_files(wanted + OWN_FILES)
    if files <= OWN_FILES:
        raise ServiceError(f"This process may open {files} files (`ulimit -Hn`), but needs more than {OWN_FILES}.")
    return files - OWN_FILES


async def _serve_votes(
    settings: ServerSettings, store: StoreThread, stopping: asyncio.Event, say: Callable[[str], None]
) -> None:
    app = VotesApp(settings, store)
    start = await store(lambda store: store.policies.origin())
    if not start:
        raise ServiceError("There is no model here yet: start a server with an engine first, which prepares it.")
    await asyncio.to_thread(locally, settings.data_dir, partial(fetch, version=start))
    directory = settings.data_dir / "policies" / start
    check_same_model(directory, settings.model, read_manifest)
    check_trust(directory, settings.trust_remote_code)
    text = await asyncio.to_thread(TextOnly, directory, settings.max_model_len, settings.trust_remote_code)
    await app.start(text)
    await _until_stopped(app, settings, "votes", stopping, say)


async def _serve_answers(
    settings: ServerSettings, store: StoreThread, stopping: asyncio.Event, say: Callable[[str], None]
) -> None:
    app = App(settings, store)
    set_environment(settings)
    dtype = await asyncio.to_thread(resolve_dtype, settings.dtype)
    start = await store(
        lambda store: store.policies.reference() if settings.serve_adapters else store.policies.origin()
    )
    if start:
        await asyncio.to_thread(locally, settings.data_dir, partial(fetch, version=start))
    directory = await asyncio.to_thread(_prepare, settings, dtype.name, start, say)
    if not start:
        # In shared storage before the store says that it exists.
        await asyncio.to_thread(locally, settings.data_dir, partial(share, folder="policies", version=directory.name))
    await store(lambda store: store.policies.register_reference())
    await asyncio.to_thread(locally, settings.data_dir, share_all)
    say(f"starting the engine, which computes in {dtype}")
    # Always start with the same version: compiled code is cached by the model's path. The active one is swapped in.
    engine = make_engine(settings, dtype.name, directory)
    try:
        await engine.start()
        await app.start(engine)
        await _until_stopped(app, settings, engine.version, stopping, say)
    finally:
        await engine.close()
        # The engine is in reference cycles, and complains if it is collected only at interpreter exit.
        gc.unfreeze()
        gc.collect()


async def _until_stopped(
    app: GrpcServer, settings: ServerSettings, what: str, stopping: asyncio.Event, say: Callable[[str], None]
) -> None:
    # The libraries hold a quarter of a million permanent objects; exclude them from garbage collection.
    gc.collect()
    gc.freeze()
    with exposed(app, settings, say):
        say(f"serving {what} on {settings.host}:{app.port}")
        await stopping.wait()
    say("stopping: open streams may finish")
    await app.stop(settings.grace_seconds)


@contextmanager
def exposed(app: GrpcServer, settings: ServerSettings, say: Callable[[str], None]) -> Iterator[None]:
    """Serve metrics and health over HTTP while the block runs. A port in use is reported but is no error."""
    host, port = settings.metrics_host, settings.metrics_port
    try:
        metrics_server = MetricsServer(host, port, lambda: app.serving)
    except OSError as error:
        say(f"no metrics: cannot listen on {host}:{port} ({error.strerror}); choose another PREFLOOP_METRICS_PORT")
        yield
        return
    say(f"metrics on http://{host}:{metrics_server.port}/metrics")
    try:
        yield
    finally:
        metrics_server.close()


def make_engine(settings: ServerSettings, dtype: DtypeName, directory: Path) -> VllmEngine:
    """An engine with the reference in `directory` that can swap versions. Raises ServiceError if the engine cannot
    start; vLLM writes the cause to standard error."""
    start = partial(start_engine, settings, dtype)
    try:
        if settings.serve_adapters:
            return AdapterEngine(start, directory, dtype)
        return VllmEngine(start, directory, dtype, keep_kv=settings.keep_kv_on_swap)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        raise ServiceError(
            f"The engine could not start ({error or type(error).__name__}); vLLM's messages are above. If memory ran "
            f"out: PREFLOOP_KV_CACHE_GIB is {settings.kv_cache_gib}; `server doctor` shows what this machine has."
        ) from error


def _prepare(settings: ServerSettings, dtype: DtypeName, reference: str | None, say: Callable[[str], None]) -> Path:
    """The directory of the reference to start with; at the first start there is none, and v0000 is prepared."""
    try:
        if reference:
            directory = settings.data_dir / "policies" / reference
            return check_reference(directory, settings.model, settings.trust_remote_code, dtype)
        return prepare_reference(settings.data_dir, settings.model, say, settings.trust_remote_code, dtype)
    except OSError as error:
        raise DataDirectoryError(f"{str(settings.data_dir)!r} cannot be written ({error}).") from error
