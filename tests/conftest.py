"""Fixtures and environment variables for all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node import install
from tests.postgres import PostgresServer, postgres_server

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Checks that every file has a test that is not `slow`. With two processes, groups the tests so that one process
    runs those that need an engine and the other the rest, since there is memory for only one engine."""
    if "not slow" in config.option.markexpr:
        sampled = {item.path for item in items if not item.get_closest_marker("slow")}
        if left_out := sorted({item.path.name for item in items if item.path not in sampled}):
            raise pytest.UsageError(f"every test in {', '.join(left_out)} is marked slow")
    if config.getoption("dist", "no") == "loadgroup":
        items.sort(key=lambda item: not item.get_closest_marker("e2e"))
        for item in items:
            group = "e2e" if item.get_closest_marker("e2e") else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def node_example(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the installed JavaScript example; skips if it cannot be installed."""
    return install(root, tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server; a test makes a database of its own."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where `Store.open` finds an empty database: in the data directory, or in a server (`on_both`)."""
    name = str(getattr(request, "param", "sqlite"))
    if name == "sqlite":
        yield name
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    url = server.create()
    monkeypatch.setenv("PREFLOOP_STORE_URL", url)
    yield name
    server.drop(url)
