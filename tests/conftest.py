"""Fixtures for every test: the repository's root, and the environment that no test may leave to chance."""

import os
from pathlib import Path

import pytest

from tests.node import install

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parent.parent


@pytest.fixture(scope="session")
def node_example(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the JavaScript example, installed; skips where that is not possible."""
    return install(root, tmp_path_factory.mktemp("node"))
