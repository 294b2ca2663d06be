"""Fixtures for every test: the repository's root, and the environment that no test may leave to chance."""

import os
from pathlib import Path

import pytest

from tests.node import install

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow` leaves something of every test in the sample."""
    if "not slow" not in config.option.markexpr:
        return
    sampled = {name_of(item) for item in items if not item.get_closest_marker("slow")}
    if left_out := sorted({name_of(item) for item in items} - sampled):
        raise pytest.UsageError(f"all parameters are slow: {', '.join(left_out)}")


def name_of(item: pytest.Item) -> str:
    """Of the test, without its parameters."""
    return item.nodeid.partition("[")[0]


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def node_example(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the JavaScript example, installed; skips where that is not possible."""
    return install(root, tmp_path_factory.mktemp("node"))
