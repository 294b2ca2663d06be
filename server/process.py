"""The server's process: what is prepared before anybody is served, and put away after the last answer."""

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
from server.engine.reference import prepare_reference
from server.engine.vllm_engine import VllmEngine
from server.engine.vllm_start import set_environment, start_engine
from server.settings import ServerSettings
from server.shared.errors import DataDirectoryError, ServiceError
from server.shared.loopback import is_loopback
from server.shared.model.dtype import DtypeName, resolve_dtype
from server.shared.open_files import allow_open_files
from server.store.store_thread import StoreThread
from server.telemetry.metrics_http import MetricsServer

# Seconds; Python's own are 5 ms, for which a statement of the store may wait while calls are parsed.
SWITCH_SECONDS = 0.0005
# Open files beside connections: it has 45 with nobody connected, and answers that are sampled have none.
OWN_FILES = 200


async def serve(settings: ServerSettings, say: Callable[[str], None]) -> None:
    """Runs until SIGTERM or SIGINT. Raises ServiceError with what to do where it cannot start."""
    sys.setswitchinterval(SWITCH_SECONDS)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    store = StoreThread(settings.data_dir)
    try:
        if not is_loopback(settings.host):
            credentials = await store(lambda store: store.keys.credentials())
            check_exposure(settings, has_key=bool(credentials.callers))
        await _serve(settings, store, stopping, say)
    finally:
        await store.close()


def check_exposure(settings: ServerSettings, *, has_key: bool) -> None:
    """Raises ServiceError where strangers could reach this server without TLS or without a key."""
    missing = [] if settings.tls_cert else ["a certificate with PREFLOOP_TLS_CERT and PREFLOOP_TLS_KEY"]
    missing += [] if has_key else ["a key, made by `server keys create --user NAME --role operator`"]
    if missing:
        raise ServiceError(
            f"--host {settings.host} lets strangers in, which needs TLS and keys. Missing: {' and '.join(missing)}. "
            "Or listen on 127.0.0.1."
        )


def connections_that_fit(wanted: int) -> int:
    """How many connections may be open at once, `wanted` at most. Raises ServiceError where it is none."""
    files = allow_open_files(wanted + OWN_FILES)
    if files <= OWN_FILES:
        raise ServiceError(f"This process may have {files} files open (`ulimit -Hn`), and needs more than {OWN_FILES}.")
    return files - OWN_FILES


async def _serve(
    settings: ServerSettings, store: StoreThread, stopping: asyncio.Event, say: Callable[[str], None]
) -> None:
    connections = connections_that_fit(settings.max_connections)
    if connections < settings.max_connections:
        say(f"at most {connections} connections: this process may have no more files open (`ulimit -Hn`)")
        settings = settings.model_copy(update={"max_connections": connections})
    app = App(settings, store)
    set_environment(settings)
    directory = await asyncio.to_thread(_prepare, settings, say)
    await store(lambda store: store.policies.register_reference())
    dtype = await asyncio.to_thread(resolve_dtype, settings.dtype)
    say(f"starting the engine, which computes in {dtype}")
    # Always from the reference: compiled code is cached by the model's path. The active version is swapped in.
    engine = make_engine(settings, dtype.name, directory)
    try:
        await engine.start()
        await app.start(engine)
        # A quarter of a million objects of the libraries that never die: no collection need look at them again.
        gc.collect()
        gc.freeze()
        with exposed(app, settings, say):
            say(f"serving {engine.version} on {settings.host}:{app.port}")
            await stopping.wait()
        say("stopping: open streams may finish")
        await app.stop(settings.grace_seconds)
    finally:
        await engine.close()
        # The engine stands in reference cycles; collected as late as the interpreter's end, it complains.
        gc.unfreeze()
        gc.collect()


@contextmanager
def exposed(app: App, settings: ServerSettings, say: Callable[[str], None]) -> Iterator[None]:
    """Metrics and health over HTTP while the block runs. Chats matter more: a port in use is said, and no more."""
    host, port = settings.metrics_host, settings.metrics_port
    try:
        metrics_server = MetricsServer(host, port, lambda: app.serving)
    except OSError as error:
        say(f"no metrics: {host}:{port} cannot be listened on ({error.strerror}); choose another PREFLOOP_METRICS_PORT")
        yield
        return
    say(f"metrics on http://{host}:{metrics_server.port}/metrics")
    try:
        yield
    finally:
        metrics_server.close()


def make_engine(settings: ServerSettings, dtype: DtypeName, directory: Path) -> VllmEngine:
    """An engine with the reference in `directory`, and what swaps versions in it. Raises ServiceError where the engine
    cannot start; vLLM writes why to standard error."""
    start = partial(start_engine, settings, dtype, directory)
    try:
        if settings.serve_adapters:
            return AdapterEngine(start, directory, dtype)
        return VllmEngine(start, directory, dtype, keep_kv=settings.keep_kv_on_swap)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        raise ServiceError(
            f"The engine could not start ({error or type(error).__name__}); what vLLM said of it is above. Where it is "
            f"memory: PREFLOOP_KV_CACHE_GIB is {settings.kv_cache_gib}, and `server doctor` says what this machine has."
        ) from error


def _prepare(settings: ServerSettings, say: Callable[[str], None]) -> Path:
    try:
        return prepare_reference(settings.data_dir, settings.model, say)
    except OSError as error:
        raise DataDirectoryError(f"{str(settings.data_dir)!r} cannot be written ({error}).") from error
